"""Agreement of an image with its condition image."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from cm3leon.data.conditions import EXTRACTORS
from cm3leon.evaluation.conditions import agreement, extract
from cm3leon.scenes.conditions import RENDERERS, conditions
from cm3leon.scenes.reading import UNKNOWN, read_scene
from cm3leon.scenes.scene import Object, Scene, sample_scene
from cm3leon.sequence.tasks import CONDITIONS

SIDE = 64
SCENES = [sample_scene(random.Random(number), 3, 8, 0.1) for number in range(30)]
ASKED = [conditions(scene, SIDE) for scene in SCENES]
KINDS = pytest.mark.parametrize("kind", CONDITIONS)


def worn(pixels: np.ndarray) -> np.ndarray:
    """Blurred and noisy, as after an image tokenizer."""
    noise = np.random.default_rng(0).normal(0, 4, pixels.shape)
    return np.clip(ndimage.gaussian_filter(pixels.astype(float), (0.8, 0.8, 0)) + noise, 0, 255).astype(np.uint8)


def agreements(kind: str, images: list[np.ndarray]) -> list[float]:
    return [agreement(kind, asked[kind], extract(kind, image)) for asked, image in zip(ASKED, images, strict=True)]


@KINDS
def test_a_real_image_agrees_and_one_of_another_scene_does_not(kind: str) -> None:
    images = [scene.render(SIDE) for scene in SCENES]
    true = agreements(kind, images)
    assert np.mean(true) > 0.99
    assert min(true) == 1 if kind in EXTRACTORS else min(true) > 0.9
    blurred = agreements(kind, [worn(image) for image in images])
    assert np.mean(blurred) > 0.93
    others = [agreement(kind, asked[kind], other[kind]) for asked, other in zip(ASKED, ASKED[1:] + ASKED[:1], strict=True)]
    assert np.mean(others) < 0.25
    assert (np.array(others) < np.array(blurred)).all()


@KINDS
def test_agreement_falls_with_distance(kind: str) -> None:
    scene = Scene("gray", (Object("cross", "yellow", "large", 0.3, 0.5),))
    asked = conditions(scene, SIDE)[kind]
    values = []
    for step in (0, 4, 12, 25):
        moved = Scene("gray", (replace(scene.objects[0], x=0.3 + step / SIDE),))
        values.append(agreement(kind, asked, extract(kind, moved.render(SIDE))))
    assert values[0] > 0.98
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == len(values)
    assert values[-1] < 0.1


@KINDS
def test_empty_condition_images_agree_with_each_other_only(kind: str) -> None:
    empty = extract(kind, np.full((SIDE, SIDE, 3), 150, np.uint8))
    assert agreement(kind, empty, empty) == 1
    assert agreement(kind, ASKED[0][kind], empty) == 0
    assert agreement(kind, empty, ASKED[0][kind]) == 0


@KINDS
def test_agreement_is_symmetric_and_between_0_and_1(kind: str) -> None:
    for one, other in pairwise(ASKED):
        value = agreement(kind, one[kind], other[kind])
        assert 0 <= value <= 1
        assert value == pytest.approx(agreement(kind, other[kind], one[kind]))
        assert agreement(kind, one[kind], one[kind]) == 1


@pytest.mark.parametrize("kind", [*RENDERERS, "hed", "children's scribbles"])
def test_images_of_another_size_are_resized_to_that_of_the_request(kind: str) -> None:
    found = [
        agreement(kind, asked[kind], extract(kind, scene.render(2 * SIDE))) for scene, asked in zip(SCENES[:10], ASKED[:10], strict=True)
    ]
    assert np.mean(found) > 0.75


def test_segments_are_compared_class_by_class() -> None:
    circle, square = Object("circle", "red", "large", 0.25, 0.5), Object("square", "blue", "large", 0.75, 0.5)
    both, one = (conditions(Scene("gray", objects), SIDE)["segmentation map"] for objects in ((circle, square), (circle,)))
    assert agreement("segmentation map", both, one) == 0.5
    other = conditions(Scene("gray", (circle, replace(square, shape="diamond"))), SIDE)["segmentation map"]
    assert agreement("segmentation map", both, other) == pytest.approx(1 / 3)
    tinted = np.clip(both.astype(int) + np.random.default_rng(0).integers(-30, 31, both.shape), 0, 255).astype(np.uint8)
    assert agreement("segmentation map", both, tinted) > 0.98


def test_depth_differs_for_solids_of_the_same_outline() -> None:
    ball = conditions(Scene("gray", (Object("circle", "red", "large", 0.5, 0.5),)), SIDE)
    flat = {kind: pixels.copy() for kind, pixels in ball.items()}
    flat["depth"][flat["depth"] > 96] = 96
    assert 0.4 < agreement("depth", ball["depth"], flat["depth"]) < 0.7
    turned = ball["3D norm"][:, ::-1]
    assert agreement("3D norm", ball["3D norm"], turned) < 0.7


def test_objects_of_unknown_shape_are_left_out() -> None:
    image = Image.fromarray(Scene("white", (Object("circle", "blue", "small", 0.2, 0.5),)).render(SIDE))
    ImageDraw.Draw(image).line([(30, 8), (60, 8), (60, 56), (30, 56)], fill=(222, 28, 36), width=3)
    scene = read_scene(image)
    assert {item.shape for item in scene.objects} == {"circle", UNKNOWN}
    known = replace(scene, objects=tuple(item for item in scene.objects if item.shape != UNKNOWN))
    for kind, draw in RENDERERS.items():
        assert (extract(kind, image) == draw(known, SIDE)).all()
        assert (extract(kind, image) == extract(kind, np.asarray(image))).all()


def test_an_unknown_kind_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="no condition image of kind 'fog' can be extracted; the kinds are canny edge"):
        extract("fog", np.zeros((SIDE, SIDE, 3), np.uint8))
    with pytest.raises(ValueError, match="'fog'"):
        agreement("fog", ASKED[0]["hed"], ASKED[0]["hed"])
