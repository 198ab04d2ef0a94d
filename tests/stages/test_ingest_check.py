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
        {
            "file": "a.png",
            "title": "a red circle",
            "conditions": {"edges": "a.png"},
            "questions": [{"question": "What?", "answers": ["a circle"]}],
        },
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
    assert "Condition images that no task uses: edges (1)." in shown and "condition_to_image" not in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_of_a_mixture_the_first_records_of_each_part_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for part, color in (("one", "red"), ("two", "blue")):
        (tmp_path / "data/mine" / part).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (40, 30 + number), color).save(f"data/mine/{part}/{number}.png")
            (tmp_path / f"data/mine/{part}/{number}.txt").write_text(f"{color} {number}")
    (tmp_path / "data/mine/two/m.csv").write_text("image,title,licence\n0.png,a blue circle,MIT\n")
    options = "{manifest: m.csv, columns: {captions: title}}"
    mixture = f"[{{source: sidecar, path: one}}, {{source: folder, path: two, weight: 2, options: {options}}}]"
    configure("tiny", ["ingest.source=mixture", "ingest.path=data/mine", f"ingest.mixture={mixture}"], configs=CONFIGS)
    shown = CliRunner().invoke(app, ["ingest", "--check", "3"]).output
    first, second = shown.split("mixture.1: folder in data/mine/two, weight 2")
    assert "mixture.0: sidecar in data/mine/one, weight 1\n3 records read, nothing written" in first
    assert "captions: ['red 0']" in first and "blue" not in first
    assert "1 records read, nothing written" in second and "captions: ['a blue circle']" in second and "title" in second


def test_the_help_lists_all_formats() -> None:
    shown = CliRunner().invoke(app, ["ingest", "--help"]).output
    assert all(source in shown for source in (*SOURCES, "mixture"))
