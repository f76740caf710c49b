"""Mamba-2's recurrence (state space duality), routed: what Mamba2Mixer and its kin call.

Letters: B batch, L tokens, H heads, P head dim, G groups, N states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lyapft import scan
from lyapft.recurrence.operations import Operations, Token
from lyapft.recurrence.seam import INITIAL_STATE, STATE_OFFSET
from lyapft.recurrence.selective_scan import step_sizes
from lyapft.scan import mamba_ssm

FAMILY = "ssd"
UNLIMITED = (0.0, float("inf"))


class SSD(Operations):
    """Whole sequences, the fused short-cut and one token after a cache; the signatures are transformers'."""

    SCAN = "mamba2_chunk_scan"
    FUNCTIONS = {SCAN: "scan", "mamba2_split_conv1d_scan_combined": "fused", "mamba2_selective_state_update": "update"}

    @torch.compiler.disable
    def scan(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = UNLIMITED,
        return_final_states: bool = False,
        **_: Any,
    ) -> Any:
        """(B,L,H,P) in and out; float32 whatever autocast says, as the stock function, and like it returns float32."""
        seam = self.call.seam
        kernel = self._kernel(hidden_states)
        if initial_states is None and (start := self._tuned(INITIAL_STATE)) is not None:
            initial_states = start.expand(hidden_states.shape[0], -1, -1, -1)
            if self.call.mask is not None:  # padding must not wear the first state down
                dt = step_sizes(dt, dt_bias, dt_softplus).clamp(*dt_limit) * self.call.mask[..., None]
                dt_bias, dt_softplus, dt_limit = None, False, UNLIMITED
        if seam.input_tap is not None:
            delta = step_sizes(dt, dt_bias, dt_softplus).clamp(*dt_limit)
            seam.input_tap(self.call.layer, hidden_states, delta, A, B)
        seam.record(FAMILY, kernel)
        if kernel in ("mamba_ssm", "stock"):
            self._show(dt, dt_bias, dt_softplus, dt_limit, A)
            options: dict[str, Any] = {
                "D": D,
                "dt_bias": dt_bias,
                "initial_states": initial_states,
                "dt_softplus": dt_softplus,
            }
            options |= {"dt_limit": dt_limit, "return_final_states": True}
            result = self._theirs(kernel)(hidden_states, dt, A, B, C, chunk_size, **options)
        else:
            with torch.autocast(hidden_states.device.type, enabled=False):
                delta = step_sizes(dt, dt_bias, dt_softplus).clamp(*dt_limit)
                seam.show(self.call.layer, delta, A)
                result = _ours(kernel, hidden_states, delta, A, B, C, D, initial_states, seam.sequence)
        y, last = result
        y = self._offset(y, C)
        return (y, last) if return_final_states else y

    @torch.compiler.disable
    def fused(
        self,
        zxbcdt: Tensor,
        conv1d_weight: Tensor,
        conv1d_bias: Tensor | None,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        chunk_size: int,
        dt_limit: tuple[float, float] = UNLIMITED,
        rmsnorm_eps: float | None = 1e-6,
        **options: Any,
    ) -> Tensor | None:
        """Convolution, scan, norm and output projection by one kernel; None: go on unfused, nothing was done."""
        seam = self.call.seam
        kernel = seam.choose(FAMILY, zxbcdt.device)
        if kernel not in ("mamba_ssm", "stock") or not seam.fused:
            return None
        reason = seam.apart(self.call.layer, self.call.mask) or mamba_ssm.missing("causal_conv1d", zxbcdt.device.type)
        if kernel == "stock" and seam.sequence is not None:
            reason = "transformers' call of the fused kernel cannot keep packed sequences apart"
        if reason is not None:
            if kernel == "mamba_ssm":
                seam.unfused(FAMILY, reason)
            return None
        if kernel == "mamba_ssm":
            function = mamba_ssm.function("mamba_split_conv1d_scan_combined")
            options["seq_idx"] = None if seam.sequence is None else seam.sequence.int()
        else:
            function = self._stock["mamba2_split_conv1d_scan_combined"]
        options |= {"dt_limit": dt_limit, "rmsnorm_eps": rmsnorm_eps}
        y = function(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, **options)
        if y is not None:
            seam.record(FAMILY, f"{kernel}-fused")
            seam.record("causal_conv1d", f"{kernel}-fused")
            self._show(zxbcdt[..., -A.shape[0] :], dt_bias, True, dt_limit, A)
        return y

    @torch.compiler.disable
    def update(self, *arguments: Any, **options: Any) -> Tensor:
        """One token after a cache: (B,H,P) in and out; the state (B,H,P,N) changes in place."""
        options = {name: value for name, value in options.items() if name in ("D", "z", "dt_bias", "dt_softplus")}
        offset = self._tuned(STATE_OFFSET)
        gate = options.pop("z", None) if offset is not None else options.get("z")
        take = self._one_token(FAMILY, "mamba2_selective_state_update", "selective_state_update", _token_in_float64)
        y = take(*arguments, **options)
        if offset is None:
            return y
        y = self._offset(y[:, None], arguments[5][:, None])[:, 0]
        return y if gate is None else y * torch.nn.functional.silu(gate)

    def _kernel(self, x: Tensor) -> str:
        seam = self.call.seam
        kernel = seam.choose(FAMILY, x.device)
        if kernel == "cpu" and x.dtype == torch.float64:
            return seam.instead(FAMILY, "torch", "that kernel is float32 and the model is float64")
        if kernel == "stock" and seam.sequence is not None:
            return seam.instead(FAMILY, "torch", "transformers' own scan cannot keep packed sequences apart")
        return kernel

    def _theirs(self, kernel: str) -> Any:
        if kernel == "stock":
            return self._stock[self.SCAN]
        sequence = self.call.seam.sequence
        function = mamba_ssm.function("mamba_chunk_scan_combined")
        return lambda *given, **options: function(
            *given, **options, seq_idx=None if sequence is None else sequence.int()
        )

    def _offset(self, y_BLHP: Tensor, C_BLGN: Tensor) -> Tensor:
        """y + C h': what a tuned offset h' of the state adds (Kang et al. 2025)."""
        offset = self._tuned(STATE_OFFSET)
        if offset is None:
            return y_BLHP
        per_group = offset.unflatten(0, (C_BLGN.shape[2], -1))  # (G,H/G,P,N)
        added = torch.einsum("blgn,gkpn->blgkp", C_BLGN.to(offset.dtype), per_group).flatten(2, 3)
        return (y_BLHP + added).to(y_BLHP.dtype)

    def _show(self, dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float], A: Tensor) -> None:
        """Show the tap the step sizes of a kernel that keeps them to itself."""
        if self.call.seam.watched():
            with torch.no_grad(), torch.autocast(dt.device.type, enabled=False):
                self.call.seam.show(self.call.layer, step_sizes(dt, bias, softplus).clamp(*limit), A)


