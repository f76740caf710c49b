"""Recurrences whose one-step Jacobian is diagonal: J_t = diag exp(Δ_{t,c} A_{c,n}).

Letters: B batch, L tokens, C channels (or heads), D channels of Mamba-1, N states per channel, H heads.

Products of diagonal matrices are diagonal, so finite-time exponents are exact means, and only each channel's slowest
state (the largest A) can set a maximum. That is why norms and maxima never have to hold a (B, L, C, N) tensor.
"""

from dataclasses import dataclass

from torch import Tensor

from lyapft.lyapunov.tokens import mean_over_tokens, wide


@dataclass(frozen=True)
class DiagonalJacobian:
    """log of the diagonal of J_t, as a step size per token times a rate per state.

    Attributes:
        delta_BLC: Δ ≥ 0; infinite where a reset wipes the state.
        A_CN: < 0.
        multiplicity: equal copies of each state (head dim × state size in Mamba-2).
    """

    delta_BLC: Tensor
    A_CN: Tensor
    multiplicity: int = 1

    def log_BLCN(self) -> Tensor:
        """log of the diagonal, without copies. Large: for checks, not for training."""
        return wide(self.delta_BLC)[..., None] * wide(self.A_CN)

    def log_norm_BL(self) -> Tensor:
        """log‖J_t‖₂."""
        return (wide(self.delta_BLC) * slowest(wide(self.A_CN))).amax(-1)

    def log_det_BL(self) -> Tensor:
        """log|det J_t|."""
        return self.multiplicity * (wide(self.delta_BLC) * wide(self.A_CN).sum(-1)).sum(-1)

    def exponents(self, mask_BL: Tensor) -> Tensor:
        """(B, C·N·multiplicity) finite-time exponents over real tokens, not sorted.

        Raises:
            ValueError: a sequence without a real token.
        """
        mean_BC = mean_over_tokens(wide(self.delta_BLC), mask_BL)
        return (mean_BC[..., None] * wide(self.A_CN)).flatten(1).repeat_interleave(self.multiplicity, dim=1)


def slowest(A: Tensor) -> Tensor:
    """A of each channel's slowest state: max over n for (D, N), A itself for (H,)."""
    return A.amax(-1) if A.dim() == 2 else A


def selective_scan_exponents(delta_BLD: Tensor, A_DN: Tensor, mask_BL: Tensor) -> Tensor:
    """Finite-time Lyapunov exponents of a Mamba-1 state, one per channel and state.

    The one-step Jacobian is diagonal, ∂x_t/∂x_{t-1} = exp(Δ_t A), so λ_{b,d,n} = A_{d,n} · mean_t Δ_{b,t,d}, the mean
    over real tokens only.

    Args:
        delta_BLD: step sizes after softplus, ≥ 0.
        A_DN: −exp(A_log), < 0.
        mask_BL: 1 for real tokens, 0 for padding.
    Returns:
        λ_BDN in the wider of float32 and the inputs' dtype.
    Raises:
        ValueError: a sequence without a real token.
    Source: Gu & Dao 2024, §3.2 (discretisation); Halloran et al. 2025, Lemma 1.

    >>> import torch
    >>> selective_scan_exponents(torch.full((1, 4, 1), 0.5), torch.tensor([[-1.0, -2.0]]), torch.ones(1, 4))
    tensor([[[-0.5000, -1.0000]]])
    """
    return mean_over_tokens(wide(delta_BLD), mask_BL)[:, :, None] * wide(A_DN)


def ssd_exponents(delta_BLH: Tensor, A_H: Tensor, mask_BL: Tensor) -> Tensor:
    """Finite-time Lyapunov exponents of a Mamba-2 state, one per head (of multiplicity head dim × state size).

    The one-step Jacobian is exp(Δ_{t,h} A_h) times the identity, so λ_{b,h} = A_h · mean_t Δ_{b,t,h}.

    Args:
        delta_BLH: step sizes after softplus and clamp, ≥ 0.
        A_H: −exp(A_log), < 0.
        mask_BL: 1 for real tokens, 0 for padding.
    Returns:
        λ_BH in the wider of float32 and the inputs' dtype.
    Raises:
        ValueError: a sequence without a real token.
    Source: Dao & Gu 2024, §5 (scalar-identity A); Halloran et al. 2025.

    >>> import torch
    >>> ssd_exponents(torch.full((1, 4, 2), 0.5), torch.tensor([-1.0, -2.0]), torch.ones(1, 4))
    tensor([[-0.5000, -1.0000]])
    """
    return mean_over_tokens(wide(delta_BLH), mask_BL) * wide(A_H)
