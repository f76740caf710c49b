"""mamba-ssm on a CPU: its real Python and Triton code, the compiled extensions alone replaced.

Triton kernels (SSD, the fused Mamba-2 training kernel, state updates, both with backward) run in Triton's interpreter.
`selective_scan_cuda` and `causal_conv1d_cuda`, which exist as CUDA binaries only, get stand-ins with their signatures
that compute from the arguments they are given and from nothing else: what a caller does not pass, they cannot see.

Call `install` before anything imports mamba_ssm or transformers, in a process of its own. Slow: for tests of what is
called with what, never for speed.

Letters: B batch, L tokens, D channels, N states, K taps.
"""

import contextlib
import importlib.machinery
import os
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def install() -> None:
    """Make mamba_ssm and causal_conv1d importable and runnable on a CPU."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime.autotuner import Autotuner

    Autotuner.run = _first_configuration  # timing needs a driver
    torch.cuda.device = lambda *_: contextlib.nullcontext()  # type: ignore[assignment,misc]
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=2)  # type: ignore
    _module("selective_scan_cuda", fwd=scan_forward, bwd=scan_backward)
    _module("causal_conv1d", causal_conv1d_fn=causal_conv1d_fn, causal_conv1d_update=causal_conv1d_update)
    _module(
        "causal_conv1d.cpp_functions",
        causal_conv1d_fwd_function=convolution_forward,
        causal_conv1d_bwd_function=convolution_backward,
        causal_conv1d_update_function=None,
    )


def _module(name: str, **members: Any) -> None:
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(sys.modules[name]).update(members)


def _first_configuration(self: Any, *args: Any, **kwargs: Any) -> Any:
    config = self.best_config = self.configs[-1]
    self.nargs = dict(zip(self.arg_names, args, strict=False))
    if config.pre_hook:
        config.pre_hook({**self.nargs, **kwargs, **config.kwargs})
    return self.fn.run(*args, **kwargs, **config.kwargs)


def _scan(u, delta, A, B, C, D, delta_bias, softplus):  # type: ignore[no-untyped-def]
    """Ungated (B,D,L) output and last state (B,D,N); B and C (B,1,N,L)."""
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if softplus:
        delta = F.softplus(delta)
    state, outputs = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        state = torch.exp(delta[..., t, None] * A) * state + (delta * u)[..., t, None] * B[:, :, :, t]
        outputs.append((state * C[:, :, :, t]).sum(-1))
    y = torch.stack(outputs, -1)
    return (y if D is None else y + u * D[:, None]), state


def scan_forward(u, delta, A, B, C, D, z, delta_bias, softplus):  # type: ignore[no-untyped-def]
    """(out, states at chunk ends (B,D,1,2N) with the state at odd places, gated out if z)."""
    with torch.no_grad():
        y, state = _scan(u, delta, A, B, C, D, delta_bias, softplus)
    ends = torch.stack([torch.zeros_like(state), state], -1).flatten(-2)[:, :, None]
    return (y, ends) if z is None else (y, ends, y * F.silu(z))


def scan_backward(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, softplus, recompute):  # type: ignore
    """Gradients of u, Δ, A, B, C, D, bias, then of z and the gated output if z."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in (u, delta, A, B, C, D, delta_bias, z)]
    with torch.enable_grad():
        y, _ = _scan(*inputs[:7], softplus)
        y = y if z is None else y * F.silu(inputs[7])
        wanted = [t for t in inputs if t is not None]
        found = iter(torch.autograd.grad(y, wanted, dout))
    gradients = [None if t is None else next(found) for t in inputs]
    if z is None:
        return gradients[:7]
    if dz is not None:
        dz.copy_(gradients[7])
    return [*gradients[:7], gradients[7] if dz is None else dz, *([y.detach()] if recompute else [])]


def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx=None, activation=None, **_: Any):
    """(B,D,L) -> (B,D,L); taps do not reach over a change of seq_idx (B,L)."""
    y, taps = x * weight[:, -1:], weight.shape[1]
    for back in range(1, taps):
        earlier = x[..., :-back]
        if seq_idx is not None:
            earlier = earlier * (seq_idx[:, back:] == seq_idx[:, :-back])[:, None]
        y = y + F.pad(earlier * weight[:, -1 - back, None], (back, 0))
    y = y if bias is None else y + bias[:, None]
    return F.silu(y) if activation in ("silu", "swish") else y


def causal_conv1d_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias=None, activation=None) -> Tensor:
    """One token, (B,D,1); the state (B,D,K) changes in place."""
    conv_state.copy_(torch.cat([conv_state, x], -1)[..., -conv_state.shape[-1] :])
    y = (conv_state[..., -weight.shape[1] :] * weight).sum(-1, keepdim=True)
    y = y if bias is None else y + bias[:, None]
    return F.silu(y) if activation in ("silu", "swish") else y


def convolution_forward(x, weight, bias, seq_idx, initial_states, final_states_out, silu):  # type: ignore
    """causal_conv1d.cpp_functions.causal_conv1d_fwd_function."""
    return causal_conv1d_fn(x, weight, bias, seq_idx, "silu" if silu else None)


def convolution_backward(x, weight, bias, dout, seq_idx, initial, dfinal, dx, return_dinitial, silu):  # type: ignore
    """causal_conv1d.cpp_functions.causal_conv1d_bwd_function."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    with torch.enable_grad():
        y = causal_conv1d_fn(*inputs, seq_idx, "silu" if silu else None)
        found = iter(torch.autograd.grad(y, [t for t in inputs if t is not None], dout))
    gradients = [None if t is None else next(found) for t in inputs]
    if dx is not None:
        dx.copy_(gradients[0])
    return gradients[0] if dx is None else dx, gradients[1], gradients[2], None
