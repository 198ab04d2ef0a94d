"""Stage ``text_tokenizer``: train byte-level BPE on every text of the train split and of the task templates."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pandas as pd

from cm3leon import paths, tracking
from cm3leon.config import Config
from cm3leon.data.manifest import read_manifest
from cm3leon.tasks import TASKS
from cm3leon.tokenizers.text import TextTokenizer

TEMPLATE_WEIGHT = 20
"""Times each template counts, so that its words become tokens also on small data."""


def texts(manifest: pd.DataFrame) -> Iterator[str]:
    """Captions, long captions, questions and answers, and the templates' own words, as they stand between what fills them."""
    for row in manifest.itertuples():
        yield from row.captions
        if isinstance(row.long_caption, str):
            yield row.long_caption
        for item in row.questions if row.questions is not None else ():
            yield item["question"]
            yield from (f" {answer}" for answer in item["answers"])
    for task in TASKS.values():
        for template in task.templates:
            yield from [part for part in re.split(r" ?\{\w+\}", template) if part] * TEMPLATE_WEIGHT


def run(config: Config) -> dict[str, float]:
    """Writes ``models/text_tokenizer/``; returns the vocabulary's size and how many characters a token stands for."""
    with tracking.stage_run("text_tokenizer", config) as run:
        tokenizer = TextTokenizer.train(texts(read_manifest(paths.VALIDATED, "train")), config.text_tokenizer.vocabulary_size)
        tokenizer.save(paths.TEXT_TOKENIZER)
        captions = [caption for captions in read_manifest(paths.VALIDATED, "val")["captions"] for caption in captions]
        lengths = [len(ids) for ids in tokenizer.encode_many(captions)]
        figures = {
            "vocabulary": float(tokenizer.size),
            "characters_per_token": sum(map(len, captions)) / max(sum(lengths), 1),
            "tokens_per_caption": sum(lengths) / max(len(lengths), 1),
        }
        run.log_metrics({f"text_tokenizer/{k}": v for k, v in figures.items()})
    return figures
