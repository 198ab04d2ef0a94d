"""The folder source reads what is right, and says what is wrong with each row."""

import csv
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cm3leon.config.schema import FolderConfig
from cm3leon.data.manifest import Problem, SourceRow
from cm3leon.data.sources import SourceError
from cm3leon.data.sources.folder import rows


def collection(root: Path, records: list[dict[str, Any]], name: str = "manifest.csv") -> Path:
    """A directory with one image file and a manifest of the records."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "images" / "a.png").write_bytes(b"picture")
    names = list(dict.fromkeys(key for record in records for key in record))
    if name.endswith("csv"):
        with (root / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(records)
    elif name.endswith("jsonl"):
        (root / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        pd.DataFrame(records).to_parquet(root / name)
    return root


def one(root: Path, **cells: Any) -> SourceRow:
    base = {"image": "images/a.png", "caption": "a cat", "licence": "MIT"}
    return next(rows(FolderConfig(), collection(root, [{**base, **cells}])))


@pytest.mark.parametrize("name", ["manifest.csv", "manifest.jsonl", "manifest.parquet"])
def test_every_kind_of_manifest_gives_the_same_row(tmp_path: Path, name: str) -> None:
    lists = {
        "captions": ["a cat", "the cat"],
        "objects": [{"label": "cat", "box": [0, 1, 2.5, 3]}],
        "questions": [{"question": "What?", "answers": ["a cat", "cat"]}],
        "reasoning": [{"question": "Which?", "options": ["a", "b"], "answer": "b", "explanation": "Because.", "context": "So."}],
    }
    cells = lists if not name.endswith("csv") else {key: json.dumps(value) for key, value in lists.items()}
    record = {"image": "images/a.png", "licence": "MIT", "attribution": "me", "id": "k1", "edited_from": "k1", "group": "g", **cells}
    row = next(rows(FolderConfig(manifest=name), collection(tmp_path, [record], name)))
    assert row.problem is None, row.detail
    assert (row.image, row.captions, row.licence, row.attribution) == (b"picture", ["a cat", "the cat"], "MIT", "me")
    assert row.objects == [("cat", (0, 1, 2.5, 3))]
    assert row.questions == [("What?", ["a cat", "cat"])]
    assert row.reasoning == [Problem("Which?", ["a", "b"], "b", "Because.", "So.")]
    assert (row.key, row.edited_from, row.group, row.source, row.extension) == ("k1", "k1", "g", "folder", "png")


def test_columns_are_mapped_and_defaults_fill_gaps(tmp_path: Path) -> None:
    collection(tmp_path, [{"file": "images/a.png", "title": "[sic] a cat", "rights": ""}])
    config = FolderConfig(columns={"image": "file", "captions": "title"}, license="CC0-1.0", attribution="them", source="mine")
    row = next(rows(config, tmp_path))
    assert (row.captions, row.licence, row.attribution, row.source) == (["[sic] a cat"], "CC0-1.0", "them", "mine")
    assert row.origin == "manifest.csv line 2"


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        ("../outside.png", "path_outside_root"),
        ("images/../../outside.png", "path_outside_root"),
        ("{root}/../outside.png", "path_outside_root"),
        ("images/link.png", "path_outside_root"),
        ("images/gone.png", "missing"),
        ("images", "missing"),
        ("", "missing"),
        ("images/a.png/b.png", "missing"),
        ("images/../images/a.png", None),
    ],
)
def test_only_files_under_the_root_are_read(tmp_path: Path, image: str, problem: str | None) -> None:
    (tmp_path / "outside.png").write_bytes(b"secret")
    root = tmp_path / "root"
    collection(root, [])
    (root / "images" / "link.png").symlink_to(tmp_path / "outside.png")
    row = one(root, image=image.format(root=root))
    assert row.problem == problem
    assert row.image == (None if problem else b"picture")


@pytest.mark.parametrize(
    "cells",
    [
        {"objects": "[{"},
        {"objects": '[{"label": "x"}]'},
        {"objects": '[{"label": "x", "box": [1, 2, 3]}]'},
        {"questions": '{"question": "?"}'},
        {"reasoning": '[{"question": "Which?", "options": ["a", "b"], "answer": "c", "explanation": "x"}]'},
        {"reasoning": '[{"question": "Which?", "options": ["a", "b"], "answer": "a"}]'},
        {"reasoning": '[{"question": "Which?", "options": ["a"], "answer": "a", "explanation": "x"}]'},
        {"reasoning": '[{"question": "Which?", "options": ["a", ""], "answer": "a", "explanation": "x"}]'},
        {"objects": '[{"label": " ", "box": [0, 0, 1, 1]}]'},
        {"objects": '[{"label": null, "box": [0, 0, 1, 1]}]'},
        {"reasoning": '["Which?"]'},
        {"questions": '[{"question": "What?", "answers": []}]'},
        {"questions": '[{"question": "What?", "answers": ["a", " "]}]'},
        {"questions": '[{"question": "What?", "answers": [null]}]'},
        {"questions": '[{"question": " ", "answers": ["a"]}]'},
        {"conditions": "[1]"},
        {"caption": '["a", '},
        {"caption": "[1, 2]"},
        {"caption": '["\\ud800"]'},
    ],
)
def test_a_broken_cell_is_a_problem_of_its_row(tmp_path: Path, cells: dict[str, str]) -> None:
    row = one(tmp_path, **cells)
    assert row.problem == "malformed_row"
    assert next(iter(cells))[:5] in (row.detail or "")
    assert row.image == b"picture"


def test_a_row_has_all_its_problems(tmp_path: Path) -> None:
    row = one(tmp_path, image="gone.png", objects="[{", conditions='{"edges": "../e.png"}')
    assert row.problem == "missing,malformed_row,path_outside_root"


def test_a_row_of_the_wrong_length_is_malformed_and_the_line_numbers_stay_right(tmp_path: Path) -> None:
    collection(tmp_path, [])
    (tmp_path / "manifest.csv").write_text('image,caption,licence\nimages/a.png,"two\nlines",MIT\n\nimages/a.png,x\nimages/a.png,y,MIT,z\n')
    found = list(rows(FolderConfig(), tmp_path))
    assert [row.problem for row in found] == [None, "malformed_row", "malformed_row"]
    assert [row.origin for row in found] == ["manifest.csv line 2", "manifest.csv line 5", "manifest.csv line 6"]
    assert found[1].detail == "2 cells where the header names 3"


def test_errors_of_the_configuration_and_the_file_are_named(tmp_path: Path) -> None:
    collection(tmp_path, [{"image": "images/a.png", "title": "x"}])
    cases: list[tuple[FolderConfig, str]] = [
        (FolderConfig(), r"no column 'captions'; its columns are: image, title.*ingest.folder.columns: \{captions:"),
        (FolderConfig(columns={"captions": "title"}), "no column 'licence'.*ingest.folder.license"),
        (FolderConfig(columns={"captions": "titel"}), "no column 'titel'; its columns are: image, title"),
        (FolderConfig(columns={"caption": "title"}), "there is no manifest column 'caption'"),
        (FolderConfig(manifest="other.csv"), "other.csv does not exist"),
        (FolderConfig(manifest="images/a.png"), "the format of a manifest is one of"),
    ]
    for config, message in cases:
        with pytest.raises(SourceError, match=message):
            list(rows(config, tmp_path))
    for content, message in [
        (b"image,caption,licence\n", "no rows"),
        (b"", "is empty"),
        (b"image,caption,caption\n", "names a column twice: caption"),
        (b"image,caption,licence\na,\xff,MIT\n", "not UTF-8"),
        (b'image,caption,licence\na,"open,MIT\n', "begins on line 2"),
    ]:
        (tmp_path / "manifest.csv").write_bytes(content)
        with pytest.raises(SourceError, match=message):
            list(rows(FolderConfig(), tmp_path))
