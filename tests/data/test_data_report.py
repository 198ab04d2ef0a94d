"""The data report: what a person must find on it, also when the stage fails, and what it must not do."""

import json
import re
from contextlib import suppress
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cm3leon.config import paths
from cm3leon.config.ingest_schema import FolderConfig, IngestConfig, ShapesConfig
from cm3leon.config.schema import Config, ValidateConfig
from cm3leon.data import data_report, last_accepted
from cm3leon.data.manifest import read_manifest
from cm3leon.data.packing import pack
from cm3leon.data.sources import folder
from cm3leon.stages import ingest
from cm3leon.stages import validate as validate_stage
from cm3leon.stages.validate import ValidationError, validate
from cm3leon.utils.svg import BINS, histogram

HOSTILE = '<script>alert(1)</script>"><img src=http://example.org/x onerror=alert(2)> \u202e&amp; reversed'
LOADING = {"script", "link", "iframe", "object", "embed", "base", "form", "audio", "video", "source", "use", "image", "foreignobject"}


class Inspector(HTMLParser):
    """Checks that a page loads and runs nothing."""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in LOADING, tag
        for name, value in attributes:
            assert not name.startswith("on") and name not in ("href", "http-equiv"), (tag, name)
            assert name != "src" or str(value).startswith("data:image/"), value

    def handle_data(self, data: str) -> None:
        if self.lasttag == "style":
            assert "url(" not in data and "@import" not in data


def inspect(text: str) -> None:
    inspector = Inspector()
    inspector.feed(text)
    inspector.close()


def collection(root: Path, count: int = 30) -> list[dict[str, str]]:
    """Pictures that differ, and their rows."""
    (root / "images").mkdir(parents=True)
    rows = []
    for number in range(count):
        coarse = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        side = 40 + number
        Image.fromarray(coarse).resize((side, side), Image.Resampling.NEAREST).save(root / f"images/{number}.png")
        rows.append({"image": f"images/{number}.png", "caption": f"picture {number}", "licence": "MIT", "source": "mine"})
    return rows


def report_of(root: Path, rows: list[dict[str, str]], last: Path | None = None, rate: float = 0.9) -> str:
    """The page of a collection, whether it passes or not."""
    pd.DataFrame(rows).to_csv(root / "manifest.csv", index=False)
    pack(folder.rows(FolderConfig(), root), root / "raw", 32)
    config = ValidateConfig(max_rejected_rate=rate, near_duplicate_distance=0.02)
    with suppress(ValidationError):
        validate(root / "raw", root / "out", root / "docs", config, 0, None, last)
    return (root / "docs" / data_report.FILE).read_text(encoding="utf-8")


def damaged(root: Path) -> list[dict[str, str]]:
    """A collection with rows of many reasons."""
    rows = collection(root)
    for number in range(5):
        file = root / rows[number]["image"]
        file.write_bytes(file.read_bytes()[: 40 + number])
    (root / rows[5]["image"]).unlink()
    rows[6]["licence"] = "all rights reserved"
    rows[7]["licence"], rows[8]["caption"] = "CC-BY-4.0", "  "
    (root / rows[10]["image"]).write_bytes((root / rows[9]["image"]).read_bytes())
    Image.new("RGB", (20, 20)).save(root / rows[11]["image"])
    rows[12]["image"] = "../outside.png"
    near = Image.open(root / rows[13]["image"])
    near.resize((near.width * 2, near.height * 2), Image.Resampling.NEAREST).save(root / rows[14]["image"])
    return rows


