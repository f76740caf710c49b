"""The few numbers that say how far a diagonal recurrence is from the edge, at the price of one pass over Δ.

Letters: B batch, L tokens, C channels or heads, D channels, N states per channel, H heads. λ in nats per token.

J_t is diagonal, exp(Δ_t A), and a step Δ ≥ 0 scales all states of a channel alike, so only each channel's slowest state
(the largest A) can set a maximum: no (B, L, D, N) tensor is needed. `stability_profile` in torch is the reference for
the compiled pass, which runs on float32 step sizes in CPU memory where numba is installed.
"""

import math
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from lyapft.lyapunov.diagonal import slowest
from lyapft.lyapunov.tokens import check_tokens, mean_over_tokens, wide

# |ΔA| below which exp(ΔA) rounds to exactly 1: half the spacing of the format just below 1
NEUTRAL_ZONE = {"bf16": 2.0**-9, "fp16": 2.0**-12, "fp32": 2.0**-25}
_EDGES = tuple(NEUTRAL_ZONE.values())
# which of the fields are means, and over what; the others are maxima
MEANS = {"lambda_mean": "sequences"} | {f"neutral_{name}": "tokens" for name in NEUTRAL_ZONE}
FIELDS = ("lambda_max", "lambda_mean", "norm_bound", "one_step_norm", *(f"neutral_{name}" for name in NEUTRAL_ZONE))


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


def log_running_product(delta_BLC: Tensor, A: Tensor, mask_BL: Tensor) -> Tensor:
    """(B, L) log‖J_t ⋯ J_1‖₂, what a perturbation of the initial state has grown to; padding adds nothing.

    >>> log_running_product(torch.tensor([[[0.5], [2.0]]]), torch.tensor([-1.0]), torch.ones(1, 2))
    tensor([[-0.5000, -2.5000]])
    """
    steps_BLC = wide(delta_BLC) * slowest(wide(A))
    return steps_BLC.masked_fill(~mask_BL.bool()[..., None], 0).cumsum(1).amax(-1)


def spectrum(delta_BLC: Tensor, A: Tensor, mask_BL: Tensor) -> Tensor:
    """All finite-time exponents of a layer, mean over the sequences, slowest first; of Mamba-2 one for each head.

    Returns:
        (C·N,) or (H,), nats per token.

    >>> spectrum(torch.full((2, 3, 1), 0.5), torch.tensor([[-2.0, -1.0]]), torch.ones(2, 3))
    tensor([-0.5000, -1.0000])
    """
    mean_C = mean_over_tokens(wide(delta_BLC), mask_BL).mean(0)
    rates = wide(A)
    return (mean_C[:, None] * rates if rates.dim() == 2 else mean_C * rates).flatten().sort(descending=True).values


@dataclass(frozen=True)
class Stability:
    """What one forward pass of one recurrence says about its distance from the edge, in nats per token.

    Attributes:
        lambda_max: largest finite-time exponent of any sequence of the batch.
        lambda_mean: mean over the sequences of each one's largest exponent.
        norm_bound: largest over sequences of (1/T) Σ_t log‖J_t‖₂; λ_max ≤ norm_bound.
        one_step_norm: largest log‖J_t‖₂ of any token.
        neutral_bf16: share of (token, channel) pairs whose slowest state has exp(ΔA) rounded to exactly 1 in bf16, so
            that it forgets nothing; neutral_fp16 and neutral_fp32 likewise.
    """

    lambda_max: float
    lambda_mean: float
    norm_bound: float
    one_step_norm: float
    neutral_bf16: float
    neutral_fp16: float
    neutral_fp32: float

    @property
    def margin(self) -> float:
        """−λ_max: how far the slowest direction is from not forgetting at all."""
        return -self.lambda_max

    @property
    def memory(self) -> float:
        """−1/λ_max, the tokens after which the slowest direction has faded to 1/e."""
        return memory(self.lambda_max)

    @property
    def gain(self) -> float:
        """1/(1 − ā) with ā = exp(λ_max): the sum that a unit error, made anew at every step, tends to."""
        return gain(self.lambda_max)


