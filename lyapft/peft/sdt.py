"""Selective dimension tuning: of a recurrence only the channels and states that move most in a warm-up train."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lyapft.backbone import Backbone
from lyapft.errors import InputError
from lyapft.peft.base import Batch, Strategy
from lyapft.peft.memory_buffer import memory_layer
from lyapft.peft.mixers import mixers
from lyapft.peft.selection import Place, entries, rows_of_b_and_c

if TYPE_CHECKING:
    from lyapft.config import PeftConfig, SdtPeft
    from lyapft.recurrence import Seam

log = logging.getLogger(__name__)


class SelectiveDimensionTuning(Strategy):
    """Trains A_log and the rows of B and C on selected dimensions only; the merged model is an ordinary one.

    All dimensions train for `warmup_steps` on the batches that training starts with; then the base weights come back,
    and what had changed most is selected (`selection.entries`). The published method adds LoRA on the projections.

    Args:
        channels: share of the channels (Mamba-2: heads) of each mixer that are selected, in (0, 1]; at least one is.
        states: share of the states, likewise.
        warmup_steps: > 0.
        warmup_learning_rate: of AdamW, > 0.
    Raises:
        InputError: from the constructor, a value out of range.
    Source: Galim et al. 2025, section 5 (sparse dimension tuning; earlier, selective dimension tuning).
    """

    def __init__(
        self,
        name: str = "sdt",
        channels: float = 0.1,
        states: float = 0.25,
        warmup_steps: int = 10,
        warmup_learning_rate: float = 1e-3,
    ) -> None:
        super().__init__(name)
        wrong = self._range_faults(channels, states, warmup_steps, warmup_learning_rate)
        if wrong:
            raise InputError("\n".join(wrong))
        self.channels, self.states = channels, states
        self.warmup_steps, self.warmup_learning_rate = warmup_steps, warmup_learning_rate
        self._mixers: dict[str, nn.Module] = {}
        self._places: dict[str, tuple[Place, Place]] = {}  # of A_log and of the projection, by mixer

    @classmethod
    def faults(cls, cfg: PeftConfig) -> list[str]:
        """Values out of range."""
        own = cast("SdtPeft", cfg)
        return cls._range_faults(own.channels, own.states, own.warmup_steps, own.warmup_learning_rate)

    def attach(self, backbone: Backbone, seam: Seam) -> None:
        """Make room for the selection; until `prepare` or `load` brings one, it is of the first dimensions.

        Raises:
            InputError: a model without selective-scan or SSD mixers, or with one that has no layer for B and C.
        """
        model = backbone.model
        self._mixers = mixers(model)
        if not self._mixers:
            raise InputError(
                f"peft={self.name} selects dimensions of selective-scan or SSD mixers, and this "
                f"{model.config.model_type} model has none. Use peft=lora"
            )
        model.requires_grad_(False)
        for name, mixer in self._mixers.items():
            places = Place(mixer, "A_log"), Place(mixer.get_submodule(memory_layer(name, mixer)), "weight")
            unchanged = [torch.zeros_like(getattr(module, tensor)) for module, tensor in places]
            for place, index in zip(places, self._entries(mixer, unchanged), strict=True):
                place.put(index)
            self._places[name] = places
        self._backbone = backbone

    def prepare(self, gradients: Callable[[Batch], None], batches: Iterable[Batch]) -> None:
        """Warm up, select what changed most, and put the base weights back."""
        log.info("selecting dimensions in %d warm-up steps", self.warmup_steps)
        places = [place for pair in self._places.values() for place in pair]
        base = [place.original.detach().clone() for place in places]
        self._open(places, True)
        optimizer = torch.optim.AdamW([p.original for p in places], lr=self.warmup_learning_rate, weight_decay=0.0)
        for batch in islice(batches, self.warmup_steps):
            gradients(batch)
            self._candidates_only()
            optimizer.step()
            optimizer.zero_grad()
        self._open(places, False)
        kept = dict(zip(places, base, strict=True))
        for name, (decay, weight) in self._places.items():
            # of A = −exp(A_log), and of the rows
            moved = decay.original.exp() - kept[decay].exp(), weight.original - kept[weight]
            if not all(bool(change.isfinite().all()) for change in moved):
                raise InputError(
                    f"peft={self.name}: the warm-up that selects dimensions met numbers that are not finite in {name}: "
                    "use precision=fp32, bf16 or bf16_true, or a smaller peft.warmup_learning_rate"
                )
            for place, index in zip((decay, weight), self._entries(self._mixers[name], moved), strict=True):
                with torch.no_grad():
                    place.original.copy_(kept[place])
                place.selected.select(index, place.original)

    def tensors(self) -> dict[str, Tensor]:
        """The trained values, and which entries they are of."""
        places = [f".{place.name}.0.index" for pair in self._places.values() for place in pair]
        buffers = self.backbone.model.named_buffers()
        return super().tensors() | {n: b for n, b in buffers if n.endswith(tuple(places))}

    def merge(self) -> None:
        """Write the trained values into the weights."""
        for pair in self._places.values():
            for place in pair:
                place.settle()

    def identity(self) -> dict[str, Any]:
        """Base weights and shares."""
        return super().identity() | {"channels": self.channels, "states": self.states}

    def record(self) -> dict[str, Any]:
        """Method, settings, counts, and the channels (heads) that were selected in each mixer."""
        selected = {}
        for name, (decay, _) in self._places.items():
            states = decay.original[0].numel()  # of one channel; 1 where A is one number a head
            selected[name] = sorted({int(i) // states for i in decay.selected.index})
        settings = {key: getattr(self, key) for key in ("channels", "states", "warmup_steps", "warmup_learning_rate")}
        return {"method": self.name} | settings | {"selected": selected} | self.parameters()

    def _entries(self, mixer: nn.Module, changes: Iterable[Tensor]) -> list[Tensor]:
        change_A, change_rows = (change.detach() for change in changes)
        return entries(mixer, change_A, change_rows, self.channels, self.states)

    def _candidates_only(self) -> None:
        """Drop the gradients of the rows of the projections that make neither B nor C."""
        for name, (_, weight) in self._places.items():
            gradient, span = weight.original.grad, rows_of_b_and_c(self._mixers[name])
            if gradient is not None:
                gradient[: span.start] = 0
                gradient[span.stop :] = 0

    @staticmethod
    def _open(places: Iterable[Place], on: bool) -> None:
        """Let the whole tensors train, or the selected entries again."""
        for place in places:
            place.selected.open = on
            place.original.requires_grad_(on)

    @staticmethod
    def _range_faults(channels: float, states: float, steps: int, learning_rate: float) -> list[str]:
        shares = {"channels": channels, "states": states}
        wrong = [f"peft.{key}={value} must lie in (0, 1]" for key, value in shares.items() if not 0 < value <= 1]
        positive = {"warmup_steps": steps, "warmup_learning_rate": learning_rate}
        return wrong + [f"peft.{key}={value} must be greater than 0" for key, value in positive.items() if value <= 0]
