"""Batches of training samples: which samples a step trains on, and in which parts they are computed.

Two streams with one interface: of :class:`SampleStream` a step is a number of samples, of :class:`TokenStream` a budget of tokens, which
accelerators need. Samples follow one another in one row, without padding and without attention between them. They come in random order:
batches sorted by length hold like tasks and like scenes, and relations are learned later from them (docs/log.md).
The samples of a step do not depend on the number of processes. Each process makes all of them and computes its share (:func:`share_of`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cm3leon.data.epochs import Epochs, Weights
from cm3leon.data.sequences import Sample
from cm3leon.sequence.grammar import PAD
from cm3leon.utils.device import copied_to
from cm3leon.utils.errors import UserError

GetSample = Callable[[int, int], Sample]
"""``get_sample(epoch, index)`` returns a sample; the same arguments give the same sample. With a weight other than 1, ``epoch`` is how
often the sample was seen before."""


@dataclass(frozen=True)
class Batch:
    """Tokens that are computed at once: one row of packed samples, or rows padded on the right.

    Attributes:
        tokens: (B, T) int64, token ids.
        weights: (B, T) float32, weight of each token as a target of the loss; 0 where it is none.
        image_positions: (B, T) int64, raster index of each token in its image, from 1; 0 for tokens of no image.
        tasks: (B, T) int64, number of the task of each token's sample, 0 for none.
        targets: (N,) int64, the tokens of weight above 0, as indices into the flattened rows; never the first of a sample.
        positions: of packed samples (1, T) int64, the position of each token in its sample.
        cu_seqlens: of packed samples (samples + 1,) int32, where each begins, and where the last ends.
    """

    tokens: Tensor
    weights: Tensor
    image_positions: Tensor
    tasks: Tensor
    targets: Tensor
    positions: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @classmethod
    def of_tokens(cls, tokens_BT: Tensor, image_positions_BT: Tensor | None = None) -> Batch:
        """Unpadded rows of which every token but the first is a target of weight 1."""
        weights_BT = torch.ones(tokens_BT.shape, device=tokens_BT.device)
        weights_BT[:, 0] = 0
        zeros_BT = torch.zeros_like(tokens_BT)
        image_positions_BT = zeros_BT if image_positions_BT is None else image_positions_BT
        return cls(tokens_BT, weights_BT, image_positions_BT, zeros_BT, weights_BT.flatten().nonzero()[:, 0])

    def to(self, device: torch.device) -> Batch:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: None if value is None else copied_to(value, device) for name, value in given.items()}
        return Batch(**moved)

    def filled_up(self, multiple: int) -> Batch:
        """The same samples and one of padding after them, so that the numbers of tokens and of targets are multiples of ``multiple``.

        The targets added are its last token, which has no weight, and no token of a sample sees the padding.
        """
        assert self.cu_seqlens is not None
        length = self.tokens.shape[1]
        missing = multiple - length % multiple  # at least one, which the targets added are
        rows = {name: F.pad(getattr(self, name), (0, missing)) for name in ("tokens", "weights", "image_positions", "tasks", "positions")}
        targets = F.pad(self.targets, (0, -len(self.targets) % multiple), value=length + missing - 1)
        return Batch(**rows, targets=targets, cu_seqlens=F.pad(self.cu_seqlens, (0, 1), value=length + missing))

    def without_targets(self) -> Batch:
        """The same tokens as no part of the loss: for a process that has nothing left to compute while others have."""
        return replace(self, weights=torch.zeros_like(self.weights), targets=self.targets[:0])


def length_of(sample: Sample) -> int:
    """Tokens of a sample."""
    return len(sample.masked.tokens)


def collate(samples: Sequence[Sample]) -> Batch:
    """One sample per row, padded to the longest, by which :func:`pack` is checked. The opening ``<eos>`` is never a target."""
    length = max(map(length_of, samples))
    return _fill(samples, [row * length for row in range(len(samples))], (len(samples), length))


def pack(samples: Sequence[Sample]) -> Batch:
    """One row in which samples follow one another. The opening ``<eos>`` of each is never a target."""
    cu_seqlens = np.cumsum([0, *map(length_of, samples)])
    batch = _fill(samples, cu_seqlens[:-1].tolist(), (1, int(cu_seqlens[-1])))
    positions = torch.arange(batch.tokens.shape[1]) - torch.from_numpy(np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens)))
    return replace(batch, positions=positions[None], cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)))


def _fill(samples: Sequence[Sample], starts: Sequence[int], shape: tuple[int, int]) -> Batch:
    """A batch of ``shape`` with each sample at its start in the flattened rows, and padding elsewhere."""
    tokens, image_positions, tasks = (np.full(shape, value, dtype=np.int64) for value in (PAD, 0, 0))
    weights = np.zeros(shape, dtype=np.float32)
    for start, (masked, weight, _, task) in zip(starts, samples, strict=True):
        part = slice(start, start + len(masked.tokens))
        tokens.flat[part], weights.flat[part], image_positions.flat[part] = masked.tokens, weight, masked.image_positions
        weights.flat[start], tasks.flat[part] = 0, task
    arrays = (tokens, weights, image_positions, tasks, np.flatnonzero(weights))
    return Batch(*(torch.from_numpy(array) for array in arrays))


class Stream(Protocol):
    """The samples of an endless sequence of shuffled epochs.

    Attributes:
        batch_size: samples of a step, or rows of tokens.
    """

    batch_size: int

    def samples(self, step: int) -> list[Sample]:
        """The samples of a step."""

    def divide(self, samples: Sequence[Sample], processes: int, most: int | None) -> list[list[list[Sample]]]:
        """The micro-batches of each process, equally many: as few as the limit allows. Some may be empty.

        Args:
            most: size of a micro-batch, samples or rows, to which packing may add a row; None: no limit.
        """

    def state(self) -> dict[str, int]:
        """The state from which to resume."""

    def load_state(self, state: dict[str, int]) -> None:
        """Resume from :meth:`state`."""


@dataclass(frozen=True)
class Share:
    """A process's part of a step, and counts over all processes.

    Attributes:
        micro_batches: as many as every process has.
        weight: sum of the weights of all targets.
        tokens: number of tokens.
        length: of a token's sample, tokens, on average over the tokens.
    """

    micro_batches: list[Batch]
    weight: float
    tokens: int
    length: float


def share_of(stream: Stream, step: int, rank: int, processes: int, most: int | None) -> Share:
    """The part of a step that process ``rank`` of ``processes`` computes; see :meth:`Stream.divide`."""
    samples = stream.samples(step)
    parts = stream.divide(samples, processes, most)[rank]
    # 1. A process that has fewer micro-batches than others computes its first again, without targets: each needs the shards of the others.
    own = [pack(part) for part in parts if part]
    own += [own[0].without_targets()] * (len(parts) - len(own))
    # 2. Every process makes all samples of a step, so that nothing needs to be exchanged. An opening token is never a target.
    lengths = [length_of(sample) for sample in samples]
    weight = sum(float(sample.weights[1:].sum(dtype=np.float64)) for sample in samples)
    return Share(own, weight, sum(lengths), sum(length**2 for length in lengths) / sum(lengths))


class _Samples:
    """The samples of endless epochs, whose orders derive from (seed, epoch)."""

    def __init__(self, get_sample: GetSample, size: int, seed: int, weights: Weights | None) -> None:
        if size < 1:
            raise ValueError("there are no samples to train on")
        self.get_sample, self.epochs = get_sample, Epochs(weights or Weights.equal(size), seed, 1)

    def __getitem__(self, position: int) -> Sample:
        seen = self.epochs[position]
        return self.get_sample(seen.earlier, seen.row)


class SampleStream:
    """A step is ``batch_size`` samples. They depend on ``(seed, step)`` alone: steps can be asked for in any order.

    Args:
        size: number of samples.
        weights: of the samples; None: each is seen once in an epoch.
    """

    def __init__(self, get_sample: GetSample, size: int, batch_size: int, seed: int, weights: Weights | None = None) -> None:
        self.batch_size = batch_size
        self._samples = _Samples(get_sample, size, seed, weights)

    def __call__(self, step: int) -> Batch:
        """All samples of a step."""
        return pack(self.samples(step))

    def samples(self, step: int) -> list[Sample]:
        return [self._samples[position] for position in range(step * self.batch_size, (step + 1) * self.batch_size)]

    def divide(self, samples: Sequence[Sample], processes: int, most: int | None) -> list[list[list[Sample]]]:
        """See :meth:`Stream.divide`: the samples are dealt to the processes in turn."""
        share = -(-len(samples) // processes)
        size = most or share
        own = [samples[rank::processes] for rank in range(processes)]
        return [[list(mine[start : start + size]) for start in range(0, share, size)] for mine in own]

    def state(self) -> dict[str, int]:
        return {}

    def load_state(self, state: dict[str, int]) -> None:
        pass


class TokenStream:
    """A step is a budget of ``batch_size * length`` tokens, spent on whole samples; what it leaves is added to the next one's.

    Over many steps exactly that many tokens a step are trained on, none of them padding; no sample is cut or lost. Steps must be asked for
    in order.

    Args:
        size, weights: see :class:`SampleStream`.
        length: at least that of the longest sample.
    """

    def __init__(self, get_sample: GetSample, size: int, batch_size: int, seed: int, length: int, weights: Weights | None = None) -> None:
        self.batch_size, self.length = batch_size, length
        self._samples = _Samples(get_sample, size, seed, weights)
        self._read = self._left = 0  # samples read, and tokens left of the budget
        self._next: Sample | None = None  # the one that did not fit in them

    def samples(self, step: int) -> list[Sample]:
        self._left += self.batch_size * self.length
        taken: list[Sample] = []
        while True:
            sample = self._next or self._samples[self._read]
            if length_of(sample) > self.length:
                raise ValueError(f"a sample of {length_of(sample)} tokens does not fit in rows of {self.length}")
            if length_of(sample) > self._left:
                self._next = sample
                return taken
            taken.append(sample)
            self._read, self._left, self._next = self._read + 1, self._left - length_of(sample), None

    def divide(self, samples: Sequence[Sample], processes: int, most: int | None) -> list[list[list[Sample]]]:
        """See :meth:`Stream.divide`: micro-batches of nearly equal numbers of tokens, at most ``(most + 1) * length``.

        On average they have ``most * length``: whole samples fill no limit exactly, and at that limit another one would be needed.
        """
        # A step may have a sample more than its budget. Of parts that are filled from the longest sample on, none is longer than the mean
        # by as much as a sample.
        rounds = 1
        if most is not None:
            rounds = max(1, -(-(sum(map(length_of, samples)) - self.length) // (most * self.length * processes)))
        parts = _divide(samples, rounds * processes)
        return [parts[rank::processes] for rank in range(processes)]

    def state(self) -> dict[str, int]:
        return {"read": self._read, "left": self._left}

    def load_state(self, state: dict[str, int]) -> None:
        if not state:
            raise UserError("the checkpoint is of a run without packing, whose position in the data it does not have: set packing to false")
        self._read, self._left, self._next = state["read"], state["left"], None


def _divide(samples: Sequence[Sample], parts: int) -> list[list[Sample]]:
    """Divide samples into parts of nearly equal numbers of tokens: each, from the longest on, goes to the part with the fewest."""
    heap: list[tuple[int, int]] = [(0, part) for part in range(parts)]
    divided: list[list[Sample]] = [[] for _ in range(parts)]
    for sample in sorted(samples, key=length_of, reverse=True):
        tokens, part = heapq.heappop(heap)
        divided[part].append(sample)
        heapq.heappush(heap, (tokens + length_of(sample), part))
    return divided
