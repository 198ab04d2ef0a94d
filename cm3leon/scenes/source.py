"""The procedural source ``shapes``: sampled scenes with exact ground truth for every task, as rows of the manifest.

``python -m cm3leon.scenes.source OUT.png`` writes a contact sheet.

The rows are a function of ``config``, which includes the seed; no two rows show the same image. A part of what captions say (background,
shapes and colors) is held out: no scene of train shows it, so that no prompt made of it stands in training, in whichever words. Some
combinations (a color of a shape, a relation between two shapes) are shown only by scenes of the test split that are made for them.
"""

from __future__ import annotations

import io
import random
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from cm3leon.config.ingest_schema import ShapesConfig
from cm3leon.data.images import encode
from cm3leon.data.manifest import SourceRow
from cm3leon.data.workers import ahead_by_workers
from cm3leon.scenes import text as scene_text
from cm3leon.scenes.conditions import conditions
from cm3leon.scenes.scene import BACKGROUNDS, COLORS, SHAPES, SIZES, Combination, Object, Scene, is_valid, place, sample_scene
from cm3leon.utils.device import cores
from cm3leon.utils.errors import ConfigError

TRIES = 500
"""Attempts to sample a scene, or an edit, that no earlier row shows."""
MIN_SHARED = 1000
"""Fewest scenes for which worker processes are started."""
MAX_WORKERS = 4
"""More would wait for the sampling of scenes, a fifth of the work."""
AHEAD = 64
"""Rows that each of them has ready."""
NEW_COMBINATIONS: frozenset[Combination] = frozenset({
    ("red", "diamond"), ("cyan", "cross"), ("yellow", "ring"), ("square", "left of", "circle"), ("triangle", "above", "cross"),
})  # fmt: skip
"""The combinations that only scenes of their own show, if ``new_combinations`` of the parameters is not 0."""


@dataclass(frozen=True)
class Plan:
    """A row before its image is painted and its texts are written."""

    key: str
    origin: str
    scene: Scene
    split: str
    group: str | None
    edited_from: str | None = None
    instruction: str | None = None


class Painter(Dataset[SourceRow]):
    """The row of each plan."""

    def __init__(self, config: ShapesConfig) -> None:
        self.config = config

    def __getitem__(self, plan: Plan) -> SourceRow:
        return _row(plan, self.config)


def rows(config: ShapesConfig, path: Path) -> Iterator[SourceRow]:
    """Sample ``config.count`` scenes; some are followed by an edited version of themselves.

    Scenes are sampled one after another, because no two may show the same; worker processes paint them.

    Args:
        path: not read; all sources have the same signature.

    Raises:
        ConfigError: if there are not enough different scenes for ``config.count`` under this configuration.
    """
    painter, plans = Painter(config), sample_plans(config)
    if config.count < MIN_SHARED:
        return map(painter.__getitem__, plans)
    return iter(ahead_by_workers(painter, min(MAX_WORKERS, cores()), AHEAD, plans))


def sample_plans(config: ShapesConfig) -> Iterator[Plan]:
    """The plans of :func:`rows`."""
    seen: set[tuple[Any, ...]] = set()
    for number in range(config.count):
        # A generator for each scene: a longer run starts with the rows of a shorter one.
        rng = random.Random(f"{config.seed}/{number}")
        is_new = random.Random(f"{config.seed}/{number}/new").random() < config.new_combinations
        scene = _unique_scene(rng, config, seen, is_new)
        key, split = f"scene-{number:07d}", "test" if is_new else split_of(scene, config)
        edited = edit(scene, rng, config, seen) if rng.random() < config.edits and not is_new else None
        group = key if edited else None  # a group stays in one split
        yield Plan(key, f"scene {number}", scene, split, group)
        if edited:
            instruction, after = edited
            seen.add(after.signature)
            yield Plan(f"{key}-edited", f"scene {number}, edited", after, split, group, key, instruction)


def split_of(scene: Scene, config: ShapesConfig) -> str:
    """The split that shows scenes of this content: train, val or test."""
    number = random.Random(f"{config.seed}/{scene.content}").random()
    return "val" if number < config.val_fraction else "test" if number < config.val_fraction + config.test_fraction else "train"


def shows_new(scene: Scene, config: ShapesConfig) -> bool:
    """True if the scene shows one of the :data:`NEW_COMBINATIONS`, and these are held out."""
    return config.new_combinations > 0 and not NEW_COMBINATIONS.isdisjoint(scene.combinations)


def _unique_scene(rng: random.Random, config: ShapesConfig, seen: set[tuple[Any, ...]], is_new: bool) -> Scene:
    """Sample a scene whose signature is not in ``seen``, and add it there; one with a new combination, or without."""
    for _ in range(TRIES):
        scene = sample_scene(rng, config.max_objects, config.grid, 0.0 if is_new else config.letters)
        if scene.signature not in seen and shows_new(scene, config) == is_new:
            seen.add(scene.signature)
            return scene
    raise ConfigError(
        f"ingest.shapes: no further scene found after {len(seen)} different ones; "
        f"lower count, or raise max_objects or grid (now {config.grid}; 0: anywhere)"
    )


