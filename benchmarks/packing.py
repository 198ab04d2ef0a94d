"""How full packed steps are at the paper's sizes, how evenly they are divided, and how fast samples are made: python benchmarks/packing.py

Documents are made up: images of 1,024 codes and captions of 5 to 20 tokens, retrieved documents as in profile ``cm3leon-350m``, rows of
4,096 tokens. For comparison the same samples one a row, padded to the longest of a micro-batch, and in rows that are filled with the
longest of 16 samples that fit.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cm3leon.config.profiles import load_profile
from cm3leon.data.batches import TokenStream, length_of
from cm3leon.data.sequences import PretrainingSamples, Sample
from cm3leon.data.tokens import Document, TokenStore, write_tokens
from cm3leon.sequence.grammar import Vocabulary
from cm3leon.training.planning import vocabulary_of

DOCUMENTS = 2000
LOOKAHEAD = 16
PROCESSES = (1, 8, 64)


def documents(vocabulary: Vocabulary) -> Iterator[Document]:
    """Documents of random codes and captions."""
    rng = np.random.default_rng(0)
    for number in range(DOCUMENTS):
        codes = rng.integers(vocabulary.image_size, size=vocabulary.tokens_per_image).astype(np.uint16)
        yield Document(f"{number:016x}", codes, [rng.integers(vocabulary.text_size, size=int(rng.integers(5, 21)))])


def tokens_of(samples: Sequence[Sample]) -> int:
    """Tokens of samples together."""
    return sum(map(length_of, samples))


def padding_of_filled_rows(samples: Sequence[Sample], length: int) -> float:
    """Share of padding where each row takes the oldest of 16 samples, then the longest that fits until none does."""
    coming = [length_of(sample) for sample in samples]
    held, coming = coming[:LOOKAHEAD], coming[LOOKAHEAD:]
    rows = used = 0
    while coming:
        room = length - held.pop(0)
        while fitting := [size for size in held if size <= room]:
            held.remove(max(fitting))
            room -= max(fitting)
        rows, used = rows + 1, used + length - room
        refill = LOOKAHEAD - len(held)
        held, coming = held + coming[:refill], coming[refill:]
    return 1 - used / (rows * length)


def main() -> None:
    """Print the figures as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=256, help="rows of 4,096 tokens a step")
    parser.add_argument("--micro-rows", type=int, default=8, help="limit of a micro-batch, in rows")
    options = parser.parse_args()
    config = load_profile("cm3leon-350m")
    section, vocabulary = config.pretrain, vocabulary_of(config)
    context = section.model.context
    with tempfile.TemporaryDirectory() as directory:
        write_tokens(Path(directory), "train", documents(vocabulary), vocabulary.tokens_per_image, vocabulary.text_size)
        store = TokenStore(Path(directory))
        neighbors = {name: [store.ids[(row + i) % len(store)] for i in range(1, 5)] for row, name in enumerate(store.ids)}
        draw = PretrainingSamples(store, store, neighbors, vocabulary, section.objective, section.retrieved_documents, context, config.seed)

        # 1. Packed steps: tokens, seconds to make the samples, and how evenly processes and micro-batches share them.
        stream = TokenStream(draw, len(store), options.rows, config.seed, context)
        counts, seconds = [], []
        uneven: dict[int, list[float]] = {number: [] for number in PROCESSES}
        every: list[Sample] = []
        for step in range(options.steps):
            start = time.perf_counter()
            samples = stream.samples(step)
            seconds.append(time.perf_counter() - start)
            counts.append(tokens_of(samples))
            for number in PROCESSES:
                shares = [sum(map(tokens_of, mine)) for mine in stream.divide(samples, number, options.micro_rows)]
                uneven[number].append(max(shares) / statistics.mean(shares))
            every += samples

    # 2. The same samples one a row.
    lengths = [length_of(sample) for sample in every]
    parts = [lengths[start : start + options.micro_rows] for start in range(0, len(lengths), options.micro_rows)]
    padded = sum(len(part) * max(part) for part in parts)

    print("| what | figure |\n|---|---|")
    print(f"| padding, rows filled with whole samples | {padding_of_filled_rows(every, context):.1%} |")
    print(f"| padding, one sample a row | {1 - sum(lengths) / padded:.1%} |")
    print(f"| tokens a step, of the budget | {sum(counts) / (options.steps * options.rows * context):.2%} |")
    print(f"| tokens a step, range | {min(counts):,} to {max(counts):,} |")
    for number, ratios in uneven.items():
        print(f"| busiest of {number} processes, of the mean | {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |")
    rates = [count / second for count, second in zip(counts, seconds, strict=True)]
    print(f"| tokens made per second | {statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) |")


if __name__ == "__main__":
    main()
