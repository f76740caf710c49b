"""VeRA: frozen random factors, shared by all layers, and two trained vectors a layer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from peft import VeraConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.tuners.vera import VeraLayer, VeraModel
from transformers import PreTrainedModel

from lyapft.errors import InputError
from lyapft.peft.adapter import Adapter
from lyapft.peft.carry import ADAPTER, adapted_layers

if TYPE_CHECKING:
    from lyapft.config import PeftConfig, VeraPeft


class Vera(Adapter):
    """W + diag(b) B diag(d) A with B and A random, frozen and the same everywhere; b starts at 0, d at d_initial.

    Args:
        r: rank of the frozen factors, > 0; it costs r trained numbers a layer.
        d_initial: > 0.
        projection_seed: draws the frozen factors, which are not saved.
        targets, min_coverage, memory_buffer, dropout: see `Adapter`.
    Raises:
        InputError: from the constructor, a value out of range.
    Source: Kopiczko et al. 2024.
    """

    def __init__(
        self,
        name: str = "vera",
        r: int = 256,
        d_initial: float = 0.1,
        dropout: float = 0.0,
        projection_seed: int = 0,
        targets: str | Sequence[str] = "auto",
        min_coverage: float = 1.0,
        memory_buffer: str = "tied",
    ) -> None:
        super().__init__(name, targets, min_coverage, memory_buffer, dropout)
        wrong = self._range_faults(r, d_initial)
        if wrong:
            raise InputError("\n".join(wrong))
        self.r, self.d_initial, self.projection_seed = r, d_initial, projection_seed

    @classmethod
    def faults(cls, cfg: PeftConfig) -> list[str]:
        """Values out of range."""
        own = cast("VeraPeft", cfg)
        return cls._range_faults(own.r, own.d_initial) + super().faults(cfg)

    def settings(self) -> dict[str, Any]:
        """Rank, initial value, seed of the frozen factors, dropout."""
        frozen = {"r": self.r, "projection_seed": self.projection_seed}
        return frozen | {"d_initial": self.d_initial, "dropout": self.dropout}

    def inject(self, model: PreTrainedModel, names: list[str]) -> BaseTuner:
        """peft's VeRA."""
        with warnings.catch_warnings():
            # peft warns that its generator must give the same numbers again: they are drawn on the CPU from a seed
            warnings.filterwarnings("ignore", message="Specified to not save vera_A and vera_B")
            config = VeraConfig(
                r=self.r,
                target_modules=names,
                projection_prng_key=self.projection_seed,
                save_projection=False,
                vera_dropout=self.dropout,
                d_initial=self.d_initial,
                bias="none",
            )
        tuner = VeraModel(model, config, ADAPTER)
        for _, layer in adapted_layers(model):
            layer.register_forward_pre_hook(_same_format)
        return tuner

    @staticmethod
    def _range_faults(r: int, d_initial: float) -> list[str]:
        values = {"r": r, "d_initial": d_initial}
        return [f"peft.{key}={value} must be greater than 0" for key, value in values.items() if value <= 0]


def _same_format(layer: VeraLayer, _: Any) -> None:
    """Keep the frozen factors, which are buffers, in the format of the parameters, where these were cast to half."""
    for factor in (layer.vera_A, layer.vera_B):
        assert factor is not None
        if factor[ADAPTER].dtype != layer.vera_lambda_d[ADAPTER].dtype:
            factor[ADAPTER] = factor[ADAPTER].to(layer.vera_lambda_d[ADAPTER].dtype)
