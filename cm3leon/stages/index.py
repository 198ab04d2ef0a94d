"""Stage ``index``: embeddings of the train split and the memory bank over them."""

from __future__ import annotations

from cm3leon.config import paths
from cm3leon.config.schema import Config
from cm3leon.data.manifest import ImageStore, read_manifest
from cm3leon.models.clip import Encoder
from cm3leon.retrieval.index import BANK_COLUMNS, MemoryBank, multimodal_records
from cm3leon.tracking import runs
from cm3leon.utils.device import default_device


def run(config: Config) -> dict[str, float]:
    """Write ``models/index/``; returns the number of documents in it, the number of train records left out, and the mean CLIP score."""
    with runs.stage_run("index", config) as run:
        encoder = Encoder.load(paths.ENCODER).to(default_device())
        train = read_manifest(paths.VALIDATED, "train")
        records = multimodal_records(train)
        image = encoder.encode_refs(ImageStore(paths.RAW), records["image"].tolist(), config.index.batch_size)
        text = encoder.encode_texts(records["caption"].tolist())
        bank = MemoryBank.build(records[BANK_COLUMNS], text, image, config.index.kind, encoder.fingerprint)
        bank.save(paths.INDEX)
        metrics = {
            "documents": float(len(bank)),
            "left_out": float(len(train) - len(bank)),
            "clip_score": float((text * image).sum(axis=1).mean()),
        }
        run.log_metrics({f"index/{name}": value for name, value in metrics.items()})
    return metrics
