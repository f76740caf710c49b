"""Proof that what is asked to train does train."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lyapft.errors import InputError
from lyapft.sharding import whole


class LivenessError(InputError):
    """A trainable tensor got no gradient, or did not move: what was asked to train does not."""


class Liveness:
    """Proves that every trainable tensor gets a finite, non-zero gradient and moves; only reads, until it has proof.

    A factor of a product in which another factor is exactly zero has a zero gradient by construction (LoRA's A while B
    is zero, AdaLoRA's A and B while E is, VeRA's d while b is): such a step is not counted against it.

    Args:
        model: with its trainable parameters chosen.
        steps: optimizer steps within which every tensor has to show life.
    """

    PRODUCTS = (  # factors of one product, as peft names them
        ("lora_A", "lora_E", "lora_B"),
        ("lora_embedding_A", "lora_embedding_B"),
        ("vera_lambda_b", "vera_lambda_d"),
    )

    def __init__(self, model: nn.Module, steps: int = 3) -> None:
        self.steps = steps
        self._without_gradient = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._still: dict[str, tuple[Tensor, tuple[float, float]]] | None = None  # filled before the first step
        self._chances = dict.fromkeys(self._without_gradient, 0)
        self.look_at(model)

    def look_at(self, model: nn.Module) -> None:
        """Observe the tensors that the model has now under the same names: sharding puts others in their place."""
        tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._without_gradient = {name: tensors[name] for name in self._without_gradient}
        if self._still is not None:
            self._still = {name: (tensors[name], before) for name, (_, before) in self._still.items()}
        self._partners = {name: [tensors[o] for o in self._partners_of(name) if o in tensors] for name in tensors}

    @property
    def proven(self) -> bool:
        """Whether every tensor has shown a gradient and has moved."""
        return not self._without_gradient and self._still == {}

    @property
    def stalled(self) -> list[str]:
        """Tensors stored in half that have gradients and never moved: each update was below the spacing of a weight."""
        still = self._still or {}
        return [name for name in still if name not in self._without_gradient and _is_half(still[name][0])]

    def observe_gradients(self) -> None:
        """Look at the gradients that the next optimizer step will use; after backward, before the step."""
        if self._still is None:
            self._still = {name: (p, _checksum(p)) for name, p in self._without_gradient.items()}
        for name, parameter in list(self._without_gradient.items()):
            gradient = parameter.grad
            if gradient is not None:
                peak = whole(gradient.detach()).abs().amax()
                if not torch.isfinite(peak):  # an overflow step of a loss scaler proves nothing, either way
                    continue
                if peak > 0:
                    del self._without_gradient[name]
                    continue
            self._chances[name] += all(bool(whole(partner.detach()).any()) for partner in self._partners[name])

    def verdict(self, step: int) -> None:
        """After an optimizer step: stop the run if a tensor has had its chances and shows no life.

        Args:
            step: optimizer steps really taken so far, skipped ones not counted.
        Raises:
            LivenessError: naming every dead tensor.
        """
        if self._still is None:
            return
        for name, (parameter, before) in list(self._still.items()):
            if _checksum(parameter) != before:
                del self._still[name]
        if step < self.steps:
            return
        dead = [name for name in self._without_gradient if self._chances[name] >= self.steps]
        if dead:
            raise LivenessError(
                f"{len(dead)} trainable tensors had no finite, non-zero gradient in {self.steps} steps: "
                f"{listed(dead)}. "
                "The model does not use them on this path: leave them out of peft.targets, or choose another kernel"
            )
        stuck = [name for name in self._still if name not in self._without_gradient and name not in self.stalled]
        if stuck:
            raise LivenessError(
                f"{len(stuck)} trainable tensors did not change in {step} steps though they have gradients: "
                f"{listed(stuck)}. "
                "The optimizer does not hold them, or its learning rate is too small to change a float32"
            )

    def verdict_at_end(self, step: int) -> None:
        """After the training: stop the run if every update was withheld. A few that are missing leave it unproven.

        Args:
            step: optimizer steps really taken.
        Raises:
            LivenessError: none was.
        """
        if step == 0:
            raise LivenessError(
                "no update was taken: each was withheld, and nothing is proven to learn. Use a smaller learning rate, "
                "precision=bf16 or fp32, or more steps, so that fp16 finds its loss scale"
            )

    def state_dict(self) -> dict[str, Any]:
        """What is known of each tensor so far."""
        still = None if self._still is None else {name: before for name, (_, before) in self._still.items()}
        return {"without_gradient": list(self._without_gradient), "still": still, "chances": self._chances}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Know what `state_dict` gave."""
        tensors = dict(self._without_gradient)
        self._without_gradient = {name: tensors[name] for name in state["without_gradient"]}
        still = state["still"]
        self._still = None if still is None else {name: (tensors[name], before) for name, before in still.items()}
        self._chances = dict(state["chances"])

    def _partners_of(self, name: str) -> Iterator[str]:
        for factors in self.PRODUCTS:
            for factor in factors:
                if f".{factor}." in name:
                    yield from (name.replace(f".{factor}.", f".{other}.") for other in factors if other != factor)


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def _checksum(parameter: Tensor) -> tuple[float, float]:
    """Two float64 sums that change when a value does; far less memory than a copy."""
    values = whole(parameter.detach())
    return float(values.sum(dtype=torch.float64)), float(torch.linalg.vector_norm(values, dtype=torch.float64))


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first few of a list of names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
