"""Wall time of the commands typed first: `--help`, the default cell with its references, the matrix of four.

    python benchmarks/wall_time.py [--only help train matrix]

Each command runs as a process of its own, in an empty folder, with its references; the last line is one JSON object in
seconds. Run it on an idle machine: unlike the ratios of train_step.py, these are times of this machine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
COMMANDS = {
    "help": ["--help"],
    "train": [],
    "matrix": ["-m", "precision=bf16,fp16", "peft=lora,none"],
}


def seconds(arguments: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(TRAIN), *arguments], cwd=folder, stdout=subprocess.DEVNULL, check=False
        )
        elapsed = time.perf_counter() - started
    if done.returncode != 0:
        raise SystemExit(f"train.py {' '.join(arguments)} ended with code {done.returncode}")
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    print(json.dumps({f"{name}_s": round(seconds(COMMANDS[name]), 1) for name in parser.parse_args().only}))


if __name__ == "__main__":
    main()
