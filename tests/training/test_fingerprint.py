"""The identity of a training run changes with its code, its data and its parameters, and with nothing else."""

import shutil

import pytest
import yaml

from cm3leon.config.schema import Config, TrainConfig
from cm3leon.training.fingerprint import (
    ASIDE,
    NEUTRAL,
    PACKAGE,
    ROOMS,
    code_hash,
    common_fingerprint,
    data_hash,
    differences,
    fingerprint,
    training_modules,
)
from cm3leon.utils.world import World


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the package's source."""
    copy = tmp_path_factory.mktemp("source") / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "page"))
    return copy


def test_attention_rope_and_the_objective_are_among_the_modules_of_a_step():
    names = {file.relative_to(PACKAGE).as_posix() for file in training_modules()}
    assert {"models/kernels.py", "models/decoder.py", "models/cross_entropy.py", "sequence/cm3.py", "training/muon.py"} <= names
    assert {"data/sequences.py", "data/batches.py", "data/tokens.py", "training/pretraining.py", "training/run.py"} <= names
    assert not any(name.startswith(("cli/", "tracking/", "serving/", "registry/", "config/")) for name in names)


@pytest.mark.parametrize(("stage", "for_sample_sheets"), [
    ("pretrain", {"sequence/tasks.py"}), ("sft", {"models/pixels.py", "models/vqgan.py"}),
    ("image_tokenizer", set()), ("encoder", set()), ("super_resolution", set()),
])  # fmt: skip
def test_the_code_of_a_stage_is_what_dvc_starts_it_again_for(stage, for_sample_sheets):
    """But for what only plans, watches or records: a run that resumes though its code has changed would pass as one of the new code."""
    names = {file.relative_to(PACKAGE).as_posix() for file in training_modules(stage)}
    dependencies = yaml.safe_load((PACKAGE.parent / "dvc.yaml").read_text())["stages"][stage]["deps"]
    deciding = {name.removeprefix("cm3leon/") for name in dependencies if name.startswith(tuple(f"cm3leon/{room}/" for room in ROOMS))}
    assert deciding - names == for_sample_sheets | (deciding & set(ASIDE))
    assert f"stages/{stage}.py" in names


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("models/kernels.py", True),
        ("sequence/cm3.py", True),
        ("training/muon.py", True),
        ("utils/world.py", True),
        ("utils/images.py", False),
        ("cli/app.py", False),
        ("models/opt.py", False),
    ],
)
def test_only_an_edit_of_these_modules_changes_the_hash_of_the_code(package, file, changes):
    before, source = code_hash(package=package), (package / file).read_text()
    (package / file).write_text(source + "AN_EDIT = 1\n")
    assert (code_hash(package=package) != before) == changes
    (package / file).write_text('"""Another docstring."""\n' + source.partition('"""\n')[2] + "\n# a comment\n")
    assert code_hash(package=package) == before
    (package / file).write_text(source)
    assert code_hash(package=package) == before == code_hash()


def test_any_byte_and_any_name_changes_the_hash_of_the_data(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    (data / "shards").mkdir(parents=True)
    (data / "shards" / "train-00000.arrow").write_bytes(bytes(5_000_000))
    (data / "note.json").write_text("{}")
    before = data_hash(data)
    shutil.copytree(data, other)
    assert data_hash(other) == before
    with (other / "shards" / "train-00000.arrow").open("r+b") as file:
        file.seek(2_500_000)
        file.write(b"\1")
    assert data_hash(other) != before
    (data / "note.json").rename(data / "renamed.json")
    assert data_hash(data) != before
    assert data_hash(data / "renamed.json") != data_hash(data / "shards" / "train-00000.arrow")


def test_a_changed_parameter_is_named_with_both_values(tmp_path):
    (tmp_path / "tokens").write_text("tokens")
    config = Config.model_validate({"pretrain": {"steps": 10}})
    changed = Config.model_validate({"pretrain": {"steps": 20}, "sft": {"steps": 5}})
    old, new = (fingerprint(each, "pretrain", [tmp_path / "tokens"]) for each in (config, changed))
    assert differences(old, old) == []
    assert differences(old, new) == ["pretrain.steps: 10 then, 20 now"]
    assert {"seed", "code", "torch", str(tmp_path / "tokens")} <= old.keys()


def test_how_a_run_is_computed_and_watched_is_not_its_identity(tmp_path):
    (tmp_path / "tokens").write_text("tokens")
    assert set(TrainConfig.model_fields) >= NEUTRAL
    watched = {"micro_batch_size": 2, "validate_every": 7, "checkpoint_every": 3, "keep_checkpoints": 1, "activation_checkpointing": True}
    configs = [Config(), Config.model_validate({"pretrain": watched})]
    old, new = (fingerprint(config, "pretrain", [tmp_path / "tokens"]) for config in configs)
    assert old == new


def test_of_several_processes_the_first_reads_the_inputs(tmp_path, monkeypatch):
    """Of 64 processes each would read all tokens of the collection before its first step."""
    (tmp_path / "tokens").write_bytes(b"0")
    first = common_fingerprint(Config(), "pretrain", [tmp_path / "tokens"], World(), {"image_tokenizer.image_size": "64"})
    assert first == fingerprint(Config(), "pretrain", [tmp_path / "tokens"]) | {"image_tokenizer.image_size": "64"}
    (tmp_path / "tokens").unlink()
    monkeypatch.setattr(World, "gather", lambda self, own: [first, own])
    assert common_fingerprint(Config(), "pretrain", [tmp_path / "tokens"], World(1, 2)) == first
