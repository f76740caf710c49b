"""How well the planner predicts the embedded default: predicted over measured time and peak memory of whole cells.

    python benchmarks/plan.py [--models mamba_tiny mamba2_tiny llama_tiny] [--pefts none lora] [--precisions fp32 bf16]

Each cell is calibrated, run as a whole and compared, in an empty folder and this one process; one thread. The last line
is one JSON object: ratios by cell, and the largest error. Run it on an idle machine.
"""

import argparse
import json
import logging
import tempfile
from itertools import product

from lyapft import cell
from lyapft.plan import calibration
from lyapft.plan.cells import CELL, cells, composed, composing


def ratios(overrides: list[str]) -> dict[str, float]:
    """Predicted over measured."""
    with composing():
        (planned,) = (one for one in cells(composed(overrides)) if one.role == CELL)
    found = calibration.calibrate(planned)
    seconds = found.seconds(planned.config.trainer.steps, calibration.queries(planned.config))
    cost = cell.ensure(cell.prepare(planned.config))["cost"]
    return {"time": seconds / cost["wall_s"], "memory": (found.peak_bytes or 0) / cost["peak_bytes"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mamba_tiny", "mamba2_tiny", "llama_tiny"])
    parser.add_argument("--pefts", nargs="+", default=["none", "lora"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    given = parser.parse_args()
    logging.disable(logging.WARNING)
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
