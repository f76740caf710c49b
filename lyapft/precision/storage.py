"""Weights stored in half without float32 masters: which parameters stay in float32, and the one cast.

A step size or a decay rate that is rounded to half moves every token's state by that much, and a decay near 1 rounds to
exactly 1. So what sets the dynamics of a recurrence stays in float32: found by what it is called, the same in every
family of transformers, not by a list of models.
Source: mamba-ssm, README, "Precision": "SSMs are sensitive to their recurrent dynamics".
"""

from collections import Counter

import torch
from torch import nn

from lyapft.errors import InputError

DYNAMICS = ("A_log", "D", "dt_bias", "dt_proj.bias", "dt_proj_bias")
ADAPTED_STATE = ("initial_state", "state_offset")  # adapters that add to a state, by a part of their name


# path parts that peft and torch's parametrizations put around a parameter's own name
WRAPPED = frozenset({"base_layer", "parametrizations", "original", "0", "values"})


def pinned_as(name: str) -> str | None:
    """Which of the pinned kinds a parameter of this name is; None for all others.

    >>> pinned_as("backbone.layers.0.mixer.dt_proj.base_layer.bias"), pinned_as("layers.0.in_proj.weight")
    ('dt_proj.bias', None)
    >>> pinned_as("backbone.layers.0.mixer.parametrizations.A_log.0.values")
    'A_log'
    """
    parts = [part for part in name.split(".") if part not in WRAPPED]
    for kind in DYNAMICS:
        if parts[-1 - kind.count(".") :] == kind.split("."):
            return kind
    return next((kind for kind in ADAPTED_STATE if kind in parts), None)


def store_in(model: nn.Module, dtype: torch.dtype, *, pin: bool) -> dict[str, int]:
    """Round every parameter to the half format `dtype`, in place; those of a recurrence's dynamics stay if `pin`.

    Buffers keep their format: rotary frequencies and their like are not weights.

    Returns:
        how many parameter tensors stayed in float32, by kind.
    Raises:
        InputError: a weight beyond the largest number of the format.
    """
    stayed: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        kind = pinned_as(name) if pin else None
        if kind is not None:
            stayed[kind] += 1
        elif parameter.is_floating_point():
            rounded = parameter.detach().to(dtype)
            if not torch.equal(rounded.isfinite(), parameter.detach().isfinite()):
                raise InputError(f"{name} holds weights beyond {torch.finfo(dtype).max:g}: use precision=bf16_true")
            parameter.data = rounded
    return dict(stayed)
