"""What feedback makes of a change: greedy decoding from a perturbed prompt against the unperturbed one."""

import torch
from torch import Tensor

from lyapft.data import pydoc
from lyapft.experiments import subjects
from lyapft.experiments.frame import SHARE, Interval, Measured, Result, interval, over_seeds, track
from lyapft.sensitivity import closed_loop


def run(
    models: list[str],
    prompts: int,
    tokens: int,
    new_tokens: int,
    sizes: list[float],
    seeds: int,
    progress: bool = False,
) -> Result:
    """One row per model and ε on the last prompt token: share of new tokens that agree, and the first that differs.

    Intervals are over prompts; a prompt's value is its mean over `seeds` directions of the change.
    """
    rows, curves = [], []
    for name in track(models, "models", progress):
        with subjects.load(name) as subject:
            ids = subjects.prompts(subject, pydoc.texts(), prompts, tokens)
            shared = subject.named()
            own = []
            for epsilon in sizes:
                found = [
                    closed_loop(subject.model, ids, token=tokens - 1, epsilon=epsilon, new_tokens=new_tokens, seed=seed)
                    for seed in range(seeds)
                ]
                agreement = _over_prompts([one.agreement_B for one in found], SHARE)
                first = _over_prompts([one.first_difference_B for one in found], (0, new_tokens))
                own.append(agreement)
                rows.append(
                    shared
                    | {"epsilon": epsilon, "agreement": agreement.mean, "low": agreement.low, "high": agreement.high}
                    | {"first_difference": first.mean, "first_low": first.low, "first_high": first.high, "n": first.n}
                )
        curves.append(shared | {"x": sizes} | {key: [getattr(a, key) for a in own] for key in ("mean", "low", "high")})
    measured = (
        Measured("agreement", within=SHARE),
        Measured("first_difference", "first_low", "first_high", (0, new_tokens)),
    )
    return Result(over_seeds(rows, measured, ["epsilon"]), {"curves": curves})


def _over_prompts(found: list[Tensor], within: tuple[float, float]) -> Interval:
    """Interval over prompts of their means over the directions of the change."""
    return interval(torch.stack(found).double().mean(0).tolist(), within)
