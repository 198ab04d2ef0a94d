"""Sources of boxes and segments: Open Images, and COCO's format as Objects365 and panoptic annotations have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images_support import encode
from PIL import Image

from cm3leon.config.ingest_schema import CocoConfig, OpenImagesConfig
from cm3leon.data.images import decode
from cm3leon.data.segmentation import SEGMENTATION_MAP, category_color
from cm3leon.data.sources import SourceError, coco, open_images
from cm3leon.sequence.tasks import CONDITIONS

BOXES = """ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded
a,xclick,/m/cat,1,0.25,0.5,0.1,0.9,0
a,xclick,/m/dog,1,0,1,0,1,0
b,xclick,/m/cat,1,0.5,1,0,0.5,0
c,xclick,/m/cow,1,0,1,0,1,0
d,xclick,/m/cat,1,zero,1,0,1,0
gone,xclick,/m/cat,1,0,1,0,1,0
"""
CLASSES = '/m/cat,Cat\n/m/dog,"Dog, big"\n'
IMAGES = """ImageID,Subset,OriginalURL,License,AuthorProfileURL,Author
a,train,https://example.org/a,https://creativecommons.org/licenses/by/2.0/,https://example.org/me,Me
b,train,https://example.org/b,https://creativecommons.org/licenses/by/2.0/,,
"""


def picture(width: int, height: int, **options: Any) -> bytes:
    return encode(Image.new("RGB", (width, height), "red"), "JPEG", **options)


def write_open_images(root: Path) -> None:
    (root / "boxes.csv").write_text(BOXES)
    (root / "class-descriptions.csv").write_text(CLASSES)
    (root / "images.csv").write_text(IMAGES)
    (root / "images").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, content in {
        "a": picture(200, 100), "b": picture(200, 100, exif=turned), "c": picture(10, 10), "d": picture(10, 10),
    }.items():  # fmt: skip
        (root / f"images/{name}.jpg").write_bytes(content)


def test_boxes_of_open_images_become_pixels_of_the_image_as_it_is_shown(tmp_path: Path) -> None:
    write_open_images(tmp_path)
    a, b, c, d, gone = open_images.rows(OpenImagesConfig(image_list="images.csv", license="CC0-1.0"), tmp_path)
    assert a.objects == [("Cat", (50, 10, 100, 90)), ("Dog, big", (0, 0, 200, 100))]
    assert (a.problem, a.licence, a.attribution) == (None, "https://creativecommons.org/licenses/by/2.0/", "Me")
    assert decode(b.image or b"").size == (100, 200)
    assert (b.objects, b.attribution) == ([("Cat", (50, 0, 100, 100))], "https://example.org/b")
    assert (c.problem, d.problem, gone.problem) == ("malformed_row", "malformed_row", "missing")  # a label without a name, and no number
    assert (c.licence, c.key, c.origin) == ("CC0-1.0", "images/c.jpg", "boxes.csv image c")
    with_header = "LabelName,DisplayName\n" + CLASSES
    (tmp_path / "class-descriptions.csv").write_text(with_header)
    again = list(open_images.rows(OpenImagesConfig(image_list="images.csv", license="CC0-1.0"), tmp_path))
    assert again == [a, b, c, d, gone]


def test_a_damaged_image_is_left_to_validate(tmp_path: Path) -> None:
    write_open_images(tmp_path)
    (tmp_path / "images/a.jpg").write_bytes(b"damaged")
    first = next(open_images.rows(OpenImagesConfig(), tmp_path))
    assert (first.image, first.objects, first.problem) == (b"damaged", [], None)


def test_wrong_files_of_open_images_are_told_by_what_is_missing(tmp_path: Path) -> None:
    write_open_images(tmp_path)
    config = OpenImagesConfig(image_list="images.csv")
    (tmp_path / "images.csv").write_text("ImageID,Author\na,Me\n")
    with pytest.raises(SourceError, match=r"images\.csv has no column 'License'; its columns are: ImageID, Author"):
        list(open_images.rows(config, tmp_path))
    (tmp_path / "class-descriptions.csv").write_text("/m/cat,Cat,3\n")
    with pytest.raises(SourceError, match="does not have the two columns LabelName and DisplayName in each line: /m/cat, Cat, 3"):
        list(open_images.rows(OpenImagesConfig(), tmp_path))
    (tmp_path / "class-descriptions.csv").write_text(CLASSES)
    (tmp_path / "boxes.csv").write_text("ImageID,LabelName,XMin,YMin,YMax\na,/m/cat,0,0,1\n")
    with pytest.raises(SourceError, match=r"boxes\.csv has no column 'XMax'; its columns are: ImageID, LabelName"):
        list(open_images.rows(OpenImagesConfig(), tmp_path))
    lines = BOXES.splitlines(keepends=True)
    (tmp_path / "boxes.csv").write_text("".join([lines[0], lines[1], lines[3], lines[2]]))
    with pytest.raises(SourceError, match="the boxes of a do not follow one another; sort the file by ImageID"):
        list(open_images.rows(OpenImagesConfig(), tmp_path))


def test_objects365_is_read_as_coco(tmp_path: Path) -> None:
    name = "images/v1/patch8/objects365_v1_00420917.jpg"
    image = {"height": 512, "id": 420917, "license": 5, "width": 769, "file_name": name, "url": "https://example.org/1"}
    box = {"id": 1, "iscrowd": 0, "isfake": 0, "isreflected": 0, "area": 1.0, "image_id": 420917, "bbox": [10.5, 20.0, 30.0, 40.0]}
    boxes = [{**box, "category_id": 12}, {**box, "id": 2, "iscrowd": 1, "category_id": 47}]
    categories = [{"id": 12, "name": "Bottle"}, {"id": 47, "name": "Cabinet/shelf"}]
    content = {"images": [image], "annotations": boxes, "categories": categories, "licenses": None}
    (tmp_path / "val.json").write_text(json.dumps(content))
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(b"image")
    [row] = coco.rows(CocoConfig(annotations=["val.json"], images="", license="CC-BY-4.0"), tmp_path)
    assert (row.image, row.problem, row.licence, row.key) == (b"image", None, "CC-BY-4.0", name)
    assert row.objects == [("Bottle", (10.5, 20, 40.5, 60)), ("Cabinet/shelf", (10.5, 20, 40.5, 60))]


SEGMENTS = np.array([[0, 5, 5], [300, 300, 70_000]])


def write_panoptic(root: Path, segments: np.ndarray = SEGMENTS, **changes: Any) -> CocoConfig:
    """Two images, of which the first has segments: their numbers are R + 256 G + 65536 B."""
    (root / "annotations").mkdir(exist_ok=True)
    (root / "panoptic").mkdir(exist_ok=True)
    (root / "images").mkdir(exist_ok=True)
    pixels = np.stack([segments % 256, segments // 256 % 256, segments // 65_536], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(root / "panoptic/1.png")
    for name in ("1.jpg", "2.jpg"):
        (root / "images" / name).write_bytes(name.encode())
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in (1, 2)]
    found = [{"id": number, "category_id": category, "iscrowd": 0} for number, category in ((5, 1), (300, 200), (70_000, 1))]
    annotation = {"image_id": 1, "file_name": "1.png", "segments_info": found, **changes}
    categories = [{"id": 1, "name": "cat", "isthing": 1}, {"id": 200, "name": "rug-merged", "isthing": 0}]
    content = {"images": images, "annotations": [annotation], "categories": categories}
    (root / "annotations/panoptic.json").write_text(json.dumps(content))
    return CocoConfig(annotations=["annotations/panoptic.json"])


def test_panoptic_annotations_become_a_map_in_the_colors_of_categories(tmp_path: Path) -> None:
    with_segments, without = coco.rows(write_panoptic(tmp_path), tmp_path)
    assert SEGMENTATION_MAP in CONDITIONS and list(with_segments.conditions) == [SEGMENTATION_MAP]
    assert (with_segments.problem, without.problem, without.conditions) == (None, None, {})
    cat, rug, nothing = category_color("cat"), category_color("rug-merged"), (0, 0, 0)
    found = np.asarray(decode(with_segments.conditions[SEGMENTATION_MAP]))
    assert found.tolist() == np.array([[nothing, cat, cat], [rug, rug, cat]]).tolist()


def test_the_color_of_a_category_depends_on_its_name_alone_and_is_not_black() -> None:
    colors = {name: category_color(name) for name in map(str, range(200))}
    assert len(set(colors.values())) == 200
    assert all(32 <= value <= 255 for color in colors.values() for value in color)
    assert category_color("cat") == (151, 207, 151)  # in every version


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"file_name": "gone.png"}, "missing", "panoptic/gone.png is no file"),
        ({"file_name": "../images/../../x.png"}, "path_outside_root", "x.png"),
        ({"file_name": "damaged.png"}, "unreadable_condition", "segmentation map: unreadable"),
        ({"segments_info": [{"id": 5, "category_id": 1}]}, "malformed_row", "segments_info lists no segment 300"),
        ({"segments_info": [{"id": 5, "category_id": 9}]}, "malformed_row", '"category_id" that is listed'),
        ({"segments_info": 3}, "malformed_row", "segments_info with"),
        ({"file_name": None}, "malformed_row", 'a "file_name" of the panoptic PNG'),
    ],
)
def test_a_wrong_panoptic_annotation_is_the_rows_problem(tmp_path: Path, changes: dict[str, Any], reason: str, detail: str) -> None:
    config = write_panoptic(tmp_path, **changes)
    (tmp_path / "panoptic/damaged.png").write_bytes((tmp_path / "panoptic/1.png").read_bytes()[:40])
    row, other = coco.rows(config, tmp_path)
    assert (row.problem, other.problem, row.image) == (reason, None, b"1.jpg")
    assert detail in (row.detail or "") and row.conditions == {}


def test_a_category_without_a_name_is_told(tmp_path: Path) -> None:
    write_open_images(tmp_path)
    unknown = list(open_images.rows(OpenImagesConfig(), tmp_path))[2]
    assert "'LabelName': '/m/cow'" in (unknown.detail or "")
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1], "category_id": 7}]}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    [row] = coco.rows(CocoConfig(annotations=["instances.json"]), tmp_path)
    assert (row.problem, row.objects) == ("malformed_row", []) and "'category_id': 7" in (row.detail or "")


def test_a_line_of_the_list_of_images_that_is_at_fault_names_no_author(tmp_path: Path) -> None:
    write_open_images(tmp_path)
    for line in ("a,train,https://example.org/a,CC-BY-2.0,https://example.org/me,Doe, Jane\n", "train\n"):
        (tmp_path / "images.csv").write_text(IMAGES.splitlines()[0] + "\n" + line)
        with pytest.raises(SourceError, match=r"images\.csv, line 2: [17] cells where the header names 6; correct it"):
            list(open_images.rows(OpenImagesConfig(image_list="images.csv"), tmp_path))
