"""Bundles and versions: complete, identified by their content, registered once."""

import json
import os
import sys
from pathlib import Path

import pytest
from registry_support import CONFIG, aliases, evaluated

from cm3leon.config import paths
from cm3leon.config.schema import DecodingConfig
from cm3leon.generation.generator import Generator
from cm3leon.registry import registry
from cm3leon.registry.bundle import BundleError, IncompleteRecordError, build_bundle, bundle_hash
from cm3leon.registry.registry import CHALLENGER
from cm3leon.tracking import runs
from cm3leon.utils.files import DamagedFileError


def test_a_bundle_has_every_part_and_its_hash_depends_on_its_content_only(stages):
    bundle = build_bundle(Path("bundle"), CONFIG).path
    for name in (
        "config.json",
        "model.safetensors",
        "memory_bank/index.faiss",
        "memory_bank/tokens/train-00000.arrow",
        "encoder/tokenizer.json",
    ):
        assert (bundle / name).is_file()
    assert DecodingConfig.model_validate_json((bundle / "decoding.json").read_text()) == CONFIG.decoding
    loaded = Generator.from_bundle(bundle, device="cpu")
    assert loaded.memory.rules == CONFIG.retrieve and loaded.super_resolution is not None
    first = bundle_hash(bundle)
    paths.run_file("sft").parent.mkdir(parents=True)
    paths.run_file("sft").write_text('{"run_id": "r1"}')
    paths.resumed_file("sft").write_text('[{"step": 4}]')
    (paths.EVALUATION / "samples.png").write_bytes(b"another sheet")
    again = build_bundle(Path("elsewhere"), CONFIG).path
    lineage = json.loads((again / "lineage.json").read_text())
    assert lineage["mlflow_runs"] == {"sft": "r1"} and lineage["resumed"] == {"sft": [{"step": 4}]}
    assert bundle_hash(again) == first
    weights = again / "text_tokenizer" / "tokenizer.json"
    changed = weights.read_bytes() + b"\n"
    weights.unlink()
    weights.write_bytes(changed)
    assert bundle_hash(again) != first
    assert weights.resolve() != (paths.TEXT_TOKENIZER / "tokenizer.json").resolve()


@pytest.mark.parametrize("content", ["", '{"temperature": ', "no JSON"])
def test_damaged_settings_of_a_bundle_are_named(stages, content):
    bundle = build_bundle(Path("bundle"), CONFIG).path
    (bundle / "decoding.json").unlink()
    (bundle / "decoding.json").write_text(content)
    with pytest.raises(DamagedFileError, match=r"bundle/decoding\.json is damaged \(.*\); remove it and run again: cm3leon register"):
        Generator.from_bundle(bundle, device="cpu")


def test_a_model_is_not_bundled_with_the_scores_of_another(stages):
    weights = paths.FINETUNED / "model.safetensors"
    changed = weights.read_bytes()[:-1] + b"\0"
    weights.unlink()
    weights.write_bytes(changed)
    with pytest.raises(BundleError, match=r"models/finetuned changed since the evaluation.*cm3leon evaluate"):
        build_bundle(Path("bundle"), CONFIG)


def test_the_pipelines_run_is_linked_to_the_version_new_or_not(stages):
    client = registry.connect()
    for _ in range(2):
        with runs.pipeline_run(CONFIG) as run:
            registry.register(evaluated(0.5), CONFIG)
        found = client.get_run(run.run_id)
        assert found.data.tags[runs.VERSION_TAG] == "cm3leon/1"
        [model] = [client.get_logged_model(output.model_id) for output in found.outputs.model_outputs]
        assert registry.fetch_bundle("models:/cm3leon/1").is_relative_to(model.artifact_location.removeprefix("file://"))


def test_missing_pickled_and_outdated_files_are_named(stages):
    with pytest.raises(BundleError, match="guidance"):
        build_bundle(Path("bundle"), CONFIG.model_copy(update={"decoding": DecodingConfig(guidance=5.0)}))
    (paths.INDEX / "extra.pkl").touch()
    with pytest.raises(BundleError, match=r"extra\.pkl"):
        build_bundle(Path("bundle"), CONFIG)
    (paths.FINETUNED / "model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"models/finetuned/model\.safetensors is missing.*cm3leon sft"):
        build_bundle(Path("bundle"), CONFIG)
    assert not Path("bundle").exists()


@pytest.mark.parametrize("lack", ["scores", "contract", "sheets of samples", "not an evaluation record", "nan"])
def test_a_model_without_a_complete_record_is_refused(stages, lack):
    file = paths.EVALUATION / "record.json"
    record = json.loads(file.read_text())
    if lack == "sheets of samples":
        (paths.EVALUATION / "samples.png").unlink()
    else:
        file.unlink()
        record |= {"scores": {"composition": float("nan")}} if lack == "nan" else {lack: {}}
        file.write_text("{}" if lack == "not an evaluation record" else json.dumps(record))
    with pytest.raises(IncompleteRecordError, match="finite score composition" if lack == "nan" else lack):
        registry.register_outputs(CONFIG)
    assert registry.status() == [] and not list(registry.SCRATCH.iterdir())


def test_registering_is_idempotent_and_pickles_nothing_and_the_bundle_can_be_fetched(stages, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    bundle = evaluated(0.5)
    first = registry.register(bundle, CONFIG)
    assert registry.register(build_bundle(Path("again"), CONFIG), CONFIG).number == first.number
    assert aliases() == {CHALLENGER: 1}
    assert first.scores == {"composition": 0.5, "fd_encoder": 3.0}
    fetched = registry.fetch_bundle("models:/cm3leon@challenger")
    assert bundle_hash(fetched) == bundle_hash(bundle.path) == first.tags["bundle_hash"]
    assert registry.fetch_bundle("models:/cm3leon/1") == fetched
    files = [file for file in Path("mlruns").rglob("*") if file.is_file()]
    assert len(files) > 20
    assert not [f for f in files if f.suffix in (".pkl", ".pt", ".pth", ".pyc")]
    for file in files:
        assert not file.read_bytes().startswith(b"\x80\x04"), f"{file} is a pickle"


@pytest.mark.parametrize("name", ["what?x", "per%20cent", "dollar$HOME", "a b#'&[ü]"])
def test_a_model_is_registered_and_fetched_whatever_the_projects_path_is_called(stages, monkeypatch, name):
    odd = stages / name / "project"
    odd.mkdir(parents=True)
    for part in ("models", "data", "mlflow.db"):
        (stages / part).rename(odd / part)
    monkeypatch.chdir(odd)
    bundle = build_bundle(Path("bundle"), CONFIG)
    registry.register(bundle, CONFIG)
    fetched = registry.fetch_bundle("models:/cm3leon@challenger")
    assert fetched.is_relative_to(odd) and bundle_hash(fetched) == bundle_hash(bundle.path)
    assert [path.name for path in stages.iterdir()] == [name] and [path.name for path in (stages / name).iterdir()] == ["project"]


def test_a_model_that_is_not_registered_is_named(project):
    with pytest.raises(registry.NotRegisteredError, match="models:/cm3leon@champion"):
        registry.fetch_bundle()
    (project / "mlflow.db").unlink()
    with pytest.raises(registry.NotRegisteredError, match="run the pipeline"):
        registry.fetch_bundle()
    assert not (project / "mlflow.db").exists()


def test_registering_leaves_the_process_with_the_store_it_had(stages, monkeypatch):
    import mlflow

    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    registry.register(evaluated(0.5), CONFIG)
    assert (mlflow.get_tracking_uri(), mlflow.get_registry_uri()) == before
    assert not {"MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"} & set(os.environ)
