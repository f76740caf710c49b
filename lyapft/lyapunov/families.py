"""Which one-step state Jacobian each recurrence family has; a function for each, from its gates.

Letters: B batch, L tokens, D channels, N states, H heads, P head dim, K key dim, V value dim, W convolution taps. Gates
are those after their activation. `steps` has the recurrences themselves.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lyapft.lyapunov.diagonal import DiagonalJacobian
from lyapft.lyapunov.matrix import MatrixJacobian
from lyapft.lyapunov.tokens import wide


def selective_scan(delta_BLD: Tensor, A_DN: Tensor) -> DiagonalJacobian:
    """Mamba-1: J = diag exp(Δ_{t,d} A_{d,n}), Δ = softplus(…) ≥ 0, A = −exp(A_log). Gu & Dao 2024, §3.2."""
    return DiagonalJacobian(delta_BLD, A_DN)


def ssd(delta_BLH: Tensor, A_H: Tensor, copies: int) -> DiagonalJacobian:
    """Mamba-2: J = exp(Δ_{t,h} A_h) I on the `copies` = P·N states of a head. Dao & Gu 2024, §5.

    Δ is what the path that ran used: the scan clamps it to `time_step_limit`, the one-token update does not.
    """
    return DiagonalJacobian(delta_BLH, A_H[:, None], copies)


def rg_lru(recurrence_gate_BLD: Tensor, Lambda_D: Tensor, reset_BL: Tensor | None = None) -> DiagonalJacobian:
    """RG-LRU: J = diag exp(−8 r_t softplus(Λ)), r = σ(…) the recurrence gate; 0 at a reset. De et al. 2024, eq. 3."""
    gate = wide(recurrence_gate_BLD)
    if reset_BL is not None:
        gate = gate.masked_fill(reset_BL.bool()[..., None], torch.inf)
    return DiagonalJacobian(gate, -8.0 * F.softplus(wide(Lambda_D))[:, None])


def rwkv4(time_decay_D: Tensor, batch: int, length: int) -> DiagonalJacobian:
    """RWKV-4: numerator and denominator both decay by exp(−exp(w)), whatever the token. Peng et al. 2023, §3."""
    decay = -wide(time_decay_D).exp()
    return DiagonalJacobian(decay.new_ones(batch, length, len(decay)), decay[:, None], 2)


def mlstm(forget_preactivation_BLH: Tensor, copies: int) -> DiagonalJacobian:
    """mLSTM: J = σ(f̃_t) I on the `copies` = K·V + K numbers of memory and normaliser. Beck et al. 2024, eq. 19."""
    delta = -F.logsigmoid(wide(forget_preactivation_BLH))
    return DiagonalJacobian(delta, delta.new_full((delta.shape[-1], 1), -1.0), copies)


def mamba3(delta_BLH: Tensor, A_H: Tensor, beta_BLH: Tensor, copies: int) -> MatrixJacobian:
    """Mamba-3 in the rotating frame, with the buffer of the last k vᵀ: J = [[α, β], [0, 0]] per state, α = exp(ΔA).

    The rotation is folded into q and k, whose angle is a sum: one more exponent, 0, that is not listed here.
    log‖J‖₂ = ½ log(α² + β²) can exceed 0; the exponents are mean log α and −∞.
    """
    log_alpha = wide(delta_BLH) * wide(A_H)
    alpha, beta = log_alpha.exp(), wide(beta_BLH)
    zero = torch.zeros_like(alpha)
    J = torch.stack([alpha, beta, zero, zero], dim=-1).unflatten(-1, (2, 2))
    log_norm = 0.5 * torch.logaddexp(2 * log_alpha, 2 * beta.abs().log())
    return MatrixJacobian(J, log_norm, torch.full_like(alpha, -torch.inf), copies)


def gated_delta_rule(log_alpha_BLH: Tensor, beta_BLH: Tensor, k_BLHK: Tensor, columns: int) -> MatrixJacobian:
    """Gated DeltaNet: J = α (I − β k kᵀ); singular values α and α|1 − β‖k‖²|. Yang et al. 2025, eq. 10.

    ‖J‖₂ ≤ 1 iff β‖k‖² ≤ 1 + 1/α: always with normalised k and β ≤ 2. That is sufficient, not necessary, for λ ≤ 0.
    """
    log_alpha, beta, k = wide(log_alpha_BLH), wide(beta_BLH), wide(k_BLHK)
    along = _log_along(beta, k)
    top = along.clamp(min=0.0) if k.shape[-1] > 1 else along
    J = log_alpha.exp()[..., None, None] * _householder(beta, k)
    return MatrixJacobian(J, log_alpha + top, k.shape[-1] * log_alpha + along, columns)


def kda(log_alpha_BLHK: Tensor, beta_BLH: Tensor, k_BLHK: Tensor, columns: int) -> MatrixJacobian:
    """Kimi delta attention: J = (I − β k kᵀ) Diag(α), one decay per key channel. Kimi Team 2025, eq. 1.

    The norm is a bound: log‖J‖₂ ≤ log max α + max(0, log|1 − β‖k‖²|).
    """
    log_alpha, beta, k = wide(log_alpha_BLHK), wide(beta_BLH), wide(k_BLHK)
    along = _log_along(beta, k)
    J = _householder(beta, k) * log_alpha.exp()[..., None, :]
    return MatrixJacobian(J, log_alpha.amax(-1) + along.clamp(min=0.0), log_alpha.sum(-1) + along, columns)


def rwkv7(w_BLHK: Tensor, a_BLHK: Tensor, kappa_BLHK: Tensor, columns: int) -> MatrixJacobian:
    """RWKV-7: J = diag(w) − diag(a) κ̂κ̂ᵀ with decay w, in-context rate a, both in (0, 1), and a unit vector κ̂.

    log‖J‖₂ is computed; it can reach log(2/√3), and products of such J can grow. Peng et al. 2025, eq. 17.
    """
    w, a, kappa = wide(w_BLHK), wide(a_BLHK), wide(kappa_BLHK)
    J = torch.diag_embed(w) - (a * kappa)[..., :, None] * kappa[..., None, :]
    log_det = w.log().sum(-1) + (1 - (a * kappa**2 / w).sum(-1)).abs().log()
    return MatrixJacobian(J, torch.linalg.matrix_norm(J, 2).log(), log_det, columns)


def short_convolution(channels: int, taps: int, batch: int, length: int) -> MatrixJacobian:
    """The window of a causal convolution: J shifts it by a token. Nilpotent: every exponent is −∞."""
    J = torch.ones(taps - 1).diag(1).expand(batch, length, 1, taps, taps)
    log_norm = J.new_full((batch, length, 1), 0.0 if taps > 1 else -torch.inf)
    return MatrixJacobian(J, log_norm, torch.full_like(log_norm, -torch.inf), channels)


def _log_along(beta_BLH: Tensor, k_BLHK: Tensor) -> Tensor:
    """log|1 − β‖k‖²|, the log of the singular value along k."""
    return (1 - beta_BLH * (k_BLHK**2).sum(-1)).abs().log()


def _householder(beta_BLH: Tensor, k_BLHK: Tensor) -> Tensor:
    eye = torch.eye(k_BLHK.shape[-1], dtype=k_BLHK.dtype, device=k_BLHK.device)
    return eye - beta_BLH[..., None, None] * k_BLHK[..., :, None] * k_BLHK[..., None, :]
