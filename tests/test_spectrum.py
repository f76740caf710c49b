"""The measured spectrum against published exponents of textbook systems, closed forms, and its own two forms."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from lyapft import spectrum


def runge_kutta(field, dt: float):
    """The map of one step of the classical fourth-order method."""

    def step(x: Tensor) -> Tensor:
        k1 = field(x)
        k2 = field(x + 0.5 * dt * k1)
        k3 = field(x + 0.5 * dt * k2)
        k4 = field(x + dt * k3)
        return x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    return step


def quadratic(constant, linear, products: dict[tuple[int, int], list[float]]):
    """The field c + x Mᵀ + Σ x_i x_j q_ij, in few operations: forward mode under vmap pays for each."""
    c, M = torch.tensor(constant, dtype=torch.float64), torch.tensor(linear, dtype=torch.float64).T
    i, j = (torch.tensor(index) for index in zip(*products, strict=True))
    Q = torch.tensor(list(products.values()), dtype=torch.float64)
    return lambda x: torch.addmm(c, x, M) + (x[:, i] * x[:, j]) @ Q


LORENZ = quadratic([0, 0, 0], [[-10, 10, 0], [28, -1, 0], [0, 0, -8 / 3]], {(0, 2): [0, -1, 0], (0, 1): [0, 0, 1]})
ROESSLER = quadratic([0, 0, 0.2], [[0, -1, -1], [1, 0.2, 0], [0, 0, -5.7]], {(0, 2): [0, 0, 1], (0, 0): [0, 0, 0]})


def henon(s: Tensor) -> Tensor:
    x, y = s.unbind(-1)
    return torch.stack([1 - 1.4 * x * x + y, 0.3 * x], dim=-1)


def near(point: tuple[float, ...], spread: tuple[float, ...], batch: int) -> Tensor:
    return torch.tensor(point, dtype=torch.float64) + torch.tensor(spread) * (2 * torch.rand(batch, len(point)) - 1)


class System(NamedTuple):
    """A map, the time that a step takes, where its trajectories start, and what is published of it."""

    step: Callable[[Tensor], Tensor]
    dt: float
    start: tuple[float, ...]
    spread: tuple[float, ...]
    trajectories: int
    warm_up: int
    steps: int
    exponents: tuple[float, ...]  # Sprott, Chaos and Time-Series Analysis (2003), appendix A
    tolerance: float  # what so many steps can tell

    def settled(self, batch: int) -> Tensor:
        """States of independent trajectories after their transients."""
        state = near(self.start, self.spread, batch)
        for _ in range(2000):
            state = self.step(state)
        return state


# From a wide box many trajectories of Lorenz would spiral slowly away from its unstable foci; those of Rössler must
# differ in phase.
CASES = {
    "lorenz": System(
        *(runge_kutta(LORENZ, 0.01), 0.01, (1, 1, 20), (0.1, 0.1, 0.1)), 1500, 400, 600, (0.9056, 0.0, -14.5723), 0.015
    ),
    "roessler": System(
        *(runge_kutta(ROESSLER, 0.03), 0.03, (0, 0, 0), (4, 4, 0)), 1200, 1200, 600, (0.0714, 0.0, -5.3943), 0.015
    ),
    "henon": System(henon, 1.0, (0, 0), (0.1, 0.1), 1000, 100, 1000, (0.41922, -1.62319), 0.002),
}


@pytest.mark.parametrize("name", CASES)
def test_published_spectra(name):
    system = CASES[name]
    found = spectrum.benettin(
        system.step,
        system.settled(system.trajectories),
        system.steps,
        exponents=len(system.exponents),
        warm_up=system.warm_up,
        every=10,
    )
    found = found / system.dt
    error = found.std(0) / math.sqrt(len(found))
    assert (error < system.tolerance / 2).all(), error  # enough trajectories to tell
    published = torch.tensor(system.exponents, dtype=torch.float64)
    assert_close(found.mean(0), published, rtol=0, atol=system.tolerance)


def test_the_parallel_form_gives_the_published_spectrum_too():
    system = CASES["henon"]
    rates = spectrum.prefix_spectra(spectrum.trajectory_jacobians(system.step, system.settled(1000), 1000))
    second_half = 2 * rates[:, -1] - rates[:, 499]  # what is bounded, and not a rate, cancels
    assert_close(second_half.mean(0), torch.tensor(system.exponents, dtype=torch.float64), rtol=0, atol=0.002)


def test_both_forms_agree_on_a_flow():
    system = CASES["lorenz"]
    state = system.settled(8)
    sequential = spectrum.benettin(system.step, state, 300, exponents=3)
    parallel = spectrum.prefix_spectra(spectrum.trajectory_jacobians(system.step, state, 300))[:, -1]
    assert_close(parallel, sequential, rtol=0, atol=10 / 300)
    assert_close(parallel.sum(1) / 0.01, torch.full((8,), -41 / 3, dtype=torch.float64), rtol=1e-4, atol=0)


def random_jacobians(seed: int, length: int, size: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, size, size, generator=generator, dtype=torch.float64) / math.sqrt(size)


@given(seed=st.integers(0, 2**31 - 1), length=st.integers(1, 9), size=st.integers(1, 4))
@settings(max_examples=25)
def test_prefixes_are_graded_forms_of_the_products(seed, length, size):
    J = random_jacobians(seed, length, size)
    graded = spectrum._scan(spectrum._grade(J))
    product = torch.eye(size, dtype=torch.float64)
    for t in range(length):
        product = J[:, t] @ product
        found = graded.left[:, t] * graded.logs[:, t].exp()[:, None, :] @ graded.right[:, t]
        scale = product.abs().max()
        assert_close(found / scale, product / scale, rtol=0, atol=1e-10)
    exponents = spectrum.prefix_spectra(J)
    logdet = torch.linalg.slogdet(J).logabsdet.cumsum(1) / torch.arange(1, length + 1)
    assert_close(exponents.sum(-1), logdet, rtol=1e-9, atol=1e-9)


def test_both_forms_agree_over_windows_that_overflow():
    J = random_jacobians(5, 3000, 4) * torch.tensor([4.0, 2.0, 1.0, 0.25], dtype=torch.float64)
    Q, total = torch.eye(4, dtype=torch.float64), 0.0
    for t in range(J.shape[1]):
        Q, R = torch.linalg.qr(J[:, t] @ Q)
        total = total + R.diagonal(dim1=1, dim2=2).abs().log()
    sequential = total / J.shape[1]
    assert (sequential[:, 0] - sequential[:, -1]).min() * J.shape[1] > 1000  # e^1000 is no float64
    assert_close(spectrum.prefix_spectra(J)[:, -1], sequential, rtol=0, atol=10 / J.shape[1])


@given(seed=st.integers(0, 2**31 - 1), length=st.integers(1, 33), size=st.integers(1, 5))
@settings(max_examples=15)
def test_diagonal_systems_are_exact(seed, length, size):
    generator = torch.Generator().manual_seed(seed)
    logs = 30 * torch.randn(1, length, size, generator=generator, dtype=torch.float64)
    signs = torch.randint(0, 2, logs.shape, generator=generator) * 2.0 - 1.0
    J = torch.diag_embed(signs * logs.exp())
    expected = logs.cumsum(1) / torch.arange(1, length + 1)[:, None]
    found = spectrum.prefix_spectra(J)
    assert_close(found, expected.sort(-1, descending=True).values, rtol=1e-10, atol=1e-10)
    decay = logs[0, 0].clamp(-5, 5).exp()
    by_qr = spectrum.benettin(lambda x: x * decay, torch.ones(1, size), 20, exponents=size)
    assert_close(by_qr, logs[:, 0].clamp(-5, 5), rtol=1e-10, atol=1e-10)


def test_directions_that_vanish_have_exponent_minus_infinity():
    shift = torch.ones(2, dtype=torch.float64).diag(1).expand(1, 7, 3, 3)
    assert spectrum.prefix_spectra(shift)[0, -1].tolist() == [-math.inf] * 3
    half = torch.tensor([[0.5, 3.0], [0.0, 0.0]], dtype=torch.float64).expand(1, 6, 2, 2)
    top, bottom = spectrum.prefix_spectra(half)[0].unbind(-1)
    assert_close(top * torch.arange(1, 7), math.log(0.5) * torch.arange(1, 7).double(), rtol=0, atol=2.0)
    assert (bottom == -math.inf).all()


def test_a_random_rnn_follows_its_linearisation_and_mean_field_theory():
    size, generator = 200, torch.Generator().manual_seed(0)
    W = torch.randn(size, size, generator=generator, dtype=torch.float64) / math.sqrt(size)

    def rnn(gain: float):
        return lambda x: torch.tanh(gain * x @ W.T)

    start = torch.randn(3, size, generator=generator, dtype=torch.float64)
    quiet = spectrum.benettin(rnn(0.5), start, 200, exponents=1, warm_up=200)
    radius = torch.linalg.eigvals(0.5 * W).abs().max().log()  # the state dies out: J is g W
    assert_close(quiet, radius.expand(3, 1), rtol=0, atol=0.01)
    chaotic = spectrum.benettin(rnn(2.0), start, 300, exponents=1, warm_up=200)
    assert (chaotic > 0.05).all()  # Molgedey et al. 1992: chaos beyond g = 1


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="exponents=3: choose 1 to 2"):
        spectrum.benettin(henon, torch.zeros(1, 2), 10, exponents=3)
    with pytest.raises(ValueError, match="multiples of every=3"):
        spectrum.benettin(henon, torch.zeros(1, 2), 10, exponents=2, every=3)
