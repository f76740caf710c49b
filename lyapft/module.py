"""The LightningModule: loss, optimizer, schedule, and what keeps non-finite numbers out of the weights."""

import inspect
import math
from collections.abc import Callable
from typing import Any, cast

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lyapft import ranks, sharding
from lyapft.errors import InputError
from lyapft.halving import Batch, Halvings
from lyapft.peft import FullFineTuning, Strategy
from lyapft.recurrence import Seam
from lyapft.sharding import whole

COUNTERS = ("skipped_steps", "nonfinite", "scaler_skips", "_nonfinite_in_a_row")  # of a module, in its checkpoints
IGNORED = -100  # label of a token that carries no loss


class TrainingStopped(RuntimeError):
    """A training ended before its time, by its own doing; `status` names the outcome for the record."""

    def __init__(self, message: str, status: str) -> None:
        super().__init__(message)
        self.status = status


class NonFiniteTrainingError(TrainingStopped):
    """Training met non-finite losses or gradients for too many steps in a row."""


def response_loss(logits_BLV: Tensor, labels_BL: Tensor, of: int | None = None) -> Tensor:
    """Mean cross-entropy of the next token over the labelled tokens, in nats, computed in float32.

    Args:
        logits_BLV: scores of the token after each position.
        labels_BL: token ids, −100 where a token carries no loss; label t is predicted from position t − 1.
        of: labelled tokens of the whole batch that these rows are a part of: the part's share of its mean.
    Returns:
        A scalar; NaN if no token is labelled.
    """
    # the labels are shifted, not the logits: a slice of those would be copied, and its gradient padded
    next_BL = F.pad(labels_BL[:, 1:], (0, 1), value=IGNORED)
    logits, labels = logits_BLV.float().flatten(0, 1), next_BL.flatten()
    if of is not None:
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / of
    return F.cross_entropy(logits, labels, ignore_index=IGNORED)


