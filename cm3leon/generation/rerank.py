"""Ranking candidates: by the CLIP encoder, and by how likely the decoder itself finds the prompt as the image's caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cm3leon.documents import EOSS, Prompt
from cm3leon.generation.engine import log_likelihoods
from cm3leon.generation.prompts import answer_prompt
from cm3leon.generation.results import GeneratedImage
from cm3leon.model import Decoder
from cm3leon.tasks import TASKS
from cm3leon.tokenizers.text import TextTokenizer

if TYPE_CHECKING:
    from cm3leon.retrieval.encoder import Encoder

ROWS = 128
"""Sequences scored together."""


def rank(
    drawn: Sequence[list[GeneratedImage]], encoder: Encoder, model: Decoder, tokenizer: TextTokenizer, likelihood: float
) -> list[list[GeneratedImage]]:
    """Give each image its CLIP score to its prompt, all encoded together; each list sorted, best first.

    Args:
        likelihood: weight, beside the CLIP score, of the prompt's log-likelihood as the image's caption, nats.
    """
    flat = [image for images in drawn for image in images]
    vectors = encoder.encode_images([generated.image for generated in flat])
    prompts = list(dict.fromkeys(generated.prompt for generated in flat))
    texts = dict(zip(prompts, encoder.encode_texts(prompts), strict=True))
    for generated, vector in zip(flat, vectors, strict=True):
        generated.score = float(vector @ texts[generated.prompt])
    codes = [generated.codes for generated in flat]
    said = caption_log_likelihoods(model, tokenizer, codes, [generated.prompt for generated in flat]) if likelihood else np.zeros(len(flat))
    keys = {id(generated): -(generated.score or 0.0) - likelihood * value for generated, value in zip(flat, said, strict=True)}
    return [sorted(images, key=lambda generated: keys[id(generated)]) for images in drawn]


def caption_log_likelihoods(model: Decoder, tokenizer: TextTokenizer, codes: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
    """How likely the model is to caption each image with its text and to end it there, nats; of a text too long, of its beginning."""
    template, vocabulary = TASKS["caption"].templates[0], model.vocabulary
    found: list[float] = []
    for start in range(0, len(codes), ROWS):
        prompts = [answer_prompt(template, {}, row, vocabulary, tokenizer) for row in codes[start : start + ROWS]]
        room = model.spec.context - len(prompts[0])
        answers = [np.append(vocabulary.text(tokenizer.encode(text)[:room]), EOSS) for text in texts[start : start + ROWS]]
        scores = log_likelihoods(model, prompts, [Prompt(ids, np.zeros_like(ids)) for ids in answers])
        found += [float(score.sum()) for score in scores]
    return np.array(found)
