"""What the tests of the registry share: a configuration, and models whose composition accuracy is as wanted."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pandas as pd
from PIL import Image

from cm3leon.config import paths
from cm3leon.config.schema import Config, GateConfig
from cm3leon.evaluation.record import Record
from cm3leon.registry import promotion, registry
from cm3leon.registry.bundle import Bundle, build_bundle
from cm3leon.retrieval.index import MemoryBank

CONFIG = Config(profile="tiny", gate=GateConfig(floors={"composition": 0.4}, margins={"composition": 0.02}))
PROMPTS = 20


def evaluated(composition: float) -> Bundle:
    """Write a record with this composition accuracy, of 20 prompts, into the working directory; returns the bundle."""
    record = Record.read(paths.EVALUATION)
    record.add("composition", {str(number): float(number < composition * PROMPTS) for number in range(PROMPTS)}, 100, 0)
    record.scores["composition/color"] = 0.9
    for file in paths.EVALUATION.glob("[ro]*"):  # linked into a bundle
        file.unlink()
    record.write(paths.EVALUATION)
    return build_bundle(Path("bundle"), CONFIG)


def released(composition: float) -> registry.Version:
    """Register a model with this composition accuracy, and promote it if the gate passes it."""
    version = registry.register(evaluated(composition), CONFIG)
    if promotion.gate(CONFIG).passed:
        promotion.promote()
    return version


def train_on(manifest: pd.DataFrame) -> None:
    """Make these rows of the manifest the training data, also of the memory bank in the working directory."""
    manifest.to_parquet(paths.VALIDATED / "manifest.parquet")
    bank = MemoryBank.load(paths.INDEX)
    kept = bank.positions_of(manifest["id"])
    documents = bank.documents.iloc[kept].assign(licence=manifest["licence"].to_numpy())
    MemoryBank.build(documents, bank.text[kept], bank.image[kept], "flat", bank.settings["encoder"]).save(paths.INDEX)


def write_shard() -> None:
    """The images to which the manifest of the fixture ``stages`` refers."""
    paths.RAW.mkdir(parents=True, exist_ok=True)
    with tarfile.open(paths.RAW / "images-00000.tar", "w") as archive:
        for number, color in enumerate(("red", "blue", "green", "white")):
            file = io.BytesIO()
            Image.new("RGB", (32, 32), color).save(file, "PNG")
            entry = tarfile.TarInfo(f"{number:06d}.png")
            entry.size = file.tell()
            file.seek(0)
            archive.addfile(entry, file)


def aliases() -> dict[str, int]:
    """Alias -> number of the version that has it."""
    return {alias: int(version.number) for version in registry.status() for alias in version.aliases}
