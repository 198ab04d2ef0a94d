"""Inputs of pretraining: the vocabulary, a new decoder, its training samples and validation batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from cm3leon.config import paths
from cm3leon.config.schema import ModelConfig, ObjectiveConfig, PretrainConfig
from cm3leon.data.batches import Batch
from cm3leon.data.epochs import Weights, read_weights
from cm3leon.data.sequences import PretrainingSamples, read_neighbors
from cm3leon.data.tokens import TokenStore
from cm3leon.models.decoder import Decoder, DecoderSpec
from cm3leon.models.vqgan import ImageTokenizer
from cm3leon.sequence.grammar import Vocabulary
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.training.run import first_batches

SAMPLES_COUNTED = 1000
"""Samples over which :func:`mask_shares` counts."""


def build_vocabulary(config: ModelConfig) -> Vocabulary:
    """The vocabulary that the two trained tokenizers and the number of sentinels make."""
    spec = ImageTokenizer.load(paths.IMAGE_TOKENIZER).spec
    return Vocabulary(
        text_size=TextTokenizer.load(paths.TEXT_TOKENIZER).size,
        image_size=spec.codebook_size,
        sentinels=config.sentinels,
        tokens_per_image=spec.tokens_per_image,
        reserved=config.reserved,
    )


def build_decoder(config: ModelConfig, seed: int) -> Decoder:
    """A newly initialized decoder over the tokenizers' vocabulary."""
    torch.manual_seed(seed)
    model = Decoder(DecoderSpec.from_config(config), build_vocabulary(config))
    if config.codebook_std:
        model.start_from_codebook(ImageTokenizer.load(paths.IMAGE_TOKENIZER).codebook.entries, config.codebook_std)
    return model


def new_decoder(config: ModelConfig, seed: int) -> tuple[Decoder, Iterator[tuple[str, Tensor]]]:
    """:func:`build_decoder` on the meta device, and its weights one by one: no process has the whole of a sharded decoder in memory."""
    vocabulary = build_vocabulary(config)
    with torch.device("meta"):
        model = Decoder(DecoderSpec.from_config(config), vocabulary)

    def read_codebook() -> Tensor:
        return ImageTokenizer.load(paths.IMAGE_TOKENIZER).codebook.entries

    def weights() -> Iterator[tuple[str, Tensor]]:
        torch.manual_seed(seed)
        ImageTokenizer.load(paths.IMAGE_TOKENIZER)  # its constructor draws before the decoder's, as when the vocabulary is built
        yield from model.initial_weights(read_codebook if config.codebook_std else None, config.codebook_std)

    return model, weights()


def training_samples(store: TokenStore, vocabulary: Vocabulary, section: PretrainConfig, seed: int) -> PretrainingSamples:
    """Samples whose queries are the documents of ``store``; retrieved documents are always of the train split."""
    pool = TokenStore(paths.TOKENS, ["train"])
    neighbors = read_neighbors(paths.NEIGHBORS, section.neighbors)
    return PretrainingSamples(
        store, pool, neighbors, vocabulary, section.objective, section.retrieved_documents, section.model.context, seed
    )


def training_weights(store: TokenStore, seed: int) -> Weights:
    """How often each document of the train split is seen: the weights of the manifest."""
    return Weights.of_documents(store.ids, read_weights(paths.VALIDATED), seed)


def validation_batches(samples: PretrainingSamples, section: PretrainConfig) -> dict[str, list[Batch]]:
    """Three sets of validation batches by name: as in training (no name), ``alone`` and ``retrieved``.

    ``alone`` has plain causal sequences of the query only; ``retrieved`` puts the largest number of retrieved documents of
    ``section.retrieved_documents`` before it. In both only the query's tokens count in the loss, so that the difference of the two losses
    is what retrieval is worth.
    """
    batches = {"": first_batches(samples, len(samples), section, samples.seed)}
    most = max(count for count, share in enumerate(section.retrieved_documents) if share > 0)
    counts = {"alone": 0, "retrieved": most} if most else {"alone": 0}
    for name, count in counts.items():
        always_count = [0.0] * count + [1.0]
        plain = replace(samples, retrieved_shares=always_count, objective=ObjectiveConfig(mean_masks=0, segment_rate=0))
        batches[name] = first_batches(plain.query_only, len(plain), section, plain.seed)
    return batches


def mask_shares(samples: PretrainingSamples) -> dict[str, float]:
    """Shares of the samples at the start of an epoch that mask nothing (``plain``), a whole caption, a whole image, or other spans.

    Samples that mask a caption train captioning by infilling and the unconditional stream of classifier-free guidance.
    """
    rows = range(min(SAMPLES_COUNTED, len(samples)))
    counts = Counter(samples(0, row).masked.kind for row in rows)
    return {f"share_{kind}": counts[kind] / len(rows) for kind in ("plain", "caption", "image", "spans")}
