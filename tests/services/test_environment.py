"""A clone is prepared for its run, with git, without it, and where git refuses; servers that cannot be used are named at once."""

import contextlib
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cm3leon.services import environment
from cm3leon.services.environment import ProjectError, ServerError, check_server, prepare_project
from cm3leon.tracking.sqlite import sqlite_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clone(project):
    """An empty DVC project in a git repository."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copyfile(ROOT / name, project / name)
    (project / ".dvc").mkdir()
    subprocess.run(["git", "init", "--quiet"], check=True)
    return project


def dvc_line():
    [line] = [line for line in prepare_project() if line.startswith("DVC")]
    return line


def test_dvc_works_without_git_only_as_long_as_there_is_none(clone):
    local = clone / ".dvc/config.local"
    own = "[cache]\n    dir = /mnt/cache\n"
    local.write_text(own)
    shutil.rmtree(".git")
    assert dvc_line().endswith("without git: this directory is no git repository")
    assert "no_scm = true" in local.read_text()
    dvc_line()
    assert local.read_text().count("no_scm") == 1
    subprocess.run(["git", "init", "--quiet"], check=True)
    assert dvc_line().endswith("with git")
    assert local.read_text() == own


def test_settings_of_the_user_in_the_same_section_stay_and_dvc_reads_the_file(clone):
    def dvc(*arguments):
        return subprocess.run([sys.executable, "-m", "dvc", *arguments], check=True, capture_output=True, text=True).stdout

    local = clone / ".dvc/config.local"
    own = "[core]\n    remote = storage\n['remote \"storage\"']\n    url = /mnt/x\n"
    local.write_text(own)
    shutil.rmtree(".git")
    dvc_line()
    assert dvc("config", "--local", "core.no_scm") == "true\n" and "/mnt/x" in dvc("remote", "list")
    dvc("remote", "add", "--local", "--default", "other", "/mnt/y")
    subprocess.run(["git", "init", "--quiet"], check=True)
    dvc_line()
    assert dvc("config", "--local", "core.remote") == "other\n" and "no_scm" not in local.read_text()


@pytest.mark.parametrize("text", ["[core]\n    no_scm = false\n", "# no_scm = true\n[cache]\n    dir = /mnt/cache\n"])
def test_a_setting_of_the_user_and_a_comment_are_not_taken_for_the_projects_own(clone, text):
    local = clone / ".dvc/config.local"
    local.write_text(text)
    assert dvc_line().endswith("with git") and local.read_text() == text
    shutil.rmtree(".git")
    dvc_line()
    assert ("no_scm = false" in text) == (local.read_text() == text)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a directory to another user")
def test_a_repository_of_another_owner_is_named_as_the_cause_and_used_once_it_is_trusted(clone, monkeypatch, capsys):
    settings = clone / "gitconfig"
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    for path in (clone, clone / ".git"):
        os.chown(path, 12345, 12345)
    command = f"git config --global --add safe.directory '{clone}'"
    assert command in dvc_line()
    assert command in capsys.readouterr().err
    subprocess.run(command, shell=True, check=True)
    assert dvc_line().endswith("with git")
    assert "no_scm" not in (clone / ".dvc/config.local").read_text()


def test_a_directory_that_is_no_project_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProjectError, match=re.escape(str(tmp_path))):
        prepare_project()


def test_only_a_run_that_needs_the_store_ends_without_it(clone, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert any(line.startswith("MLflow: ") and line.endswith("stages run untracked") for line in prepare_project())
    with pytest.raises(ConnectionError, match="unset MLFLOW_TRACKING_URI"):
        prepare_project(needs_store=True)


@contextlib.contextmanager
def answering(body, status=200):
    """The address of a server that answers every request alike."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(("body", "status"), [(b"true", 200), (b"", 401)])
def test_a_prefect_server_that_answers_is_accepted_also_one_with_a_password(monkeypatch, body, status):
    with answering(body, status) as address:
        monkeypatch.setenv("PREFECT_API_URL", f"http://user:secret@{address}/api")
        check_server()
    monkeypatch.delenv("PREFECT_API_URL")
    check_server()


@pytest.mark.parametrize(("body", "status"), [(b"<!DOCTYPE html>", 200), (b'{"status": "OK"}', 200), (b"", 404)])
def test_another_server_than_prefects_is_named(monkeypatch, body, status):
    with answering(body, status) as address:
        monkeypatch.setenv("PREFECT_API_URL", f"http://{address}")
        with pytest.raises(ServerError, match=f"http://{address} cannot be used: .*a(n|) .*address ends with /api|no Prefect API"):
            check_server()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/api", "http://user:secret@127.0.0.1:9/api", "nonsense", "http://", "htp://host"])
def test_a_prefect_server_that_does_not_answer_is_named(monkeypatch, url):
    monkeypatch.setenv("PREFECT_API_URL", url)
    with pytest.raises(ServerError, match="correct or unset PREFECT_API_URL") as caught:
        check_server()
    assert "secret" not in str(caught.value)


PROGRAM = """
from cm3leon.services.environment import use_environment
use_environment()
import asyncio
from prefect.server.database import provide_database_interface
asyncio.run(provide_database_interface().create_db())
"""


@pytest.mark.slow
def test_prefects_database_lies_in_the_project_whatever_its_path_is_called(tmp_path):
    name = "what?x per%20cent"
    project = tmp_path / name / "project"
    project.mkdir(parents=True)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=project, env=kept | {"PYTHONPATH": str(ROOT)}, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (project / ".prefect/prefect.db").is_file()
    assert [*tmp_path.iterdir()] == [tmp_path / name] and [*(tmp_path / name).iterdir()] == [project]


def test_a_database_that_the_user_names_is_kept(tmp_path, monkeypatch):
    project = tmp_path / "what?x"
    project.mkdir()
    monkeypatch.chdir(project)
    for variable in ("PREFECT_HOME", "PREFECT_API_URL", *environment.DATABASE_VARIABLES):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)  # what the function sets is undone at the end
    environment.use_environment()
    assert sqlite_file(os.environ[environment.DATABASE_VARIABLES[0]]) == project / ".prefect/prefect.db"
    del os.environ[environment.DATABASE_VARIABLES[0]]
    os.environ[environment.DATABASE_VARIABLES[1]] = "postgresql+asyncpg://host/prefect"
    environment.use_environment()
    assert environment.DATABASE_VARIABLES[0] not in os.environ
