"""Stability of linear recurrences from their log-Jacobians.

Letters: B batch, L tokens, D channels, N states per channel, H heads. λ in nats per token, computed in log space in
float32 or better. Nothing here knows a model or a trainer.

For both families the state decays channel by channel, x_t = exp(Δ_t A) x_{t-1} + …, so the product of Jacobians is
diagonal and its exponents are exact, and only each channel's slowest state (the largest A) can set a maximum. That is
why nothing here has to hold a (B, L, D, N) tensor.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lyapft.lyapunov.diagonal import slowest
from lyapft.lyapunov.tokens import mean_over_tokens, wide


def log_one_step_norm(delta_BLC: Tensor, A: Tensor) -> Tensor:
    """log‖J_t‖₂ of every token: max_c Δ_{t,c} A_c over the channels (or heads) c at their slowest state.

    Args:
        delta_BLC: step sizes, ≥ 0.
        A: (D, N) or (H,), < 0.
    Returns:
        (B, L), in nats.

    >>> log_one_step_norm(torch.tensor([[[0.5, 2.0]]]), torch.tensor([-1.0, -0.1]))
    tensor([[-0.2000]])
    """
    return (wide(delta_BLC) * slowest(wide(A))).amax(-1)


@dataclass(frozen=True)
class Stability:
    """What one forward pass of one recurrence says about its distance from the edge, in nats per token.

    Attributes:
        lambda_max: largest finite-time exponent of any sequence of the batch.
        lambda_mean: mean over the sequences of each one's largest exponent.
        norm_bound: largest over sequences of (1/T) Σ_t log‖J_t‖₂; λ_max ≤ norm_bound.
    """

    lambda_max: float
    lambda_mean: float
    norm_bound: float

    @property
    def margin(self) -> float:
        """−λ_max: how far the slowest direction is from not forgetting at all."""
        return -self.lambda_max


def stability_tensors(delta_BLC: Tensor, A: Tensor, mask_BL: Tensor) -> Tensor:
    """(λ_max, mean of λ_max over sequences, norm bound) of a batch as one tensor of three, on the device of Δ.

    λ_max of a sequence is max_c A_c · mean_t Δ_{t,c} at each channel's slowest state, which equals the maximum of
    `selective_scan_exponents` (or `ssd_exponents`) because Δ ≥ 0.

    Args:
        delta_BLC: (B, L, D) or (B, L, H) step sizes, ≥ 0.
        A: (D, N) or (H,), < 0.
        mask_BL: 1 for real tokens, 0 for padding.
    Raises:
        ValueError: a sequence without a real token.
    """
    log_norms_BLC = wide(delta_BLC) * slowest(wide(A))
    lambda_B = mean_over_tokens(log_norms_BLC, mask_BL).amax(-1)
    bound_B = mean_over_tokens(log_norms_BLC.amax(-1, keepdim=True), mask_BL).squeeze(-1)
    return torch.stack((lambda_B.max(), lambda_B.mean(), bound_B.max()))


def stability(delta_BLC: Tensor, A: Tensor, mask_BL: Tensor) -> Stability:
    """`stability_tensors` as numbers.

    >>> stability(torch.full((1, 4, 1), 0.5), torch.tensor([[-1.0, -2.0]]), torch.ones(1, 4)).margin
    0.5
    """
    return Stability(*stability_tensors(delta_BLC, A, mask_BL).tolist())
