"""λ against autodiff of a float64 reference step, and the inequalities that must hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lyapft import lyapunov
from tests.tolerances import TOL

SHAPES = st.tuples(*[st.integers(1, 3)] * 2, st.integers(1, 6), st.integers(1, 3))  # batch, channels, tokens, states


def random_layer(shape: tuple[int, int, int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Δ over six decades, A over four, and a mask with padding on the right, float64."""
    B, D, L, N = shape
    generator = torch.Generator().manual_seed(seed)
    delta_BLD = 10 ** (torch.rand(B, L, D, generator=generator, dtype=torch.float64) * 6 - 5)
    A_DN = -(10 ** (torch.rand(D, N, generator=generator, dtype=torch.float64) * 4 - 2))
    lengths_B = torch.randint(1, L + 1, (B,), generator=generator)
    return delta_BLD, A_DN, (torch.arange(L) < lengths_B[:, None]).long()


def exponents_by_autodiff(delta_LD: torch.Tensor, A_DN: torch.Tensor, tokens: int) -> torch.Tensor:
    """(1/T) Σ_t log|diagonal of ∂x_t/∂x_{t-1}| of a written-out step, its Jacobian taken by autodiff."""
    total = torch.zeros(A_DN.numel(), dtype=torch.float64)
    for t in range(tokens):

        def step(x: torch.Tensor, t: int = t) -> torch.Tensor:
            decay = torch.exp(delta_LD[t, :, None] * A_DN)
            return (decay * x.view_as(A_DN) + delta_LD[t, :, None]).flatten()

        jacobian = torch.autograd.functional.jacobian(step, torch.randn(A_DN.numel(), dtype=torch.float64))
        assert torch.count_nonzero(jacobian - torch.diag(jacobian.diagonal())) == 0
        total += jacobian.diagonal().log()
    return (total / tokens).view_as(A_DN)


@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_exponents_equal_those_of_the_autodiff_jacobians(shape, seed):
    delta, A, mask = random_layer(shape, seed)
    A = A.clamp(min=-5.0)  # deeper decays underflow in exp, which is why λ is computed in log space
    delta = delta.clamp(max=2.0)
    found = lyapunov.selective_scan_exponents(delta, A, mask)
    for b, tokens in enumerate(mask.sum(1).tolist()):
        assert_close(found[b], exponents_by_autodiff(delta[b], A, tokens), **TOL[torch.float64])


@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_summary_equals_the_full_spectrum_and_never_exceeds_the_norm_bound(shape, seed):
    delta, A, mask = random_layer(shape, seed)
    exponents_BDN = lyapunov.selective_scan_exponents(delta, A, mask)
    summary = lyapunov.stability(delta, A, mask)
    assert summary.lambda_max == pytest.approx(exponents_BDN.max().item(), rel=1e-12)
    assert summary.lambda_mean == pytest.approx(exponents_BDN.flatten(1).amax(1).mean().item(), rel=1e-12)
    assert summary.lambda_max <= summary.norm_bound * (1 - 1e-12)  # both negative
    assert summary.margin == -summary.lambda_max > 0
    log_norms_BL = (delta[..., None] * A).amax((2, 3))
    bound = max(row[m.bool()].mean().item() for row, m in zip(log_norms_BL, mask, strict=True))
    assert summary.norm_bound == pytest.approx(bound, rel=1e-12)
    assert_close(lyapunov.log_one_step_norm(delta, A), log_norms_BL, **TOL[torch.float64])


@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_heads_are_channels_with_one_state(shape, seed):
    delta, A, mask = random_layer(shape, seed)
    heads = lyapunov.ssd_exponents(delta, A[:, 0], mask)
    assert_close(heads, lyapunov.selective_scan_exponents(delta, A[:, :1], mask)[..., 0], **TOL[torch.float64])
    assert lyapunov.stability(delta, A[:, 0], mask).lambda_max == pytest.approx(heads.max().item(), rel=1e-12)


def test_the_compiled_pass_equals_the_reference_in_torch():
    for shape, seed in (((3, 37, 20, 4), 1), ((1, 1, 1, 1), 2), ((2, 5, 70, 16), 3)):
        delta, A, mask = random_layer(shape, seed)
        A = A.clamp(max=-1e-2)
        exact = lyapunov.stability_profile(delta, A, mask)  # float64: never compiled
        fast = lyapunov.stability_profile(delta.float(), A.float(), mask)
        assert (exact.numbers.dtype, fast.numbers.dtype) == (torch.float64, torch.float32)
        for one, other in zip(fast, exact, strict=True):
            assert_close(one.double(), other, **TOL[torch.float32])


