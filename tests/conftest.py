"""Fixtures that several tests share: a prepared MLflow store, and a project directory with untrained models in all places."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from cm3leon.config import paths
from cm3leon.config.schema import Config, EncoderConfig
from cm3leon.tracking import runs, store
from cm3leon.utils import telemetry, torchvision_compat
from cm3leon.utils.garbage import collect_rarely

telemetry.turn_off()
collect_rarely()
if "PYTEST_XDIST_WORKER" in os.environ:  # all cores test: threads would wait for each other, those of programs they start too
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

settings.register_profile("shared machine", deadline=None)  # where other work makes an example slow, it is not wrong
settings.load_profile("shared machine")

LONGEST = (
    "flows/test_whole_project.py",
    "test_examples.py",
    "flows/test_deployments.py",
    "tracking/test_outage.py",
    "services/test_worker.py",
)
"""The files that take a minute or more: they start first, so that no process waits for one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        return next((place for place, name in enumerate(LONGEST) if item.path.as_posix().endswith(f"tests/{name}")), len(LONGEST))

    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (rank(item), item.path not in slow))  # stable: within a file the order stays


CAPTIONS = ["a red circle", "a blue square", "two green crosses", "a ring above a diamond"]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """``get(name, make)``: the path of a file that one process of a test run makes for all of them, by ``make(path)``."""
    own = tmp_path_factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def get(name, make):
        path = root / name
        with FileLock(root / f"{name}.lock"):
            if not path.exists():
                part = root / "parts" / name
                part.parent.mkdir(exist_ok=True)
                make(part)
                part.rename(path)
        return path

    return get


@pytest.fixture(scope="session")
def prepared_store(made_once):
    """A migrated SQLite store: making one takes ten seconds, copying it none."""
    store.use_settings()
    return made_once("mlflow.db", lambda path: store.migrate(f"sqlite:///{path}"))


@pytest.fixture(scope="session")
def prepared_prefect(made_once):
    """The database of a Prefect server that has done nothing: making one takes eight seconds, copying it none."""
    return made_once("prefect.db", make_prefect_database)


def make_prefect_database(path):
    environment = {**os.environ, "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{path}", "DO_NOT_TRACK": "1"}
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
    subprocess.run(command, env=environment, check=True, capture_output=True)


