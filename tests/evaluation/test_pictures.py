"""Images that are decoded where they are read: the same as a list of them, and few in memory."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests_support import decoding

from cm3leon.config.schema import Config
from cm3leon.evaluation import context
from cm3leon.evaluation.context import Evaluation
from cm3leon.evaluation.pictures import CHUNK, Pictures
from cm3leon.evaluation.record import Record
from cm3leon.generation.generator import Generator
from cm3leon.generation.results import GeneratedText
from cm3leon.utils.world import World


def test_pictures_are_a_sequence_of_which_one_chunk_is_in_memory() -> None:
    made: list[weakref.ref[Image.Image]] = []
    most = 0

    def make(rows: slice) -> list[Image.Image]:
        images = [Image.new("L", (1, 1), number % 256) for number in range(rows.start, rows.stop)]
        made.extend(map(weakref.ref, images))
        return images

    pictures = Pictures(3 * CHUNK + 5, make)
    for number, image in enumerate(pictures):
        most = max(most, sum(reference() is not None for reference in made))
        assert image.getpixel((0, 0)) == number % 256
    assert number + 1 == len(pictures) and most <= CHUNK + 1  # and the last image of the chunk before
    assert [image.getpixel((0, 0)) for image in pictures[CHUNK - 2 : CHUNK + 2]] == [126, 127, 128, 129]
    assert pictures[-1].getpixel((0, 0)) == (len(pictures) - 1) % 256
    with pytest.raises(IndexError):
        pictures[len(pictures)]


def test_an_evaluation_keeps_codes_and_sees_the_same_images(tiny_parts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator.from_parts(**tiny_parts, decoding=decoding(candidates=2))
    unused: Any = None
    evaluation = Evaluation(Config(), generator, generator.parts.encoder or unused, unused, unused, Record())
    prompts = ["a red circle", "two green crosses", "a blue square on white", "a", "b"]
    whole = [images[0].image for images in generator.text_to_image(prompts, seed=Config().evaluate.seed)]
    monkeypatch.setattr(context, "TOGETHER", 2)
    parts = evaluation.generate_images(generator.text_to_image, prompts)
    assert isinstance(parts, Pictures), "codes, of which a chunk at a time is decoded: see the test above"
    assert [np.asarray(image).tolist() for image in parts] == [np.asarray(image).tolist() for image in whole]
    again = evaluation.reconstructions(parts)
    assert [image.tobytes() for image in again] == [image.tobytes() for image in generator.decode(generator.encode(whole))]
    assert np.array_equal(evaluation.encoder.encode_images(parts), evaluation.encoder.encode_images(whole))


def test_processes_divide_what_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each asks for its own rows, a few at a time; between them for all, in order, also where there are fewer than processes."""
    monkeypatch.setattr(context, "TOGETHER", 2)
    unused: Any = None

    def answers(questions: list[str], **_: Any) -> list[GeneratedText]:
        assert 1 <= len(questions) <= 2
        return [GeneratedText(f"{question}!", 0, [], {}, "vqa") for question in questions]

    for count in (0, 2, 7, 20):
        questions = [str(number) for number in range(count)]
        found = []
        for rank in range(3):
            monkeypatch.setattr(World, "gather", lambda self, value: [value])
            evaluation = Evaluation(Config(), unused, unused, unused, unused, Record(), World(rank, 3))
            found.append(evaluation.generate_texts(answers, questions))
        assert [text for own in found for text in own] == [f"{question}!" for question in questions]
        assert max(map(len, found)) - min(map(len, found)) <= 1
