"""(IA)³: one trained factor per activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import IA3Config
from peft.tuners.ia3 import IA3Model
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from transformers import PreTrainedModel

from lyapft.peft.adapter import Adapter
from lyapft.peft.carry import ADAPTER
from lyapft.peft.targets import resolve_targets
from lyapft.peft.views import MatrixView


class Ia3(Adapter):
    """Factors, 1 at first, on the outputs of layers, or on their inputs where these are feed-forward activations.

    `auto` targets are those of peft for the model, where it has some, else as for LoRA. Inputs are scaled in the layers
    that peft calls feed-forward, and embeddings are scaled per dimension.

    Args:
        targets, min_coverage, memory_buffer: see `Adapter`.
    Source: Liu et al. 2022.
    """

    def __init__(
        self,
        name: str = "ia3",
        targets: str | Sequence[str] = "auto",
        min_coverage: float = 1.0,
        memory_buffer: str = "tied",
    ) -> None:
        super().__init__(name, targets, min_coverage, memory_buffer)

    def settings(self) -> dict[str, Any]:
        """None of its own."""
        return {}

    def resolve(self, model: PreTrainedModel) -> list[str]:
        """peft's choice for the model, or the targets."""
        usual = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(str(model.config.model_type))
        return resolve_targets(model, usual if usual and self.targets == "auto" else self.targets)

    def inject(self, model: PreTrainedModel, names: list[str]) -> BaseTuner:
        """peft's (IA)³."""
        leaves = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(str(model.config.model_type), [])
        embeddings = isinstance(model.get_input_embeddings(), MatrixView)
        inner = [n for n in names if n.rpartition(".")[2] in leaves]
        inner += [n for n in names if embeddings and model.get_submodule(n) is model.get_input_embeddings()]
        return IA3Model(model, IA3Config(target_modules=names, feedforward_modules=inner), ADAPTER)
