"""The MLflow store lies in the project whatever its path is called; a store that cannot be used is one line that says what to do."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cm3leon.config.schema import Config
from cm3leon.tracking import runs, store
from cm3leon.tracking.sqlite import sqlite_file, sqlite_uri

ROOT = Path(__file__).parents[2]
NAMES = ["what?x", "per%20cent", "100%", "%3F", "dollar$HOME", "p$undef", "a b", "#1", "it's", "semi;colon", "a&b", "[a]{b}", "Größe-日本"]


@pytest.fixture
def unset(monkeypatch):
    """No store in the environment."""
    for name in ("MLFLOW_TRACKING_URI", runs.PARENT_RUN_ENV, runs.FLOW_RUN_ENV, "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", NAMES)
def test_the_store_and_its_artifacts_lie_in_the_project_whatever_its_path_is_called(prepared_store, tmp_path, monkeypatch, unset, name):
    project = tmp_path / name / "project"
    project.mkdir(parents=True)
    monkeypatch.chdir(project)
    shutil.copyfile(prepared_store, "mlflow.db")
    Path("file.txt").write_text("content")
    start = time.monotonic()
    with runs.stage_run("ingest", Config()) as run:
        run.log_artifact("file.txt")
    assert time.monotonic() - start < 30
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store.tracking_uri())
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert Path(client.download_artifacts(run.run_id, "file.txt")).read_text() == "content"
    assert [file.parents[2] for file in project.rglob("artifacts/file.txt")] == [project / "mlruns"]
    assert [*tmp_path.iterdir()] == [tmp_path / name] and [*(tmp_path / name).iterdir()] == [project]


@pytest.mark.parametrize("name", NAMES)
def test_a_sqlite_uri_leads_back_to_its_file(tmp_path, name):
    path = tmp_path / name / "mlflow.db"
    assert sqlite_file(sqlite_uri(path)) == path
    assert sqlite_file(sqlite_uri(path, driver="aiosqlite")) == path


@pytest.mark.parametrize("uri", ["http://127.0.0.1:5000", "postgresql://user@host/db", "sqlite://", "sqlite:///:memory:", "sqlite:x", "x"])
def test_what_is_no_sqlite_file_has_none(uri):
    assert sqlite_file(uri) is None


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("http://127.0.0.1:9", "does not answer .* start it, or correct or unset MLFLOW_TRACKING_URI"),
        ("http://user:secret@127.0.0.1:9", r"http://user:\*\*\*@127.0.0.1:9 does not answer"),
        ("http://", "does not answer"),
        ("htp://host", "htp://host cannot be used: .*correct or unset MLFLOW_TRACKING_URI"),
        ("nonsense", "nonsense cannot be used: .*correct or unset MLFLOW_TRACKING_URI"),
        ("sqlite:nonsense", "sqlite:nonsense cannot be used"),
        ("mysql+pymysql://user:secret@host/db", r"mysql\+pymysql://user:\*\*\*@host/db .*install the driver pymysql"),
        ("postgresql+pg8000://user:secret@127.0.0.1:9/db", "install the driver pg8000"),
    ],
)
def test_a_store_that_cannot_be_used_is_named_with_what_to_do(project, monkeypatch, uri, complaint):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    start = time.monotonic()
    with pytest.raises(store.StoreError, match=complaint) as caught:
        store.prepare_store()
    assert time.monotonic() - start < 30
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def damage_everything(file):
    file.write_bytes(os.urandom(5000))


def damage_pages(file):
    content = bytearray(file.read_bytes())
    content[3 * 4096 : 43 * 4096] = os.urandom(40 * 4096)
    file.write_bytes(content)


def truncate(file):
    os.truncate(file, 40_000)


@pytest.mark.parametrize("damage", [damage_everything, damage_pages, truncate])
def test_a_damaged_store_is_named_and_left_as_it_is(project, capfd, damage):
    file = project / "mlflow.db"
    damage(file)
    before = file.read_bytes()
    with pytest.raises(store.StoreError, match=r"mlflow\.db cannot be used: .*move the damaged file away and put a backup in its place"):
        store.prepare_store()
    assert file.read_bytes() == before
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("table", ["labels", "alembic_version"])  # the latter is also that of other programs, Prefect's among them
def test_the_database_of_another_program_is_named_and_left_as_it_is(tmp_path, monkeypatch, table):
    import sqlite3

    file = tmp_path / "labels.db"
    with sqlite3.connect(file) as connection:
        connection.execute(f"CREATE TABLE {table} (version_num)")
        connection.execute(f"INSERT INTO {table} VALUES ('a label')")
    connection.close()
    before = file.read_bytes()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_uri(file))
    with pytest.raises(store.StoreError, match=r"labels\.db is a database, but not MLflow's: name another file in MLFLOW_TRACKING_URI"):
        store.prepare_store()
    assert file.read_bytes() == before


def logged(text):
    """The path, below the place of artifacts, of a file that a run of the project in the working directory logs."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store.prepare_store())
    run = client.create_run(store.experiment_id_of(client, client.tracking_uri)).info.run_id
    client.log_text(run, text, "file.txt")
    client.set_terminated(run)
    return Path("mlruns", run, "artifacts/file.txt")


