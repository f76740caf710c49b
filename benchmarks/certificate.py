"""Is the rounding certificate sound, and how tight is it?

    python benchmarks/certificate.py [--draws 10000] [--seed 0]

Draws are those of `lyapft.experiments.soundness`; every kernel and format has its share, at lengths up to 4,096
tokens. Counted: violations (some measured deviation not below its bound: there must be none) and overflows (left out).
The ratio of a draw is its largest bound over its largest measured deviation. The last line is one JSON object.
"""

import argparse
import json
import statistics
import time

import torch

from lyapft.experiments.soundness import LENGTHS, NAMES, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator, started = torch.Generator().manual_seed(arguments.seed), time.perf_counter()
    layers = -(-arguments.draws // (len(NAMES) * len(LENGTHS)))
    violations = overflows = 0
    ratios: dict[str, list[float]] = {kernel: [] for kernel in NAMES}
    for kernel in NAMES:
        for length in LENGTHS:
            violated, overflowed, found = run(kernel, layers, length, generator)
            violations, overflows = violations + violated, overflows + overflowed
            ratios[kernel] += found
        print(f"{kernel:<12} median bound/measured {statistics.median(ratios[kernel]):8.1f}")
    result = {
        "draws": layers * len(NAMES) * len(LENGTHS),
        "violations": violations,
        "overflows": overflows,
        "median_ratio": round(statistics.median(ratio for kernel in ratios.values() for ratio in kernel), 2),
        "share_above_1000": round(statistics.mean(ratio > 1000 for found in ratios.values() for ratio in found), 3),
        "median_ratio_by_kernel": {kernel: round(statistics.median(found), 2) for kernel, found in ratios.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
