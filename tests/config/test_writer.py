"""Values survive being written, lines are short, and the reference in the documentation is the schema's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cm3leon.config.loading import all_keys, parse_config
from cm3leon.config.profiles import configure, profile_names
from cm3leon.config.schema import Config
from cm3leon.config.writer import WIDTH, flow, params_text, reference, with_reference

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/configuration.md"
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_any_value_is_read_back(value: Any) -> None:
    assert yaml.safe_load(flow([value])) == [value]


@pytest.mark.parametrize(("value", "text"), [
    (5e-05, "0.00005"), (1e-9, "0.000000001"), (3.0, "3.0"), (1e20, "100000000000000000000.0"), (True, "true"), (None, "null"),
    ("ViT-B-32", "ViT-B-32"), ("M-LSD lines", "M-LSD lines"), ("no", '"no"'), ("1", '"1"'), ("a: b", '"a: b"'), ("a, b", '"a, b"'),
    ({"layout/iou": 0.1, "x": [1, "y"]}, "{layout/iou: 0.1, x: [1, y]}"),
])  # fmt: skip
def test_values_are_written_plainly(value: Any, text: str) -> None:
    assert flow(value) == text


@pytest.mark.parametrize("profile", profile_names(ROOT / "configs"))
def test_lines_are_short(profile: str, tmp_path: Path) -> None:
    configure(profile, configs=ROOT / "configs", params=tmp_path / "params.yaml")
    assert max(map(len, (tmp_path / "params.yaml").read_text().splitlines())) <= WIDTH


def test_long_and_odd_values_are_read_back() -> None:
    changes = {
        "ingest": {"path": "x" * 150, "folder": {"columns": {"captions": "title: # of the 'picture'", "license": "null"}}},
        "gate": {"margins": {f"score number {number}": number / 7 for number in range(40)}},
    }
    config = parse_config(changes, "here")
    assert parse_config(yaml.safe_load(params_text(config)), "written") == config


def test_the_reference_in_the_documentation_is_the_schemas() -> None:
    page = PAGE.read_text()
    assert with_reference(page) == page, "write it again with: python -m cm3leon.config.writer docs/configuration.md"
    rows = [line.split("`")[1] for line in reference().splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(all_keys(Config))
