"""Stage ``sft``: instruction tuning of the pretrained decoder on a mix of tasks."""

from __future__ import annotations

from cm3leon.config import paths
from cm3leon.config.schema import Config, ObjectiveConfig
from cm3leon.data.manifest import read_manifest
from cm3leon.data.sequences import PretrainingSamples, read_neighbors
from cm3leon.data.task_samples import TaskSamples
from cm3leon.data.tokens import CONDITION_PREFIX, TokenStore
from cm3leon.models.decoder import Decoder
from cm3leon.sequence.tasks import TASKS, Training
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.tracking import runs
from cm3leon.training.distributed import world
from cm3leon.training.run import fingerprint, first_batches, stream_of, train
from cm3leon.training.sample_sheets import sample_sheets

TASK_PART = 4
"""Each task on its own is validated on this part of the number of samples that the mix is."""

UNMASKED = ObjectiveConfig(mean_masks=0, segment_rate=0)
"""What is masked in a sample is the task's to say."""


def run(config: Config) -> dict[str, float]:
    """Writes ``models/finetuned/``; returns validation losses of the mix and the number of documents of each task."""
    section = config.sft
    with world() as processes, runs.stage_run("sft", config) as run:
        model = Decoder.load(paths.PRETRAINED, processes.device)
        documents, held_out = TokenStore(paths.TOKENS, ["train"]), TokenStore(paths.TOKENS, ["val"])
        neighbors = read_neighbors(paths.NEIGHBORS, section.neighbors)
        tokenizer = TextTokenizer.load(paths.TEXT_TOKENIZER)

        def samples(split: str, store: TokenStore) -> TaskSamples:
            drawn = PretrainingSamples(
                store, documents, neighbors, model.vocabulary, UNMASKED, section.retrieved_documents, model.spec.context, config.seed
            )
            kept = CONDITION_PREFIX + split
            conditions = TokenStore(paths.TOKENS, [kept]) if TokenStore.holds(paths.TOKENS, kept) else None
            return TaskSamples(drawn, read_manifest(paths.VALIDATED, split), tokenizer, section, conditions)

        training, held_out_samples = samples("train", documents), samples("val", held_out)
        counts = {f"documents_{name}": float(count) for name, count in training.counts.items()}
        run.log_metrics({f"sft/{name}": count for name, count in counts.items()})
        run.log_metrics({f"sft/share_{name}": share for name, share in training.shares.items()})
        validation = {"": first_batches(held_out_samples, len(held_out_samples), section, config.seed)}
        few = section.model_copy(update={"validation_samples": max(1, section.validation_samples // TASK_PART)})
        for name in held_out_samples.rows:
            alone = held_out_samples.only(name)
            validation[name] = first_batches(alone, len(alone), few, config.seed)
        figures = train(
            "sft",
            model,
            stream_of(training, len(training), section, config.seed, model.spec.context),
            section,
            validation,
            paths.FINETUNED,
            run,
            processes,
            sample_sheets(run, model, held_out),
            fingerprint(config, "sft", [paths.TOKENS, paths.NEIGHBORS, paths.PRETRAINED, paths.VALIDATED / "manifest.parquet"]),
            list(TASKS),
        )
        if processes.rank == 0:
            objective = config.pretrain.objective
            masked = section.conditioning_dropout > 0 or objective.segment_rate * objective.caption_share > 0
            Training(frozenset(training.counts), masked).write(paths.FINETUNED)
    parts = tuple(f"{name}_loss_{kind}" for name in validation if name for kind in ("text", "image"))
    return {**{name: value for name, value in figures.items() if not name.endswith(parts)}, **counts}
