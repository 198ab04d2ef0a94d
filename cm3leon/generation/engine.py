"""Prefill and cached decoding of token sequences, many prompts of different lengths at once.

Prompts are padded on the left; pads take no part in attention and positions count from a row's own first token, so that a row's result
does not depend on its neighbours in the batch. Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cm3leon.documents import EOSS, PAD, Tokens
from cm3leon.generation.guidance import classifier_free
from cm3leon.generation.sampling import sample, top_p_probabilities, uniform_noise
from cm3leon.model import Decoder, KeyValueCache


class PromptTooLongError(ValueError):
    """A prompt and what is to be generated do not fit in the model's context."""


class Stream:
    """A batch of sequences being decoded: their cache, attention mask and positions."""

    def __init__(self, model: Decoder, prompts: Sequence[Tokens], room: int) -> None:
        longest = max(len(p) for p in prompts)
        if longest + room > model.spec.context:
            raise PromptTooLongError(
                f"a prompt of {longest} tokens and {room} to generate do not fit in the context of {model.spec.context}; "
                "shorten the prompt or use fewer retrieved documents"
            )
        tokens = np.full((len(prompts), longest), PAD, dtype=np.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = prompt
        places = np.stack([model.vocabulary.places(row) for row in tokens])
        device = model.device
        self.model = model
        self.pads_B = torch.tensor([longest - len(p) for p in prompts], device=device)
        self.cache = KeyValueCache(model.spec, len(prompts), longest + room, device, model.tokens.weight.dtype)
        columns = torch.arange(longest + room, device=device)
        self.allowed_BT = columns[None, :] >= self.pads_B[:, None]
        self.last_hidden_BD = self._prefill(torch.from_numpy(tokens).to(device), torch.from_numpy(places).to(device))

    def _prefill(self, tokens_BT: Tensor, places_BT: Tensor) -> Tensor:
        length = tokens_BT.shape[1]
        columns = torch.arange(length, device=tokens_BT.device)
        positions_BT = (columns[None, :] - self.pads_B[:, None]).clamp(min=0)
        causal_TT = columns[:, None] >= columns[None, :]
        own_TT = torch.eye(length, dtype=torch.bool, device=tokens_BT.device)
        mask = causal_TT & (self.allowed_BT[:, None, None, :length] | own_TT)
        return self.model(tokens_BT, places_BT, self.cache, positions_BT, mask)[:, -1]

    def advance(self, tokens_B: Tensor, place: int = 0) -> None:
        """Append one token to every row; ``place``: of the tokens in their images, from 1, 0 for text."""
        positions_BT = self.cache.length - self.pads_B[:, None]
        mask = self.allowed_BT[:, None, None, : self.cache.length + 1]
        places_BT = torch.full_like(tokens_B[:, None], place)
        self.last_hidden_BD = self.model(tokens_B[:, None], places_BT, self.cache, positions_BT, mask)[:, -1]


@torch.inference_mode()
def generate_images(
    model: Decoder,
    prompts: Sequence[Tokens],
    unconditional: Sequence[Tokens],
    seeds: Sequence[int],
    *,
    temperature: float,
    top_p: float,
    guidance: float,
) -> np.ndarray:
    """Draw one image for each prompt, which must end where its image begins; codes (B, tokens_per_image).

    Args:
        unconditional: the mask-conditioned prompt of each row; unused when ``guidance`` is 1.
        seeds: of each row's noise.

    Raises:
        PromptTooLongError: if a prompt and an image do not fit in the context.
    """
    vocabulary = model.vocabulary
    steps = vocabulary.tokens_per_image
    guided = guidance != 1
    rows = len(prompts)
    stream = Stream(model, [*prompts, *unconditional] if guided else prompts, steps)
    noise = uniform_noise(list(seeds), steps)
    codes = torch.empty(rows, steps, dtype=torch.int64, device=model.device)
    for step in range(steps):
        logits = model.logits(stream.last_hidden_BD, vocabulary.image_start, vocabulary.text_start).float()
        if guided:
            logits = classifier_free(logits[:rows], logits[rows:], guidance)
        codes[:, step] = sample(top_p_probabilities(logits, temperature, top_p), noise[:, step])
        if step + 1 < steps:
            chosen = codes[:, step] + vocabulary.image_start
            stream.advance(torch.cat([chosen, chosen]) if guided else chosen, place=step + 1)
    return codes.cpu().numpy()


@torch.inference_mode()
def generate_texts(
    model: Decoder, prompts: Sequence[Tokens], seeds: Sequence[int], *, temperature: float, top_p: float, max_tokens: int
) -> list[list[int]]:
    """Infill one text for each prompt, which must end with the sentinel of the span; text-tokenizer ids up to ``<eoss>``.

    Raises:
        PromptTooLongError: if a prompt and ``max_tokens`` do not fit in the context.
    """
    vocabulary = model.vocabulary
    stream = Stream(model, prompts, max_tokens)
    noise = uniform_noise(list(seeds), max_tokens)
    texts: list[list[int]] = [[] for _ in prompts]
    open_rows = torch.ones(len(prompts), dtype=torch.bool, device=model.device)
    for step in range(max_tokens):
        text_logits = model.logits(stream.last_hidden_BD, vocabulary.text_start)
        end_logits = model.logits(stream.last_hidden_BD, EOSS, EOSS + 1)
        logits = torch.cat([end_logits, text_logits], -1).float()
        chosen = sample(top_p_probabilities(logits, temperature, top_p), noise[:, step])
        open_rows &= chosen > 0
        if not open_rows.any():
            break
        for row in open_rows.nonzero().flatten().tolist():
            texts[row].append(int(chosen[row]) - 1)
        if step + 1 < max_tokens:
            stream.advance(torch.where(chosen > 0, chosen - 1 + vocabulary.text_start, EOSS))
    return texts


@torch.inference_mode()
def text_log_likelihoods(model: Decoder, prompts: Sequence[Tokens], text: Tokens) -> Tensor:
    """How likely the model is to infill ``text`` and then end it, for each of some prompts of one length; (B,) nats.

    Raises:
        PromptTooLongError: if a prompt and the text do not fit in the context.
    """
    answer = np.append(text, EOSS)
    rows = np.stack([np.concatenate([prompt, answer]) for prompt in prompts])
    if rows.shape[1] > model.spec.context + 1:
        raise PromptTooLongError(f"a prompt and a text of {rows.shape[1]} tokens do not fit in the context of {model.spec.context}")
    tokens_BT = torch.from_numpy(rows).to(model.device)
    places_BT = torch.from_numpy(np.stack([model.vocabulary.places(row) for row in rows])).to(model.device)
    hidden_BTD = model(tokens_BT[:, :-1], places_BT[:, :-1])[:, -len(answer) :]
    found_BTV = model.logits(hidden_BTD).float().log_softmax(-1)
    return found_BTV.gather(-1, tokens_BT[:, -len(answer) :, None]).squeeze(-1).sum(1)
