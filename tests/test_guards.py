"""Guards and alerts: what they do about a spike, that they say so, and that they are part of a cell or not."""

import math
import types
import warnings

import lightning as L
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from lyapft import cell, config, dashboard, lyapunov, watch
from lyapft.dashboard.runs import LiveRun
from lyapft.guards import Guard
from lyapft.module import FineTuner, TrainingStopped
from lyapft.probes import AlertProbe
from tests.test_cell import prepared
from tests.test_config import composed, identity
from tests.test_module import Bigram, batch, trainer_settings

RULES = {"high": {"metric": "loss", "above": 100.0}}


class Watcher(Callback):
    """Weights and rates after each step."""

    def __init__(self):
        self.weights, self.rates, self.moments = [], [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.weights.append(module.model.table.weight.detach().clone())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        state = trainer.optimizers[0].state_dict()["state"].get(0, {})
        self.moments.append({key: value.clone() for key, value in state.items()})


def run(guard, steps: int = 8, high: tuple[int, ...] = (4,), factor: float = 1000, **more):
    """Train on batches of which some have a loss a thousand times too high; returns what was seen, and the module."""
    torch.manual_seed(0)
    module = FineTuner(Bigram(), trainer_settings(steps=steps), learning_rate=0.1)
    plain, count = module.loss, iter(range(steps))
    module.loss = lambda given: plain(given) * (factor if next(count) in high else 1)
    watcher = Watcher()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        L.Trainer(
            accelerator="cpu", max_steps=steps, callbacks=[*([guard] if guard else []), watcher], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **more,
        ).fit(module, DataLoader([batch(i) for i in range(steps)], batch_size=None))  # fmt: skip
    return watcher, module


def guard(action: str, **more) -> Guard:
    return Guard(**({"name": action, "action": action, "rules": RULES} | more))


def test_skip_withholds_the_update_and_the_next_and_the_schedule_waits():
    skip = guard("skip", skip_steps=1)
    seen, module = run(skip)
    assert torch.equal(seen.weights[3], seen.weights[4])
    assert torch.equal(seen.weights[4], seen.weights[5])
    assert not torch.equal(seen.weights[5], seen.weights[6])
    assert seen.rates[3] == seen.rates[4] == seen.rates[5] > seen.rates[6]
    assert module.skipped_steps == 2
    assert module.nonfinite == []
    action, following = skip.actions
    assert action["step"] == 5  # as in the step series, which counts from 1
    assert (action["action"], action["rule"], action["metric"]) == ("skip", "high", "loss")
    assert action["value"] > 100 == action["limit"]
    assert following == action | {"step": 6, "action": "skip_next"}


def test_what_follows_from_a_skip_is_no_action_that_the_limit_counts():
    skip = guard("skip", skip_steps=3, limit=1)
    _, module = run(skip, steps=7, high=(2,))
    assert [entry["action"] for entry in skip.actions] == ["skip", *["skip_next"] * 3]
    assert [entry["step"] for entry in skip.actions] == [3, 4, 5, 6]
    assert module.skipped_steps == 4


def test_rollback_restores_weights_moments_and_rate_of_the_last_copy_and_goes_on():
    back = guard("rollback", every=2)
    seen, module = run(back)
    plain, _ = run(None)
    assert torch.equal(seen.weights[3], plain.weights[3])
    assert torch.equal(seen.weights[4], seen.weights[3])  # the copy of the second good step was replaced at the fourth
    for key, value in seen.moments[3].items():
        assert torch.equal(seen.moments[4][key], value)
    assert seen.rates[4] == seen.rates[3]
    assert not torch.equal(plain.weights[4], plain.weights[3])
    assert not torch.equal(seen.weights[5], seen.weights[4])
    assert [action["step"] for action in back.actions] == [5]
    assert module.skipped_steps == 0


def test_rollback_before_any_copy_goes_to_the_start():
    torch.manual_seed(0)
    start = Bigram().table.weight.detach().clone()
    seen, _ = run(guard("rollback", every=50), high=(1,))
    assert torch.equal(seen.weights[1], start)
    assert all(not value.any() for value in seen.moments[1].values())


def test_stop_and_a_guard_that_acts_too_often_end_the_training():
    with pytest.raises(TrainingStopped, match="guard=stop stopped the training: high: loss is") as caught:
        run(guard("stop"))
    assert caught.value.status == "stopped_by_guard"
    with pytest.raises(TrainingStopped, match=r"guard\.limit=1 times"):
        run(guard("skip", limit=1), high=(2, 4, 6))


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("action", ["skip", "rollback", "stop"])
def test_guards_act_on_what_is_not_finite(action, factor):
    nan = guard(action, skip_steps=1, every=1)
    if action == "stop":
        with pytest.raises(TrainingStopped, match="guard=stop stopped the training: nonfinite: loss is") as caught:
            run(nan, factor=factor)
        assert caught.value.status == "stopped_by_guard"
    else:
        seen, module = run(nan, factor=factor)
        assert [entry["step"] for entry in module.nonfinite] == [5]
        assert torch.equal(seen.weights[3], seen.weights[4])
        assert torch.equal(seen.weights[4], seen.weights[5]) == (action == "skip")  # the next one too
        assert all(weight.isfinite().all() for weight in seen.weights)
    entry, *following = nan.actions
    assert [one["step"] for one in following] == ([6] if action == "skip" else [])
    assert {"step": 5, "action": action, "rule": "nonfinite", "metric": "loss"}.items() <= entry.items()
    assert not math.isfinite(entry["value"])


def test_a_guard_may_leave_what_is_not_finite_to_the_module():
    calm = guard("stop", nonfinite=False)
    _, module = run(calm, factor=math.nan)
    assert (calm.actions, [entry["step"] for entry in module.nonfinite]) == ([], [5])


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_a_guard_that_never_acts_changes_no_bit(action):
    seen, _ = run(guard(action, every=1), high=())
    plain, _ = run(None, high=())
    assert all(torch.equal(a, b) for a, b in zip(seen.weights, plain.weights, strict=True))


def test_a_restored_guard_goes_on():
    one = guard("rollback", every=2)
    run(one)
    other = guard("rollback", every=2)
    other.load_state_dict(one.state_dict())
    assert other.actions == one.actions
    assert other._good == one._good


def test_a_guard_is_part_of_the_cell_and_none_is_the_cell_of_before():
    plain = identity()
    assert plain == identity("guard=none")
    assert len({plain, *(identity(f"guard={name}") for name in ("skip", "stop", "rollback"))}) == 4
    assert identity("guard=skip", "guard.skip_steps=2") != identity("guard=skip")
    assert plain != identity("guard=stop", "guard.name=none")  # it is what a guard does that counts
    assert plain == identity("probe=all") == identity("probe=[lyapunov,shadow]")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["guard=skip", "guard.rules.spike.metric=margin"], "only loss and grad_norm are known before an update"),
        (["guard=rollback", "peft=adalora"], "adalora"),
        (["guard=skip", "guard.action=jump"], "guard.action=jump is unknown"),
        (["guard=skip", "~guard.rules.spike", "guard.nonfinite=false"], "no rules"),
        (["guard=rollback", "guard.every=0"], "guard.every=0"),
        (["guard=skip", "+guard.rules.odd={metric: loss}"], "rule odd has none of below, above, sigma and fall"),
        (["guard=skip", "+guard.rules.odd={metric: loss, abov: 3}"], "guard.rules.odd: Key 'abov' not in 'RuleConfig'"),
        (["guard=skip", "+guard.rules.odd={above: 3}"], "odd"),
        (["guard=stop", "guard.rules.spike.metric=los"], "los is no number that is the same whenever"),
        (["guard=stop", "guard.rules.spike.metric=tokens_per_s"], "tokens_per_s is no number that is the same"),
        (["guard=stop", "guard.rules.spike.metric=shadow_kl"], "reads shadow_kl, which probe=shadow measures"),
        (["guard=stop", "guard.rules.spike.metric=margin", "probe=none"], "which probe=lyapunov measures"),
        (["probe=alerts", "probe.alerts.rules.spike.window=3"], "window=3"),
    ],
)
def test_wrong_rules_are_refused_before_anything_runs(overrides, message):
    assert any(message in fault for fault in config.faults(composed(*overrides)))


