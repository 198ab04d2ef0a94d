"""Scenes: geometry, rendering and sampling."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cm3leon.scenes.reading import to_lab
from cm3leon.scenes.scene import (
    BACKGROUNDS,
    COLORS,
    GAP,
    LETTERS,
    MARGIN,
    SHAPES,
    SIZES,
    Object,
    Scene,
    is_valid,
    relation,
    sample_scene,
)

SCENES = [sample_scene(random.Random(i), 3, 16 if i % 2 else 0, 0.1) for i in range(300)]


def single(shape: str, size: str = "large", letter: str | None = None) -> Object:
    return Object(shape, "red", size, 0.5, 0.5, letter)


ALL_KINDS = [single(shape, size) for shape in SHAPES for size in SIZES] + [single("letter", letter=letter) for letter in LETTERS]


def test_vocabulary_is_large_and_its_colors_are_distinct() -> None:
    assert len(SHAPES) >= 6
    assert len(COLORS) >= 8
    assert len(BACKGROUNDS) >= 4
    lab = to_lab(np.array([*COLORS.values(), *BACKGROUNDS.values()], np.uint8))
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)) > 25


@pytest.mark.parametrize("item", ALL_KINDS, ids=lambda item: item.label)
@pytest.mark.parametrize("side", [64, 128])
def test_box_is_tight_around_the_pixels(item: Object, side: int) -> None:
    ys, xs = np.nonzero(item.coverage(side) >= 0.5)
    pixel_box = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    # The tip of a triangle or diamond covers less than half of its last one or two pixels.
    assert np.abs(pixel_box - np.array(item.box) * side).max() <= (2.0 if item.shape in ("triangle", "diamond") else 1.0)


@pytest.mark.parametrize("shape", ["circle", "square", "diamond", "triangle"])
def test_coverage_agrees_with_supersampling(shape: str) -> None:
    side, factor = 64, 16
    item = Object(shape, "red", "large", 0.47, 0.52)
    x0, y0, x1, y1 = (v * side * factor for v in item.box)
    image = Image.new("L", (side * factor, side * factor))
    draw = ImageDraw.Draw(image)
    mx, my = (x0 + x1) / 2, (y0 + y1) / 2
    if shape == "circle":
        draw.ellipse((x0, y0, x1, y1), fill=255)
    else:
        corners = {
            "square": [(x0, y0), (x1, y0), (x1, y1), (x0, y1)],
            "diamond": [(mx, y0), (x1, my), (mx, y1), (x0, my)],
            "triangle": [(mx, y0), (x1, y1), (x0, y1)],
        }
        draw.polygon(corners[shape], fill=255)
    reference = np.asarray(image.resize((side, side), Image.Resampling.BOX)) / 255
    difference = np.abs(item.coverage(side) - reference)
    assert difference.mean() < 0.002
    assert difference.max() < 0.35


def test_only_the_ring_has_a_hole() -> None:
    for item in ALL_KINDS:
        if item.letter is None:
            assert (item.coverage(64)[31:33, 31:33].mean() == 0) == (item.shape == "ring")


def test_background_is_flat_and_objects_have_their_color() -> None:
    for scene in SCENES:
        image = scene.render(64)
        untouched = np.sum([item.coverage(64) for item in scene.objects], axis=0) == 0
        assert (image[untouched] == BACKGROUNDS[scene.background]).all()
        for item in scene.objects:
            assert (image[item.coverage(64) == 1] == COLORS[item.color]).all()


def test_objects_of_a_scene_are_inside_apart_and_distinct() -> None:
    for scene in SCENES:
        assert is_valid(scene)
        masks = [item.coverage(64) > 0 for item in scene.objects]
        edge = np.ones((64, 64), bool)
        edge[1:-1, 1:-1] = False
        assert not any((mask & edge).any() for mask in masks)
        assert np.sum(masks, axis=0).max() <= 1
        pairs = {(item.color, item.shape) for item in scene.objects}
        assert scene.identical or len(pairs) == len(scene.objects)


def test_scenes_with_objects_outside_too_close_or_alike_are_invalid() -> None:
    center = single("circle")
    assert is_valid(Scene("white", (center,)))
    assert not is_valid(Scene("white", (Object("circle", "red", "large", 0.175 + MARGIN - 0.01, 0.5),)))
    close = Object("square", "blue", "small", 0.5 + 0.175 + 0.088 + GAP - 0.01, 0.5)
    assert not is_valid(Scene("white", (center, close)))
    assert not is_valid(Scene("white", (Object("ring", "red", "small", 0.2, 0.2), Object("ring", "red", "large", 0.7, 0.7))))


def test_relations_are_true_of_the_pixels_and_have_a_converse() -> None:
    converse = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", None: None}
    found = set()
    for scene in SCENES:
        for a, b in itertools.permutations(scene.objects, 2):
            name = relation(a, b)
            assert relation(b, a) == converse[name]
            rows_a, columns_a = np.nonzero(a.coverage(64) >= 0.5)
            rows_b, columns_b = np.nonzero(b.coverage(64) >= 0.5)
            truth = {
                "left of": columns_a.max() < columns_b.min(),
                "right of": columns_a.min() > columns_b.max(),
                "above": rows_a.max() < rows_b.min(),
                "below": rows_a.min() > rows_b.max(),
            }
            assert name is None or truth[name]
            found.add(name)
    assert found == set(converse)


def test_two_different_objects_always_have_a_relation() -> None:
    pairs = [scene for scene in SCENES if len(scene.objects) == 2 and not scene.identical]
    assert len(pairs) > 50
    assert all(relation(*scene.objects) for scene in pairs)


@pytest.mark.parametrize("grid", [8, 16])
def test_centers_lie_on_the_grid(grid: int) -> None:
    for i in range(100):
        for item in sample_scene(random.Random(i), 3, grid, 0.1).objects:
            assert (item.x * grid).is_integer()
            assert (item.y * grid).is_integer()


def test_a_grid_without_valid_scenes_is_an_error_that_names_the_parameter() -> None:
    with pytest.raises(ValueError, match=r"ingest\.shapes\.grid"):
        sample_scene(random.Random(0), 3, 1, 0.0, attempts=50)
