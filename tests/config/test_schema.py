"""Parameters: the defaults are profile ``small``, every key is described, wrong values are refused with the key named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cm3leon.config.ingest_schema import IngestConfig
from cm3leon.config.loading import all_keys, load_config, parse_config, section_class
from cm3leon.config.profiles import load_profile
from cm3leon.config.schema import TASK_NAMES, TWO_IMAGE_TASKS, Config
from cm3leon.config.section import Section
from cm3leon.sequence.tasks import TASKS
from cm3leon.utils.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_defaults_are_profile_small() -> None:
    assert Config() == load_profile("small", configs=CONFIGS)


def test_task_names_are_those_of_the_tasks() -> None:
    assert tuple(TASKS) == TASK_NAMES
    assert tuple(name for name, task in TASKS.items() if task.sees_image) == TWO_IMAGE_TASKS


@pytest.mark.parametrize("key", all_keys())
def test_every_key_has_a_description_and_a_default(key: str) -> None:
    section, _, name = key.rpartition(".")
    found = section_class(section)
    assert found is not None
    field = found.model_fields[name]
    assert field.description
    assert field.description[0] != " " and not field.description.endswith(".")
    assert not field.is_required()


def test_every_section_says_what_it_is_for() -> None:
    sections = {section for key in all_keys() if (section := section_class(key.rpartition(".")[0]))}
    assert len(sections) > 15
    assert all(section.__doc__ and section.__doc__ != Section.__doc__ for section in sections)


@pytest.mark.parametrize(("tree", "message"), [
    ({"pretrain": {"stepz": 3}}, "pretrain.stepz: unknown key; did you mean pretrain.steps?"),
    ({"pretrian": {}}, "pretrian: unknown key; did you mean pretrain?"),
    ({"image_tokenizer": {"layers": 3}}, "image_tokenizer.layers: unknown key"),
    ({"entirely": {}}, "entirely: unknown key; docs/configuration.md lists all keys"),
    ({"sft": {"steps": 0}}, "sft.steps: Input should be greater than or equal to 1 (found 0)"),
    ({"validate": {"max_rejected_rate": 1.5}}, "validate.max_rejected_rate"),
    ({"pretrain": {"learning_rate": float("inf")}}, "pretrain.learning_rate: Input should be a finite number"),
    ({"pretrain": {"model": {"width": 10, "heads": 3}}}, "width 10 is not a multiple of heads 3"),
    ({"pretrain": {"model": {"width": 36, "heads": 3}}}, "rope needs heads of a multiple of 8, found 12"),
    ({"sft": {"tasks": {"dance": 1.0}}}, "sft: tasks names dance; tasks are text_to_image, write"),
    ({"sft": {"tasks": {"caption": -1.0}}}, "sft: the weights of tasks must be 0 or more"),
    ({"sft": {"tasks": {"caption": 0.0}}}, "at least one above 0"),
    ({"sft": {"retrieved_documents": [0.5, 0.4]}}, "sft: retrieved_documents must be shares"),
    ({"sft": {"retrieved_documents": []}}, "sft: retrieved_documents must be shares"),
    ({"pretrain": {"retrieved_documents": [1.5, -0.5]}}, "pretrain: retrieved_documents must be shares"),
    ({"decoding": {"tasks": {"edit": {"top_q": 1}}}}, "decoding: tasks.edit.top_q: unknown key"),
    ({"decoding": {"tasks": {"edit": {"top_p": 2}}}}, "decoding: tasks.edit.top_p: Input should be less than or equal to 1 (found 2)"),
    ({"decoding": {"tasks": {"edit": {"tasks": {}}}}}, "decoding: tasks.edit: the settings of a task have no tasks of their own"),
    ({"image_tokenizer": {"image_size": 256}}, "pretrain.model.context 256 is too short for an image of 1024 tokens"),
    (
        {
            "image_tokenizer": {"image_size": 128}, "pretrain": {"model": {"context": 288, "sentinels": 16}},
            "sft": {"tasks": {"text_to_image": 1.0}},
        },
        "pretrain.model.context 288 is too short for inpainting, where each row of a region has a mask: raise it to 295",
    ),
    (
        {"image_tokenizer": {"image_size": 96}},
        "condition_to_image and edit, which take two images of 144 tokens each and 32 of text: raise it to 320, or set sft.tasks.",
    ),
    ({"extends": "small"}, "only profiles in configs/ extend others; write a complete file with: cm3leon configure NAME"),
    ([1], "expected a mapping"),
])  # fmt: skip
def test_wrong_parameters_are_named_in_one_line(tree: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^here\.yaml: ") as caught:
        parse_config(tree, "here.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_wrong_keys_are_a_line_each() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"pretrain": {"steps": 0, "clip": -1}}, "here.yaml")
    first, *lines = str(caught.value).splitlines()
    assert first == "here.yaml: 2 keys are wrong:"
    assert [line.split(":")[0].strip() for line in lines] == ["pretrain.steps", "pretrain.clip"]


@pytest.mark.parametrize("key", [key for key in all_keys() if key.rpartition(".")[2] == "seed"])
def test_seeds_are_numbers_of_32_bits(key: str) -> None:
    def tree(value: int) -> Any:
        found: Any = value
        for part in reversed(key.split(".")):
            found = {part: found}
        return found

    for fine in (0, 2**32 - 1):
        parse_config(tree(fine), "here.yaml")
    for wrong in (-1, 2**32):
        with pytest.raises(ConfigError, match=rf"^here\.yaml: {key}: Input should be .* \(found {wrong}\)$"):
            parse_config(tree(wrong), "here.yaml")


def test_the_context_must_hold_an_image_and_text() -> None:
    tokens = Config().image_tokenizer.tokens_per_image
    parse_config({"pretrain": {"model": {"context": tokens + 32}}, "sft": {"tasks": {"vqa": 1.0}}}, "here.yaml")
    parse_config({"pretrain": {"model": {"context": 2 * tokens + 32}}}, "here.yaml")
    with pytest.raises(ConfigError, match=r"raise pretrain\.model\.context, lower image_tokenizer\.image_size") as caught:
        parse_config({"pretrain": {"model": {"context": tokens + 31}}}, "here.yaml")
    assert len(str(caught.value)) < 400, "the parameters are not repeated"
    parse_config({"image_tokenizer": {"image_size": 256, "pretrained": "elsewhere"}}, "here.yaml")  # its own size counts


def test_a_pretrained_encoder_has_weights_and_only_with_one_are_images_compared_by_embeddings() -> None:
    similarity, encoder = {"near_duplicate_similarity": 0.95}, {"pretrained_model": "ViT-B-32", "pretrained_weights": "laion2b_s34b_b79k"}
    parse_config({"validate": similarity, "encoder": encoder}, "here.yaml")
    for wrong, message in (
        ({"validate": similarity}, r"validate\.near_duplicate_similarity needs encoder\.pretrained_model"),
        ({"encoder": {"pretrained_model": "ViT-B-32"}}, r"encoder: .*pretrained_model needs pretrained_weights"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            parse_config(wrong, "here.yaml")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "message"), [
    (b"a: [1", r"params\.yaml is not YAML, line 1: expected ',' or ']'"),
    (b"seed: 1\npretrain:\n  steps: 3\nseed: 2\n", r"params\.yaml, line 4: seed is named twice, first in line 1; keep one of the two"),
    (b"sft:\n  steps: 3\npretrain: {}\nsft: {}\n", r"params\.yaml, line 4: sft is named twice, first in line 1"),
    (b"sft:\n  tasks: {vqa: 1.0, caption: 2.0, vqa: 3.0}\n", r"params\.yaml, line 2: vqa is named twice, first in line 2"),
    (b"profile: na\xefve\n", r"params\.yaml is not UTF-8: byte 0xef at position 11; save it as UTF-8"),
    (b"profile: a\x00b\n", r"params\.yaml is not YAML: unacceptable character #x0000"),
    (b"? [1]\n: 2\n", r"params\.yaml, line 1: found unhashable key"),
])  # fmt: skip
def test_broken_files_are_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(tmp_path / "params.yaml")
    assert "\n" not in str(caught.value)


def test_a_missing_file_says_how_to_write_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cm3leon configure small"):
        load_config(tmp_path / "params.yaml")


@pytest.mark.parametrize("path", [".", "data", "./data/", "models", "models/mine", "data/raw", "data/../data/tokens/x", ".."])
def test_a_collection_lies_apart_from_what_stages_write(path: str) -> None:
    with pytest.raises(ValidationError, match=r"holds or is what stages write .*: give the collection a directory of its own"):
        IngestConfig(path=path)


@pytest.mark.parametrize("path", ["data/source", "data/mine", "photos", "../photos", "/srv/photos", "data/raw2"])
def test_any_other_place_will_do(path: str) -> None:
    assert IngestConfig(path=path).path == path
