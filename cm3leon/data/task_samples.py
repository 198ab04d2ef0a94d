"""Instruction-tuning samples: in each epoch a mix of the tasks that the collection's columns allow.

A task's share of the mix is proportional to its weight, bounded by ``downsampling`` and ``upsampling`` times its share of the available
samples (paper, section 4.1: 0.3 and 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from cm3leon.config.schema import SFTConfig
from cm3leon.data.epochs import Epochs, Weights
from cm3leon.data.sequences import PretrainingSamples, Sample, fit_body, kept_documents, sample_rng
from cm3leon.data.tokens import Document, TokenStore
from cm3leon.sequence.cm3 import TOKENS_PER_SPAN, apply_spans, fit, region_spans, sample_region, sample_spans
from cm3leon.sequence.grammar import build_body
from cm3leon.sequence.tasks import TASKS, Fields, Task, available, condition_key, lay_out, visible_objects
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.utils.errors import UserError


@dataclass(frozen=True)
class TaskSamples:
    """Samples of the multitask mix over the documents of ``pretraining.store``.

    Attributes:
        pretraining: the documents, how they are retrieved, and the context's length.
        records: of the documents, with the columns that tasks need.
        conditions: codes of their condition images.
        weights: of the documents, in the order of the store; None: all 1.

    Raises:
        UserError: if no document allows a task of the mix.
    """

    pretraining: PretrainingSamples
    records: Mapping[str, Mapping[str, Any]]
    tokenizer: TextTokenizer
    config: SFTConfig
    conditions: TokenStore | None = None
    weights: Weights | None = None

    def __post_init__(self) -> None:
        if not self.rows:
            wanted = {name: TASKS[name].columns for name, weight in self.config.tasks.items() if weight > 0}
            columns = ", ".join(f"{name} needs {' and '.join(needed)}" for name, needed in wanted.items())
            raise UserError(
                f"none of {len(self.pretraining.store)} documents of a split has what a task of sft.tasks needs ({columns}): "
                "add the column to the collection, or another task to sft.tasks"
            )

    def __len__(self) -> int:
        """Samples in an epoch: the number of documents that allow a task of the mix, or the sum of their weights."""
        return self._size

    @cached_property
    def _size(self) -> int:
        return max(1, round(self._amount(np.unique(np.concatenate(list(self.rows.values()))))))

    def _amount(self, rows: np.ndarray) -> float:
        """The sum of the weights of some documents."""
        return float(len(rows)) if self.weights is None else float(self.weights[rows].values.sum())

    @cached_property
    def rows(self) -> dict[str, np.ndarray]:
        """Rows of the store whose documents allow each task of the mix; tasks that none allows are left out."""
        found: dict[str, list[int]] = {name: [] for name in TASKS if self.config.tasks.get(name, 0) > 0}
        for row, document_id in enumerate(self.pretraining.store.ids):
            for task in self._allowed(self.records[document_id]):
                found[task].append(row)
        return {name: np.array(rows) for name, rows in found.items() if rows}

    def _allowed(self, values: Mapping[str, Any]) -> list[str]:
        """Tasks of the mix that a record allows: it needs the codes of its other images, and objects inside the center crop."""
        allowed = [name for name in available(values) if self.config.tasks.get(name, 0) > 0]
        if "edit" in allowed and values["edited_from"] not in self.pretraining.store:
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
        return replace(self, config=self.config.model_copy(update={"tasks": {task: 1.0}}))

    @property
    def counts(self) -> dict[str, int]:
        """Documents available to each task of the mix."""
        return {name: len(rows) for name, rows in self.rows.items()}

    @cached_property
    def shares(self) -> dict[str, float]:
        """Share of each task in the mix."""
        amounts = {name: self._amount(rows) for name, rows in self.rows.items()}
        return bounded_shares(amounts, self.config.tasks, self.config.downsampling, self.config.upsampling)

    def __call__(self, epoch: int, number: int) -> Sample:
        name, row, earlier = self._locate(epoch, number)
        task, document = TASKS[name], self.pretraining.store[row]
        rng = sample_rng(self.pretraining.seed + 1 + list(TASKS).index(name), earlier, document.id)
        sampled = task.sample_fields(self.records[document.id], rng)
        template = task.templates[int(rng.integers(len(task.templates)))]
        if name == "text_to_image" and self.config.infill_share and rng.random() < self.config.infill_share:
            sample = self._infill_sample(document, template, sampled[0], rng)
        elif task.generates_image:
            sample = self._image_sample(document, task, template, self._with_condition(sampled), rng)
        else:
            sample = self._answer_sample(document, template, sampled[: int(rng.integers(1, self.config.questions_per_sample + 1))])
        return sample._replace(task=1 + list(TASKS).index(name))

    def _with_condition(self, sampled: Sequence[Fields]) -> Fields:
        """The first of the sampled fields whose condition image is available, if they need one."""
        return next(
            fields
            for fields in sampled
            if "condition" not in fields or (self.conditions is not None and fields["condition"] in self.conditions)
        )

    @cached_property
    def _bounds(self) -> np.ndarray:
        """First sample of each task in an epoch, and the end of the last."""
        return np.concatenate([[0], np.round(np.cumsum(list(self.shares.values())) * len(self)).astype(int)])

    def _locate(self, epoch: int, number: int) -> tuple[str, int, int]:
        """Task and row of a sample, and how often the task has seen the row before, in all its passes.

        A task uses every document once, or as often as its weight says, before it uses one again, across epochs.
        """
        which = int(np.searchsorted(self._bounds, number, side="right")) - 1
        name, quota = list(self.shares)[which], int(self._bounds[which + 1] - self._bounds[which])
        seen = self._passes[name][epoch * quota + number - int(self._bounds[which])]
        return name, int(self.rows[name][seen.row]), seen.earlier

    @cached_property
    def _passes(self) -> dict[str, Epochs]:
        """The endless passes of each task over its documents."""
        weights = self.weights or Weights.equal(len(self.pretraining.store))
        return {name: Epochs(weights[rows], self.pretraining.seed, 3, list(TASKS).index(name)) for name, rows in self.rows.items()}

    def _image_sample(self, document: Document, task: Task, template: str, values: Fields, rng: np.random.Generator) -> Sample:
        """A sample of a task that generates an image.

        With probability ``conditioning_dropout`` one of the task's groups of segments is masked, for classifier-free guidance; else the CM3
        objective masks ``mean_masks`` spans on average. Tasks that generate from text alone also get retrieved documents.
        """
        vocabulary = self.pretraining.vocabulary
        images = {"image": document.codes}
        if "source" in values:
            images["source"] = self.pretraining.store.by_id(values["source"]).codes
        if "condition" in values and self.conditions is not None:
            images["condition"] = self.conditions.by_id(values["condition"]).codes
        segments, _ = lay_out(template, [values], images, vocabulary, self.tokenizer)
        chosen, retrieved = ([], []) if task.sees_image else self.pretraining.sample_retrieved(document.id, rng)
        body = fit_body([*retrieved, segments], self.pretraining.context - 1 - TOKENS_PER_SPAN * max(map(len, task.cfg_dropout)))
        if rng.random() < self.config.conditioning_dropout:
            own = [segment for segment in body.segments if segment.document == body.segments[-1].document]
            dropped = task.cfg_dropout[int(rng.integers(len(task.cfg_dropout)))]
            spans = [(own[number].start, own[number].stop) for number in dropped]
        else:
            spans = sample_spans(body, self.config.mean_masks, vocabulary.sentinels, rng) if self.config.mean_masks else []
            body, spans = fit(body, spans, self.pretraining.context)
        masked = apply_spans(body, spans, vocabulary)
        weight = masked.is_target.astype(np.float32)
        # Each masked span has shrunk to one sentinel.
        first = body.segments[-1].start
        image_start = first - sum(stop - start - 1 for start, stop in spans if stop <= first)
        weight[:image_start] *= self.config.input_weight
        if "source" in images:
            changed = 1 + np.flatnonzero(images["source"] != document.codes)
            image_stop = image_start + vocabulary.tokens_per_image - sum(stop - start - 1 for start, stop in spans if start >= first)
            # Behind it is the source, where that is masked; codes of the result in a masked span lie there too and have their plain weight.
            target = slice(image_start, image_stop)
            weight[target][np.isin(masked.image_positions[target], changed)] *= self.config.edit_weight
        return Sample(masked, weight, kept_documents(body, [*chosen, document.id]))

    def _infill_sample(self, document: Document, template: str, values: Fields, rng: np.random.Generator) -> Sample:
        """A sample of text to image with a region of the image masked row by row, as inpainting asks.

        With probability ``conditioning_dropout`` its text is left out, for classifier-free guidance: a second mask would come back, with
        what it says, before the region.
        """
        vocabulary = self.pretraining.vocabulary
        segments, _ = lay_out(template, [values], {"image": document.codes}, vocabulary, self.tokenizer)
        if rng.random() < self.config.conditioning_dropout:
            segments[0] = ("text", segments[0][1][:0])
        rows = region_spans(sample_region(math.isqrt(vocabulary.tokens_per_image), rng), vocabulary.sentinels)
        body = fit_body([segments], self.pretraining.context - 1 - TOKENS_PER_SPAN * len(rows))
        image_start = body.segments[-1].start
        masked = apply_spans(body, [(image_start + start, image_start + stop) for start, stop in rows], vocabulary)
        weight = masked.is_target.astype(np.float32)
        weight[:image_start] *= self.config.input_weight
        return Sample(masked, weight, (document.id,))

    def _answer_sample(self, document: Document, template: str, asked: Sequence[Fields]) -> Sample:
        """A sample of a task that answers with text; if it is too long for the context, the last questions are left out first."""
        vocabulary, context = self.pretraining.vocabulary, self.pretraining.context
        asked = asked[: vocabulary.sentinels]
        while True:
            segments, answers = lay_out(template, asked, {"image": document.codes}, vocabulary, self.tokenizer)
            longest = context - 1 - TOKENS_PER_SPAN * len(answers)
            if len(asked) == 1 or len(build_body([segments]).tokens) <= longest:
                break
            asked = asked[:-1]
        body = fit_body([segments], longest)
        spans = [(min(1 + start, end := body.segments[0].stop), min(1 + stop, end)) for start, stop in answers]
        masked = apply_spans(body, spans, vocabulary)
        weight = masked.is_target.astype(np.float32)
        weight[: masked.tail] *= self.config.input_weight
        weight[masked.tail : -1] *= self.config.answer_weight
        return Sample(masked, weight, (document.id,))


def bounded_shares(counts: Mapping[str, float], weights: Mapping[str, float], least: float, most: float) -> dict[str, float]:
    """Shares of the tasks in the mix, which sum to 1.

    ``share = clip(scale * weight, least * available, most * available)``, with the scale, found by bisection, at which the shares sum to 1.

    Args:
        counts: available samples of each task, or the sum of their weights; ``available`` is a task's share of them.
    """
    available_shares = np.array(list(counts.values())) / sum(counts.values())
    wanted = np.array([weights[name] for name in counts])

    def shares(scale: float) -> np.ndarray:
        return np.clip(scale * wanted, least * available_shares, most * available_shares)

    low, high = 0.0, float(most / wanted.min())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if shares(middle).sum() < 1 else (low, middle)
    found = shares(high)
    return dict(zip(counts, (found / found.sum()).tolist(), strict=True))
