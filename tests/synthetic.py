"""Made-up studies that follow the record schema, for tests of whatever reads records.

Numbers are drawn from a seeded generator and are consistent: scores are counts of the items table, divergences are
their differences, margins are minus λ.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

CREATED = "2025-01-01T12:00:00+00:00"
TASKS = ("skills_new", "skills_old")
SHOTS = (0, 1, 3, 5)
RECURRENT = {"mamba": "selective_scan", "mamba2": "ssd"}
PRECISION_NOISE = {"fp32": 0.0, "tf32": 0.01, "bf16": 0.06, "fp16": 0.03}


def architecture(model: str) -> str:
    """The architecture that a made-up model name stands for."""
    known = {"mamba": "mamba", "mamba2": "mamba2", "pythia": "gpt_neox", "llama": "llama"}
    return known[model.split("_")[0]]


def record(
    model: str = "mamba_tiny",
    precision: str = "bf16",
    peft: str = "lora",
    seed: int = 0,
    *,
    status: str = "ok",
    layers: int = 2,
    study: str = "synthetic",
    replicate: int = 0,
    overrides: tuple[str, ...] = (),
) -> dict[str, Any]:
    """One record without scores, divergence or files on disk."""
    text = json.dumps([model, precision, peft, seed, replicate, overrides])
    rng = np.random.default_rng(list(text.encode()))
    cell_id = "".join(rng.choice(list("0123456789abcdef"), 12))
    ran = status not in ("failed", "running", "oom", "interrupted")
    result: dict[str, Any] = {
        "schema_version": 1,
        "id": cell_id,
        "name": f"{model}-skills-{precision}-{peft}-s{seed}-{cell_id}",
        "study": study,
        "status": status,
        "error": None if status in ("ok", "running") else {"type": "RuntimeError", "message": f"made-up {status}"},
        "role": "reference" if precision == "fp32" else "cell",
        "created": CREATED,
        "finished": None if status == "running" else "2025-01-01T12:01:10+00:00",
        "config": {"model": {"name": model}, "trainer": {"steps": 120}},
        "overrides": [f"precision={precision}", f"peft={peft}", *overrides],
        "choices": {"model": model, "data": "skills", "task": "skills", "peft": peft, "precision": precision},
        "seed": seed,
        "replicate": replicate,
        "model": {
            "name": model,
            "architecture": architecture(model),
            "hash": "0" * 64,
            "parameters_total": 230_000,
            "parameters_trainable": 230_000 if peft == "none" else 31_000,
        },
        "precision": {
            "requested": precision,
            "effective": precision,
            "emulated": precision in ("bf16", "fp16"),
            "ops": {},
        },
        "kernels": {RECURRENT[architecture(model)]: "cpu-numba"} if architecture(model) in RECURRENT else {},
        "recurrences_unknown": [],
        "data": {
            "name": "skills",
            "hash": "1" * 64,
            "rows": 2880,
            "rows_dropped": 0,
            "rows_truncated": 0,
            "rows_bad": 0,
            "tokens": 150_000,
            "target_tokens": 30_000,
        },
        "peft": {"method": peft, "targets": [], "coverage": {}},
        "scores": [],
        "divergence": [],
        "environment": {
            "python": "3.11.7",
            "torch": "2.13.0",
            "lyapft": "0.1.0",
            "platform": "Linux",
            "cpu": "made-up CPU",
            "threads": 2,
            "device": "cpu",
            "git_commit": None,
        },
        "files": {"steps": "steps.parquet", "items": "items.parquet"},
    }
    if ran:
        result |= _results(result, rng, layers)
    return result


def _results(stub: dict[str, Any], rng: np.random.Generator, layers: int) -> dict[str, Any]:
    """What only a cell that trained to its end has."""
    family = RECURRENT.get(stub["model"]["architecture"])
    lambdas = [-0.02 * (1 + i) - 0.004 * rng.random() for i in range(layers)]
    per_layer = [
        {
            "layer": f"backbone.layers.{i}.mixer",
            "family": family,
            "lambda_max": value,
            "margin": -value,
            "norm_bound": value / 2,
        }
        for i, value in enumerate(lambdas)
    ]
    stable = {"lambda_max": max(lambdas), "margin": -max(lambdas), "norm_bound": max(lambdas) / 2, "layers": per_layer}
    fast = 1.4 if stub["choices"]["peft"] == "lora" else 1.0
    return {
        "training": {
            "steps": 120,
            "loss_first": 2.31,
            "loss_last": 0.4,
            "loss_mean_last_10pct": 0.42 + 0.1 * rng.random(),
            "skipped_steps": 3 if stub["precision"]["requested"] == "fp16" else 0,
            "loss_scale_last": None,
            "learning_rate": 1e-3,
        },
        "cost": {
            "tokens_per_s": 18_000 * fast * (1 + 0.1 * rng.random()),
            "peak_bytes": int(4e8 / fast),
            "peak_bytes_per_token": 4e8 / fast / 1536,
            "wall_s": 14.0,
            "eval_wall_s": 5.0,
        },
        "stability": stable if family else {"not_applicable": "attention has no fixed-size recurrent state"},
    }


def steps(source: dict[str, Any], n: int = 120) -> pd.DataFrame:
    """A step series for a record: a falling noisy loss, and slowly moving λ where the model has a recurrence."""
    rng = np.random.default_rng(int(source["id"], 16))
    t = np.arange(n)
    frame = pd.DataFrame({"step": t, "loss": 0.4 + 1.9 * np.exp(-t / 25) + 0.06 * rng.standard_normal(n)})
    frame["learning_rate"], frame["grad_norm"], frame["skipped"] = 1e-3, 1.0, False
    frame["tokens"], frame["step_s"], frame["tokens_per_s"] = 1536, 0.08, 19_200.0
    recurrent = source["model"]["architecture"] in RECURRENT
    unfinished = [{"layer": f"backbone.layers.{i}.mixer", "lambda_max": -0.02 * (i + 1)} for i in range(2)]
    layers = source.get("stability", {}).get("layers", []) or (unfinished if recurrent else [])
    for layer in layers:
        wander = np.cumsum(rng.standard_normal(n)) * 2e-4
        value = np.minimum(layer["lambda_max"] * (1 + 0.3 * (1 - np.exp(-t / 30))) + wander, -1e-4)
        name = layer["layer"]
        frame[f"lambda_max/{name}"], frame[f"margin/{name}"], frame[f"norm_bound/{name}"] = value, -value, value / 2
    if layers:
        frame["lambda_max"] = frame[[f"lambda_max/{layer['layer']}" for layer in layers]].max(axis=1)
        frame["margin"], frame["norm_bound"] = -frame["lambda_max"], frame["lambda_max"] / 2
    return frame


def items(source: dict[str, Any], n: int = 64) -> pd.DataFrame:
    """Per-item answers; a precision changes a few of the answers that the same model and seed gives in fp32."""
    choices = source["choices"]
    base = np.random.default_rng(list(f"{choices['model']}{choices['peft']}{source['seed']}".encode()))
    own = np.random.default_rng(int(source["id"], 16))
    rows = []
    for task in TASKS:
        for shots in SHOTS:
            right = base.random(n) < 0.25 + 0.6 * (1 - np.exp(-shots / 1.5)) * (0.9 if task == "skills_new" else 1.0)
            flip = own.random(n) < PRECISION_NOISE[choices["precision"]]
            for item in range(n):
                correct = bool(right[item] ^ flip[item])
                rows.append(
                    {
                        "task": task,
                        "subset": None,
                        "item": f"q{item}",
                        "shots": shots,
                        "gold": 0,
                        "choice": 0 if correct else 1,
                        "correct": correct,
                        "logprobs": [-1.0, -2.0, -3.0, -4.0],
                        "nll_gold": 1.0,
                    }
                )
    return pd.DataFrame(rows)


def scores(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Accuracy per task and shot count of an items table."""
    result = []
    for (task, shots), group in table.groupby(["task", "shots"], sort=False):
        p, n = float(group["correct"].mean()), len(group)
        stderr = float(np.sqrt(p * (1 - p) / n))
        chance = float((1 / group["logprobs"].map(len)).mean())
        score = {"task": task, "shots": int(shots), "metric": "acc", "value": p, "n": n, "stderr": stderr}
        result.append(score | {"chance": chance})
    return result