@pytest.mark.parametrize("rate", [0.9, 0.1])
def test_every_reason_has_its_count_examples_and_what_to_do_whether_the_stage_passes_or_not(tmp_path: Path, rate: float) -> None:
    text = report_of(tmp_path, damaged(tmp_path), rate=rate)
    rejected = read_manifest(tmp_path / "out" / "rejected.parquet")
    counts = pd.Series([reason for reasons in rejected["reasons"] for reason in reasons]).value_counts()
    assert len(counts) >= 8
    for reason, count in counts.items():
        section = re.search(rf"<h3><code>{reason}</code>: {count} records?</h3>(.*?)(?=<h[23]>)", text, re.DOTALL)
        assert section is not None, reason
        assert "What to do" in section[1]
        assert section[1].count('class="card"') == min(count, data_report.EXAMPLES)
        first = next(row for row in rejected.to_dict("records") if reason in row["reasons"])
        assert first["origin"] in section[1]
        assert f'<td><bdi>rejected as {reason}</bdi></td><td class="number">{count}</td>' in text
        shown = 'src="data:image/jpeg' in section[1]
        assert shown == (reason not in ("unreadable", "missing", "path_outside_root")), reason
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for name in ("read", "accepted", "rejected"):
        assert f'<bdi>{name}</bdi></td><td class="number">{report[name]}</td>' in text
    assert ("Passed:" in text, "Stopped:" in text) == ((True, False) if rate == 0.9 else (False, True))
    inspect(text)


def test_condition_images_that_no_task_uses_allow_none_and_are_told(tmp_path: Path) -> None:
    rows = collection(tmp_path)
    for number, kind in enumerate(["canny edge", "<b>edges", "<b>edges"]):
        rows[number]["conditions"] = json.dumps({kind: rows[number]["image"]})
    text = report_of(tmp_path, rows)
    assert '<bdi>condition_to_image</bdi></td><td class="number">1</td>' in text
    assert "no task uses: &lt;b&gt;edges (2). Kinds that are used: canny edge, segmentation map" in text


def test_duplicates_are_shown_in_pairs(tmp_path: Path) -> None:
    text = report_of(tmp_path, damaged(tmp_path))
    pairs = re.findall(r'class="card pair">(.*?)</div></div>', text)
    origins = [re.findall(r"manifest\.csv line \d+", pair) for pair in pairs]
    assert origins == [["manifest.csv line 11", "manifest.csv line 12"], ["manifest.csv line 15", "manifest.csv line 16"]]
    assert all(pair.count("data:image/jpeg") == 2 for pair in pairs)


def test_the_same_data_gives_the_same_page_but_for_the_time(tmp_path: Path) -> None:
    rows = damaged(tmp_path)
    pages = [re.sub(r"<p>of \d{4}-\d\d-\d\d \d\d:\d\d UTC</p>", "", report_of(tmp_path, rows)) for _ in range(2)]
    assert pages[0] == pages[1]
    assert str(datetime.now(UTC).year) not in pages[0]
    assert str(tmp_path) not in pages[0]


def test_texts_of_the_collection_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    rows = collection(tmp_path)
    for name in ("caption", "source", "licence"):
        for number in range(3):
            rows[number][name] = HOSTILE
    rows[4]["caption"] = HOSTILE * 20
    (tmp_path / rows[5]["image"]).rename(tmp_path / "images/<b onclick=alert(3)>.png")
    rows[5] |= {"image": "images/<b onclick=alert(3)>.png", "caption": ""}
    text = report_of(tmp_path, rows)
    inspect(text)
    assert "&lt;script&gt;alert(1)" in text
    assert "<script" not in text and "<img src=http" not in text and "<b onclick" not in text
    assert text.count("<bdi>") == text.count("</bdi>")


def test_a_page_comes_also_where_nothing_is_accepted_or_splits_cannot_be_formed(tmp_path: Path) -> None:
    rows = collection(tmp_path / "none", 4)
    text = report_of(tmp_path / "none", [{**row, "licence": "no"} for row in rows])
    assert "Stopped: No record is accepted" in text and "licence_not_allowed" in text
    rows = collection(tmp_path / "few", 4)
    text = report_of(tmp_path / "few", [{**row, "group": "one"} for row in rows])
    assert "Stopped: 4 accepted records form 1 unrelated component" in text
    assert 'accepted</bdi></td><td class="number">4<' in text


