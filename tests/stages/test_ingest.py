"""Condition images that the source lacks are computed."""

import io
import os
import time
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from cm3leon.config.ingest_schema import IngestConfig, SourceName
from cm3leon.data.conditions import EXTRACTORS
from cm3leon.data.images import encode
from cm3leon.data.manifest import SourceRow
from cm3leon.scenes.scene import Object, Scene
from cm3leon.stages import ingest
from cm3leon.stages.ingest import EXTRACTED_SIDE, SOURCES, source_rows, with_conditions

PICTURE = Scene("white", (Object("circle", "red", "large", 0.5, 0.5),)).render(64)


def row(number, image=None, **more):
    return SourceRow(f"key {number}", "", encode(PICTURE) if image is None else image, ["x"], "MIT", None, "test", **more)


def test_missing_kinds_are_computed_and_given_ones_kept():
    [found] = with_conditions([row(0, conditions={"hed": b"given"})], ["canny edge", "hed"], 1.0)
    assert list(found.conditions) == ["hed", "canny edge"] and found.conditions["hed"] == b"given"
    edges = np.asarray(Image.open(io.BytesIO(found.conditions["canny edge"])))
    assert np.array_equal(edges, EXTRACTORS["canny edge"](PICTURE)) and edges.any()


def test_the_choice_of_rows_depends_on_their_keys_and_the_share():
    chosen = [[bool(r.conditions) for r in with_conditions(map(row, range(200)), ["hed"], 0.3)] for _ in range(2)]
    assert chosen[0] == chosen[1] and sum(chosen[0]) == pytest.approx(60, abs=20)
    assert not any(r.conditions for r in with_conditions(map(row, range(20)), [], 1.0))


def test_large_images_are_reduced_and_damaged_ones_are_left_to_validate():
    large = np.kron(PICTURE, np.ones((16, 20, 1), np.uint8))
    wide, broken = with_conditions([row(0, encode(large)), row(1, b"no image")], ["canny edge"], 1.0)
    assert Image.open(io.BytesIO(wide.conditions["canny edge"])).width == EXTRACTED_SIDE and broken.conditions == {}


def test_conditions_are_computed_on_all_cores_and_no_image_stops_the_stage(monkeypatch):
    def extract(pixels):
        time.sleep(60 if (pixels == 0).all() else 0.1)
        return np.full((1, 1, 3), os.getpid() % 251, np.uint8)

    monkeypatch.setitem(EXTRACTORS, "hed", extract)
    monkeypatch.setattr(ingest, "EXTRACTION_SECONDS", 2.0)
    monkeypatch.setattr(ingest, "CHUNK_ROWS", 5)
    rows = [row(number, encode(np.zeros((8, 8, 3), np.uint8)) if number == 1 else None) for number in range(7)]
    found = list(with_conditions(iter(rows), ["hed"], 1.0))
    assert [item.key for item in found] == [item.key for item in rows] and [bool(item.conditions) for item in found].count(False) == 1
    workers = {Image.open(io.BytesIO(item.conditions["hed"])).getpixel((0, 0))[0] for item in found if item.conditions}
    assert len(workers) >= min(2, os.cpu_count() or 1) and not found[1].conditions


def test_every_source_of_the_parameters_is_listed(tmp_path):
    assert tuple(SOURCES) == get_args(SourceName)
    assert all(name in IngestConfig.model_fields for name in SOURCES)
    assert next(source_rows(IngestConfig(path=str(tmp_path)))).licence == "CC0-1.0"
