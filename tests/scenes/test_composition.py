"""Composition accuracy: scenes are read back right from images, and each kind of mistake is found."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from cm3leon.scenes.composition import Mention, Statement, check, check_images, parse_caption, score, summarize
from cm3leon.scenes.reading import UNKNOWN, read_scene
from cm3leon.scenes.scene import BACKGROUNDS, COLORS, SHAPES, SIZES, Object, Scene, sample_scene
from cm3leon.scenes.text import captions

SCENES = [sample_scene(random.Random(i), 3, 16 if i % 2 else 0, 0.1) for i in range(1000)]


def fraction_read_right(scenes: list[Scene], images: list[np.ndarray]) -> float:
    """Fraction of images read with the right background and exactly the right objects at the right positions."""
    right = 0
    for scene, image in zip(scenes, images, strict=True):
        seen = read_scene(image)
        nearest = [min(seen.objects, key=lambda o: (o.x - i.x) ** 2 + (o.y - i.y) ** 2) for i in scene.objects] if seen.objects else []
        placed = all(abs(o.x - i.x) + abs(o.y - i.y) < 0.04 for o, i in zip(nearest, scene.objects, strict=False))
        labels = [o.label for o in nearest] == [i.label for i in scene.objects]
        right += seen.background == scene.background and len(seen.objects) == len(scene.objects) and labels and placed
    return right / len(scenes)


def test_clean_renders_are_read_right() -> None:
    assert fraction_read_right(SCENES, [scene.render(64) for scene in SCENES]) >= 0.99


@pytest.mark.parametrize("side", [48, 128, 256])
def test_clean_renders_of_other_sizes_are_read_right(side: int) -> None:
    assert fraction_read_right(SCENES[:60], [scene.render(side) for scene in SCENES[:60]]) >= 0.99


@pytest.mark.parametrize(("sigma", "noise", "least"), [(0.6, 4, 0.98), (0.8, 8, 0.95)])
def test_blurred_and_noisy_renders_are_read_right(sigma: float, noise: float, least: float) -> None:
    """Blur in pixels, noise in gray levels; the second setting leaves 29 dB."""
    rng = np.random.default_rng(0)
    images = [
        ndimage.gaussian_filter(scene.render(64).astype(float), (sigma, sigma, 0)) + rng.normal(0, noise, (64, 64, 3))
        for scene in SCENES[:200]
    ]
    assert fraction_read_right(SCENES[:200], [np.clip(image.round(), 0, 255).astype(np.uint8) for image in images]) >= least


def test_captions_are_right_for_their_own_scenes_and_wrong_for_others() -> None:
    texts = [captions(scene, random.Random(i))[0] for i, scene in enumerate(SCENES[:200])]
    images = [scene.render(64) for scene in SCENES[:200]]
    own = score(texts, images)
    assert all(value == 1 for name, value in own.items() if name != "composition/prompts")
    assert own["composition/prompts"] == 200
    assert {f"composition/{name}" for name in ("background", "count", "color", "shape", "size", "relation", "text")} <= own.keys()
    others = score(texts, images[1:] + images[:1])
    assert others["composition"] < 0.03
    assert 0.1 < others["composition/background"] < 0.4
    assert others["composition/color"] < 0.15
    assert others["composition/shape"] < 0.2


RED, BLUE = Object("circle", "red", "small", 0.25, 0.5), Object("square", "blue", "large", 0.7, 0.5)
TEXT = "a small red circle left of a large blue square on a gray background"


@pytest.mark.parametrize(
    ("scene", "wrong"),
    [
        (Scene("gray", (RED, BLUE)), set()),
        (Scene("pink", (RED, BLUE)), {"background"}),
        (Scene("gray", (replace(RED, color="orange"), BLUE)), {"color"}),
        (Scene("gray", (replace(RED, color="blue"), replace(BLUE, color="red"))), {"color"}),
        (Scene("gray", (replace(RED, shape="ring"), BLUE)), {"shape"}),
        (Scene("gray", (replace(RED, size="large"), BLUE)), {"size"}),
        (Scene("gray", (replace(RED, x=0.7), replace(BLUE, x=0.25))), {"relation"}),
        (Scene("gray", (replace(RED, x=0.5, y=0.2), replace(BLUE, x=0.5, y=0.7))), {"relation"}),
        (Scene("gray", (RED, BLUE, Object("ring", "red", "small", 0.25, 0.8))), {"count"}),
        (Scene("gray", (RED,)), {"count", "color", "shape", "size", "relation"}),
        (Scene("gray", ()), {"count", "color", "shape", "size", "relation"}),
    ],
)
def test_each_kind_of_mistake_is_found(scene: Scene, wrong: set[str]) -> None:
    statement = parse_caption(TEXT)
    assert statement is not None
    for seen in (scene, read_scene(scene.render(64))):
        outcome = check(statement, seen)
        assert outcome.keys() == {"background", "count", "color", "shape", "size", "relation"}
        assert {name for name, right in outcome.items() if not right} == wrong


def test_only_stated_attributes_are_checked() -> None:
    scene = Scene("white", (RED,))
    assert check_images(["a red circle"], [scene.render(64)]) == [{"count": True, "color": True, "shape": True}]
    assert check_images(["two circles on white"], [scene.render(64)]) == [{"background": True, "count": False, "shape": False}]


def test_a_wrong_letter_is_found() -> None:
    image = Scene("white", (Object("letter", "red", "large", 0.5, 0.5, "A"),)).render(64)
    good, bad, shape = check_images(["the letter A in red on a white background", "the letter H in red", "a red triangle"], [image] * 3)
    assert good == {"background": True, "count": True, "color": True, "text": True}
    assert bad == {"count": True, "color": True, "text": False}
    assert shape == {"count": True, "color": True, "shape": False}


def test_touching_objects_are_separated_by_color() -> None:
    image = np.full((64, 64, 3), 255, np.uint8)
    image[20:32, 10:22], image[20:32, 22:34] = COLORS["red"], COLORS["green"]
    assert sorted((o.color, o.shape) for o in read_scene(image).objects) == [("green", "square"), ("red", "square")]


def test_single_pixels_are_ignored_and_dots_are_objects_more() -> None:
    image = Scene("white", (RED,)).render(64)
    image[50, 50] = COLORS["green"]
    assert len(read_scene(image).objects) == 1
    image[50:53, 50:53] = COLORS["green"]
    assert [o.shape for o in read_scene(image).objects] == ["circle", UNKNOWN]
    image[50:58, 50:58] = COLORS["green"]
    assert [o.shape for o in read_scene(image).objects] == ["circle", "square"]


@pytest.mark.parametrize("value", [0, 90, 255])
def test_flat_and_random_images_are_read_without_error(value: int) -> None:
    assert read_scene(np.full((64, 64, 3), value, np.uint8)).objects == ()
    noise = np.random.default_rng(value).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert not all(check(Statement((Mention("circle", "red"),), "white"), read_scene(noise)).values())


def test_pil_images_are_read_like_arrays_and_wrong_input_is_an_error() -> None:
    pixels = Scene("pink", (RED, BLUE)).render(64)
    assert read_scene(Image.fromarray(pixels)) == read_scene(pixels)
    with pytest.raises(ValueError, match="uint8 array"):
        read_scene(pixels.astype(np.float32))
    with pytest.raises(ValueError, match="2 captions but 1 images"):
        score(["a red circle", "a blue circle"], [pixels])


def test_phrasings_of_users_are_parsed() -> None:
    expected = parse_caption(TEXT)
    for text in (
        "A small red circle to the left of a large blue square on a grey background.",
        "a small red circle is left of a large blue square on gray",
        "on a gray background, a small red circle left of the large blue square",
        "There is a small red circle on the left of a large blue square on the gray background",
        "a gray background with a small red circle left of a large blue square",
    ):
        assert parse_caption(text) == expected, text
    red, blue, green = Mention("circle", "red"), Mention("square", "blue"), Mention("ring", "green", "small")
    assert parse_caption("a red circle, a blue square, and a small green ring") == Statement((red, blue, green))
    assert parse_caption("two red circles and a blue square on white") == Statement((red, red, blue), "white")
    assert parse_caption("three crosses on black") == Statement((Mention("cross"),) * 3, "black")
    assert parse_caption("an orange letter z against a pink background") == Statement((Mention("letter", "orange", None, "Z"),), "pink")


@pytest.mark.parametrize(
    "text",
    ["", "a dog on a sofa", "a red circle on a green background", "red", "two red circle", "a red circles", "a red circle left of",
     "a red circle left of two blue squares", "a red circle near a blue square", "the letter Q in red", "a circle red",
     "three red circles, three red circles and three red circles"],
)  # fmt: skip
def test_other_texts_are_not_parsed(text: str) -> None:
    assert parse_caption(text) is None


def test_captions_that_cannot_be_parsed_are_not_counted_as_prompts() -> None:
    image = Scene("white", (RED,)).render(64)
    assert check_images(["a dog", "a red circle"], [image, image])[0] is None
    assert score(["a dog", "a red circle"], [image, image])["composition/prompts"] == 1
    assert summarize([None]) == {"composition/prompts": 0.0}


mentions = st.builds(Mention, st.sampled_from(list(SHAPES)), st.sampled_from(list(COLORS)), st.sampled_from([None, *SIZES]))


@given(first=mentions, second=mentions, background=st.sampled_from(list(BACKGROUNDS)), relation=st.sampled_from(["left of", "above", None]))
@settings(max_examples=100)
def test_parsing_inverts_writing(first: Mention, second: Mention, background: str, relation: str | None) -> None:
    def words(mention: Mention) -> str:
        return f"a {mention.size + ' ' if mention.size else ''}{mention.color} {mention.shape}"

    text = f"{words(first)} {relation or 'and'} {words(second)} on a {background} background"
    assert parse_caption(text) == Statement((first, second), background, relation)
