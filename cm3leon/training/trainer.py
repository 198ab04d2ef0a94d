"""The training loop of pretraining and instruction tuning: :func:`setup`, :func:`fit`, :func:`validate`.

A run that was killed at any moment goes on from its newest checkpoint and ends with the same bits: parameters, optimizer, schedule, random
generators, position in the data and the samples held for packing are all in it.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch import Tensor

from cm3leon.config.schema import TrainConfig
from cm3leon.data.batches import Batch, Stream
from cm3leon.models.decoder import Decoder
from cm3leon.training import distributed
from cm3leon.training.checkpoint import Checkpoints, generator_states, set_generator_states
from cm3leon.training.distributed import World
from cm3leon.training.hardware import flops_per_token, peak_flops
from cm3leon.training.optimizer import learning_rate_at, make_optimizers, set_learning_rate
from cm3leon.utils.errors import UserError
from cm3leon.utils.progress import progress

Log = Callable[[dict[str, float], int], None]
LOG_EVERY = 10


class DivergenceError(UserError):
    """The loss or the gradient is no longer finite."""


@dataclass
class State:
    """All that a run changes. ``losses`` holds the loss of each step, ``best`` the lowest validation loss, ``by_task`` (2, tasks) the sum
    of the losses of each task's tokens and their number, since they were last logged."""

    model: Decoder
    optimizers: list[torch.optim.Optimizer]
    world: World
    step: int = 0
    losses: list[float] = field(default_factory=list)
    best: float = math.inf
    by_task: Tensor = field(default_factory=lambda: torch.zeros(2, 0))

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and the optimizers' tensors by name; shards of them where the model is sharded."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        found: dict[str, Tensor] = {f"model.{name}": parameter for parameter, name in names.items()}
        for number, optimizer in enumerate(self.optimizers):
            for parameter, values in optimizer.state.items():
                found |= {f"optimizer{number}.{names[parameter]}.{key}": value for key, value in values.items()}
        return found

    def fill_optimizers(self) -> None:
        """Give the optimizers the tensors that they would make in their first step, by a step that changes nothing."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.step()
        self.model.zero_grad(set_to_none=True)


def setup(model: Decoder, config: TrainConfig, world: World | None = None) -> State:
    """The state before the first step: the model on its device, sharded if there are several processes, and its optimizers."""
    world = world or World(device=model.device)
    model.to(world.device).train()
    model.recompute = config.activation_checkpointing
    distributed.shard(model, config, world)
    if config.compile:
        for block in model.blocks:
            block.compile()
    return State(model, make_optimizers(model, config), world)


@dataclass(frozen=True)
class Step:
    """What one step did, over all processes: mean loss, gradient norm before clipping, learning rate, tokens read, padding included."""

    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int


def train_step(state: State, stream: Stream, config: TrainConfig, name: str) -> Step:
    """Take one step: the own rows of the batch in micro-batches, gradients summed, clipped, applied.

    Raises:
        DivergenceError: if the loss or the gradient is not finite; the step is not taken.
    """
    model, world = state.model, state.world
    batch = stream(state.step, world.own(stream.batch_size))
    count = batch.tokens.shape[0]
    size = config.micro_batch_size or max(1, -(-stream.batch_size // world.size))
    [weight, tokens] = world.sum([float(batch.weights.sum(dtype=torch.float64)), batch.tokens.numel()])
    model.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=world.device)
    for start in range(0, max(count, 1), size):
        part = batch.rows(slice(start, start + size)).to(world.device)
        with distributed.autocast(config, world.device):
            total, losses_BT = model.losses(part.tokens, part.weights, part.image_positions, part.samples, part.positions, config.z_loss)
        (total * (world.size / max(weight, 1.0))).backward()
        loss += total.detach()
        if state.by_task.numel():
            targets = (part.weights > 0).flatten()
            state.by_task.index_add_(1, part.tasks.flatten()[targets], torch.stack([losses_BT.flatten(), targets.float()])[:, targets])
    [mean] = world.sum([loss.item()])
    mean /= max(weight, 1.0)
    norm = distributed.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)).item()
    if not (math.isfinite(mean) and math.isfinite(norm)):
        raise DivergenceError(f"{name} diverged at step {state.step}: loss {mean}, gradient norm {norm}; lower {name}.learning_rate")
    rate = learning_rate_at(
        state.step,
        peak=config.learning_rate,
        steps=config.steps,
        warmup_steps=config.warmup_steps,
        final=config.final_learning_rate,
    )
    for optimizer in state.optimizers:
        set_learning_rate(optimizer, rate)
        optimizer.step()
    state.step += 1
    state.losses.append(mean)
    return Step(mean, norm, rate, int(tokens))


def task_losses(state: State, tasks: Sequence[str]) -> dict[str, float]:
    """Mean loss of each task's tokens, unweighted, since the last call, of those tasks that had any."""
    totals = state.world.sum(state.by_task.flatten().tolist())
    state.by_task.zero_()
    sums, counts = totals[: len(tasks) + 1], totals[len(tasks) + 1 :]
    return {f"loss_{task}": sums[number] / counts[number] for number, task in enumerate(tasks, 1) if counts[number]}


