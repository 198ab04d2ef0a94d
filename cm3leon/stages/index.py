"""Stage ``index``: embeddings of the train split and the memory bank over them."""

from __future__ import annotations

import pandas as pd

from cm3leon.config import paths
from cm3leon.config.schema import Config
from cm3leon.data.manifest import ImageStore, first_caption, read_manifest
from cm3leon.models.clip import Encoder
from cm3leon.retrieval.index import BANK_COLUMNS, MemoryBank
from cm3leon.tracking import runs
from cm3leon.utils.device import default_device


def multimodal(manifest: pd.DataFrame) -> pd.DataFrame:
    """Rows with an image and a first caption that is not blank, the caption in a column of its own."""
    first = manifest["captions"].map(lambda captions: first_caption(captions).strip())
    return manifest.assign(caption=first)[manifest["image"].notna() & first.ne("")].reset_index(drop=True)


def run(config: Config) -> dict[str, float]:
    """Writes ``models/index/``; returns how many documents it holds, and of the train split how many it leaves out."""
    with runs.stage_run("index", config) as run:
        encoder = Encoder.load(paths.ENCODER).to(default_device())
        train = read_manifest(paths.VALIDATED, "train")
        documents = multimodal(train)
        image = encoder.encode_refs(ImageStore(paths.RAW), documents["image"].tolist(), config.index.batch_size)
        text = encoder.encode_texts(documents["caption"].tolist())
        bank = MemoryBank.build(documents[BANK_COLUMNS], text, image, config.index.kind, encoder.fingerprint)
        bank.save(paths.INDEX)
        figures = {
            "documents": float(len(bank)),
            "left_out": float(len(train) - len(bank)),
            "clip_score": float((text * image).sum(axis=1).mean()),
        }
        run.log_metrics({f"index/{name}": value for name, value in figures.items()})
    return figures
