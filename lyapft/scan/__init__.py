"""Recurrence kernels: a float64 reference of each, compiled and plain-torch twins of it. Nothing here knows a model.

Letters: B batch, L tokens, D channels, N states, H heads, P head dim, G groups.

>>> import torch
>>> ones = torch.ones(1, 3, 1)
>>> y, state = selective_scan(ones, ones, torch.zeros(1, 1), ones, ones, kernel="torch")
>>> y.flatten().tolist()
[1.0, 2.0, 3.0]
"""

import importlib.util
from functools import cache, partial

import torch
from torch import Tensor

from lyapft.errors import InputError
from lyapft.scan import reference
from lyapft.scan.packing import begins
from lyapft.scan.ssd import CHUNK, chunked_ssd
from lyapft.scan.torch_scan import TorchSelectiveScan

KERNELS = ("reference", "cpu", "torch")


@cache
def available() -> dict[str, str | None]:
    """Kernel name -> None where it can run here, else why it cannot."""
    missing = None if importlib.util.find_spec("numba") else "numba is not installed: pip install numba"
    return {"reference": None, "cpu": missing, "torch": None}


def _check(kernel: str, shapes: dict[str, tuple[Tensor, tuple[int, ...]]], device: torch.device) -> None:
    if kernel not in KERNELS:
        raise InputError(f"kernel={kernel!r} is unknown: choose one of {', '.join(KERNELS)}")
    reason = available()[kernel]
    if reason:
        raise InputError(f"kernel={kernel} cannot run here: {reason}. Use kernel=torch.")
    if kernel == "cpu" and device.type != "cpu":
        raise InputError(f"kernel=cpu was given tensors on {device}: use kernel=torch, or move them to the CPU")
    empty = [name for name, (t, _) in shapes.items() if t.numel() == 0]
    if empty:
        raise InputError(f"{', '.join(empty)} empty: give at least one sequence, token, channel and state")
    wrong = [f"{name} has {tuple(t.shape)}, not {want}" for name, (t, want) in shapes.items() if tuple(t.shape) != want]
    if wrong:
        raise InputError("shapes do not fit: " + "; ".join(wrong))


def _check_sequence(sequence_BL: Tensor | None, batch: int, length: int) -> None:
    if sequence_BL is None:
        return
    if tuple(sequence_BL.shape) != (batch, length) or sequence_BL.is_floating_point():
        given = f"{sequence_BL.dtype} of shape {tuple(sequence_BL.shape)}"
        raise InputError(
            f"sequence_BL is {given}: give the integer index of each token's sequence, ({batch}, {length})"
        )


