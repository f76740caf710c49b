"""Mamba-1's recurrence, routed: what MambaMixer and its kin call.

Letters: B batch, L tokens, D channels, N states per channel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lyapft import scan
from lyapft.recurrence.halves import same
from lyapft.recurrence.operations import Operations, Token
from lyapft.recurrence.seam import INITIAL_STATE, STATE_OFFSET
from lyapft.scan import mamba_ssm, packing

if TYPE_CHECKING:
    from lyapft.recurrence.forward import Forward

FAMILY = "selective_scan"


class SelectiveScan(Operations):
    """Whole sequences, the fused short-cut and one token after a cache; the signatures are transformers'."""

    SCAN = "mamba_selective_scan"
    FUNCTIONS = {SCAN: "scan", "mamba_inner_fn": "fused", "mamba_selective_state_update": "update"}

    def __init__(self, call: Forward, stock: dict[str, Any]) -> None:
        super().__init__(call, stock)
        self._heads: list[tuple[Tensor, Tensor]] = []  # of a mixer that calls the scan once per head (Zamba)

    @torch.compiler.disable
    def scan(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **options: Any,
    ) -> Any:
        """(B,D,L) in and out, B and C (B,N,L); float32 whatever autocast says, result in the dtype of the input."""
        seam, initial = self.call.seam, self._tuned(INITIAL_STATE)
        kernel = self._kernel(hidden_states, initial)
        seam.record(FAMILY, kernel)
        if initial is not None and self.call.mask is not None:  # padding must not wear the first state down
            dt = step_sizes(dt.transpose(1, 2), delta_bias, delta_softplus) * self.call.mask[..., None]
            dt, delta_bias, delta_softplus = dt.transpose(1, 2), None, False
        if seam.input_tap is not None:
            delta = step_sizes(dt.transpose(1, 2), delta_bias, delta_softplus)
            seam.input_tap(self.call.layer, hidden_states.transpose(1, 2), delta, A, B.transpose(1, 2))
        if z is not None and self.call.gate is not None and same(z, self.call.gate):
            z = self.call.gate  # the same numbers, whose gradient is joined with the convolution's by rows
        given = (hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus)
        if kernel == "stock":
            self._show(dt, delta_bias, delta_softplus, A)
            stock = self._stock[self.SCAN]
            options |= {"D": D, "z": z, "delta_bias": delta_bias, "delta_softplus": delta_softplus}
            result = stock(hidden_states, dt, A, B, C, **options, return_last_state=True)
        elif kernel == "mamba_ssm":
            self._show(dt, delta_bias, delta_softplus, A)
            result = _cuda(*given, seam.sequence)
        else:
            start = None if initial is None else initial.expand(hidden_states.shape[0], -1, -1)
            y, last, delta = _ours(kernel, *given, start, seam.sequence)
            self._shown(delta, A)
            result = y, last
        y, last = result
        y = self._offset(y, C.transpose(1, 2), z)
        return (y, last) if return_last_state else y

    @torch.compiler.disable
    def fused(
        self,
        xz: Tensor,
        conv1d_weight: Tensor,
        conv1d_bias: Tensor | None,
        x_proj_weight: Tensor,
        delta_proj_weight: Tensor,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        A: Tensor,
        B: Tensor | None = None,
        C: Tensor | None = None,
        D: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = True,
        **norms: Any,
    ) -> Tensor | None:
        """Convolution, projections, scan and output projection by one kernel; None: go on unfused, nothing was done."""
        seam = self.call.seam
        kernel = seam.choose(FAMILY, xz.device)
        if kernel not in ("mamba_ssm", "stock") or not seam.fused:
            return None
        reason = seam.apart(self.call.layer, self.call.mask) or mamba_ssm.missing("causal_conv1d", xz.device.type)
        if seam.sequence is not None:
            reason = "the fused kernel cannot keep packed sequences apart"
        elif kernel == "mamba_ssm" and norms.get("dt_rms_weight") is not None:
            reason = "the fused kernel normalises dt behind dt_proj, the model in front of it: another function"
        if reason is not None:
            if kernel == "mamba_ssm":
                seam.unfused(FAMILY, reason)
            return None
        stock = self._stock["mamba_inner_fn"]
        function = mamba_ssm.function("mamba_inner_fn") if kernel == "mamba_ssm" else stock
        projections = (conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight)
        options = {"delta_bias": delta_bias, "delta_softplus": delta_softplus, **norms}
        y = function(xz, *projections, out_proj_weight, out_proj_bias, A, B, C, D, **options)
        if y is not None:
            seam.record(FAMILY, f"{kernel}-fused")
            seam.record("causal_conv1d", f"{kernel}-fused")
            if seam.watched():
                dt = _fused_time_steps(xz, *projections, norms.get("dt_rms_weight"), norms.get("b_c_dt_rms_eps", 1e-6))
                self._show(dt, delta_bias, delta_softplus, A)
        return y

    @torch.compiler.disable
    def update(self, *arguments: Any, **options: Any) -> Tensor:
        """One token after a cache: (B,D) in and out; the state (B,D,N) changes in place."""
        take = self._one_token(FAMILY, "mamba_selective_state_update", "selective_state_update", _token_in_float64)
        y = take(*arguments, **options)
        gate = options.get("z")
        return self._offset(y[..., None], arguments[5][:, None], None if gate is None else gate[..., None])[..., 0]

    def _kernel(self, x: Tensor, initial: Tensor | None) -> str:
        seam = self.call.seam
        kernel = seam.choose(FAMILY, x.device)
        if kernel == "cpu" and x.dtype == torch.float64:
            return seam.instead(FAMILY, "torch", "that kernel is float32 and the model is float64")
        if kernel in ("mamba_ssm", "stock") and initial is not None:
            return seam.instead(FAMILY, "torch", f"kernel {kernel} cannot begin with a state of its own")
        if kernel == "stock" and seam.sequence is not None:
            return seam.instead(FAMILY, "torch", "transformers' own scan cannot keep packed sequences apart")
        return kernel

    def _offset(self, y_BDL: Tensor, C_BLN: Tensor, z_BDL: Tensor | None) -> Tensor:
        """y + (C h') silu(z): what a tuned offset h' of the state adds (Kang et al. 2025)."""
        offset = self._tuned(STATE_OFFSET)
        if offset is None:
            return y_BDL
        added = torch.einsum("bln,dn->bdl", C_BLN.to(offset.dtype), offset)
        added = added if z_BDL is None else added * F.silu(z_BDL.to(added.dtype))
        return (y_BDL + added).to(y_BDL.dtype)

    def _show(self, dt_BDL: Tensor, bias: Tensor | None, softplus: bool, A: Tensor) -> None:
        """Show the tap the step sizes of a kernel that keeps them to itself."""
        if self.call.seam.watched():
            with torch.no_grad(), torch.autocast(dt_BDL.device.type, enabled=False):
                self._shown(step_sizes(dt_BDL.transpose(1, 2), bias, softplus), A)

    def _shown(self, delta: Tensor, A: Tensor) -> None:
        if not self.call.seam.watched():
            return
        self._heads.append((delta, A))
        if len(self._heads) == getattr(self.call.layer.module, "n_mamba_heads", 1):
            deltas, decays = zip(*self._heads, strict=True)
            self._heads.clear()
            one = len(deltas) == 1
            self.call.seam.show(
                self.call.layer, delta if one else torch.cat(deltas, -1), A if one else torch.cat(decays)
            )


