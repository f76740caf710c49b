"""Which parameters of a backbone train: strategies, and the proof that what trains is alive.

A strategy is attached once, saved as safetensors, loaded again onto the same base weights, and merged into an ordinary
model. Each choice of `conf/peft/` names its class in `_target_`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from hydra.utils import get_class

from lyapft.peft.adalora import AdaLora
from lyapft.peft.base import Strategy
from lyapft.peft.bitfit import BitFit
from lyapft.peft.carry import TiedHead, adapted_layers, effective_weight
from lyapft.peft.full import FullFineTuning
from lyapft.peft.ia3 import Ia3
from lyapft.peft.liveness import Liveness, LivenessError
from lyapft.peft.lora import Lora
from lyapft.peft.sdt import SelectiveDimensionTuning
from lyapft.peft.state import StateTuning
from lyapft.peft.vera import Vera

if TYPE_CHECKING:
    from lyapft.config import PeftConfig

__all__ = [
    "AdaLora",
    "BitFit",
    "FullFineTuning",
    "Ia3",
    "Liveness",
    "LivenessError",
    "Lora",
    "SelectiveDimensionTuning",
    "StateTuning",
    "Strategy",
    "TiedHead",
    "Vera",
    "adapted_layers",
    "effective_weight",
    "faults",
]


def faults(cfg: PeftConfig) -> list[str]:
    """Everything wrong with the peft choice that can be known without a model; empty when all is well."""
    return cast("type[Strategy]", get_class(cfg._target_)).faults(cfg)
