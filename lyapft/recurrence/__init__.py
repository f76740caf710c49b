"""The seam: the one place where a model's recurrence is routed to a kernel, made to carry adapters, shown to probes.

`install` gives each mixer *instance* of one model a forward that is its own code with other globals (`forward.py`):
the functions of its recurrence are the methods of `SelectiveScan`, `SSD` and `Convolution`, which know the layer,
choose a kernel and hand Δ and A to a tap. No modelling code is copied, another model of the class is untouched, and
`Seam.remove` deletes the one attribute that was added.

A recurrence of another kind needs one more class with a SCAN and its FUNCTIONS, and a line in `FAMILIES`.
"""

import torch
from torch import nn

from lyapft import scan
from lyapft.errors import InputError
from lyapft.recurrence.forward import FAMILIES, Forward, calls, family_of
from lyapft.recurrence.seam import INITIAL_STATE, KERNELS, STATE_OFFSET, Layer, Seam, Tap
from lyapft.scan import mamba_ssm, packing

__all__ = [
    "FAMILIES",
    "INITIAL_STATE",
    "KERNELS",
    "STATE_OFFSET",
    "Layer",
    "Seam",
    "Tap",
    "install",
    "packing",
    "resolve",
]

# recurrences that carry a state and have no class here: a function that the forward calls, or the name of the module
UNKNOWN_FUNCTIONS = (
    "torch_chunk_gated_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_kimi_delta_attention",
    "fused_recurrent_gated_delta_rule",
    "chunk_kda",
)
UNKNOWN_CLASSES = frozenset(
    {"RwkvSelfAttention", "RecurrentGemmaRglru", "xLSTMLayer", "MiniMaxLightningAttention", "Mamba3Mixer"}
)


def resolve(kernel: str, require: str | None, device_type: str) -> str:
    """The kernel that recurrences would run on a device ("cpu" or "cuda"), whatever the family.

    Whether that is the required one is for `install` to say: a model without a recurrence runs none.

    Raises:
        InputError: an unknown or unavailable kernel.
    """
    check_choice(kernel, require)
    return Seam(kernel).choose("any recurrence", torch.device(device_type))


def check_choice(kernel: str, require: str | None) -> None:
    """Refuse names that are no kernel, and a kernel that this machine cannot run.

    Raises:
        InputError: naming the field, what was given and what there is.
    """
    for field, value in (("kernel", kernel), ("kernel.require", require or "auto")):
        if value not in KERNELS:
            raise InputError(f"{field}={value!r} is unknown: choose one of {', '.join(KERNELS)}")
    reason = scan.available().get(kernel)
    if reason:
        raise InputError(f"kernel={kernel} cannot run here: {reason}. Use kernel=torch or kernel=auto")


def install(
    model: nn.Module, kernel: str = "auto", require: str | None = None, *, fused: bool = True, device: str | None = None
) -> Seam:
    """Route the recurrence of every mixer of this model through a kernel.

    Args:
        model: a transformers model, wrapped by peft or not.
        kernel: "auto" (the compiled kernel on a CPU, mamba-ssm's on CUDA, plain torch where that one is absent),
            "reference" (float64), "cpu", "torch", "mamba_ssm", or "stock" for the model's own functions everywhere.
        require: refuse, when it would run, any other kernel than this one.
        fused: let mamba-ssm do convolution, scan and output projection at once where it can.
        device: where the model will run, "cpu" or "cuda"; None: where it is.
    Returns:
        a Seam; without layers for a model that has no recurrence.
    Raises:
        InputError: an unknown or unavailable kernel; a mixer that already has a forward of its own.
    """
    check_choice(kernel, require)
    seam = Seam(kernel, require, fused, None if device is None else torch.device(device))
    for name, module in model.named_modules():
        family = family_of(module)
        if family is not None:
            if "forward" in module.__dict__:
                raise InputError(
                    f"layer {name} already has a forward of its own (a seam, or accelerate's hooks): remove it first"
                )
            seam.layers.append(Layer(name, family, module))
        elif type(module).__name__ in UNKNOWN_CLASSES or any(calls(module, n) for n in UNKNOWN_FUNCTIONS):
            seam.unknown.append(name)
    where = torch.device(device or next((p.device.type for p in model.parameters()), "cpu"))
    for family in {layer.family for layer in seam.layers}:
        seam.choose(family, where)
    for layer in seam.layers:
        layer.module.forward = Forward(layer, seam)
    return seam


def describe(device_type: str) -> dict[str, tuple[str, str | None]]:
    """Operation -> the kernel that kernel=auto runs on a kind of device, and why it is not the preferred one."""
    found = {}
    for operation in (*FAMILIES, "causal_conv1d"):
        reason = scan.available()["cpu"] if device_type == "cpu" else mamba_ssm.missing(operation, device_type)
        found[operation] = ("torch" if reason else "cpu" if device_type == "cpu" else "mamba_ssm", reason)
    return found
