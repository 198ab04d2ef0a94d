"""Ingest and validate on a folder: damaged records are quarantined for the right reasons, and every record is accounted for."""

import csv
import io
import json
import os
import random
import re
import time
import warnings
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cm3leon.config import paths
from cm3leon.config.ingest_schema import FolderConfig, IngestConfig, ShapesConfig
from cm3leon.config.schema import Config, ValidateConfig
from cm3leon.data import images, manifest, validation
from cm3leon.data.expectations import check, flat_frame
from cm3leon.data.manifest import VALIDATED_SCHEMA, ImageStore, read_manifest
from cm3leon.data.packing import pack
from cm3leon.data.sources import folder
from cm3leon.data.thumbnails import read_thumbnails
from cm3leon.stages import ingest
from cm3leon.stages import validate as validate_stage
from cm3leon.stages.validate import ValidationError, validate
from cm3leon.tracking import runs

ROWS = 200
KINDS = {
    "truncated": ["unreadable"],
    "gone": ["missing"],
    "blank": ["empty_caption"],
    "licence": ["licence_not_allowed"],
    "outside": ["path_outside_root"],
    "copy": ["duplicate"],
}


def png(seed: int, size: int = 40) -> bytes:
    buffer = io.BytesIO()
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((size, size), Image.Resampling.NEAREST).save(buffer, format="PNG")
    return buffer.getvalue()


def write(root: Path, records: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(key for record in records for key in record))
    with (root / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(records)


def good_rows(root: Path, count: int = ROWS) -> list[dict[str, Any]]:
    (root / "images").mkdir(parents=True)
    records = []
    for number in range(count):
        (root / "images" / f"{number}.png").write_bytes(png(number))
        records.append({"image": f"images/{number}.png", "caption": f"picture {number}", "licence": "MIT", "attribution": "me"})
    return records


def damage(root: Path, records: list[dict[str, Any]], share: float, rng: random.Random) -> dict[int, list[str]]:
    """Damage ``share`` of the rows, each kind in turn; returns row -> the reasons it must be rejected for."""
    rows = rng.sample(range(1, len(records)), int(share * len(records)))
    untouched = [row for row in range(len(records)) if row not in rows]
    expected = {}
    for number, row in enumerate(rows):
        kind = list(KINDS)[number % len(KINDS)]
        file = root / "images" / f"{row}.png"
        if kind == "truncated":
            file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size - 1)])
        elif kind == "gone":
            file.unlink()
        elif kind == "blank":
            records[row]["caption"] = rng.choice(["", "   ", "[]", '["", " "]'])
        elif kind == "licence":
            records[row]["licence"] = rng.choice(["", "CC-BY-NC-4.0", "proprietary"])
        elif kind == "outside":
            (root.parent / "outside.png").write_bytes(png(10_000))
            records[row]["image"] = "../outside.png"
        elif kind == "copy":  # of the first row, which is good and comes before
            file.write_bytes(reencoded(root / "images" / f"{untouched[0]}.png"))
        expected[row] = KINDS[kind]
    assert untouched[0] == 0, "the original of the copies comes before them and is not damaged"
    return expected


def reencoded(path: Path) -> bytes:
    buffer = io.BytesIO()
    Image.open(path).save(buffer, format="BMP")
    return buffer.getvalue()


def ingest_folder(root: Path, raw: Path) -> None:
    pack(ingest.source_rows(IngestConfig(source="folder", path=str(root))), raw, 0.1)


@pytest.mark.parametrize("seed", [0, 1])
def test_exactly_the_damaged_records_are_quarantined_for_the_right_reasons(tmp_path: Path, seed: int) -> None:
    root = tmp_path / "collection"
    records = good_rows(root)
    expected = damage(root, records, 0.05, random.Random(seed))
    write(root, records)
    ingest_folder(root, tmp_path / "raw")
    report = validate(tmp_path / "raw", tmp_path / "out", tmp_path / "docs", ValidateConfig(), 0)
    rejected = read_manifest(tmp_path / "out" / "rejected.parquet")
    accepted = read_manifest(tmp_path / "out")
    assert dict(zip(rejected["row"], rejected["reasons"], strict=True)) == expected
    assert sorted([*accepted["row"], *rejected["row"]]) == list(range(ROWS))
    assert report["read"] == ROWS
    assert accepted["row"].is_monotonic_increasing
    assert all(rejected["detail"])
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert sum(report["reasons"].values()) == len(expected)


