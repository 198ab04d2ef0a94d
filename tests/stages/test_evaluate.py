"""Stage evaluate on untrained models: captions and questions of any length, shared images, a contract that covers what was asked."""

import io
import shutil
import tarfile
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cm3leon import paths, tracking
from cm3leon.config import Config
from cm3leon.data.manifest import VALIDATED_SCHEMA
from cm3leon.evaluation.record import Record
from cm3leon.generation.engine import PromptTooLongError
from cm3leon.stages import evaluate

CONFIG = Config.model_validate(
    {
        "decoding": {"candidates": 1, "documents": 1, "max_text_tokens": 4},
        "evaluate": {"prompts": 3, "captions": 2, "questions": 6, "sheet": 2, "bootstrap": 10},
    }
)
TOO_LONG = "a red circle beside a ring " * 60


@pytest.fixture
def collection(tmp_path, monkeypatch, tiny_models):
    """Untrained models; ``write(count)`` makes that many test documents, the first with a blank, then a very long caption."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tracking, "stage_run", lambda stage, config: nullcontext(tracking.Run()))
    for name in ("models", "data"):
        shutil.copytree(tiny_models / name, tmp_path / name)

    def write(count: int) -> None:
        rng, rows = np.random.default_rng(0), []
        for folder in (paths.RAW, paths.VALIDATED):
            folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(paths.RAW / "images-00000.tar", "w") as archive:
            for number in range(count + 1):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(256, size=(40, 36, 3), dtype=np.uint8)).save(buffer, "PNG")
                member = tarfile.TarInfo(f"{number:06d}.png")
                member.size = buffer.tell()
                buffer.seek(0)
                archive.addfile(member, buffer)
                questions = [{"question": text, "answers": ["two"]} for text in ("how many?", f"{TOO_LONG}?")]
                rows.append(
                    dict.fromkeys(VALIDATED_SCHEMA.names)
                    | {"id": f"id{number}", "image": f"images-00000.tar/{member.name}", "questions": questions, "width": 36, "height": 40}
                    | {"captions": ["a blue square"] if number > 1 else ["  ", TOO_LONG], "split": "test" if number else "train"}
                )
        pq.write_table(pa.Table.from_pylist(rows, schema=VALIDATED_SCHEMA), paths.VALIDATED / "manifest.parquet")

    return write


def test_long_captions_and_questions_are_cut_not_fatal(collection):
    collection(3)
    figures = evaluate.run(CONFIG)
    record = Record.read(paths.EVALUATION)
    assert {"clip_score", "fd_encoder", "cider", "vqa_accuracy", "super_resolution_psnr_rgb"} <= set(record.scores)
    assert {"vqa_accuracy_other_images", "super_resolution_psnr_rgb_bicubic"} <= set(record.calibration)
    assert record.scores["super_resolution_psnr_rgb"] == pytest.approx(record.calibration["super_resolution_psnr_rgb_bicubic"], abs=1)
    assert record.contract["counts"] == {"prompts": 3, "captioned": 2, "questions": 6}
    assert record.contract["retrieval"]["max_score"] == CONFIG.retrieve.max_score
    assert all(np.isfinite(value) for value in figures.values())
    with pytest.raises(PromptTooLongError):
        evaluate.Generator.from_parts(
            model=paths.FINETUNED, image_tokenizer=paths.IMAGE_TOKENIZER, text_tokenizer=paths.TEXT_TOKENIZER, decoding=CONFIG.decoding
        ).text_to_image([TOO_LONG], candidates=1, documents=0)


def test_one_test_document_is_measured(collection):
    collection(1)
    evaluate.run(CONFIG)
    record = Record.read(paths.EVALUATION)
    assert {"clip_score", "vqa_accuracy"} <= set(record.scores) and "fd_encoder" not in record.scores
    assert not [name for name in record.calibration if "other" in name]


def test_the_contract_covers_what_was_captioned():
    class Parts:
        encoder = None
        image_tokenizer = type("Tokenizer", (), {"spec": type("Spec", (), {"image_size": 32})})

    def contract(ids: list[str], references: list[list[str]]) -> dict:
        captioned = pd.DataFrame({"id": ids, "captions": references})
        return evaluate.contract(CONFIG, pd.DataFrame({"id": ["a"]}), ["p"], captioned, [], Parts(), 64)

    base = contract(["a", "b"], [["x"], ["y"]])
    changes = {
        ("captioned",): contract(["a", "c"], [["x"], ["y"]]),
        ("references",): contract(["a", "b"], [["x"], ["y", "z"]]),
        ("captioned", "counts", "references"): contract(["a"], [["x"]]),
    }
    for names, other in changes.items():
        assert {name for name in base if base[name] != other[name]} == set(names)
