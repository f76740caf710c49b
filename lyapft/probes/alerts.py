"""Alerts: somebody is told when a number of the training goes where it should not."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback

from lyapft import dashboard, watch

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from lyapft.module import FineTuner


class AlertProbe(Callback):
    """Watches logged numbers by rules; an alert goes to the log, the record and W&B.

    One alert for each time that a number crosses its limit: it has to come back before the next. Put it behind the
    step recorder, so that it sees every column of the step series.

    Attributes:
        given: the alerts so far: step, rule, metric, value, limit.
    """

    def __init__(self, rules: Mapping[str, Mapping[str, Any]]) -> None:
        """
        Args:
            rules: by name: metric, and below, above or sigma with window.
        Raises:
            InputError: a rule that cannot speak.
        """
        self.rules = watch.rules(rules)
        self.given: list[dict[str, Any]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the numbers of a step once it is whole."""
        module = cast("FineTuner", pl_module)
        if (batch_idx + 1) % module.settings.accumulate:
            return
        for rule in self.rules:
            before = rule.broken
            event = rule.look(module.observed)
            if event is not None and not before:
                self._give(event, trainer)

    def _give(self, event: watch.Event, trainer: L.Trainer) -> None:
        step = trainer.global_step
        log.warning("alert at step %d: %s", step, event)
        self.given.append({"step": step, **vars(event)})
        dashboard.alert(trainer.loggers, f"lyapft: {event.rule}", f"step {step}: {event}")

    def state_dict(self) -> dict[str, Any]:
        """What the rules remember, and the alerts given."""
        return {"rules": {rule.name: rule.state() for rule in self.rules}, "given": self.given}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        for rule in self.rules:  # which may have changed: a probe is no part of its cell
            if rule.name in state_dict["rules"]:
                rule.restore(state_dict["rules"][rule.name])
        self.given = list(state_dict["given"])
