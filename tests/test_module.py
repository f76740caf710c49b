"""Loss, schedule and the guard of the LightningModule, on a model small enough to check by hand."""

import math
import types
import warnings

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from lyapft.config import TrainerConfig
from lyapft.module import FineTuner, NonFiniteTrainingError, response_loss, schedule_factor


def trainer_settings(**more):
    return OmegaConf.structured(
        TrainerConfig(**{"steps": 6, "batch_size": 2, "warmup": 0.0, "schedule": "linear", **more})
    )


class Bigram(nn.Module):
    """Next-token scores from a table; token 9 poisons the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 10)

    def forward(self, input_ids, attention_mask, use_cache):
        scores = self.table(input_ids)
        poison = torch.where(input_ids == 9, torch.inf, 1.0)[..., None]
        return types.SimpleNamespace(logits=scores * poison)


class Weights(Callback):
    """The weights, the learning rate and the optimizer's moments after every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = trainer.optimizers[0].state_dict()["state"]
        moments = [v.clone() for s in state.values() for v in s.values()]
        self.seen.append(
            (pl_module.model.table.weight.detach().clone(), trainer.optimizers[0].param_groups[0]["lr"], moments)
        )


def fit(module, batches, **more):
    watcher = Weights()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and loggers
        L.Trainer(
            accelerator="cpu", max_steps=len(batches), callbacks=[watcher], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, **more,
        ).fit(module, DataLoader(batches, batch_size=None))  # fmt: skip
    return watcher.seen


def batch(seed: int, poisoned: bool = False):
    ids = torch.randint(0, 9, (2, 5), generator=torch.Generator().manual_seed(seed))
    if poisoned:
        ids[0, 2] = 9
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def test_loss_is_the_mean_over_labelled_tokens_only():
    logits = torch.randn(2, 4, 5, dtype=torch.float64)
    labels = torch.tensor([[-100, 1, -100, 3], [-100, -100, 2, -100]])
    log_p = logits.log_softmax(-1)
    by_hand = -(log_p[0, 0, 1] + log_p[0, 2, 3] + log_p[1, 1, 2]) / 3
    assert response_loss(logits, labels).item() == pytest.approx(by_hand.item(), rel=1e-6)


@given(
    name=st.sampled_from(["constant", "linear", "cosine", "hold_then_decay"]),
    steps=st.integers(1, 400),
    warmup=st.floats(0, 0.5),
    hold=st.floats(0, 1),
    final=st.floats(0, 1),
)
@settings(max_examples=100, deadline=None)
def test_schedules_stay_between_their_ends(name, steps, warmup, hold, final):
    setup = trainer_settings(steps=steps, warmup=warmup, schedule=name, hold=hold, final_lr=final)
    factors = [schedule_factor(step, setup) for step in range(steps)]
    warm = round(warmup * steps)
    assert all(0 < f <= 1 for f in factors[:warm])
    assert factors[:warm] == sorted(factors[:warm])
    assert all(min(final, 1.0) - 1e-12 <= f <= 1 + 1e-12 for f in factors[warm:])
    if name != "constant":
        assert factors[warm:] == sorted(factors[warm:], reverse=True)
    if name in ("linear", "cosine") and steps - warm > 1:
        assert factors[warm] == pytest.approx(1.0)
        assert factors[-1] == pytest.approx(final)


def test_a_non_finite_loss_changes_no_weight_no_moment_and_no_schedule():
    torch.manual_seed(0)
    module = FineTuner(Bigram(), trainer_settings(), learning_rate=0.1)
    seen = fit(module, [batch(0), batch(1, poisoned=True), batch(2)])
    (first, rate_1, moments_1), (second, rate_2, moments_2), (third, rate_3, _) = seen
    assert torch.equal(first, second)
    assert rate_1 == rate_2
    assert all(torch.equal(a, b) for a, b in zip(moments_1, moments_2, strict=True))
    assert not torch.equal(second, third)
    assert rate_3 < rate_2
    assert module.skipped_steps == 1


def test_what_was_not_finite_is_named_by_step_layer_and_rows():
    module = FineTuner(Bigram(), trainer_settings(), learning_rate=0.1)
    batches = [batch(i, poisoned=i == 1) | {"rows": torch.tensor([2 * i, 2 * i + 1])} for i in range(3)]
    fit(module, batches)
    (event,) = module.nonfinite
    assert (event["step"], event["layers"], event["rows"]) == (
        2,
        ["table.weight"],
        [2, 3],
    )  # the second row of the step series
    assert not math.isfinite(event["loss"])
    assert module.scaler_skips == []


def test_an_overflow_that_a_loss_scaler_finds_is_kept_apart():
    module = FineTuner(Bigram(), trainer_settings(), learning_rate=0.1)
    plain, count = module.loss, iter(range(9))
    huge = 3e38  # its gradient times the scale overflows, the loss does not

    def loss(given):
        one = module.model.table.weight[0, 0]
        return plain(given) + (one - one.detach()) * (huge if next(count) == 1 else 0)

    module.loss = loss
    fit(module, [batch(i) | {"rows": torch.tensor([i])} for i in range(3)], plugins=[CountingScaler()])
    assert module.nonfinite == []
    (skip,) = module.scaler_skips
    assert skip == {"step": 2, "loss_scale": 4.0, "rows": [1]}
    assert module.skipped_steps == 1


def test_a_run_that_stays_non_finite_ends():
    module = FineTuner(Bigram(), trainer_settings(max_nonfinite=3), learning_rate=0.1)
    with pytest.raises(NonFiniteTrainingError, match="3 steps in a row") as caught:
        fit(module, [batch(i, poisoned=True) for i in range(5)])
    assert caught.value.status == "nonfinite"
    assert torch.isfinite(module.model.table.weight).all()


class CountingScaler(MixedPrecision):
    """The attributes that the module reads, over Lightning's own GradScaler logic."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
        self.last_step_skipped = False

    @property
    def loss_scale(self):
        return self.scaler.get_scale()

    def optimizer_step(self, *args, **kwargs):
        before = self.loss_scale
        super().optimizer_step(*args, **kwargs)
        self.last_step_skipped = self.loss_scale < before

    def autocast_context_manager(self):
        return torch.autocast("cpu", enabled=False)


def test_under_a_scaler_the_schedule_waits_and_an_endless_search_ends():
    module = FineTuner(Bigram(), trainer_settings(), learning_rate=0.1)
    seen = fit(module, [batch(0), batch(1, poisoned=True), batch(2)], plugins=[CountingScaler()])
    assert torch.equal(seen[0][0], seen[1][0])
    assert seen[0][1] == seen[1][1] > seen[2][1]
    assert module.skipped_steps == 1
    module = FineTuner(Bigram(), trainer_settings(), learning_rate=0.1)
    with pytest.raises(NonFiniteTrainingError, match=r"loss scale fell to 0\.5") as caught:
        fit(module, [batch(i, poisoned=True) for i in range(6)], plugins=[CountingScaler()])
    assert caught.value.status == "loss_scale_underflow"


def test_micro_batches_count_as_one_step():
    module = FineTuner(Bigram(), trainer_settings(accumulate=2), learning_rate=0.1)
    batches = [batch(i) for i in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="cpu", max_steps=2, accumulate_grad_batches=2, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(batches, batch_size=None))
    assert trainer.global_step == 2
    assert module.observed["tokens"] == 20
    assert math.isfinite(module.observed["loss"])
