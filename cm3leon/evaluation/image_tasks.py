"""Measurements of the tasks that generate images.

Each function takes held-out records that have the task's columns, runs the generator, adds scores and calibrations to the evaluation
record and what was asked to its contract, and returns images for a sheet. Scores are 0 to 1 and higher is better, unless stated otherwise.
Scores that read an image back into a scene are left out where captions do not describe scenes.
"""

from __future__ import annotations

import math
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from cm3leon.data.conditions import EXTRACTORS
from cm3leon.data.manifest import first_caption
from cm3leon.evaluation import conditions, measure
from cm3leon.evaluation.alignment import clip_score
from cm3leon.evaluation.context import Evaluation, Sheet, is_scene
from cm3leon.evaluation.inception import Inception
from cm3leon.evaluation.leakage import Kind
from cm3leon.evaluation.measure import shifted_positions
from cm3leon.evaluation.pictures import Pictures
from cm3leon.scenes import composition, edits, layouts
from cm3leon.scenes.reading import UNKNOWN, read_scene
from cm3leon.sequence.tasks import CONDITIONS, Box, box_in_square, layout_text, visible_objects

MARGIN = 1.15
"""Side of the region to inpaint, as a multiple of the side of the object's box."""
OUTLINED_SIDE = 320
"""Side of the images with outlined boxes on a sheet, pixels."""


def text_to_image(e: Evaluation, ids: list[str], refs: list[str], prompts: list[str], inception: Inception | None) -> Pictures:
    """Text to image: composition, CLIP score and fidelity of prompts that do not stand in training. Returns an image for each prompt.

    Calibration: those of the measurements (``measure.py``); and composition and CLIP score with a single candidate, which is not ranked.

    Args:
        ids: of the records.
        refs: their stored images, which the prompts describe.
        inception: the FID network; None: no FID.
    """
    resampling = (e.config.evaluate.bootstrap, e.config.evaluate.seed)
    originals = e.stored(refs)
    reconstructions = e.reconstructions(originals)
    generated = e.generate_images(e.generator.text_to_image, prompts)
    measure.measure_composition(e.record, ids, prompts, generated, reconstructions, originals, *resampling)
    measure.measure_images(e.record, e.encoder, ids, prompts, generated, reconstructions, originals, *resampling)
    unranked = e.generate_images(e.generator.text_to_image, prompts, candidates=1)
    e.calibrate("clip_score_one_candidate", clip_score(e.encoder, unranked, prompts))
    if "composition" in e.record.scores:
        e.record.calibration["composition_one_candidate"] = composition.score(prompts, unranked)["composition"]
    if inception:
        measure.measure_fidelity(e.record, "inception", inception, ids, generated, reconstructions, originals, *resampling)
    return generated


def other_prompts(e: Evaluation, ids: list[str], refs: list[str], prompts: list[str], kind: Kind) -> Pictures:
    """Text to image of prompts of another kind than unseen ones: composition and CLIP score. Returns an image for each prompt.

    Calibration: composition of the reconstructions of their stored images. Where it is low, the image tokenizer has no codes for what
    training never shows.

    Args:
        ids: of the records.
        refs: their stored images, which the prompts describe.
        kind: of all the prompts.
    """
    generated, name = e.generate_images(e.generator.text_to_image, prompts), f"composition_{kind}"
    e.add_composition(name, ids, prompts, generated)
    if name in e.record.scores:
        e.record.calibration[f"{name}_reconstructions"] = composition.score(prompts, e.reconstructions(e.stored(refs)))["composition"]
    e.add(f"clip_score_{kind}", ids, clip_score(e.encoder, generated, prompts))
    return generated


