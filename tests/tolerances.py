"""The one table of tolerances, keyed by dtype; loosening an entry needs its reason beside it."""

import torch

TOL: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1.6e-2},
}


def within_scale(expected: torch.Tensor) -> dict[str, float]:
    """The tolerance of logits of a model that was computed in two orders: `rtol` of the largest of them.

    A logit is a sum of many terms; its rounding follows their size, not its own, which may happen to be near zero.
    """
    return {"rtol": 0.0, "atol": TOL[expected.dtype]["rtol"] * float(expected.abs().max())}
