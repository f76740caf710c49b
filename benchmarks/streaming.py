"""Memory of a pass over a large file, read whole or as the training needs it.

    python benchmarks/streaming.py [--megabytes 20 200]

Each pass is a process of its own, which draws every batch of 32 rows and trains nothing; the last line is one JSON
object: the process's greatest resident set above that of its imports, in MiB, and the time of the pass.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROW = {"instruction": "Repeat the sentence.", "input": "", "output": "A sentence of some forty letters. " * 12}
BATCH = 32


def write(path: Path, megabytes: int) -> int:
    """Rows of JSON lines; how many."""
    count, written = 0, 0
    with path.open("w") as file:
        while written < megabytes * 10**6:
            written += file.write(json.dumps(ROW | {"input": str(count)}) + "\n")
            count += 1
    return count


def draw(path: Path, rows: int, streaming: bool) -> None:
    """One pass, in this process."""
    from lyapft import backbone, config
    from lyapft.data import Alpaca, Stream, build

    config.register()
    tokenizer = backbone.skeleton(config.load_choice("model", "mamba_tiny")).tokenizer
    before, started = peak(), time.perf_counter()
    source = Alpaca("alpaca", str(path), streaming=streaming)
    content = source.fingerprint()
    data = Stream(source, tokenizer, 512, content) if streaming else build(source, tokenizer, 512, content)
    drawn = sum(len(batch["rows"]) for batch in data.batches(BATCH, rows // BATCH, seed=0))
    seconds = time.perf_counter() - started
    print(json.dumps({"rows": drawn, "mib": round(peak() - before), "s": round(seconds, 1)}))


def peak() -> float:
    """The greatest resident set of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", nargs="+", type=int, default=[20, 200])
    parser.add_argument("--draw", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.draw:
        path, rows, how = asked.draw
        return draw(Path(path), int(rows), how == "streamed")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in asked.megabytes:
            path = Path(folder) / f"{size}.jsonl"
            rows = write(path, size)
            for how in ("streamed", "whole"):
                command = [sys.executable, __file__, "--draw", str(path), str(rows), how]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[f"{size} MB, {how}"] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found))
    return None


if __name__ == "__main__":
    main()
