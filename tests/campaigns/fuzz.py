"""Hand over other files and settings than the tests do, for as long as one likes.

    python -m tests.campaigns.fuzz 10          # minutes, over every target of tests/test_fuzz.py in turn
    python -m tests.campaigns.fuzz 10 records  # those whose name has this in it

The inputs that were refused by something else than a clear error are printed with the place, each kind once. Prints one
JSON line at the end; exits with 1 if there were any.
"""

import contextlib
import io
import json
import logging
import os
import random
import sys
import time
import traceback
from collections import Counter

import torch

from tests.test_fuzz import TARGETS

TURN_S = 10.0  # of a target, before the next one
LONGEST = 4096  # bytes that hypothesis makes an input of


def place(error: BaseException) -> str:
    """Kind of an error and the last line of ours that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}lyapft{os.sep}" in frame.filename]
    last = (ours or frames)[-1]
    return f"{type(error).__name__} at {os.path.basename(last.filename)}:{last.lineno}: {str(error)[:120]}"


def turn(target, until: float, draw: random.Random, found: Counter[str]) -> int:
    """How many inputs were tried until then."""
    tried = 0
    while time.monotonic() < until:
        tried += 1
        content = draw.randbytes(draw.randint(1, LONGEST))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                target.hypothesis.fuzz_one_input(content)
        except Exception as error:  # noqa: BLE001 - finding them is the purpose
            where = f"{target.__name__}: {place(error)}"
            if not found[where]:
                print(where, file=sys.stderr, flush=True)
                print(getattr(error, "__notes__", ""), file=sys.stderr, flush=True)
            found[where] += 1
    return tried


def main() -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * float(sys.argv[1])
    targets = [t for t in TARGETS if len(sys.argv) < 3 or sys.argv[2] in t.__name__]
    tried: Counter[str] = Counter()
    found: Counter[str] = Counter()
    draw = random.Random(time.time_ns())
    while time.monotonic() < end:
        for target in targets:
            until = min(end, time.monotonic() + TURN_S)
            tried[target.__name__.removeprefix("test_")] += turn(target, until, draw, found)
    print(json.dumps({"tried": dict(tried), "found": dict(found)}))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
