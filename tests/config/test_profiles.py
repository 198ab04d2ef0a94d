"""Profiles: their values are those kept, each file states only what differs, and ``configure`` writes all of it."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cm3leon.config.files import named_files
from cm3leon.config.loading import all_keys, load_config, section_class
from cm3leon.config.profiles import changed_config, configure, load_profile, profile_names
from cm3leon.config.schema import Config
from cm3leon.models.clip import build_clip, trained_settings
from cm3leon.models.decoder import Decoder, DecoderSpec
from cm3leon.models.vqgan import ImageTokenizer
from cm3leon.training.planning import vocabulary_of
from cm3leon.training.vqgan import make_spec
from cm3leon.utils.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
PROFILES = profile_names(CONFIGS)
KEPT: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("profiles.json").read_text())
"""Dotted key -> profile -> value. A change of a profile changes this file too, so that nobody makes one unnoticed."""


def flat(tree: dict[str, Any], section: str = "") -> dict[str, Any]:
    """Dotted key -> value, for every parameter that a tree states."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{section}.{name}".lstrip(".")
        found |= flat(value, key) if isinstance(value, dict) and section_class(key) else {key: value}
    return found


def values(config: Config) -> dict[str, Any]:
    return flat(config.model_dump(mode="json", by_alias=True))


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_has_the_values_that_are_kept(profile: str) -> None:
    assert values(load_profile(profile, configs=CONFIGS)) == {key: by_profile[profile] for key, by_profile in KEPT.items()}


def test_values_are_kept_of_every_key_and_profile() -> None:
    assert list(KEPT) == list(all_keys())
    assert all(sorted(by_profile) == PROFILES for by_profile in KEPT.values())
    assert {"tiny", "small", "gpu", "cm3leon-350m", "cm3leon-760m", "cm3leon-7b"} <= set(PROFILES)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_states_only_what_differs_from_its_parent(profile: str) -> None:
    own = yaml.safe_load((CONFIGS / f"{profile}.yaml").read_text())
    parent = own.pop("extends", None)
    inherited = values(load_profile(parent, configs=CONFIGS) if parent else Config())
    stated = flat(own)
    assert [key for key, value in stated.items() if value == inherited[key] and key != "profile"] == []


def test_tiny_has_no_floors() -> None:
    gate = load_profile("tiny", configs=CONFIGS).gate
    assert not gate.floors
    assert not gate.ceilings


@pytest.mark.parametrize(("name", "layers", "width", "heads", "rate", "tokens"), [
    ("cm3leon-350m", 24, 1024, 16, 6e-4, 1.4e12),
    ("cm3leon-760m", 24, 1536, 16, 5e-4, 1.9e12),
    ("cm3leon-7b", 32, 4096, 32, 1.2e-4, 2.4e12),
])  # fmt: skip
def test_papers_models(name: str, layers: int, width: int, heads: int, rate: float, tokens: float) -> None:
    config = load_profile(name, configs=CONFIGS)
    model, pretrain = config.pretrain.model, config.pretrain
    assert (model.layers, model.width, model.heads, model.context) == (layers, width, heads, 4096)
    assert (pretrain.learning_rate, pretrain.warmup_steps) == (rate, 1500)
    assert pretrain.steps * pretrain.batch_size * model.context == pytest.approx(tokens, rel=1e-3)
    assert config.sft.steps * config.sft.batch_size * model.context == pytest.approx(30e9, rel=1e-2)
    images, texts = config.image_tokenizer, config.text_tokenizer
    assert (images.tokens_per_image, images.downsampling, images.codebook_size) == (1024, 8, 8192)
    assert texts.vocabulary_size + images.codebook_size + model.sentinels + 512 == 65_536


# --- inheritance -----------------------------------------------------------------------------------------------------


def write(directory: Path, **files: str) -> Path:
    for name, text in files.items():
        (directory / f"{name}.yaml").write_text(text)
    return directory


def test_sections_are_merged_and_maps_of_the_users_keys_replaced(tmp_path: Path) -> None:
    configs = write(
        tmp_path,
        one="profile: one\nsft: {steps: 7, batch_size: 3, tasks: {caption: 1.0}}\npretrain: {model: {layers: 9}}\n",
        two="profile: two\nextends: one\nsft: {steps: 8, tasks: {vqa: 2.0}}\n",
        three="profile: three\nextends: two\npretrain: {model: {qk_norm: false}}\n",
    )
    found = load_profile("three", configs=configs)
    assert (found.sft.steps, found.sft.batch_size, found.sft.tasks) == (8, 3, {"vqa": 2.0})
    assert (found.pretrain.model.layers, found.pretrain.model.qk_norm, found.pretrain.model.width) == (9, False, 96)
    assert (found.profile, found.sft.learning_rate) == ("three", Config().sft.learning_rate)


