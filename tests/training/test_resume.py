"""A run that was killed or interrupted resumes to the same bits, and is the same run in any number of processes."""

import json
import resource
import signal
import time

import pytest
import torch
from processes_support import Job
from resume_job import train
from safetensors.torch import load_file
from tests_support import decoder_spec, make_documents

from cm3leon.config.profiles import load_profile
from cm3leon.data.tokens import write_tokens
from cm3leon.models.decoder import Decoder
from cm3leon.sequence.grammar import Vocabulary
from cm3leon.training.checkpoint import CheckpointError, Checkpoints
from cm3leon.training.trainer import setup
from cm3leon.utils.errors import UserError
from cm3leon.utils.world import World

STEPS = 40


@pytest.fixture(scope="module")
def new_directory(tmp_path_factory):
    """A function that makes a new directory with the same tokens."""

    def make():
        directory = tmp_path_factory.mktemp("run")
        write_tokens(directory / "tokens", "train", make_documents(16), 16, 100)
        return directory

    return make


@pytest.fixture(scope="module")
def uninterrupted(new_directory):
    """A function of changed parameters: the directory of an uninterrupted run in one process, and its losses."""
    known = {}

    def get(**changes):
        key = json.dumps(changes, sort_keys=True)
        if key not in known:
            directory = new_directory()
            known[key] = directory, run(directory, **changes)[0]
        return known[key]

    return get


def start(directory, processes=1, **changes):
    return Job(train, directory, {"steps": STEPS, **changes}, output=directory / "output.txt", count=processes)


def run(directory, processes=1, **changes):
    """Run to the end; the losses and the output."""
    status, output = start(directory, processes, **changes).wait(240)
    assert status == 0, output
    return json.loads((directory / "losses.json").read_text()), output


def stop(job, directory, step, number):
    """Send the signal once the checkpoint of ``step`` is there; exit status and output."""
    end = time.monotonic() + 120
    while not list(directory.glob(f"checkpoints/*/step-{step:08d}")):
        assert job.running, job.output.read_text()
        assert time.monotonic() < end
        time.sleep(0.002)
    job.send_signal(number)
    return job.wait(60)


def same_weights(one, other):
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


MUON_PACKED = {"optimizer": "muon", "packing": True, "micro_batch_size": 3}
UNEVEN = {"steps": 10, "batch_size": 3, "micro_batch_size": 1}
"""Of two processes one has two rows, the other one."""


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, MUON_PACKED], ids=["adamw", "muon-packed"])
def test_after_a_kill_losses_and_weights_are_the_same_bits(new_directory, uninterrupted, changes):
    expected_directory, expected = uninterrupted(**changes)
    killed = new_directory()
    status, _ = stop(start(killed, **changes), killed, 8, signal.SIGKILL)
    assert status == -signal.SIGKILL
    found, output = run(killed, **changes)
    assert "resuming at step" in output
    assert found == expected
    assert same_weights(killed, expected_directory)


@pytest.mark.slow
def test_interrupted_by_sigterm_it_writes_a_checkpoint_and_resumes_from_it(new_directory, uninterrupted):
    directory = new_directory()
    begin = time.monotonic()
    status, output = stop(start(directory), directory, 4, signal.SIGTERM)
    assert time.monotonic() - begin < 60
    assert status == 143
    step = int(output.partition("interrupted by SIGTERM at step ")[2].split(";")[0])
    assert list(directory.glob(f"checkpoints/*/step-{step:08d}"))
    found, output = run(directory)
    assert f"resuming at step {step} of" in output
    assert found == uninterrupted()[1]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_skipped_with_the_reason_and_the_one_before_is_used(new_directory, uninterrupted):
    damaged = new_directory()
    stop(start(damaged), damaged, 16, signal.SIGKILL)
    newest = max(path for path in damaged.glob("checkpoints/*/step-*") if path.suffix != ".part")
    file = next(newest.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-5])
    found, output = run(damaged)
    assert f"checkpoint {newest.name} is not used" in output
    assert "checksum differs" in output
    assert "resuming at step" in output
    assert found == uninterrupted()[1]


WEIGHTS = {"model.w": torch.ones(2, 3)}


def started(root, step=None, tensors=WEIGHTS, **fingerprint):
    """A run that has begun, and written a checkpoint of ``step``."""
    checkpoints = Checkpoints(root, fingerprint, 2, adopting=True)
    checkpoints.open()
    if step is not None:
        checkpoints.save(step, tensors, {"step": step, "score": None})
    return checkpoints