@pytest.fixture
def project(prepared_store, tmp_path, monkeypatch):
    """An empty project, the working directory, with an MLflow store of its own."""
    for name in ("MLFLOW_TRACKING_URI", runs.PARENT_RUN_ENV, runs.FLOW_RUN_ENV, "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(prepared_store, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def tiny_architecture(monkeypatch):
    """The name of an architecture that open_clip knows for the time of a test: a small ViT of 4 x 4 patches, at 32 pixels."""
    torchvision_compat.make_importable()
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-test", config)
    return "tiny-test"


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """A project directory with untrained models where the stages leave theirs, and a complete evaluation record."""
    root = tmp_path_factory.mktemp("tiny")
    make_models(root)
    return root


@pytest.fixture
def stages(project, tiny_models):
    """The project with the outputs of all stages."""
    for name in ("models", "data"):
        shutil.copytree(tiny_models / name, project / name)
    return project


@pytest.fixture(scope="session")
def tiny_parts(tiny_models):
    """Where the parts of a generator on those models are, for ``Generator.from_parts``."""
    places = {"model": paths.FINETUNED, "image_tokenizer": paths.IMAGE_TOKENIZER, "text_tokenizer": paths.TEXT_TOKENIZER}
    places |= {"encoder": paths.ENCODER, "memory_bank": paths.INDEX, "tokens": paths.TOKENS, "super_resolution": paths.SUPER_RESOLUTION}
    return {name: tiny_models / path for name, path in places.items()}


def make_models(root):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image
    from tests_support import decoder_spec

    from cm3leon.data.manifest import VALIDATED_SCHEMA
    from cm3leon.data.tokens import Document, write_tokens
    from cm3leon.evaluation.record import Record
    from cm3leon.evaluation.run import SECTIONS
    from cm3leon.models.clip import ClipTokenizer, Encoder, build_clip, trained_settings
    from cm3leon.models.decoder import Decoder
    from cm3leon.models.super_resolution import SuperResolution
    from cm3leon.models.vqgan import ImageTokenizer, ImageTokenizerSpec
    from cm3leon.retrieval.index import MemoryBank
    from cm3leon.sequence.grammar import Vocabulary
    from cm3leon.sequence.text_tokenizer import TextTokenizer
    from cm3leon.tracking.lineage import content_hash

    torch.manual_seed(0)
    text = TextTokenizer.train(CAPTIONS, 300)
    text.save(root / paths.TEXT_TOKENIZER)
    images = ImageTokenizer(
        ImageTokenizerSpec(32, patch=4, channels=8, multipliers=(1, 2), blocks=1, decoder_blocks=1, embedding_dim=4, codebook_size=16)
    )
    images.save(root / paths.IMAGE_TOKENIZER)
    vocabulary = Vocabulary(text.size, 16, sentinels=4, tokens_per_image=images.spec.tokens_per_image)
    decoder = Decoder(decoder_spec(layers=1, width=32, heads=2, context=160, init_std=0.1), vocabulary)
    for block in decoder.blocks:  # output layers start at zero, and hide what a block does
        torch.nn.init.normal_(block.attention.out.weight, std=0.2)
        torch.nn.init.normal_(block.down.weight, std=0.2)
    decoder.save(root / paths.FINETUNED)
    small = EncoderConfig(image_size=32, width=8, layers=1, embedding_dim=16, vocabulary_size=300)
    settings = trained_settings(small, text.size + 3)
    encoder = Encoder(build_clip(settings["model"]), settings, ClipTokenizer(text, small.context_length))
    encoder.save(root / paths.ENCODER)
    documents = pd.DataFrame({"id": list("abcd"), "caption": CAPTIONS, "licence": "CC0-1.0", "attribution": "us", "source": "test"})
    pictures = [Image.new("RGB", (32, 32), color) for color in ("red", "blue", "green", "white")]
    bank = MemoryBank.build(documents, encoder.encode_texts(CAPTIONS), encoder.encode_images(pictures), "flat", encoder.fingerprint)
    bank.save(root / paths.INDEX)
    codes = np.zeros(vocabulary.tokens_per_image, dtype=np.uint16)
    tokens = [Document(name, codes, [np.array(text.encode(c))]) for name, c in zip("abcd", CAPTIONS, strict=True)]
    write_tokens(root / paths.TOKENS, "train", tokens, vocabulary.tokens_per_image, 100)
    SuperResolution(scale=2, channels=4, blocks=1).save(root / paths.SUPER_RESOLUTION)
    row = {"licence": "CC0-1.0", "attribution": "us", "source": "test", "split": "train", "width": 32, "height": 32}
    rows = [
        {**row, "id": name, "origin": f"row {name}", "image": f"images-00000.tar/{number:06d}.png", "captions": [caption]}
        for number, (name, caption) in enumerate(zip("abcd", CAPTIONS, strict=True))
    ]
    (root / paths.VALIDATED).mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=VALIDATED_SCHEMA), root / paths.VALIDATED / "manifest.parquet")
    settings = {name: getattr(Config(), name).model_dump(mode="json") for name in SECTIONS}
    models = {str(path): content_hash(root / path) for path in (paths.FINETUNED, paths.IMAGE_TOKENIZER)}
    record = Record({"fd_encoder": 3.0}, contract={"prompts": "1", "seed": 0}, settings=settings, models=models)
    record.add("composition", {str(number): float(number < 10) for number in range(20)}, 100, 0)
    record.write(root / paths.EVALUATION)
    pictures[0].save(root / paths.EVALUATION / "samples.png")