def test_the_compiled_pass_shows_nan_and_leaves_growth_to_torch():
    delta, A, mask = (t.float() for t in random_layer((2, 4, 5, 2), 5))
    delta[0, 0, 1] = torch.nan
    assert lyapunov.stability_tensors(delta, A, mask)[:2].isnan().all()
    growing = lyapunov.stability(torch.ones(1, 3, 2), torch.tensor([-1.0, 0.5]), torch.ones(1, 3))
    assert (growing.lambda_max, growing.one_step_norm) == (0.5, 0.5)
    assert growing.memory == growing.gain == float("inf")


@pytest.mark.parametrize("name", lyapunov.NEUTRAL_ZONE)
def test_the_neutral_zone_is_where_the_decay_rounds_to_one(name):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    exponent = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 30
    x = -(2.0**-exponent)
    away = (x.abs() / lyapunov.NEUTRAL_ZONE[name] - 1).abs() > 0.02  # e^x is not 1 + x: the edge is this sharp
    to_one = torch.exp(x).to(dtype) == 1
    assert to_one[away].equal((x.abs() < lyapunov.NEUTRAL_ZONE[name])[away])
    share = lyapunov.stability_tensors(
        -x.view(1, -1, 1), torch.tensor([-1.0], dtype=torch.float64), torch.ones(1, 4000)
    )
    assert share[lyapunov.FIELDS.index(f"neutral_{name}")].item() == pytest.approx(
        to_one.double().mean().item(), abs=1e-3
    )


@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_the_running_product_ends_at_the_exponent_times_the_tokens(shape, seed):
    delta, A, mask = random_layer(shape, seed)
    product_BL = lyapunov.log_running_product(delta, A, mask)
    profile = lyapunov.stability_profile(delta, A, mask)
    assert_close(product_BL[:, -1], profile.lambda_B * mask.sum(1), **TOL[torch.float64])
    assert (product_BL.diff(dim=1) <= 0).all()
    assert (product_BL <= (profile.log_norm_BL * mask).cumsum(1) + 1e-12).all()


def test_memory_and_gain_say_what_a_perturbation_and_a_repeated_error_do():
    found = lyapunov.stability(torch.full((1, 9, 1), 0.05), torch.tensor([-1.0]), torch.ones(1, 9))
    decay, error = torch.tensor(found.lambda_max).exp().item(), 0.0
    for _ in range(2000):
        error = decay * error + 1.0
    assert found.gain == pytest.approx(error, rel=1e-5)
    assert decay**found.memory == pytest.approx(torch.tensor(-1.0).exp().item(), rel=1e-5)


def test_sum_of_exponents_is_the_mean_log_determinant():
    delta, A, mask = random_layer((2, 3, 6, 3), seed=7)
    for b, tokens in enumerate(mask.sum(1).tolist()):
        log_det_L = (delta[b, :tokens, :, None] * A).sum((1, 2))
        found = lyapunov.selective_scan_exponents(delta, A, mask)[b].sum()
        assert_close(found, log_det_L.mean(), **TOL[torch.float64])


def test_padding_does_not_count():
    delta, A, mask = random_layer((3, 2, 6, 2), seed=11)
    junk = torch.where(mask[..., None].bool(), delta, torch.full_like(delta, 1e3))
    assert lyapunov.stability(junk, A, mask) == lyapunov.stability(delta, A, mask)


def test_half_precision_inputs_are_widened_not_computed_in_half():
    delta, A, mask = random_layer((2, 4, 300, 2), seed=3)
    half = delta.half()
    found = lyapunov.stability(half, A.half(), mask)
    expected = lyapunov.stability(half.double(), A.half().double(), mask)
    assert found.lambda_max == pytest.approx(expected.lambda_max, **{"rel": TOL[torch.float32]["rtol"]})


def test_a_sequence_without_a_real_token_is_refused():
    delta, A, _ = random_layer((2, 2, 3, 2), seed=0)
    with pytest.raises(ValueError, match=r"sequences \[1\]"):
        lyapunov.stability(delta, A, torch.tensor([[1, 1, 1], [0, 0, 0]]))
