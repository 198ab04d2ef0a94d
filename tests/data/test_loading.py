"""Images decoded ahead: in order, the same for any number of workers, and with errors that say what is wrong."""

import io
import itertools
import multiprocessing
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cm3leon.config.profiles import configure
from cm3leon.data import loading, pixels
from cm3leon.data.images import fit_square
from cm3leon.data.loading import BATCHES_AHEAD, Square, decoded_per_second, image_batches, read_ahead
from cm3leon.data.manifest import ImageStore
from cm3leon.data.pixels import ImageSet, batches_of
from cm3leon.stages.common import launched
from cm3leon.utils.errors import UserError, message_to_user
from cm3leon.utils.processes import has_ended, identity

COUNT = 23
CONFIGS = Path(__file__).parents[2] / "configs"


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


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_system_has_the_same_message(store, workers):
    def refuse(image):
        raise PermissionError(13, "Permission denied", "images-00000.tar")

    with pytest.raises((PermissionError, UserError)) as raised:
        list(image_batches(store, REFS, refuse, 4, workers))
    assert message_to_user(raised.value) == "[Errno 13] Permission denied: 'images-00000.tar'"


def test_workers_leave_the_programs_random_numbers_alone(store):
    before = torch.get_rng_state()
    list(image_batches(store, REFS, Square(12), 5, 2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_without_end_are_drawn_a_few_ahead(store, workers):
    drawn = itertools.count()
    with closing(read_ahead(store, (REFS[next(drawn) % 9 :] for _ in itertools.count()), Square(12), workers)) as batches:
        for start in (0, 1, 2):
            expected = np.stack([np.asarray(fit_square(store.open(ref), 12)) for ref in REFS[start:]])
            assert torch.equal(next(batches), torch.from_numpy(expected))
    assert 3 < next(drawn) <= 3 + BATCHES_AHEAD * max(workers, 1) + 1


def test_workers_end_with_their_iterator(store):
    with closing(image_batches(store, REFS * 20, Square(12), 2, 2)) as batches:
        next(batches)
        assert len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("free", "workers"), [(10**9, 2), (2 * BATCHES_AHEAD * 3 * 12 * 12 * 3, 1), (0, 0)])
def test_only_as_many_workers_start_as_shared_memory_holds(store, monkeypatch, capsys, free, workers):
    """Docker gives a container 64 MB; a worker that finds no room is killed, and the stage with it."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with closing(image_batches(store, REFS * 20, Square(12), 3, 2)) as batches:
        assert next(batches).shape == (3, 12, 12, 3)
        assert len(multiprocessing.active_children()) == workers
    assert ("--shm-size" in capsys.readouterr().err) == (workers < 2)


@pytest.mark.slow
def test_no_worker_outlives_a_program_that_is_killed(store):
    program = f"""
import multiprocessing, time
from cm3leon.data.loading import Square, image_batches
from cm3leon.data.manifest import ImageStore
batches = image_batches(ImageStore({str(store.root)!r}), {REFS * 50}, Square(12), 2, 2)
next(batches)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        workers = [identity(int(pid)) for pid in process.stdout.readline().split()]
        process.send_signal(signal.SIGKILL)
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while not all(map(has_ended, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(has_ended, workers))


@pytest.mark.parametrize(("memory", "workers"), [(10**6, 0), (0, 0), (0, 2)])
def test_batches_of_an_image_set_are_its_images(store, monkeypatch, memory, workers):
    monkeypatch.setattr(pixels, "default_workers", lambda device: workers)
    images = ImageSet(store, REFS, 12, memory)
    rng = np.random.default_rng(0)
    positions = [rng.integers(COUNT, size=4) for _ in range(12)]
    batches = list(batches_of(images, iter(positions)))
    assert len(batches) == 12
    for drawn, batch in zip(positions, batches, strict=True):
        assert np.array_equal(batch, np.stack([np.asarray(fit_square(store.open(REFS[position]), 12)) for position in drawn]))
        assert np.array_equal(batch, images[drawn])


def test_the_decoders_rate_counts_the_cores_that_decode(store, monkeypatch):
    """With a clock on which each image takes a quarter of a second."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(loading, "cores", lambda: 4)

    def prepare(image):
        clock.now += 0.25
        return Square(12)(image)

    assert [decoded_per_second(store, REFS, prepare, workers) for workers in (1, 2, 4, 8)] == [4, 8, 16, 16]
    assert decoded_per_second(store, REFS, prepare) == 4 * loading.THREADS
    assert decoded_per_second(store, [], prepare) == 0


@pytest.mark.parametrize(("chosen", "expected"), [("null", [0, 5]), ("3", [3, 3]), ("0", [0, 0])])
def test_workers_are_those_of_the_parameters_or_by_the_cores(tmp_path, monkeypatch, chosen, expected):
    monkeypatch.setattr(loading, "chosen_workers", None)
    monkeypatch.setattr(loading, "cores", lambda: 12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    configure("tiny", [f"launch.image_workers={chosen}"], CONFIGS)
    launched("ingest")
    assert [loading.default_workers(torch.device(device)) for device in ("cpu", "cuda")] == expected
