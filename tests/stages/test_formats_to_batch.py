"""Each format from its files to a batch of instruction tuning, with the tasks that it enables; and files that are damaged in every way."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from images_support import encode, hostile_files, squares
from PIL import Image

from cm3leon.config import paths
from cm3leon.config.schema import Config
from cm3leon.data.batches import collate
from cm3leon.data.manifest import read_table
from cm3leon.data.rows_by_id import RowsById
from cm3leon.data.sequences import PretrainingSamples
from cm3leon.data.task_samples import TaskSamples
from cm3leon.data.tokens import TokenStore
from cm3leon.models.decoder import Decoder
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.stages import ingest, tokenize, validate
from cm3leon.training.instruction_tuning import UNMASKED

COUNT = 40
CAPTION = "a red circle"
STATED = {"license": "MIT", "attribution": "me"}


def picture(number: int, kind: str = "PNG") -> bytes:
    """A picture unlike those of other numbers."""
    return encode(squares(number), kind)


def folder(root: Path) -> dict[str, Any]:
    names = [f"{number}.png" for number in range(COUNT)]
    for number, name in enumerate(names):
        (root / name).write_bytes(picture(number))
    questions = json.dumps([{"question": "What?", "answers": ["a circle"]}])
    pd.DataFrame({"image": names, "caption": CAPTION, "questions": questions}).to_csv(root / "manifest.csv", index=False)
    return {"folder": STATED}


def parquet(root: Path) -> dict[str, Any]:
    images = [{"bytes": picture(number), "path": None} for number in range(COUNT)]
    pd.DataFrame({"image": images, "text": CAPTION}).to_parquet(root / "train.parquet")
    return {"folder": {**STATED, "manifest": "train.parquet"}}


def webdataset(root: Path) -> dict[str, Any]:
    with tarfile.open(root / "00000.tar", "w") as archive:
        for number in range(COUNT):
            for suffix, content in (("jpg", picture(number, "JPEG")), ("txt", CAPTION.encode())):
                entry = tarfile.TarInfo(f"{number:05d}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return {"webdataset": STATED}


def sidecar(root: Path) -> dict[str, Any]:
    for number in range(COUNT):
        (root / f"{number}.webp").write_bytes(picture(number, "WEBP"))
        (root / f"{number}.txt").write_text(f"{CAPTION}\nthe same circle\n")
    return {"sidecar": STATED}


def write_pictures(root: Path, name: str = "{}.png", kind: str = "PNG") -> None:
    """The pictures in ``root / images``."""
    for number in range(COUNT):
        file = root / "images" / name.format(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(number, kind))


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def coco(root: Path) -> dict[str, Any]:
    write_pictures(root)
    (root / "panoptic").mkdir()
    for number in range(COUNT):
        Image.new("RGB", (40, 40), (number + 1, 1, 0)).save(root / f"panoptic/{number}.png")
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(COUNT)]
    captions = [{"image_id": number, "caption": CAPTION} for number in range(COUNT)]
    boxes = [{"image_id": number, "category_id": 1, "bbox": [5, 5, 20, 20]} for number in range(COUNT)]
    segments = [
        {"image_id": number, "file_name": f"{number}.png", "segments_info": [{"id": number + 257, "category_id": 1}]}
        for number in range(COUNT)
    ]
    content = {"images": images, "annotations": captions + boxes + segments, "categories": [{"id": 1, "name": "circle"}]}
    write_json(root / "all.json", content)
    return {"coco": {**STATED, "annotations": ["all.json"]}}


def localized_narratives(root: Path) -> dict[str, Any]:
    write_pictures(root, "{:012d}.png")
    records = [{"image_id": str(number), "caption": CAPTION, "annotator_id": 1} for number in range(COUNT)]
    (root / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"localized_narratives": {**STATED, "annotations": ["train.jsonl"], "images": "images/{image_id:012d}.png"}}


def image_paragraphs(root: Path) -> dict[str, Any]:
    write_pictures(root, "{}.jpg", "JPEG")
    write_json(root / "paragraphs_v1.json", [{"image_id": number, "paragraph": f"{CAPTION}. It is red."} for number in range(COUNT)])
    return {"image_paragraphs": STATED}


def scienceqa(root: Path) -> dict[str, Any]:
    write_pictures(root, "train/{}/image.png")
    problem = {"question": "Is it red?", "choices": ["yes", "no"], "answer": 0, "image": "image.png", "lecture": "Look.", "split": "train"}
    write_json(root / "problems.json", {str(number): problem for number in range(COUNT)})
    write_json(root / "captions.json", {"captions": {str(number): CAPTION for number in range(COUNT)}})
    return {"scienceqa": {**STATED, "captions": "captions.json"}}


def vqa_with_captions(root: Path) -> dict[str, Any]:
    """VQA v2 has no captions: those of the same images come from files beside them."""
    write_pictures(root / "vqa", "COCO_train2014_{:012d}.jpg", "JPEG")
    questions = [{"question_id": number, "image_id": number, "question": "Is it red?"} for number in range(COUNT)]
    annotations = [{"question_id": number, "image_id": number, "answers": [{"answer": "yes"}]} for number in range(COUNT)]
    write_json(root / "vqa/questions.json", {"questions": questions})
    write_json(root / "vqa/annotations.json", {"annotations": annotations})
    write_pictures(root / "captions", "{}.jpg", "JPEG")
    for number in range(COUNT):
        (root / f"captions/images/{number}.txt").write_text(CAPTION)
    sidecar = {"source": "sidecar", "path": "captions", "options": STATED}
    return {"mixture": [{"source": "vqa", "path": "vqa", "weight": 2.0}, sidecar]}


def open_images_with_narratives(root: Path) -> dict[str, Any]:
    """Both are of the same images, in the same directory."""
    narratives = localized_narratives(root)["localized_narratives"]
    lines = [f"{number},/m/1,0.1,0.6,0.2,0.7" for number in range(COUNT)]
    (root / "boxes.csv").write_text("\n".join(["ImageID,LabelName,XMin,XMax,YMin,YMax", *lines]))
    (root / "class-descriptions.csv").write_text("/m/1,circle\n/m/2,square\n")
    boxes = {"source": "open_images", "options": {"images": narratives["images"]}}
    return {"mixture": [boxes, {"source": "localized_narratives", "options": narratives}]}


def instruct_pix2pix(root: Path) -> dict[str, Any]:
    columns = {"original_prompt": CAPTION, "edit_prompt": "make it blue", "edited_prompt": "a blue circle"}
    images = {
        name: [picture(start + number) for number in range(COUNT)] for name, start in (("original_image", 0), ("edited_image", COUNT))
    }
    pd.DataFrame({**images, **columns}).to_parquet(root / "train.parquet")
    return {"instruct_pix2pix": STATED}


COMMON = {"text_to_image", "caption"}


@pytest.mark.parametrize(
    ("write", "tasks"),
    [
        (folder, COMMON | {"vqa"}),
        (parquet, COMMON),
        (webdataset, COMMON),
        (sidecar, COMMON),
        (coco, COMMON | {"layout_to_image", "condition_to_image"}),
        (localized_narratives, COMMON | {"long_caption"}),
        (image_paragraphs, COMMON | {"long_caption"}),
        (scienceqa, COMMON | {"reasoning"}),
        (vqa_with_captions, COMMON | {"vqa"}),
        (open_images_with_narratives, COMMON | {"long_caption", "layout_to_image"}),
        (instruct_pix2pix, COMMON | {"edit"}),
    ],
)
def test_a_format_becomes_a_batch_with_its_tasks(write: Callable[[Path], dict[str, Any]], tasks: set[str], stages: Path) -> None:
    source = Path("collection")
    source.mkdir()
    section = write(source)
    found = {"source": next(iter(section)), "path": str(source), **section}
    config = Config.model_validate({"profile": "test", "ingest": found, "validate": {"licenses": ["MIT"], "max_rejected_rate": 0.0}})
    assert ingest.run(config)["problems"] == 0
    counts = validate.run(config)
    assert counts["accepted"] == counts["read"] == (2 * COUNT if write is instruct_pix2pix else COUNT)
    tokenize.run(config)
    model, store = Decoder.load(paths.FINETUNED), TokenStore(paths.TOKENS, ["train"])
    pretraining = PretrainingSamples(store, store, {}, model.vocabulary, UNMASKED, [1.0], model.spec.context, 0)
    conditions = TokenStore(paths.TOKENS, ["conditions-train"]) if TokenStore.holds(paths.TOKENS, "conditions-train") else None
    records, tokenizer = RowsById(read_table(paths.VALIDATED, "train")), TextTokenizer.load(paths.TEXT_TOKENIZER)
    assert {record["weight"] for record in records.values()} == {2.0 if write is vqa_with_captions else 1.0}
    samples = TaskSamples(pretraining, records, tokenizer, config.sft, conditions)
    assert set(samples.rows) == tasks
    batch = collate([samples(0, number) for number in range(16)])
    assert len(batch.targets) > 16 and batch.tokens.max() < model.vocabulary.size


def hostile(root: Path) -> int:
    """Files that are damaged in every way; returns their number."""
    files = list(hostile_files(flips=6))
    for number, content in enumerate(files):
        (root / f"{number:04d}.png").write_bytes(content)
        (root / f"{number:04d}.txt").write_text(f"picture {number}")
    return len(files)


PROGRAM = """
import json, resource
from pathlib import Path
from cm3leon.config.ingest_schema import SidecarConfig
from cm3leon.config.schema import ValidateConfig
from cm3leon.data.manifest import read_manifest
from cm3leon.data.packing import pack
from cm3leon.data.sources import sidecar
from cm3leon.data.manifest import ImageStore
from cm3leon.data.validation import check_rows, profile_images
from cm3leon.stages.common import peak_megabytes
config = ValidateConfig(licenses=["MIT"])
counts = pack(sidecar.rows(SidecarConfig(license="MIT"), Path("files")), Path("raw"), 32)
frame = read_manifest("raw")
findings = check_rows(frame, profile_images(ImageStore("raw"), frame, config), config)
# Of the program itself Linux counts in ru_maxrss what the process that started it had, too.
peak = max(peak_megabytes(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
print(json.dumps({"read": counts["rows"], "found": [[reason for reason, _ in found] for found in findings], "megabytes": peak}))
"""


def test_hostile_files_are_all_accounted_for_in_little_memory(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    count = hostile(tmp_path / "files")
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" or "validate: decoding" in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["read"] == len(result["found"]) == count
    reasons = {reason for found in result["found"] for reason in found}
    assert {"unreadable", "decompression_bomb"} <= reasons <= {"unreadable", "decompression_bomb", "duplicate", "too_small"}
    assert sum(not found for found in result["found"]) >= 10  # modes that are not common are no damage
    assert result["megabytes"] < 600
