"""The folder source reads what is right, and says what is wrong with each row."""

import csv
import json
import os
import time
import unicodedata
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cm3leon.config.ingest_schema import FolderConfig
from cm3leon.data.cells import text_of
from cm3leon.data.manifest import Problem, SourceRow
from cm3leon.data.packing import pack
from cm3leon.data.sources import SourceError
from cm3leon.data.sources.folder import rows
from cm3leon.data.sources.records import known_columns


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
        {"caption": "['a cat' 5]"},
        {"caption": "[['a cat', 'the cat'], ['a dog']]"},
        {"caption": "array(['a cat', 'the cat'], dtype=object)"},
        {"caption": "['a cat' ... 'the cat']"},
        {"caption": "['a cat"},
        {"caption": '{"text": "a cat"}'},
        {"caption": "[" * 100_000},
        {"objects": '[{"label": ["cat", "dog"], "box": [0, 0, 1, 1]}]'},
        {"objects": '[{"label": {"id": 3}, "box": [0, 0, 1, 1]}]'},
        {"objects": '[{"label": "x", "box": [0, 0, 1, 1' + "0" * 400 + "]}]"},
        {"questions": '[{"question": "What?", "answers": [{"text": "net"}]}]'},
        {"questions": '[{"question": ["What?"], "answers": ["net"]}]'},
        {"questions": "[" * 100_000},
        {"reasoning": '[{"question": "Which?", "options": [["a"], "b"], "answer": "b", "explanation": "x"}]'},
        {"conditions": '{"edges": ["images/a.png"]}'},
    ],
)
def test_a_broken_cell_is_a_problem_of_its_row(tmp_path: Path, cells: dict[str, str]) -> None:
    row = one(tmp_path, **cells)
    assert row.problem == "malformed_row"
    assert next(iter(cells))[:5] in (row.detail or "")
    assert row.image == b"picture"


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("['a cat', 'the cat']", ["a cat", "the cat"]),
        ('["a cat", "the cat"]', ["a cat", "the cat"]),
        ("['a cat' \"the cat's\"\n 'a dog']", ["a cat", "the cat's", "a dog"]),
        ("('a cat', 'the cat')", ["a cat", "the cat"]),
        ("('a cat',)", ["a cat"]),
        (" [ 'a \\'fat\\' cat' ] ", ["a 'fat' cat"]),
        ("[]", []),
        ("\u200b\ufeff", []),
        ("\ufeffa cat", ["a cat"]),
        ("[Photo] a cat", ["[Photo] a cat"]),
        ("(a cat)", ["(a cat)"]),
        ('("a cat")', ['("a cat")']),
        ("{a cat}", ["{a cat}"]),
        ("'a cat' and 'a dog'", ["'a cat' and 'a dog'"]),
    ],
)
def test_captions_are_read_as_programs_write_lists(tmp_path: Path, cell: str, expected: list[str]) -> None:
    row = one(tmp_path, caption=cell)
    assert (row.problem, row.captions) == (None, expected)


def test_structures_are_never_turned_into_text(tmp_path: Path) -> None:
    answers = [{"answer": "net", "answer_id": 1}, {"answer": 3, "answer_id": 2}]
    objects = [{"label": {"id": 17, "name": "cat"}, "box": [0, 0, 1, 1]}]
    record = {"image": "images/a.png", "caption": "a cat", "licence": "MIT", "objects": objects}
    record["questions"] = [{"question": "What?", "answers": answers}, {"question": "Who?", "answers": answers[0]}]
    row = next(rows(FolderConfig(manifest="manifest.jsonl"), collection(tmp_path, [record], "manifest.jsonl")))
    assert row.problem is None, row.detail
    assert row.questions == [("What?", ["net", "3"]), ("Who?", ["net"])] and row.objects == [("cat", (0, 0, 1, 1))]
    for column in ("licence", "attribution", "source", "id", "group", "long_caption", "instruction", "edited_from", "text_in_image"):
        for wrong in ({"a": 1}, ["a"]):
            bad = {**record, column: wrong}
            row = next(rows(FolderConfig(manifest="manifest.jsonl"), collection(tmp_path, [bad], "manifest.jsonl")))
            assert row.problem == "malformed_row" and f"{column.replace('id', 'key')}: expected text" in (row.detail or "")


def test_keys_that_pandas_wrote_as_floats_are_those_that_it_wrote_as_integers(tmp_path: Path) -> None:
    collection(tmp_path, [])
    (tmp_path / "images" / "b.png").write_bytes(b"b")
    table = {"image": ["images/a.png", "images/b.png"], "caption": "x", "licence": "MIT", "instruction": "more", "key": [7, 8]}
    pd.DataFrame({**table, "edited_from": [float("nan"), 7.0]}).to_parquet(tmp_path / "manifest.parquet")
    original, edit = rows(FolderConfig(manifest="manifest.parquet"), tmp_path)
    assert (original.key, edit.key, edit.edited_from) == ("7", "8", "7")
    pd.read_parquet(tmp_path / "manifest.parquet").assign(caption="x").to_csv(tmp_path / "manifest.csv", index=False)
    assert [row.edited_from for row in rows(FolderConfig(), tmp_path)] == [None, "7.0"]
    assert pack(rows(FolderConfig(), tmp_path), tmp_path / "raw", 32)["problems"] == 0
    by_path = pd.DataFrame({"image": ["./images/a.png", "./images/b.png"], "caption": "x", "licence": "MIT", "instruction": "more"})
    by_path.assign(edited_from=["", "./images/a.png"]).to_csv(tmp_path / "manifest.csv", index=False)
    assert pack(rows(FolderConfig(), tmp_path), tmp_path / "raw", 32)["problems"] == 0
    assert [text_of(cell) for cell in (7.5, 1e20, -3.0)] == ["7.5", "100000000000000000000", "-3"]