def _row(plan: Plan, config: ShapesConfig) -> SourceRow:
    """Paint a scene and write its texts; condition images for the fraction ``config.conditions`` of scenes."""
    scene, rng = plan.scene, random.Random(f"{config.seed}/{plan.key}")
    row = SourceRow(
        key=plan.key,
        origin=plan.origin,
        image=encode(scene.render(config.size)),
        captions=scene_text.captions(scene, rng, config.reading_order if plan.split == "train" else 0.0),
        licence="CC0-1.0",
        attribution="cm3leon shapes",
        source="shapes",
        split=plan.split,
        group=plan.group,
        edited_from=plan.edited_from,
        instruction=plan.instruction,
        long_caption=scene_text.long_caption(scene),
        objects=[(item.label, _pixel_box(item, config.size)) for item in scene.objects],
        questions=scene_text.questions(scene, rng, every=plan.split == "train"),
        reasoning=scene_text.reasoning(scene, rng),
        text_in_image=scene.letter,
    )
    if rng.random() < config.conditions:
        row.conditions = {kind: encode(image) for kind, image in conditions(scene, config.size).items()}
    return row


def _pixel_box(item: Object, side: int) -> tuple[float, float, float, float]:
    """Bounding box x0, y0, x1, y1, pixels."""
    x0, y0, x1, y1 = (round(value * side, 2) for value in item.box)
    return x0, y0, x1, y1


def edit(scene: Scene, rng: random.Random, config: ShapesConfig, seen: set[tuple[Any, ...]]) -> tuple[str, Scene] | None:
    """Sample an edit: an instruction, and the scene after it. None if no edit was found that gives a valid scene not in ``seen``.

    What is held out is shown only as the edit of a scene of the same split.
    """
    allowed = ("train", split_of(scene, config))
    for _ in range(TRIES):
        sampled = _sample_edit(scene, rng, config)
        if sampled is None:
            continue
        _, after = sampled
        is_new = after.signature not in seen and after.signature != scene.signature
        if is_valid(after) and is_new and split_of(after, config) in allowed and not shows_new(after, config):
            return sampled
    return None


def _sample_edit(scene: Scene, rng: random.Random, config: ShapesConfig) -> tuple[str, Scene] | None:
    """One attempt at an edit, whose scene may be invalid; None if the sampled kind of edit does not apply to the scene.

    Letters and identical objects change only their color, all at once: an instruction could not name one of several identical objects.
    """
    # 1. Edits that name no single object.
    kind = rng.choice(["background", "color", "size", "remove", "add"])
    if kind == "background":
        background = rng.choice(list(BACKGROUNDS))
        return f"change the background to {background}", replace(scene, background=background)
    if kind == "color" and (scene.letter or scene.identical):
        color = rng.choice(list(COLORS))
        what = "letter" if scene.letter else scene_text.plural(scene.objects[0].shape)
        return f"make the {what} {color}", replace(scene, objects=tuple(replace(item, color=color) for item in scene.objects))
    if scene.letter or scene.identical:
        return None
    if kind == "add" and len(scene.objects) < config.max_objects:
        item = place(rng.choice(list(SHAPES)), rng.choice(list(COLORS)), rng.choice(list(SIZES)), config.grid, rng)
        if item is None:
            return None
        return f"add {scene_text.with_article(item.label)}", replace(scene, objects=(*scene.objects, item))

    # 2. Edits of one object, named by its shape, and by its color too if other objects have the same shape.
    target = rng.choice(scene.objects)
    only = sum(item.shape == target.shape for item in scene.objects) == 1
    name = target.shape if only else f"{target.color} {target.shape}"
    others = tuple(item for item in scene.objects if item is not target)
    if kind == "remove" and others:
        return f"remove the {name}", replace(scene, objects=others)
    if kind == "color":
        color = rng.choice(list(COLORS))
        changed, instruction = replace(target, color=color), f"make the {name} {color}"
    elif kind == "size":
        size = rng.choice(list(SIZES))
        changed, instruction = replace(target, size=size), f"make the {name} {size}"
    else:
        return None
    return instruction, replace(scene, objects=tuple(changed if item is target else item for item in scene.objects))


def sheet(config: ShapesConfig, columns: int = 6, cell: int = 192) -> Image.Image:
    """A contact sheet: all images of a (small) configuration with their instructions and first captions.

    Args:
        cell: side of an image on the sheet, pixels.
    """
    found = list(rows(config, Path()))
    image = Image.new("RGB", (columns * (cell + 60), -(-len(found) // columns) * (cell + 56)), "white")
    draw = ImageDraw.Draw(image)
    for index, row in enumerate(found):
        x, y = index % columns * (cell + 60) + 8, index // columns * (cell + 56) + 4
        if row.image is not None:
            image.paste(Image.open(io.BytesIO(row.image)).resize((cell, cell), Image.Resampling.NEAREST), (x, y))
        words = (f"[{row.instruction}] " if row.instruction else "") + row.captions[0]
        draw.multiline_text((x, y + cell + 2), textwrap.fill(words, 36), fill="black", spacing=1)
    return image


if __name__ == "__main__":
    sheet(ShapesConfig(count=36, letters=0.1, edits=0.1)).save(sys.argv[1])
