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
        # 1. The attention mask: a token sees what was read before, and of this pass itself and the tokens before it. The first pass, which
        #    is the longest, needs none: attention is causal, and padding comes last.
        self.bias[:, 0, 0, self.start : self.stop].masked_fill_(columns < counts[:, None], 0)
        self.mask = self._mask(columns) if self.start else None
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

    def _mask(self, columns: Tensor) -> Tensor:
        """What each column of the present pass sees (G, 1, T, stop), added to attention scores."""
        causal = torch.zeros(len(columns), self.stop, device=self.bias.device, dtype=self.bias.dtype)
        causal[:, self.start :].masked_fill_(columns > columns[:, None], -torch.inf)
        mask = self.bias[..., : self.stop] + causal
        mask[..., self.start :].diagonal(dim1=-2, dim2=-1).zero_()  # padding sees itself: the softmax of a row of -inf is not a number
        return mask

    def attend(self, layer: int, q_GHTK: Tensor, k_GHTK: Tensor, v_GHTK: Tensor, scale: float) -> Tensor:
        """Attention (G, H, T, K) of the tokens being read to one another and to what was read before; keeps their keys and values."""
        self.keys[layer, :, :, self.start : self.stop] = k_GHTK
        self.values[layer, :, :, self.start : self.stop] = v_GHTK
        keys, values = self.keys[layer, :, :, : self.stop], self.values[layer, :, :, : self.stop]
        return F.scaled_dot_product_attention(q_GHTK, keys, values, attn_mask=self.mask, is_causal=self.mask is None, scale=scale)


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
    """Keys and values of ``copies`` continuations of each prompt of a :class:`PromptCache`, up to ``room`` tokens each.

    Where passes read several tokens, continuations may differ in length, and tokens may be read again: what is read replaces what was read
    there before.

    A short prompt is copied into each continuation's cache. A long one is not: attention to it is computed for all its continuations
    together, and its output joins a continuation's own tokens as one more value. Attention to prompt and continuation is exact because the
    softmax over two sets of keys is the mean of the softmax over each, weighted by their sums of exponentials: the value is the attention's
    output over the prompt, its score the logarithm of the prompt's sum of exponentials. Rounded to bfloat16, that score would shift the
    weight of the whole prompt by percents: scores, and next to such a value a continuation's keys and values, are float32.

    Attributes:
        tokens: (R, 1 + room), the prompt's last token and those read after it.
        columns: (R, T), which tokens of the continuation the present pass reads.
        mask: (R, 1, T, columns that attention covers), added to attention scores.
    """

    def __init__(self, prompt: PromptCache, copies: int, room: int) -> None:
        layers, groups, heads, capacity, size = prompt.keys.shape
        self.prompt, self.copies = prompt, copies
        self.shared = capacity >= MIN_UNCOPIED_PROMPT
        self.first = 0 if self.shared else capacity
        shape = (groups * copies, heads, self.first + room, size)
        dtype = torch.float32 if self.shared else prompt.keys.dtype
        self.keys, self.values = ([prompt.keys.new_zeros(shape, dtype=dtype) for _ in range(layers)] for _ in range(2))
        if not self.shared:
            for layer in range(layers):
                self.keys[layer][:, :, : self.first] = prompt.keys[layer].repeat_interleave(copies, 0)
                self.values[layer][:, :, : self.first] = prompt.values[layer].repeat_interleave(copies, 0)
        self.bias = prompt.bias[..., : self.first].repeat_interleave(copies, 0).to(dtype)
        self.lengths = prompt.lengths.repeat_interleave(copies)[:, None]
        self.tokens = F.pad(prompt.last.repeat_interleave(copies, 0), (0, room))

    def attend(self, layer: int, q_RHTK: Tensor, k_RHTK: Tensor, v_RHTK: Tensor, scale: float) -> Tensor:
        """Attention (R, H, T, K) of each row's new tokens to the row's prompt and continuation; keeps their keys and values."""
        self._keep(self.keys[layer], k_RHTK)
        self._keep(self.values[layer], v_RHTK)
        stop = self.mask.shape[-1]
        q_RHTK, keys, values = q_RHTK.to(self.mask.dtype), self.keys[layer][:, :, :stop], self.values[layer][:, :, :stop]
        if not self.shared:
            return F.scaled_dot_product_attention(q_RHTK, keys, values, attn_mask=self.mask, scale=scale)
        output_RHTK, total_RHT1 = self._attend_to_prompt(layer, q_RHTK, scale)
        scores_RHTC = torch.matmul(q_RHTK, keys.mT).mul_(scale).add_(self.mask)
        weights_RHTC = torch.cat([total_RHT1, scores_RHTC], -1).softmax(-1)
        return (weights_RHTC[..., :1] * output_RHTK + torch.matmul(weights_RHTC[..., 1:], values)).to(v_RHTK.dtype)

    def _keep(self, cache_RHCK: Tensor, new_RHTK: Tensor) -> None:
        """Write keys or values into the columns that the present pass reads."""
        new_RHTK = new_RHTK.to(cache_RHCK.dtype)
        if new_RHTK.shape[2] == 1:
            self._keep_column(cache_RHCK, new_RHTK)
        else:
            columns_RT = self.first + self.columns
            cache_RHCK.scatter_(2, columns_RT[:, None, :, None].expand_as(new_RHTK), new_RHTK)

    def _keep_column(self, cache_RHCK: Tensor, new_RH1K: Tensor) -> None:
        """Write keys or values into one column, which is the last that attention covers."""
        cache_RHCK[:, :, self.mask.shape[-1] - 1] = new_RH1K[:, :, 0]

    def _attend_to_prompt(self, layer: int, q_RHTK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The output of each token's attention to its prompt (R, H, T, K), and the log-sum-exp of the scores (R, H, T, 1)."""
        rows, heads, length, size = q_RHTK.shape
        groups = rows // self.copies
        keys_GHPK, values_GHPK = self.prompt.keys[layer], self.prompt.values[layer]
        # The tokens of all continuations of a prompt are the rows of one product.
        q_GHQK = q_RHTK.view(groups, self.copies, heads, length, size).transpose(1, 2).reshape(groups, heads, -1, size)
        scores_GHQP = torch.matmul(q_GHQK, keys_GHPK.float().mT).mul_(scale).add_(self.prompt.bias)
        total_GHQ1 = scores_GHQP.logsumexp(-1, keepdim=True)
        output_GHQK = torch.matmul(scores_GHQP.sub_(total_GHQ1).exp_().to(values_GHPK.dtype), values_GHPK)
        output_RHTK, total_RHT1 = (
            found.view(groups, heads, self.copies, length, -1).transpose(1, 2).reshape(rows, heads, length, -1)
            for found in (output_GHQK, total_GHQ1)
        )
        return output_RHTK, total_RHT1

    def advance(self, model: Decoder, tokens_RT: Tensor, image_positions_RT: Tensor, starts_R: Tensor) -> Tensor:
        """Read tokens of each row; the hidden state after each (R, T, D).

        Args:
            image_positions_RT: raster index of each token in its image, from 1; 0 for text.
            starts_R: the number of tokens of each row's continuation that precede these; all of them have been read. If each row reads
                one token, this is the same number for all rows.
        """
        self.place(starts_R, tokens_RT.shape[1])
        self.tokens.scatter_(1, 1 + self.columns, tokens_RT)
        previous_RT = self.tokens.gather(1, self.columns)
        return self._read(model, tokens_RT, image_positions_RT, self.lengths + self.columns, previous_RT)

    def place(self, starts_R: Tensor, length: int) -> None:
        """Set which columns the next pass reads, and what its tokens see: the prompt, earlier columns and themselves."""
        self.columns = starts_R[:, None] + torch.arange(length, device=starts_R.device)
        covered = torch.arange(self._covered(int(starts_R.max()) + length), device=starts_R.device)
        later_R1TC = covered > self.columns[:, None, :, None]
        own_R1TC = torch.zeros(later_R1TC.shape, dtype=self.bias.dtype, device=starts_R.device).masked_fill_(later_R1TC, -torch.inf)
        self.mask = torch.cat([self.bias.expand(-1, -1, length, -1), own_R1TC], -1)

    def _covered(self, length: int) -> int:
        """How many tokens of a continuation attention covers, of which ``length`` are read."""
        return length

    def _read(self, model: Decoder, tokens_RT: Tensor, image_positions_RT: Tensor, positions_RT: Tensor, previous_RT: Tensor) -> Tensor:
        return model(tokens_RT, image_positions_RT, self, positions_RT, previous_BT=previous_RT)


class CompiledDecodingCache(DecodingCache):
    """A :class:`DecodingCache` whose passes run compiled: on a GPU as one CUDA graph, instead of hundreds of kernels launched one by one.

    For that, shapes stay the same from pass to pass: with the prompt, attention covers a multiple of :data:`LENGTH_MULTIPLE` tokens, and
    the mask hides those that are not filled yet. The first pass of each shape takes as long as its compilation.
    """

    def __init__(self, prompt: PromptCache, copies: int, room: int) -> None:
        super().__init__(prompt, copies, room)
        for tensor in (*self.keys, *self.values, prompt.keys, prompt.values, prompt.bias):
            torch._dynamo.mark_static_address(tensor, guard=False)  # a CUDA graph would copy its inputs before each pass

    def _keep_column(self, cache_RHCK: Tensor, new_RH1K: Tensor) -> None:
        cache_RHCK.index_copy_(2, self.first + self.columns[0], new_RH1K)  # a number would be compiled into the pass

    def _covered(self, length: int) -> int:
        capacity = self.keys[0].shape[2]
        return min(_round_up(self.first + length, LENGTH_MULTIPLE), capacity) - self.first

    def _read(self, model: Decoder, tokens_RT: Tensor, image_positions_RT: Tensor, positions_RT: Tensor, previous_RT: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        read = _compiled_read(positions_RT.device.type)
        return read(
            model, tokens_RT, image_positions_RT, self, positions_RT, previous_RT
        ).clone()  # the next run overwrites a graph's output


def decoding_cache(model: Decoder, prompt: PromptCache, copies: int, room: int) -> DecodingCache:
    """The cache that a model decodes with; see ``Decoder.compiled_decoding``."""
    return (CompiledDecodingCache if model.compiled_decoding else DecodingCache)(prompt, copies, room)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _read(
    model: Decoder, tokens_RT: Tensor, image_positions_RT: Tensor, cache: DecodingCache, positions_RT: Tensor, previous_RT: Tensor
) -> Tensor:
    return model(tokens_RT, image_positions_RT, cache, positions_RT, previous_BT=previous_RT)


@functools.cache
def _compiled_read(device: str) -> Callable[[Decoder, Tensor, Tensor, DecodingCache, Tensor, Tensor], Tensor]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILED_SHAPES)
    return torch.compile(_read, dynamic=False, fullgraph=True, mode="reduce-overhead" if device == "cuda" else None)
