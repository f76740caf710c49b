"""The parts of a record: what is known before a cell runs, and what its step series says afterwards."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import Callback

from lyapft import config, lyapunov, records, recurrence
from lyapft.cell.preparation import Cell
from lyapft.environment import PeakMemory, describe
from lyapft.guards import Guard
from lyapft.module import FineTuner
from lyapft.probes import AlertProbe
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
        "peak_source": memory.source + (", the shadow's passes included" if "shadow_s" in series else ""),
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


def shadow(series: pd.DataFrame) -> dict[str, Any]:
    """How far the number format was from float32 on the same weights, where a shadow probe ran.

    `nonfinite` of the n measurements overflowed in the format; means and extremes are over the others. Blocks that
    overflowed in any of them have no largest deviation.
    """
    if "shadow_s" not in series:
        return {}
    taken = series.dropna(subset=["shadow_s"])
    broken = int((~np.isfinite(taken[["shadow_kl", "shadow_deviation"]])).any(axis=1).sum())
    blocks = [name for name in series if name.startswith("shadow_deviation/")]
    numbers = {
        "kl_mean": taken["shadow_kl"].mean(),
        "kl_max": taken["shadow_kl"].max(),
        "top1_mean": taken["shadow_top1"].mean(),
        "top1_min": taken["shadow_top1"].min(),
        "deviation_max": taken["shadow_deviation"].max(),
        "seconds": taken["shadow_s"].sum(),
        "share_of_training": taken["shadow_s"].sum() / (series["step_s"].sum() + taken["shadow_s"].sum()),
    }
    layers = {name.removeprefix("shadow_deviation/"): float(taken[name].max(skipna=False)) for name in blocks}
    counts = {"n": len(taken), "nonfinite": broken}
    return {"shadow": counts | {k: float(v) for k, v in numbers.items()} | {"deviation_max_by_block": layers}}


def events(module: FineTuner, probes: Sequence[Callback], guards: Sequence[Callback]) -> dict[str, Any]:
    """What happened during a training, however it ended: updates withheld, alerts, and what a guard did."""
    alerts = [alert for probe in probes if isinstance(probe, AlertProbe) for alert in probe.given]
    actions = [action for guard in guards if isinstance(guard, Guard) for action in guard.actions]
    found: dict[str, Any] = {"nonfinite": module.nonfinite, "scaler_skips": module.scaler_skips}
    found |= {"alerts": alerts} if any(isinstance(probe, AlertProbe) for probe in probes) else {}
    return found | ({"guard_actions": actions} if guards else {})


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
