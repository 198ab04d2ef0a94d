"""Instruction-tuning samples: in each epoch a mix of the tasks that the collection's columns allow.

How often a task comes derives from its weight, but no task is drawn more than ``upsampling`` or less than ``downsampling`` times as often
as its share of what is there (paper, section 4.1: 3 and 0.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from cm3leon.config.schema import SFTConfig
from cm3leon.data.sequences import PretrainingSamples, Sample, fit_body, sample_rng, standing
from cm3leon.data.tokens import Document, TokenStore
from cm3leon.sequence.cm3 import MARKS, apply_spans
from cm3leon.sequence.grammar import build_body
from cm3leon.sequence.tasks import COLUMNS, TASKS, Task, Values, available, condition_key, lay_out, visible_objects
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.utils.errors import UserError


@dataclass(frozen=True)
class TaskSamples:
    """Samples of the multitask mix over the documents of ``documents.store``.

    ``manifest`` holds their task columns, ``conditions`` the codes of their condition images.

    Raises:
        UserError: if no document allows a task of the mix.
    """

    documents: PretrainingSamples
    manifest: pd.DataFrame
    tokenizer: TextTokenizer
    config: SFTConfig
    conditions: TokenStore | None = None

    def __post_init__(self) -> None:
        if not self.rows:
            wanted = {name: TASKS[name].columns for name, weight in self.config.tasks.items() if weight > 0}
            columns = ", ".join(f"{name} needs {' and '.join(needed)}" for name, needed in wanted.items())
            raise UserError(
                f"none of {len(self.documents.store)} documents of a split has what a task of sft.tasks needs ({columns}): "
                "add the column to the collection, or another task to sft.tasks"
            )

    def __len__(self) -> int:
        """Samples in an epoch: as many as there are documents that allow a task of the mix."""
        return self._size

    @cached_property
    def _size(self) -> int:
        return len(np.unique(np.concatenate(list(self.rows.values()))))

    @cached_property
    def _values(self) -> dict[str, dict[str, Any]]:
        columns = [name for name in COLUMNS if name in self.manifest.columns]
        return {row["id"]: row for row in self.manifest[columns].to_dict("records")}

    @cached_property
    def rows(self) -> dict[str, np.ndarray]:
        """Of each task of the mix that some document allows, the rows of the store whose documents do."""
        found: dict[str, list[int]] = {name: [] for name in TASKS if self.config.tasks.get(name, 0) > 0}
        for row, name in enumerate(self.documents.store.ids):
            for task in self._allowed(self._values[name]):
                found[task].append(row)
        return {name: np.array(rows) for name, rows in found.items() if rows}

    def _allowed(self, values: Mapping[str, Any]) -> list[str]:
        """Tasks of the mix that a row allows, its other pictures being there and its objects in sight."""
        allowed = [name for name in available(values) if self.config.tasks.get(name, 0) > 0]
        if "edit" in allowed and values["edited_from"] not in self.documents.store:
            allowed.remove("edit")
        if "condition_to_image" in allowed and not self._kinds(values):
            allowed.remove("condition_to_image")
        if "layout_to_image" in allowed and not visible_objects(values):
            allowed.remove("layout_to_image")
        return allowed

    def _kinds(self, values: Mapping[str, Any]) -> list[str]:
        kinds = [item["kind"] for item in values["conditions"]]
        return [kind for kind in kinds if self.conditions is not None and condition_key(values["id"], kind) in self.conditions]

    def only(self, task: str) -> TaskSamples:
        """The samples of one task of the mix."""
        return TaskSamples(
            self.documents, self.manifest, self.tokenizer, self.config.model_copy(update={"tasks": {task: 1.0}}), self.conditions
        )

    @property
    def counts(self) -> dict[str, int]:
        """Documents available to each task of the mix."""
        return {name: len(rows) for name, rows in self.rows.items()}

    @cached_property
    def shares(self) -> dict[str, float]:
        """Share of each task in the mix."""
        return bounded_shares(self.counts, self.config.tasks, self.config.downsampling, self.config.upsampling)

    def __call__(self, epoch: int, number: int) -> Sample:
        name, row = self._place(epoch, number)
        task, document = TASKS[name], self.documents.store[row]
        rng = sample_rng(self.documents.seed + 1 + list(TASKS).index(name), epoch, document.id)
        turns = task.turns(self._values[document.id], rng)
        template = task.templates[int(rng.integers(len(task.templates)))]
        if task.draws:
            sample = self._drawn(document, task, template, self._with_pictures(turns), rng)
        else:
            sample = self._answered(document, template, turns[: int(rng.integers(1, self.config.questions_per_sample + 1))])
        return sample._replace(task=1 + list(TASKS).index(name))

    def _with_pictures(self, turns: Sequence[Values]) -> Values:
        """The first turn whose other picture is there."""
        return next(
            turn for turn in turns if "condition" not in turn or (self.conditions is not None and turn["condition"] in self.conditions)
        )

    @cached_property
    def _bounds(self) -> np.ndarray:
        """Where in an epoch the samples of each task begin, and its end."""
        return np.concatenate([[0], np.round(np.cumsum(list(self.shares.values())) * len(self)).astype(int)])

    def _place(self, epoch: int, number: int) -> tuple[str, int]:
        """Task and row of a sample. Of each task every document comes once before one comes again."""
        which = int(np.searchsorted(self._bounds, number, side="right")) - 1
        name, quota = list(self.shares)[which], int(self._bounds[which + 1] - self._bounds[which])
        cycle, place = divmod(epoch * quota + number - int(self._bounds[which]), len(self.rows[name]))
        return name, int(self.rows[name][self._order(name, cycle)[place]])

    def _order(self, task: str, cycle: int) -> np.ndarray:
        """In which order the documents of a task come in its ``cycle``-th round; the last two asked for are kept."""
        held = self._orders.setdefault(task, {})
        if cycle not in held:
            seeds = (self.documents.seed, 3, list(TASKS).index(task), cycle)
            held[cycle] = np.random.default_rng(seeds).permutation(len(self.rows[task]))
            self._orders[task] = dict(list(held.items())[-2:])
        return self._orders[task][cycle]

    @cached_property
    def _orders(self) -> dict[str, dict[int, np.ndarray]]:
        return {}

    def _drawn(self, document: Document, task: Task, template: str, values: Values, rng: np.random.Generator) -> Sample:
        """A sample that ends in an image; some of what stands before it may be masked, for guidance.

        Retrieved documents may stand before the text of those that are drawn from text alone.
        """
        vocabulary = self.documents.vocabulary
        images = {"image": document.codes}
        if "source" in values:
            images["source"] = self.documents.store.by_id(values["source"]).codes
        if "condition" in values and self.conditions is not None:
            images["condition"] = self.conditions.by_id(values["condition"]).codes
        segments, _ = lay_out(template, [values], images, vocabulary, self.tokenizer)
        chosen, retrieved = ([], []) if task.sees else self.documents.neighbours_of(document.id, rng)
        body = fit_body([*retrieved, segments], self.documents.context - 1 - MARKS * max(map(len, task.hidden)))
        own = [segment for segment in body.segments if segment.document == body.segments[-1].document]
        hidden = task.hidden[int(rng.integers(len(task.hidden)))] if rng.random() < self.config.conditioning_dropout else ()
        spans = [(own[number].start, own[number].stop) for number in hidden]
        masked = apply_spans(body, spans, vocabulary)
        weight = masked.is_target.astype(np.float32)
        weight[: own[-1].start + len(spans) - sum(stop - start for start, stop in spans)] *= self.config.input_weight
        return Sample(masked, weight, standing(body, [*chosen, document.id]))

    def _answered(self, document: Document, template: str, asked: Sequence[Values]) -> Sample:
        """A sample that ends in the answers to its questions; what does not fit in the context loses its last questions first."""
        vocabulary, context = self.documents.vocabulary, self.documents.context
        asked = asked[: vocabulary.sentinels]
        while True:
            segments, answers = lay_out(template, asked, {"image": document.codes}, vocabulary, self.tokenizer)
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


def bounded_shares(counts: Mapping[str, int], weights: Mapping[str, float], least: float, most: float) -> dict[str, float]:
    """Shares of a mix, which sum to 1: in proportion to the weights, but for those that would be more than ``most`` or less than ``least``
    times a task's share of what is there, which stop there.

    Args:
        counts: samples of each task that are there.
    """
    there = np.array(list(counts.values())) / sum(counts.values())
    wanted = np.array([weights[name] for name in counts])

    def shares(scale: float) -> np.ndarray:
        return np.clip(scale * wanted, least * there, most * there)

    low, high = 0.0, float(most / wanted.min())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if shares(middle).sum() < 1 else (low, middle)
    found = shares(high)
    return dict(zip(counts, (found / found.sum()).tolist(), strict=True))
