"""The rounding certificate: sound for every kernel, and not sound once anything of second order is dropped."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lyapft.experiments.soundness import LENGTHS, NAMES, Draws, bound_and_measure, draw, run
from lyapft.lyapunov.certificate import KERNELS, Rounding, certificate
from lyapft.lyapunov.rounding import FORMATS, Inputs


@pytest.mark.parametrize("kernel", NAMES)
def test_no_deviation_exceeds_its_certificate(kernel):
    generator = torch.Generator().manual_seed(1)
    for length, layers in zip(LENGTHS[:4], (16, 16, 8, 4), strict=True):
        violations, overflows, ratios = run(kernel, layers, length, generator)
        assert violations == 0
        assert overflows < layers
        assert min(ratios) >= 1


def test_the_certificate_says_something():
    generator = torch.Generator().manual_seed(3)
    ratios = [ratio for kernel in NAMES for ratio in run(kernel, 30, 64, generator)[2]]
    assert statistics.median(ratios) <= 30


def test_the_distribution_reaches_the_hard_cases():
    draws = draw(400, 8, torch.Generator().manual_seed(0))
    slow = -torch.expm1(draws.delta * draws.A)
    states = Inputs(draws.delta * draws.A, draws.delta * draws.inputs * draws.B[:, None], draws.initial).states()
    assert (slow <= 1e-4).double().mean() > 0.1
    assert (states.abs() < 2.0**-14).double().mean() > 0.1  # subnormal in fp16
    assert ((draws.adapted != draws.A).double().mean() - 1 / 3).abs() < 0.1
    assert max(LENGTHS) == 4096


def first_order(rounding: Rounding, exact: Inputs, given: Inputs, states: Tensor) -> Tensor:
    """What is often written: every product of two small numbers dropped, and underflow forgotten."""
    e, bounds, unit = torch.zeros_like(states[:, 0]), [], rounding.unit
    steps, off = rounding.products + rounding.argument + rounding.writes, given.off(exact)
    for t in range(exact.write.shape[1]):
        decay, before = exact.log_decay[:, t].exp(), states[:, t].abs()
        eta = decay * (off.log_decay[:, t] + rounding.exponential + unit * exact.log_decay[:, t].abs())
        e = decay * e + eta * before + steps * unit * (decay * before + exact.write[:, t].abs())
        bounds.append(e)
    return torch.stack(bounds, dim=1)


def test_first_order_bounds_are_violated_by_an_adapter_that_changes_A():
    log_decay = torch.full((1, 200, 1), -0.05, dtype=torch.float64)
    exact = Inputs(log_decay, torch.full_like(log_decay, 0.05), torch.ones(1, 1, dtype=torch.float64))
    changed = exact._replace(log_decay=0.4 * log_decay)  # A shrinks to 0.4 of itself
    states = exact.states()
    measured = (changed.states() - states)[:, 1:].abs()
    rounding = KERNELS["loop fp32"]
    assert (measured > first_order(rounding, exact, changed, states)).any()
    assert (measured <= certificate(rounding, exact, changed, states)).all()


def test_a_bound_without_underflow_is_violated_by_subnormals():
    kernel, draws = "loop fp16", draw(40, 64, torch.Generator().manual_seed(2))
    draws = draws._replace(
        adapted=draws.A, inputs=draws.inputs / draws.inputs.abs().max() * 1e-6, initial=0 * draws.initial
    )
    bound, measured = bound_and_measure(kernel, draws)
    delta, A, inputs, B = (t.half().double() for t in (draws.delta, draws.A, draws.inputs, draws.B))
    exact = Inputs(draws.delta * draws.A, draws.delta * draws.inputs * draws.B[:, None], draws.initial)
    given = exact._replace(log_decay=delta * A, write=delta * inputs * B[:, None])
    without = certificate(replace(KERNELS[kernel], tiny=0.0), exact, given, exact.states())
    assert (measured > without).any()
    assert (measured <= bound).all()


@pytest.mark.parametrize("bits", [126.0, 126.6, 130.0])
@pytest.mark.parametrize("kernel", ["torch", "cpu", "ssd torch", "ssd cpu"])
def test_a_decay_that_is_computed_as_zero_is_within_the_certificate(kernel, bits):
    """The compiled exp2 is 0 below 2^-126.5, where float32 has subnormal numbers left."""
    length, channels = 17, 3
    delta = torch.zeros(1, length, channels, dtype=torch.float64)
    delta[:, 0], delta[:, -1] = 1.0, bits * math.log(2)
    A, inputs = -torch.ones(channels, dtype=torch.float64), torch.zeros_like(delta)
    inputs[:, 0] = torch.tensor([1e3, 1e6, 1e10])
    draws = Draws(delta, A, A, inputs, torch.ones(length, dtype=torch.float64), torch.zeros(1, channels).double())
    bound, measured = bound_and_measure(kernel, draws)
    assert (measured <= bound).all(), (measured - bound).amax()


@pytest.mark.parametrize(("name", "stalled"), [("bf16", 0.25), ("fp16", 0.756)])
def test_a_state_stored_in_half_stalls_and_the_certificate_knows(name, stalled):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    log_decay = torch.full((1, 4096, 1), -0.001, dtype=torch.float64)
    write = torch.full_like(log_decay, 0.001)
    exact = Inputs(log_decay, write, torch.zeros(1, 1, dtype=torch.float64))
    states = exact.states()
    fixed_point = 0.001 / -math.expm1(-0.001)
    assert fixed_point == pytest.approx(1.0005, abs=1e-6)
    x, stored = torch.zeros((), dtype=dtype), []
    for t in range(4096):
        x = (math.exp(-0.001) * x.float() + write[0, t, 0].float()).to(dtype)
        stored.append(x.double())
    assert x.item() == pytest.approx(stalled, abs=1e-3)
    bound = certificate(KERNELS[f"stored {name}"], exact, exact, states)
    deviation = (torch.stack(stored)[None, :, None] - states[:, 1:]).abs()
    assert (deviation <= bound).all()


def test_where_a_stalled_state_stops_depends_on_where_it_starts_and_on_its_decay():
    two = torch.tensor(2.0, dtype=torch.bfloat16)
    assert (math.exp(-0.001) * two.float() + 0.001).bfloat16() == two
    decay, x = torch.tensor(math.exp(-0.001)).bfloat16(), torch.zeros((), dtype=torch.bfloat16)
    assert decay == 1  # inside the neutral zone
    for _ in range(4096):
        x = (decay.float() * x.float() + 0.001).bfloat16()
    assert x.item() == 0.5


def test_formats_are_those_of_torch():
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        unit, tiny = FORMATS[name]
        assert 2 * unit == torch.finfo(dtype).eps
        assert tiny == torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
