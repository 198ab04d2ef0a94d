"""``cm3leon gc`` on a real store: old versions go, and never a champion."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from registry_support import CONFIG, aliases, evaluated, released

from cm3leon.config import paths
from cm3leon.registry import cleaning, ledger, registry
from cm3leon.registry.cleaning import KEEP_RUN_DAYS, CleaningError, Garbage, clean, kept_versions
from cm3leon.registry.registry import Version, find_bundle
from cm3leon.services.disk import tree_size
from cm3leon.services.local import free_port
from cm3leon.tracking import store
from cm3leon.training.checkpoint import Checkpoints
from cm3leon.utils.processes import stop_tree

pytestmark = pytest.mark.slow


@pytest.fixture
def project_with_dvc(stages: Path) -> Path:
    """The project with the outputs of all stages, and DVC without a git repository."""
    Path(".dvc").mkdir()
    Path(".dvc/config").write_text("[core]\n    analytics = false\n    no_scm = true\n    site_cache_dir = .cache/dvc\n")
    return stages


def test_the_newest_those_with_an_alias_former_champions_and_those_that_wait_are_kept() -> None:
    versions = [Version(str(n), "run", datetime.now(UTC), aliases=["champion"] if n == 2 else []) for n in range(9, 0, -1)]
    entries = [
        ledger.Entry("reject", "6", "2"),
        ledger.Entry("propose", "6", "2"),
        ledger.Entry("gate", "5", "2", "held back"),
        ledger.Entry("propose", "5", "2"),
        ledger.Entry("gate", "5", "2", "held back"),
        ledger.Entry("rollback", "2", "4"),
        ledger.Entry("promote", "4", "2", "passed"),
        ledger.Entry("promote", "2", None, "passed"),
    ]
    assert [v.number for v in kept_versions(versions, entries, keep=2)] == ["9", "8", "5", "4", "2"]
    assert [v.number for v in kept_versions(versions, entries, keep=0)] == ["5", "4", "2"]


def test_dropped_versions_deleted_runs_and_old_checkpoints_are_gone_and_their_bytes_are_free(project_with_dvc: Path) -> None:
    for composition in (0.5, 0.3, 0.6, 0.2, 0.1):  # 1 and 3 become the champion, the others are held back
        released(composition)
    assert aliases() == {"champion": 3, "previous_champion": 1, "challenger": 5}
    client = registry.connect()
    experiment = client.get_experiment_by_name("cm3leon").experiment_id
    abandoned = client.create_run(experiment).info.run_id
    client.log_text(abandoned, "x" * 10_000, "notes.txt")
    client.delete_run(abandoned)
    old, recent, last = (training_run(days) for days in (KEEP_RUN_DAYS + 2, KEEP_RUN_DAYS - 1, 0))
    alone = training_run(KEEP_RUN_DAYS + 2, stage="pretrain")
    entries = registry_ledger()

    before = tree_size(Path("mlruns")) + tree_size(Path("models"))
    planned = list(clean(keep=1, dry_run=True))
    assert [item.what for item in planned] == ["version 4", "version 2", f"deleted run {abandoned}", f"checkpoints {old}"]
    assert planned[2:] == [Garbage(f"deleted run {abandoned}", 10_000), Garbage(f"checkpoints {old}", tree_size(old))]
    assert tree_size(old) > 5_000
    assert tree_size(Path("mlruns")) + tree_size(Path("models")) == before
    assert len(registry.status()) == 5

    assert list(clean(keep=1)) == planned
    assert [version.number for version in registry.status()] == ["5", "3", "1"]
    assert before - tree_size(Path("mlruns")) - tree_size(Path("models")) == sum(item.size for item in planned)
    assert [bool(list(run.glob("step-*"))) for run in (old, recent, last, alone)] == [False, True, True, True]
    assert aliases() == {"champion": 3, "previous_champion": 1, "challenger": 5}
    for version in ("1", "3", "5"):
        assert (find_bundle(f"models:/cm3leon/{version}") / "model.safetensors").is_file()
    assert registry_ledger() == entries
    assert list(clean(keep=1)) == []


def test_runs_of_a_deleted_experiment_go_in_several_calls_too(project_with_dvc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "RUNS_AT_ONCE", 1)
    released(0.5)
    client = registry.connect()
    known = client.get_experiment_by_name("cm3leon").experiment_id
    deleted = client.create_experiment("abandoned")
    runs = [client.create_run(experiment).info.run_id for experiment in (deleted, known, deleted)]
    client.delete_run(runs[1])
    client.delete_experiment(deleted)
    assert {item.what for item in clean(keep=1)} == {f"deleted run {run}" for run in runs}
    assert list(clean(keep=1)) == []


def training_run(days: float, stage: str = "sft") -> Path:
    """The directory of an unfinished training run that wrote its only checkpoint some days ago."""
    run = Checkpoints(paths.CHECKPOINTS / stage, {"days": str(days)}, 1)
    run.open()
    run.save(1, {"w": torch.ones(1000)}, {"score": None, "text": "x" * 1000})
    then = time.time() - days * 24 * 3600
    os.utime(run.directory, (then, then))
    return run.directory


def registry_ledger() -> list[ledger.Entry]:
    return ledger.read(registry.connect())


@pytest.fixture
def server(project_with_dvc: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an MLflow server on the project's store, which the project uses."""
    address = f"http://127.0.0.1:{free_port(5600)}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store.tracking_uri(), "--workers", "1"]
    command += ["--default-artifact-root", Path("mlruns").absolute().as_uri(), "--host", "127.0.0.1", "--port", address.rpartition(":")[2]]
    with Path("server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **store.SETTINGS})
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, Path("server.log").read_text()
                time.sleep(0.2)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        yield address
    finally:
        stop_tree(process.pid)
        process.wait()


def test_on_a_server_versions_are_marked_and_their_files_are_left_to_its_host(server: str) -> None:
    for composition in (0.5, 0.3, 0.6):
        released(composition)
    size = tree_size(Path("mlruns"))
    expected = [Garbage("version 2; its files go by mlflow gc on the server's host", 0)]
    assert list(clean(keep=1, dry_run=True)) == expected
    assert list(clean(keep=1)) == expected
    assert [version.number for version in registry.status()] == ["3", "1"]
    assert tree_size(Path("mlruns")) == size
    assert list(clean(keep=1)) == []


def test_former_champions_are_known_although_the_ledger_was_deleted(project_with_dvc: Path) -> None:
    for composition in (0.5, 0.3, 0.6, 0.7):  # 1, 3 and 4 become the champion; only 3 and 4 have an alias
        released(composition)
    client = registry.connect()
    entries = registry_ledger()
    client.delete_experiment(client.get_experiment_by_name(ledger.EXPERIMENT).experiment_id)
    assert [item.what for item in clean(keep=0)] == ["version 2"]
    assert [version.number for version in registry.status()] == ["4", "3", "1"]
    assert registry_ledger() == entries


def test_nothing_is_removed_while_the_champions_run_or_model_is_deleted(project_with_dvc: Path) -> None:
    """MLflow's own gc would make the deletion final."""
    for composition in (0.5, 0.3, 0.6):
        released(composition)
    client = registry.connect()
    champion = client.get_model_version_by_alias("cm3leon", "champion")
    client.delete_run(champion.run_id)
    with pytest.raises(CleaningError, match=rf"the run of version 3, which is kept, .*mlflow runs restore --run-id {champion.run_id}"):
        list(clean(keep=0))
    client.restore_run(champion.run_id)
    model = champion.source.removeprefix("models:/")
    client.delete_logged_model(model)
    with pytest.raises(CleaningError, match="the model of version 3, which is kept"):
        list(clean(keep=0))
    assert [version.number for version in registry.status()] == ["3", "2", "1"]
    assert any(Path("mlruns/models", model).rglob("model.safetensors"))


def test_a_kept_version_whose_lock_is_not_known_protects_the_cache(project_with_dvc: Path) -> None:
    Path("dvc.lock").write_text("stages: {}\n")
    bundle = evaluated(0.5)
    (bundle.path / "dvc.lock").unlink()
    registry.register(bundle, CONFIG)
    with pytest.raises(CleaningError, match=r"version 1 is kept, but was registered without its dvc\.lock"):
        list(clean())