def test_a_guard_makes_the_probe_that_it_reads_part_of_the_cell():
    edge = ("guard=stop", "+guard.rules.edge={metric: margin, below: 1.0e-5}")
    assert config.faults(composed(*edge)) == []
    assert identity(*edge) != identity(*edge, "probe.lyapunov.every=5")
    assert identity(*edge) == identity(*edge, "probe=[lyapunov,resources]")
    assert identity("guard=stop") == identity("guard=stop", "probe.lyapunov.every=5")


def test_the_lyapunov_numbers_of_rules_are_those_of_the_probe():
    assert set(watch.REPEATABLE["lyapunov"]) == {*lyapunov.FIELDS, "margin"}


def test_alerts_and_guards_see_whole_rows_and_the_last_row_is_kept(tmp_path):
    record, steps = trained(
        tmp_path,
        "probe=[lyapunov,shadow,resources,alerts]",
        "+probe.alerts.rules.fast={metric: tokens_per_s, above: 0}",
        "guard=stop",
        "+guard.rules.high={metric: loss, above: 0}",
    )
    assert record["status"] == "stopped_by_guard"
    assert [alert["step"] for alert in record["alerts"] if alert["rule"] == "fast"] == [1]
    (action,) = record["guard_actions"]
    assert list(steps["step"]) == [1] == [action["step"]]
    assert steps["loss"].iloc[0] == action["value"]
    assert "shadow_kl" in steps


