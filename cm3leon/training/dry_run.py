"""The memory that a training step takes on a GPU, found by a dry run: the trainer's own code on tensors without memory.

PyTorch's fake tensors have shapes and no values; the bytes that would be allocated are counted as operators make tensors and drop them. The
tests compare the count with PyTorch's own record of what a step allocates on a CPU. It has not been compared with a GPU's memory, on which
convolutions need workspaces too: hence :data:`cm3leon.training.memory_limit.USABLE`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cm3leon.training import memory_limit
from cm3leon.utils.world import World


class HasMicroBatches(Protocol):
    """A section of the parameters whose step can be computed in parts."""

    @property
    def batch_size(self) -> int: ...
    @property
    def micro_batch_size(self) -> int | None: ...
    def model_copy(self, *, update: dict[str, Any]) -> Any: ...


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one GPU at the peak of a step.

    Attributes:
        held: throughout: weights, also of networks that are not trained, and optimizer states.
        computed: gradients, activations, and what the operators need beside them.
    """

    held: float
    computed: float

    @property
    def total(self) -> float:
        return self.held + self.computed


class DryWorld(World):
    """The first of several processes, without the others: what would come from them has the right shape."""

    def add(self, tensor: Tensor) -> Tensor:
        return tensor

    def concatenate(self, rows: Tensor) -> Tensor:
        return rows.repeat(self.size, *[1] * (rows.ndim - 1))

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        pass


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators allocate, as long as a tensor uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes())
        return result

    def _change(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def measure(backward: Callable[[], object], trained: Iterable[Tensor], held: Iterable[Tensor]) -> StepMemory:
    """The memory of a step.

    Args:
        backward: computes all gradients, on inputs that it makes with ``torch.empty``.
        trained: the parameters that get them.
        held: these, optimizer states, and the weights of other networks.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), AllocatedBytes() as allocated:
        backward()
    # The update follows when the activations are gone. It takes the gradients, and at most twice as much: to sum them over the processes,
    # or for the optimizer's intermediate results.
    update = 3 * sum(parameter.nbytes for parameter in trained)
    return StepMemory(sum(tensor.nbytes for tensor in held), max(allocated.peak, update))


def on_a_gpu(config: Any) -> Any:
    """The parameters, with the precision that ``auto`` stands for on a GPU."""
    return config.model_copy(update={"precision": "fp32" if config.precision == "fp32" else "bf16"})


def micro_batch(section: HasMicroBatches, processes: int) -> int:
    """Rows of a batch that the busiest process computes at once: its micro-batch."""
    share = -(-section.batch_size // processes)
    return min(section.micro_batch_size or share, share)


def needs_whole_batch(section: Any) -> bool:
    """Whether a step cannot be computed in parts: a resnet of the encoder normalizes by the whole batch."""
    return getattr(section, "image_tower", None) == "resnet"


def largest_that_fits(section: HasMicroBatches, processes: int, memory_of: Callable[[Any, int], StepMemory], usable: float) -> int | None:
    """The largest micro-batch whose step fits, found by halving the present one; None if not even one row does, or it needs the whole."""
    rows = 0 if needs_whole_batch(section) else micro_batch(section, processes)
    while rows >= 1:
        if memory_of(section.model_copy(update={"micro_batch_size": rows}), processes).total <= usable:
            return rows
        rows //= 2
    return None


def refuse_too_large(stage: str, section: HasMicroBatches, memory_of: Callable[[Any, int], StepMemory], world: World) -> None:
    """Refuse a stage whose step does not fit the GPU; see :func:`~cm3leon.training.memory_limit.refuse_too_large`."""

    def change(usable: float) -> str:
        rows = largest_that_fits(section, world.size, memory_of, usable)
        if needs_whole_batch(section):
            return f"lower {stage}.batch_size, or set {stage}.image_tower=vit, whose batches are computed in parts"
        return f"set {stage}.micro_batch_size={rows}" if rows else f"no {stage}.micro_batch_size fits, so make the network smaller"

    memory_limit.refuse_too_large(stage, world.device, lambda: memory_of(section, world.size).total, change)
