"""The training loop of pretraining and instruction tuning: :func:`setup`, :func:`fit`, :func:`validate`.

A run that was killed at any moment resumes from its newest checkpoint and ends with the same bits as an uninterrupted one. A checkpoint
holds the parameters, optimizer states, step, random generators, and how far the samples have been read.

A step does not wait for the GPU: losses and gradient norms stay there until they are logged. Only whether gradients are finite is read, one
step late, from a copy that is made before the GPU is given the next step.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cm3leon.data.batches import Batch, Share, Stream
from cm3leon.data.prefetch import Shares, prefetched
from cm3leon.models.decoder import Decoder, RotaryEmbedding
from cm3leon.training import distributed
from cm3leon.training.checkpoint import Checkpoints, generator_states, set_generator_states
from cm3leon.training.hardware import flops_per_token, peak_flops
from cm3leon.training.interruption import interruption
from cm3leon.training.loop import DivergenceError, Log, leave, naming_last_checkpoint
from cm3leon.training.optimizer import allocate_states, learning_rate_at, make_optimizers, set_learning_rate, state_tensors
from cm3leon.training.precision import autocast, autocast_dtype
from cm3leon.utils.errors import UserError
from cm3leon.utils.progress import progress
from cm3leon.utils.world import World

if TYPE_CHECKING:
    from cm3leon.config.schema import TrainConfig

LOG_EVERY = 10
"""Steps."""


@dataclass(frozen=True)
class Step:
    """A step that was taken.

    Attributes:
        loss: sum of the weighted losses of this process's targets, on its device.
        weight: sum of the weights over all processes.
        gradient_norm: of the gradients of all processes before clipping, on this one's device.
        read_gradient_norm: returns it as soon as the device has computed it.
    """

    loss: Tensor
    weight: float
    gradient_norm: Tensor
    read_gradient_norm: Callable[[], float]
    learning_rate: float


@dataclass
class State:
    """All that a run changes.

    Attributes:
        step: steps taken.
        tokens: trained on so far.
        losses: loss of each step, as far as they have been read from the device.
        unread: the last steps, whose losses have not been read.
        best: lowest validation loss.
        task_sums: (2, 1 + tasks), sum of the token losses of each task, and number of those tokens, since they were last logged; task 0 is
            none. Empty if tasks are not logged.
    """

    model: Decoder
    optimizers: list[torch.optim.Optimizer]
    world: World
    step: int = 0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    unread: list[Step] = field(default_factory=list)
    best: float = math.inf
    task_sums: Tensor = field(default_factory=lambda: torch.zeros(2, 0, dtype=torch.float64))

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and optimizer states by name; this process's shards of them if the model is sharded."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        return {f"model.{name}": parameter for parameter, name in names.items()} | state_tensors(self.optimizers, names)


def setup(model: Decoder, config: TrainConfig, world: World | None = None, weights: Iterable[tuple[str, Tensor]] | None = None) -> State:
    """The state before the first step: the model on its device, sharded if there are several processes, and its optimizers.

    Args:
        weights: of a model on the meta device; see :func:`materialize`.

    Raises:
        UserError: if there are more processes than samples or rows in a step.
    """
    world = world or (World(device=model.device) if weights is None else World())
    if config.batch_size < world.size:
        raise UserError(f"batch_size is {config.batch_size}: {world.size} processes need a sample each; start fewer, or raise it")
    # Sharding replaces the parameters, so the optimizers are made after it.
    if weights is None:
        model.to(world.device)
    model.train()
    model.recompute = config.activation_checkpointing
    distributed.shard(model, model.blocks, config, world)
    if weights is not None:
        materialize(model, weights, world.device)
    if world.size > 1:
        model.compute_dtype = autocast_dtype(config, world.device)
    if config.compile:
        for block in model.blocks:
            block.compile()
    return State(model, make_optimizers(model, config), world)


@torch.no_grad()
def materialize(model: Decoder, weights: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
    """Give a decoder on the meta device its memory on ``device``, and the weights; of a sharded one to each process its shards.

    Args:
        weights: whole tensors by name, of which one at a time is in memory.

    Raises:
        ValueError: if they are not those of the model.
    """
    model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    for name, whole in weights:
        parameter = parameters.pop(name, None)
        if parameter is None or parameter.shape != whole.shape:
            raise ValueError(f"the model has no parameter {name} of shape {tuple(whole.shape)}")
        parameter.copy_(distributed.shard_like(parameter, whole.to(device)))
        del whole  # before the next one is made
    if parameters:
        raise ValueError(f"no weights for {', '.join(parameters)}")
    if model.rope is not None:
        fresh = RotaryEmbedding(model.spec.width // model.spec.heads, model.vocabulary.tokens_per_image, model.spec.context)
        for name, buffer in model.rope.named_buffers():
            buffer.copy_(fresh.get_buffer(name))


def train_step(state: State, share: Share, config: TrainConfig, name: str) -> Step:
    """Take one optimization step on the shares of all processes.

    The loss is ``sum(w_i * loss_i) / sum(w_i)`` over all tokens i of the batch, on whichever process and in whichever micro-batch they are.

    Raises:
        DivergenceError: if the gradient of the step before was not finite.
    """
    model, world, weight = state.model, state.world, max(share.weight, 1.0)
    # 1. Gradients, summed over the micro-batches. FSDP averages them over the processes; times world.size they are sums.
    model.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=world.device)
    for micro_batch in share.micro_batches:
        batch = micro_batch.to(world.device)
        with autocast(config, world.device):
            total, losses_BT = model.losses(batch, config.z_loss)
        (total * (world.size / weight)).backward()
        loss += total.detach()
        if state.task_sums.numel():
            _add_task_losses(state.task_sums, batch, losses_BT)
    # 2. Clip by the norm of all gradients together. The device now has work enough to be asked about the step before.
    norm = distributed.full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip))
    read_norm = _copied(norm)
    if state.unread and not math.isfinite(state.unread[-1].read_gradient_norm()):
        read_losses(state, name)
    # 3. Update the parameters.
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
    step = Step(loss, weight, norm, read_norm, rate)
    state.step += 1
    state.tokens += share.tokens
    state.unread.append(step)
    return step


def _copied(value: Tensor) -> Callable[[], float]:
    """What returns a scalar of the device, without waiting for work that the device is given after this call, as ``item`` would."""
    if not value.is_cuda:
        return value.item
    copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> float:
        copied.synchronize()
        return copy.item()

    return read


def read_losses(state: State, name: str) -> None:
    """Read the losses of the last steps from the device.

    Raises:
        DivergenceError: if a loss or a gradient is not finite.
    """
    if not state.unread:
        return
    sums = state.world.sum(torch.stack([step.loss for step in state.unread]).tolist())
    norms = torch.stack([step.gradient_norm for step in state.unread]).tolist()
    for step, total, norm in zip(state.unread, sums, norms, strict=True):
        loss = total / step.weight
        if not (math.isfinite(loss) and math.isfinite(norm)):
            where = f"{name} diverged at step {len(state.losses)}"
            raise DivergenceError(f"{where}: loss {loss}, gradient norm {norm}; lower {name}.learning_rate")
        state.losses.append(loss)
    state.unread.clear()


def _add_task_losses(task_sums: Tensor, batch: Batch, losses_BT: Tensor) -> None:
    """Add the losses of a batch's targets to those of their tasks."""
    losses_N = losses_BT.flatten()[batch.targets]
    task_sums.index_add_(1, batch.tasks.flatten()[batch.targets], torch.stack([losses_N, torch.ones_like(losses_N)]).double())


