"""Proof, during the first steps, that everything that is asked to train does train."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from lyapft.module import FineTuner
    from lyapft.peft import Liveness


class AdapterLiveness(Callback):
    """Stops the run if a trainable tensor got no finite, non-zero gradient in the first steps, or none were taken."""

    def __init__(self, liveness: Liveness) -> None:
        self.liveness = liveness

    def state_dict(self) -> dict[str, Any]:
        """What the proof has so far."""
        return self.liveness.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        self.liveness.load_state_dict(state_dict)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the tensors as the training has them."""
        self.liveness.look_at(cast("FineTuner", pl_module).model)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Look at the gradients until every tensor has shown life."""
        self.liveness.observe_gradients()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge, once enough steps were really taken."""
        taken = trainer.global_step - cast("FineTuner", pl_module).skipped_steps
        self.liveness.verdict(taken)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so where the steps were too few, or too many of them withheld, for a proof."""
        self.liveness.verdict_at_end(trainer.global_step - cast("FineTuner", pl_module).skipped_steps)
        if stalled := self.liveness.stalled:
            log.warning(
                "%d half weights never moved: every update rounds to nothing; the record names them", len(stalled)
            )
        elif not self.liveness.proven:
            log.warning("too few updates to prove that every trainable tensor learns; the record says so")
