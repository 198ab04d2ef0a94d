"""A training run that can be killed and resumed: the loop around the trainers of image tokenizer, encoder and upscaler.

A run that was killed at any moment resumes from its newest checkpoint and ends with the same bits as an uninterrupted one. A step does not
wait for the GPU: its metrics stay there until they are logged.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from cm3leon.config import paths
from cm3leon.training.checkpoint import Checkpoints
from cm3leon.training.fingerprint import common_fingerprint
from cm3leon.training.interruption import interruption
from cm3leon.utils.errors import UserError
from cm3leon.utils.progress import progress
from cm3leon.utils.world import World

if TYPE_CHECKING:
    from cm3leon.config.schema import Config

Batch = TypeVar("Batch")
Metrics = dict[str, Tensor]
"""Scalars by name, on the device."""
Log = Callable[[dict[str, float], int], None]
"""Takes metrics by name, and the step they are of."""

LOG_EVERY = 20
"""Steps."""
CHECKPOINT_SECONDS = 600.0
"""Between checkpoints. Shorter runs write none, unless they are interrupted."""
KEEP_CHECKPOINTS = 2


class DivergenceError(UserError):
    """The loss or the gradient is no longer finite."""


class Trainer(Protocol[Batch]):
    """All that a run changes, and the step that changes it.

    Attributes:
        batch_size: images of a step, over all processes.
    """

    batch_size: int

    def batches(self, first: int) -> Generator[Batch, None, None]:
        """What each step from ``first`` on reads, without end; read ahead, so it depends on nothing that steps change."""

    def step(self, number: int, batch: Batch) -> Metrics:
        """Take a step, counted from 0; its metrics, over all processes, include ``loss`` and ``gradient_norm``."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that steps change, by name."""

    def state(self) -> dict[str, Any]:
        """All else that steps change, as JSON values."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned. After that :meth:`tensors` has the names and shapes that it had then."""


def train(
    trainer: Trainer[Batch],
    steps: int,
    name: str,
    world: World,
    log: Log = lambda metrics, step: None,
    checkpoints: Checkpoints | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> None:
    """Take all steps; ``log`` receives the metrics of every :data:`LOG_EVERY`-th and of the last, and then ``images_per_second``.

    With ``checkpoints`` it resumes from the newest one, and writes one every ``checkpoint_seconds`` and when interrupted: by SIGTERM, by
    SIGINT, or by the end of the process that started this one. A second SIGINT stops at once, without a checkpoint. The caller says that
    the run has finished (:meth:`~cm3leon.training.checkpoint.Checkpoints.finish`), once it has written the model.

    Args:
        name: the stage's, for errors and progress.

    Raises:
        DivergenceError: if a loss or a gradient is not finite; no checkpoint holds it.
        SystemExit: if interrupted; the status is 128 + the signal's number.
    """
    first, logged = 0, []
    # 1. Resume. What was logged is logged again, because each start is an MLflow run of its own and its curves should be complete.
    if checkpoints is not None:
        checkpoints.open()
        if (newest := checkpoints.newest()) is not None:
            found = checkpoints.state(newest)
            trainer.load_state(found["trainer"])
            checkpoints.load(newest, trainer.tensors())
            first, logged = found["step"], found["logged"]
            if world.rank == 0:
                print(f"{name}: resuming at step {first} of {steps}", flush=True)
            for step, metrics in logged:
                log(metrics, step)
    unread: list[Metrics] = []
    saved = time.monotonic()
    with (
        naming_last_checkpoint(checkpoints),
        progress(name, steps, "steps", done=first) as meter,
        closing(trainer.batches(first)) as batches,
        interruption() as interrupted,
    ):
        for step, batch in zip(range(first, steps), batches, strict=False):
            # 2. Take a step.
            unread.append(trainer.step(step, batch))
            meter.advance(1, f"loss {logged[-1][1]['loss']:.4f}" if logged else "")
            # 3. Log.
            if step % LOG_EVERY == 0 or step == steps - 1:
                logged.append((step, _read(unread, step, name)))
                log(logged[-1][1], step)
            # 4. Write a checkpoint. The processes agree on the signal, which may have reached only some of them, and on the time.
            number = world.max(interrupted())
            if checkpoints is not None and (number or world.max(int(time.monotonic() - saved >= checkpoint_seconds))):
                _read(unread, step, name)
                checkpoints.save(
                    step + 1, trainer.tensors(), {"step": step + 1, "logged": logged, "trainer": trainer.state(), "score": None}
                )
                saved = time.monotonic()
            if number and step < steps - 1:
                leave(name, number, step + 1, checkpoints, world)
    if first < steps:
        log({"images_per_second": meter.rate * trainer.batch_size}, steps - 1)


def _read(unread: list[Metrics], step: int, name: str) -> dict[str, float]:
    """The metrics of ``step``, after those of the steps before it that have not been read were found to be finite; empties ``unread``."""
    if not unread:
        return {}
    rows = torch.stack([torch.stack([metrics["loss"], metrics["gradient_norm"]]) for metrics in unread]).tolist()
    for number, (loss, norm) in enumerate(rows, step + 1 - len(rows)):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergenceError(f"{name} diverged at step {number}: loss {loss}, gradient norm {norm}; lower {name}.learning_rate")
    last = unread[-1]
    values = torch.stack([value.double() for value in last.values()]).tolist()
    unread.clear()
    return dict(zip(last, values, strict=True))


def stage_checkpoints(
    config: Config, stage: str, inputs: Sequence[Path], world: World, more: Mapping[str, str] | None = None
) -> Checkpoints:
    """The checkpoints of a stage's run.

    Args:
        inputs: files and directories that the stage reads.
        more: parameters of other sections that the run depends on.
    """
    return Checkpoints(paths.CHECKPOINTS / stage, common_fingerprint(config, stage, inputs, world, more), KEEP_CHECKPOINTS, world)


# --- the end before the last step ------------------------------------------------------------------------------------


def leave(name: str, number: int, step: int, checkpoints: Checkpoints | None, world: World) -> None:
    """End the process after ``step`` steps, because of a signal: exit status 128 + its number."""
    if world.rank == 0:
        print(f"{name}: interrupted by {signal.Signals(number).name} at step {step}{_last_checkpoint(checkpoints)}", flush=True)
    raise SystemExit(128 + number)


@contextmanager
def naming_last_checkpoint(checkpoints: Checkpoints | None) -> Iterator[None]:
    """Add the last checkpoint to the message of a :class:`DivergenceError`."""
    try:
        yield
    except DivergenceError as error:
        raise DivergenceError(f"{error}{_last_checkpoint(checkpoints)}") from None


def _last_checkpoint(checkpoints: Checkpoints | None) -> str:
    names = checkpoints.names() if checkpoints is not None else []
    return f"; the last checkpoint is {checkpoints.directory / names[-1]}" if checkpoints is not None and names else ""
