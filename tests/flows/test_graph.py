"""The stage graph: order, dependencies, and the code and parameters that dvc.yaml declares."""

from __future__ import annotations

import ast
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cm3leon.config import paths
from cm3leon.config.files import named_files
from cm3leon.config.schema import Config
from cm3leon.stages.common import STAGES
from cm3leon.utils.imports import import_closure
from flows.graph import downstream_of, missing_parameters, stage_order, stale_stages

ROOT = Path(__file__).parents[2]
INFRASTRUCTURE = {
    "config/loading",
    "config/renamed",
    "config/schema",
    "config/ingest_schema",
    "config/section",
    "config/yaml_file",
    "config/paths",
    "data/data_report",
    "data/last_accepted",
    "tracking/runs",
    "tracking/store",
    "tracking/sqlite",
    "tracking/lineage",
    "utils/files",
    "utils/progress",
    "utils/images",
    "utils/network",
    "utils/processes",
    "utils/torchvision_compat",
    "registry/registry",
}
"""Modules on which the bytes of a stage's outputs do not depend: a change of them makes no output stale."""


def graph() -> dict[str, dict]:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def make_project(folder: Path, stages: dict[str, list[str]], order: list[str]) -> None:
    """A DVC project whose stages read the outputs of those named, written in ``order``."""
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").write_text("[core]\n    analytics = false\n    site_cache_dir = .cache/dvc\n")
    written = {name: {"cmd": "true", "deps": [f"out/{need}" for need in stages[name]], "outs": [f"out/{name}"]} for name in order}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": written}, sort_keys=False))


def test_the_stages_are_in_the_order_of_the_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert [stage.name for stage in stage_order()] == list(STAGES)


def test_every_stage_comes_after_its_dependencies_in_any_order_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    needs = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"], "e": [], "f": ["e", "d"]}
    order = list(needs)
    random.Random(3).shuffle(order)
    make_project(tmp_path, needs, order)
    stages = stage_order()
    position = {stage.name: number for number, stage in enumerate(stages)}
    assert set(position) == set(needs)
    assert all(position[need] < position[name] for name, wanted in needs.items() for need in wanted)
    assert {stage.name: sorted(stage.needs) for stage in stages} == needs | {"f": ["d", "e"]}
    assert downstream_of(stages, "b") == ["d", "f"]
    assert downstream_of(stages, "e") == ["f"]
    assert downstream_of(stages, "f") == []


def test_a_changed_stage_and_all_that_depend_on_it_are_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    needs = {"a": [], "b": ["a"], "c": ["a"], "d": ["b"]}
    make_project(tmp_path, needs, list(needs))
    written = yaml.safe_load((tmp_path / "dvc.yaml").read_text())
    for name, stage in written["stages"].items():
        stage |= {"cmd": f"mkdir -p out && echo {name} > out/{name}", "params": [name]}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(written))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(dict.fromkeys(needs, 1)))
    assert stale_stages(stage_order()) == ["a", "b", "c", "d"]  # none has run
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], check=True)
    assert stale_stages(stage_order()) == []
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({**dict.fromkeys(needs, 1), "b": 2}))
    assert stale_stages(stage_order()) == ["b", "d"]


def test_weights_that_change_make_stale_what_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path, {"a": []}, ["a"])
    written = yaml.safe_load((tmp_path / "dvc.yaml").read_text())
    written["stages"]["a"] |= {"cmd": "mkdir -p out && touch out/a", "deps": [str(paths.WEIGHTS)]}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(written))
    (tmp_path / "elsewhere").write_text("old weights")
    paths.WEIGHTS.mkdir(parents=True)
    (paths.WEIGHTS / "README.md").write_text("what belongs here")
    (paths.WEIGHTS / "linked").symlink_to(tmp_path / "elsewhere")
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], check=True)
    assert stale_stages(stage_order()) == []
    (tmp_path / "elsewhere").write_text("new weights")
    assert stale_stages(stage_order()) == ["a"]


@pytest.mark.slow
def test_parameters_that_the_file_lacks_are_found_before_a_stage_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path, {"first": []}, ["first"])
    stages = yaml.safe_load(Path("dvc.yaml").read_text())
    stages["stages"]["first"]["params"] = ["seed", "index", "encoder.model"]
    Path("dvc.yaml").write_text(yaml.safe_dump(stages))
    Path("params.yaml").write_text("index: {kind: flat}\nencoder: {}\n")
    assert missing_parameters() == ["encoder.model", "seed"]
    Path("params.yaml").write_text("index: {kind: flat}\nencoder: {model: null}\nseed: 0\n")
    assert missing_parameters() == []


