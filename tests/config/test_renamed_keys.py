"""Keys that were renamed: a parameter file with an old key is told the new one; JSON files that an earlier version wrote still load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests_support import decoder_spec

from cm3leon.config.loading import parse_config
from cm3leon.config.profiles import configure
from cm3leon.config.renamed import RENAMED, current_name, current_names
from cm3leon.config.schema import Config
from cm3leon.evaluation.record import FILE, Record
from cm3leon.generation.generator import Generator
from cm3leon.models.decoder import Decoder
from cm3leon.models.opt import export_opt, import_opt
from cm3leon.registry.bundle import build_bundle
from cm3leon.registry.signature import request_settings
from cm3leon.sequence.grammar import Vocabulary
from cm3leon.serving.requests import TextToImage
from cm3leon.utils.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def bundle(tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tiny_models)
    return build_bundle(tmp_path / "bundle", Config()).path


def nested(key: str, value: Any = None) -> dict[str, Any]:
    """A tree that holds one dotted key."""
    for part in reversed(key.replace("*", "edit").split(".")):
        value = {part: value}
    return dict(value)


def rename(file: Path, **names: str) -> None:
    """Write the keys of a JSON file as an earlier version did, at any depth."""

    def old(tree: Any) -> Any:
        return {names.get(key, key): old(value) for key, value in tree.items()} if isinstance(tree, dict) else tree

    text = json.dumps(old(json.loads(file.read_text())))
    assert all(f'"{name}"' in text for name in names.values())
    file.unlink()  # it may be a hard link
    file.write_text(text)


@pytest.mark.parametrize("key", RENAMED)
def test_an_old_key_is_refused_with_the_new_one(key: str, tmp_path: Path) -> None:
    old, new = key.replace("*", "edit"), RENAMED[key].replace("*", "edit")
    with pytest.raises(ConfigError) as caught:
        parse_config(nested(old), "here.yaml")
    assert str(caught.value) == f"here.yaml has keys of an earlier version: {old} is now called {new}"
    with pytest.raises(ConfigError, match=f": {old} is now called {new}"):
        configure("small", [f"{old}=1"], configs=CONFIGS, params=tmp_path / "params.yaml")


@pytest.mark.parametrize("key", RENAMED)
def test_new_names_are_keys_of_the_schema(key: str) -> None:
    section, _, name = RENAMED[key].replace(".tasks.*", "").rpartition(".")
    tree: Any = Config().model_dump(by_alias=True)
    for part in section.split("."):
        tree = tree[part]
    assert name in tree
    assert current_name(RENAMED[key]) is None, "a new name is no old one"


def test_stored_trees_are_read_with_the_names_of_today() -> None:
    stored = {"documents": 1, "top_k": None, "tasks": {"edit": {"documents": 2, "guidance": 1.0}}}
    expected = {"retrieved_documents": 1, "top_k": None, "tasks": {"edit": {"retrieved_documents": 2, "guidance": 1.0}}}
    assert current_names(stored, "decoding") == expected
    assert current_names({"decoding": stored, "documents": 3}, "") == {"decoding": expected, "documents": 3}
    assert current_names(expected, "decoding") == expected


def test_a_stored_file_that_holds_no_parameters_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a mapping of parameters, found list"):
        current_names([1], "decoding")


@pytest.mark.parametrize("key", [key for key in RENAMED if "*" not in key])
def test_the_documentation_names_every_renamed_key(key: str) -> None:
    page = (CONFIGS.parent / "docs/configuration.md").read_text()
    assert f"`{key}`" in page
    assert f"`{RENAMED[key]}`" in page or f"`{RENAMED[key].rpartition('.')[2]}`" in page


def test_a_decoder_of_an_earlier_version_loads(tmp_path: Path) -> None:
    spec = decoder_spec(layers=1, width=32, heads=4, context=48, rope=True)
    Decoder(spec, Vocabulary(40, 20, 4, 9)).save(tmp_path)
    rename(tmp_path / "config.json", rope="rotation")
    assert Decoder.load(tmp_path).spec == spec


def test_an_opt_checkpoint_of_an_earlier_version_loads(tmp_path: Path) -> None:
    model = Decoder(decoder_spec(layers=1, width=32, heads=4, context=48), Vocabulary(40, 20, 4, 9))
    export_opt(model, tmp_path)
    rename(tmp_path / "config.json", rope="rotation")
    assert import_opt(tmp_path).spec == model.spec


def test_a_bundle_of_an_earlier_version_loads(bundle: Path) -> None:
    decoding = json.loads((bundle / "decoding.json").read_text())
    (bundle / "decoding.json").write_text(json.dumps({**decoding, "retrieved_documents": 3, "tasks": {"edit": {"retrieved_documents": 2}}}))
    rename(bundle / "decoding.json", retrieved_documents="documents")
    rename(bundle / "config.json", rope="rotation")
    loaded = Generator.from_bundle(bundle).decoding
    assert (loaded.retrieved_documents, loaded.tasks["edit"]) == (3, {"retrieved_documents": 2})


def test_an_evaluation_record_of_an_earlier_version_is_comparable(tmp_path: Path) -> None:
    decoding = Config().decoding.model_dump(mode="json")
    record = Record(settings={"decoding": decoding, "retrieve": {}})
    record.write(tmp_path)
    rename(tmp_path / FILE, retrieved_documents="documents")
    assert Record.read(tmp_path) == record


def test_requests_with_the_old_name_are_answered() -> None:
    """MLflow fills in the defaults of a registered model's signature under the names that it was registered with."""
    assert request_settings({"documents": 2}).retrieved_documents == 2
    for name in ("documents", "retrieved_documents"):
        assert TextToImage.model_validate({"prompt": "a ring", name: 2}).settings()["retrieved_documents"] == 2