def _divergence(cell: dict[str, Any], by_choice: dict[tuple[Any, ...], dict[str, Any]]) -> list[dict[str, Any]]:
    """Both counterparts of a cell, as its record lists them."""
    entries = []
    for counterpart, peft in (("paper", "none"), ("precision_only", cell["choices"]["peft"])):
        entry: dict[str, Any] = {
            "counterpart": counterpart,
            "reference_id": None,
            "status": "missing",
            "mean_abs_points": None,
            "per_score": [],
        }
        reference = by_choice.get((cell["choices"]["model"], "fp32", peft, cell["seed"]))
        if reference is not None and reference["scores"]:
            entry["reference_id"] = reference["id"]
            entry["status"] = "self" if reference["id"] == cell["id"] else "ok"
        if entry["status"] == "ok":
            theirs = {(s["task"], s["shots"]): s["value"] for s in reference["scores"]}
            signed = [
                (s["task"], s["shots"], 100 * (s["value"] - theirs[s["task"], s["shots"]])) for s in cell["scores"]
            ]
            entry["per_score"] = [
                {"task": t, "shots": k, "signed_points": p, "abs_points": abs(p)} for t, k, p in signed
            ]
            entry["mean_abs_points"] = sum(abs(p) for _, _, p in signed) / len(signed)
        entries.append(entry)
    return entries


def study(folder: Path, records: list[dict[str, Any]], n_steps: int = 120, n_items: int = 64) -> list[dict[str, Any]]:
    """Fill in scores and divergences of the records and write them, their steps and items below `folder`."""
    tables = {}
    for cell in records:
        if "training" in cell and cell["status"] == "ok":
            tables[cell["id"]] = items(cell, n_items)
            cell["scores"] = scores(tables[cell["id"]])
    by_choice = {
        (c["choices"]["model"], c["choices"]["precision"], c["choices"]["peft"], c["seed"]): c for c in records
    }
    for cell in records:
        if cell["scores"]:
            cell["divergence"] = _divergence(cell, by_choice)
        home = folder / cell["name"]
        home.mkdir(parents=True, exist_ok=True)
        (home / "record.json").write_text(json.dumps(cell, indent=2), encoding="utf-8")
        if cell["status"] != "failed":
            done = n_steps if cell["status"] == "ok" else n_steps // 2
            steps(cell, done).to_parquet(home / "steps.parquet", index=False)
        if cell["id"] in tables:
            tables[cell["id"]].to_parquet(home / "items.parquet", index=False)
    return records


def matrix(models: tuple[str, ...] = ("mamba_tiny",), seeds: int = 1, layers: int = 2) -> list[dict[str, Any]]:
    """fp32, bf16 and fp16 times all weights and LoRA: a matrix with its references."""
    return [
        record(model, precision, peft, seed, layers=layers)
        for model in models
        for seed in range(seeds)
        for precision in ("fp32", "bf16", "fp16")
        for peft in ("none", "lora")
    ]
