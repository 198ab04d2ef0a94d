"""Training in several processes: FSDP2 under ``torchrun``; one process is the same with nothing to agree on.

Every process draws the rows of the batch that are its own, computes their loss, and holds a shard of parameters, gradients and optimizer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cm3leon.config.schema import TrainConfig
from cm3leon.models.decoder import Decoder
from cm3leon.training.hardware import computes_bfloat16
from cm3leon.utils.device import default_device


@dataclass(frozen=True)
class World:
    """The processes of a run, this one's number among them, and its device."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def own(self, count: int) -> range:
        """Which of ``count`` rows are this process's: every ``size``-th, from ``rank``."""
        return range(self.rank, count, self.size)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, in float64."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def highest(self, value: int) -> int:
        """The highest of the processes' values."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor.item())

    def gather(self, value: Any) -> list[Any]:
        """Each process's JSON value, in order of rank."""
        if self.size == 1:
            return [value]
        data = json.dumps(value).encode()
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(data)
        dist.all_reduce(sizes := sizes.to(self.device))
        sent = torch.zeros(int(sizes.max()), dtype=torch.uint8, device=self.device)
        sent[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent)
        return [json.loads(bytes(part[:size].tolist())) for part, size in zip(received, sizes.tolist(), strict=True)]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def world() -> Iterator[World]:
    """The processes that ``torchrun`` started, connected (NCCL between GPUs, Gloo between CPUs); or this one alone.

    Yields:
        World: ended with the block.
    """
    device, size = default_device(), int(os.environ.get("WORLD_SIZE", "1"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        yield World(device=device)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


def shard(model: Decoder, config: TrainConfig, world: World) -> None:
    """Divide the parameters among the processes, block by block, in place; nothing to do for one process.

    Parameters and the sums of gradients are float32; what is gathered for a block's products is in the run's precision.
    """
    if world.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    compute = products_dtype(config, world.device)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; what a sharded model gathered is given back at the end."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        if hasattr(model, "reshard"):
            model.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor that shards make up, on every process; one that is not sharded, itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[object]:
    """Matrix products in the run's precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if products_dtype(config, device) == torch.bfloat16 else nullcontext()


def products_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Of matrix products: the run's precision, or what ``auto`` means on a device."""
    bf16 = computes_bfloat16(device) if config.precision == "auto" else config.precision == "bf16"
    return torch.bfloat16 if bf16 else torch.float32
