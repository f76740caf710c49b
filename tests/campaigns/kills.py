"""Kill trainings and studies at random moments, continue them, and compare with what was never killed.

    python -m tests.campaigns.kills resume 50     # kills of single cells, over precisions, adapters and signals
    python -m tests.campaigns.kills sweep 100     # kills of two processes that share one study

Children are forked from a process that has everything imported, so that a kill costs a second. Says on standard error
what is done so far, prints one JSON line at the end; exits with 1 if anything differs.
"""

import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from lyapft import cell, records
from tests.test_cell import prepared
from tests.test_resume import HOW, MORE_HOW, same

STEPS = ["reference=off", "trainer.steps=12", "trainer.checkpoint_every_s=0.05"]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
MATRIX = [
    [f"precision={p}", f"peft={m}", f"seed={s}"] for p in ("bf16", "fp32") for m in ("lora", "none") for s in (0, 1)
]
KILLS_OF_A_CELL, KILLS_OF_A_STUDY = 4, 30  # then it may finish


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def child(work) -> int:
    """The process id of a fork that does this work."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        work()
        code = 0
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os._exit(code)


def ended(pid: int, seconds: float) -> int | None:
    """How a child ended within so many seconds; None: it still runs."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def kill_and_wait(pid: int, number: int, seconds: float) -> bool:
    """Whether the signal reached the child before it was done."""
    if ended(pid, seconds) is not None:
        return False
    os.kill(pid, number)
    code = ended(pid, 60)
    if code is None:
        raise RuntimeError(f"a process did not end within 60 s of {signal.Signals(number).name}")
    return code != 0


def resume(kills: int, folder: Path, draw: random.Random) -> dict:
    """Cells killed at random until they are done, each compared with its twin; every precision and adapter once."""
    ended(child(lambda: cell.ensure(prepared(folder / "warm", *STEPS))), 300)  # kernels are compiled from here on
    counts: Counter[str] = Counter()
    hows = HOW | MORE_HOW
    names, cells, continued = list(hows), 0, 0
    while sum(counts.values()) < kills or cells < len(names):
        how = names[cells % len(names)]
        whole = prepared(folder / "whole", *STEPS, *hows[how])
        torn = prepared(folder / f"torn{cells}", *STEPS, *hows[how])
        started = time.monotonic()
        pid = child(lambda one=whole: cell.ensure(one))
        code = ended(pid, 300)
        assert code == 0, (how, code)
        seconds = max(1.0, time.monotonic() - started)
        for _ in range(KILLS_OF_A_CELL):
            number = draw.choice(SIGNALS)
            if kill_and_wait(child(lambda one=torn: cell.ensure(one)), number, draw.uniform(0.1, 1.1 * seconds)):
                counts[signal.Signals(number).name] += 1
        assert ended(child(lambda one=torn: cell.ensure(one)), 300) == 0, how
        same(whole, torn)
        continued += len(records.load(torn.folder)["resumed"]["at_steps"])
        cells += 1
        say(f"{how}: the same after {sum(counts.values())} kills in {cells} cells")
    return {"cells": cells, "kills": dict(counts), "taken up from a checkpoint": continued, "different": 0}


def alive(pid: int) -> bool:
    """Whether a process still does something."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def work(runs: Path, order: list[list[str]]) -> None:
    """What one process of a sweep does; a cell that another one runs at the same time is reported in `doubled`."""
    train, busy = cell.execute, runs.with_suffix(".busy")
    busy.mkdir(exist_ok=True)

    def execute(one, *rest):
        mark = busy / one.id
        holder = int(mark.read_text() or 0) if mark.exists() else 0
        if holder and alive(holder):
            (busy / "doubled").touch()
        mark.write_text(str(os.getpid()))
        train(one, *rest)
        mark.unlink()

    cell.execute = execute
    for overrides in order:
        record = cell.ensure(prepared(runs, "reference=auto", *STEPS[1:], *overrides))
        assert record["status"] == "ok", record["error"]


def torn_study(runs: Path, kills: int, counts: Counter[str], draw: random.Random) -> None:
    """Two processes on one study, each killed at random and started again until they are through."""

    def begin() -> int:
        order = draw.sample(MATRIX, len(MATRIX))
        return child(lambda: work(runs, order))

    pair = [begin(), begin()]
    enough = min(kills, sum(counts.values()) + KILLS_OF_A_STUDY)
    while pair and sum(counts.values()) < enough:
        time.sleep(draw.uniform(0.05, 1.5))
        victim, number = draw.choice(pair), draw.choice(SIGNALS)
        pair.remove(victim)
        if kill_and_wait(victim, number, 0.01):
            counts[signal.Signals(number).name] += 1
            pair.append(begin())
        for path in runs.glob("*/*/record.json"):
            records.load(path.parent)  # never half-written
    for pid in [*pair, begin()]:
        assert ended(pid, 600) == 0


def sweep(kills: int, folder: Path, draw: random.Random) -> dict:
    """Studies torn at random, each compared with a calm one."""
    counts: Counter[str] = Counter()
    studies, calm = 0, folder / "calm"
    assert ended(child(lambda: work(calm, MATRIX)), 600) == 0
    expected = {path.parent.name: records.load(path.parent) for path in calm.glob("*/*/record.json")}
    while sum(counts.values()) < kills:
        runs = folder / f"torn{studies}"
        torn_study(runs, kills, counts, draw)
        found = {path.parent.name: records.load(path.parent) for path in runs.glob("*/*/record.json")}
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        for name, record in found.items():
            assert record["status"] == "ok"
            assert record["scores"] == expected[name]["scores"], name
        left = [str(p) for p in runs.rglob("*") if "checkpoint" in p.name or records.LEFTOVER.fullmatch(p.name)]
        assert not left, left
        assert not (runs.with_suffix(".busy") / "doubled").exists()
        studies += 1
        say(f"study {studies}: the same after {sum(counts.values())} kills")
    return {"studies": studies, "cells": len(expected) * studies, "kills": dict(counts), "lost or doubled": 0}


def main() -> None:
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    what, kills = sys.argv[1], int(sys.argv[2])
    draw = random.Random(int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = {"resume": resume, "sweep": sweep}[what](kills, Path(folder), draw)
    print(json.dumps(found | {"seconds": round(time.monotonic() - started)}))


if __name__ == "__main__":
    main()
