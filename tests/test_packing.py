"""Packed rows: nothing lost, and the same losses and gradients as one row per example, for every family."""

import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from lyapft import config, recurrence
from lyapft.data import TokenDataset, pack
from lyapft.data.packing import PACKABLE, faults
from lyapft.module import FineTuner, response_loss
from lyapft.probes import LyapunovProbe
from tests.test_recurrence import CONFIGS as RECURRENT
from tests.test_recurrence import HYBRID
from tests.tolerances import TOL

CONFIGS = RECURRENT | dict.fromkeys(PACKABLE - RECURRENT.keys(), HYBRID)


def dataset(lengths: list[int], seed: int = 0, ordered: bool = False) -> TokenDataset:
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    ids = rng.integers(1, 60, total).astype(np.int32)
    return TokenDataset(
        "made-up", "h", ids, rng.random(total) < 0.7, np.cumsum([0, *lengths]), pad_id=0, ordered=ordered
    )


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=200), ordered=st.booleans())
def test_every_row_is_in_one_pack_and_no_pack_overflows(lengths, ordered):
    packed = pack(dataset(lengths, ordered=ordered), 30)
    assert sorted(row for p in packed.packs for row in p) == list(range(len(lengths)))
    sizes = [sum(lengths[row] for row in p) for p in packed.packs]
    assert max(sizes) <= 30
    if ordered:
        assert [row for p in packed.packs for row in p] == list(range(len(lengths)))
    record = packed.record()
    assert record["rows"] == len(lengths)
    assert record["packs"] == len(packed)


def test_a_pack_keeps_its_rows_tokens_and_tells_them_apart():
    rows = dataset([3, 5, 4])
    packed = pack(rows, 8)
    assert packed.packs == [[0, 1], [2]]
    batch = packed.collate([packed[0], packed[1]])
    assert batch["input_ids"][0].tolist() == rows.ids[:8].tolist()
    assert batch["sequence"].tolist() == [[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, -1, -1, -1, -1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch["attention_mask"].sum() == 12
    assert batch["labels"][0, 0] == batch["labels"][0, 3] == -100  # nothing of their own stands before them
    assert (batch["labels"][1, 4:] == -100).all()


@pytest.mark.parametrize("kind", sorted(PACKABLE))
def test_packed_logits_and_gradients_equal_unpacked_ones(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **CONFIGS[kind])).train()
    seam = recurrence.install(model)
    settings = OmegaConf.structured(config.TrainerConfig)
    module = FineTuner(model, settings, 1e-3, seam=seam)
    rows = dataset([6, 1, 9, 5, 14, 7], seed=3)
    packed = pack(rows, 16)
    assert len(packed) < len(rows)

    def gradients(losses: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.stack(losses).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def total(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        targets = int((batch["labels"][:, 1:] != -100).sum())
        return module.loss(batch) * targets

    alone = [total(rows.collate([rows[i]])) for i in range(len(rows)) if (rows[i]["labels"][1:] != -100).any()]
    expected = gradients(alone)
    together = total(packed.collate([packed[i] for i in range(len(packed))]))
    actual = gradients([together])
    torch.testing.assert_close(together, torch.stack(alone).sum(), **TOL[torch.float32])
    assert actual.keys() >= expected.keys()
    for name, gradient in expected.items():
        allowed = TOL[torch.float32]["rtol"] * float(gradient.abs().max()) + 1e-7
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=allowed, msg=lambda m, n=name: f"{n}: {m}")


def test_without_the_seam_packed_sequences_of_a_mamba_would_touch():
    """The check above can fail: a model that is not told runs over the boundary."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **CONFIGS["mamba"])).train()
    packed = pack(dataset([6, 9]), 16)
    batch = packed.collate([packed[0]])
    told = FineTuner(model, OmegaConf.structured(config.TrainerConfig), 1e-3, seam=recurrence.install(model))
    apart = told.loss(batch)
    touching = response_loss(model(input_ids=batch["input_ids"]).logits, batch["labels"])
    assert torch.equal(apart, touching)  # the seam still holds the last batch's sequences
    told._seam.sequence = None
    assert not torch.equal(apart, response_loss(model(input_ids=batch["input_ids"]).logits, batch["labels"]))


def test_families_that_cannot_be_packed_are_refused_with_the_reason():
    assert faults("mamba", [], False) == []
    assert "granitemoehybrid apart: transformers builds" in faults("granitemoehybrid", [], False)[0]
    assert "not tested for lfm2" in faults("lfm2", [], False)[0]
    assert "layers.0 between sequences" in faults("rwkv", ["layers.0"], False)[0]
    assert "in front of a row" in faults("mamba", [], True)[0]


def test_exponents_of_packed_sequences_are_those_of_each_by_itself():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **CONFIGS["mamba"])).train()
    seam = recurrence.install(model)
    module = FineTuner(model, OmegaConf.structured(config.TrainerConfig), 1e-3, seam=seam)
    rows = dataset([6, 3, 9, 5], seed=3)
    packed = pack(rows, 12)
    probe, trainer = LyapunovProbe(), types.SimpleNamespace(global_step=0, max_steps=99)
    probe.bind(seam)

    def exponents(batch: dict[str, torch.Tensor]) -> list[list[float]]:
        probe.on_train_batch_start(trainer, module, batch, 0)
        module.loss(batch)
        return [profile.lambda_B.tolist() for profile in probe.profiles.values()]

    alone = [exponents(rows.collate([rows[i]])) for p in packed.packs for i in p]
    together = exponents(packed.collate([packed[i] for i in range(len(packed))]))
    for layer, found in enumerate(together):
        assert found == pytest.approx([each[layer][0] for each in alone], rel=TOL[torch.float32]["rtol"])