def test_a_run_waits_while_another_holds_dvcs_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself DVC gives up after three seconds."""
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path, {"a": []}, ["a"])
    hold = "import time; from dvc.repo import Repo; lock = Repo('.').lock; lock.__enter__(); print('held', flush=True); time.sleep(5)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert stale_stages(stage_order()) == ["a"]


def test_independent_stages_are_in_the_order_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path, {"z": [], "m": [], "a": []}, ["z", "m", "a"])
    assert [stage.name for stage in stage_order()] == ["z", "m", "a"]


def test_a_cycle_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc.exceptions import DvcException

    monkeypatch.chdir(tmp_path)
    make_project(tmp_path, {"a": ["b"], "b": ["a"]}, ["a", "b"])
    with pytest.raises(DvcException):
        stage_order()


def name_of(file: Path) -> str:
    """A module's path without suffix below ``cm3leon/``."""
    return file.relative_to(ROOT / "cm3leon").with_suffix("").as_posix()


def closure(stage: str) -> set[str]:
    """The modules that decide what a stage writes: all that it imports, directly or through others."""

    def follow(file: Path) -> bool:
        return (ROOT / "cm3leon") in file.parents and name_of(file) not in INFRASTRUCTURE

    files = import_closure([ROOT / "cm3leon/stages" / f"{stage}.py"], ROOT, follow)
    return {name_of(file) for file in files if file.name != "__init__.py"}


@pytest.mark.parametrize("stage", STAGES)
def test_declared_code_is_what_the_stage_imports(stage: str) -> None:
    declared = [dep for dep in graph()[stage]["deps"] if dep.startswith("cm3leon/")]
    assert all((ROOT / dep).exists() for dep in declared), declared
    files = [f"cm3leon/{name}.py" for name in closure(stage)]
    missing = sorted(file for file in files if not any(file == dep or file.startswith(f"{dep}/") for dep in declared))
    assert not missing, f"add to the deps of {stage} in dvc.yaml: {missing}"
    unused = sorted(dep for dep in declared if not any(file == dep or file.startswith(f"{dep}/") for file in files))
    assert not unused, f"{stage} does not import {unused}"


def test_stages_depend_on_the_weights_that_their_parameters_name() -> None:
    parameters = {
        "image_tokenizer": {"pretrained": "data/weights/a", "perceptual_weights": "data/weights/b", "perceptual_weight": 1.0},
        "encoder": {"pretrained_model": "ViT-B-32", "pretrained_weights": "data/weights/c"},
        "evaluate": {"inception": "data/weights/d"},
    }
    named = named_files(Config.model_validate(parameters))
    assert len(named) == 4
    for parameter in named:
        assert str(paths.WEIGHTS) in graph()[parameter.partition(".")[0]]["deps"]
    assert str(paths.WEIGHTS) in graph()["validate"]["deps"], "with near_duplicate_similarity it reads the encoder's"


@pytest.mark.parametrize("stage", ["image_tokenizer", "encoder", "super_resolution"])
def test_editing_the_decoder_retrains_no_other_network(stage: str) -> None:
    assert "models/decoder" not in closure(stage)


def test_every_source_is_a_dependency_of_ingest() -> None:
    assert {"scenes/source", "data/sources/folder", "data/tables"} <= closure("ingest")


def sections_read(file: Path) -> set[str]:
    """Names after ``config.`` in the functions that take the whole configuration."""
    found = set()
    for function in ast.walk(ast.parse(file.read_text())):
        if not isinstance(function, ast.FunctionDef) or "config: Config" not in {ast.unparse(argument) for argument in function.args.args}:
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "config":
                found.add(node.attr.rstrip("_"))
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_declared_parameters_exist_and_cover_what_the_stage_reads(stage: str) -> None:
    tree = Config().model_dump(by_alias=True)
    declared = graph()[stage]["params"]
    for key in declared:
        value = tree
        for part in key.split("."):
            assert part in value, f"{stage}: params.yaml has no {key}"
            value = value[part]
    tops = {key.split(".")[0] for key in declared}
    read = set().union(*(sections_read(ROOT / f"cm3leon/{name}.py") for name in closure(stage))) & set(tree)
    assert read <= tops, f"add to the params of {stage} in dvc.yaml: {sorted(read - tops)}"
    assert tops <= read, f"{stage} does not read {sorted(tops - read)}"
