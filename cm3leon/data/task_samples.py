"""Instruction-tuning samples: for each document of an epoch one of the tasks that its columns allow, by the mix's weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from cm3leon.config import SFTConfig, UserError
from cm3leon.data.sequences import PretrainingSamples, Sample, fit_body, sample_rng, standing
from cm3leon.data.tokens import Document
from cm3leon.documents import build_body
from cm3leon.objective import MARKS, apply_spans
from cm3leon.tasks import TASKS, available, lay_out, turns
from cm3leon.tokenizers.text import TextTokenizer

Turns = list[dict[str, str]]


@dataclass(frozen=True)
class TaskSamples:
    """Samples of the multitask mix over the documents of ``documents.store``; ``manifest`` holds their task columns.

    Rows are those of the ``len(self)`` documents that allow a task of the mix, in the store's order; the others are no samples.

    Raises:
        UserError: if no document allows a task of the mix.
    """

    documents: PretrainingSamples
    manifest: pd.DataFrame
    tokenizer: TextTokenizer
    config: SFTConfig

    def __post_init__(self) -> None:
        if not len(self):
            wanted = {name: TASKS[name].column for name, weight in self.config.tasks.items() if weight > 0}
            columns = ", ".join(f"{name} needs {column}" for name, column in wanted.items())
            raise UserError(
                f"none of {len(self.documents.store)} documents of a split has what a task of sft.tasks needs ({columns}): "
                "add the column to the collection, or another task to sft.tasks"
            )

    def __len__(self) -> int:
        return len(self._usable)

    @cached_property
    def _usable(self) -> list[int]:
        """Rows of the store whose documents allow a task."""
        return [row for row, name in enumerate(self.documents.store.ids) if self.choices(self._rows[name])]

    @cached_property
    def _rows(self) -> dict[str, dict[str, Any]]:
        columns = sorted({task.column for task in TASKS.values()} & set(self.manifest.columns))
        return dict(zip(self.manifest["id"], self.manifest[columns].to_dict("records"), strict=True))

    def choices(self, row: dict[str, Any]) -> list[str]:
        """Tasks of the mix that a row allows."""
        return [name for name in available(row) if self.config.tasks.get(name, 0) > 0]

    def counts(self) -> Counter[str]:
        """Documents available to each task of the mix."""
        return Counter(name for row in self._rows.values() for name in self.choices(row))

    def __call__(self, epoch: int, row: int) -> Sample:
        document = self.documents.store[self._usable[row]]
        rng = sample_rng(self.documents.seed + 1, epoch, document.id)
        values = self._rows[document.id]
        names = self.choices(values)
        weights = np.array([self.config.tasks[name] for name in names])
        name = names[int(rng.choice(len(names), p=weights / weights.sum()))]
        task = TASKS[name]
        template = task.templates[int(rng.integers(len(task.templates)))]
        asked = turns(name, values, rng, self.config.questions_per_sample)
        if task.draws:
            return self._drawn(document, template, asked, rng)
        return self._answered(document, template, asked)

    def _drawn(self, document: Document, template: str, asked: Turns, rng: np.random.Generator) -> Sample:
        """A sample that ends in an image; retrieved documents may stand before it, and its text may be masked, for guidance."""
        vocabulary = self.documents.vocabulary
        segments, _ = lay_out(template, asked, document.codes, vocabulary, self.tokenizer)
        chosen, retrieved = self.documents.neighbours_of(document.id, rng)
        body = fit_body([*retrieved, segments], self.documents.context - 1 - MARKS)
        text = next(s for s in body.segments if s.document == body.segments[-1].document and s.modality == "text")
        dropped = rng.random() < self.config.caption_drop
        masked = apply_spans(body, [(text.start, text.stop)] if dropped else [], vocabulary)
        return Sample(masked, masked.is_target.astype(np.float32), standing(body, [*chosen, document.id]))

    def _answered(self, document: Document, template: str, asked: Turns) -> Sample:
        """A sample that ends in the answers to its questions; what does not fit in the context loses its last questions first."""
        vocabulary, context = self.documents.vocabulary, self.documents.context
        asked = asked[: vocabulary.sentinels]
        while True:
            segments, answers = lay_out(template, asked, document.codes, vocabulary, self.tokenizer)
            longest = context - 1 - MARKS * len(answers)
            if len(asked) == 1 or len(build_body([segments]).tokens) <= longest:
                break
            asked = asked[:-1]
        body = fit_body([segments], longest)
        spans = [(min(1 + start, end := body.segments[0].stop), min(1 + stop, end)) for start, stop in answers]
        masked = apply_spans(body, spans, vocabulary)
        tail = len(body.tokens) + len(spans) - sum(stop - start for start, stop in spans)  # where the first answer's mask stands again
        weight = masked.is_target.astype(np.float32)
        weight[:tail] *= self.config.input_weight
        weight[tail:-1] *= self.config.answer_weight
        return Sample(masked, weight, (document.id,))
