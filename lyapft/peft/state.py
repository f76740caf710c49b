"""State-based tuning: the recurrence starts from, or is read through, a state that was learnt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lyapft.backbone import Backbone
from lyapft.errors import InputError
from lyapft.peft.base import Strategy
from lyapft.recurrence import INITIAL_STATE, STATE_OFFSET

if TYPE_CHECKING:
    from lyapft.recurrence import Layer, Seam

WHY_UNMERGED = {
    INITIAL_STATE: "transformers starts every sequence from zeros, and no weight of its models holds another state",
    STATE_OFFSET: "the output gains C_t h', which changes with the token as C_t does, and no weight adds that",
}


class StateTuning(Strategy):
    """One state per mixer, zero at first, is all that trains; the seam puts it into the recurrence.

    `initial_state`: h_0, the state before the first token. `state_offset`: h', y_t = C_t (h_t + h'), so that it acts at
    every token alike. Shape (D, N) for a selective scan, (H, P, N) for SSD: channels, heads, head dim, states.

    Args:
        state: `initial_state` or `state_offset`.
    Raises:
        InputError: from the constructor, another state.
    Source: Galim et al. 2025 (initial-state tuning); Kang et al. 2025 (state-offset tuning).
    """

    def __init__(self, name: str, state: str) -> None:
        super().__init__(name)
        if state not in WHY_UNMERGED:
            raise InputError(f"peft.state={state} is unknown: use one of {', '.join(WHY_UNMERGED)}")
        self.state = state

    def attach(self, backbone: Backbone, seam: Seam) -> None:
        """Give every mixer its state; everything else stops training.

        Raises:
            InputError: a model without a recurrence that the seam knows.
        """
        model = backbone.model
        if not seam.layers:
            unknown = f" that lyapft knows (it has {', '.join(seam.unknown[:3])})" if seam.unknown else ""
            raise InputError(
                f"peft={self.name} tunes the state of a recurrence, and this {model.config.model_type} model has "
                f"none{unknown}. Use peft=lora"
            )
        headed = [layer.name for layer in seam.layers if getattr(layer.module, "n_mamba_heads", 1) > 1]
        if headed:
            raise InputError(
                f"peft={self.name} tunes one state for each layer, and {headed[0]} has one for each of several heads "
                "(Zamba): use another peft method"
            )
        model.requires_grad_(False)
        for layer in seam.layers:
            device = next(layer.module.parameters()).device
            layer.module.register_parameter(self.state, nn.Parameter(torch.zeros(shape(layer), device=device)))
        self._backbone = backbone

    def merge(self) -> None:
        """Refused: no ordinary model of transformers has these outputs.

        Raises:
            InputError: always, with the reason.
        """
        raise InputError(f"peft={self.name} cannot be merged: {WHY_UNMERGED[self.state]}. Evaluate the run unmerged")

    def record(self) -> dict[str, Any]:
        """Method, counts, and the names of what trains."""
        names = [name for name, p in self.backbone.model.named_parameters() if p.requires_grad]
        return {"method": self.name, "tensors": names} | self.parameters()


def shape(layer: Layer) -> tuple[int, ...]:
    """Of the state of a mixer for one sequence: (D, N) or (H, P, N)."""
    mixer: Any = layer.module
    if layer.family == "selective_scan":
        return int(mixer.intermediate_size), int(mixer.ssm_state_size)
    return int(mixer.num_heads), int(mixer.head_dim), int(mixer.ssm_state_size)
