"""Keys and values while decoding: those of a prompt are held once and read by all of its continuations.

Shapes: G prompts, C continuations of each, R = G * C rows, H heads, K head dim, P tokens of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cm3leon.documents import PAD, Prompt
from cm3leon.model import Decoder

WORTH_SHARING = 32
"""A beginning that prompts have in common is computed on its own from this many tokens on."""

LONG = 128
"""Prompts of this many tokens are held once for all their continuations; shorter ones are copied, which is less work."""


class PromptCache:
    """Keys and values (layers, G, H, P, K) of prompts that are read in one or more parts; ``bias`` (G, 1, 1, P) hides what is padding."""

    def __init__(self, model: Decoder, rows: int, capacity: int) -> None:
        spec, weight = model.spec, model.tokens.weight
        shape = (spec.layers, rows, spec.heads, capacity, spec.width // spec.heads)
        self.keys, self.values = (torch.zeros(shape, device=weight.device, dtype=weight.dtype) for _ in range(2))
        self.bias = torch.full((rows, 1, 1, capacity), -torch.inf, device=weight.device, dtype=weight.dtype)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self.start = 0

    def read(self, model: Decoder, parts: Sequence[Prompt]) -> Tensor:
        """Read the next tokens of each prompt, at least one; the hidden state after each one's last (G, D)."""
        counts = torch.tensor([len(part) for part in parts], device=self.bias.device)
        columns = torch.arange(int(counts.max()), device=self.bias.device)
        self.stop = self.start + len(columns)
        self.bias[:, 0, 0, self.start : self.stop].masked_fill_(columns < counts[:, None], 0)
        causal = torch.zeros(len(columns), self.stop, device=self.bias.device, dtype=self.bias.dtype)
        causal[:, self.start :].masked_fill_(columns > columns[:, None], -torch.inf)
        self.mask = self.bias[..., : self.stop] + causal
        self.mask[..., self.start :].diagonal(dim1=-2, dim2=-1).zero_()  # padding sees itself: a row that sees nothing is not a number
        tokens, places = ([part.tokens for part in parts], [part.places for part in parts])
        inputs = (padded(rows, len(columns), self.bias.device) for rows in (tokens, places))
        hidden_GTD = model(*inputs, self, self.lengths[:, None] + columns.minimum((counts[:, None] - 1).clamp(min=0)))
        self.lengths += counts
        self.start = self.stop
        return hidden_GTD[torch.arange(len(counts)), counts - 1]

    def attend(self, layer: int, q_GHTK: Tensor, k_GHTK: Tensor, v_GHTK: Tensor) -> Tensor:
        """Attention of the tokens being read to one another and to what was read before."""
        self.keys[layer, :, :, self.start : self.stop] = k_GHTK
        self.values[layer, :, :, self.start : self.stop] = v_GHTK
        keys, values = self.keys[layer, :, :, : self.stop], self.values[layer, :, :, : self.stop]
        return F.scaled_dot_product_attention(q_GHTK, keys, values, attn_mask=self.mask)


def padded(rows: Sequence[np.ndarray], length: int, device: torch.device) -> Tensor:
    """Rows (G, ``length``) int64, padded on the right with ``<pad>``, which is 0."""
    found = np.full((len(rows), length), PAD, dtype=np.int64)
    for number, row in enumerate(rows):
        found[number, : len(row)] = row
    return torch.from_numpy(found).to(device)


