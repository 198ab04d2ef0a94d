"""The processes of a run, which ``torchrun`` has started. A single process runs the same code, with no communication."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cm3leon.utils.device import default_device
from cm3leon.utils.errors import UserError

CPU_TIMEOUT = timedelta(days=1)
"""How long a process waits for another, which may be alone at work for hours: hashing a collection, or generating the longer texts."""
END_SECONDS = 5.0
"""More than torchrun takes to notice that a process has failed and to end the others."""


@dataclass(frozen=True)
class World:
    """The processes of a run: this one's rank, their number, and this one's device.

    They exchange numbers by Gloo, without waiting for what their GPUs are computing.

    Attributes:
        cpu_group: process group for tensors on CPUs, with a timeout of its own; None: the default group.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cpu_group: dist.ProcessGroup | None = None

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, in float64."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.cpu_group)
        return [float(value) for value in tensor.tolist()]

    def max(self, value: int) -> int:
        """The maximum over the processes."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, self.cpu_group)
        return int(tensor.item())

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all processes, in order of rank."""
        if self.size == 1:
            return [value]
        # 1. Agree on the sizes: each process fills in its own of a vector of zeros, and the vectors are summed.
        data = json.dumps(value).encode()
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(data)
        dist.all_reduce(sizes, group=self.cpu_group)
        # 2. Exchange the bytes, padded to the longest: all_gather takes tensors of one size.
        sent = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        sent[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent, self.cpu_group)
        # 3. Remove the padding.
        return [json.loads(bytes(padded[:size].tolist())) for padded, size in zip(received, sizes.tolist(), strict=True)]

    def part(self, count: int) -> slice:
        """This process's part of ``count`` rows: consecutive ones, as evenly divided as can be, perhaps none."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def share(self, count: int) -> slice:
        """:meth:`part` of a batch, of which every process needs a row.

        Raises:
            UserError: if there are fewer rows than processes.
        """
        if count < self.size:
            raise UserError(f"a batch of {count} cannot be divided among {self.size} processes: start fewer, or raise batch_size")
        return self.part(count)

    def add(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place and on its device; returns it."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self._group_of(tensor))
        return tensor

    def concatenate(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in order of rank; each may have another number of them."""
        if self.size == 1:
            return rows
        counts = self.gather(len(rows))
        sent = rows.new_zeros(max(counts), *rows.shape[1:])
        sent[: len(rows)] = rows
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent, self._group_of(sent))
        return torch.cat([padded[:count] for padded, count in zip(received, counts, strict=True)])

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the values of the first one, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0, self._group_of(tensor))

    def wait(self) -> None:
        """Return when all processes have called this (a barrier)."""
        if self.size > 1:
            dist.barrier(self.cpu_group)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process runs the block before the others do, for example to download what all of them read."""
        if self.rank > 0:
            self.wait()
        yield
        if self.rank == 0:
            self.wait()

    def _group_of(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self.cpu_group if tensor.device.type == "cpu" else None


ALONE = World()
"""A single process on the CPU."""


@contextmanager
def world() -> Iterator[World]:
    """Connect the processes that ``torchrun`` started, by NCCL between GPUs and Gloo between CPUs; disconnects them at the end.

    Where one fails it just ends, so that its error is not hidden until others end too, and these leave the last word to it.

    Yields:
        World: of this process alone if there is no ``torchrun``.
    """
    device, size = default_device(), int(os.environ.get("WORLD_SIZE", "1"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        yield World(device=device)
        return
    # 1. Connect. Python's own handler of Ctrl-C would not be called while torch waits for a process that has ended by it.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Gloo also with GPUs, for the tensors on CPUs that World and checkpoints exchange. NCCL, by which processes keep step, has the usual
    # limit of half an hour: a connection that hangs ends the run.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    processes = World(dist.get_rank(), size, device, dist.new_group(timeout=CPU_TIMEOUT, backend="gloo"))
    signal.signal(signal.SIGINT, handler)
    # 2. Disconnect. By NCCL that is a collective operation, to which the others may never come after a failure.
    try:
        yield processes
    except SystemExit:  # together, after an interruption
        dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if _is_lost_connection(error):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(END_SECONDS)
        raise
    dist.destroy_process_group()


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether another process ended, or the network failed: neither Gloo nor NCCL has a type of its own for that on all paths."""
    return any(name in str(error).lower() for name in ("gloo", "nccl"))