def test_too_many_rejected_records_are_an_error_that_names_rules_and_records(tmp_path: Path) -> None:
    root = tmp_path / "collection"
    records = good_rows(root)
    expected = damage(root, records, 0.5, random.Random(2))
    write(root, records)
    ingest_folder(root, tmp_path / "raw")
    with pytest.raises(ValidationError) as caught:
        validate(tmp_path / "raw", tmp_path / "out", tmp_path / "docs", ValidateConfig(), 0)
    message = str(caught.value)
    assert "100 of 200 records rejected (50.0%)" in message
    assert "20.0%" in message
    assert "validate.max_rejected_rate" in message
    for reasons in KINDS.values():
        count = sum(found == reasons for found in expected.values())
        assert f"{reasons[0]}: {count} records" in message
    first = min(expected)
    assert f"manifest.csv line {first + 2}" in message
    assert len(read_manifest(tmp_path / "out" / "rejected.parquet")) == 100
    index = (tmp_path / "docs" / "index.html").read_text()
    assert "<td>read</td><td>200</td>" in index
    assert "<td>rejected</td><td>100</td>" in index
    assert "<td>rejected: empty_caption</td>" in index
    assert not list((tmp_path / "out").glob("[mt]*.parquet")), "nothing is left to train on"


def test_a_record_has_all_its_reasons_and_the_copy_of_a_rejected_record_is_accepted(tmp_path: Path) -> None:
    root = tmp_path / "collection"
    records = good_rows(root, 40)
    image = png(0, 16)
    for number in (3, 4):
        (root / "images" / f"{number}.png").write_bytes(image)
    records[3] |= {"caption": "", "licence": "no"}
    records[5] |= {"objects": '[{"label": "x", "box": [0, 0, 41.5, 9]}]'}
    records[6] |= {"objects": '[{"label": "x", "box": [0, 0, 40.4, 9]}]'}  # rounding
    (root / "images" / "8.png").write_bytes(png(7))
    records[7] |= {"licence": "no"}
    records[9] |= {"caption": "x" * 1001}
    records[10] |= {"caption": '["", " kept "]'}
    records[11] |= {"image": "gone.png", "objects": "[{"}
    write(root, records)
    ingest_folder(root, tmp_path / "raw")
    report = validate(tmp_path / "raw", tmp_path / "out", tmp_path / "docs", ValidateConfig(), 0)
    rejected = read_manifest(tmp_path / "out" / "rejected.parquet")
    assert dict(zip(rejected["row"], rejected["reasons"], strict=True)) == {
        3: ["too_small", "empty_caption", "licence_not_allowed"],
        4: ["too_small"],
        5: ["box_outside_image"],
        7: ["licence_not_allowed"],  # so its copy, row 8, is accepted
        9: ["caption_too_long"],
        11: ["missing", "malformed_row"],
    }
    accepted = read_manifest(tmp_path / "out").set_index("row")
    assert accepted["captions"][10] == ["kept"]
    assert report["cleaned"]["blank_captions_removed"] == 1


def test_edits_of_a_rejected_record_are_kept_and_counted(tmp_path: Path) -> None:
    root = tmp_path / "collection"
    records = good_rows(root, 30)
    for number, record in enumerate(records):
        record |= {"id": f"k{number}", "edited_from": ""}
    (root / "images" / "1.png").write_bytes(reencoded(root / "images" / "0.png"))  # a duplicate of row 0
    records[2]["edited_from"], records[3]["edited_from"], records[5]["edited_from"] = "k0", "k1", "k4"
    records[4]["licence"] = "no"
    write(root, records)
    ingest_folder(root, tmp_path / "raw")
    report = validate(tmp_path / "raw", tmp_path / "out", tmp_path / "docs", ValidateConfig(), 0)
    accepted = read_manifest(tmp_path / "out").set_index("row")
    assert accepted["edited_from"][[2, 3, 5]].tolist() == [accepted["id"][0], accepted["id"][0], None]
    assert report["cleaned"]["edits_without_original"] == 1
    assert accepted["split"][[0, 2, 3]].nunique() == 1


