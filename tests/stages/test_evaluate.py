"""Stage evaluate on untrained models: scores, calibrations and contract of all tasks, reproduction of a record, refused input."""

import io
import json
import shutil
import tarfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cm3leon.config import paths
from cm3leon.config.ingest_schema import ShapesConfig
from cm3leon.config.schema import Config
from cm3leon.data.images import fit_square
from cm3leon.data.manifest import VALIDATED_SCHEMA, ImageStore, read_manifest
from cm3leon.data.packing import pack
from cm3leon.data.thumbnails import thumbnail_of, write_thumbnails
from cm3leon.evaluation import inception
from cm3leon.evaluation import run as evaluation
from cm3leon.evaluation.leakage import LeakageError
from cm3leon.evaluation.record import Record
from cm3leon.evaluation.tasks import MEASURES
from cm3leon.generation.checks import PromptTooLongError
from cm3leon.generation.generator import Generator
from cm3leon.models.clip import Encoder
from cm3leon.models.vqgan import ImageTokenizer
from cm3leon.retrieval.index import MemoryBank
from cm3leon.scenes import source as shapes
from cm3leon.scenes.composition import combinations, parse_caption
from cm3leon.sequence.tasks import TASKS, Training
from cm3leon.stages import evaluate
from cm3leon.tracking import runs
from cm3leon.utils.errors import UserError
from cm3leon.utils.world import World

CONFIG = Config.model_validate(
    {
        "decoding": {"candidates": 1, "retrieved_documents": 1, "max_text_tokens": 4},
        "evaluate": {"prompts": 3, "captions": 2, "questions": 6, "tasks": 6, "sheet": 2, "bootstrap": 10},
    }
)
TOO_LONG = "a red circle next to a ring " * 60


def write_validated(records):
    """Write the outputs of ``validate``: the manifest of the records, and their thumbnails."""
    paths.VALIDATED.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records, schema=VALIDATED_SCHEMA), paths.VALIDATED / "manifest.parquet")
    store = ImageStore(paths.RAW)
    thumbnails = [thumbnail_of(store.open(record["image"])) for record in records]
    write_thumbnails(paths.VALIDATED, [record["id"] for record in records], thumbnails)


