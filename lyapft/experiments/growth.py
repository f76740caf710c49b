"""How much a change of one token's embedding grows over later tokens: Mamba against Transformer, on the same texts."""

import math

import torch
from torch import Tensor

from lyapft.data import pydoc
from lyapft.experiments import subjects
from lyapft.experiments.frame import Measured, Result, interval, over_seeds, track
from lyapft.sensitivity import growth_rate, perturbation_growth


def run(
    models: list[str], prompts: int, tokens: int, token: int, epsilon: float, seeds: int, progress: bool = False
) -> Result:
    """One row per model: the slope of log ‖δ logits_t‖ over t > token, with its interval over prompts.

    A prompt's value is its mean over `seeds` directions of the change, so that n counts independent texts.
    """
    rows, curves = [], []
    for name in track(models, "models", progress):
        with subjects.load(name) as subject:
            ids = subjects.prompts(subject, pydoc.texts(), prompts, tokens)
            mask = torch.ones_like(ids)
            found = [
                perturbation_growth(subject.model, ids, mask, token=token, epsilon=epsilon, seed=seed).logits_BL
                for seed in range(seeds)
            ]
        slopes = torch.stack([growth_rate(norms, mask, token) for norms in found]).mean(0)
        logs_BL = torch.stack([(norms[:, token:] / epsilon).double().log() for norms in found]).mean(0)
        rate = interval(slopes.tolist())
        shared = subject.named()
        rows.append(shared | {"rate": rate.mean, "low": rate.low, "high": rate.high, "n": rate.n, "epsilon": epsilon})
        curves.append(shared | {"x": list(range(tokens - token)), **_band(logs_BL)})
    return Result(over_seeds(rows, [Measured("rate")]), {"curves": curves})


def _band(logs_BL: Tensor) -> dict[str, list[float]]:
    """The geometric mean over prompts of ‖δ logits_t‖ / ε, with the ends of its interval."""
    bands = [interval(column.tolist()) for column in logs_BL.T]
    return {key: [math.exp(getattr(band, key)) for band in bands] for key in ("mean", "low", "high")}
