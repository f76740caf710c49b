"""Kill trainings and studies at random moments, continue them, and compare with what was never killed.

    python -m tests.campaigns.kills resume 50     # attempts that go on from a checkpoint, over precisions and adapters
    python -m tests.campaigns.kills sweep 100     # kills of two processes that share one study

A cell tells how far it is, so that it is hit between two chosen steps or in its evaluation, not in its start-up.

Children are forked from a process that has everything imported and compiled, so that a kill costs a second or two. Says
on standard error what is done so far, prints one JSON line at the end; exits with 1 if anything differs.
"""

import json
import logging
import os
import random
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from lyapft import cell, records, tasks
from lyapft.probes import StepRecorder
from tests.test_cell import prepared
from tests.test_resume import HOW, MORE_HOW, same

STEPS = 12
EVALUATION, NOWHERE = STEPS + 1, STEPS + 2  # places after the last step: one that is reached, one that never is
CHECKPOINTS_S = (0.0, 0.2)  # after every step; or now and then, so that steps are done again
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
WAYS = (*(number.name for number in SIGNALS), "time limit")
MATRIX = [
    [f"precision={p}", f"peft={m}", f"seed={s}"] for p in ("bf16", "fp32") for m in ("lora", "none") for s in (0, 1)
]
OFTEN = [f"trainer.steps={STEPS}", "trainer.checkpoint_every_s=0.05"]
KILLS_OF_A_STUDY = 30  # then it may finish


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


def strike(pid: int, way: str, draw: random.Random) -> None:
    """End a process by a signal, or as a scheduler does at its time limit: asked first, killed soon after."""
    if way == "time limit":
        os.kill(pid, signal.SIGTERM)
        time.sleep(draw.uniform(0.0, 0.1))
        os.kill(pid, signal.SIGKILL)
    else:
        os.kill(pid, signal.Signals[way])


def telling(one: cell.Cell, pipe: int) -> None:
    """Run a cell that writes each place that it reaches, as one byte: its steps by number, and the evaluation."""
    record_step, evaluate = StepRecorder.on_train_batch_end, tasks.evaluate

    def step(self, trainer, *rest):
        record_step(self, trainer, *rest)
        os.write(pipe, bytes([trainer.global_step]))

    def score(*args, **settings):
        os.write(pipe, bytes([EVALUATION]))
        return evaluate(*args, **settings)

    StepRecorder.on_train_batch_end, tasks.evaluate = step, score
    record = cell.ensure(one)
    assert record["status"] == "ok", record["error"]


def attempt(one: cell.Cell, place: int, hit: Callable[[int], None]) -> tuple[list[int], bool]:
    """Run a cell in a process of its own until it has reached a place, then hit it.

    Returns:
        The places it was at, and whether it was cut off.
    """
    reading, writing = os.pipe()
    pid = child(lambda: telling(one, writing))
    os.close(writing)
    places: list[int] = []
    while True:
        if not select.select([reading], [], [], 300)[0]:
            raise RuntimeError(f"{one.folder} did nothing for 300 s after {places}")
        told = os.read(reading, 1)
        if not told:  # it has ended
            break
        places += told
        if places[-1] >= place:
            hit(pid)
            place = NOWHERE
    os.close(reading)
    code = ended(pid, 60)
    assert code is not None, "a process did not end within 60 s"
    return places, code != 0


def torn(whole: cell.Cell, one: cell.Cell, hits: list[tuple[int, str]], draw: random.Random) -> Counter[str]:
    """Run a cell that is hit at places of its training and evaluation, and compare it with its undisturbed twin.

    Returns:
        How often it was cut off in each way, and how often it went on from a checkpoint.
    """
    step_s = float(pd.read_parquet(whole.folder / records.STEPS)["step_s"].median())
    evaluation_s = records.load(whole.folder)["cost"]["eval_wall_s"]
    counts: Counter[str] = Counter()
    for place, way in [*hits, (NOWHERE, "")]:

        def hit(pid: int, place: int = place, way: str = way) -> None:
            time.sleep(draw.uniform(0.0, evaluation_s if place == EVALUATION else step_s))
            strike(pid, way, draw)

        places, cut = attempt(one, place, hit)
        assert cut or place >= EVALUATION, (place, way, places)
        if cut:
            counts[way] += 1
            counts["in the evaluation" if EVALUATION in places else "in the training"] += 1
        if places and places[0] > 1:  # there are none where the hit came after the record
            counts["went on from a checkpoint"] += 1
    same(whole, one)
    return counts


def resume(goal: int, folder: Path, draw: random.Random) -> dict:
    """Cells hit at random until so many attempts went on from a checkpoint; every precision and adapter once."""
    settings = ["reference=off", f"trainer.steps={STEPS}"]
    hows = HOW | MORE_HOW
    names, cells, counts = list(hows), 0, Counter()
    while counts["went on from a checkpoint"] < goal or cells < len(names):
        how = names[cells % len(names)]
        seed = f"seed={cells // len(names)}"
        whole = prepared(folder / "whole", *settings, *hows[how], seed)
        every = f"trainer.checkpoint_every_s={draw.choice(CHECKPOINTS_S)}"
        one = prepared(folder / f"torn{cells}", *settings, *hows[how], seed, every)
        assert cell.ensure(whole)["status"] == "ok"  # here: forks have its kernels ready
        places = [*sorted(draw.sample(range(2, STEPS), 2)), EVALUATION]
        counts += torn(whole, one, [(place, draw.choice(WAYS)) for place in places], draw)
        cells += 1
        say(f"{how}: the same; {cells} cells, {dict(counts)}")
    return {"cells": cells, "different": 0} | counts


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
        record = cell.ensure(prepared(runs, "reference=auto", *OFTEN, *overrides))
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
