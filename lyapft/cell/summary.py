"""The parts of a record: what is known before a cell runs, and what its step series says afterwards."""

from typing import Any

import pandas as pd
from hydra.core.hydra_config import HydraConfig

from lyapft import config, lyapunov, records, recurrence
from lyapft.cell.preparation import Cell
from lyapft.environment import PeakMemory, describe
from lyapft.records import Record

WARM_UP_STEPS = 5  # left out of tokens/s: caches, allocators and compilation settle


def training(series: pd.DataFrame, skipped: int, learning_rate: float) -> dict[str, Any]:
    """The training part of a record."""
    tail = series["loss"].tail(max(1, len(series) // 10))
    return {
        "steps": len(series),
        "loss_first": float(series["loss"].iloc[0]),
        "loss_last": float(series["loss"].iloc[-1]),
        "loss_mean_last_10pct": float(tail.mean()),
        "skipped_steps": skipped,
        "loss_scale_last": float(series["loss_scale"].iloc[-1]),
        "learning_rate": learning_rate,
    }


def cost(series: pd.DataFrame, memory: PeakMemory, accumulate: int) -> dict[str, Any]:
    """Median speed after warm-up, and the training's peak memory."""
    steady = series.iloc[min(WARM_UP_STEPS, len(series) - 1) :]
    peak = memory.peak_bytes()
    in_flight = float(series["tokens"].max()) / accumulate
    return {
        "tokens_per_s": float(steady["tokens_per_s"].median()),
        "peak_bytes": peak,
        "peak_bytes_per_token": None if peak is None else peak / in_flight,
        "peak_source": memory.source,
    }


def stability(series: pd.DataFrame, seam: recurrence.Seam, scan_format: str) -> dict[str, Any]:
    """The worst numbers of the whole training, for the model and per layer.

    scan_format is the one of fp32, bf16 and fp16 that the recurrence ran in: its neutral zone is the real one, the
    others say what a change of format would do.
    """
    if not seam.layers and seam.unknown:
        return {"not_applicable": f"lyapft does not know the recurrence of {', '.join(seam.unknown)}"}
    if not seam.layers:
        return {"not_applicable": "the model has no fixed-size recurrent state: a key-value cache only grows"}
    if "lambda_max" not in series:
        return {"not_applicable": "no Lyapunov probe was switched on (probe=lyapunov)"}

    def worst(suffix: str) -> dict[str, float]:
        numbers = {field: float(series[f"{field}{suffix}"].max()) for field in lyapunov.FIELDS}
        lambda_max = numbers["lambda_max"]
        derived = {"margin": -lambda_max, "memory": lyapunov.memory(lambda_max), "gain": lyapunov.gain(lambda_max)}
        return numbers | derived

    measured = [layer for layer in seam.layers if f"lambda_max/{layer.name}" in series]
    layers = [{"layer": layer.name, "family": layer.family} | worst(f"/{layer.name}") for layer in measured]
    return worst("") | {"scan_format": scan_format, "layers": layers}


def stub(cell: Cell) -> Record:
    """What is known of a cell before it runs."""
    cfg = cell.config
    return {
        "schema_version": records.SCHEMA_VERSION,
        "id": cell.id,
        "name": cell.folder.name,
        "study": cfg.study.name,
        "status": "running",
        "error": None,
        "role": cell.role,
        "created": records.now(),
        "finished": None,
        "config": cell.science,
        "paths": {group: config.paths_of(cfg[group]) for group in ("model", "data", "task")},
        "overrides": list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else [],
        "choices": {group: cfg[group].name for group in ("model", "data", "task", "peft", "precision")},
        "seed": cfg.seed,
        "replicate": cfg.replicate,
        "environment": describe(cell.device, cell.threads),
        "files": {"steps": records.STEPS, "items": records.ITEMS, "weights": None},
        "scores": [],
        "divergence": [],
    }