def read_prompts(model: Decoder, prompts: Sequence[Prompt], shared: Sequence[int]) -> tuple[PromptCache, Tensor]:
    """Read prompts; their cache, and the hidden state after each (G, D).

    Args:
        shared: how many of a prompt's first tokens other prompts may begin with too. Equal beginnings are computed once.
    """
    shared = list(shared) if max(shared) >= WORTH_SHARING else [0] * len(prompts)
    longest = max(shared)
    cache = PromptCache(model, len(prompts), longest + max(len(p) - n for p, n in zip(prompts, shared, strict=True)))
    if longest:
        beginnings = [Prompt(prompt.tokens[:n], prompt.places[:n]) for prompt, n in zip(prompts, shared, strict=True)]
        keys = [beginning.tokens.tobytes() for beginning in beginnings]
        first = PromptCache(model, len(set(keys)), longest)
        first.read(model, list(dict(zip(keys, beginnings, strict=True)).values()))
        order = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        rows = torch.tensor([order[key] for key in keys], device=cache.bias.device)
        cache.keys[:, :, :, :longest], cache.values[:, :, :, :longest] = first.keys[:, rows], first.values[:, rows]
        cache.bias[..., :longest], cache.lengths, cache.start = first.bias[rows], first.lengths[rows], longest
    return cache, cache.read(model, [Prompt(p.tokens[n:], p.places[n:]) for p, n in zip(prompts, shared, strict=True)])


class DecodingCache:
    """Keys and values of ``copies`` continuations of each prompt of a :class:`PromptCache`, up to ``room`` tokens each, all of one length.

    Short prompts stand before the tokens of each continuation. Of long ones nothing is copied: attention to the prompt is computed for all
    its continuations together, and its result stands before a continuation's own tokens as one more, whose score is the logarithm of what
    the prompt's tokens weigh together.
    """

    def __init__(self, prompt: PromptCache, copies: int, room: int) -> None:
        layers, groups, heads, _, size = prompt.keys.shape
        self.prompt, self.copies, self.length = prompt, copies, 0
        self.shared = prompt.stop >= LONG
        self.first = 1 if self.shared else prompt.stop
        shape = (layers, groups * copies, heads, self.first + room, size)
        self.keys, self.values = (torch.zeros(shape, device=prompt.keys.device, dtype=prompt.keys.dtype) for _ in range(2))
        self.mask = prompt.bias.new_zeros(groups * copies, heads if self.shared else 1, 1, self.first + room)
        if not self.shared:
            self.keys[:, :, :, : self.first] = prompt.keys.repeat_interleave(copies, 1)
            self.values[:, :, :, : self.first] = prompt.values.repeat_interleave(copies, 1)
            self.mask[..., : self.first] = prompt.bias.repeat_interleave(copies, 0)
        self.lengths = prompt.lengths.repeat_interleave(copies)[:, None]

    def attend(self, layer: int, q_RH1K: Tensor, k_RH1K: Tensor, v_RH1K: Tensor) -> Tensor:
        """Attention of each row's new token to the row's prompt and to what continues it."""
        stop = self.first + self.length + 1
        keys, values, mask = self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop], self.mask[..., :stop]
        keys[:, :, -1:], values[:, :, -1:] = k_RH1K, v_RH1K
        if self.shared:
            values[:, :, 0], mask[..., 0] = self._prompt_as_one(layer, q_RH1K)
        return F.scaled_dot_product_attention(q_RH1K, keys, values, attn_mask=mask)

    def _prompt_as_one(self, layer: int, q_RH1K: Tensor) -> tuple[Tensor, Tensor]:
        """What each row sees of its prompt (R, H, K), and its score (R, H, 1)."""
        rows, heads, _, size = q_RH1K.shape
        q_GHCK = q_RH1K.view(rows // self.copies, self.copies, heads, size).transpose(1, 2)
        scores_GHCP = torch.matmul(q_GHCK, self.prompt.keys[layer].mT).mul_(size**-0.5).add_(self.prompt.bias)
        score_GHC1 = scores_GHCP.logsumexp(-1, keepdim=True)
        seen_GHCK = torch.matmul(scores_GHCP.sub_(score_GHC1).exp_(), self.prompt.values[layer])
        return seen_GHCK.transpose(1, 2).reshape(rows, heads, size), score_GHC1.transpose(1, 2).reshape(rows, heads, 1)

    def advance(self, model: Decoder, tokens_R: Tensor, place: int) -> Tensor:
        """Append a token to each row; the hidden state after it (R, D). ``place``: of the tokens in their images, from 1; 0 for text."""
        places = torch.full_like(tokens_R[:, None], place)
        hidden_R1D = model(tokens_R[:, None], places, self, self.lengths + self.length)
        self.length += 1
        return hidden_R1D[:, 0]
