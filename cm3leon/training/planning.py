"""Plan a run: memory, time and disk of pretraining, and the memory of every training stage. Nothing is trained, and no GPU is needed.

``cm3leon plan --profile cm3leon-7b --gpus 64`` prints a plan. Memory is estimated (``training/memory.py`` for the decoder,
``training/dry_run.py`` for the other networks); for speed the MFU is assumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cm3leon.config import paths
from cm3leon.config.profiles import CONFIGS, changed_config, load_profile
from cm3leon.config.schema import Config, TrainConfig
from cm3leon.models.decoder import Decoder, DecoderSpec
from cm3leon.sequence.grammar import Vocabulary
from cm3leon.training.hardware import DEVICES, Device, flops_per_token
from cm3leon.training.memory import FP32, Memory, Parameters, count, estimate_memory, optimizer_bytes, rows_at_once
from cm3leon.training.memory_limit import USABLE
from cm3leon.training.stage_plans import show_stages, stage_plans
from cm3leon.utils.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def vocabulary_of(config: Config) -> Vocabulary:
    """The vocabulary that the parameters describe.

    That of a real run can differ: a text tokenizer trained on little text has fewer entries, and an image tokenizer may be imported.
    """
    model, images = config.pretrain.model, config.image_tokenizer
    return Vocabulary(config.text_tokenizer.vocabulary_size, images.codebook_size, model.sentinels, images.tokens_per_image, model.reserved)


def meta_decoder(config: Config) -> Decoder:
    """The decoder that the parameters describe, on the meta device: its tensors have shapes and no memory."""
    with torch.device("meta"):
        return Decoder(DecoderSpec.from_config(config.pretrain.model), vocabulary_of(config))


@dataclass(frozen=True)
class Plan:
    """A plan.

    Attributes:
        mfu: assumed model FLOPs utilization.
        other_activations: memory of the activations if activation checkpointing were switched.
        token_flops: training FLOPs per token.
        advice: changes with which it would fit, as options of the command; empty if it fits.
    """

    config: Config
    device: Device
    gpus: int
    mfu: float
    steps: int
    parameters: Parameters
    memory: Memory
    other_activations: float
    token_flops: float
    advice: tuple[str, ...]

    @property
    def step_tokens(self) -> int:
        return self.config.pretrain.batch_size * self.config.pretrain.model.context

    @property
    def tokens_per_second(self) -> float:
        """Over all GPUs. GPUs with fewer rows of the batch wait for those with more."""
        share, _ = rows_at_once(self.config.pretrain, self.gpus)
        busy = self.config.pretrain.batch_size / (share * self.gpus)
        return self.gpus * busy * self.device.flops * self.mfu / self.token_flops

    @property
    def seconds(self) -> float:
        """Duration of the run."""
        return self.steps * self.step_tokens / self.tokens_per_second

    @property
    def usable(self) -> float:
        """Memory of a GPU that the plan may fill, bytes."""
        return USABLE * self.device.memory

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.usable

    @property
    def checkpoint_bytes(self) -> float:
        return FP32 * self.parameters.total + optimizer_bytes(self.parameters, self.config.pretrain)


def find_device(name: str) -> Device:
    """A device of :data:`~cm3leon.training.hardware.DEVICES` by its name.

    Raises:
        UserError: if there is none of that name.
    """
    found = next((device for device in DEVICES if device.name == name.lower()), None)
    if found is None:
        known = ", ".join(device.name for device in DEVICES)
        raise UserError(f"--device {name}: unknown; known devices are {known}")
    return found


def read_config(profile: str | None, changes: Iterable[str] = (), configs: Path = CONFIGS, params: Path = paths.PARAMS) -> Config:
    """A profile, or ``params.yaml`` if none is named, with changes (``KEY=VALUE``); nothing is written.

    Raises:
        ConfigError: for an unknown profile or key, a missing file, or an impossible value.
    """
    return changed_config(changes, params) if profile is None else load_profile(profile, changes, configs)


def make_plan(config: Config, gpus: int, device: str = "h100", mfu: float = 0.4, tokens: float | None = None) -> Plan:
    """Plan the pretraining that ``config`` describes.

    Args:
        gpus: number of GPUs, over all machines.
        device: a name of :data:`~cm3leon.training.hardware.DEVICES`.
        mfu: assumed model FLOPs utilization, the share of the device's peak FLOP/s that the model's FLOPs use.
        tokens: to train on; by default those of the profile's steps.

    Raises:
        UserError: for an impossible number or an unknown device.
    """
    section = config.pretrain
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: must be at least 1")
    if gpus > section.batch_size:
        rows = f"a step has {section.batch_size} rows (pretrain.batch_size)"
        raise UserError(f"--gpus {gpus}: {rows}, so some GPUs would have none; use fewer GPUs or a larger batch")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu:g}: must be a share above 0 and at most 1")
    if tokens is not None and not 0 < tokens < float("inf"):
        raise UserError(f"--tokens {tokens:g}: must be above 0")
    found, model = find_device(device), meta_decoder(config)
    context = section.model.context
    other = section.model_copy(update={"activation_checkpointing": not section.activation_checkpointing})
    plan = Plan(
        config=config,
        device=found,
        gpus=gpus,
        mfu=mfu,
        steps=section.steps if tokens is None else max(1, round(tokens / (section.batch_size * context))),
        parameters=count(model),
        memory=estimate_memory(model, section, gpus),
        other_activations=estimate_memory(model, other, gpus).activations,
        token_flops=flops_per_token(model.spec, model.vocabulary.size, context),
        advice=(),
    )
    return plan if plan.fits else replace(plan, advice=tuple(_remedies(model, section, gpus, plan.usable)))


def _remedies(model: Decoder, section: TrainConfig, gpus: int, usable: float) -> Iterator[str]:
    """Changes with which a plan fits: to the micro-batch, to activation checkpointing, and to the number of GPUs."""

    def largest(checkpointing: bool, gpus: int) -> int | None:
        """The largest micro-batch that fits, found by halving the present one."""
        _, rows = rows_at_once(section, gpus)
        while rows >= 1:
            changed = section.model_copy(update={"micro_batch_size": rows, "activation_checkpointing": checkpointing})
            if estimate_memory(model, changed, gpus).total <= usable:
                return rows
            rows //= 2
        return None

    def setting(rows: int, checkpointing: bool) -> str:
        switch = " --set pretrain.activation_checkpointing=true" if checkpointing and not section.activation_checkpointing else ""
        return f"--set pretrain.micro_batch_size={rows}{switch}"

    # 1. On as many GPUs: a smaller micro-batch alone, or with activation checkpointing.
    for checkpointing in sorted({section.activation_checkpointing, True}):
        if rows := largest(checkpointing, gpus):
            yield setting(rows, checkpointing)
    # 2. On twice, four times ... as many, until one of these fits.
    more = 2 * gpus
    while more <= section.batch_size:
        for checkpointing in sorted({section.activation_checkpointing, True}):
            if rows := largest(checkpointing, more):
                yield f"--gpus {more} {setting(rows, checkpointing)}"
                return
        more *= 2


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"


def _si(value: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    days, hours = seconds / 86400, seconds / 3600
    return f"{days:,.1f} days" if days >= 2 else f"{hours:,.1f} hours" if hours >= 2 else f"{seconds / 60:,.1f} minutes"


def tables(plan: Plan) -> list[Table]:
    """The plan as tables: the model, memory, time and disk."""
    from rich.table import Table

    section, parameters, memory = plan.config.pretrain, plan.parameters, plan.memory
    share, rows = rows_at_once(section, plan.gpus)
    checkpointing = section.activation_checkpointing
    model = Table("parameters", "", title=f"{plan.config.profile}: the decoder", title_justify="left")
    model.add_row("embeddings (tokens, positions)", f"{parameters.embeddings:,}")
    model.add_row(f"blocks, {parameters.layers} of {parameters.block:,}", f"{parameters.blocks:,}")
    model.add_row("total", f"{parameters.total:,} ({_si(parameters.total)})")
    model.add_row("training FLOPs a token", f"{plan.token_flops:.3e}")

    usage = Table("memory on each GPU", "", title=f"{plan.gpus} x {plan.device.name}, {section.precision}, {rows} of {share} rows at once")
    usage.title_justify = "left"
    usage.add_row("parameters, float32", _gigabytes(memory.parameters))
    usage.add_row("gradients, float32", _gigabytes(memory.gradients))
    usage.add_row(f"optimizer ({section.optimizer}), float32", _gigabytes(memory.optimizer))
    usage.add_row(f"activations, {'with' if checkpointing else 'without'} checkpointing", _gigabytes(memory.activations))
    usage.add_row("final norm, logits of a chunk, loss", _gigabytes(memory.loss))
    usage.add_row(
        "gathered parameters, reduced gradients" if plan.gpus > 1 else "weights in bfloat16", _gigabytes(memory.gathered), end_section=True
    )
    usage.add_row("total", _gigabytes(memory.total))
    usage.add_row(f"usable, {USABLE:.0%} of {plan.device.memory / 1e9:.0f} GB", _gigabytes(plan.usable))
    usage.add_row("fits", "yes" if plan.fits else "no")
    usage.add_row(f"(activations {'without' if checkpointing else 'with'} checkpointing)", _gigabytes(plan.other_activations))

    speed = Table(
        "time and disk", "", title=f"at {plan.mfu:.0%} of {plan.device.flops / 1e12:,.0f} TFLOP/s (assumed)", title_justify="left"
    )
    speed.add_row("tokens a second", f"{_si(plan.tokens_per_second)}, {_si(plan.tokens_per_second / plan.gpus)} a GPU")
    speed.add_row("a step", f"{_si(plan.step_tokens)} tokens, {plan.step_tokens / plan.tokens_per_second:,.2f} s")
    speed.add_row("steps", f"{plan.steps:,}, {_si(plan.steps * plan.step_tokens)} tokens")
    speed.add_row("in all", f"{_duration(plan.seconds)}, {plan.gpus * plan.seconds / 3600:,.0f} GPU hours")
    speed.add_row("a checkpoint", f"{_gigabytes(plan.checkpoint_bytes)}, up to {section.keep_checkpoints + 2} at a time")
    speed.add_row("the decoder at the end", _gigabytes(FP32 * parameters.total))
    return [model, usage, speed]


def show(plan: Plan, console: Console) -> None:
    """Print the plan, the advice if it does not fit, and the memory of all training stages."""
    for table in tables(plan):
        console.print(table)
    if plan.config.pretrain.precision == "fp32":
        console.print("The time is for bfloat16; the profile computes in float32, which is slower.")
    if not plan.fits:
        if plan.advice:
            console.print("It would fit with one of:")
            for change in plan.advice:
                console.print(f"  {change}", highlight=False, soft_wrap=True)
        else:
            console.print("It fits with no micro-batch and no number of GPUs: use a device with more memory.")
    show_stages(stage_plans(plan.config, meta_decoder(plan.config), plan.gpus, plan.usable), plan.usable, console)
