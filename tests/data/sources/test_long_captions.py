"""Sources of long captions: Localized Narratives and Stanford Image Paragraphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cm3leon.config.ingest_schema import ImageParagraphsConfig, LocalizedNarrativesConfig
from cm3leon.data.sources import SourceError, image_paragraphs, localized_narratives
from cm3leon.data.sources.image_paths import image_path


def narrative(image: str | int, caption: Any, annotator: int = 1) -> dict[str, Any]:
    words = [{"utterance": "In", "start_time": 0.0, "end_time": 0.5}]
    trace = [[{"x": 0.1, "y": 0.2, "t": 0.0}]]
    return {
        "dataset_id": "mscoco_train2017", "image_id": image, "annotator_id": annotator, "caption": caption, "timed_caption": words,
        "traces": trace, "voice_recording": "a.ogg",
    }  # fmt: skip


def write_lines(path: Path, *records: Any) -> None:
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))


def test_an_image_has_all_its_narratives_as_captions_and_the_first_as_long_caption(tmp_path: Path) -> None:
    for number in (9, 139):
        (tmp_path / f"{number:012d}.jpg").write_bytes(f"{number}".encode())
    write_lines(tmp_path / "a.jsonl", narrative("9", "In this image there is food."), narrative("139", "A room."), narrative("9", "Food."))
    write_lines(tmp_path / "b.jsonl", narrative(139, "A room with chairs.", 2))
    config = LocalizedNarrativesConfig(annotations=["a.jsonl", "b.jsonl"], images="{image_id:012d}.jpg", license="CC-BY-4.0")
    first, second = localized_narratives.rows(config, tmp_path)
    assert (first.image, first.captions, first.long_caption) == (
        b"9", ["In this image there is food.", "Food."], "In this image there is food.",
    )  # fmt: skip
    assert (second.image, second.captions, second.long_caption) == (b"139", ["A room.", "A room with chairs."], "A room.")
    assert [(row.problem, row.licence, row.source, row.origin) for row in (first, second)] == [
        (None, "CC-BY-4.0", "localized_narratives", "a.jsonl line 1"),
        (None, "CC-BY-4.0", "localized_narratives", "a.jsonl line 2"),
    ]


def test_a_line_that_is_at_fault_is_a_row_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(b"a")
    lines = (narrative("a", "x"), "{", narrative("a", ["y"]), {"image_id": None, "caption": "z"})
    write_lines(tmp_path / "localized_narratives.jsonl", *lines)
    found = {row.origin: row for row in localized_narratives.rows(LocalizedNarrativesConfig(), tmp_path)}
    assert found["localized_narratives.jsonl line 1"].captions == ["x"]
    assert all("malformed_row" in (found[f"localized_narratives.jsonl line {line}"].problem or "") for line in (2, 3, 4))
    assert "found 'a' and ['y']" in (found["localized_narratives.jsonl line 3"].detail or "")


def test_wrong_files_of_narratives_are_told_by_the_missing_field(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"does not exist; ingest\.localized_narratives\.annotations names it"):
        list(localized_narratives.rows(LocalizedNarrativesConfig(), tmp_path))
    write_lines(tmp_path / "localized_narratives.jsonl", {"image_id": "a", "text": "x"})
    with pytest.raises(SourceError, match="has no field 'caption'; its fields are: image_id, text"):
        list(localized_narratives.rows(LocalizedNarrativesConfig(), tmp_path))
    write_lines(tmp_path / "localized_narratives.jsonl", narrative("a01", "x"))
    with pytest.raises(SourceError, match=r"image_id 'a01' is no number, which \{image_id:012d\}\.jpg takes it for"):
        list(localized_narratives.rows(LocalizedNarrativesConfig(images="{image_id:012d}.jpg"), tmp_path))


def test_templates_of_image_paths_are_checked_when_parameters_are_read() -> None:
    assert image_path("a/{image_id:012d}.jpg", "42") == image_path("a/{image_id:012d}.jpg", 42) == "a/000000000042.jpg"
    assert image_path("{image_id}.jpg", "0042") == "0042.jpg"
    wrong_ones = "images {id}.jpg {image_id.real} {image_id:x_y} {image_id {image_id}{other} {} {image_id:{image_id}} {image_id!r:5}"
    for wrong in wrong_ones.split():
        with pytest.raises(ValidationError, match="names no image: write"):
            LocalizedNarrativesConfig(images=wrong)


def test_a_paragraph_is_the_long_caption_and_its_first_sentence_the_caption(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in (1, 2):
        (tmp_path / f"images/{number}.jpg").write_bytes(f"{number}".encode())
    entries = [
        {"url": "https://example.org/1.jpg", "image_id": 1, "paragraph": " A clock of 3.5 feet is on the wall. It is red.  "},
        {"url": "https://example.org/2.jpg", "image_id": 2, "paragraph": "no full stop"},
        {"url": "https://example.org/1.jpg", "image_id": 1, "paragraph": "Is this a clock? Yes."},
        {"url": "https://example.org/3.jpg", "image_id": 3, "paragraph": ["a list"]},
    ]
    (tmp_path / "paragraphs_v1.json").write_text(json.dumps(entries))
    one, two, three = image_paragraphs.rows(ImageParagraphsConfig(license="CC-BY-4.0"), tmp_path)
    assert (one.image, one.long_caption) == (b"1", "A clock of 3.5 feet is on the wall. It is red.")
    assert one.captions == ["A clock of 3.5 feet is on the wall.", "Is this a clock?"]
    assert (two.image, two.long_caption, two.captions, two.problem) == (b"2", "no full stop", ["no full stop"], None)
    assert three.problem == "missing,malformed_row"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"image_id": 1}], "paragraphs_v1.json: entry 0 has no 'paragraph'"),
        ([{"image_id": 1, "paragraph": "x"}, 3], "entry 1 has no 'image_id' and no 'paragraph'"),
        ([{"image_id": {}, "paragraph": "x"}], "entry 0 has a 'image_id' that is no number or text, but {}"),
        ({"1": "x"}, "is no list of objects with image_id, paragraph, but {'1': 'x'}"),
    ],
)
def test_a_wrong_file_of_paragraphs_is_told_by_the_missing_field(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "paragraphs_v1.json").write_text(json.dumps(content))
    with pytest.raises(SourceError, match=message):
        list(image_paragraphs.rows(ImageParagraphsConfig(), tmp_path))
    (tmp_path / "paragraphs_v1.json").write_text("[")
    with pytest.raises(SourceError, match="is not JSON"):
        list(image_paragraphs.rows(ImageParagraphsConfig(), tmp_path))
