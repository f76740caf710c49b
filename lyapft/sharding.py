"""Weights in parts: each process holds its share of every tensor, which is whole only in use (PyTorch's fully_shard).

Gradients and the optimizer's moments are shared out like their weights; only the numbers of a training live here, its
model and scores are those of whole weights.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lyapft import sensitivity


def share_out(model: nn.Module) -> None:
    """Give every process its part of the weights, block by block; gradients will be summed, not averaged."""
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for _, block in sensitivity.residual_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts; every process has to ask. One that is not sharded is given back.

    >>> whole(torch.ones(2))
    tensor([1., 1.])
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared_out(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, in the same parts as another of its shape."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def copy_weights(source: nn.Module, target: nn.Module | None) -> None:
    """Copy every parameter, whole, into an unsharded model of the same names; None only takes part in the gathering."""
    places = {} if target is None else dict(target.named_parameters())
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            value = whole(parameter)
            if target is not None:
                places[name].copy_(value)


def plain(states: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """States of optimizers with whole moments."""
    return [state | {"state": {i: _whole_all(own) for i, own in state["state"].items()}} for state in states]


def _whole_all(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: whole(value) if isinstance(value, Tensor) else value for key, value in state.items()}
