"""Share of simulated null studies in which the verdict calls one of two models steadier that diverge alike.

Every study is made of records and goes through the verdict's own path: sorted into recipes, compared with both
counterparts, contrasted, adjusted. A recipe gains and loses answers alike, as often in the Mamba as in the Transformer.

python benchmarks/false_positives.py [--studies N]
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lyapft.divergence import against_counterparts
from lyapft.verdict import Settings
from lyapft.verdict.architectures import contrasts
from lyapft.verdict.evidence import PAPER, PRECISION_ONLY, gather
from lyapft.verdict.recipes import rows

MODELS = (("mamba", "selective_scan", 230_000), ("transformer", None, 320_000))
SHOTS, ITEMS = (0, 5), 200
FULL = ("fp32", "none")
Recipe = tuple[str, str]  # precision, peft
MATRIX = (("bf16", "none"), ("fp32", "lora"), ("bf16", "lora"))


def study(recipes: Sequence[Recipe], seeds: int) -> dict[tuple[str, str, str, int], dict[str, Any]]:
    """The records of a study without numbers, by model, precision, peft and seed."""
    return {
        (model, precision, peft, seed): {
            "id": f"{model}-{precision}-{peft}-{seed}",
            "status": "ok",
            "choices": {"model": model, "data": "d", "task": "t", "precision": precision, "peft": peft},
            "config": {"trainer": {"steps": 120}},
            "seed": seed,
            "kernels": {kernel: "cpu"} if kernel else {},
            "model": {"parameters_total": parameters},
            "scores": [{"task": "t", "shots": shots, "metric": "acc", "value": 0.0, "n": ITEMS} for shots in SHOTS],
        }
        for model, kernel, parameters in MODELS
        for precision, peft in (FULL, *recipes)
        for seed in range(seeds)
    }


def draw(records: dict[Any, dict[str, Any]], flips: tuple[float, float], rng: np.random.Generator) -> None:
    """Give every record scores: half of the items right, and of each half the share that a recipe flips."""
    share = dict(zip((model for model, *_ in MODELS), flips, strict=True))
    for (model, *_), record in records.items():
        gained, lost = rng.binomial(ITEMS // 2, share[model], (2, len(SHOTS)))
        for score, more, fewer in zip(record["scores"], gained, lost, strict=True):
            score["value"] = (ITEMS // 2 + int(more) - int(fewer)) / ITEMS
    for (model, _, peft, seed), record in records.items():
        paper = records[model, *FULL, seed]
        found: dict[str, Any] = {PAPER: None if record is paper else paper}
        if (same := records.get((model, "fp32", peft, seed))) is not None:
            found[PRECISION_ONLY] = None if record is same else same
        record["divergence"] = against_counterparts(record, found)


def claims(
    studies: int, recipes: Sequence[Recipe], seeds: int, flips: tuple[float, float], rng: np.random.Generator
) -> int:
    """Studies in which any comparison of the two models, from either counterpart, is called steadier."""
    records, settings, count = study(recipes, seeds), Settings(), 0
    for _ in range(studies):
        draw(records, flips, rng)
        evidence = gather(list(records.values()))
        found = [*rows(evidence, settings, PAPER), *rows(evidence, settings, PRECISION_ONLY)]
        count += any(one.overall and one.steadier(settings) for one in contrasts(evidence, found, settings))
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=2000)
    studies = parser.parse_args().studies
    found = {}
    for seeds in (3, 5, 8):
        for name, recipes in (("one recipe", MATRIX[:1]), ("three recipes", MATRIX)):
            rng = np.random.default_rng(0)
            found[f"{name}, {seeds} seeds"] = claims(studies, recipes, seeds, (0.1, 0.1), rng) / studies
            print(f"{name}, {seeds} seeds: steadier in {found[f'{name}, {seeds} seeds']:.2%} of {studies} null studies")
    print(json.dumps({"benchmark": "false_positives", "studies": studies, "claims": found}))


if __name__ == "__main__":
    main()
