"""Time and memory of the report of a very large study, on one core.

    python benchmarks/report_scale.py [--cells 100000] [--seeds 41] [--folder FOLDER]

A short cell is trained for its record and its files; then a study of that many finished cells is made up around it:
records of the same shape and size with their own identity, choices, scores, divergences and costs, 1% of the fp16 cells
broken down, each with links to the cell's files, and the plan of them all. `python -m lyapft.report` on that folder is
what is measured, files in the page cache. The last line is one JSON object: seconds, peak resident MiB, sizes.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lyapft import divergence, records
from lyapft.plan import cells, file

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
SHORT = ["reference=off", "trainer.steps=120", "trainer.progress=false", "model=mamba_tiny", "study.name=one"]
MODELS = {f"mamba_{size}": True for size in ("130m", "370m", "790m", "1.4b", "2.8b")}
MODELS |= {f"mamba2_{size}": True for size in ("130m", "370m", "780m", "1.3b", "2.7b")}
MODELS |= {f"pythia_{size}": False for size in ("160m", "410m", "1b", "1.4b", "2.8b")}
MODELS |= {"olmo_1b": False, "tinyllama_1.1b": False}
SETS, PEFTS, PRECISIONS = ("alpaca", "sharegpt"), ("none", "lora", "lora_all"), ("fp32", "bf16", "fp16")
COUNTERPARTS = {"paper": "none", "precision_only": None}  # their peft; None: the cell's own
TOKEN = re.compile(r'"@(\d+)@"')


def short_cell(folder: Path) -> tuple[dict[str, Any], Path]:
    """The record of a short cell, and its folder."""
    subprocess.run([sys.executable, str(TRAIN), *SHORT], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (home,) = (path.parent for path in folder.glob(f"runs/one/*/{records.RECORD}"))
    return records.load(home), home


class Template:
    """A record as text with gaps, so that a hundred thousand of them need no encoder each."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.values: list[Any] = []
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        self.parts = TOKEN.split(text)

    def filled(self, values: dict[int, Any]) -> str:
        """The text of one record."""
        parts = list(self.parts)
        parts[1::2] = [json.dumps(values[int(place)]) for place in parts[1::2]]
        return "".join(parts)


def gaps(value: Any, found: list[Any]) -> Any:
    """The same with a token for every leaf, which are appended to `found`."""
    if isinstance(value, dict):
        return {key: gaps(one, found) for key, one in value.items()}
    if isinstance(value, list):
        return [gaps(one, found) for one in value]
    found.append(value)
    return f"@{len(found) - 1}@"


VARYING = ("id", "name", "seed", "scores", "divergence", "training", "stability", "cost")


def write(record: dict[str, Any], folder: Path, templates: dict[Any, Template]) -> None:
    """As `records.save` writes it, byte for byte, without its flush to the disk."""
    leaves: list[Any] = []
    varying = {key: gaps(record[key], leaves) for key in VARYING}
    config = record["config"] | {"seed": gaps(record["seed"], leaves)}
    key = (json.dumps([record["choices"], record["overrides"]]), record["status"], len(leaves))
    if key not in templates:
        templates[key] = Template(record | varying | {"config": config})
    folder.mkdir()
    with (folder / records.RECORD).open("w", encoding="utf-8") as out:
        out.write(templates[key].filled(dict(enumerate(leaves))))


def recipes(learning_rates: int) -> Iterator[tuple[str, str, str, str, float]]:
    rates = [float(rate) for rate in np.geomspace(1e-5, 1e-3, learning_rates).round(8)]
    return itertools.product(MODELS, SETS, PEFTS, PRECISIONS, rates)  # type: ignore[return-value]


def study(base: dict[str, Any], count: int, seeds: int) -> Iterator[dict[str, Any]]:
    """Records of `count` cells, references before the cells that need them, seed by seed."""
    rng = np.random.default_rng(0)
    per_seed = len(MODELS) * len(SETS) * len(PEFTS) * len(PRECISIONS)
    rates = max(1, round(count / (per_seed * seeds)))
    made = 0
    for seed in itertools.count():
        known: dict[tuple[str, ...], dict[str, Any]] = {}
        for model, data, peft, precision, rate in recipes(rates):
            if made == count:
                return
            record = cell(base, model, data, peft, precision, rate, seed, rng)
            known[model, data, peft, precision, str(rate)] = record
            if record["status"] == "ok":
                others = {
                    kind: known[model, data, own or peft, "fp32", str(rate)] for kind, own in COUNTERPARTS.items()
                }
                record["divergence"] = compared(record, others, rng)
            made += 1
            yield record


