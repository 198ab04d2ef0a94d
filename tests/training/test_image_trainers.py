"""The trainers of image tokenizer, encoder and upscaler: resumed to the same bits, and the same run however a batch is divided."""

import io
import itertools
import json
import multiprocessing
import signal
import tarfile
import time

import pytest
import torch
from PIL import Image
from processes_support import Job
from trainers_support import KINDS, STEPS, STOPPED, Squares, make_trainer, run, train_all

from cm3leon.config.schema import EncoderConfig
from cm3leon.data import pixels
from cm3leon.data.manifest import ImageStore
from cm3leon.data.pixels import ImageSet
from cm3leon.training import loop
from cm3leon.training.checkpoint import Checkpoints
from cm3leon.training.shuffling import shuffled_batches
from cm3leon.utils.errors import UserError
from cm3leon.utils.world import ALONE, World


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several gain nothing at these sizes, and wait for one another on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uninterrupted():
    """Kind -> the trainer after all steps, and its metrics."""
    found = {}

    def get(kind):
        if kind not in found:
            trainer = make_trainer(kind)
            found[kind] = trainer, run(trainer)
        return found[kind]

    return get


def same(one, other):
    a, b = one.tensors(), other.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) and one.state() == other.state()


def losses(curve):
    return [metrics["loss"] for metrics in curve]


class KilledError(Exception):
    pass


