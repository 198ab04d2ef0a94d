"""The grammar of sequences: layout of the vocabulary, building, checking, splitting and restoring."""

import numpy as np
import pytest

from cm3leon.sequence.grammar import BREAK, EOS, EOSS, SPECIALS, GrammarError, Vocabulary, build_body, check_grammar, restore, split_tail

VOCABULARY = Vocabulary(text_size=50, image_size=20, sentinels=8, tokens_per_image=4)


def text(*ids):
    return ("text", VOCABULARY.text(ids))


def image(*codes):
    return ("image", VOCABULARY.image(codes))


def test_every_id_has_exactly_one_role():
    ids = np.arange(VOCABULARY.size)
    marks = ids < len(SPECIALS)
    roles = np.stack([marks, VOCABULARY.is_sentinel(ids), VOCABULARY.is_image(ids), VOCABULARY.is_text(ids)])
    assert (roles.sum(0) == 1).all()
    assert roles.sum(1).tolist() == [4, 8, 20, 50]


def test_paper_vocabulary_adds_up():
    paper = Vocabulary(text_size=56_320, image_size=8_192, sentinels=512, tokens_per_image=1024)
    assert paper.size == 65_536 - 512 + len(SPECIALS)


def test_body_is_the_papers_sequence():
    body = build_body([[text(1, 2), image(0, 1, 2, 3)], [text(3), image(4, 5, 6, 7)]])
    expected = [EOS, *VOCABULARY.text([1, 2]), BREAK, *VOCABULARY.image([0, 1, 2, 3]), BREAK]
    expected += [*VOCABULARY.text([3]), BREAK, *VOCABULARY.image([4, 5, 6, 7]), EOS]
    assert body.finished().tolist() == expected
    assert [(s.modality, s.document) for s in body.segments] == [("text", 0), ("image", 0), ("text", 1), ("image", 1)]
    for segment in body.segments:
        ids = body.tokens[segment.start : segment.stop]
        assert (VOCABULARY.is_text(ids) if segment.modality == "text" else VOCABULARY.is_image(ids)).all()


def test_an_image_is_whole():
    with pytest.raises(ValueError, match="4 codes, found 3"):
        VOCABULARY.image([1, 2, 3])


def test_a_sentinel_beyond_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="sentinel 8"):
        VOCABULARY.sentinel(8)


GOOD = build_body([[text(1, 2), image(0, 1, 2, 3)]]).finished()
M0, M1 = VOCABULARY.sentinel(0), VOCABULARY.sentinel(1)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (GOOD[1:], "begins and ends"),
        (np.concatenate([GOOD[:3], [EOS], GOOD[3:]]), "inside the sequence, at 3"),
        (np.delete(GOOD, 5), "neither text nor one whole image"),
        (np.concatenate([GOOD[:2], VOCABULARY.image([0, 1, 2, 3]), GOOD[2:]]), "neither text nor"),
        (np.concatenate([GOOD[:2], [M0], GOOD[2:]]), "without its span"),
        (np.concatenate([GOOD[:2], [M0], GOOD[2:-1], [M1, 60, EOSS, EOS]]), "are not those of the tail"),
        (np.concatenate([GOOD[:2], [M0], GOOD[2:-1], [M0, 60, EOSS, 61, EOS]]), "not closed"),
        (np.concatenate([GOOD[:2], [M0, M1], GOOD[2:-1], [M0, 60, M1, EOSS, EOSS, EOS]]), "not closed"),
        (np.concatenate([GOOD[:2], [M0, M1], GOOD[2:-1], [M0, 60, EOSS, EOS]]), "mask tokens for 1 spans"),
    ],
)
def test_violations_are_found(sequence, message):
    with pytest.raises(GrammarError, match=message):
        check_grammar(np.asarray(sequence), VOCABULARY)


def test_masked_sequences_pass_and_restore():
    masked = np.concatenate([GOOD[:1], [M0], GOOD[3:-1], [M0], GOOD[1:3], [EOSS, EOS]])
    check_grammar(masked, VOCABULARY)
    body, tail = split_tail(masked[1:-1], VOCABULARY)
    assert restore(body, tail).tolist() == GOOD[1:-1].tolist()