def test_near_duplicates_share_a_split_and_the_outputs_are_deterministic(tmp_path: Path) -> None:
    root = tmp_path / "collection"
    records = good_rows(root, 120)
    rng = np.random.default_rng(0)
    for number in range(60, 120):  # each an earlier image with a little noise
        pixels = np.asarray(Image.open(root / "images" / f"{number - 60}.png")).astype(float) + rng.normal(0, 3, (40, 40, 3))
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(root / "images" / f"{number}.png")
    write(root, records)
    config = ValidateConfig(val_fraction=0.2, test_fraction=0.2, near_duplicate_distance=0.02)
    contents = []
    for name in ("one", "two"):
        ingest_folder(root, tmp_path / name / "raw")
        report = validate(tmp_path / name / "raw", tmp_path / name / "out", tmp_path / f"docs-{name}", config, 0)
        contents.append({file.relative_to(tmp_path / name): file.read_bytes() for file in (tmp_path / name).rglob("*") if file.is_file()})
    assert contents[0] == contents[1], "outputs depend on more than the data"
    assert not any(str(tmp_path).encode() in data for data in contents[0].values())
    accepted = read_manifest(tmp_path / "one" / "out")
    store = ImageStore(tmp_path / "one" / "raw")
    small = np.stack([np.asarray(store.open(ref).resize((8, 8), Image.Resampling.BOX), dtype=float) for ref in accepted["image"]]) / 255
    small = small.reshape(len(small), -1)
    near = np.sqrt(((small[:, None] - small[None]) ** 2).mean(axis=2)) < 0.02
    one, other = np.nonzero(near)
    split = accepted["split"].to_numpy()
    assert len(one) >= 240
    assert (split[one] == split[other]).all()
    np.testing.assert_array_equal(read_thumbnails(tmp_path / "one" / "out", accepted["id"].tolist()) / 255, small)
    assert report["parts"] == {"count": 60, "largest": 2, "rows_with_near_duplicates": 120, "moved_from_stated_split": 0}
    assert set(split) == {"train", "val", "test"}


def test_no_accepted_record_is_an_error_whatever_the_rate(tmp_path: Path) -> None:
    root = tmp_path / "collection"
    write(root, [row | {"licence": "no"} for row in good_rows(root, 5)])
    ingest_folder(root, tmp_path / "raw")
    with pytest.raises(ValidationError, match=r"No record is accepted.*\n.*licence_not_allowed: 5 records"):
        validate(tmp_path / "raw", tmp_path / "out", tmp_path / "docs", ValidateConfig(max_rejected_rate=1.0), 0)


def test_expectations_fail_on_what_the_rules_should_have_rejected(tmp_path: Path) -> None:
    accepted = pd.DataFrame(
        {
            "id": ["a", "a", "c"], "image": ["s/1", "s/2", None], "pixels": ["1", "2", "3"], "licence": ["MIT", "MIT", "GPL-3.0"],
            "source": "x", "problem": None,
            "split": ["train", "val", "train"], "width": 40, "height": [40, 40, 8], "captions": [["x"], ["x"], []],
        }
    )  # fmt: skip
    run = pd.DataFrame([{"read": 10, "accepted": 3, "rejected": 6, "rejected_rate": 0.6, "unaccounted": 1}])
    frames = {"accepted_rows": flat_frame(accepted, np.array([0, 0, 1])), "counts": run}
    before = datetime.now(UTC)
    failed = {line.split(":")[0] for line in check(frames, ValidateConfig(), tmp_path / "docs")}
    wrong = {"id", "image", "licence", "split", "shortest_side", "captions", "shortest_caption", "splits_of_its_part"}
    assert failed == {f"accepted_rows.{name}" for name in wrong} | {"counts.unaccounted", "counts.rejected_rate"}
    pages = list((tmp_path / "docs").rglob("*.html"))
    index = (tmp_path / "docs" / "index.html").read_text()
    assert len(pages) == 5
    for page in pages:
        html = page.read_text()
        assert not re.search(r"<script|<link|<img|url\(|@import", html), f"{page} loads a file"
        for link in re.findall(r'href="([^"#:]+)"', html):
            assert (page.parent / link).is_file(), f"{page} links to {link}, which does not exist"
        [title] = re.findall("<title>(.*)</title>", html)
        checked = datetime.strptime(title.partition(" · ")[2], "%Y-%m-%d %H:%M UTC").replace(tzinfo=UTC)
        assert before.replace(second=0, microsecond=0) <= checked <= datetime.now(UTC), title
        assert "None" not in html and "2000-01-01" not in html
    assert {re.findall("<title>(.*) · ", page.read_text())[0] for page in pages} == {
        "Data Docs", "accepted rows", "counts", "expectations of accepted rows", "expectations of counts",
    }  # fmt: skip
    assert "text-danger" in index
    assert index.count("validations/") == 2


