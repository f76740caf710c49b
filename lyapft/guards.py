"""Guards: what a training does about a number that goes where it should not. They change it, so they are science.

An update that is not finite is never taken, guard or no guard: that is the module's own. A guard may do more about it.
"""

from __future__ import annotations

import copy
import logging
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lyapft import watch
from lyapft.module import TrainingStopped

log = logging.getLogger(__name__)
SKIP_NEXT = "skip_next"  # what a skip brings about

if TYPE_CHECKING:
    from lyapft.module import FineTuner


class Guard(Callback):
    """Skips updates, rolls back, or stops, where a number breaks a rule, or the loss or a gradient is not finite.

    `skip`: this update and the next `skip_steps` (`skip_next`) are withheld; the schedule waits. `rollback`: weights,
    optimizer and schedule go back to the copy of the last `every`th good step, the data go on, so that other rows come.
    `stop`: the training ends, with the outcome `stopped_by_guard`; so it does after `limit` actions, `skip_next` not
    counted.

    Attributes:
        actions: of this training: step (as in the step series), action, rule, metric, value, limit; of a `skip_next`
            the rule and numbers of its `skip`.
    """

    def __init__(
        self,
        name: str,
        action: str,
        rules: Mapping[str, Mapping[str, Any]],
        skip_steps: int = 0,
        every: int = 10,
        limit: int = 10,
        nonfinite: bool = True,
    ) -> None:
        """
        Args:
            name: of the choice.
            action: skip, rollback or stop.
            rules: by name: metric, and below, above or sigma with window.
            skip_steps: further updates to withhold after one that was skipped.
            every: good steps between two copies.
            limit: actions after which the training ends.
            nonfinite: act also on steps that the module withholds; not on those that a loss scaler is there to find.
        Raises:
            InputError: a rule that cannot speak.
        """
        self.name, self.action, self.rules = name, action, watch.rules(rules)
        self.skip_steps, self.every, self.limit = skip_steps, every, limit
        self.nonfinite = nonfinite
        self.actions: list[dict[str, Any]] = []
        self._left_to_skip = 0
        self._copy: dict[str, Any] | None = None
        self._good = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stand before the updates, and keep a first copy to go back to."""
        module = cast("FineTuner", pl_module)
        if self.action == "skip":
            module.withhold = lambda: self._withhold(trainer, module)
        if self.action == "rollback" and self._copy is None:
            self._keep(trainer, module)

    def _withhold(self, trainer: L.Trainer, module: FineTuner) -> bool:
        """Whether to withhold the update that comes next."""
        step = trainer.global_step + 1  # it is not over yet
        event = self._event(module, step)
        if event is not None:
            self._act(step, event)
            self._left_to_skip = self.skip_steps
            return True
        if self._left_to_skip:
            self._left_to_skip -= 1
            self.actions.append(self.actions[-1] | {"step": step, "action": SKIP_NEXT})
            log.warning("guard at step %d: %s (%d left)", step, SKIP_NEXT, self._left_to_skip)
            return True
        return False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Go back or stop, once a step is whole."""
        module = cast("FineTuner", pl_module)
        if self.action == "skip" or (batch_idx + 1) % module.settings.accumulate:
            return
        event = self._event(module, trainer.global_step)
        if event is not None:
            self._act(trainer.global_step, event)
            if self.action == "rollback":
                self._go_back(trainer, module)
        elif self.action == "rollback" and not module.observed.get("skipped"):
            self._good += 1
            if self._good % self.every == 0:
                self._keep(trainer, module)

    def _event(self, module: FineTuner, step: int) -> watch.Event | None:
        """What this step deserves an action for: it was not finite, or broke a rule."""
        events = watch.look(self.rules, module.observed)  # they remember every step
        if self.nonfinite and module.nonfinite and module.nonfinite[-1]["step"] == step:
            metric = "grad_norm" if math.isfinite(module.observed["loss"]) else "loss"
            return watch.Event("nonfinite", metric, float(module.observed[metric]), sys.float_info.max)
        return events[0] if events else None

    def _act(self, step: int, event: watch.Event) -> None:
        self.actions.append({"step": step, "action": self.action, **vars(event)})
        log.warning("guard at step %d: %s (%s)", step, self.action, event)
        if self.action == "stop":
            raise TrainingStopped(f"step {step}: guard={self.name} stopped the training: {event}", "stopped_by_guard")
        if sum(one["action"] == self.action for one in self.actions) > self.limit:
            raise TrainingStopped(
                f"step {step}: guard={self.name} acted more than guard.limit={self.limit} times, the last for {event}",
                "stopped_by_guard",
            )

    def _keep(self, trainer: L.Trainer, module: FineTuner) -> None:
        optimizer = trainer.optimizers[0]
        self._copy = {
            "weights": {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad},
            "moments": copy.deepcopy(optimizer.state_dict()["state"]),
            "rates": [group["lr"] for group in optimizer.param_groups],
            "schedule": copy.deepcopy(trainer.lr_scheduler_configs[0].scheduler.state_dict()),
        }

    def _go_back(self, trainer: L.Trainer, module: FineTuner) -> None:
        kept = cast("dict[str, Any]", self._copy)
        weights: dict[str, Tensor] = kept["weights"]
        optimizer = trainer.optimizers[0]
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])
            # in place: load_state_dict would round the float32 moments of weights that are stored in half
            for index, moments in optimizer.state_dict()["state"].items():
                for key, value in moments.items():
                    before = kept["moments"].get(index, {}).get(key)
                    value.zero_() if before is None else value.copy_(before)
        for group, rate in zip(optimizer.param_groups, kept["rates"], strict=True):
            group["lr"] = rate
        trainer.lr_scheduler_configs[0].scheduler.load_state_dict(copy.deepcopy(kept["schedule"]))

    def state_dict(self) -> dict[str, Any]:
        """What the guard remembers, the copy to go back to included."""
        return {
            "rules": {rule.name: rule.state() for rule in self.rules},
            "actions": self.actions,
            "left_to_skip": self._left_to_skip,
            "copy": self._copy,
            "good": self._good,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        for rule in self.rules:
            rule.restore(state_dict["rules"][rule.name])
        self.actions, self._left_to_skip = list(state_dict["actions"]), state_dict["left_to_skip"]
        self._copy, self._good = state_dict["copy"], state_dict["good"]
