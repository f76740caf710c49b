"""The targets of tests/test_fuzz.py with inputs that libFuzzer chooses by the lines of lyapft that they reach.

    pip install -e '.[fuzz]'
    python -m tests.campaigns.guided 10          # minutes, shared by every target
    python -m tests.campaigns.guided 10 records  # those whose name has this in it

Each target runs in a fork of its own, until its time is over or its first input that is refused by something else than
a clear error, which libFuzzer prints and keeps as `crash-*` in the present folder. Prints one JSON line at the end;
exits with 1 if there were any.
"""

import json
import logging
import os
import re
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lyapft"]):
    from tests import test_fuzz

from tests.campaigns.fuzz import LONGEST
from tests.campaigns.kills import child


def guided(target, seconds: int, output: Path) -> int:
    """The exit code of libFuzzer on one target; 0 after its time."""

    def work() -> None:
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        atheris.Setup(["fuzz", f"-max_total_time={seconds}", f"-max_len={LONGEST}"], target.hypothesis.fuzz_one_input)
        atheris.Fuzz()

    return os.waitstatus_to_exitcode(os.waitpid(child(work), 0)[1])


def main() -> None:
    logging.disable(logging.WARNING)
    targets = [t for t in test_fuzz.TARGETS if len(sys.argv) < 3 or sys.argv[2] in t.__name__]
    seconds = round(60 * float(sys.argv[1]) / len(targets))
    test_fuzz.a_run()  # before the forks: one for all
    tried, found = {}, {}
    for target in targets:
        name = target.__name__.removeprefix("test_")
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "output"
            code = guided(target, seconds, output)
            text = output.read_text(errors="replace")
        runs = re.findall(r"^#(\d+)", text, re.MULTILINE)
        reached = re.findall(r"cov: (\d+)", text)
        tried[name] = {"runs": int(runs[-1]) if runs else 0, "reached": int(reached[-1]) if reached else 0}
        if code:
            found[name] = text[-3000:]
            print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    print(json.dumps({"tried": tried, "found": sorted(found)}))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
