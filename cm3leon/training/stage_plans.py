"""Whether a step of every training stage fits its GPUs: the table that ``cm3leon plan`` ends with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cm3leon.config.schema import Config
from cm3leon.models.decoder import Decoder
from cm3leon.training import clip, dry_run, super_resolution, vqgan
from cm3leon.training.dry_run import StepMemory
from cm3leon.training.memory import estimate_memory, rows_at_once

if TYPE_CHECKING:
    from rich.console import Console

    from cm3leon.config.schema import TrainConfig

MACHINE = 8
"""GPUs of a machine. The networks of images are trained on one."""


@dataclass(frozen=True)
class StagePlan:
    """A stage's step on each of its GPUs.

    Attributes:
        at_once: rows of the batch that a GPU computes at once.
        needed: bytes; None if the network is imported.
        advice: an option of the command with which it fits; empty if it does, or if none helps.
    """

    stage: str
    gpus: int = 0
    at_once: str = ""
    needed: float | None = None
    advice: str = ""


def stage_plans(config: Config, model: Decoder, gpus: int, usable: float) -> list[StagePlan]:
    """The plans of all training stages.

    Args:
        model: the decoder that ``config`` describes, on the meta device.
        gpus: over all machines.
        usable: bytes of a GPU that a step may fill.
    """
    return [
        *_image_plans(config, gpus, usable),
        _decoder_plan("pretrain", model, config.pretrain, gpus, usable),
        _decoder_plan("sft", model, config.sft, gpus, usable),
    ]


def _image_plans(config: Config, gpus: int, usable: float) -> Iterator[StagePlan]:
    image_size = config.image_tokenizer.image_size
    # Stage -> section, whether its network is imported, and the memory of a step.
    stages: dict[str, tuple[Any, bool, Callable[[Any, int], StepMemory]]] = {
        "image_tokenizer": (config.image_tokenizer, bool(config.image_tokenizer.pretrained), vqgan.step_memory),
        "encoder": (config.encoder, bool(config.encoder.pretrained_model), clip.step_memory),
        "super_resolution": (config.super_resolution, False, lambda section, n: super_resolution.step_memory(section, image_size, n)),
    }
    for stage, (section, imported, memory_of) in stages.items():
        if imported:
            yield StagePlan(stage)
            continue
        alone = dry_run.needs_whole_batch(section)
        processes = 1 if alone else min(gpus, MACHINE, section.batch_size)
        needed = memory_of(section, processes).total
        rows = dry_run.micro_batch(section, processes)
        fitting = None if needed <= usable else dry_run.largest_that_fits(section, processes, memory_of, usable)
        advice = f"--set {stage}.micro_batch_size={fitting}" if fitting else ""
        yield StagePlan(stage, processes, f"{rows} of {section.batch_size}", needed, advice)


def _decoder_plan(stage: str, model: Decoder, section: TrainConfig, gpus: int, usable: float) -> StagePlan:
    gpus = min(gpus, section.batch_size)
    needed, rows = estimate_memory(model, section, gpus).total, rows_at_once(section, gpus)[1]
    advice, fitting = "", rows
    while needed > usable and not advice and fitting > 1:
        fitting //= 2
        if estimate_memory(model, section.model_copy(update={"micro_batch_size": fitting}), gpus).total <= usable:
            advice = f"--set {stage}.micro_batch_size={fitting}"
    return StagePlan(stage, gpus, f"{rows} of {section.batch_size}", needed, advice)


def show_stages(plans: list[StagePlan], usable: float, console: Console) -> None:
    """Print the plans as a table, and the advice."""
    from rich.table import Table

    table = Table("stage", "GPUs", "rows at once", "memory on each", "fits", title="a step of every training stage", title_justify="left")
    for plan in plans:
        if plan.needed is None:
            table.add_row(plan.stage, "", "", "", "imported")
        else:
            table.add_row(
                plan.stage, str(plan.gpus), plan.at_once, f"{plan.needed / 1e9:,.2f} GB", "yes" if plan.needed <= usable else "no"
            )
    console.print(table)
    for plan in plans:
        if plan.advice:
            console.print(f"{plan.stage} would fit with: {plan.advice}", highlight=False, soft_wrap=True)
