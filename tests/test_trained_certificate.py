"""The certificate on real weights: its entries are the model's own state, and its promises hold."""

import pytest
import torch
from torch.testing import assert_close

from lyapft import scan
from lyapft.data import pydoc
from lyapft.errors import InputError
from lyapft.experiments import certificate, subjects
from lyapft.experiments.frame import SHARE, correlation_interval, interval
from tests.tolerances import TOL

FEW = {"prompts": 3, "tokens": 40, "entries": 48, "seed": 1}


@pytest.mark.parametrize("name", ["mamba_tiny", "mamba2_tiny"])
def test_entries_are_states_of_the_models_own_cache(name):
    found = certificate._entries(name, None, FEW["prompts"], FEW["tokens"], 10**6, 0)
    with subjects.load(name) as subject, torch.no_grad():
        ids = subjects.prompts(subject, pydoc.texts(), FEW["prompts"], FEW["tokens"])
        cache = subject.model(input_ids=ids, use_cache=True).cache_params
        for index, (layer, entries) in enumerate(found.items()):
            assert layer == subject.seam.layers[index].name
            last = certificate._computed("torch", entries)[:, -1]
            stored = cache.layers[index].recurrent_states[0] if hasattr(cache, "layers") else cache.ssm_states[index]
            assert_close(last.sort(1).values, stored.flatten(1).float().sort(1).values, **TOL[torch.float32])
            exact = entries.recurrence().states()[:, -1]
            assert_close(last.double(), exact, **TOL[torch.float32])


@pytest.mark.parametrize("form", ["fp32", "bf16", "fp16", "bf16_true"])
def test_no_promise_is_broken_and_coarser_formats_deviate_more(form):
    found = certificate.run(["mamba_tiny", "mamba2_tiny"], precision=form, **FEW)
    assert [row["violations"] for row in found.rows] == [0] * 4
    for row in found.rows:
        assert 0 < row["measured"] <= row["promised"]
        assert -1 <= row["low"] <= row["rank_correlation"] <= row["high"] <= 1
        assert (row["format"], row["n"]) == (form, FEW["prompts"])
        relative = 2e-6 if form == "fp32" else 0.2
        assert row["measured"] < relative * 50
        assert (row["measured"] > 1e-5) == (form != "fp32")
    assert {row["kernel"] for row in found.rows} == {"torch" if scan.available()["cpu"] else "cpu"}


def test_a_transformer_has_no_state_to_certify():
    with pytest.raises(InputError, match="no recurrence that the certificate covers"):
        certificate.run(["llama_tiny"], precision="bf16", **FEW)


def test_what_is_no_model_is_refused_in_one_sentence():
    with pytest.raises(InputError, match="'mambo' is neither a model of conf/model/ nor the folder of a finished run"):
        certificate.run(["mambo"], precision="bf16", **FEW)


def test_intervals_stay_where_their_values_can_lie():
    low = correlation_interval([0.9, 1.0, 0.95])
    assert -1 <= low.low <= low.mean <= low.high <= 1
    same = correlation_interval([0.5, 0.5, 0.5])
    assert same.mean == pytest.approx(0.5)
    assert same.low == pytest.approx(same.high)
    share = interval([1.0, 1.0, 0.7], SHARE)
    assert (share.high, share.n) == (1.0, 3)
    assert 0 <= share.low < share.mean
