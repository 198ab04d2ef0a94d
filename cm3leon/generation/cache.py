"""Keys and values while decoding: those of a prompt are held once and read by all of its continuations.

Shapes: G prompts, C continuations of each, R = G * C rows, H heads, K head dim, P tokens of the longest prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cm3leon.models.decoder import Decoder
from cm3leon.sequence.grammar import PAD, Prompt

WORTH_SHARING = 32
"""A beginning that prompts have in common is computed on its own from this many tokens on."""

PROMPT_STEP, STATIC_STEP = 32, 256
"""Compiled decoding pads prompts, and what attention looks at, to whole multiples of this many tokens."""

SHAPES = 128
"""Most shapes (rows, prompt and length) that decoding is compiled for; those beyond run uncompiled."""

LONG = 128
"""Prompts of this many tokens are held once for all their continuations; shorter ones are copied, which is less work."""


class PromptCache:
    """Keys and values (layers, G, H, P, K) of prompts that are read in one or more parts; ``bias`` (G, 1, 1, P) hides what is padding;
    ``last`` (G, 1) is the token that each ends in."""

    def __init__(self, model: Decoder, rows: int, capacity: int) -> None:
        spec, weight = model.spec, model.tokens.weight
        shape = (spec.layers, rows, spec.heads, capacity, spec.width // spec.heads)
        self.keys, self.values = (torch.zeros(shape, device=weight.device, dtype=weight.dtype) for _ in range(2))
        self.bias = torch.full((rows, 1, 1, capacity), -torch.inf, device=weight.device, dtype=weight.dtype)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self.last = torch.zeros(rows, 1, dtype=torch.int64, device=weight.device)
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
        rows = ([part.tokens for part in parts], [part.image_positions for part in parts])
        tokens, image_positions = (padded(values, len(columns), self.bias.device) for values in rows)
        positions = self.lengths[:, None] + columns.minimum((counts[:, None] - 1).clamp(min=0))
        previous = torch.cat([self.last, tokens[:, :-1]], 1)
        hidden_GTD = model(tokens, image_positions, self, positions, previous_BT=previous)
        self.lengths += counts
        self.last = torch.cat([self.last, tokens], 1).gather(1, counts[:, None])
        self.start = self.stop
        return hidden_GTD[torch.arange(len(counts)), counts - 1]

    def attend(self, layer: int, q_GHTK: Tensor, k_GHTK: Tensor, v_GHTK: Tensor, scale: float) -> Tensor:
        """Attention of the tokens being read to one another and to what was read before."""
        self.keys[layer, :, :, self.start : self.stop] = k_GHTK
        self.values[layer, :, :, self.start : self.stop] = v_GHTK
        keys, values = self.keys[layer, :, :, : self.stop], self.values[layer, :, :, : self.stop]
        return F.scaled_dot_product_attention(q_GHTK, keys, values, attn_mask=self.mask, scale=scale)


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
    capacity = longest + max(len(p) - n for p, n in zip(prompts, shared, strict=True))
    cache = PromptCache(model, len(prompts), _rounded_up(capacity, PROMPT_STEP) if model.compiled_decoding else capacity)
    if longest:
        beginnings = [Prompt(prompt.tokens[:n], prompt.image_positions[:n]) for prompt, n in zip(prompts, shared, strict=True)]
        keys = [beginning.tokens.tobytes() for beginning in beginnings]
        first = PromptCache(model, len(set(keys)), longest)
        first.read(model, list(dict(zip(keys, beginnings, strict=True)).values()))
        order = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        rows = torch.tensor([order[key] for key in keys], device=cache.bias.device)
        cache.keys[:, :, :, :longest], cache.values[:, :, :, :longest] = first.keys[:, rows], first.values[:, rows]
        cache.bias[..., :longest], cache.start = first.bias[rows], longest
        cache.lengths, cache.last = first.lengths[rows], first.last[rows]
    return cache, cache.read(model, [Prompt(p.tokens[n:], p.image_positions[n:]) for p, n in zip(prompts, shared, strict=True)])


class DecodingCache:
    """Keys and values of ``copies`` continuations of each prompt of a :class:`PromptCache`, up to ``room`` tokens each, all of one length.

    Short prompts stand before the tokens of each continuation. Of long ones nothing is copied: attention to the prompt is computed for all
    its continuations together, and its result stands before a continuation's own tokens as one more, whose score is the logarithm of what
    the prompt's tokens weigh together.
    """

    def __init__(self, prompt: PromptCache, copies: int, room: int) -> None:
        layers, groups, heads, capacity, size = prompt.keys.shape
        self.prompt, self.copies, self.length = prompt, copies, 0
        self.shared = capacity >= LONG
        self.first = 1 if self.shared else capacity
        shape = (groups * copies, heads, self.first + room, size)
        self.keys, self.values = ([prompt.keys.new_zeros(shape) for _ in range(layers)] for _ in range(2))
        self.mask = prompt.bias.new_zeros(groups * copies, heads if self.shared else 1, 1, self.first + room)
        if not self.shared:
            for layer in range(layers):
                self.keys[layer][:, :, : self.first] = prompt.keys[layer].repeat_interleave(copies, 0)
                self.values[layer][:, :, : self.first] = prompt.values[layer].repeat_interleave(copies, 0)
            self.mask[..., : self.first] = prompt.bias.repeat_interleave(copies, 0)
        self.lengths = prompt.lengths.repeat_interleave(copies)[:, None]
        self.last = prompt.last.repeat_interleave(copies, 0)

    def attend(self, layer: int, q_RH1K: Tensor, k_RH1K: Tensor, v_RH1K: Tensor, scale: float) -> Tensor:
        """Attention of each row's new token to the row's prompt and to what continues it."""
        stop = self.first + self.length + 1
        keys, values, mask = self.keys[layer][:, :, :stop], self.values[layer][:, :, :stop], self.mask[..., :stop]
        keys[:, :, -1:], values[:, :, -1:] = k_RH1K, v_RH1K
        if self.shared:
            values[:, :, 0], mask[..., 0] = self._prompt_as_one(layer, q_RH1K, scale)
        return F.scaled_dot_product_attention(q_RH1K, keys, values, attn_mask=mask, scale=scale)

    def _prompt_as_one(self, layer: int, q_RH1K: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """What each row sees of its prompt (R, H, K), and its score (R, H, 1)."""
        rows, heads, _, size = q_RH1K.shape
        q_GHCK = q_RH1K.view(rows // self.copies, self.copies, heads, size).transpose(1, 2)
        scores_GHCP = torch.matmul(q_GHCK, self.prompt.keys[layer].mT).mul_(scale).add_(self.prompt.bias)
        score_GHC1 = scores_GHCP.logsumexp(-1, keepdim=True)
        seen_GHCK = torch.matmul(scores_GHCP.sub_(score_GHC1).exp_(), self.prompt.values[layer])
        return seen_GHCK.transpose(1, 2).reshape(rows, heads, size), score_GHC1.transpose(1, 2).reshape(rows, heads, 1)

    def advance(self, model: Decoder, tokens_R: Tensor, place: int) -> Tensor:
        """Append a token to each row; the hidden state after it (R, D). ``place``: of the tokens in their images, from 1; 0 for text."""
        image_positions = torch.full_like(tokens_R[:, None], place)
        hidden_R1D = model(tokens_R[:, None], image_positions, self, self.lengths + self.length, previous_BT=self.last)
        self.length += 1
        self.last = tokens_R[:, None]
        return hidden_R1D[:, 0]


class CompiledDecodingCache(DecodingCache):
    """A :class:`DecodingCache` whose steps run compiled: on a GPU as one CUDA graph, instead of hundreds of kernels launched one by one.

    For that, shapes stay the same from step to step: attention also looks at what is not filled yet, in whole multiples of
    :data:`STATIC_STEP`, and a mask hides it. The first steps take as long as the compilation of each size does.
    """

    def __init__(self, prompt: PromptCache, copies: int, room: int) -> None:
        super().__init__(prompt, copies, room)
        self.mask[..., self.first :] = -torch.inf
        self.position = torch.tensor([self.first - 1], device=prompt.keys.device)
        self.bound = 0
        for tensor in (*self.keys, *self.values, self.mask, self.position, prompt.keys, prompt.values, prompt.bias):
            torch._dynamo.mark_static_address(tensor, guard=False)

    def attend(self, layer: int, q_RH1K: Tensor, k_RH1K: Tensor, v_RH1K: Tensor, scale: float) -> Tensor:
        """As :meth:`DecodingCache.attend`, over ``bound`` tokens."""
        keys, values, mask = self.keys[layer], self.values[layer], self.mask[..., : self.bound]
        keys.index_copy_(2, self.position, k_RH1K)
        values.index_copy_(2, self.position, v_RH1K)
        if self.shared:
            values[:, :, 0], mask[..., 0] = self._prompt_as_one(layer, q_RH1K, scale)
        return F.scaled_dot_product_attention(q_RH1K, keys[:, :, : self.bound], values[:, :, : self.bound], attn_mask=mask, scale=scale)

    def advance(self, model: Decoder, tokens_R: Tensor, place: int) -> Tensor:
        """As :meth:`DecodingCache.advance`."""
        self.position += 1
        self.mask.index_fill_(-1, self.position, 0)
        self.bound = min(_rounded_up(self.first + self.length + 1, STATIC_STEP), self.mask.shape[-1])
        image_positions = torch.full_like(tokens_R[:, None], place)
        torch.compiler.cudagraph_mark_step_begin()
        step = _compiled_step(self.position.device.type)
        hidden_R1D = step(model, tokens_R[:, None], image_positions, self, self.lengths + self.length, self.last)
        self.length += 1
        self.last = tokens_R[:, None]
        return hidden_R1D[:, 0].clone()  # a graph's output is overwritten when it runs again


def decoding_cache(model: Decoder, prompt: PromptCache, copies: int, room: int) -> DecodingCache:
    """The cache that a model decodes with; see ``Decoder.compiled_decoding``."""
    return (CompiledDecodingCache if model.compiled_decoding else DecodingCache)(prompt, copies, room)


def _rounded_up(length: int, step: int) -> int:
    return -(-length // step) * step


def _step(
    model: Decoder, tokens_R1: Tensor, image_positions_R1: Tensor, cache: DecodingCache, positions_R1: Tensor, previous_R1: Tensor
) -> Tensor:
    return model(tokens_R1, image_positions_R1, cache, positions_R1, previous_BT=previous_R1)


@functools.cache
def _compiled_step(device: str) -> Callable[[Decoder, Tensor, Tensor, DecodingCache, Tensor, Tensor], Tensor]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    return torch.compile(_step, dynamic=False, fullgraph=True, mode="reduce-overhead" if device == "cuda" else None)
