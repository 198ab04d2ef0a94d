"""The training loop of pretraining and instruction tuning: ``setup`` -> ``fit`` -> ``validate``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cm3leon.config import TrainConfig
from cm3leon.data.sequences import Batch
from cm3leon.model import Decoder
from cm3leon.progress import progress
from cm3leon.training.optimizer import learning_rate_at, make_optimizers

Log = Callable[[dict[str, float], int], None]
LOG_EVERY = 10


class DivergenceError(RuntimeError):
    """The loss or the gradient is no longer finite."""


@dataclass
class State:
    """All that a run changes."""

    model: Decoder
    optimizers: list[torch.optim.Optimizer]
    step: int = 0


def setup(model: Decoder, config: TrainConfig) -> State:
    return State(model.train(), make_optimizers(model, config))


def token_losses(model: Decoder, batch: Batch) -> Tensor:
    """Next-token loss of each target, (B, T - 1), nats."""
    hidden = model(batch.tokens[:, :-1], batch.places[:, :-1])
    logits = model.logits(hidden)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.tokens[:, 1:].flatten(), reduction="none").view(hidden.shape[:2])


def weighted_loss(model: Decoder, batch: Batch) -> Tensor:
    """Mean of the targets' losses by their weights."""
    weights = batch.weights[:, 1:]
    return (token_losses(model, batch) * weights).sum() / weights.sum().clamp(min=1)


@torch.no_grad()
def validate(model: Decoder, batches: Sequence[Batch]) -> dict[str, float]:
    """Mean loss over all targets, and over text and image targets apart."""
    model.eval()
    vocabulary = model.vocabulary
    sums = {"loss": 0.0, "loss_text": 0.0, "loss_image": 0.0}
    counts = dict.fromkeys(sums, 0.0)
    for cpu_batch in batches:
        batch = cpu_batch.to(model.device)
        losses = token_losses(model, batch)
        ids, is_target = batch.tokens[:, 1:], batch.weights[:, 1:] > 0
        image = (ids >= vocabulary.image_start) & (ids < vocabulary.text_start)
        for name, chosen in (
            ("loss", is_target),
            ("loss_text", is_target & (ids >= vocabulary.text_start)),
            ("loss_image", is_target & image),
        ):
            sums[name] += losses[chosen].sum().item()
            counts[name] += chosen.sum().item()
    model.train()
    return {name: sums[name] / counts[name] for name in sums if counts[name]}


def fit(
    state: State,
    batch_at: Callable[[int], Batch],
    config: TrainConfig,
    validation: Sequence[Batch],
    name: str,
    log: Log = lambda figures, step: None,
    after_validation: Callable[[int], None] = lambda step: None,
) -> dict[str, float]:
    """Train to ``config.steps``; returns the last validation figures.

    Args:
        batch_at: batch of a step.
        name: of the stage, named in errors and progress.
        after_validation: called with the step after each validation.

    Raises:
        DivergenceError: if the loss or the gradient is not finite; the step is not taken.
    """
    model = state.model
    figures: dict[str, float] = {}
    with progress(name, config.steps, "steps") as meter:
        while state.step < config.steps:
            batch = batch_at(state.step).to(model.device)
            loss = weighted_loss(model, batch)
            model.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
                raise DivergenceError(
                    f"{name} diverged at step {state.step}: loss {loss.item()}, gradient norm {norm.item()}; lower {name}.learning_rate"
                )
            rate = learning_rate_at(state.step, config)
            for optimizer in state.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
            state.step += 1
            meter.advance(1, f"loss {loss.item():.3f}")
            if state.step % LOG_EVERY == 0:
                tokens_per_second = meter.rate * batch.tokens.numel()
                log(
                    {"loss": loss.item(), "gradient_norm": norm.item(), "learning_rate": rate, "tokens_per_second": tokens_per_second},
                    state.step,
                )
            if state.step % config.validate_every == 0 or state.step == config.steps:
                figures = {f"val_{key}": value for key, value in validate(model, validation).items()}
                log(figures, state.step)
                after_validation(state.step)
    model.eval()
    return figures
