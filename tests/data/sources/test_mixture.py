"""Several collections in one manifest: records of the same image become one, and keys of different parts do not meet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from images_support import encode, squares

from cm3leon.config.ingest_schema import IngestConfig
from cm3leon.config.loading import parse_config
from cm3leon.data.manifest import SourceRow, read_manifest
from cm3leon.data.merging import merge_images
from cm3leon.data.packing import pack
from cm3leon.data.sources import SourceError
from cm3leon.stages.ingest import source_rows
from cm3leon.utils.errors import ConfigError


def picture(number: int) -> bytes:
    return encode(squares(number))


def write_captions(root: Path, numbers: range, **changes: Any) -> dict[str, Any]:
    """A folder source with a caption of each picture."""
    root.mkdir(parents=True)
    for number in numbers:
        (root / f"{number}.png").write_bytes(picture(number))
    frame = pd.DataFrame(
        {"image": [f"{number}.png" for number in numbers], "caption": [f"picture {number}" for number in numbers], **changes}
    )
    frame.to_csv(root / "manifest.csv", index=False)
    return {"source": "folder", "path": root.name}


def write_questions(root: Path, numbers: range) -> dict[str, Any]:
    """A VQA source with a question about each picture, in files of other names."""
    (root / "images").mkdir(parents=True)
    for number in numbers:
        (root / f"images/{number:04d}.png").write_bytes(picture(number))
    questions = [{"question_id": number, "image_id": number, "question": f"Is it {number}?"} for number in numbers]
    annotations = [{"question_id": number, "image_id": number, "answers": [{"answer": "yes"}]} for number in numbers]
    (root / "questions.json").write_text(json.dumps({"questions": questions}))
    (root / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    return {"source": "vqa", "path": root.name, "options": {"images": "images/{image_id:04d}.png"}}


def read(path: Path, *parts: dict[str, Any]) -> list[SourceRow]:
    return list(source_rows(IngestConfig.model_validate({"source": "mixture", "path": str(path), "mixture": list(parts)})))


def test_captions_of_one_part_and_questions_of_another_are_one_record(tmp_path: Path) -> None:
    captions = write_captions(tmp_path / "captions", range(4), licence="")
    questions = write_questions(tmp_path / "asked", range(2, 6))
    captions["options"], questions["options"]["license"] = {"attribution": "me"}, "MIT"
    found = {row.origin: row for row in read(tmp_path, captions, questions | {"weight": 3.0})}
    assert len(found) == 6
    both = found["captions: manifest.csv line 4, asked: questions.json image 2"]
    assert (both.image, both.captions, both.questions) == (picture(2), ["picture 2"], [("Is it 2?", ["yes"])])
    assert (both.licence, both.attribution, both.source, both.weight) == ("MIT", "me", "folder", 3.0)
    assert (both.key, both.other_keys) == ("0:2.png", ["1:images/0002.png"])
    assert {origin: row.weight for origin, row in found.items() if "," not in origin} == {
        "captions: manifest.csv line 2": 1.0, "captions: manifest.csv line 3": 1.0,
        "asked: questions.json image 4": 3.0, "asked: questions.json image 5": 3.0,
    }  # fmt: skip


def test_parts_in_either_order_give_the_same_images_and_annotations(tmp_path: Path) -> None:
    captions, questions = write_captions(tmp_path / "captions", range(5), licence="MIT"), write_questions(tmp_path / "asked", range(3, 8))
    one, other = read(tmp_path, captions, questions), read(tmp_path, questions, captions)
    content = [{(row.image, tuple(row.captions), str(row.questions), row.licence) for row in rows} for rows in (one, other)]
    assert content[0] == content[1] and len(content[0]) == len(one) == 8


def test_rows_that_contradict_each_other_stay_apart(tmp_path: Path) -> None:
    parts = [write_captions(tmp_path / name, range(2), licence=licence) for name, licence in (("a", "MIT"), ("b", "CC0-1.0"))]
    found = read(tmp_path, *parts)
    assert [(row.licence, row.image) for row in found] == [
        ("MIT", picture(0)), ("CC0-1.0", picture(0)), ("MIT", picture(1)), ("CC0-1.0", picture(1)),
    ]  # fmt: skip


def test_keys_of_different_parts_do_not_meet_and_edits_find_their_originals(tmp_path: Path) -> None:
    edits = {"licence": "MIT", "instruction": [None, "more"], "edited_from": [None, "0"], "key": ["0", "1"]}
    parts = [write_captions(tmp_path / "a", range(2), **edits), write_captions(tmp_path / "b", range(2, 4), **edits)]
    counts = pack(read(tmp_path, *parts), tmp_path / "raw", 32)
    manifest = read_manifest(tmp_path / "raw")
    assert counts["problems"] == 0
    assert manifest["edited_from"].tolist() == [None, manifest["id"][0], None, manifest["id"][2]]


def test_weights_are_in_the_manifest(tmp_path: Path) -> None:
    parts = [
        {**write_captions(tmp_path / name, range(start, start + 2), licence="MIT"), "weight": weight}
        for name, start, weight in (("a", 0, 0.5), ("b", 2, 2))
    ]
    pack(read(tmp_path, *parts), tmp_path / "raw", 32)
    frame = read_manifest(tmp_path / "raw")
    assert frame["weight"].tolist() == [0.5, 0.5, 2.0, 2.0] and frame["weight"].dtype == np.float32


def test_a_row_without_an_image_passes_and_condition_images_are_kept(tmp_path: Path) -> None:
    def rows() -> Iterator[SourceRow]:
        for number, conditions in enumerate([{"depth": b"d" * 9}, {}, {"hed": b"h" * 5}, {"depth": b"other"}]):
            image = None if number == 1 else b"image"
            yield SourceRow(f"k{number}", f"row {number}", image, [f"c{number}"], "MIT", None, f"source {number}", conditions=conditions)

    first, contradicting, missing = merge_images(rows)
    assert (first.conditions, first.captions, first.source) == ({"depth": b"d" * 9, "hed": b"h" * 5}, ["c0", "c2"], "source 0")
    assert (contradicting.conditions, contradicting.image) == ({"depth": b"other"}, b"image")
    assert (missing.image, missing.captions) == (None, ["c1"])


def test_no_image_is_held_between_the_passes() -> None:
    """Copies of the same images: at most one image that was read before is alive while the next is read."""
    alive: set[int] = set()

    class Tracked(bytes):
        def __del__(self) -> None:
            alive.discard(id(self))

    most = 0

    def rows() -> Iterator[SourceRow]:
        nonlocal most
        for number in range(200):
            image = Tracked(f"image {number % 20}".encode())
            alive.add(id(image))
            most = max(most, len(alive))
            yield SourceRow(f"k{number}", f"row {number}", image, [f"c{number}"], "MIT", None, "s")
            del image

    assert sum(len(row.captions) for row in merge_images(rows)) == 200
    assert most <= 3


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ([], "ingest: source is mixture, and mixture lists no collection"),
        ([{"source": "coco"}, {"source": "folder", "options": {"manifset": "m.csv"}}], "ingest: mixture.1.options.manifset: unknown key"),
        ([{"source": "vqa", "options": {"images": "x"}}], "ingest: mixture.0.options.images: Value error, 'x' names no image"),
        ([{"source": "mixture"}], "ingest.mixture.0.source: Input should be 'shapes', 'folder'"),
        ([{"source": "coco", "weight": 0}], "ingest.mixture.0.weight: Input should be greater than 0"),
        ([{"source": "coco", "weight": float("inf")}], "ingest.mixture.0.weight: Input should be a finite number"),
        ([{"source": "coco", "path": "../coco"}], "ingest.mixture.0.path: '../coco' is not below ingest.path"),
        ([{"source": "coco", "path": "/coco"}], "ingest.mixture.0.path: '/coco' is not below ingest.path"),
        ([{"source": "coco", "wieght": 1}], "ingest.mixture.0.wieght: unknown key"),
    ],
)
def test_a_wrong_mixture_is_told_by_the_number_of_the_part(mixture: list[Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"ingest": {"source": "mixture", "mixture": mixture}}, "params.yaml")
    assert str(caught.value).startswith(f"params.yaml: {message}") and "\n" not in str(caught.value)


def test_a_part_that_cannot_be_read_is_told_by_its_own_parameters(tmp_path: Path) -> None:
    part = write_captions(tmp_path / "a", range(2))
    with pytest.raises(SourceError, match=r"one license for all rows with ingest\.mixture\.1\.options\.license"):
        read(tmp_path, {**part, "options": {"license": "MIT"}}, part)
