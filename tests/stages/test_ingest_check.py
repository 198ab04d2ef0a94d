"""``cm3leon ingest --check N`` shows what is made of a collection, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from cm3leon.cli.app import app
from cm3leon.config.profiles import configure
from cm3leon.stages.ingest import SOURCES

CONFIGS = Path(__file__).parents[2] / "configs"


def test_columns_tasks_problems_and_examples_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 30), "red").save("photos/a.png")
    records: list[dict[str, object]] = [
        {"file": "a.png", "title": "a red circle", "questions": [{"question": "What?", "answers": ["a circle"]}]},
        {"file": "a.png", "title": "the red circle"},
        {"file": "[/gone].png", "title": "x"},
    ]
    (tmp_path / "photos/m.jsonl").write_text("".join(json.dumps({**record, "licence": "MIT"}) + "\n" for record in records))
    columns = "ingest.folder.columns={image: file, captions: title}"
    configure("tiny", ["ingest.source=folder", "ingest.path=photos", "ingest.folder.manifest=m.jsonl", columns], configs=CONFIGS)
    before = sorted(tmp_path.rglob("*"))
    shown = CliRunner().invoke(app, ["ingest", "--check", "10"]).output
    assert "2 records read, nothing written; 1 rows more were merged into them" in shown
    lines = [[cell.strip() for cell in line.strip("\u2502").split("\u2502")] for line in shown.splitlines() if line.startswith("\u2502")]
    assert ["captions", "title", "2"] in lines and ["image", "file", "1"] in lines and ["vqa", "1"] in lines
    assert any(line[:2] == ["missing", "1"] and line[3] == "m.jsonl line 3: image: [/gone].png is no file" for line in lines)
    assert "captions: ['a red circle', 'the red circle']" in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_the_help_lists_all_formats() -> None:
    shown = CliRunner().invoke(app, ["ingest", "--help"]).output
    assert all(source in shown for source in SOURCES)
