"""A model's directory for transformers: its README's prompts are the generator's, its examples run, and a bundle's card comes along."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from alone_support import run_alone
from registry_support import evaluated
from tokenizers import Tokenizer
from typer.testing import CliRunner

from cm3leon.cli import app
from cm3leon.config import paths
from cm3leon.generation.image_requests import guidance_streams, query_segments
from cm3leon.generation.parts import Parts, load_parts
from cm3leon.generation.prompts import answer_prompt
from cm3leon.models.decoder import Decoder
from cm3leon.registry.transformers_export import export_model, prompt_pattern
from cm3leon.sequence.tasks import IMAGE_FIELDS, TASKS, Training

FIELDS = {"caption": "a red circle", "text": "A", "layout": "circle at (1, 2) -> (3, 4)", "kind": "depth", "instruction": "make it blue"}
FIELDS |= {"question": "What color?", "context": "none", "options": "(A) red (B) blue"}


@pytest.fixture(scope="module")
def parts(tiny_parts: dict[str, Path]) -> Parts:
    from tests_support import decoding

    return load_parts(**{name: tiny_parts[name] for name in ("model", "image_tokenizer", "text_tokenizer")}, decoding=decoding())


@pytest.fixture(scope="module")
def exported(tiny_parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported")
    export_model(Decoder.load(tiny_parts["model"]), tiny_parts["model"], out)
    return out


def read(exported: Path, pattern: str, codes: np.ndarray) -> list[int]:
    """Token ids of a pattern with its fields filled in, as the exported tokenizer reads it."""
    image = "".join(f"<image:{code}>" for code in codes)
    texts = {field: image if f"{{{field}}}" in IMAGE_FIELDS else FIELDS[field] for field in re.findall(r"{(\w+)}", pattern)}
    ids: list[int] = Tokenizer.from_file(str(exported / "tokenizer.json")).encode(pattern.format(**texts)).ids
    return ids


@pytest.mark.parametrize("task", [task for task in TASKS if TASKS[task].generates_image])
def test_patterns_of_images_are_the_generators_streams(task: str, parts: Parts, exported: Path) -> None:
    codes = np.arange(parts.model.vocabulary.tokens_per_image) % 16
    segments = query_segments(parts, task, FIELDS, {"source": codes, "condition": codes})
    streams = guidance_streams(parts, task, segments)
    assert read(exported, prompt_pattern(task), codes) == streams[0].tokens.tolist()
    assert read(exported, prompt_pattern(task, TASKS[task].cfg_dropout[0]), codes) == streams[1].tokens.tolist()


@pytest.mark.parametrize("task", [task for task in TASKS if not TASKS[task].generates_image])
def test_patterns_of_answers_are_the_generators_prompts(task: str, parts: Parts, exported: Path) -> None:
    codes = np.arange(parts.model.vocabulary.tokens_per_image) % 16
    prompt = answer_prompt(TASKS[task].templates[0], FIELDS, codes, parts.model.vocabulary, parts.text_tokenizer)
    assert read(exported, prompt_pattern(task), codes) == prompt.tokens.tolist()


@pytest.mark.slow
def test_the_examples_run_with_transformers_and_pillow(exported: Path) -> None:
    examples = re.findall(r"^```python\n(.*?)^```", (exported / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(examples) == 2
    run_alone("\n".join(examples), ("torch", "transformers", "safetensors", "tokenizers", "pillow"), exported)
    assert (exported / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_bundle_brings_its_card_its_data_and_its_settings(stages: Path) -> None:
    bundle = evaluated(0.5).path
    Training(frozenset({"text_to_image", "vqa"}), masked_prompts=False).write(bundle)
    done = CliRunner().invoke(app.app, ["export", "out", "--model", str(bundle)])
    assert done.exit_code == 0, done.output
    assert "out/README.md says how to generate" in done.output
    text = Path("out/README.md").read_text()
    assert "| CC0-1.0 | 4 | 1 | test | none |" in text and "## Evaluation" in text and "## Lineage" in text
    assert "$" not in text
    assert [row.split(" | ")[0] for row in re.findall(r"^\| (.*<eos>.*) \|$", text, re.MULTILINE)] == ["text_to_image", "vqa"]
    assert "guidance_scale=1.0" in text  # it was not trained for guidance
    pd.testing.assert_frame_equal(pd.read_parquet("out/training_data.parquet"), pd.read_parquet(bundle / "training_data.parquet"))
    assert json.loads(Path("out/generation_config.json").read_text())["temperature"] == 0.7


def test_a_stages_directory_is_exported_with_the_tokenizers_next_to_it(stages: Path) -> None:
    done = CliRunner().invoke(app.app, ["export", "out", "--format", "transformers", "--model", str(paths.FINETUNED)])
    assert done.exit_code == 0, done.output
    assert "lists no training data" in Path("out/README.md").read_text()


def test_a_model_without_tokenizers_is_refused(stages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths.FINETUNED.rename("alone")
    with pytest.raises(SystemExit) as left, app.plain_errors():
        app.app(["export", "out", "--format", "transformers", "--model", "alone"])
    err = capsys.readouterr().err
    assert left.value.code == 2 and err.count("\n") == 1
    assert "alone has no image_tokenizer/" in err and "give --model a bundle" in err
    assert not Path("out").exists()