def test_a_parameter_that_is_changed_and_changed_back_resumes_the_first_run(tmp_path, capsys):
    started(tmp_path, 7, steps="40", data="one")
    assert capsys.readouterr().err == ""
    other = started(tmp_path, steps="20", data="one")
    assert other.newest() is None
    other.save(1, WEIGHTS, {"score": None})
    warning = capsys.readouterr().err
    assert "from the beginning" in warning and "steps: 40 then, 20 now" in warning and "data" not in warning
    first = started(tmp_path, steps="40", data="one")
    assert capsys.readouterr().err == ""
    assert first.newest() == "step-00000007"
    assert f"--resume-from {first.directory} --accept-changes" in warning


def test_a_run_removes_the_checkpoints_of_finished_runs_alone(tmp_path, capsys):
    finished, unfinished = started(tmp_path, 7, steps="40"), started(tmp_path, 7, steps="20")
    finished.finish()
    started(tmp_path, steps="10")
    assert [run.name for run in tmp_path.iterdir() if list(run.glob("step-*"))] == [unfinished.directory.name]
    assert "steps: 20 then, 10 now" in capsys.readouterr().err


def test_a_damaged_record_neither_stops_its_run_nor_loses_it(tmp_path, capsys):
    run = started(tmp_path, 7, steps="40")
    file = run.directory / "run.json"
    file.write_bytes(file.read_bytes()[:10])
    started(tmp_path, steps="20")
    assert f"{file}: damaged then, nothing now" in capsys.readouterr().err
    assert started(tmp_path, steps="40").newest() == "step-00000007"


def adopt(run, source, accept_changes=True, tensors=WEIGHTS):
    run.adopt(source, accept_changes, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    run.open()
    return run


@pytest.mark.parametrize("checkpoint", ["", "step-00000003"])
def test_a_run_resumes_from_another_if_the_user_accepts_the_changes(tmp_path, capsys, checkpoint):
    source = started(tmp_path, 3, steps="40", data="one")
    source.save(7, {"model.w": torch.full((2, 3), 7.0)}, {"step": 7, "score": None})
    run = Checkpoints(tmp_path, {"steps": "20", "data": "one"}, 2)
    with pytest.raises(UserError, match=r"--accept-changes:\n  steps: 40 then, 20 now$"):
        adopt(run, source.directory / checkpoint, accept_changes=False)
    assert not run.directory.exists()
    adopt(run, source.directory / checkpoint)
    output = capsys.readouterr()
    assert "steps: 40 then, 20 now" in output.out and output.err == ""
    step = 3 if checkpoint else 7
    found = {"model.w": torch.zeros(2, 3)}
    assert run.newest() == f"step-{step:08d}" and run.load(run.newest(), found)["step"] == step
    assert torch.equal(found["model.w"], torch.full((2, 3), 7.0 if step == 7 else 1.0))
    recorded = {"checkpoint": str(source.directory / f"step-{step:08d}"), "step": step, "differences": ["steps: 40 then, 20 now"]}
    assert json.loads((run.directory / "run.json").read_text())["resumed"] == [recorded]
    # Interrupted, it resumes from its own checkpoints, by the same command and without the option; so does the other run.
    run.save(9, WEIGHTS, {"step": 9, "score": None})
    assert adopt(run, source.directory / checkpoint).newest() == started(tmp_path, steps="20", data="one").newest() == "step-00000009"
    assert run.record.resumed == [recorded]
    with pytest.raises(UserError, match="checkpoints of its own"):
        adopt(run, source.directory / f"step-{10 - step:08d}")  # the other one
    assert started(tmp_path, steps="40", data="one").newest() == "step-00000007"
    # A run that resumes from it has the whole history.
    third = adopt(Checkpoints(tmp_path, {"steps": "20", "data": "two"}, 2), run.directory)
    assert [entry["step"] for entry in third.record.resumed] == [step, 9]
    # Once it has finished, the same command without the option resumes at its end and knows where it came from.
    third.finish()
    again = started(tmp_path, steps="20", data="two")
    assert again.newest() == "step-00000009" and [entry["step"] for entry in again.record.resumed] == [step, 9]
    assert not again.record.finished


def test_a_disk_that_cannot_hold_a_checkpoint_is_an_error_that_says_so(tmp_path):
    run, before = started(tmp_path, 7), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            run.save(8, {"model.w": torch.ones(1_000_000)}, {"step": 8, "score": None})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert started(tmp_path).newest() == "step-00000007"


def test_a_finished_run_can_be_resumed_with_more_steps(tmp_path):
    source = started(tmp_path, 7, steps="7")
    source.finish()
    assert adopt(Checkpoints(tmp_path, {"steps": "9"}, 2), source.directory).newest() == "step-00000007"
    assert not source.directory.exists()


def test_what_cannot_be_resumed_from_is_refused_and_changes_nothing(tmp_path):
    source, run = started(tmp_path, 7, steps="40"), Checkpoints(tmp_path, {"steps": "20"}, 2)
    with pytest.raises(CheckpointError, match=r"another model.*model\.w"):
        adopt(run, source.directory, tensors={"model.w": torch.ones(3, 3)})
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "empty", tmp_path / "nowhere", source.directory / "step-00000008"):
        with pytest.raises(UserError, match=r"no intact checkpoint here; looked for .*/step-\*"):
            adopt(run, directory)
    assert not run.directory.exists()
    with pytest.raises(UserError, match="this run's own"):
        adopt(source, source.directory)
    run = started(tmp_path, 1, steps="20")
    with pytest.raises(UserError, match=r"checkpoints of its own.*step-00000001"):
        adopt(run, source.directory)
    assert run.names() == ["step-00000001"] and source.names() == ["step-00000007"]


