"""The datasets that stages log as inputs, and the import of an image tokenizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cm3leon.config import paths
from cm3leon.config.ingest_schema import IngestConfig, ShapesConfig
from cm3leon.config.schema import Config, ImageTokenizerConfig
from cm3leon.models.vqgan import ImageTokenizer, ImageTokenizerSpec
from cm3leon.stages import image_tokenizer, ingest, validate
from cm3leon.tracking import runs


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(stage, path) of the datasets logged; the working directory is an empty project."""
    seen: list[tuple[str, str]] = []

    @contextmanager
    def stage_run(stage: str, config: Config) -> Iterator[runs.Run]:
        run = runs.Run()
        monkeypatch.setattr(run, "log_dataset", lambda path, name: seen.append((stage, str(path))))
        yield run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "stage_run", stage_run)
    return seen


def test_inputs_are_logged_and_only_the_model_is_imported(recorded: list[tuple[str, str]]) -> None:
    spec = ImageTokenizerSpec(32, patch=4, channels=8, multipliers=(1, 2), blocks=1, decoder_blocks=1, embedding_dim=4, codebook_size=16)
    torch.manual_seed(0)
    ImageTokenizer(spec).save(Path("elsewhere"))
    Path("elsewhere/checkpoint.pt").write_bytes(b"a pickle")
    images = ImageTokenizerConfig(pretrained="elsewhere", image_size=32)
    config = Config(ingest=IngestConfig(shapes=ShapesConfig(count=60)), image_tokenizer=images)

    ingest.run(config)
    validate.run(config)
    image_tokenizer.run(config)
    assert recorded == [("validate", "data/raw"), ("image_tokenizer", "data/raw"), ("image_tokenizer", "data/validated")]
    assert {file.name for file in paths.IMAGE_TOKENIZER.iterdir()} == {"config.json", "model.safetensors", "reconstructions.png"}
    kept, given = (ImageTokenizer.load(folder).state_dict() for folder in (paths.IMAGE_TOKENIZER, Path("elsewhere")))
    assert all(torch.equal(kept[name], given[name]) for name in given)