@pytest.fixture
def collection(tmp_path, monkeypatch, tiny_models):
    """Untrained models. ``write(count)`` makes so many test records, the first with a blank and a long caption, and a training record."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "stage_run", lambda stage, config: nullcontext(runs.Run()))
    for name in ("models", "data"):
        shutil.copytree(tiny_models / name, tmp_path / name)

    def write(count: int, training: Sequence[str] = ("a red ring",)) -> None:
        rng, rows = np.random.default_rng(0), []
        paths.RAW.mkdir(parents=True, exist_ok=True)
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
                    | {"captions": ["  ", TOO_LONG] if number == 1 else ["a blue square"], "split": "test"}
                )
        rows[0] |= {"captions": list(training), "split": "train"}
        write_validated(rows)

    return write


def test_captions_and_questions_that_are_too_long_are_cut(collection):
    collection(3)
    metrics = evaluate.run(CONFIG)
    record = Record.read(paths.EVALUATION)
    assert {"clip_score", "fd_encoder", "cider", "vqa_accuracy", "super_resolution_psnr_rgb"} <= set(record.scores)
    assert {"vqa_accuracy_other_images", "super_resolution_psnr_rgb_bicubic"} <= set(record.calibration)
    assert record.scores["super_resolution_psnr_rgb"] == pytest.approx(record.calibration["super_resolution_psnr_rgb_bicubic"], abs=1)
    assert record.contract["counts"] == {"prompts": 3, "seen_prompts": 0, "new_combinations": 0, "captioned": 2, "questions": 6}
    assert record.settings["retrieve"]["max_score"] == CONFIG.retrieve.max_score  # part of the model, not of the contract
    assert not {"retrieval", "decoding"} & record.contract.keys()
    assert set(record.outcomes["clip_score"]) == set(read_manifest(paths.VALIDATED, "test")["id"]) and not record.seen
    assert all(np.isfinite(value) for value in metrics.values())
    with pytest.raises(PromptTooLongError):
        Generator.from_parts(
            model=paths.FINETUNED, image_tokenizer=paths.IMAGE_TOKENIZER, text_tokenizer=paths.TEXT_TOKENIZER, decoding=CONFIG.decoding
        ).text_to_image([TOO_LONG], candidates=1, retrieved_documents=0)


@pytest.fixture
def scenes(collection):
    """Test records of the shapes source with all columns that tasks need, and a training record."""
    config = ShapesConfig(count=9, letters=0.3, edits=1.0, conditions=1.0, seed=1)
    pack(shapes.rows(config, paths.RAW), paths.RAW, 32)
    frame = read_manifest(paths.RAW).assign(width=64, height=64, split="test")
    frame.loc[len(frame) - 1, "split"] = "train"
    write_validated(frame[VALIDATED_SCHEMA.names].to_dict("records"))


def test_every_task_is_measured_with_calibrations_and_is_reproduced(scenes):
    evaluate.run(CONFIG)
    record = Record.read(paths.EVALUATION)
    for task in TASKS.values():
        assert task.score in record.scores, task.score
    means = {name for name in record.intervals if name.split("/")[0] in ("edit", "layout", "condition", "write", "reasoning", "infill")}
    assert {"bleu_4", "fd_encoder", "kd_encoder"} <= set(record.intervals)
    assert {"edit/done", "edit/kept", "edit/psnr_outside", "layout/iou", "condition/agreement", "infill/composition"} <= means
    assert record.calibration["edit/done_and_kept_real"] == 1 > record.calibration["edit/done_and_kept_unchanged"] == 0
    assert record.calibration["layout/iou_real"] > 0.8 and record.calibration["write/text_real"] == 1
    assert record.calibration["condition/agreement_real"] > record.calibration["condition/agreement_other_images"] + 0.2
    assert set(record.contract["tasks"]) == {*MEASURES, "infill"}
    sheets = {path.stem for path in paths.EVALUATION.glob("*.png")}
    assert {*MEASURES, "infill", "samples", "captions", "vqa"} == sheets
    assert {"clip_score_one_candidate", "composition_one_candidate"} <= set(record.calibration)
    assert record.scores.keys() - record.intervals.keys() == {"composition/prompts"}
    assert (paths.EVALUATION / "confusions.csv").read_text().startswith("attribute,stated,drawn,count\n")

    # The record is reproduced; a changed score is found; records of other code or models are refused.
    count, differing = evaluation.reproduce(Config(), paths.EVALUATION / "record.json")
    assert count == len(record.scores) + len(record.calibration) and differing == []
    saved = json.loads((paths.EVALUATION / "record.json").read_text())
    saved["scores"]["edit/kept"] += 0.1
    Path("changed.json").write_text(json.dumps(saved))
    [(name, recorded, again)] = evaluation.reproduce(Config(), Path("changed.json"))[1]
    assert name == "edit/kept" and recorded == pytest.approx(again + 0.1)
    saved["settings"]["evaluate"]["lasers"] = 3
    Path("alien.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"alien\.json was made by other code.*lasers"):
        evaluation.reproduce(Config(), Path("alien.json"))
    (paths.TEXT_TOKENIZER / "tokenizer.json").write_text((paths.TEXT_TOKENIZER / "tokenizer.json").read_text() + " ")
    with pytest.raises(UserError, match="other models: models/text_tokenizer changed since"):
        evaluation.reproduce(Config(), Path("changed.json"))


def test_tasks_that_a_model_was_not_tuned_for_are_not_measured(collection, capsys):
    collection(3)
    Training(frozenset({"caption", "edit"}), True).write(paths.FINETUNED)
    (paths.EVALUATION / "vqa.png").write_bytes(b"of another model")
    evaluate.run(CONFIG)
    record = Record.read(paths.EVALUATION)
    assert "cider" in record.scores and not {"composition", "clip_score", "vqa_accuracy"} & set(record.scores)
    assert {path.stem for path in paths.EVALUATION.glob("*.png")} == {"captions"}
    assert not (paths.EVALUATION / "confusions.csv").exists()
    assert "edit: not measured, no test record" in capsys.readouterr().out
    assert record.contract["tasks"]["edit"]["count"] == 0


@pytest.mark.parametrize("weights", ["nowhere.pth", "broken.pth", "download"])
def test_inception_that_cannot_be_loaded_is_an_error_before_anything_is_generated(collection, monkeypatch, weights):
    collection(1)
    Path("broken.pth").write_bytes(b"no weights")
    monkeypatch.setattr(inception, "URL", Path("broken.pth").absolute().as_uri())
    monkeypatch.setattr(evaluation, "text_to_image", lambda *arguments: pytest.fail("generated"))
    config = CONFIG.model_copy(update={"evaluate": CONFIG.evaluate.model_copy(update={"inception": weights})})
    with pytest.raises(UserError, match=rf"evaluate\.inception {weights}"):
        evaluate.run(config)
    assert not list(inception.CACHE.glob("*.pth"))


def test_test_records_that_are_also_in_training_are_refused(scenes):
    frame = read_manifest(paths.VALIDATED)
    frame.loc[1, ["image", "split"]] = [str(frame.loc[0, "image"]), "train"]
    write_validated(frame[VALIDATED_SCHEMA.names].to_dict("records"))
    with pytest.raises(LeakageError, match="near-duplicates of training images"):
        evaluate.run(CONFIG)


def test_of_several_processes_the_first_compares_the_test_records_with_training(scenes, monkeypatch):
    frame = read_manifest(paths.VALIDATED)
    frame.loc[1, ["image", "split"]] = [str(frame.loc[0, "image"]), "train"]
    write_validated(frame[VALIDATED_SCHEMA.names].to_dict("records"))

    class CheckedError(Exception):
        pass

    def sample(*_: object) -> None:
        raise CheckedError

    monkeypatch.setattr(World, "wait", lambda self: None)
    monkeypatch.setattr(evaluation, "sample_prompts", sample)
    for rank, error in ((0, LeakageError), (1, CheckedError)):
        with pytest.raises(error):
            evaluation.evaluate(CONFIG, paths.EVALUATION, processes=World(rank, 2))


def test_prompts_that_stand_in_training_have_scores_of_their_own(scenes):
    frame = read_manifest(paths.VALIDATED)
    test = frame[frame["split"] == "test"].index
    known = frame.loc[test[:4], "captions"].sum()
    frame.at[frame.index[-1], "captions"] = known  # of the training record
    write_validated(frame[VALIDATED_SCHEMA.names].to_dict("records"))
    section = CONFIG.evaluate.model_copy(update={"prompts": 40})
    evaluate.run(CONFIG.model_copy(update={"evaluate": section}))
    record = Record.read(paths.EVALUATION)
    seen, unseen = (set(record.outcomes[name]) for name in ("clip_score_seen_prompts", "clip_score"))
    assert seen and unseen and not seen & unseen and seen <= set(frame.loc[test, "id"])
    assert set(frame.loc[test[:4], "id"]) & unseen == set()
    counts = record.contract["counts"]
    assert (counts["prompts"], counts["seen_prompts"]) == (len(seen) + len(unseen), len(seen)) and record.scores[
        "composition/prompts"
    ] == len(unseen)
    assert set(record.outcomes["composition_seen_prompts"]) == seen and "composition_seen_prompts_reconstructions" in record.calibration


def test_prompts_of_new_combinations_have_scores_of_their_own(scenes):
    frame = read_manifest(paths.VALIDATED)
    test = frame[frame["split"] == "test"].index
    captions = frame["captions"].tolist()
    captions[:2] = [["A red ring."], ["A blue ring."]]
    named = {pair for texts in captions[2:-1] for text in texts for pair in combinations(parse_caption(text))}
    assert named and not named & {("red", "ring"), ("blue", "ring")}
    captions[-1] = ["A {} {}.".format(*pair) if len(pair) == 2 else "A {} {} a {}.".format(*pair) for pair in named]  # of training
    frame = frame.assign(captions=captions)
    write_validated(frame[VALIDATED_SCHEMA.names].to_dict("records"))
    section = CONFIG.evaluate.model_copy(update={"prompts": 40})
    evaluate.run(CONFIG.model_copy(update={"evaluate": section}))
    record = Record.read(paths.EVALUATION)
    assert set(record.outcomes["composition_new_combinations"]) == set(frame.loc[test[:2], "id"])
    assert not set(record.outcomes["composition"]) & set(record.outcomes["composition_new_combinations"])
    assert record.contract["counts"]["new_combinations"] == 2


def test_where_every_prompt_stands_in_training_there_are_scores_of_seen_prompts_only(collection, capsys):
    collection(3, training=["A blue square.", TOO_LONG])
    evaluate.run(CONFIG)
    record = Record.read(paths.EVALUATION)
    assert len(record.outcomes["clip_score_seen_prompts"]) == 3 and "clip_score" not in record.scores
    assert "every prompt stands in training" in capsys.readouterr().out
    assert (paths.EVALUATION / "samples.png").is_file()


def test_test_images_like_one_of_training_are_left_out(collection):
    collection(6)
    encoder, bank = Encoder.load(paths.ENCODER), MemoryBank.load(paths.INDEX)
    test = read_manifest(paths.VALIDATED, "test")
    images = [
        fit_square(ImageStore(paths.RAW).open(ref), ImageTokenizer.load(paths.IMAGE_TOKENIZER).spec.image_size) for ref in test["image"]
    ]
    nearest = (encoder.encode_images(images) @ bank.image.astype(np.float32).T).max(1)
    limit = float(np.sort(nearest)[2:4].mean())
    assert nearest.min() < limit < nearest.max()

    def evaluated(limit: float) -> Record:
        section = CONFIG.evaluate.model_copy(update={"max_training_similarity": limit, "prompts": 6})
        evaluate.run(CONFIG.model_copy(update={"evaluate": section}))
        return Record.read(paths.EVALUATION)

    assert set(evaluated(limit).outcomes["clip_score"]) == set(test["id"][nearest <= limit])
    with pytest.raises(UserError, match=r"all 6 test images are like one of training.*evaluate\.max_training_similarity"):
        evaluated(float(nearest.min()) - 0.01)


def test_processes_leave_out_the_same_records_of_which_each_has_compared_a_part(collection, monkeypatch):
    collection(7)
    encoder, test = Encoder.load(paths.ENCODER), read_manifest(paths.VALIDATED, "test")
    store, size = ImageStore(paths.RAW), ImageTokenizer.load(paths.IMAGE_TOKENIZER).spec.image_size
    nearest = encoder.encode_images([fit_square(store.open(ref), size) for ref in test["image"]]) @ MemoryBank.load(paths.INDEX).image.T
    limit = float(np.sort(nearest.max(1))[2:4].mean())
    known = {rank: [False] * len(range(7)[World(rank, 3).part(7)]) for rank in range(3)}

    def gather(self: World, value: list[bool]) -> list[list[bool]]:
        known[self.rank] = value
        return [known[rank] for rank in range(self.size)]

    def left(processes: World) -> list[str]:
        return evaluation._unlike_training(test, store, encoder, size, limit, processes)["id"].tolist()

    alone = left(World())
    monkeypatch.setattr(World, "gather", gather)
    last = [left(World(rank, 3)) for rank in range(3)][-1]
    assert last == alone == left(World(0, 3)) and 0 < len(alone) < 7


def test_a_single_test_record_is_measured(collection, monkeypatch):
    collection(1)
    read = {}

    def reading(path: Path, split: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        read[split] = read_manifest(path, split, columns)
        return read[split]

    monkeypatch.setattr(evaluation, "read_manifest", reading)
    evaluate.run(CONFIG)
    record = Record.read(paths.EVALUATION)
    assert set(read["train"].columns) == {"id", "captions", "questions"}, "of many records, in each process"
    assert {"clip_score", "vqa_accuracy"} <= set(record.scores) and "fd_encoder" not in record.scores
    assert not [name for name in record.calibration if "other" in name]


def test_the_contract_covers_what_was_captioned():
    def contract(ids: list[str], references: list[list[str]]) -> dict:
        captioned = pd.DataFrame({"id": ids, "captions": references})
        rows = pd.DataFrame({"id": ["a"], "prompt": ["p"], "kind": ["unseen"]})
        return evaluation.contract(CONFIG, rows, captioned, [], 32, 64, "encoder", None)

    base = contract(["a", "b"], [["x"], ["y"]])
    changes = {
        ("captioned",): contract(["a", "c"], [["x"], ["y"]]),
        ("references",): contract(["a", "b"], [["x"], ["y", "z"]]),
        ("captioned", "counts", "references"): contract(["a"], [["x"]]),
    }
    for names, other in changes.items():
        assert {name for name in base if base[name] != other[name]} == set(names)