@pytest.mark.parametrize(("kind", "step"), [("image_tokenizer", 2), ("image_tokenizer", 6), ("encoder", 5), ("super_resolution", 5)])
def test_killed_at_a_step_and_started_again_it_ends_with_the_same_bits(kind, step, uninterrupted, tmp_path, monkeypatch):
    expected, curve = uninterrupted(kind)
    killed = make_trainer(kind)
    take = killed.step

    def die(number, batch):
        if number == step:
            raise KilledError
        return take(number, batch)

    monkeypatch.setattr(killed, "step", die)
    with pytest.raises(KilledError):
        run(killed, tmp_path, checkpoint_seconds=0.0)
    again = make_trainer(kind)
    assert run(again, tmp_path) == curve
    assert same(again, expected)
    assert len(list(tmp_path.glob("*/step-*"))) <= loop.KEEP_CHECKPOINTS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_it_writes_a_checkpoint_and_exits_with_the_signals_status(number, uninterrupted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(signal, "SIGTERM", number)
    expected, curve = uninterrupted("super_resolution")
    with pytest.raises(SystemExit) as exited:
        run(make_trainer("super_resolution"), tmp_path, stop=3)
    assert exited.value.code == 128 + number
    [checkpoint] = tmp_path.glob("*/step-*")
    assert checkpoint.name == "step-00000004"
    assert f"interrupted by {signal.Signals(number).name} at step 4; the last checkpoint is {checkpoint}" in capsys.readouterr().out
    again = make_trainer("super_resolution")
    assert run(again, tmp_path) == curve
    assert same(again, expected)
    assert "resuming at step 4 of" in capsys.readouterr().out
    # A run that failed while its model was written, or whose model was lost since, resumes at its end.
    ended = make_trainer("super_resolution")
    assert run(ended, tmp_path, checkpoint_seconds=0.0) == curve
    monkeypatch.setattr(ended, "step", None)
    capsys.readouterr()
    assert run(ended, tmp_path) == curve and f"resuming at step {STEPS} of {STEPS}" in capsys.readouterr().out
    Checkpoints(tmp_path, {"kind": type(ended).__name__}, 2).finish()
    again = make_trainer("super_resolution")
    assert run(again, tmp_path) == curve and f"resuming at step {STEPS} of {STEPS}" in capsys.readouterr().out
    assert same(again, expected)


def test_a_short_run_writes_no_checkpoint(tmp_path):
    run(make_trainer("super_resolution"), tmp_path)
    assert not list(tmp_path.glob("*/step-*"))


def test_a_diverged_run_stops_names_the_step_and_leaves_no_checkpoint_of_it(tmp_path):
    trainer = make_trainer("super_resolution", learning_rate=1e25)
    with pytest.raises(
        loop.DivergenceError, match=r"diverged at step \d: loss \S+, gradient norm \S+; lower .*the last checkpoint is"
    ) as error:
        run(trainer, tmp_path, checkpoint_seconds=0.0)
    last = Checkpoints(tmp_path, {"kind": type(trainer).__name__}, 2)
    assert str(error.value).endswith(last.names()[-1])
    last.load(last.newest(), trainer.tensors())
    assert all(tensor.isfinite().all() for tensor in trainer.tensors().values())


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_give_the_whole_batchs_gradients(kind, uninterrupted):
    _, whole = uninterrupted(kind)
    parts = run(make_trainer(kind, micro_batch_size=3))
    for found, expected in zip(parts, whole, strict=True):
        assert found == pytest.approx(expected, abs=1e-4)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_the_losses_are_nearly_the_same_and_the_weights_stay_float32(kind, uninterrupted):
    trainer = make_trainer(kind, precision="bf16", micro_batch_size=4)
    found, expected = losses(run(trainer)), losses(uninterrupted(kind)[1])
    assert found == pytest.approx(expected, rel=0.05) and found != pytest.approx(expected, rel=1e-6)
    assert torch.bfloat16 not in {tensor.dtype for tensor in trainer.tensors().values()}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The directory in which two processes have trained all three."""
    directory = tmp_path_factory.mktemp("two")
    status, output = Job(train_all, directory, output=directory / "output.txt", count=2).wait(240)
    assert status == 0, output
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_the_same_run_as_one(kind, uninterrupted, two_processes):
    _, expected = uninterrupted(kind)
    found = json.loads((two_processes / "losses.json").read_text())[kind]
    assert losses(found) == pytest.approx(losses(expected), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_process_resumes_from_the_checkpoint_of_two(kind, uninterrupted, two_processes, capsys):
    _, expected = uninterrupted(kind)
    found = run(make_trainer(kind), two_processes / kind)
    assert f"resuming at step {STOPPED + 1} of {STEPS}" in capsys.readouterr().out
    assert losses(found) == pytest.approx(losses(expected), abs=1e-5)


def test_a_batch_is_divided_evenly_and_not_among_more_processes_than_it_has_rows():
    shares = [World(rank, 3).share(7) for rank in range(3)]
    assert [row for share in shares for row in range(share.start, share.stop)] == list(range(7))
    assert sorted(share.stop - share.start for share in shares) == [2, 2, 3]
    with pytest.raises(UserError, match="a batch of 7 cannot be divided among 8 processes"):
        World(0, 8).share(7)


def test_a_resnet_takes_no_micro_batches():
    with pytest.raises(ValueError, match="micro_batch_size must be null with image_tower resnet"):
        EncoderConfig(image_tower="resnet", micro_batch_size=4)


@pytest.mark.parametrize(("count", "size", "first"), [(20, 7, 0), (20, 7, 1), (20, 7, 5), (6, 3, 4), (3, 8, 2)])
def test_a_batch_depends_on_its_step_and_every_epoch_has_each_image_at_most_once(count, size, first):
    batches = [batch.tolist() for batch in itertools.islice(shuffled_batches(count, size, 1), 40)]
    assert [batch.tolist() for batch in itertools.islice(shuffled_batches(count, size, 1, first), 40 - first)] == batches[first:]
    steps = max(1, count // size)
    for start in range(0, 40 - steps, steps):
        epoch = list(itertools.chain(*batches[start : start + steps]))
        assert len(set(epoch)) == len(epoch) == min(size, count) * steps
    assert {position for batch in batches for position in batch} == set(range(count))
    assert batches[0] != next(shuffled_batches(count, size, 2)).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_images_that_workers_decode_ahead_give_the_same_run(kind, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "default_workers", lambda device: 2)
    refs = []
    with tarfile.open(tmp_path / "images-00000.tar", "w") as shard:
        for number, image in enumerate(Squares().pixels):
            data = io.BytesIO()
            Image.fromarray(image).save(data, "PNG")
            entry = tarfile.TarInfo(f"{number}.png")
            entry.size = len(data.getvalue())
            shard.addfile(entry, io.BytesIO(data.getvalue()))
            refs.append(f"images-00000.tar/{number}.png")
    trainer = make_trainer(kind)
    trainer.images = ImageSet(ImageStore(tmp_path), refs, 16, memory=0)
    expected, curve = uninterrupted(kind)
    assert run(trainer) == curve
    assert same(trainer, expected)
    assert trainer.images.decoded_per_second()["decoded_per_second"] > 0
    assert ImageSet(ImageStore(tmp_path), refs, 16).decoded_per_second() == {}, "those in memory are not decoded beside the training"
    assert not multiprocessing.active_children()


def test_the_last_that_a_run_logs_is_its_rate():
    logged = []
    trainer = make_trainer("super_resolution")
    start = time.perf_counter()
    loop.train(trainer, STEPS, "super_resolution", ALONE, lambda metrics, step: logged.append((step, metrics)))
    [(step, metrics)] = [found for found in logged if "loss" not in found[1]]
    assert step == STEPS - 1 and logged[-1][1] is metrics and list(metrics) == ["images_per_second"]
    assert metrics["images_per_second"] > 7 * STEPS / (time.perf_counter() - start)


def test_the_advice_to_resume_from_another_run_is_given_where_the_command_has_the_option(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(make_trainer("super_resolution"), tmp_path, stop=3)
    for adopting in (False, True):
        Checkpoints(tmp_path, {"kind": "other"}, 2, adopting=adopting).open()
        warning = capsys.readouterr().err
        assert "are of a run that differs" in warning and ("--resume-from" in warning) == adopting
