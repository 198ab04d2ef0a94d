"""Caches of keys and values: a prompt's are held once and attended to by all of its continuations.

Shapes: G prompts, C continuations of each, R = G * C rows, T tokens that are read at once, P tokens of the longest prompt, H heads, K head
dim, D width.
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

MIN_SHARED_PREFIX = 32
"""A prefix that prompts share is prefilled once if it has at least this many tokens; a shorter one does not pay for its own pass."""

PROMPT_MULTIPLE, LENGTH_MULTIPLE = 32, 256
"""Compiled decoding pads prompts, and the length that attention covers, to multiples of this many tokens, so that few shapes occur."""

MAX_COMPILED_SHAPES = 128
"""Most shapes (rows, prompt and length) that decoding is compiled for; others run uncompiled."""

MIN_UNCOPIED_PROMPT = 128
"""Prompts of at least this many tokens are held once for all their continuations; shorter ones are copied, which is less work."""


class PromptCache:
    """Keys and values (layers, G, H, P, K) of prompts that are read in one or more passes.

    Attributes:
        bias: (G, 1, 1, P), added to attention scores: 0, or -inf where there is padding or nothing yet.
        lengths: (G,), tokens read, without padding.
        last: (G, 1), the last token read.
        start, stop: columns of the cache that the present pass fills; padding takes columns too.
    """

    def __init__(self, model: Decoder, rows: int, capacity: int) -> None:
        spec, device, dtype = model.spec, model.device, model.compute_dtype or model.tokens.weight.dtype
        shape = (spec.layers, rows, spec.heads, capacity, spec.width // spec.heads)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.bias = torch.full((rows, 1, 1, capacity), -torch.inf, device=device, dtype=dtype)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.last = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.start = 0

    def read(self, model: Decoder, parts: Sequence[Prompt]) -> Tensor:
        """Read the next tokens of each prompt, at least one; the hidden state after each one's last (G, D)."""
        counts = torch.tensor([len(part) for part in parts], device=self.bias.device)
        columns = torch.arange(int(counts.max()), device=self.bias.device)
        self.stop = self.start + len(columns)
        # 1. The attention mask: a token sees what was read before, and of this pass itself and the tokens before it.
        self.bias[:, 0, 0, self.start : self.stop].masked_fill_(columns < counts[:, None], 0)
        causal = torch.zeros(len(columns), self.stop, device=self.bias.device, dtype=self.bias.dtype)
        causal[:, self.start :].masked_fill_(columns > columns[:, None], -torch.inf)
        self.mask = self.bias[..., : self.stop] + causal
        self.mask[..., self.start :].diagonal(dim1=-2, dim2=-1).zero_()  # padding sees itself: the softmax of a row of -inf is not a number
        # 2. The model's inputs, padded on the right. Positions count a prompt's own tokens, not its padding.
        tokens_GT = padded([part.tokens for part in parts], len(columns), self.bias.device)
        image_positions_GT = padded([part.image_positions for part in parts], len(columns), self.bias.device)
        positions_GT = self.lengths[:, None] + columns.minimum((counts[:, None] - 1).clamp(min=0))
        previous_GT = torch.cat([self.last, tokens_GT[:, :-1]], 1)
        # 3. The pass, in which attend() fills the cache.
        hidden_GTD = model(tokens_GT, image_positions_GT, self, positions_GT, previous_BT=previous_GT)
        self.lengths += counts
        self.last = torch.cat([self.last, tokens_GT], 1).gather(1, counts[:, None])
        self.start = self.stop
        return hidden_GTD[torch.arange(len(counts)), counts - 1]

    def attend(self, layer: int, q_GHTK: Tensor, k_GHTK: Tensor, v_GHTK: Tensor, scale: float) -> Tensor:
        """Attention (G, H, T, K) of the tokens being read to one another and to what was read before; keeps their keys and values."""
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
    """Prefill: read prompts; their cache, and the hidden state after each (G, D).

    Args:
        shared: for each prompt the number of first tokens that other prompts may share. Equal prefixes are computed once.
    """
    shared = list(shared) if max(shared) >= MIN_SHARED_PREFIX else [0] * len(prompts)
    longest = max(shared)
    capacity = longest + max(len(prompt) - own for prompt, own in zip(prompts, shared, strict=True))
    cache = PromptCache(model, len(prompts), _round_up(capacity, PROMPT_MULTIPLE) if model.compiled_decoding else capacity)
    if longest:
        # 1. Read each distinct prefix once, in a cache of its own.
        prefixes = [Prompt(prompt.tokens[:own], prompt.image_positions[:own]) for prompt, own in zip(prompts, shared, strict=True)]
        keys = [prefix.tokens.tobytes() for prefix in prefixes]
        distinct = dict(zip(keys, prefixes, strict=True))
        prefix_cache = PromptCache(model, len(distinct), longest)
        prefix_cache.read(model, list(distinct.values()))
        # 2. Copy it to all prompts that begin with it.
        row_of = {key: row for row, key in enumerate(distinct)}
        rows = torch.tensor([row_of[key] for key in keys], device=cache.bias.device)
        cache.keys[:, :, :, :longest] = prefix_cache.keys[:, rows]
        cache.values[:, :, :, :longest] = prefix_cache.values[:, rows]
        cache.bias[..., :longest] = prefix_cache.bias[rows]
        cache.start = longest
        cache.lengths = prefix_cache.lengths[rows]
        cache.last = prefix_cache.last[rows]
    # 3. Read the rest of each prompt.
    rests = [Prompt(prompt.tokens[own:], prompt.image_positions[own:]) for prompt, own in zip(prompts, shared, strict=True)]
    return cache, cache.read(model, rests)


