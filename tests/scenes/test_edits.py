"""Judging edits: what a person would say of a drawn scene, given the scene before and after."""

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
    "left red": (GREEN, BEFORE, False, True),
    "in a wrong color": (GREEN, replace(BEFORE, objects=(replace(CIRCLE, color="cyan"), SQUARE)), False, True),
    "recolored, the other lost": (GREEN, replace(GREEN, objects=GREEN.objects[:1]), True, False),
    "recolored on another ground": (GREEN, replace(GREEN, background="white"), True, False),
    "recolored, one more": (GREEN, replace(GREEN, objects=(*GREEN.objects, RING)), True, False),
    "removed": (ALONE, ALONE, True, True),
    "not removed": (ALONE, BEFORE, False, True),
    "removed, the other in another color": (ALONE, replace(ALONE, objects=(replace(SQUARE, color="red"),)), True, False),
    "added": (ADDED, ADDED, True, True),
    "added at another place": (ADDED, ELSEWHERE, True, True),
    "not added": (ADDED, BEFORE, False, True),
    "another shape added": (ADDED, replace(ADDED, objects=(CIRCLE, SQUARE, replace(RING, shape="cross"))), False, True),
    "on another ground": (PINK, PINK, True, True),
    "on the old ground": (PINK, BEFORE, False, True),
    "on another ground, moved": (PINK, replace(PINK, objects=(replace(CIRCLE, x=0.6, y=0.2), SQUARE)), True, False),
}


@pytest.mark.parametrize(("after", "drawn", "done", "kept"), CASES.values(), ids=CASES)
def test_what_a_person_would_say(after, drawn, done, kept):
    assert judge(BEFORE, after, drawn) == Judgment(done, kept)
    seen = [read_scene(scene.render(64)) for scene in (BEFORE, after, drawn)]
    assert judge(*seen) == Judgment(done, kept)


def test_pixels_outside_of_an_edit():
    before, after = (Image.fromarray(scene.render(64)) for scene in (BEFORE, GREEN))
    region = changed_region(before, after)
    assert 0 < region.mean() < 0.1 and region[16, 16] and not region[44, 44]
    assert psnr_outside(after, before, region) == 60 < 61
    noisy = np.asarray(after).astype(int) + np.random.default_rng(0).choice([-8, 8], size=(64, 64, 3))
    within = np.clip(noisy, 0, 255).astype(np.uint8)
    error = np.square(within.astype(float) - np.asarray(after))[~region].mean()
    assert psnr_outside(after, Image.fromarray(within), region) == pytest.approx(10 * np.log10(255**2 / error))
    assert np.isnan(psnr_outside(after, before, np.ones((64, 64), bool)))
