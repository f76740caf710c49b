"""Selected dimensions: those that a warm-up moves most, on base weights that the warm-up leaves as they were."""

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers
from torch import nn
from torch.testing import assert_close

from lyapft.errors import InputError
from lyapft.peft import SelectiveDimensionTuning
from lyapft.peft.mixers import mixers
from lyapft.peft.selection import count, dimensions_of_a_scan
from tests.peft_models import TOKENS, attached, backbone, logits, train
from tests.tolerances import TOL

BATCHES = [{"input_ids": TOKENS, "labels": TOKENS}, {"input_ids": TOKENS.flip(1), "labels": TOKENS.flip(1)}] * 3


def tuned(kind: str, **settings: float) -> SelectiveDimensionTuning:
    strategy = SelectiveDimensionTuning(**({"channels": 0.2, "states": 0.5, "warmup_steps": 4} | settings))  # type: ignore[arg-type]
    attached(kind, strategy)
    model = strategy.backbone.model.train()
    strategy.prepare(lambda batch: model(**batch).loss.backward(), iter(BATCHES))
    return strategy


def changed(kind: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """Which entries of a merged model are not the base's, of tensors with any."""
    base = dict(backbone(kind)[0].model.named_parameters())
    found = {name: p != base[name] for name, p in model.named_parameters()}
    return {name: mask for name, mask in found.items() if mask.any()}


@given(d=integers(1, 9), n=integers(1, 6), channels=floats(0.01, 1), states=floats(0.01, 1), seed=integers(0, 999))
def test_the_dimensions_are_those_of_a_sort(d: int, n: int, channels: float, states: float, seed: int) -> None:
    change = torch.randn(d, n, generator=torch.Generator().manual_seed(seed))
    rows, columns = dimensions_of_a_scan(change, channels, states)
    norms = sorted(range(d), key=lambda i: -float(change[i].norm()))
    assert rows.tolist() == norms[: count(channels, d)]
    for row, chosen in zip(rows.tolist(), columns.tolist(), strict=True):
        assert chosen == sorted(range(n), key=lambda j: -abs(float(change[row, j])))[: count(states, n)]


def test_the_warm_up_leaves_the_base_weights_and_no_gradient() -> None:
    before = logits(backbone("mamba")[0].model)
    strategy = tuned("mamba")
    model = strategy.backbone.model
    assert torch.equal(logits(model), before)
    assert all(p.grad is None for p in model.parameters())
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"values"}


def test_a_warm_up_that_is_not_finite_selects_nothing() -> None:
    strategy = SelectiveDimensionTuning(warmup_steps=2)
    attached("mamba", strategy)
    model = strategy.backbone.model.train()
    with pytest.raises(InputError, match=r"not finite in .*mixer: use precision"):
        strategy.prepare(lambda batch: (model(**batch).loss * torch.inf).backward(), iter(BATCHES))


def test_selected_are_the_dimensions_that_a_warm_up_by_hand_moves_most() -> None:
    model = backbone("mamba")[0].model.train().requires_grad_(False)
    found = mixers(model)
    base = {name: mixer.A_log.detach().clone() for name, mixer in found.items()}
    rank = next(iter(found.values())).time_step_rank
    tensors = [t for m in found.values() for t in (m.A_log, m.x_proj.weight)]
    optimizer = torch.optim.AdamW([t.requires_grad_(True) for t in tensors], lr=1e-3, weight_decay=0.0)
    for batch in BATCHES[:4]:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        for mixer in found.values():
            mixer.x_proj.weight.grad[:rank] = 0
        optimizer.step()
    selected = tuned("mamba").record()["selected"]
    for name, mixer in found.items():
        moved = (mixer.A_log.exp() - base[name].exp()).norm(dim=1)
        assert selected[name] == sorted(moved.topk(count(0.2, len(moved))).indices.tolist())


def test_only_selected_entries_train_and_the_merged_model_is_ordinary() -> None:
    strategy = tuned("mamba")
    selected = strategy.record()["selected"]
    train(strategy, 4)
    model = strategy.backbone.model
    trained = logits(model)
    strategy.merge()
    assert_close(logits(model), trained, **TOL[torch.float32])
    assert not any("parametrizations" in name for name, _ in model.named_parameters())
    entries = changed("mamba", model)
    assert {n.partition(".mixer.")[2] for n in entries} == {"A_log", "x_proj.weight"}
    for name, mixer in mixers(model).items():
        decay, rows = entries[f"{name}.A_log"], entries[f"{name}.x_proj.weight"]
        assert decay.any(1).nonzero().flatten().tolist() == selected[name]
        assert set(decay.sum(1).tolist()) <= {0, count(0.5, mixer.ssm_state_size)}
        assert set(rows.any(0).nonzero().flatten().tolist()) <= set(selected[name])
        assert not rows[: mixer.time_step_rank].any()


def test_on_mamba_2_heads_and_rows_of_b_and_c_train() -> None:
    strategy = tuned("mamba2", channels=0.5)
    selected = strategy.record()["selected"]
    train(strategy, 4)
    strategy.merge()
    entries = changed("mamba2", strategy.backbone.model)
    for name, mixer in mixers(strategy.backbone.model).items():
        assert entries[f"{name}.A_log"].nonzero().flatten().tolist() == selected[name]
        assert len(selected[name]) == 2
        rows = entries[f"{name}.in_proj.weight"].any(1).nonzero().flatten() - 2 * mixer.intermediate_size
        of_b = rows[rows < mixer.ssm_state_size]
        assert rows.tolist() == [*of_b.tolist(), *(of_b + mixer.ssm_state_size).tolist()]
        assert len(of_b) == 2
