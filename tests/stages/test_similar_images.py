"""Validate: images that are alike by the embeddings of a pretrained encoder share a split."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file

from cm3leon.config import paths
from cm3leon.config.ingest_schema import FolderConfig
from cm3leon.config.schema import Config, EncoderConfig, ValidateConfig
from cm3leon.data import data_report, near_duplicates
from cm3leon.data.manifest import read_manifest
from cm3leon.data.packing import pack
from cm3leon.data.sources import folder
from cm3leon.models.clip import Encoder
from cm3leon.stages import validate as validate_stage
from cm3leon.tracking import runs
from cm3leon.utils.errors import ConfigError

COUNT, SIDE, CELL = 30, 32, 8
WEIGHTS = paths.WEIGHTS / "clip.safetensors"


def pictures() -> list[Image.Image]:
    """Images of one color a cell, then a mirrored copy of each."""
    cells = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE // CELL, SIDE // CELL, 3), dtype=np.uint8)
    originals = [Image.fromarray(pixels.repeat(CELL, axis=0).repeat(CELL, axis=1)) for pixels in cells]
    return [*originals, *map(ImageOps.mirror, originals)]


@pytest.fixture
def encoder(tmp_path: Path, tiny_architecture: str, monkeypatch: pytest.MonkeyPatch) -> Encoder:
    """A ViT without positions, whose patches are the cells: it reads which colors there are, not where. Its weights lie in the project.

    ``data/raw`` holds the pictures.
    """
    import open_clip

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "stage_run", lambda stage, config: nullcontext(runs.Run()))
    torch.manual_seed(0)
    model = open_clip.create_model(tiny_architecture)
    model.visual.positional_embedding.data.zero_()
    paths.WEIGHTS.mkdir(parents=True)
    save_file(model.state_dict(), WEIGHTS)
    for number, picture in enumerate(pictures()):
        picture.save(f"{number}.png")
    rows = [{"image": f"{n}.png", "caption": f"picture {n}", "licence": "MIT", "attribution": "me"} for n in range(2 * COUNT)]
    pd.DataFrame(rows).to_csv("manifest.csv", index=False)
    pack(folder.rows(FolderConfig(), Path()), paths.RAW, 32)
    return Encoder.pretrained(tiny_architecture, str(WEIGHTS))


def similarity_between(encoder: Encoder) -> float:
    """A cosine that images and their mirrored copies exceed, and no others."""
    embeddings_ND = encoder.encode_images(pictures())
    cosines = embeddings_ND @ embeddings_ND.T
    same = np.arange(2 * COUNT) % COUNT
    copies = same[:, None] == same
    most, least = cosines[~copies].max(), cosines[copies].min()
    assert least - most > 1e-4, "more than batches of another size round off"
    return float(most + least) / 2


def section(similarity: float | None) -> ValidateConfig:
    return ValidateConfig(
        near_duplicate_distance=0.02,
        near_duplicate_bits=4,
        near_duplicate_similarity=similarity,
        val_fraction=0.2,
        test_fraction=0.2,
        workers=1,
    )


def splits_of_copies() -> tuple[np.ndarray, np.ndarray]:
    """The splits of the images, and those of their mirrored copies."""
    accepted = read_manifest(paths.VALIDATED).sort_values("row")["split"].to_numpy()
    return accepted[:COUNT], accepted[COUNT:]


def test_mirrored_copies_share_a_split_where_embeddings_are_compared(encoder: Encoder, tiny_architecture: str) -> None:
    pretrained = EncoderConfig(pretrained_model=tiny_architecture, pretrained_weights=str(WEIGHTS))
    for similarity, alike in ((None, 0), (similarity_between(encoder), 2 * COUNT)):
        counts = validate_stage.run(Config(validate=section(similarity), encoder=pretrained))
        assert counts["accepted"] == 2 * COUNT
        report = pd.read_json(paths.VALIDATED / "report.json", typ="series")
        assert report["parts"]["rows_with_near_duplicates"] == alike
        assert report["parts"]["count"] == (COUNT if alike else 2 * COUNT)
        assert ('class="card pair"' in (paths.DATA_DOCS / data_report.FILE).read_text()) == bool(alike)
        originals, copies = splits_of_copies()
        assert set(originals) == {"train", "val", "test"}
        assert (originals == copies).all() == bool(alike)


def test_the_splits_do_not_depend_on_how_many_images_are_embedded_or_compared_at_once(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, found = section(similarity_between(encoder)), []
    for batch_size, block in ((1, 7), (7, 11), (128, 1024)):
        monkeypatch.setattr(near_duplicates, "BLOCK", block)
        monkeypatch.setattr(near_duplicates, "STRIPE", 2 * block)
        embed = partial(encoder.encode_refs, batch_size=batch_size)
        validate_stage.validate(paths.RAW, paths.VALIDATED, paths.DATA_DOCS, config, 0, embed=embed)
        found.append((paths.VALIDATED / "manifest.parquet").read_bytes())
    assert found[0] == found[1] == found[2]


def test_without_the_weights_no_image_is_read(tmp_path: Path, tiny_architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no ``data/raw`` either, which would be another error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "stage_run", lambda stage, config: nullcontext(runs.Run()))
    pretrained = EncoderConfig(pretrained_model=tiny_architecture, pretrained_weights=str(WEIGHTS))
    with pytest.raises(ConfigError, match=r"encoder\.pretrained_weights 'data/weights/clip\.safetensors': neither a file nor a tag"):
        validate_stage.run(Config(validate=section(0.9), encoder=pretrained))
