"""The procedural source: scenes of coloured shapes with exact ground truth for every task.

``python -m cm3leon.data.sources.shapes OUT.png`` draws a contact sheet.

Everything follows from ``(config.seed, config)``; no two rows of a run show the same image.
"""

from __future__ import annotations

import io
import random
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from cm3leon.config import ConfigError, ShapesConfig
from cm3leon.data.manifest import SourceRow
from cm3leon.data.sources import scene_text
from cm3leon.data.sources.scene import BACKGROUNDS, COLORS, SHAPES, SIZES, Object, Scene, is_valid, place, sample_scene

SEGMENT_COLORS = dict(zip([*SHAPES, "letter"], [*list(COLORS.values())[:6], (255, 255, 255)], strict=True))
"""Colour of each class in a segmentation map; the background is black."""
TRIES = 500


def rows(config: ShapesConfig, path: Path) -> Iterator[SourceRow]:
    """Draw ``config.count`` scenes, and the edited versions of some of them right after their originals.

    ``path`` is not read; sources share one signature.

    Raises:
        ConfigError: if there are not enough different scenes for ``config.count`` under this configuration.
    """
    seen: set[tuple] = set()
    for number in range(config.count):
        rng = random.Random(f"{config.seed}/{number}")
        scene = _unique_scene(rng, config, seen)
        row = _row(scene, f"scene-{number:07d}", f"scene {number}", config, rng)
        edited = edit(scene, rng, config, seen) if rng.random() < config.edits else None
        row.group = row.key if edited else None
        yield row
        if edited:
            instruction, after = edited
            seen.add(after.signature)
            second = _row(after, f"{row.key}-edited", f"scene {number}, edited", config, rng)
            second.group, second.edited_from, second.instruction = row.key, row.key, instruction
            yield second


def _unique_scene(rng: random.Random, config: ShapesConfig, seen: set[tuple]) -> Scene:
    for _ in range(TRIES):
        scene = sample_scene(rng, config.max_objects, config.grid, config.letters)
        if scene.signature not in seen:
            seen.add(scene.signature)
            return scene
    raise ConfigError(
        f"ingest.shapes: no further scene found after {len(seen)} different ones; "
        f"lower count, or raise max_objects or grid (now {config.grid}; 0: anywhere)"
    )


def _row(scene: Scene, key: str, origin: str, config: ShapesConfig, rng: random.Random) -> SourceRow:
    pixels = scene.render(config.size)
    row = SourceRow(
        key=key,
        origin=origin,
        image=_png(pixels),
        captions=scene_text.captions(scene, rng),
        licence="CC0-1.0",
        attribution="cm3leon shapes",
        source="shapes",
        long_caption=scene_text.long_caption(scene),
        objects=[(item.label, _pixel_box(item, config.size)) for item in scene.objects],
        questions=scene_text.questions(scene, rng),
        text_in_image=scene.letter,
    )
    if rng.random() < config.conditions:
        row.conditions = {"segmentation map": _png(segmentation_map(scene, config.size)), "canny edge": _png(canny(pixels))}
    return row


def _pixel_box(item: Object, side: int) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (round(value * side, 2) for value in item.box)
    return x0, y0, x1, y1


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def edit(scene: Scene, rng: random.Random, config: ShapesConfig, seen: set[tuple]) -> tuple[str, Scene] | None:
    """An instruction and the scene after it; None where no edit was found that gives a valid scene not in ``seen``."""
    for _ in range(TRIES):
        drawn = _draw_edit(scene, rng, config)
        if drawn and is_valid(drawn[1]) and drawn[1].signature not in seen and drawn[1].signature != scene.signature:
            return drawn
    return None


def _draw_edit(scene: Scene, rng: random.Random, config: ShapesConfig) -> tuple[str, Scene] | None:
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


def segmentation_map(scene: Scene, side: int) -> np.ndarray:
    """Every object filled with the colour of its shape's class on black, uint8 (side, side, 3)."""
    pixels = np.zeros((side, side, 3), np.uint8)
    for item in scene.objects:
        pixels[item.coverage(side) >= 0.5] = SEGMENT_COLORS[item.shape]
    return pixels


def canny(pixels: np.ndarray, sigma: float = 1.0, low: float = 8.0, high: float = 20.0) -> np.ndarray:
    """Canny's edge detector (IEEE PAMI 8(6), 1986): white edges one pixel wide on black, uint8 (h, w, 3).

    Gaussian smoothing, Sobel gradients of the strongest channel, non-maximum suppression, hysteresis between ``low`` and ``high``
    (grey levels a pixel).
    """
    smooth = ndimage.gaussian_filter(pixels.astype(np.float32), (sigma, sigma, 0))
    gx, gy = ndimage.sobel(smooth, axis=1) / 8, ndimage.sobel(smooth, axis=0) / 8
    strongest = np.argmax(gx**2 + gy**2, axis=2)[..., None]
    gx, gy = np.take_along_axis(gx, strongest, 2)[..., 0], np.take_along_axis(gy, strongest, 2)[..., 0]
    strength = np.hypot(gx, gy)
    direction = np.round(np.arctan2(gy, gx) / (np.pi / 4)).astype(int) % 4
    padded = np.pad(strength, 1)
    height, width = strength.shape
    keep = np.zeros_like(strength, bool)
    for index, (dy, dx) in enumerate([(0, 1), (1, 1), (1, 0), (1, -1)]):
        ahead = padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
        behind = padded[1 - dy : 1 - dy + height, 1 - dx : 1 - dx + width]
        keep |= (direction == index) & (strength >= ahead) & (strength > behind)
    labels, _ = ndimage.label(keep & (strength >= low), np.ones((3, 3)))
    strong = np.unique(labels[keep & (strength >= high)])
    edges = np.isin(labels, strong[strong > 0])
    return np.repeat((edges * np.uint8(255))[..., None], 3, axis=2)


def sheet(config: ShapesConfig, columns: int = 6, cell: int = 192) -> Image.Image:
    """All images of a (small) configuration with their instructions and first captions."""
    drawn = list(rows(config, Path()))
    image = Image.new("RGB", (columns * (cell + 60), -(-len(drawn) // columns) * (cell + 56)), "white")
    draw = ImageDraw.Draw(image)
    for index, row in enumerate(drawn):
        x, y = index % columns * (cell + 60) + 8, index // columns * (cell + 56) + 4
        if row.image is not None:
            image.paste(Image.open(io.BytesIO(row.image)).resize((cell, cell), Image.Resampling.NEAREST), (x, y))
        words = (f"[{row.instruction}] " if row.instruction else "") + row.captions[0]
        draw.multiline_text((x, y + cell + 2), textwrap.fill(words, 36), fill="black", spacing=1)
    return image


if __name__ == "__main__":
    sheet(ShapesConfig(count=36, letters=0.1, edits=0.1)).save(sys.argv[1])