@pytest.mark.parametrize("name", ["dollar$HOME", "p$undef", "${HOME}", "what?x", "per%20cent", "a b#'&"])
def test_data_docs_lie_in_the_project_whatever_its_path_is_called(tmp_path: Path, name: str) -> None:
    run = pd.DataFrame([{"read": 1, "accepted": 1, "rejected": 0, "rejected_rate": 0.0, "unaccounted": 0}])
    docs = tmp_path / name / "docs"
    assert check({"counts": run}, ValidateConfig(), docs) == []
    assert len(list(docs.rglob("*.html"))) == 3
    assert [*tmp_path.iterdir()] == [tmp_path / name]


def test_the_stages_run_on_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "stage_run", lambda stage, config: nullcontext(runs.Run()))
    config = Config(ingest=IngestConfig(shapes=ShapesConfig(count=60, edits=0.3, conditions=0.3)))
    ingested = ingest.run(config)
    assert ingested["problems"] == 0
    assert validate_stage.run(config) == {"read": ingested["rows"], "accepted": ingested["rows"], "rejected": 0}
    frame = read_manifest(paths.VALIDATED)
    assert frame.columns.tolist() == VALIDATED_SCHEMA.names
    assert set(frame["width"]) == {64}
    by_id = frame.set_index("id")["split"]
    edits = frame[frame["edited_from"].notna()]
    assert len(edits) > 5
    assert (by_id[edits["edited_from"]].to_numpy() == edits["split"].to_numpy()).all()
    assert sum(len(read_manifest(paths.VALIDATED, split)) for split in ("train", "val", "test")) == len(frame)


@pytest.mark.skipif("CM3LEON_REAL_DATA" not in os.environ, reason="CM3LEON_REAL_DATA does not point to the collections")
@pytest.mark.parametrize(("name", "accepted", "rejected"), [("emoji", 1608, 1), ("photos", 100, 0)])
def test_real_collections_pass(tmp_path: Path, name: str, accepted: int, rejected: int) -> None:
    ingest_folder(Path(os.environ["CM3LEON_REAL_DATA"]).resolve() / name, tmp_path / "raw")
    licenses = ["Apache-2.0", "CC-BY-2.0", "CC-BY-SA-2.0"]
    report = validate(tmp_path / "raw", tmp_path / "out", tmp_path / "docs", ValidateConfig(licenses=licenses), 0)
    assert (report["accepted"], report["rejected"]) == (accepted, rejected), report
    frame = read_manifest(tmp_path / "out")
    assert all(frame["attribution"])
    assert min(report["splits"].values()) >= 3
    assert ImageStore(tmp_path / "raw").open(frame["image"][0]).mode == "RGB"
    if name == "photos":
        assert {len(captions) for captions in frame["captions"]} == {5}
        assert sum(map(len, frame["objects"])) > 100


