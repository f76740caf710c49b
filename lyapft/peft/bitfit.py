"""BitFit: the biases alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lyapft.backbone import Backbone
from lyapft.errors import InputError
from lyapft.peft.base import Strategy

if TYPE_CHECKING:
    from lyapft.recurrence import Seam


class BitFit(Strategy):
    """Every bias trains, nothing else: of projections, norms and convolutions, and the `dt_bias` of a mixer.

    peft has no such method (its `bias` options come on top of an adapter); none of its layers is needed.

    Source: Ben Zaken et al. 2022; for Mamba, the biases of conv1d and dt_proj: Galim et al. 2025.
    """

    def __init__(self, name: str = "bitfit") -> None:
        super().__init__(name)

    def attach(self, backbone: Backbone, seam: Seam) -> None:
        """Make the biases trainable and everything else not.

        Raises:
            InputError: a model that has none.
        """
        model = backbone.model
        biases = {name for name, _ in model.named_parameters() if is_bias(name)}
        if not biases:
            raise InputError(
                f"peft=bitfit: this {model.config.model_type} model has no bias to train. Use peft=lora or peft=ia3"
            )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in biases)
        self._backbone = backbone

    def merge(self) -> None:
        """Nothing to do: the biases are the model's own."""

    def record(self) -> dict[str, Any]:
        """Method, counts, and the names of what trains."""
        names = [name for name, p in self.backbone.model.named_parameters() if p.requires_grad]
        return {"method": self.name, "tensors": names} | self.parameters()


def is_bias(name: str) -> bool:
    """Whether a parameter is a bias, by its name: `bias`, `dt_bias`, `dt_proj_bias`."""
    return name.rpartition(".")[2].endswith("bias")
