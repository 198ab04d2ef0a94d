"""What forms of a batch cost: python -m benchmarks.batches [--steps 24]; in a project with a finished run.

Training steps of ``pretrain`` and ``sft`` on the same samples in three forms, which take turns: as the stages compute them, in random order
without padding, or with what oneDNN needs; in rows padded to the longest of a random batch; and in padded rows of batches that are sorted
by length, 16 together.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

from cm3leon.config import paths
from cm3leon.config.loading import load_config
from cm3leon.config.schema import TrainConfig
from cm3leon.data.batches import Batch, SampleStream, collate, length_of, pack
from cm3leon.data.sequences import PretrainingSamples, Sample
from cm3leon.data.task_samples import TaskSamples
from cm3leon.data.tokens import TokenStore
from cm3leon.models.decoder import Decoder
from cm3leon.models.kernels import ROWS_MULTIPLE, convolves
from cm3leon.training.instruction_tuning import task_samples
from cm3leon.training.pretraining import build_decoder, training_samples
from cm3leon.training.trainer import setup

SORTED_TOGETHER = 16
"""Batches whose samples are sorted by length together."""
ROUNDS = 4


def sorted_by_length(batches: Sequence[list[Sample]]) -> list[list[Sample]]:
    """The same samples in as many batches, each of samples of like length."""
    found = []
    for start in range(0, len(batches), SORTED_TOGETHER):
        samples = sorted((sample for batch in batches[start : start + SORTED_TOGETHER] for sample in batch), key=length_of)
        size = len(batches[start])
        found += [samples[first : first + size] for first in range(0, len(samples), size)]
    return found


def tokens_computed(batch: Batch, model: Decoder) -> int:
    """Tokens of a batch as the decoder computes it, with padding."""
    filled = batch.filled_up(ROWS_MULTIPLE) if batch.cu_seqlens is not None and convolves(model.device) else batch
    return filled.tokens.numel()


def measure(stage: str, steps: int) -> str:
    """The stage's row of the table: milliseconds a step in each form, median and range, and the padding."""
    config = load_config()
    store = TokenStore(paths.TOKENS, ["train"])
    model = build_decoder(config.pretrain.model, config.seed)
    section: TrainConfig = getattr(config, stage)
    samples: PretrainingSamples | TaskSamples
    if stage == "pretrain":
        samples = training_samples(store, model.vocabulary, config.pretrain, config.seed)
    else:
        samples = task_samples("train", store, model, config.sft, config.seed)
    stream = SampleStream(samples, len(samples), section.batch_size, config.seed)
    drawn = [stream.samples(step) for step in range(ROUNDS * steps)]
    forms: dict[str, list[Batch]] = {
        "packed": [pack(batch) for batch in drawn],
        "padded": [collate(batch) for batch in drawn],
        "sorted": [collate(batch) for batch in sorted_by_length(drawn)],
    }
    state = setup(model, section)

    def step(batch: Batch) -> None:
        total, _ = model.losses(batch)
        (total / batch.weights.sum()).backward()
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    seconds: dict[str, list[float]] = {form: [] for form in forms}
    for number in range(ROUNDS):
        for form, batches in forms.items():
            step(batches[0])  # not timed: the first of a form makes what its shapes need
            start = time.perf_counter()
            for batch in batches[number * steps : (number + 1) * steps]:
                step(batch)
            seconds[form].append((time.perf_counter() - start) / steps)
    used = sum(batch.tokens.numel() for batch in forms["packed"])
    cells = []
    for form, found in seconds.items():
        padding = 1 - used / sum(tokens_computed(batch, model) for batch in forms[form])
        cells.append(f"{1000 * statistics.median(found):.0f} ({1000 * min(found):.0f} to {1000 * max(found):.0f}), {padding:.0%}")
    return f"| {stage} | {' | '.join(cells)} |"


def main() -> None:
    """Print the figures as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help="steps of each form in each of four rounds")
    options = parser.parse_args()
    print("| ms a step; padding | random, packed | random, padded | sorted, padded |\n|---|---|---|---|")
    for stage in ("pretrain", "sft"):
        print(measure(stage, options.steps), flush=True)


if __name__ == "__main__":
    main()
