"""The Lyapunov probe: what the recurrence of every layer says at every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lyapft import lyapunov, ranks
from lyapft.recurrence import packing

if TYPE_CHECKING:
    from lyapft.module import FineTuner
    from lyapft.recurrence import Layer, Seam


SPECTRUM_POINTS = 257


class LyapunovProbe(Callback):
    """λ_max, margin, norms and neutral zones of every recurrent layer at every step, from the Δ of the forward pass.

    Each layer's Δ is reduced when the tap shows it, while it is still in the cache, and is not kept. Over the
    micro-batches of one optimizer step, whichever process has them, and over layers, the maximum of each number (the
    worst) is reported.

    Attributes:
        profiles: layer -> the last measured micro-batch per sequence and per token.
        spectra: layer -> all exponents of the training's last micro-batch, slowest first.
        products: layer -> its log‖J_t ⋯ J_1‖, (B, L).
    """

    def __init__(self, every: int = 1, per_layer: bool = True) -> None:
        """
        Args:
            every: steps between two measurements.
            per_layer: report each layer besides the whole model.
        """
        self.every = every
        self.per_layer = per_layer
        self._seam: Seam | None = None
        self._mask = torch.empty(0)
        self._packed: Tensor | None = None  # (S,M) tokens of the sequences of a packed batch
        self._worst: dict[str, list[float]] = {}
        self.profiles: dict[str, lyapunov.Profile] = {}
        self.spectra: dict[str, Tensor] = {}
        self.products: dict[str, Tensor] = {}
        self._last = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hear of batches that go through the model in parts."""
        cast("FineTuner", pl_module).watchers.append(self._next_part)

    def bind(self, seam: Seam) -> None:
        """Observe the recurrence of this model."""
        self._seam = seam

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Open the tap on the steps that are measured."""
        if self._seam is None or not self._seam.layers:
            return
        if batch_idx % cast("FineTuner", pl_module).settings.accumulate == 0:
            self._worst = {}
        self.profiles = {}
        self._begin(batch)
        self._last = trainer.global_step == trainer.max_steps - 1
        self._seam.tap = self._reduce if self._last or trainer.global_step % self.every == 0 else None

    def _begin(self, batch: Mapping[str, Tensor]) -> None:
        """Know the tokens of the forward pass that comes next."""
        self._mask, self._packed = batch["attention_mask"], None
        if "sequence" in batch:
            self._unpack(packing.rows(batch["sequence"]))

    def _next_part(self, part: Mapping[str, Tensor]) -> None:
        self._take_over()
        self._begin(part)

    def _unpack(self, rows: packing.Rows) -> None:
        """λ is per sequence: one row for each of a packed batch, padding left out."""
        mask_SM = rows.split(self._mask) * rows.real_SM
        kept = mask_SM.any(1)
        self._mask, self._packed = mask_SM[kept], rows.token_SM[kept]

    def _reduce(self, layer: Layer, delta: Tensor, A: Tensor) -> None:
        if self._packed is not None:
            delta = delta.flatten(0, 1)[self._packed]
        self.profiles[layer.name] = lyapunov.stability_profile(delta, A, self._mask)
        if self._last:
            self.spectra[layer.name] = lyapunov.spectrum(delta, A, self._mask)
            self.products[layer.name] = lyapunov.log_running_product(delta, A, self._mask)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Let the step's row say what the layers said."""
        if self._seam is None or not self.profiles:
            return
        self._seam.tap = None
        self._take_over()
        cast("FineTuner", pl_module).observed.update(self._summary())

    def _take_over(self) -> None:
        """The worst so far, with one copy to the host."""
        if not self.profiles:
            return
        found = torch.stack([profile.numbers for profile in self.profiles.values()])
        numbers = ranks.largest(found).tolist()
        for name, row in zip(self.profiles, numbers, strict=True):
            self._worst[name] = [max(pair) for pair in zip(row, self._worst.get(name, row), strict=True)]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Have the training's last micro-batch on every process."""
        if ranks.many() and (last := ranks.from_last(self.state_dict())):
            self.load_state_dict(last)

    def state_dict(self) -> dict[str, Any]:
        """What `table` is made of, once the training is over."""
        if not self.spectra:
            return {}
        return {
            "mask": self._mask,
            "profiles": {k: tuple(v) for k, v in self.profiles.items()},
            "spectra": self.spectra,
            "products": self.products,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Know what a training that was cut off after its end had measured."""
        self._mask, self.spectra, self.products = (state_dict[key] for key in ("mask", "spectra", "products"))
        self.profiles = {name: lyapunov.Profile(*values) for name, values in state_dict["profiles"].items()}

    def table(self) -> pd.DataFrame:
        """The recurrence at the end of the training: columns layer, kind, index, value (nats per token).

        Kinds: `spectrum`, all exponents, slowest first, at SPECTRUM_POINTS quantiles (index 0..1 is the share of
        exponents before it); `sequence`, the largest exponent of each sequence; `position`, the mean over sequences of
        log‖J_t‖ at each token; `product`, the largest over sequences of log‖J_t ⋯ J_1‖ there: transient growth.
        """
        tables = []
        for layer, profile in self.profiles.items():
            exponents = self.spectra[layer]
            share = np.linspace(0, 1, min(SPECTRUM_POINTS, len(exponents)))
            real_BL = self._mask.bool()
            mean_L = profile.log_norm_BL.sum(0) / real_BL.sum(0).clamp(min=1)
            series = {
                "spectrum": (share, exponents.cpu().numpy()[(share * (len(exponents) - 1)).round().astype(int)]),
                "sequence": (np.arange(len(profile.lambda_B)), profile.lambda_B.cpu().numpy()),
                "position": (np.arange(len(mean_L)), mean_L.cpu().numpy()),
                "product": (np.arange(len(mean_L)), self.products[layer].amax(0).cpu().numpy()),
            }
            tables += [
                pd.DataFrame({"layer": layer, "kind": kind, "index": index.astype(float), "value": value})
                for kind, (index, value) in series.items()
            ]
        return pd.concat(tables, ignore_index=True)

    def _summary(self) -> dict[str, float]:
        worst = [max(column) for column in zip(*self._worst.values(), strict=True)]
        summary = _named(worst, "")
        if self.per_layer:
            for name, numbers in self._worst.items():
                summary |= _named(numbers, f"/{name}")
        return summary


def _named(numbers: list[float], suffix: str) -> dict[str, float]:
    named = {f"{field}{suffix}": number for field, number in zip(lyapunov.FIELDS, numbers, strict=True)}
    return named | {f"margin{suffix}": -named[f"lambda_max{suffix}"]}
