"""The training run of the stages ``pretrain`` and ``sft``: its stream of batches, and all steps from setup to the saved decoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from cm3leon.config import paths
from cm3leon.config.schema import TrainConfig
from cm3leon.data.batches import Batch, GetSample, SampleStream, Stream, TokenStream, pack
from cm3leon.data.epochs import Weights
from cm3leon.models.decoder import Decoder
from cm3leon.tracking.runs import Run
from cm3leon.training.checkpoint import Checkpoints
from cm3leon.training.checkpoint_runs import Resumption
from cm3leon.training.distributed import full_tensor
from cm3leon.training.fingerprint import Fingerprint
from cm3leon.training.memory import estimate_memory
from cm3leon.training.memory_limit import refuse_too_large
from cm3leon.training.optimizer import allocate_states
from cm3leon.training.trainer import fit, setup
from cm3leon.utils.world import World


def make_stream(get_sample: GetSample, size: int, section: TrainConfig, seed: int, context: int, weights: Weights | None = None) -> Stream:
    """The training samples of a stage: in a step, under ``packing`` as many as fill ``batch_size`` rows of tokens, else ``batch_size``.

    Args:
        size: number of samples.
        weights: of the samples; None: each is seen once in an epoch.
    """
    if section.packing:
        return TokenStream(get_sample, size, section.batch_size, seed, context, weights)
    return SampleStream(get_sample, size, section.batch_size, seed, weights)


def first_batches(get_sample: GetSample, size: int, section: TrainConfig, seed: int) -> list[Batch]:
    """Validation batches: the first ``validation_samples`` samples of a shuffled epoch."""
    together = section.micro_batch_size or min(section.batch_size, section.validation_samples)
    samples = SampleStream(get_sample, size, section.validation_samples, seed).samples(0)
    return [pack(samples[start : start + together]) for start in range(0, len(samples), together)]


def train(
    stage: str,
    model: Decoder,
    stream: Stream,
    section: TrainConfig,
    validation: Mapping[str, Sequence[Batch]],
    output: Path,
    run: Run,
    processes: World,
    after_validation: Callable[[int], None],
    identity: Fingerprint,
    tasks: Sequence[str] = (),
    *,
    weights: Iterable[tuple[str, Tensor]] | None = None,
    resume_from: Path | None = None,
    accept_changes: bool = False,
) -> dict[str, float]:
    """Train a decoder and write it with its ``losses.csv`` to ``output``; resumes if a run with the same ``identity`` was interrupted.

    Args:
        stage: name of the parameters' section; the prefix of MLflow's metrics.
        weights: of a model on the meta device.
        validation, tasks: see :func:`~cm3leon.training.trainer.fit`.
        resume_from: resume from another run, or from one of its checkpoints, in :data:`~cm3leon.config.paths.CHECKPOINTS`.
        accept_changes: although it differs. What does is printed, and kept with the checkpoints, in the run's tags and in
            ``paths.resumed_file(stage)``.

    Returns:
        The last validation losses.
    """
    checkpoints = Checkpoints(paths.CHECKPOINTS / stage, identity, section.keep_checkpoints, processes, adopting=True)
    refuse_too_large(
        stage,
        processes.device,
        lambda: estimate_memory(model, section, processes.size).total,
        lambda usable: f"lower {stage}.micro_batch_size, or set {stage}.activation_checkpointing=true; cm3leon plan says what fits",
    )
    state = setup(model, section, processes, weights)
    if resume_from is not None:
        allocate_states(state.optimizers)
        checkpoints.adopt(resume_from, accept_changes, state.tensors())
    if processes.rank == 0:
        _record_resumptions(stage, checkpoints.record.resumed, run)
    metrics = fit(
        state,
        stream,
        section,
        validation,
        stage,
        lambda metrics, step: run.log_metrics({f"{stage}/{name}": value for name, value in metrics.items()}, step),
        after_validation,
        checkpoints,
        tasks,
    )
    # Gathering shards takes all processes; only the first one keeps and writes them.
    tensors = {}
    for name, parameter in model.named_parameters():
        whole = full_tensor(parameter).detach()
        if processes.rank == 0:
            tensors[name] = whole.cpu()
    if processes.rank == 0:
        model.save(output, tensors)
        curve = "".join(f"{step},{loss!r}\n" for step, loss in enumerate(state.losses, 1))
        (output / "losses.csv").write_text("step,loss\n" + curve)
    processes.wait()
    checkpoints.finish()
    return metrics


def _record_resumptions(stage: str, resumed: Sequence[Resumption], run: Run) -> None:
    file = paths.resumed_file(stage)
    file.unlink(missing_ok=True)
    if resumed:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(resumed, indent=2) + "\n")
        run.set_tags({"resumed_from": resumed[-1]["checkpoint"], "resumed_differences": json.dumps(resumed)})
