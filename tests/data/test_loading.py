"""Images decoded ahead: in order, the same for any number of workers, and with errors that say what is wrong."""

import io
import multiprocessing
import tarfile
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image

from cm3leon.data.images import fit_square
from cm3leon.data.loading import Square, decoded_per_second, image_batches
from cm3leon.data.manifest import ImageStore
from cm3leon.utils.errors import UserError

COUNT = 23


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Images of different sizes, and a damaged one."""
    directory = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(0)
    with tarfile.open(directory / "images-00000.tar", "w") as archive:
        for number in range(COUNT + 1):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(256, size=(8 + number, 20, 3), dtype=np.uint8)).save(buffer, "PNG")
            data = buffer.getvalue()[: 60 if number == COUNT else None]
            header = tarfile.TarInfo(f"{number}.png")
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return ImageStore(directory)


REFS = [f"images-00000.tar/{number}.png" for number in range(COUNT)]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_the_images_in_order(store, workers):
    batches = list(image_batches(store, REFS, Square(12), 5, workers))
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    expected = np.stack([np.asarray(fit_square(store.open(ref), 12)) for ref in REFS])
    assert torch.equal(torch.cat(batches), torch.from_numpy(expected))
    assert not list(image_batches(store, [], Square(12), 5, workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_the_same_with_and_without_workers(store, workers):
    broken = [*REFS, f"images-00000.tar/{COUNT}.png"]
    with pytest.raises(UserError, match="unreadable: "):
        list(image_batches(store, broken, Square(12), 4, workers))
    with pytest.raises(UserError, match="does not exist; run: cm3leon ingest"):
        list(image_batches(store, [*REFS, "images-00001.tar/0.png"], Square(12), 4, workers))


def test_workers_end_with_their_iterator(store):
    with closing(image_batches(store, REFS * 20, Square(12), 2, 2)) as batches:
        next(batches)
        assert len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()


def test_the_decoders_rate_counts_the_cores_that_decode(store):
    one, two = (decoded_per_second(store, REFS, Square(12), workers) for workers in (1, 2))
    assert one > 0 and two > 0
    assert decoded_per_second(store, [], Square(12)) == 0
