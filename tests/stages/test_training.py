"""The stage ``pretrain`` by its command: how it resumes from another run's checkpoints on request, and what tells of it."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner, Result

from cm3leon.cli import app
from cm3leon.config import paths
from cm3leon.config.profiles import configure
from cm3leon.config.schema import SFTConfig
from cm3leon.data.manifest import VALIDATED_SCHEMA
from cm3leon.data.tokens import TokenStore, write_tokens
from cm3leon.models.decoder import Decoder
from cm3leon.tracking import store
from cm3leon.training.instruction_tuning import task_samples
from cm3leon.utils.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ["model.layers=1", "model.width=32", "model.context=160", "batch_size=2", "validation_samples=2", "neighbors=none"]


@pytest.fixture
def trained(stages: Path) -> Path:
    """A project in which ``pretrain`` has run four steps; the directory of its run."""
    documents = [TokenStore(paths.TOKENS, ["train"])[row] for row in range(2)]
    write_tokens(paths.TOKENS, "val", documents, len(documents[0].codes), 100)
    paths.NEIGHBORS.mkdir(parents=True)
    assert pretrain(4).exit_code == 0
    [run] = (paths.CHECKPOINTS / "pretrain").iterdir()
    return run


def pretrain(steps: int, *arguments: str) -> Result:
    changes = [f"pretrain.{change}" for change in [*SMALL, f"steps={steps}", "retrieved_documents=[1.0]"]]
    configure("tiny", changes, configs=CONFIGS)
    return CliRunner().invoke(app.app, ["pretrain", *arguments])


def losses() -> list[str]:
    return (paths.PRETRAINED / "losses.csv").read_text().splitlines()[1:]


def test_pretraining_resumes_from_another_run_on_request_and_records_it(trained: Path) -> None:
    first = losses()
    refused = pretrain(6, "--resume-from", str(trained))
    assert isinstance(refused.exception, UserError)
    assert str(refused.exception).endswith("add --accept-changes:\n  pretrain.steps: 4 then, 6 now")

    resumed = pretrain(6, "--resume-from", str(trained), "--accept-changes")
    assert resumed.exit_code == 0, resumed.exception
    assert "pretrain.steps: 4 then, 6 now" in resumed.stdout and "pretrain: resuming at step 4 of 6" in resumed.stdout
    assert losses()[:4] == first and len(losses()) == 6
    [entry] = json.loads(paths.resumed_file("pretrain").read_text())
    assert entry == {"checkpoint": f"{trained}/step-00000004", "step": 4, "differences": ["pretrain.steps: 4 then, 6 now"]}
    run_id = json.loads(paths.run_file("pretrain").read_text())["run_id"]
    tags = MlflowClient(store.tracking_uri()).get_run(run_id).data.tags
    assert tags["resumed_from"] == entry["checkpoint"] and json.loads(tags["resumed_differences"]) == [entry]

    # As the flow runs it, which knows nothing of the run by hand: the same model, without training.
    weights = (paths.PRETRAINED / "model.safetensors").read_bytes()
    again = pretrain(6)
    assert again.exit_code == 0 and "pretrain: resuming at step 6 of 6" in again.stdout
    assert (paths.PRETRAINED / "model.safetensors").read_bytes() == weights
    assert json.loads(paths.resumed_file("pretrain").read_text()) == [entry]


def test_a_stage_that_failed_to_write_its_model_resumes_at_the_last_step(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Decoder, "save", full)
        assert isinstance(pretrain(6).exception, OSError)
    again = pretrain(6)
    assert again.exit_code == 0 and "pretrain: resuming at step 6 of 6" in again.stdout
    assert len(losses()) == 6


def write_weights(**weights: float) -> None:
    """Set the column ``weight`` of the manifest; 1 for the documents that are not named."""
    file = paths.VALIDATED / "manifest.parquet"
    rows = [{**row, "weight": weights.get(row["id"], 1.0)} for row in pq.read_table(file).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=VALIDATED_SCHEMA), file)


def test_training_sees_documents_as_often_as_the_manifest_says(trained: Path) -> None:
    first = losses()
    write_weights()
    assert pretrain(4).exit_code == 0 and losses() == first
    write_weights(a=0.01, b=20.0)
    assert pretrain(4).exit_code == 0 and losses() != first

    tokens, model, section = TokenStore(paths.TOKENS, ["train"]), Decoder.load(paths.FINETUNED), SFTConfig(neighbors="none")
    weights = task_samples("train", tokens, model, section, 0).weights
    assert weights is not None
    assert dict(zip(tokens.ids, weights.values.tolist(), strict=True)) == pytest.approx({"a": 0.01, "b": 20.0, "c": 1.0, "d": 1.0})
    rows = [{**row, "split": "val"} for row in pq.read_table(paths.VALIDATED / "manifest.parquet").to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=VALIDATED_SCHEMA), paths.VALIDATED / "manifest.parquet")
    held_out = task_samples("val", TokenStore(paths.TOKENS, ["val"]), model, section, 0)
    assert held_out.weights is None and len(held_out) == 2


def test_accept_changes_alone_is_refused(project: Path) -> None:
    assert str(pretrain(4, "--accept-changes").exception) == "--accept-changes belongs to --resume-from DIR"
