"""The trainers of image tokenizer, encoder and upscaler: resumed to the same bits, and the same run however a batch is divided."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trainers_support
from trainers_support import KINDS, STEPS, STOPPED, Squares, make_trainer, run, tokenizer_of

from cm3leon.config.profiles import load_profile
from cm3leon.config.schema import EncoderConfig
from cm3leon.training import clip, loop, super_resolution, vqgan
from cm3leon.training.checkpoint import Checkpoints
from cm3leon.training.distributed import World
from cm3leon.utils.errors import UserError

GOLDEN = json.loads(Path(__file__).with_name("golden_images.json").read_text())
"""Losses of profile ``tiny`` on made-up images, by step: no change of training goes unnoticed."""


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

    def die(number):
        if number == step:
            raise KilledError
        return take(number)

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
    assert run(make_trainer("super_resolution"), tmp_path) == curve, "a finished run starts from the beginning"


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
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = [*command, trainers_support.__file__, str(directory)]
    done = subprocess.run(job, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
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


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_curve_is_the_golden_one(kind, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    config = load_profile("tiny", configs=Path(__file__).parents[2] / "configs")
    section, curve = getattr(config, kind), []
    images = Squares(70, 32)
    if kind == "encoder":
        section = section.model_copy(update={"image_tower": "vit", "batch_size": 16})
    trainer = {
        "image_tokenizer": lambda: vqgan.ImageTokenizerTrainer(section, images, 0),
        "encoder": lambda: clip.EncoderTrainer(section, images, images.captions, tokenizer_of(section, images), 0),
        "super_resolution": lambda: super_resolution.SuperResolutionTrainer(section, images, 0),
    }[kind]()
    loop.train(trainer, section.steps, kind, World(), lambda metrics, step: curve.append(metrics["loss"]))
    assert curve == pytest.approx(GOLDEN[kind], abs=5e-3)