def test_a_name_is_found_however_its_accents_are_encoded(tmp_path: Path) -> None:
    collection(tmp_path, [])
    composed, decomposed = (unicodedata.normalize(form, "images/caf\u00e9.png") for form in ("NFC", "NFD"))
    assert composed != decomposed
    (tmp_path / decomposed).write_bytes(b"one")
    assert one(tmp_path, image=composed).image == b"one"
    (tmp_path / composed).write_bytes(b"two")
    assert [one(tmp_path, image=name).image for name in (composed, decomposed)] == [b"two", b"one"]


@pytest.mark.parametrize("null", ["NaN", "nan", "None", "null", "NULL", "<NA>"])
def test_what_programs_write_for_nothing_is_nothing(tmp_path: Path, null: str) -> None:
    row = one(tmp_path, caption=null, group=null, attribution=null, split=null)
    assert (row.captions, row.group, row.attribution, row.split, row.problem) == ([], None, None, None, None)
    row = one(tmp_path, caption=f"{null} of the cats", questions=json.dumps([{"question": "How many?", "answers": [null]}]))
    assert (row.captions, row.questions) == ([f"{null} of the cats"], [("How many?", [null])])


def test_paths_may_be_written_as_windows_does(tmp_path: Path) -> None:
    assert one(tmp_path, image="images\\a.png").image == b"picture"
    assert one(tmp_path, image="..\\a.png").problem == "path_outside_root"
    (tmp_path / "images\\a.png").write_bytes(b"a name with a backslash")
    assert one(tmp_path, image="images\\a.png").image == b"a name with a backslash"


def pictures(root: Path, records: list[dict[str, Any]]) -> list[SourceRow]:
    """The rows of a manifest of images ``a``, ``b`` ..., each of which holds its name."""
    collection(root, [])
    for record in records:
        (root / "images" / f"{record['image']}.png").write_bytes(record["image"].encode())
    named = [{"licence": "MIT", **record, "image": f"images/{record['image']}.png"} for record in records]
    with (root / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(named[0]))
        writer.writeheader()
        writer.writerows(named)
    return list(rows(FolderConfig(), root))


def test_rows_of_one_image_become_one_record(tmp_path: Path) -> None:
    """As in Flickr8k and exports of COCO: a row for each caption."""
    records = [{"image": name, "caption": f"{name} {number}", "id": f"{name}#{number}"} for number in range(5) for name in "abc"]
    records.append({"image": "d", "caption": "d", "id": "d"})
    found = pictures(tmp_path, records)
    assert {row.image: row.captions for row in found} == {
        b"d": ["d"],
        **{name.encode(): [f"{name} {number}" for number in range(5)] for name in "abc"},
    }
    assert all(row.problem is None for row in found)
    first = next(row for row in found if row.image == b"a")
    assert (first.key, first.other_keys) == ("a#0", ["a#1", "a#2", "a#3", "a#4"])
    assert first.origin == "manifest.csv line 2, 5, 8, 11, 14"
    assert len(found) + sum(len(row.other_keys) for row in found) == len(records)
    single = list(rows(FolderConfig(merge="none"), tmp_path))
    assert len(single) == len(records) and all(row.image for row in single)


def test_rows_that_contradict_each_other_stay_apart(tmp_path: Path) -> None:
    found = pictures(
        tmp_path,
        [
            {"image": "a", "caption": "one", "attribution": "me", "objects": ""},
            {"image": "a", "caption": "two", "attribution": "", "objects": '[{"label": "cat", "box": [0, 0, 1, 1]}]'},
            {"image": "a", "caption": "three", "attribution": "you", "objects": ""},
            {"image": "a", "caption": "four", "attribution": "me", "objects": "[{"},
            {"image": "a", "caption": "one", "attribution": "me", "objects": ""},
        ],
    )
    assert [(row.captions, row.attribution, row.problem) for row in found] == [
        (["one", "two"], "me", None),
        (["three"], "you", None),
        (["four"], "me", "malformed_row"),
    ]
    assert found[0].objects == [("cat", (0, 0, 1, 1))]
    assert all(row.image == b"a" for row in found)


def test_every_row_of_a_missing_image_is_told(tmp_path: Path) -> None:
    records = [{"image": "images/gone.png", "caption": f"caption {number}", "licence": "MIT"} for number in range(3)]
    found = list(rows(FolderConfig(), collection(tmp_path, records)))
    assert [row.problem for row in found] == ["missing"] * 3