def edit(e: Evaluation) -> Sheet:
    """Editing by instruction.

    In scenes: the fractions of images in which the change is made (``done``), the rest is kept (``kept``), and both. In all images: PSNR
    outside the region that the true edit changes, dB, and cosine similarity of CLIP image embeddings to the true edit.

    Calibration: the true edits and their reconstructions (ceilings), and the unchanged source images (baseline).
    """
    # 1. Records whose source image is in the test split too, and their edits.
    refs = dict(zip(e.test["id"], e.test["image"], strict=True))
    rows = e.rows("edit", ("instruction", "edited_from"), lambda row: row.edited_from in refs, lambda row: {"instruction": row.instruction})
    if not rows:
        return []
    before = e.images([refs[row.edited_from] for row in rows])
    after = e.images([row.image for row in rows])
    ids, instructions = [row.id for row in rows], [row.instruction for row in rows]
    e.asked("edit", [[row.edited_from, row.id, row.instruction] for row in rows])
    generated = e.generate_images(e.generator.edit, before, instructions)
    reconstructed, unchanged = e.reconstructions(after), e.reconstructions(before)

    # 2. Pixels outside the changed region.
    regions = [edits.changed_region(source, target) for source, target in zip(before, after, strict=True)]

    def outside(images: Sequence[Image.Image]) -> dict[str, float]:
        found = [edits.psnr_outside(target, image, region) for target, image, region in zip(after, images, regions, strict=True)]
        return {id_: value for id_, value in zip(ids, found, strict=True) if not math.isnan(value)}  # NaN: the whole image is to change

    if values := outside(generated):
        e.add("edit/psnr_outside", list(values), list(values.values()))
        e.calibrate("edit/psnr_outside_reconstructions", list(outside(reconstructed).values()))
        e.calibrate("edit/psnr_outside_unchanged", list(outside(unchanged).values()))

    # 3. Similarity of embeddings.
    generated_ND, after_ND, before_ND = (e.encoder.encode_images(images) for images in (generated, after, before))
    e.add("edit/image_similarity", ids, (generated_ND * after_ND).sum(1))
    e.calibrate("edit/image_similarity_unchanged", (before_ND * after_ND).sum(1))

    # 4. Outcomes on scenes.
    scenes = [number for number, row in enumerate(rows) if is_scene(row)]
    if scenes:
        sources = [read_scene(before[number]) for number in scenes]
        targets = [read_scene(after[number]) for number in scenes]

        def judged(images: Sequence[Image.Image]) -> list[edits.Judgment]:
            return [edits.judge(source, target, read_scene(images[n])) for n, source, target in zip(scenes, sources, targets, strict=True)]

        found = judged(generated)
        scene_ids = [ids[number] for number in scenes]
        e.add("edit/done", scene_ids, [judgment.done for judgment in found], share=True)
        e.add("edit/kept", scene_ids, [judgment.kept for judgment in found], share=True)
        e.add("edit/done_and_kept", scene_ids, [judgment.done and judgment.kept for judgment in found], share=True)
        for name, images in (("real", after), ("reconstructions", reconstructed), ("unchanged", unchanged)):
            e.calibrate(f"edit/done_and_kept_{name}", [float(judgment.done and judgment.kept) for judgment in judged(images)])
    sheet: Sheet = []
    for source, result, instruction in zip(before, generated, instructions, strict=True):
        sheet += [(source, "before"), (result, instruction)]
    return sheet


