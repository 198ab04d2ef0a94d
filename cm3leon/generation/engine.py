"""Prefill and cached decoding: many prompts of different lengths at once, each with several candidates.

A prompt is prefilled once for all its candidates, and the retrieved documents that its streams of guidance share once for all of these. A
candidate depends on its prompt and its seed, not on what else is in the batch.

Images are decoded by Jacobi iteration: a pass reads several guessed codes at once and keeps those that turn out right (Teng et al. 2024,
arXiv 2410.01699). With the noise of every code fixed by the seed, this gives the codes that decoding one by one would.

Shapes: S streams of guidance, P prompts, C candidates of each, G = S * P prefilled sequences, R = G * C decoded rows, B sequences, T tokens
that a pass reads, E tokens of an image or of a region's continuation, N tokens of all continuations, V tokens that can be sampled, D width.
Rows are ordered stream, prompt, candidate.
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
from cm3leon.sequence.grammar import EOSS, PAD, UNKNOWN, Prompt

MAX_ROWS = 128
"""Most sequences that callers decode or score together."""

MAX_WINDOW = 8
"""Most tokens of a row that a pass reads; at 350M more cost what they save."""

MAX_PASS_TOKENS, MAX_PASS_TOKENS_NARROW, MIN_WIDE = 48, 64, 512
"""Most tokens of all rows that a pass with guesses reads, in decoders from the width :data:`MIN_WIDE` on, and in narrower ones.

Up to about so many a pass costs less than those that it saves (``benchmarks/jacobi.py``, on two CPU cores): it takes the time to read the
weights, or to launch the operations. Beyond, each wrong guess costs its share.
"""

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
    continuation: Prompt | None = None,
) -> np.ndarray:
    """Generate images for each prompt; codes (P, C, tokens_per_image), or those that a continuation lacks, in its order.

    Args:
        streams: for each prompt its streams of guidance (see :class:`Sampler`), all ending where the image, or the continuation, begins.
        seeds: for each prompt its candidates' seeds, of which all have the same number.
        continuation: (E,), what follows each prompt, with codes that are :data:`~cm3leon.sequence.grammar.UNKNOWN`, the first among them;
            by default a whole image of such codes.

    Raises:
        PromptTooLongError: if a prompt and what is generated do not fit in the context.
    """
    vocabulary = model.vocabulary
    image = np.arange(vocabulary.tokens_per_image)
    continuation = continuation or Prompt(np.full_like(image, UNKNOWN), image + 1)
    steps = len(continuation)
    count, prompts, candidates = len(streams[0]), len(streams), len(seeds[0])
    # 1. Prefill: the streams of all prompts, stream by stream. All candidates of a stream begin with the same hidden state.
    sequences = [own[number] for number in range(count) for own in streams]
    check_room(model, sequences, steps)
    prompt_cache, hidden_GD = read_prompts(model, sequences, [shared_prefix(own) for own in streams] * count)
    hidden_RTD = hidden_GD.repeat_interleave(candidates, 0)[:, None]
    # 2. Room for each candidate's tokens, of which the last is not read.
    cache = decoding_cache(model, prompt_cache, candidates, steps - 1)
    window = 1 if _is_sharded(model) else window_length(model.spec.width, len(sequences) * candidates, steps - 1)
    # 3. All noise before the loop. With the noise of each code fixed, what is sampled depends on the tokens before it alone.
    noise_PCE = uniform_noise([seed for own in seeds for seed in own], steps).view(prompts, candidates, steps).to(model.device)
    tokens_E = torch.from_numpy(continuation.tokens).to(model.device)
    image_positions_E = torch.from_numpy(continuation.image_positions).to(model.device)
    unknown_E, tokens_PCE = tokens_E == UNKNOWN, tokens_E.repeat(prompts, candidates, 1)
    indices_E = torch.arange(steps, device=model.device)
    lengths_PC = torch.zeros(prompts, candidates, dtype=torch.int64, device=model.device)
    targets_PCT = lengths_PC[..., None]  # which tokens the last pass predicts; the prompt predicts the first
    while True:
        # 4. Logits over image tokens alone, combined over the streams into one distribution for each code.
        logits_RTV = model.logits(hidden_RTD, vocabulary.image_start, vocabulary.text_start).float()
        logits_SPCTV = logits_RTV.view(count, prompts, candidates, *logits_RTV.shape[1:])
        probabilities_PCTV = sampler.probabilities(logits_SPCTV, targets_PCT / max(1, steps - 1))
        # 5. Sample the codes that are not settled. A code is right if it was sampled after right codes: the first of these is, and each
        #    next one as long as those before it are what was guessed and read.
        guesses_PCT = tokens_PCE.gather(-1, targets_PCT)
        open_PCT = (targets_PCT >= lengths_PC[..., None]) & unknown_E[targets_PCT]
        sampled_PCT = sample(probabilities_PCTV, noise_PCE.gather(-1, targets_PCT)) + vocabulary.image_start
        found_PCT = torch.where(open_PCT, sampled_PCT, guesses_PCT)
        tokens_PCE.scatter_(-1, targets_PCT, found_PCT)
        agreeing_PC = (found_PCT == guesses_PCT).long().cumprod(-1).sum(-1)
        lengths_PC = targets_PCT[..., 0] + (agreeing_PC + 1).clamp(max=targets_PCT.shape[-1])
        if int(lengths_PC.min()) == steps:
            return (tokens_PCE[..., unknown_E] - vocabulary.image_start).cpu().numpy()
        # 6. Codes that no pass has predicted are guessed to be like the last one that was: images have areas of one color.
        last_PC1 = found_PCT[..., -1:]
        later_PCE = unknown_E & (indices_E > targets_PCT[..., -1:]) & (last_PC1 >= vocabulary.image_start)
        tokens_PCE = torch.where(later_PCE, last_PC1, tokens_PCE)
        # 7. Every stream of a candidate reads its last right token and the guesses after it; near the end, more right ones before it.
        starts_PC = (lengths_PC - 1).clamp(max=steps - 1 - window)
        read_PCT = starts_PC[..., None] + indices_E[:window]
        tokens_RT = tokens_PCE.gather(-1, read_PCT).flatten(0, 1).repeat(count, 1)
        image_positions_RT = image_positions_E[read_PCT].flatten(0, 1).repeat(count, 1)
        hidden_RTD = cache.advance(model, tokens_RT, image_positions_RT, starts_PC.flatten().repeat(count))
        targets_PCT = read_PCT + 1


def _is_sharded(model: Decoder) -> bool:
    """Whether processes hold a model together (FSDP): a pass is then one for all of them, whatever is guessed."""
    return hasattr(model, "unshard")


def window_length(width: int, rows: int, steps: int) -> int:
    """How many tokens of each row a pass of Jacobi decoding reads, of ``steps`` in all, in a decoder of this width."""
    most = MAX_PASS_TOKENS if width >= MIN_WIDE else MAX_PASS_TOKENS_NARROW
    return max(1, min(MAX_WINDOW, most // rows, steps))


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
        tokens_R1 = allowed_V[picked_R][:, None]
        hidden_RD = cache.advance(model, tokens_R1, torch.zeros_like(tokens_R1), torch.full_like(picked_R, step))[:, 0]
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
