"""The reference: one step of every recurrence, x_{t-1} → x_t, written out in unscaled coordinates.

Letters: B batch, D channels, N states, H heads, P head dim, K key dim, V value dim, W convolution taps. Dtype and
device are those of the inputs; call it in float64. rwkv and xlstm store states scaled by exp(m), m a running maximum:
`unscaled` gives back the ones that follow these linear steps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(x_BDN: Tensor, delta_BD: Tensor, A_DN: Tensor, B_BN: Tensor, u_BD: Tensor) -> Tensor:
    """x ← exp(Δ A) x + Δ u B."""
    return (delta_BD[..., None] * A_DN).exp() * x_BDN + (delta_BD * u_BD)[..., None] * B_BN[:, None]


def ssd(x_BHPN: Tensor, delta_BH: Tensor, A_H: Tensor, B_BHN: Tensor, u_BHP: Tensor) -> Tensor:
    """x ← exp(Δ A) x + Δ u Bᵀ; B already repeated over the heads of its group."""
    write = (delta_BH[..., None] * u_BHP)[..., None] * B_BHN[..., None, :]
    return (delta_BH * A_H).exp()[..., None, None] * x_BHPN + write


def mamba3(
    x_BHC: Tensor, buffer_BHC: Tensor, log_alpha_BH: Tensor, beta_BH: Tensor, gamma_BH: Tensor, kv_BHC: Tensor
) -> tuple[Tensor, Tensor]:
    """(x, buffer) ← (α x + β buffer + γ k vᵀ, k vᵀ): the trapezoidal rule, k and v flattened and rotated already."""
    x = log_alpha_BH.exp()[..., None] * x_BHC + beta_BH[..., None] * buffer_BHC + gamma_BH[..., None] * kv_BHC
    return x, kv_BHC + 0 * buffer_BHC


def rg_lru(x_BD: Tensor, recurrence_gate_BD: Tensor, Lambda_D: Tensor, input_BD: Tensor, reset_B: Tensor) -> Tensor:
    """x ← a x + √(1 − a²) input, a = exp(−8 r softplus(Λ)); at a reset x ← input. The input is gated already."""
    log_a = -8.0 * recurrence_gate_BD * F.softplus(Lambda_D)
    keep = ~reset_B.bool()[:, None]
    scale = torch.where(keep, (-torch.expm1(2 * log_a)).sqrt(), 1.0)
    return torch.where(keep, log_a.exp(), 0.0) * x_BD + scale * input_BD


def rwkv4(
    numerator_BD: Tensor, denominator_BD: Tensor, time_decay_D: Tensor, k_BD: Tensor, v_BD: Tensor
) -> tuple[Tensor, Tensor]:
    """(a, b) ← (exp(−exp(w)) a + exp(k) v, exp(−exp(w)) b + exp(k))."""
    decay = (-time_decay_D.exp()).exp()
    return decay * numerator_BD + k_BD.exp() * v_BD, decay * denominator_BD + k_BD.exp()


def mlstm(
    C_BHKV: Tensor, n_BHK: Tensor, forget_BH: Tensor, input_BH: Tensor, k_BHK: Tensor, v_BHV: Tensor
) -> tuple[Tensor, Tensor]:
    """(C, n) ← (σ(f̃) C + exp(ĩ) k vᵀ, σ(f̃) n + exp(ĩ) k)."""
    keep, write = forget_BH.sigmoid()[..., None], input_BH.exp()[..., None] * k_BHK
    return keep[..., None] * C_BHKV + write[..., None] * v_BHV[..., None, :], keep * n_BHK + write


def delta_rule(S_BHKV: Tensor, log_alpha_BHK: Tensor, beta_BH: Tensor, k_BHK: Tensor, v_BHV: Tensor) -> Tensor:
    """S ← Diag(α) S, then S ← S + β k (v − Sᵀk)ᵀ. One α a head is the gated delta rule, one a channel is KDA."""
    S = log_alpha_BHK.exp()[..., None] * S_BHKV
    read = torch.einsum("bhkv,bhk->bhv", S, k_BHK)
    return S + (beta_BH[..., None] * k_BHK)[..., None] * (v_BHV - read)[..., None, :]


def rwkv7(S_BHKV: Tensor, w_BHK: Tensor, a_BHK: Tensor, kappa_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor) -> Tensor:
    """S ← diag(w) S − diag(a) κ̂ (κ̂ᵀ S) + k vᵀ, S transposed against the paper's, κ̂ a unit vector."""
    read = torch.einsum("bhkv,bhk->bhv", S_BHKV, kappa_BHK)
    removed = (a_BHK * kappa_BHK)[..., None] * read[..., None, :]
    return w_BHK[..., None] * S_BHKV - removed + k_BHK[..., None] * v_BHV[..., None, :]


def short_convolution(window_BDW: Tensor, input_BD: Tensor) -> Tensor:
    """The window moves on by one token and takes the new one in."""
    return torch.cat([window_BDW[..., 1:], input_BD[..., None]], dim=-1)


def unscaled(state: Tensor, log_scale: Tensor) -> Tensor:
    """state · exp(m): what a max-stabilised implementation means by the state that it stores."""
    return state * log_scale.exp()
