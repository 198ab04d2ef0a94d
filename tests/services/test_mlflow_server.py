"""The server of ``cm3leon ui``: a model registered without it is loaded through it by a client without the project."""

import re
import shutil
import subprocess
import sys
import time
import urllib.request
from importlib import metadata
from pathlib import Path

import pytest

from cm3leon.config.schema import Config
from cm3leon.registry import registry
from cm3leon.registry.bundle import build_bundle, bundle_hash
from cm3leon.services.child import stop_tree
from cm3leon.services.local import free_port, services
from cm3leon.tracking import store

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture
def registered(project, tiny_models):
    """A project whose champion was registered without a server."""
    for name in ("models", "data"):
        shutil.copytree(tiny_models / name, project / name)
    version = registry.register(build_bundle(Path("bundle"), Config()), Config())
    client().set_registered_model_alias(registry.MODEL_NAME, registry.CHAMPION, version.number)
    return version


@pytest.fixture
def server(registered):
    """The address of the project's server."""
    service = services(store.tracking_uri(), "1", free_port(15000), free_port(14200), free_port(18000))["MLflow"]
    log = Path("server.log").absolute()
    with log.open("wb") as stream:
        process = subprocess.Popen([sys.executable, "-m", *service.command], stdout=stream, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(service.server + service.health, timeout=2).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.2)
        yield service.server
    finally:
        stop_tree(process.pid, 10)
        process.wait(20)
    assert "Traceback" not in log.read_text()


def client(uri=None):
    from mlflow import MlflowClient

    uri = uri or store.tracking_uri()
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def environment_of(requirements, site):
    """Make ``site`` a directory for modules with the given packages and those that they require, and nothing else."""
    names, found = list(requirements), set()
    while names:
        name = re.sub("[-_.]+", "-", re.match("[A-Za-z0-9._-]+", names.pop())[0]).lower()
        if name in found:
            continue
        found.add(name)
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # required on another platform
            continue
        names += [line for line in package.requires or [] if "extra ==" not in line]
        for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(package.locate_file(top))


def test_the_lines_of_the_readme_work_from_an_empty_directory_of_another_environment(server, registered, tmp_path_factory):
    [lines] = re.findall(r"```python\n(import mlflow\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "http://127.0.0.1:5000" in lines
    program = lines.replace("http://127.0.0.1:5000", server)
    program += "import cm3leon\nprint(cm3leon.__file__)\nprint(answers['row'].tolist(), set(map(type, answers['image_png'])))\n"
    [requirements] = Path("mlruns").rglob("requirements.txt")
    empty, temporary, site = (tmp_path_factory.mktemp(name) for name in ("empty", "temporary", "site"))
    environment_of(requirements.read_text().split(), site)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(temporary), "TMPDIR": str(temporary), "PYTHONPATH": str(site)}
    # -S leaves out the packages of this environment.
    command = [sys.executable, "-S", "-c"]
    absent = [*command, "import cm3leon"]
    assert subprocess.run(absent, cwd=empty, env=environment, check=False, capture_output=True).returncode == 1
    done = subprocess.run([*command, program], cwd=empty, env=environment, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    code, answers = done.stdout.splitlines()[-2:]
    assert Path(code).is_relative_to(temporary)
    assert answers == "[0, 0] {<class 'str'>}"
    assert [*empty.iterdir()] == []


def test_artifacts_have_addresses_on_the_server_and_are_the_same_files(server, registered):
    local, remote = client(), client(server)
    assert remote.get_model_version_download_uri(registry.MODEL_NAME, "1").startswith("mlflow-artifacts:/")
    assert local.get_model_version_download_uri(registry.MODEL_NAME, "1").startswith("file:///")
    [experiment] = remote.search_experiments(filter_string="name = 'cm3leon'")
    assert experiment.artifact_location == "mlflow-artifacts:/"
    run = remote.create_run(experiment.experiment_id)
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    path = f"{Path.cwd().as_uri()}/mlruns"
    remote.log_text(run.info.run_id, f'{{"path": "{path}"}}', "notes/one.json")  # contents are not changed
    for reader in (local, remote):
        assert path in Path(reader.download_artifacts(run.info.run_id, "notes/one.json")).read_text()
    remote.create_registered_model("another")
    remote.create_model_version("another", f"{run.info.artifact_uri}/notes", run.info.run_id)
    assert local.get_model_version("another", "1").source == f"{path}/{run.info.run_id}/artifacts/notes"
    other = remote.create_experiment("other")
    assert local.get_experiment(other).artifact_location.startswith(path)


def test_a_bundle_is_fetched_from_the_server(server, registered, tmp_path_factory, monkeypatch):
    """From a project of its own, with the server's address alone."""
    cache, elsewhere = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("elsewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    original = bundle_hash(Path("bundle"))
    monkeypatch.chdir(elsewhere)
    fetched = registry.fetch_bundle(tracking_uri=server)
    assert fetched.is_relative_to(cache) and bundle_hash(fetched) == original
    assert [*elsewhere.iterdir()] == []


def test_what_is_registered_names_no_path_of_this_computer(registered):
    here = str(Path.cwd())
    places = (here, str(ROOT), "file:")
    version = client().get_model_version(registry.MODEL_NAME, "1")
    run = client().get_run(registered.run_id)
    told = [version.source, *version.tags.values(), *run.data.tags.values(), *run.data.params.values()]
    model = next(Path("mlruns").rglob("MLmodel")).parent
    names = ("MLmodel", "requirements.txt", "conda.yaml", "python_env.yaml", "input_example.json", "serving_input_example.json")
    told += [(model / name).read_text() for name in names]
    assert not [(place, text) for text in told for place in places if place in text]
    assert "a red circle" in (model / "input_example.json").read_text()
