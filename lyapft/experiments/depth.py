"""How much directions of the residual stream grow from block to block: Mamba against Transformer, on the same texts."""

import torch

from lyapft.data import pydoc
from lyapft.experiments import subjects
from lyapft.experiments.frame import Measured, Result, interval, over_seeds, track
from lyapft.sensitivity import depth_exponents


def run(models: list[str], prompts: int, tokens: int, directions: int, seeds: int, progress: bool = False) -> Result:
    """One row per model: the largest depth exponent in nats per block, with its interval over prompts.

    A prompt's value is its mean over `seeds` frames of directions, so that n counts independent texts.
    """
    rows, curves = [], []
    for name in track(models, "models", progress):
        with subjects.load(name) as subject:
            ids = subjects.prompts(subject, pydoc.texts(), prompts, tokens)
            found = [
                depth_exponents(subject.model, ids, torch.ones_like(ids), directions=directions, seed=seed).blocks_NBK
                for seed in range(seeds)
            ]
        largest_NB = torch.stack(found).mean(0).amax(-1)
        rate = interval(largest_NB.mean(0).tolist())
        shared = subject.named()
        rows.append(shared | {"exponent": rate.mean, "low": rate.low, "high": rate.high, "n": rate.n})
        bands = [interval(block.tolist()) for block in largest_NB.cumsum(0)]
        curve = {key: [0.0, *(getattr(band, key) for band in bands)] for key in ("mean", "low", "high")}
        curves.append(shared | {"x": list(range(len(bands) + 1)), **curve})
    return Result(over_seeds(rows, [Measured("exponent")]), {"curves": curves})
