"""Texts that fit in the model's context: whether they do, and as much of a text as does."""

from __future__ import annotations

import numpy as np

from cm3leon.generation.checks import free_tokens
from cm3leon.generation.image_requests import guidance_streams, query_segments
from cm3leon.generation.parts import Parts
from cm3leon.generation.prompts import answer_prompt, image_prompt
from cm3leon.sequence.tasks import TASKS, Fields


def fits(parts: Parts, task: str, values: Fields) -> bool:
    """True if a task's texts and images fit in the context with the image to generate, or with at least one token of an answer.

    Args:
        values: texts of the fields of the task's template (``cm3leon.sequence.tasks``).
    """
    blank = _blank_image(parts)
    if TASKS[task].generates_image:
        streams = guidance_streams(parts, task, query_segments(parts, task, values, {"source": blank, "condition": blank}))
        return free_tokens(parts.model, streams) >= parts.model.vocabulary.tokens_per_image
    prompt = answer_prompt(TASKS[task].templates[0], values, blank, parts.model.vocabulary, parts.text_tokenizer)
    return free_tokens(parts.model, [prompt]) >= 1


def shorten_prompt(parts: Parts, prompt: str) -> str:
    """As much of a prompt's beginning as fits in the context with the image to generate; a prompt that fits stays as it is."""
    vocabulary = parts.model.vocabulary
    masked = image_prompt([("text", np.zeros(0, dtype=np.int64))], [], vocabulary, {0})
    # The mask takes the place of one token of the prompt.
    return _cut(parts, prompt, free_tokens(parts.model, [masked]) + 1 - vocabulary.tokens_per_image)


def shorten_question(parts: Parts, question: str) -> str:
    """As :func:`shorten_prompt`, for a question about an image; leaves room for ``max_text_tokens``, or half of what there is."""
    template, blank = TASKS["vqa"].templates[0], _blank_image(parts)
    empty = answer_prompt(template, {"question": ""}, blank, parts.model.vocabulary, parts.text_tokenizer)
    free = free_tokens(parts.model, [empty])
    return _cut(parts, question, free - min(parts.decoding.max_text_tokens, free // 2))


def _blank_image(parts: Parts) -> np.ndarray:
    return np.zeros(parts.model.vocabulary.tokens_per_image, dtype=np.int64)


def _cut(parts: Parts, text: str, length: int) -> str:
    """The longest beginning of a text that has at most ``length`` tokens, but at least one."""
    tokenizer, length = parts.text_tokenizer, max(1, length)
    ids = tokenizer.encode(text)
    cut, keep = text, length
    # A beginning can have more tokens than it was cut to when it is tokenized again.
    while len(tokenizer.encode(cut)) > length and keep > 0:
        cut = tokenizer.decode(ids[:keep]).rstrip("\ufffd ")  # the cut may fall inside a character
        keep -= 1
    return cut
