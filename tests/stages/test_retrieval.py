"""Stages encoder, index, retrieve and super_resolution on a small collection: outputs, retrieval rules, determinism."""

import io
import itertools
import json
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests_support import make_documents

from cm3leon.config import paths
from cm3leon.config.schema import Config, PretrainConfig
from cm3leon.data.manifest import VALIDATED_SCHEMA, ImageStore, read_manifest
from cm3leon.data.tokens import Document, TokenStore, write_tokens
from cm3leon.models.clip import Encoder
from cm3leon.models.super_resolution import target_side
from cm3leon.retrieval import table, vectors
from cm3leon.retrieval.index import MemoryBank
from cm3leon.sequence.grammar import Vocabulary
from cm3leon.stages import encoder, index, retrieve, super_resolution
from cm3leon.tracking import runs
from cm3leon.training.pretraining import training_samples

CONFIG = Config.model_validate(
    {
        "image_tokenizer": {"image_size": 16, "patch": 4, "multipliers": [1]},
        "encoder": {
            "image_tower": "resnet", "image_size": 32, "width": 8, "layers": 1, "text_width": 32, "text_layers": 1, "embedding_dim": 8,
            "vocabulary_size": 300, "context_length": 16, "steps": 4, "batch_size": 8,
        },
        "retrieve": {"max_score": 0.99},
        "super_resolution": {"channels": 8, "blocks": 1, "steps": 4, "batch_size": 4, "patch_size": 8},
    }
)  # fmt: skip
TRAIN, VAL, TEST = 30, 6, 4


def collection() -> None:
    """Random blocks of color, in the files that ``ingest`` and ``validate`` write; the first train record has no caption."""
    rng = np.random.default_rng(0)
    rows = []
    paths.RAW.mkdir(parents=True)
    paths.VALIDATED.mkdir(parents=True)
    with tarfile.open(paths.RAW / "images-00000.tar", "w") as archive:
        for number in range(TRAIN + VAL + TEST):
            pixels = np.kron(rng.integers(256, size=(2, 2, 3)), np.ones((8, 8, 1))).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            member = tarfile.TarInfo(f"{number:06d}.png")
            member.size = buffer.tell()
            buffer.seek(0)
            archive.addfile(member, buffer)
            words = rng.choice(["red", "blue", "above", "below", "small", "large"], size=6)
            split = "train" if number < TRAIN else "val" if number < TRAIN + VAL else "test"
            rows.append(
                dict.fromkeys(VALIDATED_SCHEMA.names)
                | {"id": f"ab{number:02d}", "image": f"images-00000.tar/{member.name}", "captions": [" ".join(words)] if number else []}
                | {"licence": "CC0-1.0", "attribution": "test", "source": "test", "width": 16, "height": 16, "split": split}
            )
    pq.write_table(pa.Table.from_pylist(rows, schema=VALIDATED_SCHEMA), paths.VALIDATED / "manifest.parquet")


@contextmanager
def untracked(stage: str, config: Config) -> Iterator[runs.Run]:
    yield runs.Run()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, dict[str, float]]]]:
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(runs, "stage_run", untracked)
        collection()
        yield root, {name: stage.run(CONFIG) for name, stage in STAGES.items()}


STAGES = {"encoder": encoder, "index": index, "retrieve": retrieve, "super_resolution": super_resolution}


def test_index_holds_the_multimodal_train_documents(project: tuple[Path, dict[str, dict[str, float]]]) -> None:
    _, metrics = project
    bank = MemoryBank.load(paths.INDEX)
    assert bank.documents["id"].tolist() == [f"ab{i:02d}" for i in range(1, TRAIN)]
    assert metrics["index"]["documents"] == TRAIN - 1
    assert metrics["index"]["left_out"] == 1
    assert metrics["index"]["recall"] == bank.settings["recall"] == 1
    assert bank.settings["kind"] == "flat"
    encoder = Encoder.load(paths.ENCODER)
    bank.check_encoder(encoder.fingerprint)
    images = encoder.encode_refs(ImageStore(paths.RAW), [f"images-00000.tar/{number:06d}.png" for number in range(1, TRAIN)])
    texts = encoder.encode_texts(bank.documents["caption"].tolist())
    assert np.array_equal(bank.image, images.astype(np.float16)) and np.array_equal(bank.text, texts.astype(np.float16))
    assert metrics["index"]["clip_score"] == pytest.approx((texts * images).sum(1).mean())


