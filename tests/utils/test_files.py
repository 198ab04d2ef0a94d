"""A truncated file is an error that names the file and the command that makes it again, whatever library reads it."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cm3leon.config import paths
from cm3leon.data import thumbnails
from cm3leon.data.manifest import ImageStore, ManifestError, read_manifest
from cm3leon.data.packing import ShardWriter
from cm3leon.data.sequences import read_neighbors
from cm3leon.data.tokens import TokenStore
from cm3leon.models.clip import Encoder
from cm3leon.models.decoder import Decoder
from cm3leon.models.super_resolution import SuperResolution
from cm3leon.models.vqgan import ImageTokenizer
from cm3leon.retrieval import table
from cm3leon.retrieval.index import MemoryBank
from cm3leon.sequence.tasks import Training
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.utils.errors import UserError
from cm3leon.utils.files import DamagedFileError, read_file, read_json

SINGLE = [
    (paths.VALIDATED / "manifest.parquet", lambda file: read_manifest(file.parent), "cm3leon validate"),
    (paths.VALIDATED / thumbnails.FILE, lambda file: thumbnails.read_thumbnails(file.parent, ["a"]), "cm3leon validate"),
    (paths.TOKENS / "train-00000.arrow", lambda file: TokenStore(file.parent), "cm3leon tokenize"),
    (paths.NEIGHBORS / table.FILE, lambda file: read_neighbors(file.parent), "cm3leon retrieve"),
    (paths.TEXT_TOKENIZER / "tokenizer.json", lambda file: TextTokenizer.load(file.parent), "cm3leon text_tokenizer"),
    (paths.FINETUNED / "training.json", lambda file: Training.read(file.parent), "cm3leon sft"),
]
BANK = ("index.faiss", "documents.parquet", "text_embeddings.npy", "image_embeddings.npy", "config.json")
NETWORKS = [
    (paths.FINETUNED, Decoder, "make run"),
    (paths.IMAGE_TOKENIZER, ImageTokenizer, "cm3leon image_tokenizer"),
    (paths.ENCODER, Encoder, "cm3leon encoder"),
    (paths.SUPER_RESOLUTION, SuperResolution, "cm3leon super_resolution"),
]
READERS = [
    *SINGLE,
    *((paths.INDEX / name, lambda file: MemoryBank.load(file.parent), "cm3leon index") for name in BANK),
    *(
        (folder / name, lambda file, network=network: network.load(file.parent), command)
        for folder, network, command in NETWORKS
        for name in ("config.json", "model.safetensors")
    ),
]


@pytest.fixture
def written(tiny_models, tmp_path, monkeypatch):
    """A project in which each of the files is whole."""
    monkeypatch.chdir(tmp_path)
    for name in ("models", "data"):
        shutil.copytree(tiny_models / name, tmp_path / name)
    Training(frozenset({"caption"}), True).write(paths.FINETUNED)
    thumbnails.write_thumbnails(paths.VALIDATED, ["a"], [bytes(thumbnails.FEATURES)])
    paths.NEIGHBORS.mkdir(parents=True)
    pq.write_table(pa.table({name: [] for name in table.SCHEMA.names}, schema=table.SCHEMA), paths.NEIGHBORS / table.FILE)


@pytest.mark.parametrize("size", ["half", "empty"])
@pytest.mark.parametrize(("file", "read", "command"), READERS, ids=[str(file) for file, _, _ in READERS])
def test_a_truncated_file_is_named_with_the_command_that_makes_it_again(written, file, read, command, size):
    read(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 if size == "half" else 0])
    with pytest.raises(DamagedFileError) as raised:
        read(file)
    assert str(raised.value).startswith(f"{file} is damaged (") and str(raised.value).endswith(f"remove it and run again: {command}")


@pytest.mark.parametrize("size", ["half", "empty"])
def test_a_truncated_image_shard_is_named_with_the_command_that_makes_it_again(tmp_path, size):
    writer = ShardWriter(tmp_path, megabytes=1)
    ref = writer.add("000001.png", bytes(range(256)) * 20)
    writer.close()
    shard = tmp_path / ref.partition("/")[0]
    assert len(ImageStore(tmp_path).read(ref)) == 5120
    shard.write_bytes(shard.read_bytes()[: 3000 if size == "half" else 0])
    with pytest.raises(ManifestError, match=rf"image shard {shard} .*run again: cm3leon ingest"):
        ImageStore(tmp_path).read(ref)


def test_a_missing_file_and_an_error_with_a_message_of_its_own_are_passed_on(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "nothing", read_json, "cm3leon index")

    def refuse(path: Path) -> None:
        raise UserError("of another encoder")

    with pytest.raises(UserError, match=r"^of another encoder$"):
        read_file(tmp_path, refuse, "cm3leon index")
