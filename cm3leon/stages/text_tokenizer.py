"""Stage ``text_tokenizer``: train byte-level BPE on every text of the train split and of the task templates."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pandas as pd

from cm3leon import paths, tracking
from cm3leon.config import Config
from cm3leon.data.manifest import read_manifest
from cm3leon.tasks import BREAK, COLUMNS, PICTURES, TASKS, available
from cm3leon.tokenizers.text import TextTokenizer

CAPTIONED = ("text_to_image", "caption", "condition_to_image")
"""Tasks whose only texts of a row are captions, which are read whole."""
OTHERS = ("caption", "source", "condition", "kind")
"""Fields that are captions, read whole, or no text of the row."""

TEMPLATE_WEIGHT = 20
"""Times each template counts, so that its words become tokens also on small data."""


def texts(manifest: pd.DataFrame) -> Iterator[str]:
    """All captions; of the other texts what tasks make of a row, once each; the templates' own words, as they stand between what fills
    them."""
    rng = np.random.default_rng(0)
    for row in manifest[[name for name in COLUMNS if name in manifest.columns]].to_dict("records"):
        yield from row["captions"]
        for name in available(row):
            for values in TASKS[name].turns(row, rng) if name not in CAPTIONED else ():
                yield from (f" {text}" if field == "answer" else text for field, text in values.items() if field not in OTHERS)
    for task in TASKS.values():
        for template in task.templates:
            parts = [part for segment in template.split(BREAK) if segment not in PICTURES for part in re.split(r" ?\{\w+\}", segment)]
            yield from [part for part in parts if part] * TEMPLATE_WEIGHT


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
