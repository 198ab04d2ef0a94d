"""Stage ``sft``: instruction tuning of the pretrained decoder on a mix of tasks."""

from __future__ import annotations

from cm3leon import paths, tracking
from cm3leon.config import Config, ObjectiveConfig
from cm3leon.data.manifest import read_manifest
from cm3leon.data.sequences import BatchStream, PretrainingSamples, read_neighbours
from cm3leon.data.task_samples import TaskSamples
from cm3leon.data.tokens import TokenStore
from cm3leon.model import Decoder
from cm3leon.stages.common import device
from cm3leon.stages.samples import sample_sheets
from cm3leon.tokenizers.text import TextTokenizer
from cm3leon.training.trainer import fit, setup

UNMASKED = ObjectiveConfig(mean_masks=0, segment_rate=0)
"""What is masked in a sample is the task's to say."""


def run(config: Config) -> dict[str, float]:
    """Writes ``models/finetuned/``; returns validation losses of the mix and the number of documents of each task."""
    section = config.sft
    model = Decoder.load(paths.PRETRAINED, device())
    train, neighbours = TokenStore(paths.TOKENS, ["train"]), read_neighbours(paths.NEIGHBOURS)
    tokenizer = TextTokenizer.load(paths.TEXT_TOKENIZER)

    def samples(split: str, store: TokenStore) -> TaskSamples:
        documents = PretrainingSamples(
            store, train, neighbours, model.vocabulary, UNMASKED, section.documents, model.spec.context, config.seed
        )
        return TaskSamples(documents, read_manifest(paths.VALIDATED, split), tokenizer, section)

    held_out = TokenStore(paths.TOKENS, ["val"])
    training, held_out_samples = samples("train", train), samples("val", held_out)
    stream = BatchStream(training, len(training), section.batch_size, config.seed)
    held_out_stream = BatchStream(held_out_samples, len(held_out_samples), section.batch_size, config.seed)
    validation = [held_out_stream(step) for step in range(max(1, section.validation_documents // section.batch_size))]
    with tracking.stage_run("sft", config) as run:
        counts = {f"documents_{name}": float(count) for name, count in training.counts().items()}
        run.log_metrics({f"sft/{name}": count for name, count in counts.items()})
        figures = fit(
            setup(model, section),
            stream,
            section,
            validation,
            "sft",
            lambda values, step: run.log_metrics({f"sft/{k}": v for k, v in values.items()}, step),
            sample_sheets(run, model, held_out),
        )
        model.save(paths.FINETUNED)
    return {**figures, **counts}