def test_what_has_changed_since_the_last_accepted_manifest(tmp_path: Path) -> None:
    root, last = tmp_path / "collection", tmp_path / "last.parquet"
    rows = collection(root)
    assert "None was accepted in this directory before" in report_of(root, rows[:20], last)
    rows[0]["caption"], rows[1]["caption"], rows[1]["licence"] = "another text", "one more", "CC0-1.0"
    rows[2]["caption"] = ""  # rejected, and so gone
    text = report_of(root, rows, last, rate=0.01)
    assert "Of 20 records then and 29 now: <b>10 added, 1 removed, 2 changed</b> (captions 2, licence 1)" in text
    assert "MIT 100%" in text and "CC0-1.0 3%, MIT" not in text and "MIT 97%, CC0-1.0 3%" in text
    assert "Stopped" in text
    assert "Of 20 records then" in report_of(root, rows, last), "a manifest that was not accepted replaces none"
    assert "Of 29 records then and 29 now: <b>0 added, 0 removed, 0 changed</b>." in report_of(root, rows, last)
    last.write_bytes(last.read_bytes()[:-30])
    assert "None was accepted" in report_of(root, rows, last), "a damaged summary stops nothing"


def records(**columns: Any) -> pd.DataFrame:
    """Two accepted records."""
    plain = {name: [None, None] for name in last_accepted.CONTENT} | {"captions": [["four"], ["y"]], "conditions": [[], []]}
    return pd.DataFrame({"id": ["a", "b"], "width": 1, "height": 2, **plain, **columns})


def test_where_images_lie_is_no_change() -> None:
    lying = [[[{"kind": "depth", "image": f"images-00000.tar/{number}.png"}], []] for number in (1, 7)]
    old, new = (last_accepted.summary_of(records(conditions=conditions)) for conditions in lying)
    assert last_accepted.changes_between(old, new.iloc[::-1]) == last_accepted.Changes(0, 0, 0, {})
    other = last_accepted.summary_of(records(captions=[["four", "z"], ["y"]]))
    assert last_accepted.changes_between(old, other) == last_accepted.Changes(0, 0, 1, {"captions": 1, "conditions": 1})


def test_a_summary_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert last_accepted.read(tmp_path / "none.parquet") is None
    summary = last_accepted.summary_of(records())
    last_accepted.write(tmp_path / "new" / "last.parquet", summary)
    found = last_accepted.read(tmp_path / "new" / "last.parquet")
    assert found is not None
    pd.testing.assert_frame_equal(found[summary.columns.tolist()], summary, check_dtype=False)
    assert found["caption_length"].tolist() == [4, 1]
    summary.drop(columns="width").to_parquet(tmp_path / "old.parquet")
    assert last_accepted.read(tmp_path / "old.parquet") is None, "of another version of the program"


def test_the_stage_on_shapes_keeps_the_page_and_the_summary_where_they_belong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    config = Config(ingest=IngestConfig(shapes=ShapesConfig(count=60)))
    ingest.run(config)
    validate_stage.run(config)
    text = paths.DATA_REPORT.read_text()
    assert "Passed" in text
    inspect(text)
    assert f'href="{data_report.FILE}"' in (paths.DATA_DOCS / "index.html").read_text()
    assert len(pd.read_parquet(paths.LAST_ACCEPTED)) == len(read_manifest(paths.VALIDATED))
    strict = config.model_copy(update={"validate_": ValidateConfig(min_side=1000)})
    with pytest.raises(ValidationError, match=str(paths.DATA_REPORT)):
        validate_stage.run(strict)
    from mlflow import MlflowClient

    client = MlflowClient()
    found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()], "tags.stage = 'validate'")
    kept = {run.info.status: [file.path for file in client.list_artifacts(run.info.run_id)] for run in found}
    assert kept.keys() == {"FINISHED", "FAILED"}
    assert all(data_report.FILE in files for files in kept.values())


@pytest.mark.parametrize("values", [[5.0], [1.0, 1.0], list(range(100)), [0.0, 1e9]])
def test_a_histogram_accounts_for_every_value(values: list[float]) -> None:
    drawn = histogram(np.array(values), 'a "title" <b>', np.array(values[:1]))
    counts = [int(count.replace(",", "")) for count in re.findall(r": ([\d,]+)</title>", drawn)]
    assert sum(counts) == len(values)
    assert 1 <= len(counts) <= BINS
    assert drawn.startswith("<svg") and "<b>" not in drawn and drawn.count("<polyline") == 1
