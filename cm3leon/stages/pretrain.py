"""Stage ``pretrain``: CM3 pretraining of the decoder on documents with their neighbors before them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch

from cm3leon.config import paths
from cm3leon.config.schema import Config, ModelConfig, ObjectiveConfig, PretrainConfig
from cm3leon.data.batches import Batch
from cm3leon.data.sequences import PretrainingSamples, read_neighbors
from cm3leon.data.tokens import TokenStore
from cm3leon.models.decoder import Decoder, DecoderSpec
from cm3leon.models.vqgan import ImageTokenizer
from cm3leon.sequence.grammar import Vocabulary
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.tracking import runs
from cm3leon.training.distributed import world
from cm3leon.training.run import fingerprint, first_batches, stream_of, train
from cm3leon.training.sample_sheets import sample_sheets

DRAWS_COUNTED = 1000
"""Samples from which the shares of what is masked are told."""


def build_vocabulary(config: ModelConfig) -> Vocabulary:
    """The token ids that the two tokenizers and the number of sentinels make."""
    spec = ImageTokenizer.load(paths.IMAGE_TOKENIZER).spec
    return Vocabulary(
        text_size=TextTokenizer.load(paths.TEXT_TOKENIZER).size,
        image_size=spec.codebook_size,
        sentinels=config.sentinels,
        tokens_per_image=spec.tokens_per_image,
        reserved=config.reserved,
    )


def build_decoder(config: ModelConfig, seed: int) -> Decoder:
    """A fresh decoder over the tokenizers' vocabulary."""
    torch.manual_seed(seed)
    model = Decoder(DecoderSpec.from_config(config), build_vocabulary(config))
    if config.codebook_std:
        model.start_from_codebook(ImageTokenizer.load(paths.IMAGE_TOKENIZER).codebook.entries, config.codebook_std)
    return model


def training_samples(store: TokenStore, vocabulary: Vocabulary, section: PretrainConfig, seed: int) -> PretrainingSamples:
    """Samples of the documents of ``store``; their neighbors are documents of the train split."""
    pool = TokenStore(paths.TOKENS, ["train"])
    neighbors = read_neighbors(paths.NEIGHBORS, section.neighbors)
    return PretrainingSamples(
        store, pool, neighbors, vocabulary, section.objective, section.retrieved_documents, section.model.context, seed
    )


def validation_batches(drawn: PretrainingSamples, section: PretrainConfig) -> dict[str, list[Batch]]:
    """Batches to validate on: ``drawn`` as in training; and the plain query alone, and behind as many retrieved documents as there may be.

    Of the last two only the query's tokens count, so that their difference is what retrieval is worth.
    """
    batches = {"": first_batches(drawn, len(drawn), section, drawn.seed)}
    most = max(count for count, share in enumerate(section.retrieved_documents) if share > 0)
    for name, count in (("alone", 0), *([("retrieved", most)] if most else [])):
        shares = [0.0] * count + [1.0]
        samples = replace(drawn, retrieved_shares=shares, objective=ObjectiveConfig(mean_masks=0, segment_rate=0))
        batches[name] = first_batches(samples.query_only, len(samples), section, samples.seed)
    return batches


def mask_shares(samples: PretrainingSamples) -> dict[str, float]:
    """Of the first samples of an epoch, the share that masks nothing, the caption, the image, and other spans.

    ``caption`` is what trains captioning by infilling and the mask-conditioned stream of guidance.
    """
    rows = range(min(DRAWS_COUNTED, len(samples)))
    counts = Counter(samples(0, row).masked.kind for row in rows)
    return {f"share_{kind}": counts[kind] / len(rows) for kind in ("plain", "caption", "image", "spans")}


def run(config: Config) -> dict[str, float]:
    """Writes ``models/pretrained/``; returns validation losses, what was masked, and the number of parameters."""
    section = config.pretrain
    with world() as processes, runs.stage_run("pretrain", config) as run:
        model = build_decoder(section.model, config.seed).to(processes.device)
        documents, held_out = TokenStore(paths.TOKENS, ["train"]), TokenStore(paths.TOKENS, ["val"])
        samples = training_samples(documents, model.vocabulary, section, config.seed)
        shares = mask_shares(samples)
        run.log_metrics({f"pretrain/{name}": share for name, share in shares.items()})
        parameters = float(model.parameter_count)
        figures = train(
            "pretrain",
            model,
            stream_of(samples, len(documents), section, config.seed, section.model.context),
            section,
            validation_batches(replace(samples, store=held_out), section),
            paths.PRETRAINED,
            run,
            processes,
            sample_sheets(run, model, held_out),
            fingerprint(config, "pretrain", [paths.TOKENS, paths.NEIGHBORS, paths.IMAGE_TOKENIZER]),
        )
    return {**figures, **shares, "parameters": parameters}
