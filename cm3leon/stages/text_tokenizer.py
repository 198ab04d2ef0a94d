"""Stage ``text_tokenizer``: train byte-level BPE on every text of the train split and of the task templates."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pandas as pd

from cm3leon.config import paths
from cm3leon.config.schema import Config
from cm3leon.data.manifest import read_manifest, records_of
from cm3leon.sequence.tasks import BREAK, IMAGE_FIELDS, TASK_COLUMNS, TASKS, available, split_template
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.tracking import runs


def texts(manifest: pd.DataFrame) -> Iterator[str]:
    """The texts that training will see.

    (1) the captions; (2) each task's texts for each row, its templates taken in turn; (3) the words of every template once, also of tasks
    that no row allows.
    """
    rng = np.random.default_rng(0)
    for number, row in enumerate(records_of(manifest[[name for name in TASK_COLUMNS if name in manifest.columns]])):
        yield from row["captions"]
        for name in available(row):
            segments = TASKS[name].templates[number % len(TASKS[name].templates)].split(BREAK)
            for values in TASKS[name].sample_fields(row, rng):
                yield from ("".join(split_template(segment, values)) for segment in segments if segment not in IMAGE_FIELDS)
    for segment in (segment for task in TASKS.values() for template in task.templates for segment in template.split(BREAK)):
        yield from (part for part in re.split(r" ?\{\w+\}", segment) if part and segment not in IMAGE_FIELDS)


def run(config: Config) -> dict[str, float]:
    """Write ``models/text_tokenizer/``.

    Returns:
        The vocabulary's size, and on the captions of val the characters per token and tokens per caption.
    """
    with runs.stage_run("text_tokenizer", config) as run:
        tokenizer = TextTokenizer.train(texts(read_manifest(paths.VALIDATED, "train")), config.text_tokenizer.vocabulary_size)
        tokenizer.save(paths.TEXT_TOKENIZER)
        captions = [caption for captions in read_manifest(paths.VALIDATED, "val")["captions"] for caption in captions]
        lengths = [len(ids) for ids in tokenizer.encode_many(captions)]
        metrics = {
            "vocabulary": float(tokenizer.size),
            "characters_per_token": sum(map(len, captions)) / max(sum(lengths), 1),
            "tokens_per_caption": sum(lengths) / max(len(lengths), 1),
        }
        run.log_metrics({f"text_tokenizer/{k}": v for k, v in metrics.items()})
    return metrics