def selective_scan(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    initial_state_BDN: Tensor | None = None,
    *,
    sequence_BL: Tensor | None = None,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t u_t B_t;  y_t = Σ_n C_{t,n} h_{t,n}. No skip, no gate. Differentiable.

    Args:
        u_BLD: inputs. delta_BLD: step sizes after softplus, >= 0. A_DN: <= 0. B_BLN, C_BLN: input and output maps.
        initial_state_BDN: state before the first token, zero if None.
        sequence_BL: index of the sequence that each token belongs to, any integer: where it changes along a row the
            state starts anew from zero. The initial state is that of the first sequence. None: one sequence a row.
        kernel: "reference" (float64 loop), "cpu" (numba) or "torch".
    Returns:
        y_BLD and the state after the last token, in the dtype of u; computed in float32, by "reference" in float64.
    Raises:
        InputError: an unknown or unavailable kernel, shapes that do not fit, a sequence_BL of no integers.
    Source: Gu & Dao 2024, eq. 2 and §3.2.
    """
    batch, length, channels = u_BLD.shape
    states = A_DN.shape[-1]
    want = {
        "delta": (delta_BLD, (batch, length, channels)),
        "A": (A_DN, (channels, states)),
        "B": (B_BLN, (batch, length, states)),
        "C": (C_BLN, (batch, length, states)),
    }
    if initial_state_BDN is not None:
        want["initial_state"] = (initial_state_BDN, (batch, channels, states))
    _check_sequence(sequence_BL, batch, length)
    _check(kernel, want, u_BLD.device)
    inputs = (u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, initial_state_BDN)
    if kernel == "reference":
        y, last = reference.selective_scan(*inputs, sequence_BL)
    elif kernel == "torch":
        anew = None if sequence_BL is None else begins(sequence_BL)
        y, last = _without_autocast(lambda *given: TorchSelectiveScan.apply(*given, anew), u_BLD.device, *inputs)
    else:
        from lyapft.scan.cpu import FusedSelectiveScan  # needs numba

        u, delta, A, B, C, start = (None if t is None else t.float() for t in inputs)
        y, last, _ = FusedSelectiveScan.apply(u, delta, A, B, C, None, None, None, start, False, sequence_BL)
    return y.to(u_BLD.dtype), last.to(u_BLD.dtype)


def ssd(
    x_BLHP: Tensor,
    delta_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    initial_state_BHPN: Tensor | None = None,
    *,
    sequence_BL: Tensor | None = None,
    kernel: str,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_tᵀ;  y_t = h_t C_t per head. No skip, no gate. Differentiable.

    Args:
        x_BLHP: inputs. delta_BLH: step sizes after softplus and clamp, >= 0. A_H: <= 0. B_BLGN, C_BLGN: maps, shared by
            the H/G heads of a group. initial_state_BHPN: state before the first token, zero if None.
        sequence_BL: as in `selective_scan`.
        kernel: "reference" (float64 loop), "cpu" (numba) or "torch" (matrix products of chunks).
        chunk: tokens per chunk of "torch"; changes rounding and speed only.
    Returns:
        y_BLHP and the state after the last token, in the dtype of x; computed in float32, by "reference" in float64.
    Raises:
        InputError: an unknown or unavailable kernel, shapes that do not fit, a sequence_BL of no integers, chunk < 1.
    Source: Dao & Gu 2024, §3 and §6.
    """
    batch, length, heads, dim = x_BLHP.shape
    groups, states = B_BLGN.shape[-2:]
    want = {
        "delta": (delta_BLH, (batch, length, heads)),
        "A": (A_H, (heads,)),
        "B": (B_BLGN, (batch, length, groups, states)),
        "C": (C_BLGN, (batch, length, groups, states)),
    }
    if initial_state_BHPN is not None:
        want["initial_state"] = (initial_state_BHPN, (batch, heads, dim, states))
    _check_sequence(sequence_BL, batch, length)
    _check(kernel, want, x_BLHP.device)
    if heads % groups:
        raise InputError(f"{heads} heads cannot share {groups} groups of B and C: heads must be a multiple of groups")
    if chunk < 1:
        raise InputError(f"chunk={chunk}: give at least 1 token per chunk")
    inputs = (x_BLHP, delta_BLH, A_H, B_BLGN, C_BLGN, initial_state_BHPN)
    if kernel == "reference":
        y, last = reference.ssd(*inputs, sequence_BL)
    elif kernel == "torch":
        anew = None if sequence_BL is None else begins(sequence_BL)
        y, last = _without_autocast(partial(chunked_ssd, chunk=chunk, begins_BL=anew), x_BLHP.device, *inputs)
    else:
        from lyapft.scan.ssd_cpu import FusedSSD  # needs numba

        x, delta, A, B, C, start = (None if t is None else t.float() for t in inputs)
        y, last = FusedSSD.apply(x, delta, A, B, C, None, start, sequence_BL)
    return y.to(x_BLHP.dtype), last.to(x_BLHP.dtype)


def _without_autocast(function, device: torch.device, *inputs):  # type: ignore[no-untyped-def]
    """Calls function with all inputs in the widest of float32 and their own format, autocast off."""
    dtype = torch.promote_types(torch.float32, inputs[0].dtype)
    with torch.autocast(device.type, enabled=False):
        return function(*(None if tensor is None else tensor.to(dtype) for tensor in inputs))
