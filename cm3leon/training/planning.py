"""What a pretraining run needs: parameters, memory on each GPU, time, disk. Nothing is trained, and no GPU is needed.

``cm3leon plan --profile cm3leon-7b --gpus 64`` prints it. Memory is counted from the tensors that the trainer keeps (FSDP2 as in
``training/distributed.py``, the loss of ``loss.py``); it has not been compared with a GPU's. Speed is an assumption, the MFU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cm3leon.config.profiles import CONFIGS, PARAMS, changed_config, load_profile
from cm3leon.config.schema import Config, TrainConfig
from cm3leon.models.cross_entropy import CHUNK_ELEMENTS
from cm3leon.models.decoder import Decoder, DecoderSpec
from cm3leon.sequence.grammar import Vocabulary
from cm3leon.training.hardware import DEVICES, Device, flops_per_token
from cm3leon.utils.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

USABLE = 0.9
"""Share of a device's memory that a plan may fill: the rest is for CUDA, NCCL and what the allocator cannot use."""

FP32, BF16 = 4, 2
"""Bytes."""


# --- the model -------------------------------------------------------------------------------------------------------


def vocabulary_of(config: Config) -> Vocabulary:
    """The vocabulary that the tokenizers of these parameters make. Text tokenizers trained on little text, and imported image
    tokenizers, can differ from what the parameters say."""
    model, images = config.pretrain.model, config.image_tokenizer
    return Vocabulary(config.text_tokenizer.vocabulary_size, images.codebook_size, model.sentinels, images.tokens_per_image, model.reserved)


def meta_decoder(config: Config) -> Decoder:
    """The decoder of these parameters on the meta device: shapes without memory."""
    with torch.device("meta"):
        return Decoder(DecoderSpec.from_config(config.pretrain.model), vocabulary_of(config))


@dataclass(frozen=True)
class Parameters:
    """How many parameters: what is outside the blocks (embeddings of tokens, positions, image_positions), one block, how many blocks."""

    embeddings: int
    block: int
    layers: int

    @property
    def blocks(self) -> int:
        return self.layers * self.block

    @property
    def total(self) -> int:
        return self.embeddings + self.blocks


def count(model: Decoder) -> Parameters:
    """The parameters of a decoder."""
    block = sum(p.numel() for p in model.blocks[0].parameters())
    return Parameters(model.parameter_count - len(model.blocks) * block, block, len(model.blocks))


# --- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, at the moment of a step when most is held."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    gathered: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def optimizer_bytes(parameters: Parameters, section: TrainConfig) -> int:
    """Of the optimizer's state, over all GPUs: two float32 for each parameter; one for those that Muon trains."""
    return 2 * FP32 * parameters.embeddings + (2 if section.optimizer == "adamw" else 1) * FP32 * parameters.blocks


