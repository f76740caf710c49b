"""Share of 95% intervals that cover the true mean, by method and number of seeds: normal and skewed values.

python benchmarks/interval_coverage.py [--studies N]
"""

import argparse
import json

import numpy as np

from lyapft.divergence import bca_interval, t_interval

SEEDS = (3, 5, 8, 12, 20)


def coverage(intervals: tuple[np.ndarray, np.ndarray], mean: float) -> float:
    low, high = intervals
    return float(np.mean((low <= mean) & (mean <= high)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=20_000)
    studies = parser.parse_args().studies
    rng = np.random.default_rng(0)
    found: dict[str, dict[int, dict[str, float]]] = {"normal": {}, "exponential": {}}
    for n in SEEDS:
        for name, values, mean in (
            ("normal", rng.standard_normal((studies, n)), 0.0),
            ("exponential", rng.standard_exponential((studies, n)), 1.0),
        ):
            parts = np.array_split(values, max(1, studies // 500))
            bca = [bca_interval(part, seed=i) for i, part in enumerate(parts)]
            joined = tuple(np.concatenate(side) for side in zip(*bca, strict=True))
            found[name][n] = {"t": coverage(t_interval(values), mean), "bca": coverage(joined, mean)}
            print(f"{name:<12} n = {n:>2}: t {found[name][n]['t']:.3f}, BCa {found[name][n]['bca']:.3f}")
    print(json.dumps({"benchmark": "interval_coverage", "studies": studies, "coverage": found}))


if __name__ == "__main__":
    main()