def test_of_the_manifest_only_the_columns_are_read_that_the_bank_needs(
    project: tuple[Path, dict[str, dict[str, float]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the tasks take four fifths of a manifest's memory, in every process."""
    shutil.copytree(project[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    read: list[pd.DataFrame] = []

    def reading(*arguments: Any) -> pd.DataFrame:
        read.append(read_manifest(*arguments))
        return read[-1]

    monkeypatch.setattr(index, "read_manifest", reading)
    assert index.run(CONFIG) == project[1]["index"]
    assert set.union(*(set(frame.columns) for frame in read)) == {"id", "image", "captions", "licence", "attribution", "source"}


def test_a_part_of_the_rows_at_a_time_gives_the_same(
    project: tuple[Path, dict[str, dict[str, float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, metrics = project
    before = pd.read_parquet(paths.NEIGHBORS / table.FILE)
    monkeypatch.setattr(vectors, "CHUNK", 7)
    found = {name: STAGES[name].run(CONFIG) for name in ("index", "retrieve")}
    after = pd.read_parquet(paths.NEIGHBORS / table.FILE)
    monkeypatch.setattr(vectors, "CHUNK", 1 << 16)
    for name in found:  # the files that other tests read
        STAGES[name].run(CONFIG)
        assert found[name] == pytest.approx(metrics[name], abs=1e-3)  # embeddings of other batches may be rounded otherwise
    names = ["id", "neighbours", "modalities", "random"]
    assert after[names].map(list).equals(before[names].map(list))


def test_neighbors_come_from_train_and_are_never_the_query(project: tuple[Path, dict[str, dict[str, float]]]) -> None:
    _, metrics = project
    found = pd.read_parquet(paths.NEIGHBORS / table.FILE)
    assert pq.read_schema(paths.NEIGHBORS / table.FILE).equals(table.SCHEMA)
    assert found["id"].tolist() == [f"ab{i:02d}" for i in range(1, TRAIN + VAL + TEST)]
    train = {f"ab{i:02d}" for i in range(1, TRAIN)}
    for row in found.itertuples():
        assert set(row.neighbours) <= train - {row.id}
        assert len(set(row.neighbours)) == len(row.neighbours) == len(row.scores) == len(row.modalities) <= 4
        assert (row.scores <= 0.99).all()
        assert set(row.random) <= train - {row.id} and len(set(row.random)) == len(row.random) <= len(row.neighbours)
        assert sorted(row.modalities, reverse=True) == list(row.modalities)  # text first
    lengths = found["neighbours"].map(len)[: TRAIN - 1]
    assert metrics["retrieve"]["train_neighbors"] == pytest.approx(lengths.mean())
    assert metrics["retrieve"]["train_complete"] == pytest.approx((lengths == 4).mean())
    assert lengths.max() > 0


def test_retrieved_documents_are_never_held_out_nor_near_duplicates_of_the_query(project: tuple[Path, dict[str, dict[str, float]]]) -> None:
    """In training sequences, for every choice of neighbors: they are train documents, and neither the query nor too similar to it."""
    vocabulary = Vocabulary(text_size=100, image_size=50, sentinels=8, tokens_per_image=16)
    for split, first, count in (("train", 1, TRAIN - 1), ("val", TRAIN, VAL), ("test", TRAIN + VAL, TEST)):
        documents = make_documents(count)
        named = [Document(f"ab{first + number:02d}", d.codes, d.captions) for number, d in enumerate(documents)]
        write_tokens(paths.TOKENS, split, named, 16, 100)
    bank = MemoryBank.load(paths.INDEX)
    vectors = bank.vectors(np.arange(len(bank)))
    near_duplicates = 0
    for choice, split in itertools.product(("paper", "text", "image", "random", "none"), ("train", "val", "test")):
        section = PretrainConfig(neighbors=choice, retrieved_documents=[0.0, 0.0, 1.0], model={"context": 200})
        samples = training_samples(TokenStore(paths.TOKENS, [split]), vocabulary, section, 0)
        for epoch, row in itertools.product(range(3), range(len(samples))):
            *retrieved, query = samples(epoch, row).documents
            assert set(retrieved) <= set(bank.documents["id"]) - {query}
            assert len(retrieved) == (0 if choice == "none" else min(2, len(samples.neighbors[query])))
            if split == "train":
                scores = vectors @ vectors[bank.position[query]]
                assert all(scores[bank.position[name]] <= CONFIG.retrieve.max_score + 1e-6 for name in retrieved)
                near_duplicates += (scores > CONFIG.retrieve.max_score).sum() > 1
    assert near_duplicates  # the test has something to avoid


def test_index_of_another_encoder_is_refused(project: tuple[Path, dict[str, dict[str, float]]], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = paths.INDEX / "config.json"
    before = settings.read_text()
    settings.write_text(json.dumps(json.loads(before) | {"encoder": "another"}))
    try:
        with pytest.raises(ValueError, match="made with encoder another"):
            retrieve.run(CONFIG)
    finally:
        settings.write_text(before)


def test_stages_are_deterministic_byte_for_byte(project: tuple[Path, dict[str, dict[str, float]]]) -> None:
    root, metrics = project
    files = [p for folder in (paths.ENCODER, paths.INDEX, paths.NEIGHBORS, paths.SUPER_RESOLUTION) for p in sorted(folder.iterdir())]
    before = [path.read_bytes() for path in files]
    again = {name: stage.run(CONFIG) for name, stage in STAGES.items()}
    assert [path.read_bytes() for path in files] == before
    assert again == metrics
    for path, data in zip(files, before, strict=True):
        assert str(root).encode() not in data, f"{path} holds an absolute path"


def test_an_index_that_was_not_finished_is_no_memory_bank_and_one_in_use_stays_as_it_is(
    project: tuple[Path, dict[str, dict[str, float]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(project[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    in_use = MemoryBank.load(paths.INDEX)
    before = np.array(in_use.image)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Encoder, "encode_refs", stop)
    with pytest.raises(KeyboardInterrupt):
        index.run(CONFIG)
    assert np.array_equal(in_use.image, before) and before.any()
    with pytest.raises(FileNotFoundError, match="run: cm3leon index"):
        MemoryBank.load(paths.INDEX)


def test_super_resolution_reports_the_network_and_bicubic_interpolation(project: tuple[Path, dict[str, dict[str, float]]]) -> None:
    _, metrics = project
    assert set(metrics["super_resolution"]) == {"psnr_rgb", "psnr_y", "ssim_y", "psnr_rgb_bicubic", "psnr_y_bicubic", "ssim_y_bicubic"}


def test_the_side_of_the_targets() -> None:
    sizes = pd.DataFrame({"width": [640, 300, 641], "height": [480, 301, 500]})
    assert target_side(sizes, 256, 2) == 480  # half of the images have this side or more
    assert target_side(sizes, 64, 2) == 128  # upscaled outputs are not larger
    assert target_side(sizes, 500, 3) == 480
    assert target_side(sizes.assign(width=65), 64, 4) == 64
