"""Cells beside one another: wall time of a study in n processes over the time of its work on n cores.

    python benchmarks/parallel.py [--jobs 2] [overrides of train.py]

The same cells, without references, run one by one on one thread, then with hydra/launcher=joblib, each time by a
process of its own in an empty folder. Work is the wall time of the first command, start of Python and report included.
The last line is one JSON object: ratio = parallel wall · jobs / work; cpu_ratio compares processor time, which other
work on the machine changes less. Run it on an idle machine.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
CELLS = ["model=mamba_tiny,llama_tiny", "precision=fp32,bf16", "peft=none,lora", "seed=0,1"]
ALWAYS = ["-m", "reference=off", "threads=1", "trainer.progress=false"]


def seconds(arguments: list[str]) -> tuple[float, float, float]:
    """Wall time of a command, its processor time, and the wall time of its cells by their records."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with tempfile.TemporaryDirectory() as folder:
        started, used = time.perf_counter(), processor_time()
        done = subprocess.run(
            [sys.executable, str(TRAIN), *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            check=False,
        )
        elapsed, used = time.perf_counter() - started, processor_time() - used
        if done.returncode != 0:
            raise SystemExit(f"train.py {' '.join(arguments)} ended with code {done.returncode}")
        records = [json.loads(path.read_text()) for path in Path(folder).glob("runs/*/*/record.json")]
    return elapsed, used, sum(record["cost"]["wall_s"] for record in records)


def processor_time() -> float:
    """Of all processes that this one has waited for, and of theirs."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("overrides", nargs="*", default=CELLS)
    given = parser.parse_intermixed_args()
    work, cpu, alone = seconds([*ALWAYS, *given.overrides])
    print(json.dumps({"work_s": work, "cpu_s": cpu, "cells_s": alone}), flush=True)
    launcher = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={given.jobs}"]
    wall, cpu_beside, beside = seconds([*ALWAYS, *launcher, *given.overrides])
    found = {"work_s": work, "wall_s": wall, "ratio": wall * given.jobs / work, "cells_slower": beside / alone}
    found["cpu_ratio"] = cpu_beside / cpu
    print(json.dumps({key: round(value, 2) for key, value in found.items()}))


if __name__ == "__main__":
    main()
