"""What ``evaluate`` asks of a model for each task beside plain drawing, captions and answers, and what it measures of the results.

Each function takes held-out rows that have the task's columns, asks the generator, adds scores and calibrations to the record, what was
asked to the contract, and returns pictures with captions for a sheet. What is scored by reading scenes is left out where captions do not
follow the grammar of scenes.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from cm3leon.config.schema import Config
from cm3leon.data.conditions import EXTRACTORS
from cm3leon.data.images import fit_square
from cm3leon.data.manifest import ImageStore, first_caption
from cm3leon.evaluation import captions as caption_metrics
from cm3leon.evaluation import conditions
from cm3leon.evaluation.measure import others
from cm3leon.evaluation.record import Record, digest
from cm3leon.generation.generator import Generator
from cm3leon.scenes import composition, edits, layouts
from cm3leon.scenes.reading import UNKNOWN, read_scene
from cm3leon.sequence.tasks import (
    CONDITIONS,
    Box,
    Fields,
    box_in_square,
    conclusion,
    is_filled,
    layout_text,
    reasoning_fields,
    visible_objects,
)

Sheet = list[tuple[Image.Image, str]]
MARGIN = 1.15
"""The box of an object to redraw, as a multiple of the object's own."""
OUTLINED_SIDE = 320
"""Of pictures with outlined boxes on a sheet, pixels."""


