"""A backup that is restored elsewhere: the same registry, ledger and password, and models that generate; nothing is replaced unasked."""

from __future__ import annotations

import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from registry_support import released

from cm3leon.registry import promotion, registry
from cm3leon.services import backup, stack
from cm3leon.services.backup import BackupError
from cm3leon.tracking.store import experiment_id_of, tracking_uri
from cm3leon.utils.processes import identity

FILES = {"params.yaml": "profile: tiny\n", "dvc.lock": "stages: {}\n", ".dvc/config.local": "[core]\n", "dvc.yaml": "stages: {}\n"}
STATE = """
import hashlib
from cm3leon.generation.generator import Generator
from cm3leon.registry import promotion, registry
from cm3leon.services import stack
[[image]] = Generator.from_bundle(registry.fetch_bundle()).text_to_image(["a red circle"], candidates=2, retrieved_documents=1)
print(registry.status(), promotion.history(), hashlib.md5(image.image.tobytes()).hexdigest(), stack.password())
"""
REJECT = """
from cm3leon.registry import promotion
promotion.reject("1", "a test")
"""


def python(*code: str) -> str:
    """What a new process prints: MLflow remembers where the artifacts of a run are."""
    done = subprocess.run([sys.executable, "-c", "".join(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def git(*arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=me", "-c", "user.email=me@here", *arguments], check=True)


@pytest.fixture
def copied(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """A function that backs the project up, with its files and a password."""
    for name, text in FILES.items():
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text(text)
    stack.password()
    target = tmp_path_factory.mktemp("backups") / "monday"

    def copy() -> Path:
        assert list(backup.backup(target))[0] == Path("mlflow.db")
        return target

    return copy


@pytest.fixture
def clone(copied: Callable[[], Path], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh clone at another path, with the committed parameters, as working directory."""
    root = tmp_path_factory.mktemp("fresh clone")
    monkeypatch.chdir(root)
    git("init", "--quiet")
    for name in ("dvc.yaml", "params.yaml"):
        Path(name).write_text("# as committed\n")
    Path(".gitignore").write_text("config.local\n")
    git("add", "--all")
    git("commit", "--quiet", "--no-verify", "-m", "clone")
    return root


@pytest.mark.slow
def test_the_restored_project_has_the_same_registry_and_generates(
    stages: Path, copied: Callable[[], Path], clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(stages)
    released(0.5)
    client = registry.connect()
    client.create_run(experiment_id_of(client, tracking_uri()))  # at work
    entries = len(promotion.history())
    capsys.readouterr()
    exec(STATE, {})
    before = capsys.readouterr().out
    copy = copied()
    monkeypatch.chdir(clone)
    (stages / "mlruns").rename(stages / "gone")  # nothing may come from there
    list(backup.restore(copy))
    assert python(STATE, REJECT) == before
    assert stat.S_IMODE(copy.stat().st_mode) == 0o700
    assert stat.S_IMODE(stack.SECRETS.stat().st_mode) == stat.S_IMODE((copy / stack.SECRETS).stat().st_mode) == 0o600
    assert {name: Path(name).read_text() for name in FILES} == {**FILES, "dvc.yaml": "# as committed\n"}
    assert addresses_below(stages) == []

    # The copy was worked with, and the run that was at work in the original is not at work here.
    client = registry.connect()
    assert client.search_runs([experiment_id_of(client, tracking_uri())], "attributes.status = 'RUNNING'") == []
    assert len(promotion.history()) == entries + 1 and not (stages / "mlruns").exists()


def test_what_the_original_had_planned_does_not_run_in_the_copy(
    project: Path, copied: Callable[[], Path], clone: Path, prepared_prefect: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    Path(".prefect").mkdir(mode=0o700)
    shutil.copyfile(prepared_prefect, ".prefect/prefect.db")
    with closing(sqlite3.connect(".prefect/prefect.db")) as connection, connection:
        insert(connection, "flow", id="f", name="cm3leon")
        insert(connection, "deployment", id="d", flow_id="f", name="nightly")
        insert(connection, "deployment_schedule", id="s", deployment_id="d", active=1, schedule='{"interval": 86400}')
        for name, kind, start in (
            ("planned", "SCHEDULED", None),
            ("resumed", "SCHEDULED", "2026-01-01"),
            ("waits", "PAUSED", "2026-01-01"),
        ):
            insert(connection, "flow_run", id=name, flow_id="f", deployment_id="d", name=name, state_type=kind, start_time=start)
            insert(connection, "flow_run_state", id=f"state {name}", flow_run_id=name, type=kind, name=kind)
    copy = copied()
    monkeypatch.chdir(clone)
    assert stat.S_IMODE((copy / ".prefect").stat().st_mode) == 0o700
    (copy / ".prefect").chmod(0o755)  # as backups of earlier versions have it
    list(backup.restore(copy))
    assert stat.S_IMODE((clone / ".prefect").stat().st_mode) == 0o700
    with closing(sqlite3.connect(".prefect/prefect.db")) as connection:
        assert connection.execute("SELECT active FROM deployment_schedule").fetchall() == [(0,)]
        for column, table in (("id", "flow_run"), ("flow_run_id", "flow_run_state")):
            assert sorted(connection.execute(f"SELECT {column} FROM {table}")) == [("resumed",), ("waits",)]


def insert(connection: sqlite3.Connection, table: str, **values: object) -> None:
    """Insert a row; other columns that must have a value have an empty one."""
    for _, name, kind, required, default, _ in connection.execute(f"PRAGMA table_info({table})").fetchall():
        if required and default is None:
            values.setdefault(name, 0 if kind in ("INTEGER", "BOOLEAN", "FLOAT") else "{}")
    connection.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})", tuple(values.values()))


def addresses_below(root: Path) -> list[str]:
    """Columns of the store with addresses of artifacts below another project's root."""
    found = []
    with closing(sqlite3.connect("mlflow.db")) as connection:
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for column in [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]:
                query = f"SELECT 1 FROM {table} WHERE {column} LIKE ?"
                if connection.execute(query, (f"%{(root / 'mlruns').as_uri()}%",)).fetchone():
                    found.append(f"{table}.{column}")
    return found


@pytest.mark.parametrize(
    "name", ["mlflow.db", ".prefect/prefect.db", ".services/secrets.json", "params.yaml", "dvc.lock", ".dvc/config.local"]
)
def test_nothing_is_replaced_that_is_kept_nowhere_else(
    name: str, project: Path, copied: Callable[[], Path], clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    copy = copied()
    monkeypatch.chdir(clone)
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("mine")
    with pytest.raises(BackupError, match="would be replaced; restore into a fresh clone, or stop the services and move these away"):
        list(backup.restore(copy))
    assert Path(name).read_text() == "mine" and not Path("mlruns").exists()


def test_a_database_in_use_is_copied_with_all_that_was_committed_and_nothing_else(project: Path, tmp_path: Path) -> None:
    Path(".prefect").mkdir()
    with closing(sqlite3.connect(".prefect/prefect.db")) as writer:
        writer.execute("PRAGMA journal_mode = WAL")  # as Prefect's: what was committed is in a second file
        writer.execute("CREATE TABLE runs (name)")
        writer.execute("INSERT INTO runs VALUES ('committed')")
        writer.commit()
        writer.execute("INSERT INTO runs VALUES ('at work')")
        list(backup.backup(tmp_path / "copy"))
    with closing(sqlite3.connect(tmp_path / "copy/.prefect/prefect.db")) as reader:
        assert reader.execute("SELECT name FROM runs").fetchall() == [("committed",)]
    assert {path.name for path in (tmp_path / "copy").rglob("*") if path.is_file()} == {"mlflow.db", "prefect.db", "backup.json"}


def test_what_cannot_be_copied_or_read_is_said_in_one_line_and_leaves_nothing(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(backup.backup(tmp_path / "one"))
    with pytest.raises(BackupError, match="one exists; name a new directory"):
        list(backup.backup(tmp_path / "one"))
    with pytest.raises(BackupError, match=r"is no backup: it has no backup\.json"):
        list(backup.restore(tmp_path))
    Path("mlflow.db").write_bytes(b"nothing of SQLite" * 100)
    before = set(tmp_path.iterdir())
    with pytest.raises(BackupError, match=r"mlflow\.db cannot be copied: file is not a database"):
        list(backup.backup(tmp_path / "two"))
    assert set(tmp_path.iterdir()) == before
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(BackupError, match=r"nothing to back up in .*empty"):
        list(backup.backup(tmp_path / "two"))


def test_databases_that_are_no_files_of_the_project_are_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_URL", "PREFECT_HOME", stack.MLFLOW_DATABASE, stack.PREFECT_DATABASE):
        monkeypatch.delenv(name, raising=False)
    assert backup.databases_elsewhere() == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://registry:5000")
    stack.HOME.mkdir()
    stack.write_state(stack.State({}, prefect_database="postgresql+asyncpg://db/prefect", supervisor=identity()))
    assert backup.databases_elsewhere() == [stack.PREFECT_DATABASE, "MLFLOW_TRACKING_URI"]