def step_sizes(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """Δ in float32 (float64 stays): softplus(dt + bias), the channel last."""
    dt = dt if dt.dtype == torch.float64 else dt.float()
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    return F.softplus(dt) if softplus else dt


def _ours(kernel, x, dt, A, B, C, skip, z, bias, softplus, start, sequence):  # type: ignore[no-untyped-def]
    """(y, last state, Δ) by a kernel of lyapft.scan: y and the state in the dtype of x, Δ (B,L,D) as it ran."""
    dtype = x.dtype
    x, dt, B, C = (t.transpose(1, 2) for t in (x, dt, B, C))
    run = _compiled if kernel == "cpu" else _plain
    with torch.autocast(x.device.type, enabled=False):
        y, last, delta = run(kernel, x, dt, A, B, C, skip, z, bias, softplus, start, sequence)
    return y.to(dtype).transpose(1, 2), last.to(dtype), delta


def _token_in_float64(*arguments: Any, **options: Any) -> Tensor:
    """One token as a scan of length one, by the reference; (B,D) out."""
    t = Token(*arguments, **options)
    x, dt, B, C = (one[..., None] for one in (t.hidden_states, t.dt, t.B, t.C))
    z = None if t.z is None else t.z[..., None]
    y, last, _ = _ours("reference", x, dt, t.A, B, C, t.D, z, t.dt_bias, t.dt_softplus, t.state, None)
    t.state.copy_(last)
    return y[..., 0]


def _compiled(kernel, x, dt, A, B, C, skip, z, bias, softplus, start, sequence):  # type: ignore[no-untyped-def]
    from lyapft.scan.cpu import FusedSelectiveScan  # needs numba

    if bias is not None and not softplus:
        dt, bias = dt + bias, None
    gate = None if z is None else z.transpose(1, 2)
    tensors = (None if t is None else t.float() for t in (x, dt, A, B, C, bias, skip, gate, start))
    return FusedSelectiveScan.apply(*tensors, softplus, sequence)


def _plain(kernel, x, dt, A, B, C, skip, z, bias, softplus, start, sequence):  # type: ignore[no-untyped-def]
    delta = step_sizes(dt, bias, softplus)
    x = x.to(delta.dtype)
    y, last = scan.selective_scan(x, delta, A, B, C, start, sequence_BL=sequence, kernel=kernel)
    if skip is not None:
        y = y + x * skip
    if z is not None:
        y = y * F.silu(z.transpose(1, 2).to(y.dtype))
    return y, last, delta


def _cuda(x, dt, A, B, C, D, z, bias, softplus, sequence):  # type: ignore[no-untyped-def]
    """mamba-ssm's selective scan; it knows no packing, so packed sequences go through it one row each."""
    function = mamba_ssm.function("selective_scan_fn")
    if sequence is None:
        return function(x, dt, A, B, C, D, z, bias, softplus, return_last_state=True)
    rows = packing.rows(sequence)
    apart = (None if t is None else rows.split(t.transpose(1, 2)).transpose(1, 2) for t in (x, dt, B, C, z))
    x, dt, B, C, z = apart
    y = function(x, dt, A, B, C, D, z, bias, softplus)
    return rows.join(y.transpose(1, 2)).transpose(1, 2), None


def _fused_time_steps(xz, conv_weight, conv_bias, x_proj, dt_proj, norm_weight, eps):  # type: ignore[no-untyped-def]
    """dt (B,D,L) before its bias, computed once more as the fused kernel does: it keeps none."""
    with torch.no_grad():
        x = mamba_ssm.function("causal_conv1d_fn")(
            xz.chunk(2, dim=1)[0], conv_weight.squeeze(1), conv_bias, activation="silu"
        )
        thin = F.linear(x.transpose(1, 2), x_proj[: dt_proj.shape[1]].to(x.dtype))
        dt = F.linear(thin, dt_proj.to(thin.dtype))
        if norm_weight is not None:
            dt = F.rms_norm(dt.float(), dt.shape[-1:], norm_weight.float(), eps)
        return dt.transpose(1, 2)