def _ours(kernel, x, delta, A, B, C, skip, start, sequence):  # type: ignore[no-untyped-def]
    """(y, last state) by a kernel of lyapft.scan, in the format of Δ."""
    if kernel == "cpu":
        from lyapft.scan.ssd_cpu import FusedSSD  # needs numba

        return FusedSSD.apply(*(None if t is None else t.float() for t in (x, delta, A, B, C, skip, start)), sequence)
    x = x.to(delta.dtype)
    y, last = scan.ssd(x, delta, A, B, C, start, sequence_BL=sequence, kernel=kernel)
    return (y if skip is None else torch.addcmul(y, x, skip[:, None])), last


def _token_in_float64(*arguments: Any, **options: Any) -> Tensor:
    """One token as a scan of length one, by the reference, (B,H,P) out; dt, its bias, A and D come repeated for each
    dimension of a head."""
    t = Token(*arguments, **options)
    delta = step_sizes(t.dt[..., 0], None if t.dt_bias is None else t.dt_bias[:, 0], t.dt_softplus)
    x, delta, B, C = (one[:, None] for one in (t.hidden_states, delta, t.B, t.C))
    y, last = scan.ssd(x, delta, t.A[:, 0, 0], B, C, t.state, kernel="reference")
    t.state.copy_(last)
    y = y[:, 0] if t.D is None else y[:, 0] + t.hidden_states * t.D
    return y if t.z is None else y * torch.nn.functional.silu(t.z)
