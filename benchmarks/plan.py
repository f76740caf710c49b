"""How well the planner predicts the embedded default: predicted over measured time and peak memory of whole cells.

    python benchmarks/plan.py [--models mamba_tiny mamba2_tiny llama_tiny] [--pefts none lora] [--precisions fp32 bf16]

Each cell is calibrated by one process and run as a whole by another, as `lyapft.plan` and `train.py` are, in an empty
folder; one thread. The last line is one JSON object: ratios by cell, and the largest error. Run it on an idle machine.
"""

import argparse
import json
import logging
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

from lyapft import cell
from lyapft.plan import calibration
from lyapft.plan.cells import CELL, Planned, cells, composed, composing


def planned(overrides: list[str]) -> Planned:
    logging.disable(logging.WARNING)
    with composing():
        (found,) = (one for one in cells(composed(overrides)) if one.role == CELL)
    return found


def predicted(overrides: list[str]) -> tuple[float, float]:
    """Seconds and peak bytes of a whole cell, from a short one."""
    one = planned(overrides)
    found = calibration.calibrate(one)
    seconds = found.seconds(one.config.trainer.steps, calibration.queries(one.config))
    return seconds, found.peak_bytes or 0.0


def measured(overrides: list[str]) -> tuple[float, float]:
    """The same of a cell that ran."""
    cost = cell.ensure(cell.prepare(planned(overrides).config))["cost"]
    return cost["wall_s"], cost["peak_bytes"]


def ratios(overrides: list[str]) -> dict[str, float]:
    """Predicted over measured."""
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        both = [fresh.submit(work, overrides).result() for work in (predicted, measured)]
    return {name: there / here for name, there, here in zip(("time", "memory"), *both, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mamba_tiny", "mamba2_tiny", "llama_tiny"])
    parser.add_argument("--pefts", nargs="+", default=["none", "lora"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    given = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as runs:
        always = [f"runs={runs}", "reference=off", "threads=1", "trainer.progress=false"]
        for model, peft, precision in product(given.models, given.pefts, given.precisions):
            name = f"{model} {precision} {peft}"
            found[name] = ratios([f"model={model}", f"peft={peft}", f"precision={precision}", *always])
            print(name, {key: round(value, 3) for key, value in found[name].items()}, flush=True)
    worst = {key: max(abs(r[key] - 1) for r in found.values()) for key in ("time", "memory")}
    print(json.dumps({"ratios": found, "largest_error": worst}))


if __name__ == "__main__":
    main()