def layout(e: Evaluation) -> Sheet:
    """Layout to image, in scenes: mean IoU of requested and found boxes, of any and of equal labels; composition accuracy of the caption.

    Calibration: the real images and their reconstructions (ceilings), and the generated images against the layouts of other records
    (baseline).
    """

    # 1. Records with visible objects. Boxes are fractions of the tokenizer's square, and pixels for the generator.
    def objects_of(row: Any) -> list[tuple[str, Box]]:
        return visible_objects(row._asdict())

    rows = e.rows(
        "layout_to_image",
        ("objects", "captions"),
        lambda row: bool(objects_of(row)),
        lambda row: {"caption": first_caption(row.captions), "layout": layout_text(objects_of(row))},
    )
    if not rows:
        return []
    captions = [first_caption(row.captions) for row in rows]
    asked = [objects_of(row) for row in rows]
    size = e.generator.image_size
    in_pixels = [[(label, (box[0] * size, box[1] * size, box[2] * size, box[3] * size)) for label, box in boxes] for boxes in asked]
    e.asked("layout_to_image", [[row.id, caption, boxes] for row, caption, boxes in zip(rows, captions, asked, strict=True)])
    generated = e.generate_images(e.generator.layout_to_image, captions, in_pixels)
    real = e.images([row.image for row in rows])

    # 2. Boxes of the objects that are read from the images.
    scenes = [number for number, row in enumerate(rows) if is_scene(row)]
    if scenes:
        wanted = [asked[number] for number in scenes]

        def overlaps(images: Sequence[Image.Image], wanted: Sequence[Any], labeled: bool) -> list[float]:
            found = [[(item.label, item.box) for item in read_scene(images[number]).objects if item.shape != UNKNOWN] for number in scenes]
            return [layouts.mean_iou(boxes, own, labeled) for boxes, own in zip(wanted, found, strict=True)]

        ids = [rows[number].id for number in scenes]
        e.add("layout/iou", ids, overlaps(generated, wanted, False))
        e.add("layout/iou_labeled", ids, overlaps(generated, wanted, True))
        e.add_composition("layout/composition", ids, [captions[n] for n in scenes], [generated[n] for n in scenes])
        e.calibrate("layout/iou_real", overlaps(real, wanted, False))
        e.calibrate("layout/iou_reconstructions", overlaps(e.reconstructions(real), wanted, False))
        if len(scenes) > 1:
            e.calibrate("layout/iou_other_layouts", overlaps(generated, [wanted[n] for n in shifted_positions(len(wanted))], False))
    return [
        (_outlined(image, [box for _, box in boxes]), f"{caption}: {', '.join(label for label, _ in boxes)}")
        for image, caption, boxes in zip(generated, captions, asked, strict=True)
    ]


