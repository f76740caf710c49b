"""The callback that writes a training's checkpoints, between two optimizer steps, and takes them up again."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lyapft import holding, ranks, sharding
from lyapft.environment import PeakMemory, differences
from lyapft.resume.files import CheckpointFiles
from lyapft.resume.signals import Signals

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from lyapft.recurrence import Seam


class Resume(Callback):
    """Saves every `every_s` seconds, when a signal asked to stop, and at the end; put it last among the callbacks.

    Lightning gathers the state: loops, trained tensors, optimizer, schedule, loss scaler, data position, and what each
    callback remembers. This one adds the random states and what the record needs of the attempts before.

    Attributes:
        resumed_at: steps at which earlier attempts were taken up.
        earlier_s: seconds that earlier attempts trained.
        environments: of earlier attempts, where the next one ran in another: `to_step`, and what `environment` was.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        every_s: float,
        signals: Signals,
        seam: Seam,
        memory: PeakMemory,
        environment: dict[str, Any],
    ) -> None:
        """
        Args:
            files: where to.
            every_s: seconds between two checkpoints.
            signals: asked after each step whether to stop.
            seam: which kernels ran is part of the state.
            memory: so is the peak.
            environment: of this attempt, as the record describes it.
        """
        self.files, self.every_s, self.signals, self.seam, self.memory = files, every_s, signals, seam, memory
        self.environment = environment
        self.resumed_at: list[int] = []
        self.environments: list[dict[str, Any]] = []
        self._environment_before = environment
        self.earlier_s = 0.0
        self._started = self._saved = time.monotonic()
        self._last_step = 0
        self._random: dict[str, Any] | None = None
        self._moments: list[dict[int, dict[str, Any]]] = []

    def state_dict(self) -> dict[str, Any]:
        """Random states, kernels, peak memory, environment, time."""
        return {
            "random": ranks.gathered(_collect_rng_states()),
            "kernels": dict(self.seam.kernels),
            "fallbacks": dict(self.seam.fallbacks),
            "peak_bytes": self.memory.peak_bytes(),
            "environment": self.environment,
            "environments": self.environments,
            "resumed_at": self.resumed_at,
            "seconds": self.earlier_s + time.monotonic() - self._started,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what an earlier attempt left; random states only when the first batch comes."""
        self._random = state_dict["random"][ranks.rank()]
        self.seam.kernels.update(state_dict["kernels"])
        self.seam.fallbacks.update(state_dict["fallbacks"])
        self.memory.earlier_bytes = state_dict["peak_bytes"]
        self.resumed_at, self.earlier_s = state_dict["resumed_at"], state_dict["seconds"]
        self._environment_before = state_dict.get("environment", {})  # an older lyapft kept none: nothing is the same
        self.environments = state_dict.get("environments", [])

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the optimizer's tensors as they were saved."""
        self._moments = [state["state"] for state in checkpoint["optimizer_states"]]
        self._last_step = checkpoint["global_step"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Moments as one process would have them, however many share them."""
        checkpoint["optimizer_states"] = sharding.plain(checkpoint["optimizer_states"])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take no more of the weights than the checkpoint has: those that train."""
        pl_module.strict_loading = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals back from Lightning, and give the optimizer its tensors in their own format."""
        self.signals.install()
        for optimizer, moments in zip(trainer.optimizers, self._moments, strict=False):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for index, saved in moments.items():  # load_state_dict rounded them to the format of their weight
                state = optimizer.state[parameters[index]]
                own = {k: v.to(state[k].device) for k, v in saved.items() if isinstance(v, Tensor)}
                state.update({k: sharding.shared_out(v, parameters[index]) for k, v in own.items()})
        if self._moments:
            self.resumed_at = [*self.resumed_at, trainer.global_step]
            self._compare_environments(trainer.global_step)
        self._moments = []

    def _compare_environments(self, step: int) -> None:
        before = self._environment_before
        if ranks.leads() and (found := differences(before, self.environment)):
            self.environments = [*self.environments, {"to_step": step} | before]
            log.warning(
                "going on at step %d in another environment than before (%s): the numbers need not be those of one "
                "machine to the bit; the record's resumed.environments keeps the earlier one",
                step,
                found,
            )

    def record(self) -> dict[str, Any]:
        """What the cell's record says of the attempts before this one."""
        return {"at_steps": self.resumed_at, "earlier_s": self.earlier_s, "environments": self.environments}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before the first batch after a resume: random numbers go on where they were."""
        if self._random is not None:
            _set_rng_states(self._random)
            self._random = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is time; the end of the training is `on_train_end`'s.

        Raises:
            Interrupted: a signal asked to stop, and what there is has been saved.
            LostLeaseError: another process has taken the cell over; nothing has been saved.
        """
        if trainer.global_step in (self._last_step, trainer.max_steps):  # within a step, or after the last
            return
        self._last_step = trainer.global_step
        # by a lost lease too: no save without asking for it, and all processes come to a save together
        due = time.monotonic() - self._saved >= self.every_s or holding.is_lost(self.files.newest.parent)
        asked, due = ranks.any_signal(self.signals.caught), ranks.from_first(due)
        if asked is not None or due:
            self._save(trainer)
        self._end(asked)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the trained weights, so that an evaluation that is cut off costs no training."""
        self._save(trainer)
        self._end(ranks.any_signal(self.signals.caught))

    def _end(self, asked: int | None) -> None:
        """End here if the processes agree on a signal; one that came since they asked each other waits for the next
        time: it must not be forgotten, nor end one process alone."""
        if asked is not None:
            self.signals.caught = asked
            self.signals.heed()

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.files.newest, weights_only=False)
        self._saved = time.monotonic()
