"""Untrained models, and a server of them."""

import pytest
from serving_support import Held, serving
from tests_support import decoding

from cm3leon.generation.generator import Generator


@pytest.fixture(scope="session")
def generator(tiny_parts):
    return Generator.from_parts(**tiny_parts, decoding=decoding(candidates=2, max_text_tokens=8))


@pytest.fixture(scope="session")
def server(generator):
    """One server for all tests that do not control its timing."""
    with serving(generator) as running:
        yield running


@pytest.fixture
def held(generator):
    return Held(generator)