def schedule_factor(step: int, settings: DictConfig) -> float:
    """The share of the learning rate at an optimizer step.

    Linear warm-up over `warmup` · steps, then `constant`, `linear`, `cosine`, or `hold_then_decay` (constant until
    `hold` · steps, then linear), the last three ending at `final_lr`.

    Args:
        step: updates done so far, from 0.
        settings: the trainer group of a config.
    """
    steps, warmup = settings.steps, round(settings.warmup * settings.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return 1.0
    start = settings.hold * steps if settings.schedule == "hold_then_decay" else warmup
    progress = min(1.0, max(0.0, (step - start) / max(1.0, steps - 1 - start)))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if settings.schedule == "cosine" else 1 - progress
    return cast(float, settings.final_lr + (1 - settings.final_lr) * shape)


class FineTuner(L.LightningModule):
    """One backbone in training.

    Attributes:
        observed: numbers of the present step, written by this module and by probes, read by the step recorder.
            Cleared at the start of every optimizer step.
        skipped_steps: optimizer steps whose update was withheld: not finite, by the loss scaler, or by `withhold`.
        nonfinite: of each step with a non-finite loss or gradient: step (as in the step series, from 1), loss, layers,
            rows; without those that a loss scaler is there for, which are in `scaler_skips`.
        withhold: None, or asked before each update whether to withhold it; one that is not finite is withheld anyway.
        parts: in which the present micro-batch goes through the model: one, unless memory ran out for the whole.
        watchers: told of each part before its forward pass, where there are several.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: DictConfig,
        learning_rate: float,
        strategy: Strategy | None = None,
        seam: Seam | None = None,
        halvings: Halvings | None = None,
    ) -> None:
        """
        Args:
            model: a causal language model of transformers, its adapters attached.
            settings: the trainer group of a config.
            learning_rate: the peak rate.
            strategy: what was attached to the model; None is full fine-tuning.
            seam: of the model; packed batches need it, so that recurrences start anew at each sequence.
            halvings: how much of a batch goes through the model at once.
        """
        super().__init__()
        self.model = model
        self._seam = seam
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.settings = settings
        self.learning_rate = learning_rate
        self.strategy = strategy or FullFineTuning()
        self.observed: dict[str, float | int | bool] = {}
        self.skipped_steps = 0
        self.nonfinite: list[dict[str, Any]] = []
        self.scaler_skips: list[dict[str, Any]] = []
        self.withhold: Callable[[], bool] | None = None
        self.halvings = halvings or Halvings([])
        self.watchers: list[Callable[[Batch], None]] = []
        self.parts = 1
        self._rest: list[Batch] = []
        self.copies = ranks.copies(settings)
        self._targets: int | None = None
        self._nonfinite_in_a_row = 0
        self._step_skipped = False
        self._finite = True
        self._rows: list[int] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one micro-batch, `loss` of the task and what the strategy adds; of its first part, where split."""
        first, *self._rest = self.halvings.micro_batches(batch, self.global_step + 1)
        self.parts = 1 + len(self._rest)
        self._targets = int((batch["labels"][:, 1:] != IGNORED).sum()) if self._rest else None
        loss = self._part(first) if self._rest else self.loss(batch)
        if batch_idx % self.settings.accumulate == 0:
            self.observed, self._rows = {"loss": 0.0, "tokens": 0}, []
        self.observed["loss"] += loss.item() / self.settings.accumulate
        self.observed["tokens"] += int(batch["attention_mask"].sum())
        self._rows += batch["rows"].tolist() if "rows" in batch else []
        penalty = self.strategy.penalty()
        loss = loss if penalty is None else loss + penalty
        return loss / self.copies if ranks.many() else loss  # the gradients of all copies are summed

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Gradients of a micro-batch; where it is split, of one part after another, each freed before the next."""
        super().backward(loss, *args, **kwargs)
        factor = (self._scaler_state() or 1.0) / self.settings.accumulate  # that `loss` came with
        while self._rest:
            with self.trainer.precision_plugin.forward_context():
                part = self._part(self._rest.pop(0))
            self.observed["loss"] += part.item() / self.settings.accumulate
            super().backward(part * factor, *args, **kwargs)

    def _part(self, part: Batch) -> Tensor:
        for watch in self.watchers:
            watch(part)
        return self.loss(part, self._targets)

    def loss(self, batch: Batch, of: int | None = None) -> Tensor:
        """Loss of a batch on the task alone, without what the strategy adds.

        `batch`: input_ids, attention_mask, labels, and of packed rows sequence and position_ids, each (B, L).
        `of`: as in `response_loss`.
        """
        output = self.model(input_ids=batch["input_ids"], use_cache=False, **self.token_arguments(batch))
        return response_loss(output.logits, batch["labels"], of)

    def token_arguments(self, batch: Batch) -> dict[str, Tensor]:
        """What keeps tokens apart: a mask of padding, or, packed, the seam and positions that start at 0 again."""
        if self._seam is not None:
            self._seam.sequence = batch.get("sequence")  # until the next batch: backward may recompute the forward pass
        if "sequence" not in batch:
            return {"attention_mask": batch["attention_mask"]}
        return {"position_ids": batch["position_ids"]} if self._takes_positions else {}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm, taken in float32; withhold the update if the loss or a gradient is not finite.

        Gradients arrive unscaled, and a GradScaler has noted already whether one is not finite. They are dropped here,
        so that no weight and no moment of the optimizer is touched.
        """
        self.observed["loss"], self.observed["tokens"] = ranks.step_totals(
            self.observed["loss"], int(self.observed["tokens"]), self.copies
        )
        trainable = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        total = sharding.total_norm(p.grad for p in trainable)
        norm = float(total)
        self._finite = math.isfinite(norm) and math.isfinite(self.observed["loss"])
        if not self._finite:
            self._note_nonfinite()
        for own in sharding.kin(trainable):
            nn.utils.clip_grads_with_norm_(own, self.settings.grad_clip, total)
        self.observed["grad_norm"] = norm
        withheld = self.withhold is not None and self.withhold()
        self._step_skipped = withheld or not self._finite
        if self._step_skipped:
            optimizer.zero_grad(set_to_none=True)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One optimizer step, counted as skipped where the update was withheld."""
        super().optimizer_step(*args, **kwargs)
        self.observed["learning_rate"] = self.optimizers().optimizer.param_groups[0]["lr"]  # type: ignore[union-attr]
        plugin = self.trainer.precision_plugin
        self._step_skipped = self._step_skipped or bool(getattr(plugin, "last_step_skipped", False))
        scale = self._scaler_state()
        self.observed["loss_scale"] = 1.0 if scale is None else scale
        self.observed["skipped"] = self._step_skipped
        self.skipped_steps += self._step_skipped
        if not self._step_skipped:
            self.strategy.after_step(self.trainer.global_step + 1 - self.skipped_steps)
        self._nonfinite_in_a_row = 0 if self._finite else self._nonfinite_in_a_row + 1
        self._stop_if_hopeless(scale)

    def _note_nonfinite(self) -> None:
        """Keep which layers and rows it was, before the gradients are dropped."""
        step, loss = self.trainer.global_step + 1, self.observed["loss"]
        drawn = ranks.of_copies(ranks.gathered(self._rows), self.copies)
        scale, rows = self._scaler_state(), [row for part in drawn for row in part]
        if scale is not None and math.isfinite(loss):  # an overflow that the loss scaler is there to find
            self.scaler_skips.append({"step": step, "loss_scale": scale, "rows": rows})
            return
        layers = [
            n for n, p in self.model.named_parameters() if p.grad is not None and not whole(p.grad).isfinite().all()
        ]
        self.nonfinite.append({"step": step, "loss": loss, "layers": layers, "rows": rows})

    def lr_scheduler_step(self, scheduler: LRScheduler, metric: Any | None) -> None:
        """Advance the schedule, unless the update was withheld."""
        if not self._step_skipped:
            scheduler.step()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the groups of the strategy: by default one rate, and weight decay on matrices only."""
        groups = self.strategy.parameter_groups(self.model, self.learning_rate, self.settings.weight_decay)
        optimizer = torch.optim.AdamW(
            sharding.apart(groups), lr=self.learning_rate, betas=tuple(self.settings.betas), fused=True
        )
        # gradients are unscaled before they are clipped: a GradScaler must not leave that to the fused update
        optimizer._step_supports_amp_scaling = False
        scheduler = LambdaLR(optimizer, lambda step: schedule_factor(step, self.settings))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Only what trains, and what this module and its strategy count."""
        checkpoint["state_dict"] = {f"model.{name}": whole(t) for name, t in self.strategy.tensors().items()}
        checkpoint["counters"] = {name: getattr(self, name) for name in COUNTERS}
        checkpoint["strategy"] = self.strategy.training_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Count on from there.

        Raises:
            InputError: other tensors train here than in the checkpoint.
        """
        mine = {f"model.{name}" for name in self.strategy.tensors()}
        if differing := sorted(mine ^ set(checkpoint["state_dict"])):
            raise InputError(f"the checkpoint is of another training: {differing[0]} is in one of the two only")
        for name, value in checkpoint["counters"].items():
            setattr(self, name, value)
        self.strategy.take_up(checkpoint["strategy"])

    def _scaler_state(self) -> float | None:
        return cast(float | None, getattr(self.trainer.precision_plugin, "loss_scale", None))

    def _stop_if_hopeless(self, scale: float | None) -> None:
        step = self.trainer.global_step + 1
        if scale is not None and scale < 1.0:
            raise NonFiniteTrainingError(
                f"step {step}: the loss scale fell to {scale:g}: fp16 cannot hold these gradients. "
                "Use precision=bf16 or a smaller learning rate",
                "loss_scale_underflow",
            )
        if scale is None and self._nonfinite_in_a_row >= self.settings.max_nonfinite:
            raise NonFiniteTrainingError(
                f"step {step}: {self._nonfinite_in_a_row} steps in a row had a non-finite loss or gradient "
                f"(loss {self.observed['loss']}, gradient norm {self.observed['grad_norm']}); none changed a weight. "
                "Use a smaller learning rate or precision=fp32",
                "nonfinite",
            )