def test_the_same_guarded_cell_acts_the_same(tmp_path):
    settings = ("guard=rollback", "guard.every=1", "+guard.rules.high={metric: loss, above: 1.0}", "guard.limit=9")
    (first, steps), (second, again) = (trained(tmp_path / name, *settings) for name in "ab")
    assert (first["status"], first["guard_actions"]) == ("ok", second["guard_actions"])
    assert [action["step"] for action in first["guard_actions"]] == [1, 2, 3, 4]
    assert list(steps["loss"]) == list(again["loss"])
    assert first["scores"] == second["scores"]


def trained(runs, *overrides):
    """Record and step series of a small cell."""
    one = prepared(runs, "reference=off", *overrides)
    return cell.ensure(one), pd.read_parquet(one.folder / "steps.parquet")


# --- alerts


def given_alerts(values, **rule):
    probe = AlertProbe({"r": {"metric": "x"} | rule})
    module = types.SimpleNamespace(settings=types.SimpleNamespace(accumulate=1), observed={})
    for step, value in enumerate(values):
        module.observed = {"x": value}
        probe.on_train_batch_end(types.SimpleNamespace(global_step=step, loggers=[]), module, None, None, step)
    return probe


def test_an_alert_is_given_once_until_the_number_comes_back(caplog):
    probe = given_alerts([1, 0.5, 0.4, 1, 0.3, 0.2], below=0.9)
    assert [alert["step"] for alert in probe.given] == [1, 4]
    assert probe.given[0] | {"step": 1, "rule": "r", "metric": "x", "value": 0.5, "limit": 0.9} == probe.given[0]
    assert caplog.text.count("alert at step") == 2


def test_the_stock_rules_tell_of_a_collapsing_loss_scale_and_of_an_overflow_in_the_shadow():
    rules = OmegaConf.to_container(composed("probe=alerts").probe.alerts.rules)
    scale = given_alerts([65536.0] * 20 + [2.0**k for k in range(15, 0, -1)], **rules["loss_scale"] | {"metric": "x"})
    assert [alert["value"] for alert in scale.given] == [256.0]
    assert given_alerts([1.0] * 200, **rules["loss_scale"] | {"metric": "x"}).given == []  # bf16: not scaled
    shadow = given_alerts([1e-4, math.nan, math.nan, 1e-4, math.inf], **rules["shadow"] | {"metric": "x"})
    assert [alert["step"] for alert in shadow.given] == [1, 4]


def test_alerts_of_a_continued_cell_go_on_also_with_a_rule_more():
    one = given_alerts([1, 0.5], below=0.9)
    other = AlertProbe({"r": {"metric": "x", "below": 0.9}, "new": {"metric": "x", "above": 0.1}})
    other.load_state_dict(one.state_dict())
    module = types.SimpleNamespace(settings=types.SimpleNamespace(accumulate=1), observed={"x": 0.4})
    other.on_train_batch_end(types.SimpleNamespace(global_step=2, loggers=[]), module, None, None, 2)
    assert [(alert["rule"], alert["step"]) for alert in other.given] == [("r", 1), ("new", 2)]


def test_a_spike_of_six_standard_deviations_alerts():
    values = [1 + 0.1 * (i % 2) for i in range(128)]
    assert given_alerts([*values, 1.05 + 5 * 0.0502], sigma=6.0).given == []
    assert len(given_alerts([*values, 1.05 + 7 * 0.0502], sigma=6.0).given) == 1


def test_micro_batches_are_not_judged_before_their_step_is_whole():
    probe = AlertProbe({"r": {"metric": "x", "above": 0.0}})
    module = types.SimpleNamespace(settings=types.SimpleNamespace(accumulate=2), observed={"x": 1.0})
    probe.on_train_batch_end(types.SimpleNamespace(global_step=0, loggers=[]), module, None, None, 0)
    assert probe.given == []
    probe.on_train_batch_end(types.SimpleNamespace(global_step=1, loggers=[]), module, None, None, 1)
    assert len(probe.given) == 1


def test_an_alert_reaches_wandb_and_one_that_cannot_be_sent_stops_nothing(monkeypatch, tmp_path):
    sent = []
    experiment = types.SimpleNamespace(alert=lambda title, text: sent.append((title, text)), project="p")
    monkeypatch.setattr(LiveRun, "experiment", property(lambda self: experiment))
    logger = LiveRun(experiment, tmp_path)
    dashboard.alert([logger], "t", "text")
    assert (sent, logger.lacks) == ([("t", "text")], [])
    experiment.alert = lambda title, text: 1 / 0
    dashboard.alert([logger], "t", "text")
    assert logger.lacks == ["the alert 't' (text)"]
