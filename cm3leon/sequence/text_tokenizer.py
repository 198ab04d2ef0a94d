"""Byte-level BPE over captions and instructions: any string encodes, and decodes to itself."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cm3leon.utils.files import read_file

FILE = "tokenizer.json"
MADE_BY = "cm3leon text_tokenizer"


class TextTokenizer:
    """Text to ids in ``[0, size)`` and back. Special tokens are not among them: see :class:`cm3leon.sequence.grammar.Vocabulary`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary_size: int) -> TextTokenizer:
        """Learn merges until the vocabulary, which includes the 256 bytes, has ``vocabulary_size`` entries or no pair repeats."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            min_frequency=2,
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, directory: Path) -> TextTokenizer:
        """Read ``directory/tokenizer.json``.

        Raises:
            FileNotFoundError: if there is none.
            DamagedFileError: if it is truncated.
        """
        path = Path(directory) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no text tokenizer here; run: {MADE_BY}")
        return cls(read_file(path, lambda file: Tokenizer.from_file(str(file)), MADE_BY))

    def save(self, directory: Path) -> None:
        """Write ``directory/tokenizer.json``."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(Path(directory) / FILE))

    @property
    def size(self) -> int:
        """Number of ids."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self._tokenizer.encode(text).ids

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """Ids of several texts, encoded in parallel."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)
