"""The stages that do not train in two processes: the outputs of one."""

import json
import math
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes_support import Job, run_stages

from cm3leon.config import paths
from cm3leon.config.ingest_schema import ShapesConfig
from cm3leon.config.profiles import configure
from cm3leon.config.schema import LaunchConfig
from cm3leon.data.images import fit_square
from cm3leon.data.manifest import VALIDATED_SCHEMA, ImageStore, read_manifest
from cm3leon.data.packing import pack
from cm3leon.data.thumbnails import thumbnail_of, write_thumbnails
from cm3leon.evaluation.record import Record
from cm3leon.generation.generator import Generator
from cm3leon.registry import promotion, registry
from cm3leon.registry.bundle import build_bundle
from cm3leon.retrieval.vectors import IMAGES, TEXTS
from cm3leon.scenes import source as shapes
from cm3leon.services.local import free_port
from cm3leon.stages import evaluate, index, ingest, tokenize, validate
from cm3leon.stages.common import STAGES
from cm3leon.tracking import runs
from cm3leon.utils.errors import UserError

ROOT = Path(__file__).parents[2]
TEST = 11
CHANGES = [
    "launch.processes=2", "tokenize={batch_size: 4, shard_documents: 7}", "index.batch_size=4",
    "decoding={candidates: 2, retrieved_documents: 1, max_text_tokens: 4}",
    "evaluate={prompts: 5, captions: 5, questions: 7, tasks: 3, sheet: 2, bootstrap: 10, max_training_similarity: null}",
]  # fmt: skip


@pytest.fixture
def collection(stages):
    """Scenes with all columns that tasks need, the first eleven of the test split; and untrained models."""
    config = ShapesConfig(count=40, letters=0.3, edits=0.5, conditions=0.5, seed=1)
    pack(shapes.rows(config, paths.RAW), paths.RAW, 32)
    frame = read_manifest(paths.RAW).assign(width=64, height=64)
    frame["split"] = np.where(np.arange(len(frame)) < TEST, "test", "train")
    pq.write_table(
        pa.Table.from_pylist(frame[VALIDATED_SCHEMA.names].to_dict("records"), schema=VALIDATED_SCHEMA),
        paths.VALIDATED / "manifest.parquet",
    )
    store = ImageStore(paths.RAW)
    write_thumbnails(paths.VALIDATED, frame["id"].tolist(), [thumbnail_of(fit_square(store.open(ref), 32)) for ref in frame["image"]])
    return configure("tiny", CHANGES, configs=ROOT / "configs", params=Path("params.yaml"))


