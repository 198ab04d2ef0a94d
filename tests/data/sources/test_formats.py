"""Collections in other formats: webdataset shards, images with text files beside them, COCO's annotations."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cm3leon.config.ingest_schema import CocoConfig, InstructPix2PixConfig, SidecarConfig, WebdatasetConfig
from cm3leon.data.sources import SourceError, coco, instruct_pix2pix, sidecar, webdataset
from cm3leon.utils.errors import UserError


def shard(path: Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry)


def test_webdataset_shards_are_read_as_img2dataset_writes_them(tmp_path: Path) -> None:
    fields = {"caption": "from json", "license": "CC BY 4.0", "author": "me", "url": "https://example.org/0.jpg", "key": "k0"}
    shard(tmp_path / "00000.tar", {
        "000000000.jpg": b"zero", "000000000.txt": b"a cat\nthe cat\n", "000000000.json": json.dumps(fields).encode(),
        "000000001.webp": b"one", "000000001.json": json.dumps(fields | {"key": "k1"}).encode(),
    })  # fmt: skip
    shard(tmp_path / "more" / "00001.tar", {"x/2.txt": b"a dog", "x/2.png": b"two", "x/2.cls": b"7"})
    config = WebdatasetConfig(columns={"attribution": "author"}, license="MIT")
    found = list(webdataset.rows(config, tmp_path))
    assert [row.problem for row in found] == [None] * 3
    assert [(row.image, row.captions, row.licence, row.attribution) for row in found] == [
        (b"zero", ["a cat", "the cat"], "CC BY 4.0", "me"),
        (b"one", ["from json"], "CC BY 4.0", "me"),
        (b"two", ["a dog"], "MIT", None),
    ]
    assert [(row.key, row.extension) for row in found] == [("k0", "jpg"), ("k1", "webp"), ("more/00001.tar x/2", "png")]
    assert found[2].origin == "more/00001.tar x/2"


def test_links_and_names_that_leave_a_shard_are_refused(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", {"../0.png": b"out", "1.png": b"one", "1.txt": b"one"}, {"2.png": "/etc/passwd", "3.png": "1.png"})
    found = {row.origin: row for row in webdataset.rows(WebdatasetConfig(license="MIT"), tmp_path)}
    assert [(row.image, "malformed_row" in (row.problem or "")) for row in found.values()] == [
        (None, True), (b"one", False), (None, True), (None, True),
    ]  # fmt: skip
    assert "outside of the archive" in (found["a.tar ../0"].detail or "")


def test_a_records_broken_files_are_its_own_fault(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", {
        "0.png": b"0", "0.json": b"{", "1.png": b"1", "1.json": b"[1]", "2.png": b"2", "2.txt": b"caf\xe9", "3.txt": b"no image",
        "4.png": b"4", "4.txt": b"x",
    })  # fmt: skip
    found = list(webdataset.rows(WebdatasetConfig(license="MIT"), tmp_path))
    assert [row.problem for row in found] == ["malformed_row", "malformed_row", "malformed_row", "missing", None]
    assert [row.image for row in found] == [b"0", b"1", b"2", None, b"4"]


def test_a_member_that_is_too_large_and_a_record_without_an_image_are_told_for_what_they_are(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", {"0.jpg": bytes(60_000), "0.txt": b"a cat", "1.img.jpg": b"1", "1.txt": b"a dog"})
    large, without = webdataset.rows(WebdatasetConfig(license="MIT", max_file_megabytes=0.05), tmp_path)
    assert (large.problem, large.detail, large.captions) == ("file_too_large", "0.jpg has 0.1 MB, 0.05 allowed", ["a cat"])
    assert (without.problem, without.detail) == ("missing", "no image among its files: .img.jpg, .txt")


def test_shards_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no tar shards"):
        list(webdataset.rows(WebdatasetConfig(), tmp_path))
    shard(tmp_path / "a.tar", {"0.png": bytes(50_000), "1.png": b"1"})
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:20_000])
    with pytest.raises(SourceError, match=r"a\.tar is damaged after 0"):
        list(webdataset.rows(WebdatasetConfig(), tmp_path))
    shard(tmp_path / "a.tar", {})
    with pytest.raises(SourceError, match="hold no records"):
        list(webdataset.rows(WebdatasetConfig(), tmp_path))


def test_a_shard_that_ends_too_early_or_goes_on_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.tar"
    shard(file, {f"{number}.png": b"x" for number in range(4)})
    whole = file.read_bytes()  # of each member a header and a block of content, 512 bytes each
    flipped = bytearray(whole)
    flipped[2 * 1024 + 1] ^= 4
    for broken, message in (
        (bytes(flipped), "damaged after 1 .*no member and no end"), (whole[: 2 * 1024 + 100], "damaged after 1"),
        (whole[: 2 * 1024], "damaged after 1"), (whole + whole, "damaged after 3 .*more follows the end of the archive"),
    ):  # fmt: skip
        file.write_bytes(broken)
        with pytest.raises(SourceError, match=rf"a\.tar is {message}"):
            list(webdataset.rows(WebdatasetConfig(license="MIT"), tmp_path))
    for padded in (whole + bytes(10_240), whole.rstrip(b"\0").ljust(4 * 1024, b"\0") + bytes(1024)):
        file.write_bytes(padded)
        assert len(list(webdataset.rows(WebdatasetConfig(license="MIT"), tmp_path))) == 4


def test_members_of_one_name_are_two_records_and_what_macos_adds_is_none(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in (
            ("._1.png", b"mac"),
            ("1.png", b"one"),
            ("._1.txt", b"mac"),
            ("1.txt", b"a"),
            ("1.png", b"two"),
            ("1.txt", b"b"),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    found = list(webdataset.rows(WebdatasetConfig(license="MIT"), tmp_path))
    assert [(row.image, row.captions, row.problem) for row in found] == [(b"one", ["a"], None), (b"two", ["b"], None)]


def test_captions_lie_beside_the_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name, content in {
        "a/1.png": "one", "a/1.txt": "\ufeffa cat\n\n the cat \n", "a/1.json": json.dumps({"licence": "CC0-1.0", "group": "g"}),
        "2.JPG": "two", "3.png": "three", "3.txt": "x", "3.json": "{", "note.txt": "no image",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(content, encoding="utf-8")
    found = {row.origin: row for row in sidecar.rows(SidecarConfig(license="MIT", attribution="me"), tmp_path)}
    assert list(found) == ["2.JPG", "3.png", "a/1.png"]
    first = found["a/1.png"]
    assert (first.image, first.captions, first.licence, first.attribution, first.group) == (
        b"one",
        ["a cat", "the cat"],
        "CC0-1.0",
        "me",
        "g",
    )
    assert (found["2.JPG"].captions, found["2.JPG"].problem) == ([], None)
    assert found["3.png"].problem == "malformed_row"
    with pytest.raises(SourceError, match="holds no images"):
        list(sidecar.rows(SidecarConfig(), tmp_path / "none"))


def write_coco(root: Path, **changes: Any) -> None:
    (root / "annotations").mkdir(exist_ok=True)
    (root / "images").mkdir(exist_ok=True)
    images = [
        {"id": number, "file_name": f"{number}.jpg", "license": number, "flickr_url": f"https://example.org/{number}"} for number in (1, 2)
    ]
    licenses = [{"id": 1, "url": "http://creativecommons.org/licenses/by/2.0/", "name": "Attribution License"}]
    captions = [{"id": 7, "image_id": image, "caption": text} for image, text in ((1, "a cat"), (2, "a dog"), (1, "the cat"))]
    (root / "annotations/captions.json").write_text(
        json.dumps({"images": images, "licenses": licenses, "annotations": captions, **changes})
    )
    boxes = [
        {"id": 8, "image_id": 1, "category_id": 17, "bbox": [10, 20, 30.5, 5]},
        {"id": 9, "image_id": 2, "category_id": 99, "bbox": [0, 0, 1, 1]},
    ]
    instances = {"images": images, "annotations": boxes, "categories": [{"id": 17, "name": "cat"}]}
    (root / "annotations/instances.json").write_text(json.dumps(instances))
    for image in images:
        (root / "images" / str(image["file_name"])).write_bytes(str(image["id"]).encode())


def test_captions_and_instances_of_coco_are_joined(tmp_path: Path) -> None:
    write_coco(tmp_path)
    both = CocoConfig(annotations=["annotations/captions.json", "annotations/instances.json"])
    one, two = coco.rows(both, tmp_path)
    assert (one.image, one.captions, one.licence) == (b"1", ["a cat", "the cat"], "http://creativecommons.org/licenses/by/2.0/")
    assert (one.attribution, one.objects, one.problem) == ("https://example.org/1", [("cat", (10, 20, 40.5, 25))], None)
    assert (two.captions, two.licence, two.problem) == (["a dog"], None, "malformed_row")  # a category that is not listed
    assert two.origin == "annotations/captions.json image 2"
    [alone, _] = coco.rows(CocoConfig(), tmp_path)
    assert alone.objects == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "is no annotation file of COCO: it has no list 'images'"),
        ({"images": [{"id": 1}]}, "'images': entry 0 has no 'file_name'"),
        ({"images": [{"id": [1], "file_name": "x"}]}, r"entry 0 has a 'id' that is no number or text, but \[1\]"),
        ({"images": [{"id": 1, "file_name": None}]}, "entry 0 has a 'file_name' that is no number or text, but None"),
        ({"categories": [{"id": 1}]}, "'categories': entry 0 has no 'name'"),
        ({"annotations": [{"image_id": 5, "caption": "x"}]}, "annotation 0 names image 5, which no file lists"),
    ],
)
def test_a_file_that_is_not_cocos_is_told_by_what_is_missing(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_coco(tmp_path, **changes)
    with pytest.raises(SourceError, match=message):
        list(coco.rows(CocoConfig(), tmp_path))
    (tmp_path / "annotations/captions.json").write_text("{")
    with pytest.raises(SourceError, match="is not JSON"):
        list(coco.rows(CocoConfig(), tmp_path))
    with pytest.raises(SourceError, match=r"does not exist; ingest\.coco\.annotations names"):
        list(coco.rows(CocoConfig(annotations=["gone.json"]), tmp_path))


def test_files_of_coco_that_number_different_images_alike_are_refused(tmp_path: Path) -> None:
    write_coco(tmp_path)
    other = {"images": [{"id": 1, "file_name": "other.jpg"}], "annotations": [{"image_id": 1, "caption": "a bird"}]}
    (tmp_path / "annotations/other.json").write_text(json.dumps(other))
    with pytest.raises(SourceError, match=r"other\.json: image 1 is 'other\.jpg', and '1\.jpg' is annotations/captions\.json image 1"):
        list(coco.rows(CocoConfig(annotations=["annotations/captions.json", "annotations/other.json"]), tmp_path))


def test_a_license_that_only_a_later_file_states_counts(tmp_path: Path) -> None:
    write_coco(tmp_path)
    plain = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": []}
    (tmp_path / "annotations/first.json").write_text(json.dumps(plain))
    files = ["annotations/captions.json", "annotations/first.json"]
    one, other = (next(coco.rows(CocoConfig(annotations=names), tmp_path)) for names in (files, files[::-1]))
    assert one.licence and (one.licence, one.attribution) == (other.licence, other.attribution)


def test_ids_of_licenses_and_categories_that_are_structures_are_unknown(tmp_path: Path) -> None:
    write_coco(
        tmp_path,
        images=[{"id": 1, "file_name": "1.jpg", "license": {"id": 1}}],
        annotations=[{"image_id": 1, "bbox": [0, 0, 1, 1], "category_id": [1]}],
    )
    [row] = coco.rows(CocoConfig(), tmp_path)
    assert (row.licence, row.problem) == (None, "malformed_row")


def test_pairs_of_instruct_pix2pix_become_an_image_and_its_edit(tmp_path: Path) -> None:
    pairs = [
        {
            "original_image": {"bytes": f"{number}".encode(), "path": None}, "original_prompt": f"a cat {number}",
            "edit_prompt": "make it a dog",
            "edited_image": {"bytes": f"{number} edited".encode(), "path": None}, "edited_prompt": f"a dog {number}",
        }
        for number in range(2)
    ]  # fmt: skip
    pd.DataFrame(pairs).to_parquet(tmp_path / "train-0.parquet")
    found = list(instruct_pix2pix.rows(InstructPix2PixConfig(license="MIT"), tmp_path))
    assert [(row.image, row.captions, row.instruction, row.problem) for row in found[:2]] == [
        (b"0", ["a cat 0"], None, None),
        (b"0 edited", ["a dog 0"], "make it a dog", None),
    ]
    assert [(row.edited_from, row.licence) for row in found] == [(None, "MIT"), (found[0].key, "MIT"), (None, "MIT"), (found[2].key, "MIT")]
    assert len({row.key for row in found}) == 4
    pd.DataFrame(pairs).drop(columns=["edited_image", "edited_prompt"]).to_parquet(tmp_path / "train-0.parquet")
    with pytest.raises(SourceError, match="has no column 'edited_image' and no column 'edited_prompt'; its columns are: original_image"):
        list(instruct_pix2pix.rows(InstructPix2PixConfig(), tmp_path))


def test_several_edits_of_one_image_share_it(tmp_path: Path) -> None:
    pairs = [
        {
            "original_image": {"bytes": b"0", "path": None}, "original_prompt": "a cat", "edit_prompt": f"make it {color}",
            "edited_image": {"bytes": color.encode(), "path": None}, "edited_prompt": f"a {color} cat",
        }
        for color in ("red", "blue")
    ]  # fmt: skip
    pd.DataFrame(pairs).to_parquet(tmp_path / "train-0.parquet")
    original, red, blue = instruct_pix2pix.rows(InstructPix2PixConfig(license="MIT"), tmp_path)
    assert (original.image, red.image, blue.image) == (b"0", b"red", b"blue")
    assert {red.edited_from, blue.edited_from} == {original.key, *original.other_keys}


def test_what_lies_behind_a_link_out_of_the_collection_is_not_left_out_in_silence(tmp_path: Path) -> None:
    root, other = tmp_path / "collection", tmp_path / "other"
    for directory, name in ((root / "own", "0"), (other, "1")):
        directory.mkdir(parents=True)
        (directory / f"{name}.png").write_bytes(b"image")
        shard(directory / f"{name}.tar", {f"{name}.png": b"image"})
    sources = ((sidecar, SidecarConfig(license="MIT")), (webdataset, WebdatasetConfig(license="MIT")))
    (root / "inside").symlink_to(root / "own")
    (root / "2.png").symlink_to(tmp_path / "gone.png")
    assert [row.problem for row in sidecar.rows(SidecarConfig(license="MIT"), root)] == ["path_outside_root", None]
    assert [row.origin for row in webdataset.rows(WebdatasetConfig(license="MIT"), root)] == ["own/0.tar 0"]
    (root / "more").symlink_to(other)
    for source, config in sources:
        with pytest.raises(UserError, match=r"collection/more is a link to the directory .*/other, .* move or copy the files"):
            list(source.rows(config, root))


def test_a_mapping_of_columns_that_cannot_be_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = json.dumps({"title": "a cat"}).encode()
    shard(tmp_path / "a.tar", {"0.png": b"image", "0.json": fields})
    (tmp_path / "0.png").write_bytes(b"image")
    (tmp_path / "0.json").write_bytes(fields)
    pairs = {"original_image": b"0", "original_prompt": "a", "edit_prompt": "b", "edited_image": b"1", "edited_prompt": "c"}
    pd.DataFrame([pairs]).to_parquet(tmp_path / "pairs.parquet")
    sources = {"webdataset": (webdataset, WebdatasetConfig), "sidecar": (sidecar, SidecarConfig)}
    for name, (source, config) in {**sources, "instruct_pix2pix": (instruct_pix2pix, InstructPix2PixConfig)}.items():
        with pytest.raises(SourceError, match=rf"ingest\.{name}\.columns\.caption: there is no manifest column 'caption'; columns are "):
            list(source.rows(config(columns={"caption": "title"}), tmp_path))
    for name, (source, config) in sources.items():
        [row] = source.rows(config(license="MIT", columns={"captions": "title"}), tmp_path)
        assert row.captions == ["a cat"] and not capsys.readouterr().out
        [row] = source.rows(config(license="MIT", columns={"captions": "title", "attribution": "autor"}), tmp_path)
        assert f"ingest.{name}.columns names autor, which no record has" in capsys.readouterr().out