def memory(lambda_max: float) -> float:
    """−1/λ in tokens, infinite for λ ≥ 0.

    >>> memory(-0.001)
    1000.0
    """
    return -1 / lambda_max if lambda_max < 0 else math.inf


def gain(lambda_max: float) -> float:
    """1/(1 − exp λ), infinite for λ ≥ 0.

    >>> round(gain(math.log(0.75)), 9)
    4.0
    """
    return -1 / math.expm1(lambda_max) if lambda_max < 0 else math.inf


class Profile(NamedTuple):
    """The summary of a batch, and the series it comes from.

    Attributes:
        numbers: `FIELDS` in one tensor, on the device of Δ.
        log_norm_BL: log‖J_t‖₂ of every token; padding holds 0.
        lambda_B: largest exponent of every sequence.
    """

    numbers: Tensor
    log_norm_BL: Tensor
    lambda_B: Tensor


def stability_profile(delta_BLC: Tensor, A: Tensor, mask_BL: Tensor) -> Profile:
    """Everything that `Stability` holds, per batch, per sequence and per token, from one pass over Δ.

    λ of a sequence is max_c A_c · mean_t Δ_{t,c} at each channel's slowest state, which equals the maximum of
    `selective_scan_exponents` (or `ssd_exponents`) because Δ ≥ 0.

    Args:
        delta_BLC: (B, L, D) or (B, L, H) step sizes, ≥ 0.
        A: (D, N) or (H,).
        mask_BL: 1 for real tokens, 0 for padding.
    Raises:
        ValueError: a sequence without a real token.
    """
    found = None
    if delta_BLC.device.type == "cpu" and delta_BLC.dtype == A.dtype == torch.float32 and (fast := _compiled()):
        found = fast.profile(delta_BLC, A, mask_BL, _EDGES)
    if found is None:
        with torch.no_grad(), torch.autocast(delta_BLC.device.type, enabled=False):
            found = _profile(wide(delta_BLC), slowest(wide(A)), mask_BL)
    numbers, log_norm_BL, lambda_B, tokens_B = found
    check_tokens(tokens_B)
    return Profile(numbers, log_norm_BL, lambda_B)


@cache
def _compiled() -> ModuleType | None:
    """The same in one compiled pass, where numba is installed."""
    try:
        from lyapft.lyapunov import compiled
    except ImportError:
        return None
    return compiled


def _profile(delta_BLC: Tensor, A_C: Tensor, mask_BL: Tensor) -> tuple[Tensor, ...]:
    """What `compiled.profile` returns."""
    steps_BLC, real_BL, tokens_B = delta_BLC * A_C, mask_BL.bool(), mask_BL.sum(1)
    log_norm_BL = steps_BLC.amax(-1)
    lambda_B, bound_B = mean_over_tokens(steps_BLC, mask_BL).amax(-1), mean_over_tokens(log_norm_BL, mask_BL)
    one_step = log_norm_BL.masked_fill(~real_BL, -torch.inf).max()
    inside = [((steps_BLC.abs() < edge) & real_BL[..., None]).sum() for edge in _EDGES]
    shares = [count / (tokens_B.sum() * len(A_C)) for count in inside]
    numbers = torch.stack((lambda_B.max(), lambda_B.mean(), bound_B.max(), one_step, *shares))
    return numbers, log_norm_BL.masked_fill(~real_BL, 0), lambda_B, tokens_B


def stability_tensors(delta_BLC: Tensor, A: Tensor, mask_BL: Tensor) -> Tensor:
    """The `numbers` of `stability_profile`: `FIELDS` of a batch as one small tensor, on the device of Δ."""
    return stability_profile(delta_BLC, A, mask_BL).numbers


def stability(delta_BLC: Tensor, A: Tensor, mask_BL: Tensor) -> Stability:
    """`stability_tensors` as numbers.

    >>> found = stability(torch.full((1, 4, 1), 0.5), torch.tensor([[-1.0, -2.0]]), torch.ones(1, 4))
    >>> found.margin, found.memory
    (0.5, 2.0)
    """
    return Stability(*stability_tensors(delta_BLC, A, mask_BL).tolist())