class DecodingCache:
    """Keys and values of ``copies`` continuations of each prompt of a :class:`PromptCache`, up to ``room`` tokens each, all of one length.

    A short prompt is copied into each continuation's cache. A long one is not: attention to it is computed for all its continuations
    together, and the result joins a continuation's own tokens as one more entry. Attention to prompt and continuation is exact because the
    softmax over two sets of keys is the mean of the softmax over each, weighted by their sums of exponentials: the entry's value is the
    attention's output over the prompt, its score the logarithm of the prompt's sum of exponentials. Rounded to bfloat16, that score would
    shift the weight of the whole prompt by percents: scores, and next to such an entry a continuation's keys and values, are float32.
    """

    def __init__(self, prompt: PromptCache, copies: int, room: int) -> None:
        layers, groups, heads, capacity, size = prompt.keys.shape
        self.prompt, self.copies, self.length = prompt, copies, 0
        self.shared = capacity >= MIN_UNCOPIED_PROMPT
        self.first = 1 if self.shared else capacity
        shape = (groups * copies, heads, self.first + room, size)
        dtype = torch.float32 if self.shared else prompt.keys.dtype
        self.keys, self.values = ([prompt.keys.new_zeros(shape, dtype=dtype) for _ in range(layers)] for _ in range(2))
        self.mask = prompt.bias.new_zeros(groups * copies, heads if self.shared else 1, 1, self.first + room, dtype=dtype)
        if not self.shared:
            for layer in range(layers):
                self.keys[layer][:, :, : self.first] = prompt.keys[layer].repeat_interleave(copies, 0)
                self.values[layer][:, :, : self.first] = prompt.values[layer].repeat_interleave(copies, 0)
            self.mask[..., : self.first] = prompt.bias.repeat_interleave(copies, 0)
        self.lengths = prompt.lengths.repeat_interleave(copies)[:, None]
        self.last = prompt.last.repeat_interleave(copies, 0)

    def attend(self, layer: int, q_RH1K: Tensor, k_RH1K: Tensor, v_RH1K: Tensor, scale: float) -> Tensor:
        """Attention (R, H, 1, K) of each row's new token to the row's prompt and continuation; keeps its key and value."""
        stop = self.first + self.length + 1
        keys, values, mask = self.keys[layer][:, :, :stop], self.values[layer][:, :, :stop], self.mask[..., :stop]
        keys[:, :, -1:], values[:, :, -1:] = k_RH1K, v_RH1K
        if self.shared:
            values[:, :, 0], mask[..., 0] = self._attend_to_prompt(layer, q_RH1K, scale)
        return F.scaled_dot_product_attention(q_RH1K.to(keys.dtype), keys, values, attn_mask=mask, scale=scale).to(q_RH1K.dtype)

    def _attend_to_prompt(self, layer: int, q_RH1K: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The output of each row's attention to its prompt (R, H, K), and the log-sum-exp of the scores (R, H, 1)."""
        rows, heads, _, size = q_RH1K.shape
        q_GHCK = q_RH1K.view(rows // self.copies, self.copies, heads, size).transpose(1, 2)
        keys_GHPK, values_GHPK = self.prompt.keys[layer], self.prompt.values[layer]
        scores_GHCP = torch.matmul(q_GHCK.float(), keys_GHPK.float().mT).mul_(scale).add_(self.prompt.bias)
        total_GHC1 = scores_GHCP.logsumexp(-1, keepdim=True)
        output_GHCK = torch.matmul(scores_GHCP.sub_(total_GHC1).exp_().to(values_GHPK.dtype), values_GHPK)
        return output_GHCK.transpose(1, 2).reshape(rows, heads, size), total_GHC1.transpose(1, 2).reshape(rows, heads, 1)

    def advance(self, model: Decoder, tokens_R: Tensor, image_position: int) -> Tensor:
        """Append a token to each row; the hidden state after it (R, D).

        Args:
            image_position: raster index of the tokens in their images, from 1; 0 for text.
        """
        image_positions_R1 = torch.full_like(tokens_R[:, None], image_position)
        hidden_R1D = model(tokens_R[:, None], image_positions_R1, self, self.lengths + self.length, previous_BT=self.last)
        self.length += 1
        self.last = tokens_R[:, None]
        return hidden_R1D[:, 0]


class CompiledDecodingCache(DecodingCache):
    """A :class:`DecodingCache` whose steps run compiled: on a GPU as one CUDA graph, instead of hundreds of kernels launched one by one.

    For that, shapes stay the same from step to step: attention covers ``bound`` tokens, a multiple of :data:`LENGTH_MULTIPLE`, and a mask
    hides those that are not filled yet. The first step of each shape takes as long as its compilation.
    """

    def __init__(self, prompt: PromptCache, copies: int, room: int) -> None:
        super().__init__(prompt, copies, room)
        self.mask[..., self.first :] = -torch.inf
        self.position = torch.tensor([self.first - 1], device=prompt.keys.device)
        self.bound = 0
        for tensor in (*self.keys, *self.values, self.mask, self.position, prompt.keys, prompt.values, prompt.bias):
            torch._dynamo.mark_static_address(tensor, guard=False)  # a CUDA graph would copy its inputs before each step

    def attend(self, layer: int, q_RH1K: Tensor, k_RH1K: Tensor, v_RH1K: Tensor, scale: float) -> Tensor:
        """As :meth:`DecodingCache.attend`, over ``bound`` tokens."""
        keys, values, mask = self.keys[layer], self.values[layer], self.mask[..., : self.bound]
        keys.index_copy_(2, self.position, k_RH1K.to(keys.dtype))
        values.index_copy_(2, self.position, v_RH1K.to(values.dtype))
        if self.shared:
            values[:, :, 0], mask[..., 0] = self._attend_to_prompt(layer, q_RH1K, scale)
        return F.scaled_dot_product_attention(
            q_RH1K.to(keys.dtype), keys[:, :, : self.bound], values[:, :, : self.bound], attn_mask=mask, scale=scale
        ).to(q_RH1K.dtype)

    def advance(self, model: Decoder, tokens_R: Tensor, image_position: int) -> Tensor:
        """As :meth:`DecodingCache.advance`."""
        self.position += 1
        self.mask.index_fill_(-1, self.position, 0)
        self.bound = min(_round_up(self.first + self.length + 1, LENGTH_MULTIPLE), self.mask.shape[-1])
        image_positions_R1 = torch.full_like(tokens_R[:, None], image_position)
        torch.compiler.cudagraph_mark_step_begin()
        step = _compiled_step(self.position.device.type)
        hidden_R1D = step(model, tokens_R[:, None], image_positions_R1, self, self.lengths + self.length, self.last)
        self.length += 1
        self.last = tokens_R[:, None]
        return hidden_R1D[:, 0].clone()  # a graph's output is overwritten when it runs again


def decoding_cache(model: Decoder, prompt: PromptCache, copies: int, room: int) -> DecodingCache:
    """The cache that a model decodes with; see ``Decoder.compiled_decoding``."""
    return (CompiledDecodingCache if model.compiled_decoding else DecodingCache)(prompt, copies, room)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _step(
    model: Decoder, tokens_R1: Tensor, image_positions_R1: Tensor, cache: DecodingCache, positions_R1: Tensor, previous_R1: Tensor
) -> Tensor:
    return model(tokens_R1, image_positions_R1, cache, positions_R1, previous_BT=previous_R1)


@functools.cache
def _compiled_step(device: str) -> Callable[[Decoder, Tensor, Tensor, DecodingCache, Tensor, Tensor], Tensor]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILED_SHAPES)
    return torch.compile(_step, dynamic=False, fullgraph=True, mode="reduce-overhead" if device == "cuda" else None)
