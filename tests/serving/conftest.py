"""Untrained models, and a server of them."""

import pytest
from serving_support import Held, serving

from cm3leon import paths
from cm3leon.config import DecodingConfig
from cm3leon.generation.generator import Generator


@pytest.fixture(scope="session")
def generator(tiny_models):
    parts = {"model": paths.FINETUNED, "image_tokenizer": paths.IMAGE_TOKENIZER, "text_tokenizer": paths.TEXT_TOKENIZER}
    parts |= {"encoder": paths.ENCODER, "memory_bank": paths.INDEX, "tokens": paths.TOKENS, "super_resolution": paths.SUPER_RESOLUTION}
    decoding = DecodingConfig(candidates=2, max_text_tokens=8)
    return Generator.from_parts(**{name: tiny_models / path for name, path in parts.items()}, decoding=decoding)


@pytest.fixture(scope="session")
def server(generator):
    """One server for all tests that do not control its timing."""
    with serving(generator) as running:
        yield running


@pytest.fixture
def held(generator):
    return Held(generator)
