"""Parameter files: every profile is valid and complete, wrong ones are refused with the key named, `configure` keeps comments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cm3leon.config.profiles import configure, profile_names
from cm3leon.config.schema import TASK_NAMES, Config, ConfigError, load_config, parse_config
from cm3leon.sequence.tasks import TASKS

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
PROFILES = profile_names(CONFIGS)
FREE = {"columns", "tasks", "floors", "ceilings", "margins"}
"""Sections whose keys are the user's."""


def keys(tree: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted names of all parameters."""
    found = set()
    for name, value in tree.items():
        found |= keys(value, f"{prefix}{name}.") if isinstance(value, dict) and name not in FREE else {f"{prefix}{name}"}
    return found


def test_the_profiles_there_should_be() -> None:
    assert {"tiny", "small", "gpu", "cm3leon-350m", "cm3leon-760m", "cm3leon-7b"} <= set(PROFILES)


@pytest.mark.parametrize("profile", PROFILES)
def test_profile_is_valid_and_complete(profile: str) -> None:
    """Complete: DVC sees parameters in files only, so a default in code that no file states could change unnoticed."""
    path = CONFIGS / f"{profile}.yaml"
    config = load_config(path)
    assert config.profile == profile
    assert keys(yaml.safe_load(path.read_text())) == keys(config.model_dump(by_alias=True))


def test_params_yaml_is_valid_and_complete() -> None:
    assert keys(yaml.safe_load((ROOT / "params.yaml").read_text())) == keys(load_config(ROOT / "params.yaml").model_dump(by_alias=True))


def test_tiny_has_no_floors() -> None:
    gate = load_config(CONFIGS / "tiny.yaml").gate
    assert not gate.floors
    assert not gate.ceilings


@pytest.mark.parametrize(("name", "layers", "width", "heads", "rate", "tokens"), [
    ("cm3leon-350m", 24, 1024, 16, 6e-4, 1.4e12),
    ("cm3leon-760m", 24, 1536, 16, 5e-4, 1.9e12),
    ("cm3leon-7b", 32, 4096, 32, 1.2e-4, 2.4e12),
])  # fmt: skip
def test_papers_models(name: str, layers: int, width: int, heads: int, rate: float, tokens: float) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    model, pretrain = config.pretrain.model, config.pretrain
    assert (model.layers, model.width, model.heads, model.context) == (layers, width, heads, 4096)
    assert (pretrain.learning_rate, pretrain.warmup_steps) == (rate, 1500)
    assert pretrain.steps * pretrain.batch_size * model.context == pytest.approx(tokens, rel=1e-3)
    assert config.sft.steps * config.sft.batch_size * model.context == pytest.approx(30e9, rel=1e-2)
    images, texts = config.image_tokenizer, config.text_tokenizer
    assert (images.tokens_per_image, images.downsampling, images.codebook_size) == (1024, 8, 8192)
    assert texts.vocabulary_size + images.codebook_size + model.sentinels + 512 == 65_536


@pytest.mark.parametrize(("tree", "message"), [
    ({"pretrain": {"stepz": 3}}, "pretrain.stepz: unknown key"),
    ({"pretrian": {}}, "pretrian: unknown key"),
    ({"sft": {"steps": 0}}, "sft.steps: Input should be greater than or equal to 1 (found 0)"),
    ({"validate": {"max_rejected_rate": 1.5}}, "validate.max_rejected_rate"),
    ({"pretrain": {"model": {"width": 10, "heads": 3}}}, "width 10 is not a multiple of heads 3"),
    ({"sft": {"tasks": {"dance": 1.0}}}, "sft: tasks names dance; tasks are text_to_image, write"),
    ({"sft": {"tasks": {"caption": -1.0}}}, "sft: the weights of tasks must be 0 or more"),
    ({"sft": {"tasks": {"caption": 0.0}}}, "at least one above 0"),
    ({"sft": {"retrieved_documents": [0.5, 0.4]}}, "sft: retrieved_documents must be shares"),
    ({"sft": {"retrieved_documents": []}}, "sft: retrieved_documents must be shares"),
    ({"pretrain": {"retrieved_documents": [1.5, -0.5]}}, "pretrain: retrieved_documents must be shares"),
    ({"image_tokenizer": {"image_size": 256}}, "pretrain.model.context 256 is too short for an image of 1024 tokens"),
    ([1], "expected a mapping"),
])  # fmt: skip
def test_wrong_parameters_are_named(tree: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=r"here\.yaml") as caught:
        parse_config(tree, "here.yaml")
    assert message in str(caught.value)


def test_the_context_must_hold_an_image_and_text() -> None:
    tokens = Config().image_tokenizer.tokens_per_image
    parse_config({"pretrain": {"model": {"context": tokens + 32}}}, "here.yaml")
    with pytest.raises(ConfigError, match=r"raise pretrain\.model\.context, lower image_tokenizer\.image_size") as caught:
        parse_config({"pretrain": {"model": {"context": tokens + 31}}}, "here.yaml")
    assert len(str(caught.value)) < 400, "the parameters are not repeated"
    parse_config({"image_tokenizer": {"image_size": 256, "pretrained": "elsewhere"}}, "here.yaml")  # its own size counts


def test_task_names_are_those_of_the_tasks() -> None:
    assert tuple(TASKS) == TASK_NAMES


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cm3leon configure small"):
        load_config(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(tmp_path / "params.yaml")


def test_configure_copies_a_profile_as_it_is(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    configure("tiny", configs=CONFIGS, params=params)
    assert params.read_text() == (CONFIGS / "tiny.yaml").read_text()


def test_configure_sets_values_and_keeps_comments(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    changes = [
        "pretrain.steps=2000",
        "ingest.source=folder",
        "ingest.folder.columns.captions=caption",
        "sft.tasks={caption: 1.0}",
        "seed=7",
    ]
    written = configure("small", changes, configs=CONFIGS, params=params)
    assert written == load_config(params)
    assert (written.pretrain.steps, written.ingest.source, written.seed) == (2000, "folder", 7)
    assert written.ingest.folder.columns == {"captions": "caption"}
    assert written.sft.tasks == {"caption": 1.0}
    before, after = (CONFIGS / "small.yaml").read_text(), params.read_text()
    assert after.count("#") == before.count("#")
    untouched = written.model_copy(update={name: getattr(Config(), name) for name in ("pretrain", "ingest", "sft", "seed")})
    original = load_config(CONFIGS / "small.yaml")
    assert untouched == original.model_copy(update={name: getattr(Config(), name) for name in ("pretrain", "ingest", "sft", "seed")})


@pytest.mark.parametrize(
    "change", ["pretrain.stepz=3", "pretrain.steps=-1", "pretrain.steps", "nothing.at.all=1", "pretrain.steps.more=1", "=3", "a=[1"]
)
def test_configure_writes_nothing_that_is_wrong(change: str, tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    with pytest.raises(ConfigError):
        configure("small", [change], configs=CONFIGS, params=params)
    assert not params.exists()


def test_configure_unknown_profile(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="small, tiny"):
        configure("smal", configs=CONFIGS, params=tmp_path / "params.yaml")