@pytest.mark.parametrize("manifest", ["../labels.csv", "images/../../labels.csv", "{outside}/labels.csv"])
def test_a_manifest_outside_of_the_collection_is_refused(tmp_path: Path, manifest: str) -> None:
    """DVC tracks ingest.path alone, and would not notice that the manifest has changed."""
    root = collection(tmp_path / "root", [])
    (tmp_path / "labels.csv").write_text("image,caption,licence\nimages/a.png,x,MIT\n")
    with pytest.raises(SourceError, match=r"lies outside of ingest\.path .*, the only place in which ingest notices"):
        list(rows(FolderConfig(manifest=manifest.format(outside=tmp_path)), root))
    (root / "inside.csv").write_text("image,caption,licence\nimages/a.png,x,MIT\n")
    for inside in ("images/../inside.csv", str(root / "inside.csv")):
        assert [row.captions for row in rows(FolderConfig(manifest=inside), root)] == [["x"]]


def test_pipes_and_large_files_are_not_read(tmp_path: Path) -> None:
    collection(tmp_path, [])
    os.mkfifo(tmp_path / "images" / "pipe.png")
    assert one(tmp_path, image="images/pipe.png").problem == "missing"
    with (tmp_path / "images" / "large.png").open("wb") as file:
        file.truncate(3 << 30)  # takes no space
    row = one(tmp_path, image="images/large.png")
    assert (row.problem, row.image) == ("file_too_large", None)
    assert row.detail == "image: images/large.png has 3,221.2 MB, 200 allowed"


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
        (b"image,caption,licence\na,\xff,MIT\n", "line 2, is not UTF-8"),
        (b'image,caption,licence\na,"open,MIT\n', "begins on line 2"),
    ]:
        (tmp_path / "manifest.csv").write_bytes(content)
        with pytest.raises(SourceError, match=message):
            list(rows(FolderConfig(), tmp_path))


def test_a_parquet_file_may_hold_the_images(tmp_path: Path) -> None:
    """As Hugging Face's ``datasets`` writes them: bytes and path, of which either may be null; paths repeat in the parts of a data set."""
    collection(tmp_path, [])
    images = [
        {"bytes": b"one", "path": "0.png"},
        {"bytes": b"two", "path": "0.png"},
        {"bytes": None, "path": "images/a.png"},
        {"bytes": None, "path": None},
    ]
    pd.DataFrame({"image": images, "caption": ["a", "b", "c", "d"], "licence": "MIT"}).to_parquet(tmp_path / "m.parquet")
    found = list(rows(FolderConfig(manifest="m.parquet"), tmp_path))
    assert [(row.image, row.captions, row.problem) for row in found] == [
        (b"one", ["a"], None), (b"two", ["b"], None), (b"picture", ["c"], None), (None, ["d"], "missing"),
    ]  # fmt: skip
    pd.DataFrame({"image": [b"one"], "caption": [7], "licence": [b"MIT"]}).to_parquet(tmp_path / "m.parquet")
    [row] = rows(FolderConfig(manifest="m.parquet"), tmp_path)
    assert (row.image, row.captions, row.licence, row.problem) == (b"one", ["7"], "MIT", None)


def test_headers_are_found_in_any_case_and_a_url_is_told(tmp_path: Path) -> None:
    collection(tmp_path, [{"Image": "https://example.org/a.png", "Caption": "a cat", "License": "MIT"}])
    [row] = rows(FolderConfig(), tmp_path)
    assert (row.captions, row.licence, row.problem) == (["a cat"], "MIT", "missing")
    assert "is a URL: download the images" in (row.detail or "")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "file_name,text\na.png,a cat\na.png,the cat\n"),  # the layout imagefolder
        ("results.csv", "image_name| comment_number| comment\na.png| 0| a cat\na.png| 1| the cat\n"),  # Flickr30k
        ("captions.csv", "image,caption\na.png,a cat\na.png,the cat\n"),  # Flickr8k
    ],
)
def test_known_layouts_need_no_mapping(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "a.png").write_bytes(b"picture")
    (tmp_path / name).write_text(content)
    [row] = rows(FolderConfig(manifest=name, license="MIT"), tmp_path)
    assert (row.image, row.captions, row.problem) == (b"picture", ["a cat", "the cat"], None)


def test_of_columns_that_differ_in_case_the_one_in_lower_case_counts() -> None:
    assert known_columns(["image", "caption", "Caption", "CAPTION"])["captions"] == "caption"
    assert known_columns(["image", "Caption", "CAPTION"])["captions"] == "Caption"


def test_thousands_of_rows_may_name_one_placeholder(tmp_path: Path) -> None:
    records = [{"image": "images/a.png", "caption": f"caption {number}", "license": "MIT"} for number in range(20_000)]
    root = collection(tmp_path, records)
    started = time.process_time()
    [row] = rows(FolderConfig(), root)
    assert time.process_time() - started < 3
    assert row.captions == [f"caption {number}" for number in range(20_000)] and len(row.other_keys) == 19_999
    assert row.origin == f"manifest.csv line {', '.join(map(str, range(2, 18)))} and 19,984 more"
