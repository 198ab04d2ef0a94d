"""Stage ``retrieve``: the neighbor table. Documents of every split are queries; their neighbors come from the train split."""

from __future__ import annotations

import numpy as np
import pandas as pd

from cm3leon.config import paths
from cm3leon.config.schema import Config
from cm3leon.data.manifest import SPLITS, ImageStore, read_manifest
from cm3leon.models.clip import Encoder
from cm3leon.retrieval.index import MemoryBank, multimodal_records
from cm3leon.retrieval.strategy import Coverage
from cm3leon.retrieval.table import NeighborTable
from cm3leon.retrieval.vectors import chunks
from cm3leon.tracking import runs
from cm3leon.utils.device import default_device


def query_vectors(encoder: Encoder, bank: MemoryBank, records: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Text and image vectors of records, float32 ``(n, d)`` each: the bank's where they are in it, else encoded now."""
    own = bank.positions_of(records["id"])
    known = own >= 0
    text = np.zeros((len(records), bank.settings["dimensions"]), dtype=np.float32)
    image = np.zeros_like(text)
    text[known], image[known] = bank.text[own[known]], bank.image[own[known]]
    text[~known] = encoder.encode_texts(records["caption"][~known].tolist())
    image[~known] = encoder.encode_refs(ImageStore(paths.RAW), records["image"][~known].tolist())
    return text, image


def run(config: Config) -> dict[str, float]:
    """Write ``data/neighbours/neighbours.parquet``; returns the coverage of each split."""
    section = config.retrieve
    with runs.stage_run("retrieve", config) as run:
        encoder = Encoder.load(paths.ENCODER).to(default_device())
        bank = MemoryBank.load(paths.INDEX)
        bank.check_encoder(encoder.fingerprint)
        metrics: dict[str, float] = {}
        with NeighborTable(paths.NEIGHBORS, bank, encoder.encode_texts, section, config.seed) as table:
            for split in SPLITS:
                records = multimodal_records(read_manifest(paths.VALIDATED, split, ["id", "image", "captions"]))
                coverage = Coverage(wanted=2 * section.candidates_per_modality)
                for rows in chunks(len(records)):
                    part = records.iloc[rows]
                    coverage.add(table.add(part, *query_vectors(encoder, bank, part)))
                metrics |= {f"{split}_{name}": value for name, value in coverage.metrics.items()}
        run.log_metrics({f"retrieve/{name}": value for name, value in metrics.items()})
    return metrics
