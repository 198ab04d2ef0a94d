"""Prefill and cached decoding: many prompts of different lengths at once, each with several candidates.

A prompt is prefilled once for all its candidates, and the retrieved documents that its streams of guidance share once for all of these. A
candidate depends on its prompt and its seed, not on what else is in the batch.

Shapes: S streams of guidance, P prompts, C candidates of each, G = S * P prefilled sequences, R = G * C decoded rows, B sequences, T
tokens, N tokens of all continuations, V tokens that can be sampled, D width. Rows are ordered stream, prompt, candidate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cm3leon.generation.cache import decoding_cache, padded, read_prompts
from cm3leon.generation.checks import check_room
from cm3leon.generation.sampling import Sampler, at_temperature, keep_top_p, sample, uniform_noise
from cm3leon.models.cross_entropy import chunked_cross_entropy
from cm3leon.models.decoder import Decoder
from cm3leon.sequence.grammar import EOSS, PAD, Prompt

MAX_ROWS = 128
"""Most sequences that callers decode or score together."""

Continuation = tuple[list[int], int | None]
"""Text-tokenizer ids, and the token that ended them; None if the greatest length did."""


def shared_prefix(streams: Sequence[Prompt]) -> int:
    """The number of first tokens that prompts share, at most so many that each has at least one of its own."""
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
    """Generate images for each prompt; codes (P, C, tokens_per_image), or those of ``span``.

    Args:
        streams: for each prompt its streams of guidance (see :class:`Sampler`), all ending where the image, or the span, begins.
        seeds: for each prompt its candidates' seeds, of which all have the same number.
        span: which codes of the image to generate; by default all.
        known: (P, length of the span), codes that are given, -1 where one is to be generated.

    Raises:
        PromptTooLongError: if a prompt and what is generated do not fit in the context.
    """
    vocabulary = model.vocabulary
    start, stop = vocabulary.image_start, vocabulary.text_start
    first, last = span or (0, vocabulary.tokens_per_image)
    steps = last - first
    count, prompts, candidates = len(streams[0]), len(streams), len(seeds[0])
    # 1. Prefill: the streams of all prompts, stream by stream.
    sequences = [own[number] for number in range(count) for own in streams]
    check_room(model, sequences, steps)
    prompt_cache, hidden_GD = read_prompts(model, sequences, [shared_prefix(own) for own in streams] * count)
    # 2. Room for each candidate's codes. All candidates of a stream begin with the same hidden state.
    cache = decoding_cache(model, prompt_cache, candidates, steps)
    hidden_RD = hidden_GD.repeat_interleave(candidates, 0)
    # 3. All noise before the loop, on the device: nothing in the loop waits for the CPU.
    noise = uniform_noise([seed for own in seeds for seed in own], steps).view(prompts, candidates, steps).to(model.device)
    codes = torch.empty(prompts, candidates, steps, dtype=torch.int64, device=model.device)
    given = None if known is None else torch.from_numpy(known).to(model.device)
    for step in range(steps):
        # 4. Logits over image tokens alone, combined over the streams into one distribution for each candidate.
        logits_RV = model.logits(hidden_RD, start, stop).float()
        probabilities_PCV = sampler.probabilities(logits_RV.view(count, prompts, candidates, -1), step / max(1, steps - 1))
        # 5. Sample a code; one that is given replaces it.
        sampled = sample(probabilities_PCV, noise[..., step])
        codes[..., step] = sampled if given is None else torch.where(given[:, step, None] < 0, sampled, given[:, step, None])
        # 6. Every stream of a candidate reads its code.
        if step + 1 < steps:
            chosen_R = (codes[..., step].flatten() + start).repeat(count)
            hidden_RD = cache.advance(model, chosen_R, image_position=first + step + 1)
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
) -> list[Continuation]:
    """Continue each prompt with text up to one of ``ends``, or by ``max_tokens``.

    Raises:
        PromptTooLongError: if a prompt and ``max_tokens`` do not fit in the context.
    """
    vocabulary = model.vocabulary
    # 1. Prefill. Prompts of texts hold different images, so that no prefix is worth sharing.
    check_room(model, prompts, max_tokens)
    prompt_cache, hidden_RD = read_prompts(model, prompts, [0] * len(prompts))
    cache = decoding_cache(model, prompt_cache, 1, max_tokens)
    noise = uniform_noise(list(seeds), max_tokens).to(model.device)
    # 2. Text tokens and ends alone can be sampled; the ends come first, so that an index below len(ends) is one.
    allowed_V = torch.tensor([*ends, *range(vocabulary.text_start, vocabulary.size)], device=model.device)
    weight_VD = model.tokens.weight[allowed_V]
    chosen = torch.full((len(prompts), max_tokens), PAD, dtype=torch.int64, device=model.device)
    open_R = torch.ones(len(prompts), dtype=torch.bool, device=model.device)
    for step in range(max_tokens):
        # 3. Sample a token of each row; rows that have ended keep padding.
        probabilities_RV = at_temperature((hidden_RD @ weight_VD.T).float(), temperature)
        picked_R = sample(probabilities_RV if top_p == 1 else keep_top_p(probabilities_RV, top_p), noise[:, step])
        chosen[:, step] = torch.where(open_R, allowed_V[picked_R], PAD)
        open_R = open_R & (picked_R >= len(ends))
        if step + 1 == max_tokens or not open_R.any():
            break
        # 4. All rows read their token: an ended row decodes on, and what it samples is dropped.
        hidden_RD = cache.advance(model, allowed_V[picked_R], image_position=0)
    return [_continuation(row, vocabulary.text_start) for row in chosen.cpu().numpy()]


def _continuation(row: np.ndarray, text_start: int) -> Continuation:
    """The text of a row of token ids, which an end or padding follows."""
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
    # 1. One forward pass over each prompt and its continuation, whose last token is predicted and not read.
    rows = []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        tokens = np.append(prompt.tokens, continuation.tokens)
        image_positions = np.append(prompt.image_positions, continuation.image_positions)
        rows.append(Prompt(tokens[:-1], image_positions[:-1]))
    check_room(model, rows, 0, "a prompt with what is scored")
    longest = max(map(len, rows))
    tokens_BT = padded([row.tokens for row in rows], longest, model.device)
    image_positions_BT = padded([row.image_positions for row in rows], longest, model.device)
    hidden_BTD = model(tokens_BT, image_positions_BT)
    # 2. The hidden state before each token of a continuation predicts it.
    lengths = [len(continuation) for continuation in continuations]
    hidden = [hidden_BTD[row, len(prompt) - 1 : len(prompt) - 1 + lengths[row]] for row, prompt in enumerate(prompts)]
    targets_N = torch.from_numpy(np.concatenate([continuation.tokens for continuation in continuations])).to(model.device)
    ones_N = torch.ones(len(targets_N), device=model.device)
    # 3. Cross-entropy in chunks: logits of all tokens at once would not fit in memory.
    _, losses_N = chunked_cross_entropy(torch.cat(hidden), model.tokens.weight, targets_N, ones_N)
    return np.split(-losses_N.cpu().numpy(), np.cumsum(lengths)[:-1])
