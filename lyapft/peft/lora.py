"""LoRA and what differs from it by a scale, an initialisation, a magnitude or a learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from lyapft.errors import InputError
from lyapft.peft.adapter import Adapter
from lyapft.peft.carry import ADAPTER
from lyapft.peft.thin import ThinLinear

if TYPE_CHECKING:
    from lyapft.config import LoraPeft, PeftConfig

INITIALISATIONS = ("zero", "pissa")


class Lora(Adapter):
    """Low-rank adapters, W + s B A, on chosen layers; s = alpha / r.

    Args:
        r: rank, > 0.
        alpha: > 0.
        rank_stabilized: s = alpha / √r (rsLoRA).
        dora: train the magnitude of each output's weights apart from their direction (DoRA).
        init: `zero` (A random, B zero: the model starts unchanged) or `pissa`: A and B are the leading singular
            vectors of W and the frozen rest is what remains; an embedding's adapter starts as LoRA's.
        lr_ratio: B learns at this many times the rate of A (LoRA+); 1 in plain LoRA.
        lr_ratio_embedding: the same for both factors of an embedding's adapter.
        targets, min_coverage, memory_buffer, dropout: see `Adapter`.
    Raises:
        InputError: from the constructor, a value out of range.
    Source: Hu et al. 2021; rsLoRA: Kalajdzievski 2023; DoRA: Liu et al. 2024; PiSSA: Meng et al. 2024; LoRA+: Hayou et
        al. 2024; target sets of Mamba: Halloran et al. 2025.
    """

    NATIVE = (*Adapter.NATIVE, nn.Embedding)

    def __init__(
        self,
        name: str = "lora",
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        targets: str | Sequence[str] = "auto",
        min_coverage: float = 1.0,
        memory_buffer: str = "tied",
        rank_stabilized: bool = False,
        dora: bool = False,
        init: str = "zero",
        lr_ratio: float = 1.0,
        lr_ratio_embedding: float = 1.0,
    ) -> None:
        super().__init__(name, targets, min_coverage, memory_buffer, dropout)
        wrong = self._range_faults(r, alpha, init, lr_ratio, lr_ratio_embedding)
        if wrong:
            raise InputError("\n".join(wrong))
        self.r, self.alpha, self.init = r, alpha, init
        self.rank_stabilized, self.dora = rank_stabilized, dora
        self.lr_ratio, self.lr_ratio_embedding = lr_ratio, lr_ratio_embedding

    @classmethod
    def faults(cls, cfg: PeftConfig) -> list[str]:
        """Values out of range."""
        own = cast("LoraPeft", cfg)
        found = cls._range_faults(own.r, own.alpha, own.init, own.lr_ratio, own.lr_ratio_embedding)
        return found + super().faults(cfg)

    def settings(self) -> dict[str, Any]:
        """Rank, scale, dropout, and what else was switched on."""
        chosen: dict[str, Any] = {"r": self.r, "alpha": self.alpha, "dropout": self.dropout}
        extra = {"rank_stabilized": self.rank_stabilized, "dora": self.dora}
        return chosen | {key: True for key, on in extra.items() if on} | ({"init": self.init} if self.pissa else {})

    @property
    def pissa(self) -> bool:
        """Whether the adapter starts at the leading singular vectors."""
        return self.init == "pissa"

    def inject(self, model: PreTrainedModel, names: list[str]) -> BaseTuner:
        """peft's LoRA."""
        without_weights = next(model.parameters()).is_meta  # no singular vectors to be had
        config = LoraConfig(
            r=self.r,
            lora_alpha=cast(int, self.alpha),
            lora_dropout=self.dropout,
            target_modules=names,
            bias="none",
            use_rslora=self.rank_stabilized,
            use_dora=self.dora,
            init_lora_weights="pissa" if self.pissa and not without_weights else True,
        )
        config._register_custom_module({nn.Linear: ThinLinear})
        return Unrefusing(model, config, ADAPTER)

    def plain_peft(self) -> str | None:
        """As for every adapter; and peft ties the output layer to embeddings under plain LoRA only."""
        if self.tied_heads() and (self.dora or self.pissa):
            return f"peft does not tie the output layer to the embeddings under {self.name}"
        return super().plain_peft()

    def parameter_groups(self, model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """One rate for all, or those of LoRA+ as peft sorts them."""
        if self.lr_ratio == self.lr_ratio_embedding == 1:
            return super().parameter_groups(model, learning_rate, weight_decay)
        optimizer = create_loraplus_optimizer(
            model,  # only its named parameters are looked at
            torch.optim.AdamW,
            lr=learning_rate,
            loraplus_lr_ratio=self.lr_ratio,
            loraplus_lr_embedding=learning_rate * self.lr_ratio_embedding,
            loraplus_weight_decay=weight_decay,
        )
        return [
            {key: g[key] for key in ("params", "lr", "weight_decay")} for g in optimizer.param_groups if g["params"]
        ]

    @staticmethod
    def _range_faults(r: int, alpha: float, init: str, *ratios: float) -> list[str]:
        wrong = [] if r > 0 else [f"peft.r={r} must be greater than 0"]
        wrong += [] if alpha > 0 else [f"peft.alpha={alpha} must be greater than 0"]
        wrong += [] if init in INITIALISATIONS else [f"peft.init={init} must be one of {', '.join(INITIALISATIONS)}"]
        names = ("lr_ratio", "lr_ratio_embedding")
        return wrong + [f"peft.{n}={v} must be greater than 0" for n, v in zip(names, ratios, strict=True) if v <= 0]


class Unrefusing(LoraModel):
    """peft's LoRA without its refusal of Mamba's out_proj and conv1d by name.

    peft refuses them because kernels read their weights raw; here whoever reads them gets the adapted ones (`carry`).
    """

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Nothing left to refuse."""