def cell(
    base: dict[str, Any], model: str, data: str, peft: str, precision: str, rate: float, seed: int, rng: Any
) -> dict[str, Any]:
    """The record of one made-up cell, not yet compared."""
    choices = {"model": model, "data": data, "task": "paper", "peft": peft, "precision": precision}
    own = hashlib.sha256(repr((choices, rate, seed)).encode()).hexdigest()[:12]
    config = {**base["config"], "seed": seed, "trainer": base["config"]["trainer"] | {"learning_rate": rate}}
    for group, name in choices.items():
        config[group] = config[group] | {"name": name}
    broken = precision == "fp16" and rng.random() < 0.01
    record = base | {
        "id": own,
        "name": f"{model}-{data}-{precision}-{peft}-s{seed}-{own}",
        "study": "scale",
        "status": "nonfinite" if broken else "ok",
        "error": {"type": "NonFinite", "message": "10 steps in a row without a finite gradient"} if broken else None,
        "role": "reference" if precision == "fp32" else "cell",
        "config": config,
        "overrides": [*(f"{key}={value}" for key, value in choices.items()), f"trainer.learning_rate={rate}"],
        "choices": choices,
        "seed": seed,
        "model": base["model"] | {"name": model, "parameters_total": int(1e6 * (1 + list(MODELS).index(model)))},
        "precision": base["precision"] | {"requested": precision, "effective": precision},
        "training": jittered(base["training"], rng),
        "cost": jittered(base["cost"], rng),
        "stability": jittered(base["stability"], rng),
        "scores": [] if broken else [drawn(score, rng) for score in base["scores"]],
        "divergence": [],
    }
    if not MODELS[model]:
        record |= {"kernels": {}, "stability": {"not_applicable": "the model has no fixed-size recurrent state"}}
    return record


def jittered(value: Any, rng: Any) -> Any:
    """Every float moved by some per cent."""
    if isinstance(value, dict):
        return {key: jittered(one, rng) for key, one in value.items()}
    if isinstance(value, list):
        return [jittered(one, rng) for one in value]
    return value * (1 + 0.05 * rng.random()) if isinstance(value, float) else value


def drawn(score: dict[str, Any], rng: Any) -> dict[str, Any]:
    """A score as if its items had been answered anew."""
    value = int(rng.binomial(score["n"], 0.25 + 0.1 * score["shots"])) / score["n"]
    return score | {"value": value, "stderr": float(np.sqrt(value * (1 - value) / score["n"]))}


def compared(record: dict[str, Any], others: dict[str, dict[str, Any]], rng: Any) -> list[dict[str, Any]]:
    """Divergences, with answers as the cell itself would have counted them."""
    entries = divergence.against_counterparts(
        record, {kind: None if other is record else other for kind, other in others.items()}
    )
    n = sum(score["n"] for score in record["scores"])
    for entry in entries:
        if entry["status"] == "ok":
            gained, lost = (int(rng.binomial(n, 0.05)) for _ in range(2))
            entry["flips"] = {"n": n, "flipped": gained + lost, "gained": gained, "lost": lost, "unpaired": 0}
            shift = {"kl": float(rng.exponential(0.01)), "nll_gold": float(rng.normal(0, 0.01))}
            entry["answer_shift"] = {"n": n, **shift, "left_out": 0}
    return entries


def make(folder: Path, count: int, seeds: int) -> None:
    """The whole study, its files and its plan."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        base, home = short_cell(Path(temporary))
        folder.mkdir()
        templates: dict[Any, Template] = {}
        entries = []
        beside = [name for name in (records.STEPS, records.ITEMS, records.STABILITY) if (home / name).exists()]
        for record in study(base, count, seeds):
            target = folder / record["name"]
            write(record, target, templates)
            for name in beside:
                linked(home / name, target / name)
            recipe = cells.recipe_of(cells.settings_of(record["config"]))
            settings = {"recipe": recipe, "role": cells.CELL, "choices": record["choices"], "seed": record["seed"]}
            entries.append({"key": cells.key_of(record), **settings, "replicate": 0, "threads": 1})
        records.save_json(folder / file.FILE, entries)
        as_saved = Path(temporary) / "as_saved"
        records.save(as_saved, record)
        assert (as_saved / records.RECORD).read_bytes() == (target / records.RECORD).read_bytes()


def linked(source: Path, target: Path) -> None:
    """A hard link, or a copy where a file has no room for another."""
    try:
        os.link(source, target)
    except OSError:
        target.write_bytes(source.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=41, help="of each recipe, about; learning rates make up the rest")
    parser.add_argument("--folder", type=Path, help="keep the study here, or measure the one that is there")
    parser.add_argument("--make-only", action="store_true", help="write the study into the folder, measure nothing")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary) / "scale").absolute()
        if not folder.exists():
            make(folder, given.cells, given.seeds)
        size = sum(path.stat().st_size for path in folder.glob(f"*/{records.RECORD}"))
        if given.make_only:
            return
        started = time.perf_counter()
        command = [sys.executable, "-m", "lyapft.report", str(folder)]
        pid = os.posix_spawn(sys.executable, command, os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, used = os.wait4(pid, 0)
        seconds = time.perf_counter() - started
        if status:
            raise SystemExit(f"{' '.join(command)} ended with status {status}")
        found = {"cells": given.cells, "seconds": round(seconds, 1), "cpu_s": round(used.ru_utime + used.ru_stime, 1)}
        found |= {"peak_mib": round(used.ru_maxrss / 1024), "records_mib": round(size / 2**20)}
        found |= {"page_mib": round((folder / "report.html").stat().st_size / 2**20, 1)}
        print(json.dumps(found))


if __name__ == "__main__":
    main()
