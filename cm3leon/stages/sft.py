"""Stage ``sft``: instruction tuning of the pretrained decoder on a mix of tasks."""

from __future__ import annotations

from pathlib import Path

from cm3leon.config import paths
from cm3leon.config.schema import Config
from cm3leon.data.tokens import TokenStore
from cm3leon.models.decoder import Decoder, stored_weights
from cm3leon.sequence.tasks import TASKS
from cm3leon.tracking import runs
from cm3leon.training.fingerprint import common_fingerprint
from cm3leon.training.instruction_tuning import task_samples, training_of, validation_batches
from cm3leon.training.run import make_stream, train
from cm3leon.training.sample_sheets import sample_sheets
from cm3leon.utils.world import world


def run(config: Config, resume_from: Path | None = None, *, accept_changes: bool = False) -> dict[str, float]:
    """Write ``models/finetuned/``; returns the validation losses of the mix and of each task, and each task's number of documents."""
    section = config.sft
    with world() as processes, runs.stage_run("sft", config) as run:
        model = Decoder.load(paths.PRETRAINED, "meta")
        held_out = TokenStore(paths.TOKENS, ["val"])
        samples = task_samples("train", TokenStore(paths.TOKENS, ["train"]), model, section, config.seed)
        validation = validation_batches(task_samples("val", held_out, model, section, config.seed), section, config.seed)
        counts = {f"documents_{name}": float(count) for name, count in samples.counts.items()}
        run.log_metrics({f"sft/{name}": count for name, count in counts.items()})
        run.log_metrics({f"sft/share_{name}": share for name, share in samples.shares.items()})
        inputs = [paths.TOKENS, paths.NEIGHBORS, paths.PRETRAINED, paths.VALIDATED / "manifest.parquet"]
        metrics = train(
            "sft",
            model,
            make_stream(samples, len(samples), section, config.seed, model.spec.context),
            section,
            validation,
            paths.FINETUNED,
            run,
            processes,
            sample_sheets(run, model, held_out, processes.device),
            common_fingerprint(config, "sft", inputs, processes),
            list(TASKS),
            weights=stored_weights(paths.PRETRAINED),
            resume_from=resume_from,
            accept_changes=accept_changes,
        )
        if processes.rank == 0:
            training_of(samples.counts, section, config.pretrain.objective).write(paths.FINETUNED)
    # Each task's loss by modality is in MLflow; the printed line keeps one loss a task.
    by_modality = tuple(f"{name}_loss_{modality}" for name in validation if name for modality in ("text", "image"))
    return {**{name: loss for name, loss in metrics.items() if not name.endswith(by_modality)}, **counts}