def test_expensive_images_are_quarantined_and_warnings_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A progressive JPEG of a thousand scans took 39 s; warnings that named no row were most of a log."""
    records = good_rows(tmp_path, 12)
    write(tmp_path, records)
    slow, odd = ((tmp_path / records[row]["image"]).read_bytes() for row in (3, 5))
    plain = images.decode

    def decode(data: bytes, max_pixels: int | None = None) -> Image.Image:
        if data == slow:
            time.sleep(60)
        if data == odd:
            warnings.warn("Corrupt EXIF data", stacklevel=1)
            os.write(2, b"TIFFFetchNormalTag: incompatible type\n")
        return plain(data, max_pixels)

    monkeypatch.setattr(validation, "decode", decode)
    pack(folder.rows(FolderConfig(), tmp_path), tmp_path / "raw", 32)
    config = ValidateConfig(max_seconds=1.0, licenses=["CC0-1.0", "MIT"])
    report = validate(tmp_path / "raw", tmp_path / "validated", tmp_path / "docs", config, 0)
    assert (report["accepted"], report["reasons"], report["noted"]) == (11, {"too_expensive": 1}, 1)
    [rejected] = pd.read_parquet(tmp_path / "validated/rejected.parquet").to_dict("records")
    assert rejected["detail"] == "took more than 1 seconds" and rejected["origin"] == "manifest.csv line 5"
    details = read_manifest(tmp_path / "validated")["detail"].tolist()
    assert [detail for detail in details if detail] == ["Corrupt EXIF data; TIFFFetchNormalTag: incompatible type"]


def test_where_splits_cannot_be_formed_the_report_is_written_all_the_same(tmp_path: Path) -> None:
    records = [{**record, "group": "one"} for record in good_rows(tmp_path, 6)]
    write(tmp_path, records)
    pack(folder.rows(FolderConfig(), tmp_path), tmp_path / "raw", 32)
    with pytest.raises(ValidationError, match="group"):
        validate(tmp_path / "raw", tmp_path / "validated", tmp_path / "docs", ValidateConfig(), 0)
    report = json.loads((tmp_path / "validated/report.json").read_text())
    assert (report["accepted"], report["parts"]["count"]) == (6, 1)
    assert not (tmp_path / "validated/manifest.parquet").exists()


def test_licenses_are_normalized_and_an_author_is_named_where_the_license_asks(tmp_path: Path) -> None:
    records = good_rows(tmp_path, 12)
    stated = ["CC BY 4.0", "https://creativecommons.org/licenses/by-sa/3.0/", "cc0", "CC BY-NC 2.0", "mine", "CC-BY-4.0"]
    for record, licence in zip(records, stated, strict=False):
        record.update(licence=licence, attribution="" if licence == "CC-BY-4.0" else "me")
    write(tmp_path, records)
    pack(folder.rows(FolderConfig(), tmp_path), tmp_path / "raw", 32)
    config = ValidateConfig(licenses=["commercial"], max_rejected_rate=0.5)
    report = validate(tmp_path / "raw", tmp_path / "validated", tmp_path / "docs", config, 0)
    assert report["reasons"] == {"attribution_missing": 1, "licence_not_allowed": 2}
    assert report["licences"]["accepted"] == {"CC-BY-4.0": 1, "CC-BY-SA-3.0": 1, "CC0-1.0": 1, "MIT": 6}
    assert report["obligations"]["CC-BY-SA-3.0"] == {
        "accepted": 1,
        "asks": "name the author, link the license, state changes; share changed works under the same license",
        "examples": ["manifest.csv line 3"],
    }
    assert set(read_manifest(tmp_path / "validated")["licence"]) == {"CC-BY-4.0", "CC-BY-SA-3.0", "CC0-1.0", "MIT"}


def test_row_groups_are_small_enough_to_be_read_whatever_the_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow fails to read a row group with more than 2 GiB of captions: of a million records these are 2 KB each."""
    records = good_rows(tmp_path)
    for record in records[::3]:
        record["caption"] = ""
    write(tmp_path, records)
    ingest_folder(tmp_path, tmp_path / "raw")
    monkeypatch.setattr(manifest, "BATCH_ROWS", 50)
    validate(tmp_path / "raw", tmp_path / "out", tmp_path / "docs", ValidateConfig(max_rejected_rate=0.5), 0)
    for name, count in (("manifest", 133), ("rejected", 67)):
        found = pq.read_metadata(tmp_path / "out" / f"{name}.parquet")
        assert (found.num_rows, found.num_row_groups) == (count, -(-count // 50))


def test_of_thousands_of_sources_the_most_frequent_are_counted_by_name(tmp_path: Path) -> None:
    """Some collections state the address of each image as its source."""
    records = good_rows(tmp_path)
    for number, record in enumerate(records):
        record["source"] = "many" if number % 3 == 0 else f"https://example.org/{number:03d}"
    records[0]["caption"] = ""
    write(tmp_path, records)
    ingest_folder(tmp_path, tmp_path / "raw")
    sources = validate(tmp_path / "raw", tmp_path / "validated", tmp_path / "docs", ValidateConfig(), 0)["sources"]
    assert (sources["read"]["many"], sources["accepted"]["many"]) == (67, 66)
    assert len(sources["read"]) == 101 and sources["read"]["34 others"] == sources["accepted"]["34 others"] == 34
    assert (sum(sources["read"].values()), sum(sources["accepted"].values())) == (200, 199)
    assert "<td><bdi>34 others</bdi></td>" in (tmp_path / "docs" / "data_report.html").read_text()


def test_what_is_excluded_is_rejected_and_says_what_it_is_like(tmp_path: Path) -> None:
    root, excluded = tmp_path / "collection", tmp_path / "excluded"
    records = good_rows(root)
    write(root, records)
    excluded.mkdir()
    Image.open(root / records[3]["image"]).convert("RGB").resize((200, 200)).save(excluded / "benchmark.webp", lossless=True)
    (excluded / "captions.txt").write_text(f"{records[5]['caption'].upper()}!\n")
    ingest_folder(root, tmp_path / "raw")
    report = validate(tmp_path / "raw", tmp_path / "out", tmp_path / "docs", ValidateConfig(), 0, excluded)
    rejected = read_manifest(tmp_path / "out" / "rejected.parquet")
    by_caption = [number for number, record in enumerate(records) if record["caption"] == records[5]["caption"]]
    assert sorted(rejected["row"]) == sorted({3, *by_caption})
    assert report["reasons"] == {"excluded": len(rejected)}
    details = dict(zip(rejected["row"], rejected["detail"], strict=True))
    assert details[3].endswith("like benchmark.webp") and details[5] == "the caption in captions.txt line 1"


def test_splits_that_the_manifest_states_are_kept(tmp_path: Path) -> None:
    root = tmp_path / "collection"
    records = good_rows(root)
    names = ["Training", "validation", "test", ""]
    for number, record in enumerate(records):
        record["split"] = names[number % 4]
    write(root, records)
    ingest_folder(root, tmp_path / "raw")
    report = validate(tmp_path / "raw", tmp_path / "out", tmp_path / "docs", ValidateConfig(near_duplicate_distance=0), 0)
    accepted = read_manifest(tmp_path / "out")
    assert accepted["split"].tolist() == [["train", "val", "test", "train"][row % 4] for row in accepted["row"]]
    assert report["parts"]["moved_from_stated_split"] == 0
    records[0]["split"] = "trian"
    write(root, records)
    ingest_folder(root, tmp_path / "raw")
    validate(tmp_path / "raw", tmp_path / "out", tmp_path / "docs", ValidateConfig(), 0)
    rejected = read_manifest(tmp_path / "out" / "rejected.parquet")
    assert rejected["reasons"].tolist() == [["malformed_row"]]
    assert rejected["detail"][0].startswith("split: expected one of train, val, test, training")


def test_a_record_that_is_held_out_because_its_copy_states_test_counts_as_moved(tmp_path: Path) -> None:
    records = good_rows(tmp_path, 12)
    for number, record in enumerate(records):
        record["split"] = "val" if number == 11 else "train"
    (tmp_path / "copy.png").write_bytes((tmp_path / records[0]["image"]).read_bytes())
    write(tmp_path, [*records, {**records[0], "image": "copy.png", "split": "test"}])
    ingest_folder(tmp_path, tmp_path / "raw")
    report = validate(tmp_path / "raw", tmp_path / "out", tmp_path / "docs", ValidateConfig(near_duplicate_distance=0), 0)
    accepted = read_manifest(tmp_path / "out")
    assert report["reasons"] == {"duplicate": 1} and accepted[accepted["split"] == "test"]["row"].tolist() == [0]
    assert report["parts"]["moved_from_stated_split"] == 1