def test_a_project_that_was_moved_keeps_its_artifacts_and_puts_new_ones_beside_them(project, tmp_path_factory, monkeypatch):
    from mlflow import MlflowClient

    before = logged("before")
    moved = tmp_path_factory.mktemp("else where") / "project"
    project.rename(moved)
    monkeypatch.chdir(moved)
    after = logged("after")
    assert (moved / before).is_file() and (moved / after).is_file() and not project.exists()
    run = MlflowClient(tracking_uri=store.tracking_uri()).get_run(before.parts[1])
    assert run.info.artifact_uri == (moved / before.parent).as_uri()
    project.mkdir()  # pytest removes it


def test_a_copied_project_does_not_write_into_the_original(project, tmp_path_factory, monkeypatch):
    logged("original")
    copy = tmp_path_factory.mktemp("copy") / "project"
    shutil.copytree(project, copy)
    monkeypatch.chdir(copy)
    with pytest.raises(store.StoreError, match=rf"is a copy of that in {project}, .*cm3leon backup there and cm3leon restore here"):
        store.prepare_store()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_uri(project / "mlflow.db"))
    assert (project / logged("shared")).is_file()


def without_artifacts():
    """A store with a run that has logged no file."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store.prepare_store())
    client.create_run(store.experiment_id_of(client, client.tracking_uri))


def test_a_copy_is_refused_also_if_the_original_has_no_artifacts_yet(project, tmp_path_factory, monkeypatch):
    without_artifacts()
    copy = tmp_path_factory.mktemp("copy") / "project"
    shutil.copytree(project, copy)
    monkeypatch.chdir(copy)
    with pytest.raises(store.StoreError, match=rf"is a copy of that in {project}, .*: move mlflow\.db and mlruns of {copy} away"):
        store.prepare_store()


@pytest.mark.parametrize("log", [lambda: logged("before"), without_artifacts])
def test_a_project_that_was_put_aside_is_no_copy_of_a_fresh_clone_at_its_path(project, prepared_store, tmp_path_factory, monkeypatch, log):
    log()
    clone, aside = (tmp_path_factory.mktemp(name) / "project" for name in ("clone", "aside"))
    clone.mkdir()
    shutil.copyfile(prepared_store, clone / "mlflow.db")
    monkeypatch.chdir(clone)
    own = logged("of the clone")
    project.rename(aside)
    clone.rename(project)
    monkeypatch.chdir(aside)
    assert (aside / logged("after")).is_file()
    assert [*(project / "mlruns").iterdir()] == [project / own.parents[1]]


def test_a_moved_project_without_artifacts_puts_them_into_its_new_place_each_time(project, tmp_path_factory, monkeypatch):
    without_artifacts()
    place = project
    for name in ("first", "second"):
        place = place.rename(tmp_path_factory.mktemp(name) / "project")
        monkeypatch.chdir(place)
        store.prepare_store()
    assert (place / logged("after")).is_file()
    project.mkdir()  # pytest removes it


def test_artifacts_on_a_disk_that_is_away_keep_their_addresses(project, tmp_path_factory):
    from mlflow import MlflowClient

    store.use_settings()
    disk = tmp_path_factory.mktemp("disk")
    client = MlflowClient(tracking_uri=store.tracking_uri())
    client.create_experiment(store.EXPERIMENT, artifact_location=(disk / "mlruns").as_uri())
    assert (disk / logged("there")).is_file()
    (disk / "mlruns").rename(disk / "away")
    store.prepare_store()
    assert client.get_experiment_by_name(store.EXPERIMENT).artifact_location == (disk / "mlruns").as_uri()


@pytest.mark.parametrize("password", ["secret", "pa/ss", "p@ss", "a:b"])
def test_a_message_has_no_password(password):
    assert store.without_password(f"postgresql://me:{password}@host:5432/db") == "postgresql://me:***@host:5432/db"
    for plain in ("http://host:5000", "sqlite:////home/me/mlflow.db"):
        assert store.without_password(plain) == plain


def test_a_migration_that_is_killed_leaves_the_store_and_the_link_to_it(project, monkeypatch, tmp_path):
    import sqlite3

    from mlflow.db import upgrade

    def migrate_half(uri):
        with sqlite3.connect(sqlite_file(uri)) as half:
            half.execute("DROP TABLE metrics")
        half.close()
        raise KeyboardInterrupt

    file = Path("mlflow.db").rename(tmp_path / "elsewhere.db")
    Path("mlflow.db").symlink_to(file)
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    connection.close()
    before = file.read_bytes()
    monkeypatch.setattr(upgrade, "callback", migrate_half)
    with pytest.raises(KeyboardInterrupt):
        store.migrate(sqlite_uri(Path("mlflow.db")))
    assert file.read_bytes() == before and Path("mlflow.db").is_symlink()
    monkeypatch.setattr(upgrade, "callback", lambda uri: None)
    store.migrate(sqlite_uri(Path("mlflow.db")))
    assert Path("mlflow.db").is_symlink() and Path(f"{file}.451aebb31d03.bak").read_bytes() == before


def test_a_migration_that_fails_leaves_the_store_as_it_was(project, monkeypatch):
    """An older store, whose migration meets a table that it is to make."""
    import sqlite3

    from mlflow.db import upgrade

    with sqlite3.connect("mlflow.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    connection.close()
    before = Path("mlflow.db").read_bytes()
    assert upgrade.callback is not None
    with pytest.raises(store.StoreError, match=r"already exists|duplicate column"):
        store.prepare_store()
    assert Path("mlflow.db").read_bytes() == before


def test_a_store_of_a_newer_mlflow_is_left_as_it_is(project):
    """What a version of the project meets that was brought back after an upgrade."""
    import sqlite3

    with sqlite3.connect("mlflow.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    connection.close()
    before = Path("mlflow.db").read_bytes()
    with pytest.raises(store.StoreError, match=r"a newer MLflow has migrated it: .* or restore a backup from before"):
        store.prepare_store()
    assert Path("mlflow.db").read_bytes() == before


def run_command(folder, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    command = [sys.executable, "-m", "cm3leon", *arguments]
    environment |= {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True, timeout=120)


@pytest.fixture
def mounted(tmp_path):
    """Mounts in ``tmp_path``; skips where the process may not mount."""
    done = set()

    def mount(*arguments):
        if sys.platform != "linux" or subprocess.run(["mount", *arguments], check=False, capture_output=True).returncode:
            pytest.skip("needs the right to mount a file system")
        done.add(arguments[-1])

    yield mount
    for place in done:
        subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, prepared_store, mounted):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted("-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(disk))
    shutil.copyfile(prepared_store, disk / "mlflow.db")
    free = os.statvfs(disk)
    (disk / "fill").write_bytes(bytes(free.f_bavail * free.f_frsize))
    before = (disk / "mlflow.db").read_bytes()
    done = run_command(disk, "history")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and "mlflow.db cannot be used" in line and line.endswith("free some disk space and run it again")
    assert (disk / "mlflow.db").read_bytes() == before


def test_a_read_only_project_is_one_line(tmp_path, prepared_store, mounted):
    project = tmp_path / "project"
    project.mkdir()
    shutil.copyfile(prepared_store, project / "mlflow.db")
    mounted("--bind", str(project), str(project))
    mounted("-o", "remount,ro,bind", str(project))
    done = run_command(project, "history")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and line.endswith("make the place writable and run it again")
    listed = run_command(project, "status")
    assert listed.stderr == "error: no model is registered yet; run: make run\n"  # listing only reads, so that it works here