@pytest.mark.slow
def test_two_processes_write_what_one_writes(collection, monkeypatch):
    """Tokens are the same files. Embeddings and generated images are made in other batches, so that scores agree but for rounding."""
    monkeypatch.setattr(runs, "stage_run", lambda stage, config: nullcontext(runs.Run()))
    one = [stage.run(collection) for stage in (tokenize, index, evaluate)]
    outputs = (paths.TOKENS, paths.INDEX, paths.EVALUATION)
    for path in outputs:
        shutil.move(path, Path("one") / path)
    shutil.copytree(Path("one") / paths.TOKENS, paths.TOKENS)
    (paths.TOKENS / "train-00099.arrow").touch()  # of a longer run before
    for stage in ("tokenize", "index", "evaluate"):
        done = subprocess.run([sys.executable, "-m", "cm3leon", stage], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        metrics = json.loads(done.stdout.splitlines()[-1].removeprefix("metrics: "))
        assert {"seconds", "peak_megabytes"} < metrics.keys() and one[0].keys() <= metrics.keys(), "once, by the first process"
        assert {name: metrics[name] for name in one[0]} == pytest.approx(one.pop(0), rel=0.02, abs=0.02)

    shards = [sorted((folder / paths.TOKENS).iterdir()) for folder in (Path(), Path("one"))]
    assert [path.name for path in shards[0]] == [path.name for path in shards[1]] and len(shards[0]) > 6
    assert all(ours.read_bytes() == other.read_bytes() for ours, other in zip(*shards, strict=True))
    for name in (TEXTS, IMAGES):
        ours, other = (np.load(folder / paths.INDEX / name) for folder in (Path(), Path("one")))
        assert ours.shape == other.shape and np.abs(other).max() > 0.1
        np.testing.assert_allclose(ours, other, atol=2e-3)
    documents = [pd.read_parquet(folder / paths.INDEX / "documents.parquet") for folder in (Path(), Path("one"))]
    pd.testing.assert_frame_equal(*documents)
    ours, other = (Record.read(folder / paths.EVALUATION) for folder in (Path(), Path("one")))
    assert ours.contract == other.contract and ours.scores.keys() == other.scores.keys()
    assert {name: list(values) for name, values in ours.outcomes.items()} == {name: list(values) for name, values in other.outcomes.items()}
    assert ours.scores == pytest.approx(other.scores, rel=0.02, abs=0.02)
    assert {path.name for path in paths.EVALUATION.iterdir()} == {path.name for path in (Path("one") / paths.EVALUATION).iterdir()}

    # The record of two processes is reproduced by two, to the last digit.
    done = subprocess.run(
        [sys.executable, "-m", "cm3leon", "evaluate", "--reproduce", str(paths.EVALUATION / "record.json")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    count = len(ours.scores) + len(ours.calibration)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"{count} of {count} scores of {paths.EVALUATION}/record.json agree")


@pytest.mark.slow
def test_the_gate_evaluates_a_version_in_as_many_processes_as_the_stage(collection, monkeypatch):
    monkeypatch.setattr(runs, "stage_run", lambda stage, config: nullcontext(runs.Run()))
    for stage in (tokenize, index, evaluate):
        stage.run(collection)
    version = registry.register(build_bundle(Path("bundle"), collection), collection)
    # Not what params.yaml says: a champion is measured again with the settings of its record.
    again = collection.model_copy(update={"evaluate": collection.evaluate.model_copy(update={"captions": 2, "questions": 4})})
    one = promotion.evaluate_version(version, again.model_copy(update={"launch": LaunchConfig(processes=1)}), Path("one"))
    assert (one.contract["counts"]["captioned"], one.contract["counts"]["questions"]) == (2, 4)

    monkeypatch.setattr(Generator, "from_bundle", lambda path: pytest.fail("in this process"))
    two = promotion.evaluate_version(version, again, Path("two"))
    assert two.contract == one.contract and two.scores == pytest.approx(one.scores, rel=0.02, abs=0.02)
    assert {path.name for path in Path("two").iterdir()} == {path.name for path in Path("one").iterdir()}

    (paths.VALIDATED / "manifest.parquet").unlink()
    with pytest.raises(UserError, match=r"evaluation of models:/cm3leon/1 failed: error: .*manifest"):
        promotion.evaluate_version(version, again, Path("two"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_rehearsal_of_a_profile_for_gpus_runs_in_two_processes(tmp_path, monkeypatch):
    """In bfloat16, with packing, micro-batches and checkpointing as on GPUs; each stage reads what those before it wrote."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "stage_run", lambda stage, config: nullcontext(runs.Run()))
    config = configure("gpu", configs=ROOT / "configs", params=Path("params.yaml"), rehearse=True)
    assert (config.launch.processes, config.pretrain.precision, config.sft.precision) == (2, "bf16", "bf16")
    ingest.run(config)
    validate.run(config)
    ports = {stage: free_port(0) for stage in STAGES if stage not in ("ingest", "validate")}
    status, output = Job(run_stages, tmp_path, ports, output=tmp_path / "log", count=2).wait(240)
    assert status == 0, output
    record = Record.read(paths.EVALUATION)
    assert {"composition", "cider", "vqa_accuracy", "clip_score", "infill/composition"} <= record.scores.keys()
    assert all(math.isfinite(score) for score in record.scores.values())
