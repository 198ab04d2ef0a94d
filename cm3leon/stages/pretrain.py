"""Stage ``pretrain``: CM3 pretraining of the decoder on documents, each preceded by its retrieved documents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cm3leon.config import paths
from cm3leon.config.schema import Config
from cm3leon.data.tokens import TokenStore
from cm3leon.tracking import runs
from cm3leon.training.fingerprint import common_fingerprint
from cm3leon.training.pretraining import mask_shares, new_decoder, training_samples, training_weights, validation_batches
from cm3leon.training.run import make_stream, train
from cm3leon.training.sample_sheets import sample_sheets
from cm3leon.utils.world import world


def run(config: Config, resume_from: Path | None = None, *, accept_changes: bool = False) -> dict[str, float]:
    """Write ``models/pretrained/``; returns the validation losses, the shares of samples by what is masked, and the parameter count."""
    section = config.pretrain
    with world() as processes, runs.stage_run("pretrain", config) as run:
        model, weights = new_decoder(section.model, config.seed)
        documents, held_out = TokenStore(paths.TOKENS, ["train"]), TokenStore(paths.TOKENS, ["val"])
        samples = training_samples(documents, model.vocabulary, section, config.seed)
        shares = mask_shares(samples)
        run.log_metrics({f"pretrain/{name}": share for name, share in shares.items()})
        parameters = float(model.parameter_count)
        inputs = [paths.TOKENS, paths.NEIGHBORS, paths.IMAGE_TOKENIZER, paths.VALIDATED / "manifest.parquet"]
        metrics = train(
            "pretrain",
            model,
            make_stream(samples, len(documents), section, config.seed, section.model.context, training_weights(documents, config.seed)),
            section,
            validation_batches(replace(samples, store=held_out), section),
            paths.PRETRAINED,
            run,
            processes,
            sample_sheets(run, model, held_out, processes.device),
            common_fingerprint(config, "pretrain", inputs, processes),
            weights=weights,
            resume_from=resume_from,
            accept_changes=accept_changes,
        )
    return {**metrics, **shares, "parameters": parameters}
