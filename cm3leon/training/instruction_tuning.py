"""Inputs of instruction tuning: the samples of the task mix and their validation batches."""

from __future__ import annotations

from collections.abc import Iterable

from cm3leon.config import paths
from cm3leon.config.schema import ObjectiveConfig, SFTConfig
from cm3leon.data.batches import Batch
from cm3leon.data.epochs import Weights, read_weights
from cm3leon.data.manifest import read_table
from cm3leon.data.rows_by_id import RowsById
from cm3leon.data.sequences import PretrainingSamples, read_neighbors
from cm3leon.data.task_samples import TaskSamples
from cm3leon.data.tokens import CONDITION_PREFIX, TokenStore
from cm3leon.models.decoder import Decoder
from cm3leon.sequence.tasks import TASK_COLUMNS, Training
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.training.run import first_batches

TASK_DIVISOR = 4
"""Each task alone is validated on ``validation_samples / TASK_DIVISOR`` samples, the mix on ``validation_samples``."""

UNMASKED = ObjectiveConfig(mean_masks=0, segment_rate=0)
"""Sequences are built without random masks: each task's template says what is masked."""


def task_samples(split: str, store: TokenStore, model: Decoder, section: SFTConfig, seed: int) -> TaskSamples:
    """Samples of the task mix over the documents of a split, those of ``train`` as often as their weights say.

    Retrieved documents are always of the train split.

    Raises:
        UserError: if no document of the split allows a task of the mix.
    """
    pretraining = PretrainingSamples(
        store,
        TokenStore(paths.TOKENS, ["train"]),
        read_neighbors(paths.NEIGHBORS, section.neighbors),
        model.vocabulary,
        UNMASKED,
        section.retrieved_documents,
        model.spec.context,
        seed,
    )
    shard = CONDITION_PREFIX + split
    conditions = TokenStore(paths.TOKENS, [shard]) if TokenStore.holds(paths.TOKENS, shard) else None
    tokenizer = TextTokenizer.load(paths.TEXT_TOKENIZER)
    records = RowsById(read_table(paths.VALIDATED, split, TASK_COLUMNS))
    weights = Weights.of_documents(store.ids, read_weights(paths.VALIDATED), seed) if split == "train" else None
    return TaskSamples(pretraining, records, tokenizer, section, conditions, weights)


def validation_batches(samples: TaskSamples, section: SFTConfig, seed: int) -> dict[str, list[Batch]]:
    """Batches of the mix (no name) and of each of its tasks alone, by the task's name."""
    batches = {"": first_batches(samples, len(samples), section, seed)}
    fewer = section.model_copy(update={"validation_samples": max(1, section.validation_samples // TASK_DIVISOR)})
    for name in samples.rows:
        alone = samples.only(name)
        batches[name] = first_batches(alone, len(alone), fewer, seed)
    return batches


def training_of(tasks: Iterable[str], section: SFTConfig, pretraining: ObjectiveConfig) -> Training:
    """What a model is trained for.

    Args:
        tasks: of the mix, those for which there are samples.
    """
    known = frozenset(tasks)
    # The unconditional streams of guidance are trained where pretraining or instruction tuning masks whole prompts.
    masked_prompts = section.conditioning_dropout > 0 or pretraining.segment_rate * pretraining.caption_share > 0
    unprompted_regions = "text_to_image" in known and section.infill_share * section.conditioning_dropout > 0
    return Training(known, masked_prompts, unprompted_regions)
