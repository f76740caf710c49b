"""Weights in parts: each process holds its share of every tensor.

Fully sharded (PyTorch's `fully_shard`), a tensor is whole only in use, and each process has rows of its own. Tensor
parallel (`parallelize_module`, by the plan that transformers has for a family), a layer is never whole: some processes
compute a part of it each, on the same rows, and add up what they found. Gradients and the optimizer's moments are
shared out like their weights; only the numbers of a training live here, its model and scores are of whole weights.
"""

from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel

from lyapft import sensitivity

STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}  # of a plan: by outputs, by inputs
FACTORS = {"colwise": "lora_B", "rowwise": "lora_A"}  # which of LoRA's two has the dimension that is split


def share_out(model: PreTrainedModel, tensor_parallel: int = 1) -> None:
    """Give every process its part of the weights; gradients will be summed, not averaged.

    Args:
        tensor_parallel: processes that compute each layer together; the others share its weights out block by block.
    """
    device, processes = next(model.parameters()).device.type, dist.get_world_size()
    names = ("data", "tensor")
    mesh = init_device_mesh(device, (processes // tensor_parallel, tensor_parallel), mesh_dim_names=names)
    if tensor_parallel > 1:
        parallelize_module(model, mesh["tensor"], dict(_styles(model)))
    if tensor_parallel < processes:
        _fully_shard(model, mesh["data"])


def _fully_shard(model: nn.Module, mesh: DeviceMesh) -> None:
    for _, block in sensitivity.residual_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def tensor_faults(model: PreTrainedModel, tensor_parallel: int) -> list[str]:
    """Why the layers of a model cannot be split over so many processes."""
    config = model.config
    if not getattr(config, "base_model_tp_plan", None):
        why = ": the projections of a recurrence stack unlike parts" * bool(getattr(config, "state_size", None))
        return [f"transformers has no tensor-parallel plan for {config.model_type} models{why}"]
    layers = list(planned(model))
    found = [
        f"the plan of {config.model_type} wants {style} for {name}" for name, _, style in layers if style not in STYLES
    ]
    if found:
        return found[:1]
    heads = {key: getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads")}
    sizes = {key: value for key, value in heads.items() if value}
    for name, layer, style in layers:
        sizes[name] = cast(Tensor, layer.weight).shape[0 if style == "colwise" else 1]
    return [
        f"{key}={size} is no multiple of {tensor_parallel}" for key, size in sizes.items() if size % tensor_parallel
    ][:1]


def planned(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, str]]:
    """Every layer that transformers' plan for a model names, and how it is split: its name, itself, its style."""
    for name, layer in model.named_modules():
        for pattern, style in model.config.base_model_tp_plan.items():
            if fnmatch(name, f"{model.base_model_prefix}.{pattern}"):
                yield name, layer, style


def _styles(model: PreTrainedModel) -> Iterator[tuple[str, ParallelStyle]]:
    """How each layer is split, and, of one that has an adapter, which of its factors goes with it."""
    for name, layer, style in planned(model):
        if not hasattr(layer, "base_layer"):
            yield name, STYLES[style]()
            continue
        yield f"{name}.base_layer", STYLES[style]()
        yield f"{name}.{FACTORS[style]}.default", STYLES[style]()


def kin(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors in groups that are in parts over the same processes: one operation on many takes no others together."""
    groups: dict[DeviceMesh | None, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(groups.values())


def apart(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of an optimizer, each with parameters of one kin."""
    return [group | {"params": own} for group in groups for own in kin(group["params"])]


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients as one vector, in float32.

    >>> total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
    tensor(5.)
    """
    norms = [whole(nn.utils.get_total_norm([g.float() for g in own])) for own in kin(gradients)]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


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