def test_a_damaged_older_checkpoint_is_not_the_best_and_does_not_stop_the_training(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", {"a": "1"}, 2)
    checkpoints.open()
    first = checkpoints.save(1, {"model.w": torch.ones(2, 3)}, {"score": 0.5})
    (first / "state.json").write_bytes((first / "state.json").read_bytes()[:5])
    for step in (2, 3):
        checkpoints.save(step, {"model.w": torch.ones(2, 3)}, {"score": 1.0 + step})
    assert checkpoints.names() == ["step-00000002", "step-00000003"]


def test_a_finished_run_resumes_at_its_end_until_another_one_starts(tmp_path):
    run = started(tmp_path, 1, a="1")
    run.finish()
    assert started(tmp_path, a="1").newest() == "step-00000001"
    run.finish()
    assert started(tmp_path, a="2").newest() is None
    assert started(tmp_path, a="1").newest() is None


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", {"a": "1"}, 2)
    checkpoints.open()
    for step, score in enumerate([3.0, 1.0, None, 2.0, 4.0, None], 1):
        checkpoints.save(step, {"model.w": torch.full((2, 3), float(step))}, {"score": score})
    assert checkpoints.names() == ["step-00000002", "step-00000005", "step-00000006"]


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("changes", [MUON_PACKED, UNEVEN, {**UNEVEN, "packing": True}], ids=["muon-packed", "uneven", "uneven-packed"])
def test_two_processes_are_the_same_run_as_one(new_directory, uninterrupted, changes):
    _, expected = uninterrupted(**changes)
    found, _ = run(new_directory(), processes=2, **changes)
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_processes_draw_images_in_the_precision_they_train_in(new_directory):
    """A sharded model holds its parameters in float32, and computes in bfloat16."""
    found, _ = run(new_directory(), processes=2, steps=3, precision="bf16")
    assert len(found["drawn"]) == 16


def test_more_processes_than_rows_are_refused():
    model = Decoder(decoder_spec(1, 32, 2, 32), Vocabulary(text_size=10, image_size=10, sentinels=1, tokens_per_image=4))
    config = load_profile("tiny").pretrain.model_copy(update={"batch_size": 3})
    with pytest.raises(UserError, match="batch_size is 3: 4 processes need a sample each"):
        setup(model, config, World(0, 4))


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(new_directory, uninterrupted):
    _, expected = uninterrupted(packing=True)
    directory = new_directory()
    stop(start(directory, 2, packing=True), directory, 8, signal.SIGTERM)
    _, output = stop(start(directory, 1, packing=True), directory, 24, signal.SIGTERM)
    assert "resuming at step" in output
    found, output = run(directory, 2, packing=True)
    assert "resuming at step" in output
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", {"a": "1"}, 2)
    checkpoints.open()
    checkpoints.save(1, {"model.w": torch.ones(2, 3)}, {"score": None})
    with pytest.raises(CheckpointError, match=r"another model.*model\.w"):
        checkpoints.load("step-00000001", {"model.w": torch.ones(3, 3)})
    with pytest.raises(CheckpointError, match=r"model\.v"):
        checkpoints.load("step-00000001", {"model.w": torch.ones(2, 3), "model.v": torch.ones(1)})