def _outlined(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """An enlarged image with outlined boxes, which are given in fractions of its side."""
    shown = image.resize((OUTLINED_SIDE, OUTLINED_SIDE), Image.Resampling.NEAREST)
    for box in boxes:
        x0, y0, x1, y1 = (round(value * (OUTLINED_SIDE - 1)) for value in box)
        ImageDraw.Draw(shown).rectangle((x0, y0, x1, y1), outline="magenta", width=2)
    return shown


def condition(e: Evaluation) -> Sheet:
    """Condition to image: agreement of the condition image with the one extracted from the result, also by kind; composition accuracy.

    Calibration: the real images and their reconstructions (ceilings), and the images generated for other records (baseline).
    """
    # 1. Records with condition images, and one kind for each. The kind is sampled later, so the longest name must fit in the context.
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
    asked = e.images([image for _, image in chosen])
    captions = [first_caption(row.captions) for row in rows]
    kinds = [kind for kind, _ in chosen]
    e.asked("condition_to_image", [[row.id, kind, caption] for row, kind, caption in zip(rows, kinds, captions, strict=True)])
    generated = e.generate_images(e.generator.condition_to_image, captions, asked, kinds)
    real = e.images([row.image for row in rows])

    # 2. Agreement, where the kind can be extracted: from any image, or from images of scenes only.
    scored = [n for n, (row, kind) in enumerate(zip(rows, kinds, strict=True)) if kind in EXTRACTORS or is_scene(row)]

    def agreements(images: Sequence[Image.Image], positions: Sequence[int]) -> list[float]:
        """Agreement of the condition images of ``scored`` with the images at ``positions``."""
        found = []
        for number, position in zip(scored, positions, strict=True):
            extracted = conditions.extract(kinds[number], np.asarray(images[position]))
            found.append(conditions.agreement(kinds[number], np.asarray(asked[number]), extracted))
        return found

    if scored:
        values = agreements(generated, scored)
        e.add("condition/agreement", [rows[number].id for number in scored], values)
        by_kind: dict[str, dict[str, float]] = defaultdict(dict)
        for number, value in zip(scored, values, strict=True):
            by_kind[kinds[number]][rows[number].id] = value
        for kind, own in by_kind.items():
            name = re.sub(r"\W+", "_", kind)
            e.add(f"condition/agreement/{name}", list(own), list(own.values()))
        e.calibrate("condition/agreement_real", agreements(real, scored))
        e.calibrate("condition/agreement_reconstructions", agreements(e.reconstructions(real), scored))
        if len(scored) > 1:
            e.calibrate("condition/agreement_other_images", agreements(generated, [scored[n] for n in shifted_positions(len(scored))]))

    # 3. Composition, where the caption describes a scene.
    e.add_composition("condition/composition", [row.id for row in rows], captions, generated)
    sheet: Sheet = []
    for condition_image, result, kind, caption in zip(asked, generated, kinds, captions, strict=True):
        sheet += [(condition_image, kind), (result, caption)]
    return sheet


def _known_conditions(row: Any) -> list[tuple[str, str]]:
    """Kind and reference of a record's condition images, of the kinds that models are trained on."""
    return [(item["kind"], item["image"]) for item in row.conditions if item["kind"] in CONDITIONS]


def infill(e: Evaluation) -> Sheet:
    """Inpainting of one object of each scene, given the caption: composition accuracy of the whole image.

    Calibration: reconstructions of the real images (ceiling), and the images with the region filled with gray (baseline).
    """
    # 1. A region around a random object of each record. An object outside the square that is cropped for the tokenizer has no box
    #    there; the region is then the middle of the image.
    rows = e.rows("infill", ("objects", "captions"), is_scene)
    if not rows:
        return []
    rng, size = random.Random(e.config.evaluate.seed), e.generator.image_size
    captions = [e.generator.shorten(first_caption(row.captions)) for row in rows]
    boxes = []
    for row in rows:
        box = box_in_square(rng.choice(list(row.objects))["box"], row.width, row.height) or (0.25, 0.25, 0.75, 0.75)
        boxes.append(_widened(box, size))

    # 2. Inpainted images, and the baseline.
    real = e.images([row.image for row in rows])
    e.asked("infill", [[row.id, box, caption] for row, box, caption in zip(rows, boxes, captions, strict=True)])
    generated = e.generate_images(e.generator.infill, real, boxes, captions)
    gray = [image.copy() for image in real]
    for image, box in zip(gray, boxes, strict=True):
        x0, y0, x1, y1 = (round(value) for value in box)
        image.paste((128, 128, 128), (x0, y0, x1, y1))

    def right(images: Sequence[Image.Image]) -> list[float]:
        return list(composition.all_right(composition.check_images(captions, images)).values())

    e.add_composition("infill/composition", [row.id for row in rows], captions, generated)
    e.calibrate("infill/composition_reconstructions", right(e.reconstructions(real)))
    e.calibrate("infill/composition_left_out", right(gray))
    sheet: Sheet = []
    for masked, result, caption in zip(gray, generated, captions, strict=True):
        sheet += [(masked, "region to inpaint"), (result, caption)]
    return sheet


def _widened(box: Box, size: int) -> Box:
    """A box in fractions of the side, enlarged by :data:`MARGIN` and clipped to the image, in pixels."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    half_width = (box[2] - box[0]) * MARGIN / 2
    half_height = (box[3] - box[1]) * MARGIN / 2
    edges = (x - half_width, y - half_height, x + half_width, y + half_height)
    x0, y0, x1, y1 = (min(max(value, 0.0), 1.0) * size for value in edges)
    return x0, y0, x1, y1


def write(e: Evaluation) -> Sheet:
    """Writing text into images: the fraction of images that show the requested letter and nothing else, read back by its outline.

    Calibration: the real images and their reconstructions (ceilings), and a random guess (baseline).
    """
    rows = e.rows("write", ("text_in_image",), lambda row: is_scene(row) and len(row.text_in_image) == 1)
    if not rows:
        return []
    texts = [row.text_in_image for row in rows]
    e.asked("write", [[row.id, row.text_in_image] for row in rows])
    generated = e.generate_images(e.generator.write, texts)

    def right(images: Sequence[Image.Image]) -> list[float]:
        return [float([item.letter for item in read_scene(image).objects] == [text]) for image, text in zip(images, texts, strict=True)]

    e.add("write/text", [row.id for row in rows], right(generated), share=True)
    real = e.images([row.image for row in rows])
    e.calibrate("write/text_real", right(real))
    e.calibrate("write/text_reconstructions", right(e.reconstructions(real)))
    e.calibrate("write/text_guess", [1 / len(set(texts))])
    return [(image, f'draw "{text}"') for image, text in zip(generated, texts, strict=True)]
