"""Scores of edits: the verdicts are those that a person would give, knowing the scene before and after the edit."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from cm3leon.scenes.edits import Judgment, changed_region, judge, psnr_outside
from cm3leon.scenes.reading import read_scene
from cm3leon.scenes.scene import Object, Scene

CIRCLE, SQUARE = Object("circle", "red", "small", 0.25, 0.25), Object("square", "blue", "large", 0.7, 0.7)
RING = Object("ring", "green", "small", 0.25, 0.75)
BEFORE = Scene("gray", (CIRCLE, SQUARE))
GREEN = replace(BEFORE, objects=(replace(CIRCLE, color="green"), SQUARE))
ALONE, ADDED, PINK = replace(BEFORE, objects=(SQUARE,)), replace(BEFORE, objects=(CIRCLE, SQUARE, RING)), replace(BEFORE, background="pink")
ELSEWHERE = replace(BEFORE, objects=(CIRCLE, SQUARE, replace(RING, x=0.75, y=0.2)))

CASES = {
    "recolored": (GREEN, GREEN, True, True),
    "not recolored": (GREEN, BEFORE, False, True),
    "recolored wrongly": (GREEN, replace(BEFORE, objects=(replace(CIRCLE, color="cyan"), SQUARE)), False, True),
    "recolored, another object lost": (GREEN, replace(GREEN, objects=GREEN.objects[:1]), True, False),
    "recolored, background changed": (GREEN, replace(GREEN, background="white"), True, False),
    "recolored, an object added": (GREEN, replace(GREEN, objects=(*GREEN.objects, RING)), True, False),
    "removed": (ALONE, ALONE, True, True),
    "not removed": (ALONE, BEFORE, False, True),
    "removed, another object recolored": (ALONE, replace(ALONE, objects=(replace(SQUARE, color="red"),)), True, False),
    "added": (ADDED, ADDED, True, True),
    "added at another position": (ADDED, ELSEWHERE, True, True),
    "not added": (ADDED, BEFORE, False, True),
    "another shape added": (ADDED, replace(ADDED, objects=(CIRCLE, SQUARE, replace(RING, shape="cross"))), False, True),
    "background changed": (PINK, PINK, True, True),
    "background not changed": (PINK, BEFORE, False, True),
    "background changed, an object moved": (PINK, replace(PINK, objects=(replace(CIRCLE, x=0.6, y=0.2), SQUARE)), True, False),
}


@pytest.mark.parametrize(("after", "generated", "done", "kept"), CASES.values(), ids=CASES)
def test_verdicts_on_scenes_and_on_their_images(after, generated, done, kept):
    assert judge(BEFORE, after, generated) == Judgment(done, kept)
    seen = [read_scene(scene.render(64)) for scene in (BEFORE, after, generated)]
    assert judge(*seen) == Judgment(done, kept)


def test_psnr_is_of_the_pixels_outside_the_changed_region():
    before, after = (Image.fromarray(scene.render(64)) for scene in (BEFORE, GREEN))
    region = changed_region(before, after)
    assert 0 < region.mean() < 0.1 and region[16, 16] and not region[44, 44]
    assert psnr_outside(after, before, region) == 60 < 61
    noisy = np.asarray(after).astype(int) + np.random.default_rng(0).choice([-8, 8], size=(64, 64, 3))
    within = np.clip(noisy, 0, 255).astype(np.uint8)
    error = np.square(within.astype(float) - np.asarray(after))[~region].mean()
    assert psnr_outside(after, Image.fromarray(within), region) == pytest.approx(10 * np.log10(255**2 / error))
    assert np.isnan(psnr_outside(after, before, np.ones((64, 64), bool)))
