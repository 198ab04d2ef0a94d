"""The benchmark scripts load, and what they compute themselves is right."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_loads_and_says_how_to_run_it(path: Path) -> None:
    assert f"python benchmarks/{path.name}" in (load(path).__doc__ or "")


def test_uncertainty_of_a_code_given_its_patch() -> None:
    [script] = [path for path in SCRIPTS if path.stem == "image_tokenizer"]
    images = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    images[:, 4:] = 9  # two different patches, each four times
    same = np.array([[1, 1, 2, 2], [1, 1, 2, 2]])
    assert load(script).code_uncertainty(images, same, 4) == 0
    half = np.array([[1, 3, 2, 2], [1, 3, 2, 2]])  # the first has one of two codes, four times in two images
    assert load(script).code_uncertainty(images, half, 4) == pytest.approx(2 * math.log(2))
