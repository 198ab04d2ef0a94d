"""Stage ``pretrain``: CM3 pretraining of the decoder on documents with their neighbours before them."""

from __future__ import annotations

import torch

from cm3leon import paths, tracking
from cm3leon.config import Config, ModelConfig, PretrainConfig
from cm3leon.data.sequences import BatchStream, PretrainingSamples, read_neighbours
from cm3leon.data.tokens import TokenStore
from cm3leon.documents import Vocabulary
from cm3leon.model import Decoder, DecoderSpec
from cm3leon.stages.common import device
from cm3leon.stages.samples import sample_sheets
from cm3leon.tokenizers.image import ImageTokenizer
from cm3leon.tokenizers.text import TextTokenizer
from cm3leon.training.trainer import fit, setup


def build_vocabulary(config: ModelConfig) -> Vocabulary:
    """The token ids that the two tokenizers and the number of sentinels make."""
    spec = ImageTokenizer.load(paths.IMAGE_TOKENIZER).spec
    return Vocabulary(
        text_size=TextTokenizer.load(paths.TEXT_TOKENIZER).size,
        image_size=spec.codebook_size,
        sentinels=config.sentinels,
        tokens_per_image=spec.tokens_per_image,
    )


def build_decoder(config: ModelConfig, seed: int) -> Decoder:
    """A fresh decoder over the tokenizers' vocabulary."""
    torch.manual_seed(seed)
    model = Decoder(DecoderSpec(**config.model_dump(exclude={"sentinels", "codebook_std"})), build_vocabulary(config))
    if config.codebook_std:
        model.start_from_codebook(ImageTokenizer.load(paths.IMAGE_TOKENIZER).codebook.entries, config.codebook_std)
    return model


def training_samples(store: TokenStore, model: Decoder, section: PretrainConfig, seed: int) -> PretrainingSamples:
    """Samples of the documents of ``store``; their neighbours are documents of the train split."""
    train, neighbours = TokenStore(paths.TOKENS, ["train"]), read_neighbours(paths.NEIGHBOURS)
    return PretrainingSamples(store, train, neighbours, model.vocabulary, section.objective, section.documents, section.model.context, seed)


def run(config: Config) -> dict[str, float]:
    """Writes ``models/pretrained/``; returns validation losses and the number of parameters."""
    section = config.pretrain
    model = build_decoder(section.model, config.seed).to(device())
    train, held_out = TokenStore(paths.TOKENS, ["train"]), TokenStore(paths.TOKENS, ["val"])
    stream = BatchStream(training_samples(train, model, section, config.seed), len(train), section.batch_size, config.seed)
    held_out_samples = training_samples(held_out, model, section, config.seed)
    held_out_stream = BatchStream(held_out_samples, len(held_out), section.batch_size, config.seed)
    validation = [held_out_stream(step) for step in range(max(1, section.validation_documents // section.batch_size))]
    with tracking.stage_run("pretrain", config) as run:
        figures = fit(
            setup(model, section),
            stream,
            section,
            validation,
            "pretrain",
            lambda values, step: run.log_metrics({f"pretrain/{k}": v for k, v in values.items()}, step),
            sample_sheets(run, model, held_out),
        )
        model.save(paths.PRETRAINED)
    return {**figures, "parameters": float(model.parameter_count)}
