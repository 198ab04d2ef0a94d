"""Condition images of any image: thin and soft edges, scribbles, straight lines."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy import ndimage

from cm3leon.data.conditions import EXTRACTORS, STROKE, WOBBLE
from cm3leon.scenes.scene import Object, Scene, sample_scene
from cm3leon.sequence.tasks import CONDITIONS

SQUARE = Scene("white", (Object("square", "blue", "large", 0.45, 0.6),))
KINDS = pytest.mark.parametrize("kind", EXTRACTORS)


def lit(kind: str, pixels: np.ndarray, least: int = 128) -> np.ndarray:
    return EXTRACTORS[kind](pixels)[..., 0] >= least


def far(mask: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Distance of each pixel of ``mask`` to ``target``, pixels."""
    return ndimage.distance_transform_edt(~target)[mask]


def disc(side: int, radius: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """A red disc on gray, and each pixel's distance to its outline, pixels."""
    y, x = np.indices((side, side)) + 0.5
    distance = np.hypot(x - 0.5 * side, y - 0.47 * side) - radius * side
    share = np.clip(0.5 - distance, 0, 1)[..., None]
    return (share * (222, 28, 36) + (1 - share) * 150 + 0.5).astype(np.uint8), distance


def test_the_kinds_are_those_of_the_task() -> None:
    assert EXTRACTORS.keys() <= set(CONDITIONS)


@KINDS
@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (90, 200), (700, 1024)])
def test_extraction_is_deterministic_for_any_size(kind: str, shape: tuple[int, int]) -> None:
    pixels = ndimage.gaussian_filter(np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(float), (3, 3, 0))
    pixels = ((pixels - pixels.min()) / np.ptp(pixels) * 255).astype(np.uint8)
    pixels.setflags(write=False)
    found = EXTRACTORS[kind](pixels)
    assert (found.shape, found.dtype) == (pixels.shape, np.uint8)  # type: ignore[comparison-overlap]
    assert 0 < (found >= 128).mean() < 1
    assert (found == found[..., :1]).all()
    np.random.seed(1)
    assert (EXTRACTORS[kind](pixels) == found).all()


@KINDS
@pytest.mark.parametrize("side", [32, 64, 256])
def test_a_uniform_image_gives_black(kind: str, side: int) -> None:
    for value in (0, 150, 255):
        assert not EXTRACTORS[kind](np.full((side, side, 3), value, np.uint8)).any()


@KINDS
@pytest.mark.parametrize("pixels", [np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8)])
def test_other_arrays_are_refused(kind: str, pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected a uint8 array \(height, width, 3\), got"):
        EXTRACTORS[kind](pixels)


@KINDS
def test_an_image_gives_the_same_lines_at_any_size(kind: str) -> None:
    for number in range(3):
        scene = sample_scene(random.Random(number), 2, 8, 0)
        large = lit(kind, scene.render(512))
        for side in (64, 128):
            small = np.kron(lit(kind, scene.render(side)), np.ones((512 // side, 512 // side), bool))
            assert (far(large, small) <= 512 / 32).mean() > 0.93
            assert (far(small, large) <= 512 / 32).mean() > 0.93


@pytest.mark.parametrize("side", [32, 64, 256, 512])
def test_canny_finds_the_outline_of_a_disc_within_a_pixel(side: int) -> None:
    pixels, distance = disc(side)
    edges = lit("canny edge", pixels)
    assert (np.abs(distance[edges]) <= 1).all()
    assert (far(np.abs(distance) < 0.5, edges) <= 1.5).all()


def test_canny_edges_are_thin_and_lie_on_the_outlines() -> None:
    for number in range(50):
        scene = sample_scene(random.Random(number), 3, 16, 0.1)
        edges = lit("canny edge", scene.render(64))
        inside = np.sum([item.coverage(64) for item in scene.objects], axis=0) >= 0.5
        outline = inside & ~ndimage.binary_erosion(inside, np.ones((3, 3)))
        assert (far(edges, outline) <= 2.3).all()
        # Nearly all of the outline is found: smoothing rounds off corners.
        assert (far(outline, edges) <= 2.3).mean() > 0.95
        assert edges.sum() < 1.3 * outline.sum()
        assert not (edges[1:, 1:] & edges[1:, :-1] & edges[:-1, 1:] & edges[:-1, :-1]).any()


@KINDS
def test_edges_between_colors_of_one_brightness_are_seen(kind: str) -> None:
    pixels = np.full((64, 64, 3), (200, 60, 100), np.uint8)
    pixels[20:44, 20:44] = (60, 131, 100)
    assert np.ptp(pixels @ (0.299, 0.587, 0.114)) < 1
    found = lit(kind, pixels)
    assert found.any()
    # Scribbles deviate by two pixels and are three wide.
    assert not found[24:40, 24:40].any()


def test_soft_edges_fade_and_are_as_bright_for_weak_contrasts() -> None:
    pixels, distance = disc(256)
    soft = EXTRACTORS["hed"](pixels)[..., 0].astype(int)
    assert soft[np.abs(distance) < 0.5].min() > 200
    assert soft[np.abs(distance) > 12].max() < 10
    rings = [soft[(np.abs(distance) >= r) & (np.abs(distance) < r + 1)].mean() for r in range(8)]
    assert (np.diff(rings) < 0).all()
    peaks = {}
    for color in ("yellow", "blue"):
        scene = Scene("white", (Object("circle", color, "large", 0.5, 0.5),))
        peaks[color] = np.percentile(EXTRACTORS["hed"](scene.render(64)), 98)
    assert abs(peaks["yellow"] - peaks["blue"]) < 15


def test_scribbles_are_thick_and_deviate_within_bounds() -> None:
    pixels, distance = disc(512)
    strokes = lit("children's scribbles", pixels)
    deviation = np.abs(distance[strokes]) / 512
    assert deviation.max() < WOBBLE * 2**0.5 + STROKE + 0.01
    assert deviation.max() > STROKE + WOBBLE / 2
    assert ndimage.distance_transform_edt(strokes).max() > 0.8 * STROKE * 512
    _, pieces = ndimage.label(~strokes)
    assert pieces == 2


def test_specks_are_not_scribbled() -> None:
    pixels = np.full((128, 128, 3), 255, np.uint8)
    pixels[20:22, 20:22] = 0
    assert lit("canny edge", pixels).any()
    assert not EXTRACTORS["children's scribbles"](pixels).any()


@pytest.mark.parametrize("side", [64, 256])
def test_straight_lines_are_the_sides_of_a_square(side: int) -> None:
    lines = lit("M-LSD lines", SQUARE.render(side))
    inside = SQUARE.objects[0].coverage(side) >= 0.5
    outline = inside & ~ndimage.binary_erosion(inside, np.ones((3, 3)))
    assert (far(lines, outline) <= 2 * side / 64).all()
    assert (far(outline, lines) <= 2 * side / 64).mean() > 0.95


def test_dots_are_no_straight_lines() -> None:
    pixels = np.full((128, 128, 3), 255, np.uint8)
    dotted = np.arange(128) % 16 < 4
    pixels[16:112, 16:112][np.outer(dotted, dotted)[16:112, 16:112]] = 0
    assert lit("canny edge", pixels).sum() > 200
    assert not EXTRACTORS["M-LSD lines"](pixels).any()
