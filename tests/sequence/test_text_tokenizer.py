"""Byte-level BPE: every string comes back."""

from hypothesis import given
from hypothesis import strategies as st

from cm3leon.sequence.text_tokenizer import TextTokenizer

CAPTIONS = ["a red circle left of a blue square on a gray background", "two small green rings on white", "the letter A in red"] * 5
TOKENIZER = TextTokenizer.train(CAPTIONS, 320)


@given(st.text(max_size=60))
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_known_words_are_short_and_unknown_ones_are_not_lost():
    assert len(TOKENIZER.encode(CAPTIONS[0])) < len(CAPTIONS[0]) / 2
    assert TOKENIZER.decode(TOKENIZER.encode("žluťoučký 🐎\n")) == "žluťoučký 🐎\n"


def test_training_is_deterministic_and_saving_keeps_everything(tmp_path):
    TOKENIZER.save(tmp_path)
    TextTokenizer.train(CAPTIONS, 320).save(tmp_path / "again")
    assert (tmp_path / "tokenizer.json").read_bytes() == (tmp_path / "again" / "tokenizer.json").read_bytes()
    loaded = TextTokenizer.load(tmp_path)
    assert loaded.size == TOKENIZER.size <= 320
    assert loaded.encode_many(CAPTIONS) == [TOKENIZER.encode(c) for c in CAPTIONS]
