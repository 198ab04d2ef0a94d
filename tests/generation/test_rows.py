"""How many sequences are generated together: bytes compared with the caches', batches that fit, and results that do not depend on it."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests_support import decoding

from cm3leon.config.profiles import load_profile
from cm3leon.generation import candidates, rows, texts
from cm3leon.generation.cache import PromptCache, decoding_cache
from cm3leon.generation.engine import MAX_ROWS, generate_images, generate_texts
from cm3leon.generation.generator import Generator
from cm3leon.generation.rows import USABLE, SequenceBytes, batch_shape, sequence_bytes
from cm3leon.models.decoder import Decoder
from cm3leon.training.planning import meta_decoder

PROMPTS = ["a red circle", "two green crosses", "a blue square on white"]


@pytest.fixture(scope="module")
def generator(tiny_parts: dict[str, Path]) -> Generator:
    return Generator.from_parts(**tiny_parts, decoding=decoding(candidates=3, max_text_tokens=8))


@pytest.fixture(scope="module")
def model_7b() -> Decoder:
    """The paper's 7B in bfloat16, without memory."""
    return meta_decoder(load_profile("cm3leon-7b")).bfloat16()


def bytes_of(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("prompt_tokens", [40, 2300])
def test_bytes_are_those_of_the_caches(model_7b: Decoder, prompt_tokens: int) -> None:
    prompts, copies, new_tokens = 3, 2, 1024
    of = sequence_bytes(model_7b, prompt_tokens, new_tokens)
    prompt = PromptCache(model_7b, prompts, prompt_tokens)
    assert bytes_of([prompt.keys, prompt.values]) == prompts * of.prompt
    cache = decoding_cache(model_7b, prompt, copies, new_tokens)
    assert bytes_of([*cache.keys, *cache.values]) == pytest.approx(prompts * copies * of.continuation, rel=0.01)


def test_the_papers_7b_with_two_documents_fits_on_80_gb(model_7b: Decoder) -> None:
    """With weights in bfloat16, and two streams of guidance."""
    free = int(80e9) - bytes_of(list(model_7b.parameters()))
    image = model_7b.vocabulary.tokens_per_image
    of = sequence_bytes(model_7b, 2 * image + 300, image)
    assert 2 * (of.prompt + 64 * of.continuation) > free  # 128 rows do not fit
    for wanted in (1, 8, 16, 64):
        prompts, together = batch_shape(of, 2, wanted, free)
        assert 2 * prompts * (of.prompt + together * of.continuation) <= USABLE * free
    assert batch_shape(of, 2, 8, free) == (2, 8) and batch_shape(of, 2, 64, free)[0] == 1


@given(
    of=st.builds(SequenceBytes, st.integers(1, 1000), st.integers(1, 1000)),
    streams=st.integers(1, 3),
    wanted=st.integers(1, 300),
    free=st.integers(0, 10**6),
)
def test_batches_fit_and_leave_no_room_for_another_candidate(of: SequenceBytes, streams: int, wanted: int, free: int) -> None:
    def fits(prompts: int, together: int) -> bool:
        taken = streams * prompts * (of.prompt + together * of.continuation)
        return taken <= USABLE * free and streams * prompts * together <= MAX_ROWS

    prompts, together = batch_shape(of, streams, wanted, free)
    assert prompts >= 1 and 1 <= together <= wanted and (prompts == 1 or together == wanted)
    assert fits(prompts, together) or (prompts, together) == (1, 1)
    if together < wanted:
        assert not fits(1, together + 1) or USABLE * free % 1  # bytes are rounded down to whole ones
    else:
        assert not fits(prompts + 1, wanted) or USABLE * free % 1


@pytest.mark.parametrize("most", [1, 3])
def test_results_do_not_depend_on_the_number_of_rows(generator: Generator, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images = generator.text_to_image(PROMPTS, num_images=2, seed=3, guidance=2.0)
    answers = generator.caption([image.image for [image, _] in images], temperature=1.0)
    monkeypatch.setattr(rows, "MAX_ROWS", most)
    again = generator.text_to_image(PROMPTS, num_images=2, seed=3, guidance=2.0)
    for own, others in zip(images, again, strict=True):
        assert [image.seed for image in own] == [image.seed for image in others]
        for image, other in zip(own, others, strict=True):
            assert np.array_equal(image.codes, other.codes) and image.score == pytest.approx(other.score, abs=1e-6)
            assert np.array_equal(np.asarray(image.image), np.asarray(other.image))
    assert generator.caption([image.image for [image, _] in images], temperature=1.0) == answers


def test_little_free_memory_makes_small_batches(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int, int]] = []
    lengths: list[int] = []

    def recorded(model: Decoder, streams: Any, seeds: Any, *others: Any) -> np.ndarray:
        shapes.append((len(streams), len(seeds[0]), len(streams[0])))
        lengths.extend(len(prompt) for own in streams for prompt in own)
        return generate_images(model, streams, seeds, *others)

    monkeypatch.setattr(candidates, "generate_images", recorded)
    generator.text_to_image(PROMPTS, guidance=2.0)
    assert shapes == [(3, 3, 2)]
    of = sequence_bytes(generator.model, max(lengths), generator.model.vocabulary.tokens_per_image)
    for share, expected in ((1, [(1, 3, 2)] * 3), (0.5, [(1, 1, 2)] * 9), (0, [(1, 1, 2)] * 9)):
        shapes.clear()
        free = 2 * share * (of.prompt + 3 * of.continuation) / USABLE + 2
        monkeypatch.setattr(candidates, "free_memory", lambda device, free=free: int(free))
        generator.text_to_image(PROMPTS, guidance=2.0)
        assert shapes == expected


def test_little_free_memory_makes_small_batches_of_texts(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def recorded(model: Decoder, prompts: Any, *others: Any, **settings: Any) -> Any:
        sizes.append(len(prompts))
        return generate_texts(model, prompts, *others, **settings)

    monkeypatch.setattr(texts, "generate_texts", recorded)
    images = [Image.new("RGB", (32, 32))] * 3
    generator.caption(images)
    monkeypatch.setattr(texts, "free_memory", lambda device: 0)
    generator.caption(images)
    assert sizes == [3, 1, 1, 1]


def test_pictures_of_candidates_that_were_not_chosen_are_dropped(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Image.Image]] = []
    counts: list[int] = []
    decode = generator.parts.decode_images

    def counted(codes: np.ndarray) -> list[Image.Image]:
        counts.append(sum(reference() is not None for reference in made))
        images = decode(codes)
        made.extend(map(weakref.ref, images))
        return images

    monkeypatch.setattr(generator.parts, "decode_images", counted)
    monkeypatch.setattr(rows, "MAX_ROWS", 6)
    found = generator.text_to_image(PROMPTS, guidance=2.0)  # three candidates of a prompt at a time
    assert counts == [0, 1, 2] and len(found) == 3