def rows_at_once(section: TrainConfig, gpus: int) -> tuple[int, int]:
    """Rows of the batch that the busiest GPU has in all, and that it computes at once."""
    share = -(-section.batch_size // gpus)
    return share, min(section.micro_batch_size or share, share)


def memory(model: Decoder, section: TrainConfig, gpus: int) -> Memory:
    """What one of ``gpus`` holds, rows filled to the context.

    Parameters, gradients and optimizer are float32, divided among the GPUs. Not counted: what compilation saves, and Muon's whole matrices
    after the backward pass, when the activations are gone.
    """
    parameters, spec = count(model), model.spec
    _, rows = rows_at_once(section, gpus)
    bf16, sharded = section.precision != "fp32", gpus > 1
    return Memory(
        parameters=FP32 * parameters.total / gpus,
        gradients=FP32 * parameters.total / gpus,
        optimizer=optimizer_bytes(parameters, section) / gpus,
        activations=activation_bytes(spec, section, rows * spec.context, sharded=sharded),
        loss=loss_bytes(model, rows * spec.context, bf16=bf16, sharded=sharded),
        gathered=gathered_bytes(parameters, bf16=bf16) if sharded else BF16 * parameters.blocks * bf16,
    )


def block_bytes(spec: DecoderSpec, section: TrainConfig) -> int:
    """What a block keeps of a token for its backward pass.

    In widths: the inputs of two norms (float32, also under autocast), and in the run's precision their outputs, queries, keys and values,
    the output of attention, and four of the feed-forward. Beside those the statistics of norms and softmax, and with ``qk_norm`` its inputs
    and outputs.
    """
    size = BF16 if section.precision != "fp32" else FP32
    widths = 2 * FP32 + (2 + 3 + 1 + 4) * size
    if spec.qk_norm:
        widths += 2 * size + (2 * FP32 if size == BF16 else 0)
    statistics = FP32 * (spec.heads + 4 + (4 * spec.heads if spec.qk_norm else 0))
    return widths * spec.width + statistics


def activation_bytes(spec: DecoderSpec, section: TrainConfig, tokens: int, *, sharded: bool) -> float:
    """Of all blocks; with activation checkpointing the input of each, and all of one block, which is computed again.

    In both cases one block's feed-forward is at work, four widths of gradients that are not kept, and with ``packing`` all blocks share one
    mask, a row of it a token. Hidden states between blocks are float32, unless the embeddings were gathered in bfloat16.
    """
    size = BF16 if section.precision != "fp32" else FP32
    block = block_bytes(spec, section)
    between = (size if sharded else FP32) * spec.width
    kept = spec.layers * between + block if section.activation_checkpointing else spec.layers * block
    return tokens * (kept + 4 * size * spec.width + (size * spec.context if section.packing else 0))


def loss_bytes(model: Decoder, tokens: int, *, bf16: bool, sharded: bool) -> float:
    """Of the last norm and the loss: four times the hidden states in float32 (input and output of the norm, those with a target, their
    gradient), one chunk of logits and of their probabilities, and the gradient of the output matrix."""
    matrix, vocabulary = model.tokens.weight.numel(), model.vocabulary.size
    chunk = min(tokens, max(1, CHUNK_ELEMENTS["cuda"] // vocabulary)) * vocabulary
    copies = BF16 + (0 if sharded else BF16) if bf16 else 0
    return 4 * FP32 * tokens * model.spec.width + (2 * FP32 + BF16 * bf16) * chunk + (FP32 + copies) * matrix


def gathered_bytes(parameters: Parameters, *, bf16: bool) -> float:
    """What FSDP holds whole: the embeddings throughout; a block, the next one and the buffer it arrives in; and of one block the gradient
    and two float32 buffers on their way to the other GPUs."""
    size = BF16 if bf16 else FP32
    return size * parameters.embeddings + (3 * size + size + 2 * FP32) * parameters.block


# --- the plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """All figures of one plan. ``mfu`` is assumed; ``other_activations`` are those with activation checkpointing the other way."""

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
        """Of all GPUs; those that have fewer rows of the batch than others wait for them."""
        share, _ = rows_at_once(self.config.pretrain, self.gpus)
        waiting = self.config.pretrain.batch_size / (share * self.gpus)
        return self.gpus * waiting * self.device.flops * self.mfu / self.token_flops

    @property
    def seconds(self) -> float:
        return self.steps * self.step_tokens / self.tokens_per_second

    @property
    def usable(self) -> float:
        return USABLE * self.device.memory

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.usable

    @property
    def checkpoint_bytes(self) -> float:
        return FP32 * self.parameters.total + optimizer_bytes(self.parameters, self.config.pretrain)


def find_device(name: str) -> Device:
    """A device by its name.

    Raises:
        UserError: listing the known ones, if there is none of that name.
    """
    found = next((device for device in DEVICES if device.name == name.lower()), None)
    if found is None:
        known = ", ".join(device.name for device in DEVICES)
        raise UserError(f"--device {name}: not known; known are {known}")
    return found


def read_config(profile: str | None, changes: Iterable[str] = (), configs: Path = CONFIGS, params: Path = PARAMS) -> Config:
    """A profile, or ``params.yaml`` if none is named, with changes; nothing is written.

    Raises:
        ConfigError: for an unknown profile or key, a missing file, or an impossible value.
    """
    return changed_config(changes, params) if profile is None else load_profile(profile, changes, configs)


def make_plan(config: Config, gpus: int, device: str = "h100", mfu: float = 0.4, tokens: float | None = None) -> Plan:
    """Plan the pretraining that ``config`` describes.

    Args:
        gpus: over all machines.
        device: a name of :data:`~cm3leon.training.hardware.DEVICES`.
        mfu: share of the device's FLOP/s that goes into the model's, assumed.
        tokens: to train on; by default the profile's steps.

    Raises:
        UserError: for a number that cannot be, or an unknown device.
    """
    section = config.pretrain
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: at least 1")
    if gpus > section.batch_size:
        raise UserError(f"--gpus {gpus}: a step has {section.batch_size} rows (pretrain.batch_size), so some GPUs would have none")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu:g}: a share above 0 and at most 1")
    if tokens is not None and not 0 < tokens < float("inf"):
        raise UserError(f"--tokens {tokens:g}: above 0")
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
        memory=memory(model, section, gpus),
        other_activations=memory(model, other, gpus).activations,
        token_flops=flops_per_token(model.spec, model.vocabulary.size, context),
        advice=(),
    )
    return plan if plan.fits else replace(plan, advice=tuple(_remedies(model, section, gpus, plan.usable)))


def _remedies(model: Decoder, section: TrainConfig, gpus: int, usable: float) -> Iterator[str]:
    """Changes that make it fit: the micro-batch alone, activation checkpointing, and the fewest GPUs, each with the largest micro-batch."""

    def largest(checkpointing: bool, gpus: int) -> int | None:
        """The largest micro-batch that fits, by halving the one there is."""
        _, rows = rows_at_once(section, gpus)
        while rows >= 1:
            changed = section.model_copy(update={"micro_batch_size": rows, "activation_checkpointing": checkpointing})
            if memory(model, changed, gpus).total <= usable:
                return rows
            rows //= 2
        return None

    def setting(rows: int, checkpointing: bool) -> str:
        switch = " --set pretrain.activation_checkpointing=true" if checkpointing and not section.activation_checkpointing else ""
        return f"--set pretrain.micro_batch_size={rows}{switch}"

    for checkpointing in sorted({section.activation_checkpointing, True}):
        if rows := largest(checkpointing, gpus):
            yield setting(rows, checkpointing)
    more = 2 * gpus
    while more <= section.batch_size:
        for checkpointing in sorted({section.activation_checkpointing, True}):
            if rows := largest(checkpointing, more):
                yield f"--gpus {more} {setting(rows, checkpointing)}"
                return
        more *= 2


# --- for people ------------------------------------------------------------------------------------------------------


def gigabytes(size: float) -> str:
    """In GB of 10**9 bytes."""
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

    section, parameters, held = plan.config.pretrain, plan.parameters, plan.memory
    share, rows = rows_at_once(section, plan.gpus)
    checkpointing = section.activation_checkpointing
    model = Table("parameters", "", title=f"{plan.config.profile}: the decoder", title_justify="left")
    model.add_row("embeddings (tokens, positions)", f"{parameters.embeddings:,}")
    model.add_row(f"blocks, {parameters.layers} of {parameters.block:,}", f"{parameters.blocks:,}")
    model.add_row("total", f"{parameters.total:,} ({_si(parameters.total)})")
    model.add_row("training FLOPs a token", f"{plan.token_flops:.3e}")

    room = Table("memory on each GPU", "", title=f"{plan.gpus} x {plan.device.name}, {section.precision}, {rows} of {share} rows at once")
    room.title_justify = "left"
    room.add_row("parameters, float32", gigabytes(held.parameters))
    room.add_row("gradients, float32", gigabytes(held.gradients))
    room.add_row(f"optimizer ({section.optimizer}), float32", gigabytes(held.optimizer))
    room.add_row(f"activations, {'with' if checkpointing else 'without'} checkpointing", gigabytes(held.activations))
    room.add_row("last norm, logits of a chunk, loss", gigabytes(held.loss))
    room.add_row(
        "gathered parameters, reduced gradients" if plan.gpus > 1 else "weights in bfloat16", gigabytes(held.gathered), end_section=True
    )
    room.add_row("total", gigabytes(held.total))
    room.add_row(f"usable, {USABLE:.0%} of {plan.device.memory / 1e9:.0f} GB", gigabytes(plan.usable))
    room.add_row("fits", "yes" if plan.fits else "no")
    room.add_row(f"(activations {'without' if checkpointing else 'with'} checkpointing)", gigabytes(plan.other_activations))

    speed = Table(
        "time and disk", "", title=f"at {plan.mfu:.0%} of {plan.device.flops / 1e12:,.0f} TFLOP/s (assumed)", title_justify="left"
    )
    speed.add_row("tokens a second", f"{_si(plan.tokens_per_second)}, {_si(plan.tokens_per_second / plan.gpus)} a GPU")
    speed.add_row("a step", f"{_si(plan.step_tokens)} tokens, {plan.step_tokens / plan.tokens_per_second:,.2f} s")
    speed.add_row("steps", f"{plan.steps:,}, {_si(plan.steps * plan.step_tokens)} tokens")
    speed.add_row("in all", f"{_duration(plan.seconds)}, {plan.gpus * plan.seconds / 3600:,.0f} GPU hours")
    speed.add_row("a checkpoint", f"{gigabytes(plan.checkpoint_bytes)}, up to {section.keep_checkpoints + 2} at a time")
    speed.add_row("the decoder at the end", gigabytes(FP32 * parameters.total))
    return [model, room, speed]


def show(plan: Plan, console: Console) -> None:
    """Print the plan, and what would make it fit if it does not."""
    for table in tables(plan):
        console.print(table)
    if plan.config.pretrain.precision == "fp32":
        console.print(f"The time is that of bfloat16 products; the profile computes in {plan.config.pretrain.precision}.")
    if not plan.fits:
        if plan.advice:
            console.print("It would fit with one of:")
            for change in plan.advice:
                console.print(f"  {change}", highlight=False, soft_wrap=True)
        else:
            console.print("No micro-batch and no number of GPUs makes it fit: use a device with more memory.")
