"""Training in several processes (:mod:`cm3leon.utils.world`).

Every process computes the loss of its own rows of the batch. Of the decoder it holds a shard of the parameters, gradients and optimizer
states (FSDP2); of the smaller networks all of them, with gradients that are summed over the processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cm3leon.training.precision import autocast_dtype
from cm3leon.utils.world import World

if TYPE_CHECKING:
    from cm3leon.config.schema import TrainConfig


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