def task_losses(state: State, tasks: Sequence[str]) -> dict[str, float]:
    """Mean unweighted loss of each task's tokens since the last call, by ``loss_TASK``; tasks without tokens are left out."""
    totals = state.world.sum(state.task_sums.flatten().tolist())
    state.task_sums.zero_()
    sums, counts = totals[: len(tasks) + 1], totals[len(tasks) + 1 :]
    return {f"loss_{task}": sums[number] / counts[number] for number, task in enumerate(tasks, 1) if counts[number]}


def validate(state: State, batches: Sequence[Batch], config: TrainConfig) -> dict[str, float]:
    """Mean loss over all targets, and over the text targets and the image targets alone.

    Batches are dealt to the processes in turn. All of them compute in every round, because each needs the shards of the others; where
    batches are left for only some, the others compute one again that does not count.
    """
    vocabulary, world = state.model.vocabulary, state.world
    names = ("loss", "loss_text", "loss_image")
    sums = torch.zeros(len(names), dtype=torch.float64)
    counts = torch.zeros(len(names), dtype=torch.float64)
    rounds = -(-len(batches) // world.size)
    with distributed.inference(state.model), autocast(config, world.device):
        for number in range(rounds):
            mine = number * world.size + world.rank
            batch = batches[min(mine, len(batches) - 1)].to(world.device)
            _, losses_BT = state.model.losses(batch)
            if mine >= len(batches):
                continue
            is_target = batch.weights > 0
            is_text = batch.tokens >= vocabulary.text_start
            is_image = (batch.tokens >= vocabulary.image_start) & ~is_text
            for index, chosen in enumerate((is_target, is_target & is_text, is_target & is_image)):
                sums[index] += losses_BT[chosen].sum(dtype=torch.float64).item()
                counts[index] += chosen.sum().item()
    totals = world.sum([*sums.tolist(), *counts.tolist()])
    return {name: totals[i] / totals[len(names) + i] for i, name in enumerate(names) if totals[len(names) + i]}


def save(state: State, data: dict[str, int], checkpoints: Checkpoints, score: float | None = None) -> None:
    """Write a checkpoint.

    Args:
        data: the state of the stream.
        score: the validation loss at this step, if it was computed.
    """
    counts = {"step": state.step, "tokens": state.tokens, "losses": state.losses, "best": state.best}
    checkpoints.save(state.step, state.tensors(), {**counts, "score": score, "data": data, "generators": generator_states()})


def resume(state: State, stream: Stream, checkpoints: Checkpoints) -> bool:
    """Resume from the newest intact checkpoint; False if there is none."""
    name = checkpoints.newest()
    if name is None:
        return False
    allocate_states(state.optimizers)
    found = checkpoints.load(name, state.tensors())
    state.step, state.tokens, state.losses, state.best = found["step"], found["tokens"], found["losses"], found["best"]
    stream.load_state(found["data"])
    set_generator_states(found["generators"])
    return True


def fit(
    state: State,
    stream: Stream,
    config: TrainConfig,
    validation: Mapping[str, Sequence[Batch]],
    name: str,
    log: Log = lambda metrics, step: None,
    after_validation: Callable[[int], None] = lambda step: None,
    checkpoints: Checkpoints | None = None,
    tasks: Sequence[str] = (),
) -> dict[str, float]:
    """Train to ``config.steps``; returns the metrics of the last validation.

    With ``checkpoints`` it resumes from the newest one, and writes one every ``config.checkpoint_every`` steps, at each validation, and
    when interrupted: by SIGTERM, by SIGINT, or by the end of the process that started this one. A second SIGINT stops at once, without a
    checkpoint.

    Args:
        validation: name -> batches. Metrics are called ``val_loss``, ``val_loss_text`` and ``val_loss_image``, with a name that is not
            empty inside: ``val_alone_loss``. The losses of the batches without a name decide which checkpoint is the best.
        name: the stage's, for errors and progress.
        after_validation: called with the step after each validation.
        tasks: names of the tasks, whose numbers in the samples count from 1; each task's loss is logged as ``loss_TASK``.

    Raises:
        DivergenceError: if a loss or a gradient is not finite; the last checkpoint is of a step before it.
        SystemExit: if interrupted; the status is 128 + the signal's number.
    """
    metrics: dict[str, float] = {}
    throughput = _Throughput(state)
    # In float64: counts of float32 end at 2**24 tokens.
    state.task_sums = torch.zeros(2, len(tasks) + 1 if tasks else 0, dtype=torch.float64, device=state.world.device)

    def say(message: str) -> None:
        if state.world.rank == 0:
            print(message, flush=True)

    def measure() -> dict[str, float]:
        found = _validate_all(state, validation, config)
        state.best = min(state.best, found.get("val_loss", math.inf))
        log({**found, "best_val_loss": state.best}, state.step)
        # Generation has shapes of its own, which would use up the number of shapes that the compiler makes kernels for.
        uncompiled = torch.compiler.set_stance("force_eager") if config.compile else nullcontext()
        with distributed.inference(state.model), uncompiled:
            after_validation(state.step)
        return found

    # 1. Resume. The losses so far are logged again, because each start is an MLflow run of its own and its curve should be complete.
    if checkpoints is not None:
        checkpoints.open()
        if resume(state, stream, checkpoints):
            say(f"{name}: resuming at step {state.step} of {config.steps}")
            for done in range(LOG_EVERY, state.step + 1, LOG_EVERY):
                log({"loss": state.losses[done - 1]}, done)
    world = state.world
    shares = Shares(stream, range(state.step, config.steps), world.rank, world.size, config.micro_batch_size)
    ahead = closing(prefetched(shares)) if world.device.type == "cuda" else nullcontext(shares)
    with (
        ahead as draws,
        naming_last_checkpoint(checkpoints),
        progress(name, config.steps, "steps", done=state.step) as meter,
        interruption() as interrupted,
    ):
        for share, data in draws:
            # 2. Take a step.
            step = train_step(state, share, config, name)
            meter.advance(1, f"loss {state.losses[-1]:.3f}" if state.losses else "")
            # 3. Log.
            if state.step % LOG_EVERY == 0:
                read_losses(state, name)
                losses = {"loss": state.losses[-1]} | (task_losses(state, tasks) if tasks else {})
                rates = {"gradient_norm": step.gradient_norm.item(), "learning_rate": step.learning_rate}
                log({**losses, **rates, "tokens": float(state.tokens), **throughput(meter.rate * share.tokens, share.length)}, state.step)
            # 4. Validate.
            score = None
            if state.step % config.validate_every == 0 or state.step == config.steps:
                read_losses(state, name)
                metrics = measure()
                score = metrics.get("val_loss")
            # 5. Write a checkpoint. The processes agree on the signal, which may have reached only some of them.
            number = state.world.max(interrupted())
            if checkpoints is not None and (score is not None or state.step % config.checkpoint_every == 0 or number):
                read_losses(state, name)
                save(state, data, checkpoints, score)
            if number and state.step < config.steps:
                leave(name, number, state.step, checkpoints, world)
    if validation and not metrics:  # the run before was killed after its last checkpoint
        metrics = measure()
    state.model.eval()
    return metrics


class _Throughput:
    """Tokens per second, and on a known GPU the share of its peak that they use: model FLOPs utilization (MFU)."""

    def __init__(self, state: State) -> None:
        model, device = state.model, state.world.device
        peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
        self.peak = peak * state.world.size if peak else None
        self.spec, self.vocabulary_size = model.spec, model.vocabulary.size

    def __call__(self, tokens_per_second: float, length: float) -> dict[str, float]:
        metrics = {"tokens_per_second": tokens_per_second}
        if self.peak:
            metrics["mfu"] = tokens_per_second * flops_per_token(self.spec, self.vocabulary_size, length) / self.peak
        return metrics


def _validate_all(state: State, validation: Mapping[str, Sequence[Batch]], config: TrainConfig) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, batches in validation.items():
        prefix = f"val_{name}_" if name else "val_"
        metrics |= {f"{prefix}{key}": loss for key, loss in validate(state, batches, config).items()}
    return metrics
