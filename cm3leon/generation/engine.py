"""Prefill and cached decoding: many prompts of different lengths at once, each with several continuations.

A prompt is read once for all its continuations, and the retrieved documents that streams of guidance have in common once for all of
these. A continuation depends on its prompt and its seed, not on what else is in the batch. Shapes: S streams of guidance, P prompts,
C continuations of each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cm3leon.generation.cache import decoding_cache, padded, read_prompts
from cm3leon.generation.sampling import Sampler, at_temperature, keep_top_p, sample, uniform_noise
from cm3leon.models.cross_entropy import chunked_cross_entropy
from cm3leon.models.decoder import Decoder
from cm3leon.sequence.grammar import EOSS, PAD, Prompt
from cm3leon.utils.errors import UserError


class PromptTooLongError(UserError):
    """A prompt and what is to be generated do not fit in the model's context."""


def check_fits(model: Decoder, prompts: Sequence[Prompt], room: int) -> None:
    """Raises:
    PromptTooLongError: if the longest of the prompts leaves less than ``room`` tokens of the context.
    """
    longest = max(len(prompt) for prompt in prompts)
    if longest + room > model.spec.context:
        raise PromptTooLongError(
            f"a prompt of {longest} tokens and {room} to generate do not fit in the context of {model.spec.context}; "
            "shorten the prompt or use fewer retrieved documents"
        )


def common_beginning(streams: Sequence[Prompt]) -> int:
    """How many tokens prompts begin with in common, so that each has at least one of its own."""
    shortest = min(len(stream) for stream in streams) - 1
    rows = np.stack([stream.tokens[:shortest] for stream in streams])
    differs = np.flatnonzero((rows != rows[0]).any(0))
    return int(differs[0]) if len(differs) else shortest


@torch.inference_mode()
def generate_images(
    model: Decoder,
    streams: Sequence[Sequence[Prompt]],
    seeds: Sequence[Sequence[int]],
    sampler: Sampler,
    span: tuple[int, int] | None = None,
    known: np.ndarray | None = None,
) -> np.ndarray:
    """Draw images for each prompt; codes (P, C, tokens_per_image), or those of ``span``.

    Args:
        streams: of each prompt, what its streams of guidance read (see :class:`Sampler`), all ending where the image, or the span, begins.
        seeds: of each prompt's candidates, of which all have the same number.
        span: which codes of the image to draw; by default all.
        known: (P, length of the span), codes that are given, -1 where one is to be drawn.

    Raises:
        PromptTooLongError: if a prompt and what is drawn do not fit in the context.
    """
    vocabulary = model.vocabulary
    start, stop = vocabulary.image_start, vocabulary.text_start
    first, last = span or (0, vocabulary.tokens_per_image)
    steps = last - first
    count, prompts, candidates = len(streams[0]), len(streams), len(seeds[0])
    read = [own[number] for number in range(count) for own in streams]
    check_fits(model, read, steps)
    prompt_cache, hidden_GD = read_prompts(model, read, [common_beginning(own) for own in streams] * count)
    cache = decoding_cache(model, prompt_cache, candidates, steps)
    hidden_RD = hidden_GD.repeat_interleave(candidates, 0)
    noise = uniform_noise([seed for own in seeds for seed in own], steps).view(prompts, candidates, steps).to(model.device)
    codes = torch.empty(prompts, candidates, steps, dtype=torch.int64, device=model.device)
    given = None if known is None else torch.from_numpy(known).to(model.device)
    for step in range(steps):
        logits_RV = model.logits(hidden_RD, start, stop).float()
        found = sampler.probabilities(logits_RV.view(count, prompts, candidates, -1), step / max(1, steps - 1))
        drawn = sample(found, noise[..., step])
        codes[..., step] = drawn if given is None else torch.where(given[:, step, None] < 0, drawn, given[:, step, None])
        if step + 1 < steps:
            chosen_R = (codes[..., step].flatten() + start).repeat(count)
            hidden_RD = cache.advance(model, chosen_R, place=first + step + 1)
    return codes.cpu().numpy()


@torch.inference_mode()
def generate_texts(
    model: Decoder,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    *,
    temperature: float,
    top_p: float,
    max_tokens: int,
    ends: Sequence[int] = (EOSS,),
) -> list[tuple[list[int], int | None]]:
    """Continue each prompt with text up to one of ``ends``; text-tokenizer ids, and which of ``ends`` came, None if ``max_tokens`` did.

    Raises:
        PromptTooLongError: if a prompt and ``max_tokens`` do not fit in the context.
    """
    vocabulary = model.vocabulary
    check_fits(model, prompts, max_tokens)
    prompt_cache, hidden_RD = read_prompts(model, prompts, [0] * len(prompts))
    cache = decoding_cache(model, prompt_cache, 1, max_tokens)
    noise = uniform_noise(list(seeds), max_tokens).to(model.device)
    allowed = torch.tensor([*ends, *range(vocabulary.text_start, vocabulary.size)], device=model.device)
    weight_VD = model.tokens.weight[allowed]
    chosen = torch.full((len(prompts), max_tokens), PAD, dtype=torch.int64, device=model.device)
    open_R = torch.ones(len(prompts), dtype=torch.bool, device=model.device)
    for step in range(max_tokens):
        found = at_temperature((hidden_RD @ weight_VD.T).float(), temperature)
        picked = sample(found if top_p == 1 else keep_top_p(found, top_p), noise[:, step])
        chosen[:, step] = torch.where(open_R, allowed[picked], PAD)
        open_R = open_R & (picked >= len(ends))
        if step + 1 == max_tokens or not open_R.any():
            break
        hidden_RD = cache.advance(model, allowed[picked], place=0)
    return [_text_and_end(row, vocabulary.text_start) for row in chosen.cpu().numpy()]


def _text_and_end(row: np.ndarray, text_start: int) -> tuple[list[int], int | None]:
    others = np.flatnonzero(row < text_start)
    length = int(others[0]) if len(others) else len(row)
    end = int(row[length]) if length < len(row) and row[length] != PAD else None
    return (row[:length] - text_start).tolist(), end


@torch.inference_mode()
def log_likelihoods(model: Decoder, prompts: Sequence[Prompt], continuations: Sequence[Prompt]) -> list[np.ndarray]:
    """The log-likelihood of each token of a continuation after its prompt, nats; one array for each pair.

    Raises:
        PromptTooLongError: if a prompt and its continuation do not fit in the context.
    """
    pairs = list(zip(prompts, continuations, strict=True))
    rows = [Prompt(np.append(p.tokens, c.tokens)[:-1], np.append(p.image_positions, c.image_positions)[:-1]) for p, c in pairs]
    check_fits(model, rows, 0)
    length = max(map(len, rows))
    hidden_BTD = model(
        padded([row.tokens for row in rows], length, model.device), padded([row.image_positions for row in rows], length, model.device)
    )
    lengths = [len(continuation) for continuation in continuations]
    before = [hidden_BTD[row, len(p) - 1 : len(p) - 1 + length] for row, (p, length) in enumerate(zip(prompts, lengths, strict=True))]
    targets_N = torch.from_numpy(np.concatenate([c.tokens for c in continuations])).to(model.device)
    ones_N = torch.ones(len(targets_N), device=model.device)
    _, losses_N = chunked_cross_entropy(torch.cat(before), model.tokens.weight, targets_N, ones_N)
    return np.split(-losses_N.cpu().numpy(), np.cumsum(lengths)[:-1])