@dataclass(frozen=True)
class Evaluation:
    """A model, held-out rows of the manifest, and the record of what is measured."""

    config: Config
    generator: Generator
    store: ImageStore
    test: pd.DataFrame
    record: Record

    def rows(
        self,
        task: str,
        columns: Sequence[str],
        usable: Callable[[Any], bool] = lambda row: True,
        values: Callable[[Any], Fields] | None = None,
    ) -> list[Any]:
        """Up to ``evaluate.tasks`` rows whose ``columns`` are filled, drawn by the seed.

        Args:
            values: what a row asks of the task; rows that do not fit in the context are left out, and the contract says how many.
        """
        found = [row for row in self.test.itertuples() if all(is_filled(getattr(row, column)) for column in columns) and usable(row)]
        fitting = [row for row in found if values is None or self.generator.fits(task, values(row))]
        self.record.contract.setdefault("tasks", {})[task] = {"count": 0, "too_long": len(found) - len(fitting)}
        if not fitting:
            print(f"{task}: not measured, no held-out document has what it needs and fits in the context", flush=True)
        order = np.random.default_rng(self.config.evaluate.seed).permutation(len(fitting))[: self.config.evaluate.tasks]
        return [fitting[int(number)] for number in sorted(order)]

    def pictures(self, refs: Sequence[str]) -> list[Image.Image]:
        """Stored images as the tokenizer takes them."""
        return [fit_square(self.store.open(ref), self.generator.image_size) for ref in refs]

    def reconstructed(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """What the image tokenizer makes of images."""
        return self.generator.decode(self.generator.encode(images).astype(np.int64))

    def add(self, name: str, values: Sequence[float]) -> None:
        """A score that is a mean, with its interval."""
        self.record.add(name, values, self.config.evaluate.bootstrap, self.config.evaluate.seed)

    def calibrate(self, name: str, values: Sequence[float] | np.ndarray) -> None:
        """What the same measure gives for something known."""
        if len(values):
            self.record.calibration[name] = float(np.mean(values))

    def asked(self, task: str, what: Any) -> None:
        """Note in the contract what was asked."""
        self.record.contract["tasks"][task] |= {"asked": digest(what), "count": len(what)}


def _known_conditions(row: Any) -> list[tuple[str, str]]:
    """Kind and image of the condition images from which models learn."""
    return [(item["kind"], item["image"]) for item in row.conditions if item["kind"] in CONDITIONS]


def _is_scene(row: Any) -> bool:
    return composition.parse_caption(first_caption(row.captions)) is not None


def best(drawn: Sequence[Sequence[Any]]) -> list[Image.Image]:
    """The first image drawn for each prompt."""
    return [images[0].image for images in drawn]


def edit(e: Evaluation) -> Sheet:
    """Edits: the change made and the rest kept, of scenes; PSNR outside of what the true edit changes; nearness to the true edit.

    Calibration: the true edits, their reconstructions, and the image left as it was.
    """
    refs = dict(zip(e.test["id"], e.test["image"], strict=True))
    rows = e.rows("edit", ("instruction", "edited_from"), lambda row: row.edited_from in refs, lambda row: {"instruction": row.instruction})
    if not rows:
        return []
    before, after = e.pictures([refs[row.edited_from] for row in rows]), e.pictures([row.image for row in rows])
    instructions = [row.instruction for row in rows]
    e.asked("edit", [[row.edited_from, row.id, row.instruction] for row in rows])
    drawn = best(e.generator.edit(before, instructions, seed=e.config.evaluate.seed))
    copies, unchanged = e.reconstructed(after), e.reconstructed(before)
    regions = [edits.changed_region(one, other) for one, other in zip(before, after, strict=True)]

    def outside(images: Sequence[Image.Image]) -> list[float]:
        found = [edits.psnr_outside(image, result, region) for image, result, region in zip(after, images, regions, strict=True)]
        return [value for value in found if value == value]

    if values := outside(drawn):
        e.add("edit/psnr_outside", values)
        e.calibrate("edit/psnr_outside_reconstructions", outside(copies))
        e.calibrate("edit/psnr_outside_unchanged", outside(unchanged))
    if e.generator.encoder is not None:
        vectors = {
            name: e.generator.encoder.encode_images(images) for name, images in (("drawn", drawn), ("after", after), ("before", before))
        }
        e.add("edit/image_similarity", (vectors["drawn"] * vectors["after"]).sum(1))
        e.calibrate("edit/image_similarity_unchanged", (vectors["before"] * vectors["after"]).sum(1))
    scenes = [number for number, row in enumerate(rows) if _is_scene(row)]
    if scenes:
        starts, ends = ([read_scene(images[number]) for number in scenes] for images in (before, after))

        def judged(images: Sequence[Image.Image]) -> list[edits.Judgment]:
            return [edits.judge(start, end, read_scene(images[n])) for n, start, end in zip(scenes, starts, ends, strict=True)]

        found = judged(drawn)
        e.add("edit/done", [float(judgment.done) for judgment in found])
        e.add("edit/kept", [float(judgment.kept) for judgment in found])
        e.add("edit/done_and_kept", [float(judgment.done and judgment.kept) for judgment in found])
        for name, images in (("real", after), ("reconstructions", copies), ("unchanged", unchanged)):
            e.calibrate(f"edit/done_and_kept_{name}", [float(judgment.done and judgment.kept) for judgment in judged(images)])
    sheet: Sheet = []
    for start, result, text in zip(before, drawn, instructions, strict=True):
        sheet += [(start, "before"), (result, text)]
    return sheet


def layout(e: Evaluation) -> Sheet:
    """Layouts of scenes: overlap of asked and found boxes, of any object and of objects with the right label; the caption's composition.

    Calibration: the real images, their reconstructions, and the images drawn for other layouts.
    """

    def placed(row: Any) -> list[tuple[str, Box]]:
        return visible_objects(row._asdict())

    rows = e.rows(
        "layout_to_image",
        ("objects", "captions"),
        lambda row: bool(placed(row)),
        lambda row: {"caption": first_caption(row.captions), "layout": layout_text(placed(row))},
    )
    if not rows:
        return []
    captions, asked = [first_caption(row.captions) for row in rows], [placed(row) for row in rows]
    size = e.generator.image_size
    in_pixels = [[(label, (box[0] * size, box[1] * size, box[2] * size, box[3] * size)) for label, box in boxes] for boxes in asked]
    e.asked("layout_to_image", [[row.id, caption, boxes] for row, caption, boxes in zip(rows, captions, asked, strict=True)])
    drawn = best(e.generator.layout_to_image(captions, in_pixels, seed=e.config.evaluate.seed))
    real = e.pictures([row.image for row in rows])
    scenes = [number for number, row in enumerate(rows) if _is_scene(row)]
    if scenes:
        wanted = [asked[number] for number in scenes]

        def overlaps(images: Sequence[Image.Image], wanted: Sequence[Any], labeled: bool) -> list[float]:
            found = [[(item.label, item.box) for item in read_scene(images[number]).objects if item.shape != UNKNOWN] for number in scenes]
            return [layouts.mean_iou(boxes, own, labeled) for boxes, own in zip(wanted, found, strict=True)]

        e.add("layout/iou", overlaps(drawn, wanted, False))
        e.add("layout/iou_labeled", overlaps(drawn, wanted, True))
        verdicts = composition.verdicts([captions[n] for n in scenes], [drawn[n] for n in scenes])
        e.add("layout/composition", [float(all(verdict.values())) for verdict in verdicts if verdict is not None])
        e.calibrate("layout/iou_real", overlaps(real, wanted, False))
        e.calibrate("layout/iou_reconstructions", overlaps(e.reconstructed(real), wanted, False))
        if len(scenes) > 1:
            e.calibrate("layout/iou_other_layouts", overlaps(drawn, [wanted[n] for n in others(len(wanted))], False))
    return [
        (_outlined(image, [box for _, box in boxes]), f"{caption}: {', '.join(label for label, _ in boxes)}")
        for image, caption, boxes in zip(drawn, captions, asked, strict=True)
    ]


def _outlined(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A picture, larger, with boxes in shares of its side outlined."""
    shown = image.resize((OUTLINED_SIDE, OUTLINED_SIDE), Image.Resampling.NEAREST)
    for box in boxes:
        x0, y0, x1, y1 = (round(value * (OUTLINED_SIDE - 1)) for value in box)
        ImageDraw.Draw(shown).rectangle((x0, y0, x1, y1), outline="magenta", width=2)
    return shown


def condition(e: Evaluation) -> Sheet:
    """Images from condition images: agreement of the condition that is extracted from the result with the one asked for, by kind too.

    Calibration: the real images, their reconstructions, and the images drawn for other documents with the same kind.
    """
    longest = max(CONDITIONS, key=len)
    rows = e.rows(
        "condition_to_image",
        ("conditions", "captions"),
        lambda row: bool(_known_conditions(row)),
        lambda row: {"caption": first_caption(row.captions), "kind": longest},
    )
    if not rows:
        return []
    rng = random.Random(e.config.evaluate.seed)
    chosen = [rng.choice(_known_conditions(row)) for row in rows]
    asked = e.pictures([image for _, image in chosen])
    captions, kinds = [first_caption(row.captions) for row in rows], [kind for kind, _ in chosen]
    e.asked("condition_to_image", [[row.id, kind, caption] for row, kind, caption in zip(rows, kinds, captions, strict=True)])
    drawn = best(e.generator.condition_to_image(captions, asked, kinds, seed=e.config.evaluate.seed))
    real = e.pictures([row.image for row in rows])
    scored = [n for n, (row, kind) in enumerate(zip(rows, kinds, strict=True)) if kind in EXTRACTORS or _is_scene(row)]

    def agreements(images: Sequence[Image.Image], wanted: Sequence[int]) -> list[float]:
        found = []
        for number, of in zip(scored, wanted, strict=True):
            extracted = conditions.extract(kinds[number], np.asarray(images[of]))
            found.append(conditions.agreement(kinds[number], np.asarray(asked[number]), extracted))
        return found

    if scored:
        values = agreements(drawn, scored)
        e.add("condition/agreement", values)
        by_kind = defaultdict(list)
        for number, value in zip(scored, values, strict=True):
            by_kind[kinds[number]].append(value)
        for kind, own in by_kind.items():
            name = re.sub(r"\W+", "_", kind)
            e.add(f"condition/agreement/{name}", own)
        e.calibrate("condition/agreement_real", agreements(real, scored))
        e.calibrate("condition/agreement_reconstructions", agreements(e.reconstructed(real), scored))
        if len(scored) > 1:
            e.calibrate("condition/agreement_other_images", agreements(drawn, [scored[n] for n in others(len(scored))]))
    verdicts = [verdict for verdict in composition.verdicts(captions, drawn) if verdict is not None]
    if verdicts:
        e.add("condition/composition", [float(all(verdict.values())) for verdict in verdicts])
    sheet: Sheet = []
    for shown, result, kind, caption in zip(asked, drawn, kinds, captions, strict=True):
        sheet += [(shown, kind), (result, caption)]
    return sheet


def infill(e: Evaluation) -> Sheet:
    """One object of each scene drawn anew from the caption: composition of the whole.

    Calibration: reconstructions of the real images, and of those with the box left gray: what is right without the redrawn part.
    """
    rows = e.rows("infill", ("objects", "captions"), _is_scene)
    if not rows:
        return []
    rng, size = random.Random(e.config.evaluate.seed), e.generator.image_size
    captions, boxes = [e.generator.shorten(first_caption(row.captions)) for row in rows], []
    for row in rows:
        shares = box_in_square(rng.choice(list(row.objects))["box"], row.width, row.height) or (0.25, 0.25, 0.75, 0.75)
        boxes.append(_widened(shares, size))
    real = e.pictures([row.image for row in rows])
    e.asked("infill", [[row.id, box, caption] for row, box, caption in zip(rows, boxes, captions, strict=True)])
    drawn = best(e.generator.infill(real, boxes, captions, seed=e.config.evaluate.seed))
    gray = [image.copy() for image in real]
    for image, box in zip(gray, boxes, strict=True):
        x0, y0, x1, y1 = (round(value) for value in box)
        image.paste((128, 128, 128), (x0, y0, x1, y1))

    def right(images: Sequence[Image.Image]) -> list[float]:
        return [float(all(verdict.values())) for verdict in composition.verdicts(captions, images) if verdict is not None]

    e.add("infill/composition", right(drawn))
    e.calibrate("infill/composition_reconstructions", right(e.reconstructed(real)))
    e.calibrate("infill/composition_left_out", right(gray))
    sheet: Sheet = []
    for start, result, caption in zip(gray, drawn, captions, strict=True):
        sheet += [(start, "to fill"), (result, caption)]
    return sheet


def _widened(shares: Box, size: int) -> Box:
    """A box in shares of the side as pixels, larger by :data:`MARGIN` and inside the image."""
    x, y = (shares[0] + shares[2]) / 2, (shares[1] + shares[3]) / 2
    half_width, half_height = ((shares[2] - shares[0]) * MARGIN / 2, (shares[3] - shares[1]) * MARGIN / 2)
    edges = (x - half_width, y - half_height, x + half_width, y + half_height)
    x0, y0, x1, y1 = (min(max(value, 0.0), 1.0) * size for value in edges)
    return x0, y0, x1, y1


def write(e: Evaluation) -> Sheet:
    """Drawn writing: single letters, read back by their outlines. Calibration: the real images, and chance."""
    rows = e.rows("write", ("text_in_image",), lambda row: _is_scene(row) and len(row.text_in_image) == 1)
    if not rows:
        return []
    texts = [row.text_in_image for row in rows]
    e.asked("write", [[row.id, row.text_in_image] for row in rows])
    drawn = best(e.generator.write(texts, seed=e.config.evaluate.seed))

    def right(images: Sequence[Image.Image]) -> list[float]:
        return [float(read_scene(image).letter == text) for image, text in zip(images, texts, strict=True)]

    e.add("write/text", right(drawn))
    real = e.pictures([row.image for row in rows])
    e.calibrate("write/text_real", right(real))
    e.calibrate("write/text_reconstructions", right(e.reconstructed(real)))
    e.calibrate("write/text_guess", [1 / len(set(texts))])
    return [(image, f'draw "{text}"') for image, text in zip(drawn, texts, strict=True)]


def long_caption(e: Evaluation) -> Sheet:
    """Captions at length. Calibration: the same captions against the references of other documents."""
    rows = e.rows("long_caption", ("long_caption",))
    if not rows:
        return []
    pictures = e.pictures([row.image for row in rows])
    e.asked("long_caption", [[row.id, row.long_caption] for row in rows])
    said = [text.text for text in e.generator.long_caption(pictures)]
    names, wanted = [row.id for row in rows], {row.id: [row.long_caption] for row in rows}
    for name, values in caption_metrics.per_image(dict(zip(names, said, strict=True)), wanted).items():
        e.add(f"long_caption/{name}", values)
    if len(rows) > 1:
        shuffled = {name: said[number] for name, number in zip(names, others(len(names)), strict=True)}
        e.calibrate("long_caption/cider_other_images", caption_metrics.per_image(shuffled, wanted)["cider"])
    return list(zip(pictures, said, strict=True))


def reasoning(e: Evaluation) -> Sheet:
    """Questions with options, answered with reasons and without. Calibration: answers about other images, and a blind choice."""

    def values(row: Any) -> Fields:
        problem = row.reasoning[0]
        return reasoning_fields(problem["question"], problem["options"], problem["context"])

    rows = e.rows("reasoning", ("reasoning",), values=values)
    if not rows:
        return []
    pictures, problems = e.pictures([row.image for row in rows]), [row.reasoning[0] for row in rows]
    truths = [problem["answer"] for problem in problems]
    e.asked("reasoning", [[row.id, problem] for row, problem in zip(rows, problems, strict=True)])
    asked = tuple([problem[name] for problem in problems] for name in ("question", "options", "context"))

    def right(answers: Sequence[str]) -> list[float]:
        return [float(conclusion(answer) == conclusion(truth)) for answer, truth in zip(answers, truths, strict=True)]

    explained = [text.text for text in e.generator.reasoning(pictures, *asked)]
    e.add("reasoning/accuracy", right(explained))
    e.add("reasoning/accuracy_unexplained", right([text.text for text in e.generator.reasoning(pictures, *asked, explain=False)]))
    e.calibrate("reasoning/accuracy_guess", [1 / len(problem["options"]) for problem in problems])
    if len(rows) > 1:
        elsewhere = [pictures[number] for number in others(len(pictures))]
        e.calibrate("reasoning/accuracy_other_images", right([text.text for text in e.generator.reasoning(elsewhere, *asked)]))
    return [(image, f"{question} {text}") for image, question, text in zip(pictures, asked[0], explained, strict=True)]


MEASURES: dict[str, Callable[[Evaluation], Sheet]] = {
    "edit": edit,
    "layout_to_image": layout,
    "condition_to_image": condition,
    "write": write,
    "long_caption": long_caption,
    "reasoning": reasoning,
}
"""By the task that a model must have been tuned for; infilling, which pretraining teaches, is measured of every model."""
