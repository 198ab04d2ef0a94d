"""Made-up tokenized documents for tests."""

from collections.abc import Iterator

import numpy as np

from cm3leon.data.tokens import Document


def make_documents(count: int, seed: int = 0, text_size: int = 100) -> Iterator[Document]:
    """``count`` documents of 16 codes below 50 and one or two texts; ids are 1, 2, ... in hex."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        texts = [rng.integers(text_size, size=int(rng.integers(3, 12))) for _ in range(int(rng.integers(1, 3)))]
        yield Document(f"{number + 1:016x}", rng.integers(50, size=16).astype(np.uint16), texts)
