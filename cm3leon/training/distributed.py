"""Training in several processes under ``torchrun``. A single process runs the same code, with no communication.

Every process computes the loss of its own rows of the batch. Of the decoder it holds a shard of the parameters, gradients and optimizer
states (FSDP2); of the smaller networks all of them, with gradients that are summed over the processes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cm3leon.training.precision import autocast_dtype
from cm3leon.utils.device import default_device
from cm3leon.utils.errors import UserError

if TYPE_CHECKING:
    from cm3leon.config.schema import TrainConfig


@dataclass(frozen=True)
class World:
    """The processes of a run: this one's rank, their number, and this one's device.

    They exchange numbers by Gloo, without waiting for what their GPUs are computing.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, in float64."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def max(self, value: int) -> int:
        """The maximum over the processes."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor.item())

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all processes, in order of rank."""
        if self.size == 1:
            return [value]
        # 1. Agree on the sizes: each process fills in its own of a vector of zeros, and the vectors are summed.
        data = json.dumps(value).encode()
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(data)
        dist.all_reduce(sizes)
        # 2. Exchange the bytes, padded to the longest: all_gather takes tensors of one size.
        sent = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        sent[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent)
        # 3. Remove the padding.
        return [json.loads(bytes(padded[:size].tolist())) for padded, size in zip(received, sizes.tolist(), strict=True)]

    def share(self, count: int) -> slice:
        """This process's part of ``count`` rows: consecutive ones, as evenly divided as can be.

        Raises:
            UserError: if there are fewer rows than processes.
        """
        if count < self.size:
            raise UserError(f"a batch of {count} cannot be divided among {self.size} processes: start fewer, or raise batch_size")
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def add(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place and on its device; returns it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def concatenate(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in order of rank; each may have another number of them."""
        if self.size == 1:
            return rows
        counts = self.gather(len(rows))
        sent = rows.new_zeros(max(counts), *rows.shape[1:])
        sent[: len(rows)] = rows
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent)
        return torch.cat([padded[:count] for padded, count in zip(received, counts, strict=True)])

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the values of the first one, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def wait(self) -> None:
        """Return when all processes have called this (a barrier)."""
        if self.size > 1:
            dist.barrier()


ALONE = World()
"""A single process on the CPU."""


@contextmanager
def world() -> Iterator[World]:
    """Connect the processes that ``torchrun`` started, by NCCL between GPUs and Gloo between CPUs; disconnects them at the end.

    Yields:
        World: of this process alone if there is no ``torchrun``.
    """
    device, size = default_device(), int(os.environ.get("WORLD_SIZE", "1"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        yield World(device=device)
        return
    # Gloo also with GPUs, for the tensors on CPUs that World and checkpoints exchange.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


def sum_gradients(parameters: Iterable[Tensor], world: World) -> None:
    """Sum the gradients, where there are any, over the processes, each of which has the whole network; in one message."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if world.size > 1 and gradients:
        summed = world.add(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, summed.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def shard(model: nn.Module, blocks: Iterable[nn.Module], config: TrainConfig, world: World) -> None:
    """Shard a model's parameters among the processes, in place (FSDP2); a single process keeps them whole.

    Parameters and gradient sums are float32; the parameters gathered to compute a block are in the run's precision.
    """
    if world.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    dtype = autocast_dtype(config, world.device)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # 1. Each block is a unit: its parameters are gathered just before it runs, and freed after it.
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # 2. What is left, the embeddings, stays gathered from the forward to the backward pass, which needs it first.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; a sharded model frees its gathered parameters at the end."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        sharded: Any = model
        if hasattr(model, "reshard"):
            sharded.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every process; all of them must call this. Other tensors are returned as they are."""
    sharded: Any = tensor  # a DTensor, whose module takes long to import, where there is more than one process
    return sharded.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Undo :func:`full_tensor`: this process's shard of ``tensor``, which all processes hold, sharded as ``parameter`` is."""
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = parameter
    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements, src_data_rank=None)
