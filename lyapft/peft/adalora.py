"""AdaLoRA: a budget of ranks that moves to the layers where they matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import PreTrainedModel

from lyapft.errors import InputError
from lyapft.peft.adapter import Adapter
from lyapft.peft.carry import ADAPTER

if TYPE_CHECKING:
    from lyapft.config import AdaLoraPeft, PeftConfig

IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of peft's allocator: by parameter name


class AdaLora(Adapter):
    """W + alpha/init_r · B diag(E) A; the least important entries of E are set to zero until target_r a layer remain.

    Importance is the smoothed |weight · gradient| of an entry of E with its row of A and column of B. The loss gains
    orthogonality · mean ‖P Pᵀ − I‖_F over all factors P, which keeps rows apart.

    Args:
        init_r, target_r: ranks per layer at first and, on average, at the end; init_r > target_r > 0.
        alpha: > 0.
        steps: optimizer steps of the whole training, on which the schedule is laid out.
        warmup, final: shares of the steps before the budget shrinks and after it has.
        every: steps between two allocations.
        orthogonality: weight of the penalty, ≥ 0.
        targets, min_coverage, memory_buffer, dropout: see `Adapter`.
    Raises:
        InputError: from the constructor, a value out of range, or too few steps for a schedule.
    Source: Zhang et al. 2023.
    """

    def __init__(
        self,
        steps: int,
        name: str = "adalora",
        init_r: int = 12,
        target_r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        warmup: float = 0.1,
        final: float = 0.3,
        every: int = 1,
        orthogonality: float = 0.5,
        targets: str | Sequence[str] = "auto",
        min_coverage: float = 1.0,
        memory_buffer: str = "tied",
    ) -> None:
        super().__init__(name, targets, min_coverage, memory_buffer, dropout)
        wrong = self._range_faults(steps, init_r, target_r, alpha, warmup, final, every, orthogonality)
        if wrong:
            raise InputError("\n".join(wrong))
        self.init_r, self.target_r, self.alpha, self.every = init_r, target_r, alpha, every
        self.orthogonality, self.steps = orthogonality, steps
        self.before, self.after = _phases(steps, warmup, final)

    @classmethod
    def faults(cls, cfg: PeftConfig) -> list[str]:
        """Values out of range."""
        own = cast("AdaLoraPeft", cfg)
        numbers = (own.init_r, own.target_r, own.alpha, own.warmup, own.final, own.every, own.orthogonality)
        return cls._range_faults(own.steps, *numbers) + super().faults(cfg)

    def settings(self) -> dict[str, Any]:
        """Ranks, scale, dropout, penalty."""
        ranks = {"init_r": self.init_r, "target_r": self.target_r, "alpha": self.alpha}
        return ranks | {"dropout": self.dropout, "orthogonality": self.orthogonality}

    def record(self) -> dict[str, Any]:
        """What `Adapter` says, and the ranks that are left, per layer."""
        left = {n: int((p != 0).sum()) for n, p in self.backbone.model.named_parameters() if ".lora_E." in n}
        return super().record() | {"ranks": {name.partition(".lora_E.")[0]: rank for name, rank in left.items()}}

    def inject(self, model: PreTrainedModel, names: list[str]) -> BaseTuner:
        """peft's AdaLoRA."""
        config = AdaLoraConfig(
            init_r=self.init_r,
            target_r=self.target_r,
            lora_alpha=cast(int, self.alpha),
            lora_dropout=self.dropout,
            target_modules=names,
            bias="none",
            tinit=self.before,
            tfinal=self.after,
            deltaT=self.every,
            total_step=self.steps,
            orth_reg_weight=self.orthogonality,
        )
        return _Unrefusing(model, config, ADAPTER)

    def penalty(self) -> Tensor | None:
        """What keeps the rows of A and the columns of B orthonormal."""
        factors = [(n, p) for n, p in self.backbone.model.named_parameters() if ".lora_A." in n or ".lora_B." in n]
        grams = [p @ p.T if ".lora_A." in n else p.T @ p for n, p in factors]
        norms = [torch.linalg.matrix_norm(g - torch.eye(len(g), device=g.device)) for g in grams]
        return self.orthogonality * torch.stack(norms).mean()

    def after_step(self, step: int) -> None:
        """Move the budget, as the gradients of this step say."""
        if all(p.grad is not None for p in self.trainable_parameters()):  # else liveness names the one without
            cast(AdaLoraModel, self.tuner).update_and_allocate(step)

    def training_state(self) -> dict[str, Any]:
        """Smoothed importance and its uncertainty, and the ranks that were kept."""
        tuner = cast(AdaLoraModel, self.tuner)
        ranks = tuner.peft_config[ADAPTER].rank_pattern
        return {name: getattr(tuner.rankallocator, name) for name in IMPORTANCE} | {"rank_pattern": ranks}

    def take_up(self, state: dict[str, Any]) -> None:
        """Go on with the importance that was known."""
        tuner = cast(AdaLoraModel, self.tuner)
        for name in IMPORTANCE:
            setattr(tuner.rankallocator, name, {k: v.to(self.backbone.model.device) for k, v in state[name].items()})
        tuner.peft_config[ADAPTER].rank_pattern = state["rank_pattern"]

    @staticmethod
    def _range_faults(
        steps: int,
        init_r: int,
        target_r: int,
        alpha: float,
        warmup: float,
        final: float,
        every: int,
        orthogonality: float,
    ) -> list[str]:
        wrong = []
        if not init_r > target_r > 0:
            wrong.append(
                f"peft.init_r={init_r} and peft.target_r={target_r}: init_r must exceed target_r, which is > 0"
            )
        positive = {"alpha": alpha, "every": every}
        wrong += [f"peft.{key}={value} must be greater than 0" for key, value in positive.items() if value <= 0]
        wrong += [] if orthogonality >= 0 else [f"peft.orthogonality={orthogonality} must not be negative"]
        shares = {"warmup": warmup, "final": final}
        wrong += [f"peft.{key}={value} must lie in [0, 1)" for key, value in shares.items() if not 0 <= value < 1]
        before, after = _phases(steps, warmup, final)
        if before + after >= steps:
            wrong.append(
                f"adalora has no step to move its budget in: {before} steps of warm-up and {after} at the end of "
                f"{steps}. Take more steps, or lower peft.warmup and peft.final"
            )
        return wrong


class _Unrefusing(AdaLoraModel):
    """peft's AdaLoRA without its refusal of Mamba's out_proj by name: see `lora.Unrefusing`."""

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Nothing left to refuse."""


def _phases(steps: int, warmup: float, final: float) -> tuple[int, int]:
    """Steps before the budget shrinks and after it has, at least one each."""
    return max(1, round(warmup * steps)), max(1, round(final * steps))