def validate(state: State, batches: Sequence[Batch], config: TrainConfig) -> dict[str, float]:
    """Mean loss over all targets, and over text and image targets apart; each process takes every so many-th batch."""
    vocabulary, world = state.model.vocabulary, state.world
    sums = torch.zeros(3, dtype=torch.float64)
    counts = torch.zeros(3, dtype=torch.float64)
    rounds = -(-len(batches) // world.size)
    with distributed.inference(state.model), distributed.autocast(config, world.device):
        for number in range(rounds):
            mine = number * world.size + world.rank
            batch = batches[min(mine, len(batches) - 1)].to(world.device)
            _, losses = state.model.losses(batch.tokens, batch.weights, batch.image_positions, batch.samples, batch.positions)
            if mine >= len(batches):
                continue  # computed because the others need this process's shards
            is_target = batch.weights > 0
            image = (batch.tokens >= vocabulary.image_start) & (batch.tokens < vocabulary.text_start)
            for place, chosen in enumerate((is_target, is_target & (batch.tokens >= vocabulary.text_start), is_target & image)):
                sums[place] += losses[chosen].sum(dtype=torch.float64).item()
                counts[place] += chosen.sum().item()
    totals = world.sum([*sums.tolist(), *counts.tolist()])
    names = ("loss", "loss_text", "loss_image")
    return {name: totals[i] / totals[3 + i] for i, name in enumerate(names) if totals[3 + i]}


def save(state: State, stream: Stream, checkpoints: Checkpoints, score: float | None = None) -> None:
    """Write a checkpoint of the run as it stands."""
    held: dict[str, object] = {}
    for part in state.world.gather(stream.state()):
        held |= part
    rest = {"step": state.step, "losses": state.losses, "best": state.best, "score": score, "data": held, "generators": generator_states()}
    checkpoints.save(state.step, state.tensors(), rest)


def resume(state: State, stream: Stream, checkpoints: Checkpoints) -> bool:
    """Go on from the newest whole checkpoint, if there is one; says whether there was."""
    name = checkpoints.newest()
    if name is None:
        return False
    state.fill_optimizers()
    found = checkpoints.load(name, state.tensors())
    state.step, state.losses, state.best = found["step"], found["losses"], found["best"]
    own = {str(row) for row in state.world.own(stream.batch_size)}
    stream.load_state({row: held for row, held in found["data"].items() if row in own})
    set_generator_states(found["generators"])
    return True


def fit(
    state: State,
    stream: Stream,
    config: TrainConfig,
    validation: Mapping[str, Sequence[Batch]],
    name: str,
    log: Log = lambda figures, step: None,
    after_validation: Callable[[int], None] = lambda step: None,
    checkpoints: Checkpoints | None = None,
    tasks: Sequence[str] = (),
) -> dict[str, float]:
    """Train to ``config.steps``; returns the last validation figures.

    With ``checkpoints`` it goes on from the newest, writes one every ``config.checkpoint_every`` steps and at each validation, and on
    SIGTERM or SIGINT, or when the process that started this one is gone, writes one and leaves; a second SIGINT leaves at once.

    Args:
        validation: name -> batches; figures are called ``val_loss``, ``val_loss_text``, ``val_loss_image``, behind the name if it is
            not empty: ``val_alone_loss``. The one without a name tells which checkpoint is best.
        name: of the stage, named in errors and progress.
        after_validation: called with the step after each validation.
        tasks: names of the tasks that samples are numbered by, from 1, whose losses are logged apart, as ``loss_TASK``.

    Raises:
        DivergenceError: if the loss or the gradient is not finite; the step is not taken, and the last checkpoint stays.
        SystemExit: when told to leave, with 128 and the signal's number.
    """
    figures: dict[str, float] = {}

    def say(message: str) -> None:
        if state.world.rank == 0:
            print(message, flush=True)

    device_flops = peak_flops(torch.cuda.get_device_name()) if state.world.device.type == "cuda" else None
    state.by_task = torch.zeros(2, len(tasks) + 1 if tasks else 0, device=state.world.device)
    token_flops = flops_per_token(state.model.spec, state.model.vocabulary.size, state.model.spec.context)
    if checkpoints is not None:
        checkpoints.open()
        if resume(state, stream, checkpoints):
            say(f"{name} goes on at step {state.step} of {config.steps}")
            for done in range(LOG_EVERY, state.step + 1, LOG_EVERY):
                log({"loss": state.losses[done - 1]}, done)  # the curve is whole in whatever records this start
    with progress(name, config.steps, "steps", done=state.step, shown=state.world.rank == 0) as meter, _told_to_leave() as told:
        while state.step < config.steps:
            try:
                step = train_step(state, stream, config, name)
            except DivergenceError as error:
                raise DivergenceError(f"{error}{_last_good(checkpoints)}") from None
            meter.advance(1, f"loss {step.loss:.3f}")
            if state.step % LOG_EVERY == 0:
                rate = meter.rate * step.tokens
                speed = {"tokens_per_second": rate}
                if device_flops:
                    speed["mfu"] = rate * token_flops / (device_flops * state.world.size)
                apart = task_losses(state, tasks) if tasks else {}
                rates = {"gradient_norm": step.gradient_norm, "learning_rate": step.learning_rate}
                log({"loss": step.loss, **apart, **rates, **speed}, state.step)
            score = None
            if state.step % config.validate_every == 0 or state.step == config.steps:
                figures = {}
                for which, batches in validation.items():
                    found = validate(state, batches, config)
                    figures |= {f"val_{which}_{key}" if which else f"val_{key}": value for key, value in found.items()}
                score = figures.get("val_loss")
                state.best = min(state.best, score if score is not None else math.inf)
                log({**figures, "best_val_loss": state.best}, state.step)
                with distributed.inference(state.model):
                    after_validation(state.step)
            leave = state.world.highest(told())
            if checkpoints is not None and (score is not None or state.step % config.checkpoint_every == 0 or leave):
                save(state, stream, checkpoints, score)
            if leave and state.step < config.steps:
                say(f"{name}: told to leave at step {state.step}{_last_good(checkpoints)}")
                raise SystemExit(128 + leave)
    if checkpoints is not None:
        checkpoints.finish()
    state.model.eval()
    return figures


def _last_good(checkpoints: Checkpoints | None) -> str:
    names = checkpoints.names() if checkpoints is not None else []
    return f"; the last checkpoint is {checkpoints.directory / names[-1]}" if checkpoints is not None and names else ""


@contextmanager
def _told_to_leave() -> Iterator[Callable[[], int]]:
    """A function that tells the signal on which to leave, or 0: SIGTERM or SIGINT when it has come, SIGTERM when the parent has gone."""
    heard: list[int] = []
    parent = os.getppid()

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in heard:
            raise KeyboardInterrupt
        heard.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: max(heard, default=signal.SIGTERM if os.getppid() != parent else 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