@pytest.mark.parametrize(("files", "message"), [
    ({"one": "profile: one\nextends: one\n"}, r"one\.yaml: extends one, which closes a cycle: one -> one"),
    (
        {"one": "profile: one\nextends: two\n", "two": "profile: two\nextends: one\n"},
        r"two\.yaml: extends one, which closes a cycle: one -> two -> one",
    ),
    ({"one": "profile: one\nextends: nobody\n"}, r"one\.yaml: extends 'nobody', but there is no profile 'nobody'; .* has: one$"),
    ({"one": "profile: two\n"}, r"one\.yaml: profile is 'two'; it must be the name of the file, 'one'"),
    ({"one": "seed: 3\n"}, r"one\.yaml: profile is None; it must be the name of the file, 'one'"),
    ({"one": "- 1\n"}, r"one\.yaml: expected a mapping of sections, found list"),
    ({"one": "profile: one\nextends: two\n", "two": "profile: two\nsft: {steps: 0}\n"}, r"two\.yaml: sft\.steps: Input should be"),
    ({"one": "profile: one\nvalidate: {licences: [MIT]}\n"}, r"one\.yaml has keys .*: validate\.licences is now called validate\.licenses"),
    ({"one": "profile: one\nsft: {}\nsft: {}\n"}, r"one\.yaml, line 3: sft is named twice, first in line 2"),
])  # fmt: skip
def test_wrong_profiles_are_one_line(files: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_profile("one", configs=write(tmp_path, **files))
    assert "\n" not in str(caught.value)


def test_an_unknown_profile_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no profile 'smal'.* small, tiny$"):
        configure("smal", configs=CONFIGS, params=tmp_path / "params.yaml")


# --- params.yaml -----------------------------------------------------------------------------------------------------


def test_params_yaml_is_what_configure_writes(tmp_path: Path) -> None:
    """The repository's is profile small; where the working tree was configured otherwise, it is what the command in its header writes."""
    text = (ROOT / "params.yaml").read_text()
    [command] = [line for line in text.splitlines() if line.startswith("# Written by: ")]
    name, configured, profile, *options = shlex.split(command.removeprefix("# Written by: "))
    assert (name, configured, options[::2]) == ("cm3leon", "configure", ["--set"] * (len(options) // 2))
    configure(profile, options[1::2], configs=CONFIGS, params=tmp_path / "params.yaml")
    assert text == (tmp_path / "params.yaml").read_text(), f"write it again with: {command.removeprefix('# Written by: ')}"


def test_the_repositorys_params_yaml_is_profile_small() -> None:
    committed = subprocess.run(["git", "show", "HEAD:params.yaml"], cwd=ROOT, capture_output=True, text=True, check=False)
    if committed.returncode:
        pytest.skip("not a git repository")
    assert "\n# Written by: cm3leon configure small\n" in committed.stdout


@pytest.mark.parametrize("profile", PROFILES)
def test_configure_writes_every_key(profile: str, tmp_path: Path) -> None:
    """DVC sees parameters in files only: a default that no file states could change unnoticed."""
    params = tmp_path / "params.yaml"
    written = configure(profile, configs=CONFIGS, params=params)
    assert written == load_config(params) == load_profile(profile, configs=CONFIGS)
    assert list(flat(yaml.safe_load(params.read_text()))) == list(all_keys())


def test_configure_gives_a_profiles_reasons_where_its_value_holds(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    configure("cm3leon-760m", ["pretrain.weight_decay=0.2", "sft={clip: 2.0}"], configs=CONFIGS, params=params)
    lines = params.read_text().splitlines()
    assert "    width: 1536  # width of the residual stream; the feed-forward is four times as wide [paper]" in lines
    assert "    context: 4096  # longest sequence, tokens (paper: 4096) [paper]" in lines, "of its parent"
    assert "  steps: 226500  # optimizer steps [1.9T tokens (paper)]" in lines
    assert "  weight_decay: 0.2  # decoupled weight decay" in lines
    assert "  clip: 2.0  # norm to which the gradient is clipped" in lines
    assert lines[0].startswith("# Profile cm3leon-760m")
    assert "# Written by: cm3leon configure cm3leon-760m --set pretrain.weight_decay=0.2 --set 'sft={clip: 2.0}'" in lines


def test_configure_sets_values(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    changes = [
        "pretrain.steps=2000",
        "ingest.source=folder",
        "ingest.folder.columns.captions=caption",
        "sft.tasks={caption: 1.0}",
        "pretrain.model={layers: 2, qk_norm: false}",
        "decoding.tasks.vqa.top_k=3",
        "seed=7",
    ]
    written = configure("small", changes, configs=CONFIGS, params=params)
    assert written == load_config(params) == load_profile("small", changes, configs=CONFIGS)
    expected = values(Config()) | {
        "pretrain.steps": 2000,
        "ingest.source": "folder",
        "ingest.folder.columns": {"captions": "caption"},
        "sft.tasks": {"caption": 1.0},
        "pretrain.model.layers": 2,
        "pretrain.model.qk_norm": False,
        "decoding.tasks": {**Config().decoding.tasks, "vqa": {"top_k": 3}},
        "seed": 7,
    }
    assert values(written) == expected


@pytest.mark.parametrize(("change", "message"), [
    ("pretrain.stepz=3", r"^--set pretrain\.stepz=3: pretrain\.stepz: unknown key; did you mean pretrain\.steps\?$"),
    ("encoder.text_width=48", r"encoder: text_width 48: a transformer's width is a multiple of 32, the width of its heads$"),
    ("encoder={image_tower: vit, width: 16}", r"encoder: width 16: a transformer's width is a multiple of 32"),
    ("pretrian.steps=3", r"pretrian: unknown key; did you mean pretrain\?$"),
    ("sft.neighbours=text", r"^--set sft\.neighbours=text: sft\.neighbours is now called sft\.neighbors$"),
    ("pretrain.steps=-1", r"small\.yaml with pretrain\.steps=-1: pretrain\.steps: Input should be"),
    ("pretrain.steps", "is not KEY=VALUE, for example pretrain.steps=2000"),
    ("nothing.at.all=1", r"nothing: unknown key"),
    ("pretrain.steps.more=1", r"pretrain\.steps is not a section"),
    ("=3", "is not KEY=VALUE"),
    ("seed=2023-02-30", r"^--set seed=2023-02-30: the value is not YAML"),
    ("seed=[1", r"^--set seed=\[1: the value is not YAML"),
    ("sft.tasks={vqa: 1, vqa: 2}", r"vqa is named twice"),
    ("pretrain=3", r"pretrain: Input should be a valid dictionary"),
    ("extends=tiny", "extends: unknown key"),
])  # fmt: skip
def test_configure_writes_nothing_that_is_wrong(change: str, message: str, tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    with pytest.raises(ConfigError, match=message) as caught:
        configure("small", [change], configs=CONFIGS, params=params)
    assert "\n" not in str(caught.value)
    assert not params.exists()


def test_a_parameter_file_is_read_with_changes(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("sft: {steps: 3}\n")
    found = changed_config(["sft.batch_size=2"], tmp_path / "params.yaml")
    assert (found.sft.steps, found.sft.batch_size, found.sft.warmup_steps) == (3, 2, Config().sft.warmup_steps)
    with pytest.raises(ConfigError, match="cm3leon configure small"):
        changed_config([], tmp_path / "nothing.yaml")


@pytest.mark.parametrize("profile", PROFILES)
def test_a_rehearsal_is_small_and_computes_as_the_profile_does(profile: str, tmp_path: Path) -> None:
    whole, tiny = load_profile(profile, configs=CONFIGS), load_profile("tiny", configs=CONFIGS)
    config = configure(profile, ["pretrain.steps=7"], configs=CONFIGS, params=tmp_path / "params.yaml", rehearse=True)
    assert load_config(tmp_path / "params.yaml") == config
    assert f"# Written by: cm3leon configure {profile} --rehearse --set pretrain.steps=7" in (tmp_path / "params.yaml").read_text()
    assert (config.profile, config.pretrain.steps, config.sft.steps) == (f"{profile}-rehearsal", 7, tiny.sft.steps)
    for section in ("pretrain", "sft"):
        own, full = getattr(config, section), getattr(whole, section)
        for name in ("precision", "packing", "optimizer", "activation_checkpointing", "compile", "retrieved_documents"):
            assert getattr(own, name) == getattr(full, name)
    assert config.launch.processes == 2 and config.pretrain.batch_size // 2 > (config.pretrain.micro_batch_size or 0)
    assert config.index.kind == whole.index.kind and config.decoding.guidance == whole.decoding.guidance
    assert not named_files(config)
    build_clip(trained_settings(config.encoder, config.encoder.vocabulary_size)["model"])
    Decoder(DecoderSpec.from_config(config.pretrain.model), vocabulary_of(config))
    ImageTokenizer(make_spec(config.image_tokenizer))


def test_a_rehearsal_accepts_its_scenes_whatever_the_collection_has_to_be(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text((CONFIGS / "tiny.yaml").read_text())
    own = "profile: own\nvalidate: {licenses: [LicenseRef-mine], max_caption_characters: 20, max_rejected_rate: 0.0}\n"
    (tmp_path / "own.yaml").write_text(own)
    found, tiny = configure("own", configs=tmp_path, params=tmp_path / "params.yaml", rehearse=True), load_profile("tiny", configs=tmp_path)
    assert found.validate_ == tiny.validate_
