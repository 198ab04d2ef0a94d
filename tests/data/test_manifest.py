"""Packing is deterministic and loses nothing, and the image store reads every image back."""

import copy
import gc
import hashlib
import os
import random
import tarfile
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from cm3leon.config.ingest_schema import SidecarConfig
from cm3leon.data.manifest import MANIFEST_SCHEMA, ImageStore, ManifestError, SourceRow, read_manifest
from cm3leon.data.packing import pack
from cm3leon.data.sources import sidecar


def rows(count: int, seed: int = 0) -> Iterator[SourceRow]:
    rng = random.Random(seed)
    for number in range(count):
        data = rng.randbytes(rng.randrange(1, 3000))
        yield SourceRow(f"k{number}", f"line {number}", data, [f"caption {number}"], "MIT", None, "test", "bin")


def test_several_threads_read_every_image(tmp_path: Path) -> None:
    counts = pack(rows(300), tmp_path, 0.05)
    store, frame = ImageStore(tmp_path), read_manifest(tmp_path)
    wanted = [row.image or b"" for row in rows(300)]
    assert counts["shards"] > 5
    assert counts["images"] == 300
    order = random.Random(1).choices(range(300), k=2000)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda row: store.read(frame["image"][row]), order))
    assert all(data == wanted[row] for row, data in zip(order, read, strict=True))
    assert copy.copy(store).read(frame["image"][7]) == wanted[7]  # as a worker process gets it
    assert frame["id"].tolist() == [hashlib.sha256(data).hexdigest()[:16] for data in wanted]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        pack(rows(100), tmp_path / name, 0.02)
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    with tarfile.open(tmp_path / "one" / "images-00000.tar") as archive:
        first = next(iter(archive))
    assert (first.name, first.mtime, first.uid, first.mode) == ("000000000.bin", 0, 0, 0o644)


def test_a_second_run_removes_the_files_of_the_first(tmp_path: Path) -> None:
    pack(rows(100), tmp_path, 0.02)
    pack(rows(3, seed=1), tmp_path, 0.02)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["images-00000.tar", "manifest.parquet"]


def test_edits_name_originals_before_and_after_them(tmp_path: Path) -> None:
    def edits() -> Iterator[SourceRow]:
        for row, original in zip(rows(5000), ["k4999", "k0", "nobody", *[None] * 4997], strict=True):
            row.edited_from = original
            yield row

    counts = pack(edits(), tmp_path, 32)
    frame = read_manifest(tmp_path)
    assert frame["edited_from"].tolist()[:4] == [frame["id"][4999], frame["id"][0], None, None]
    assert frame["problem"].tolist()[:4] == [None, None, "unknown_original", None]
    assert "'nobody'" in frame["detail"][2]
    assert counts["problems"] == 1
    assert pq.read_schema(tmp_path / "manifest.parquet").equals(MANIFEST_SCHEMA)


def test_a_key_of_several_images_names_no_original(tmp_path: Path) -> None:
    """The first was taken without a word."""

    def edits() -> Iterator[SourceRow]:
        for row, key, original in zip(rows(4), ["a", "a", "b", "c"], [None, None, "a", "b"], strict=True):
            row.key, row.edited_from = key, original
            row.other_keys = ["b"] if key == "b" else []
            yield row

    counts = pack(edits(), tmp_path, 32)
    frame = read_manifest(tmp_path)
    assert frame["edited_from"].tolist()[3] == frame["id"][2]
    assert frame["problem"].tolist() == [None, None, "ambiguous_original", None]
    assert frame["detail"][2] == "edited_from: several rows have the key 'a'"
    assert (counts["problems"], counts["merged_rows"]) == (1, 1)


def test_lists_structs_and_conditions_are_read_back(tmp_path: Path) -> None:
    full = SourceRow(
        "a", "line 1", b"image", ["one", "two"], "MIT", "me", "test", objects=[("cat", (0.5, 1, 2, 3))], questions=[("q?", ["yes", "y"])],
        conditions={"canny edge": b"edges", "canny-edge": b"other"}, group="g", text_in_image="A",
    )  # fmt: skip
    empty = SourceRow("b", "line 2", None, [], None, None, "test", problem="missing", detail="gone")
    pack([full, empty], tmp_path, 1)
    first, second = read_manifest(tmp_path).to_dict("records")
    assert first["objects"] == [{"label": "cat", "box": [0.5, 1, 2, 3]}]
    assert first["questions"] == [{"question": "q?", "answers": ["yes", "y"]}]
    assert [ImageStore(tmp_path).read(item["image"]) for item in first["conditions"]] == [b"edges", b"other"]
    assert first["captions"] == ["one", "two"]
    assert first["problem"] is None
    assert second["image"] is None
    assert second["licence"] is None
    assert second["captions"] == []
    assert len(second["id"]) == 16


def test_references_to_missing_members_and_shards_are_errors(tmp_path: Path) -> None:
    pack(rows(5), tmp_path, 1)
    store = ImageStore(tmp_path)
    for ref in ("images-00000.tar/nothing.png", "images-00009.tar/000000000.bin", "../x.tar/a", "manifest.parquet/a", ""):
        with pytest.raises(ManifestError):
            store.read(ref)
    shard = tmp_path / "images-00000.tar"
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(ManifestError, match=r"truncated|damaged"):
        store.read("images-00000.tar/000000004.bin")
    with pytest.raises(ManifestError, match="does not exist"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(ManifestError, match="no split 'dev'"):
        read_manifest(tmp_path, "dev")


def test_names_of_files_may_have_any_bytes(tmp_path: Path) -> None:
    root, name = tmp_path / "collection", os.fsdecode(b"caf\xe9")
    root.mkdir()
    Image.new("RGB", (40, 40)).save(root / f"{name}.png")
    (root / f"{name}.txt").write_text("a picture")
    (root / os.fsdecode(b"\xff.png")).write_bytes(b"no image")
    (root / os.fsdecode(b"\xff.txt")).write_bytes(b"caf\xe9")
    pack(sidecar.rows(SidecarConfig(), root), tmp_path / "raw", 32)
    frame = read_manifest(tmp_path / "raw")
    assert frame["origin"].tolist() == ["caf\\xe9.png", "\\xff.png"]
    assert frame["captions"][0] == ["a picture"] and ImageStore(tmp_path / "raw").open(frame["image"][0]).size == (40, 40)
    assert frame["problem"][1] == "malformed_row" and "\\xff.txt" in frame["detail"][1]


def test_the_index_of_a_shard_is_small(tmp_path: Path) -> None:
    """Each process that reads images has one of all shards, in the memory that a record's images may take."""
    pack((SourceRow(f"{number}", "", b"x", [], None, None, "test", "jpg") for number in range(2000)), tmp_path, 1)
    store = ImageStore(tmp_path)
    tracemalloc.start()
    store.read("images-00000.tar/000000007.jpg")
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 2000 * 60
