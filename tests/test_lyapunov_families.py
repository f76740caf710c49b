"""Every recurrence family: closed forms against autodiff of the reference step, and the inequalities that must hold."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from lyapft.lyapunov import DiagonalJacobian, MatrixJacobian, families, steps
from tests.tolerances import TOL

B, L, H, K, V, D, N = 2, 4, 2, 3, 2, 3, 2
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
CLOSE = TOL[torch.float64]


@dataclass
class Case:
    """A recurrence with random gates: its Jacobian by closed form, and its reference step on a flat state."""

    jacobian: DiagonalJacobian | MatrixJacobian
    step: Callable[[Tensor, int, int], Tensor]  # (flat state, sequence, token) -> flat state
    size: int


def draw(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def selective_scan(seed: int) -> Case:
    random = draw(seed)
    delta, A, inputs, B_ = random(B, L, D).exp(), -random(D, N).exp(), random(B, L, D), random(B, L, N)

    def step(x: Tensor, b: int, t: int) -> Tensor:
        return steps.selective_scan(x.view(1, D, N), delta[b : b + 1, t], A, B_[b : b + 1, t], inputs[b : b + 1, t])

    return Case(families.selective_scan(delta, A), step, D * N)


def ssd(seed: int) -> Case:
    random = draw(seed)
    delta, A, inputs, B_ = random(B, L, H).exp(), -random(H).exp(), random(B, L, H, V), random(B, L, H, N)

    def step(x: Tensor, b: int, t: int) -> Tensor:
        at = slice(b, b + 1), t
        return steps.ssd(x.view(1, H, V, N), delta[at], A, B_[at], inputs[at])

    return Case(families.ssd(delta, A, V * N), step, H * V * N)


def rg_lru(seed: int) -> Case:
    random = draw(seed)
    gate, Lambda, inputs, never = random(B, L, D).sigmoid(), random(D), random(B, L, D), torch.zeros(1)

    def step(x: Tensor, b: int, t: int) -> Tensor:
        return steps.rg_lru(x.view(1, D), gate[b : b + 1, t], Lambda, inputs[b : b + 1, t], never)

    return Case(families.rg_lru(gate, Lambda), step, D)


def rwkv4(seed: int) -> Case:
    random = draw(seed)
    w, k, v = random(D), random(B, L, D), random(B, L, D)

    def step(x: Tensor, b: int, t: int) -> Tensor:
        at = slice(b, b + 1), t
        return torch.stack(steps.rwkv4(*x.view(2, 1, D), w, k[at], v[at]))

    return Case(families.rwkv4(w, B, L), step, 2 * D)


def mlstm(seed: int) -> Case:
    random = draw(seed)
    forget, write, k, v = random(B, L, H), random(B, L, H), random(B, L, H, K), random(B, L, H, V)

    def step(x: Tensor, b: int, t: int) -> Tensor:
        at = slice(b, b + 1), t
        C, n = x.split([H * K * V, H * K])
        new = steps.mlstm(C.view(1, H, K, V), n.view(1, H, K), forget[at], write[at], k[at], v[at])
        return torch.cat([part.flatten() for part in new])

    return Case(families.mlstm(forget, K * V + K), step, H * (K * V + K))


def mamba3(seed: int) -> Case:
    random = draw(seed)
    delta, A, beta, gamma, kv = random(B, L, H).exp(), -random(H).exp(), random(B, L, H), random(B, L, H), random(H, V)

    def step(x: Tensor, b: int, t: int) -> Tensor:
        at = slice(b, b + 1), t
        state, buffer = x.view(2, 1, H, V)
        return torch.stack(steps.mamba3(state, buffer, delta[at] * A, beta[at], gamma[at], kv[None]))

    return Case(families.mamba3(delta, A, beta, V), step, 2 * H * V)


def delta_rule_gates(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = draw(seed)
    return -random(B, L, H).exp(), random(B, L, H).exp(), random(B, L, H, K), random(B, L, H, V)


def gated_delta_rule(seed: int) -> Case:
    log_alpha, beta, k, v = delta_rule_gates(seed)

    def step(x: Tensor, b: int, t: int) -> Tensor:
        at = slice(b, b + 1), t
        return steps.delta_rule(x.view(1, H, K, V), log_alpha[at][..., None].expand(1, H, K), beta[at], k[at], v[at])

    return Case(families.gated_delta_rule(log_alpha, beta, k, V), step, H * K * V)


def kda(seed: int) -> Case:
    _, beta, k, v = delta_rule_gates(seed)
    log_alpha = -draw(seed + 1)(B, L, H, K).exp()

    def step(x: Tensor, b: int, t: int) -> Tensor:
        at = slice(b, b + 1), t
        return steps.delta_rule(x.view(1, H, K, V), log_alpha[at], beta[at], k[at], v[at])

    return Case(families.kda(log_alpha, beta, k, V), step, H * K * V)


def rwkv7(seed: int) -> Case:
    random = draw(seed)
    w, a = random(B, L, H, K).sigmoid(), random(B, L, H, K).sigmoid()
    kappa = torch.nn.functional.normalize(random(B, L, H, K), dim=-1)
    k, v = random(B, L, H, K), random(B, L, H, V)

    def step(x: Tensor, b: int, t: int) -> Tensor:
        at = slice(b, b + 1), t
        return steps.rwkv7(x.view(1, H, K, V), w[at], a[at], kappa[at], k[at], v[at])

    return Case(families.rwkv7(w, a, kappa, V), step, H * K * V)


def short_convolution(seed: int) -> Case:
    inputs = draw(seed)(1, D)

    def step(x: Tensor, b: int, t: int) -> Tensor:
        return steps.short_convolution(x.view(1, D, K), inputs)

    return Case(families.short_convolution(D, K, B, L), step, D * K)


CASES = [selective_scan, ssd, rg_lru, rwkv4, mlstm, mamba3, gated_delta_rule, kda, rwkv7, short_convolution]
BOUND_ONLY = [kda]  # log_norm is an upper bound, not the norm
SINGULAR = [mamba3, short_convolution]
every_family = pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
seeds = given(seed=st.integers(0, 2**31 - 1))


def autodiff(case: Case) -> Tensor:
    """(B, L, size, size) Jacobians of the reference step. The steps are affine: any state will do."""
    x = draw(0)(case.size)
    jacobian = torch.func.jacrev(lambda state, b, t: case.step(state, b, t).flatten())
    return torch.stack([torch.stack([jacobian(x, b, t) for t in range(L)]) for b in range(B)])


def exponents_of_product(J_BLSS: Tensor) -> Tensor:
    """(B, size) sorted exponents: QR over the full Jacobians, each written out."""
    result = []
    for sequence, real in zip(J_BLSS, MASK, strict=True):
        Q, total, tokens = torch.eye(J_BLSS.shape[-1], dtype=torch.float64), 0.0, int(real.sum())
        for J in sequence[:tokens]:
            Q, R = torch.linalg.qr(J @ Q)
            total = total + R.diagonal().abs().log()
        result.append((total / tokens).sort(descending=True).values)
    return torch.stack(result)


@every_family
@seeds
@settings(max_examples=6)
def test_closed_forms_equal_autodiff_of_the_reference_step(make, seed):
    case = make(seed)
    J = autodiff(case)
    norms = torch.linalg.matrix_norm(J, 2).log()
    found = case.jacobian.log_norm_BL()
    if make in BOUND_ONLY:
        assert (norms <= found + 1e-12).all()
    else:
        assert_close(found, norms.to(found.dtype), **CLOSE)
    expected_det = torch.linalg.slogdet(J).logabsdet
    assert_close(case.jacobian.log_det_BL().double(), expected_det, **CLOSE)
    exponents = case.jacobian.exponents(MASK)
    assert exponents.shape == (B, case.size)
    assert_close(exponents.double().sort(descending=True).values, exponents_of_product(J), **CLOSE)


@every_family
@seeds
@settings(max_examples=6)
def test_exponents_keep_below_the_norms_and_sum_to_the_determinant(make, seed):
    jacobian = make(seed).jacobian
    exponents, norms, dets = jacobian.exponents(MASK), jacobian.log_norm_BL(), jacobian.log_det_BL()
    for b, tokens in enumerate(MASK.sum(1).tolist()):
        assert exponents[b].max() <= norms[b, :tokens].mean() + 1e-12
        assert_close(exponents[b].sum(), dets[b, :tokens].mean().to(exponents.dtype), **CLOSE)


@pytest.mark.parametrize("make", [selective_scan, ssd, rg_lru, rwkv4, mlstm], ids=lambda make: make.__name__)
@seeds
@settings(max_examples=6)
def test_diagonal_families_cannot_grow(make, seed):
    jacobian = make(seed).jacobian
    assert (jacobian.exponents(MASK) < 0).all()
    assert (jacobian.log_norm_BL() < 0).all()
    assert jacobian.log_BLCN().amax((2, 3)).equal(jacobian.log_norm_BL())


def test_a_reset_forgets_everything():
    gate, Lambda = torch.full((1, L, D), 0.5, dtype=torch.float64), torch.ones(D, dtype=torch.float64)
    reset = torch.tensor([[0, 0, 1, 0]])
    assert (families.rg_lru(gate, Lambda, reset).exponents(MASK[:1]) == -math.inf).all()
    assert families.rg_lru(gate, Lambda, reset).exponents(torch.tensor([[1, 1, 0, 0]])).isfinite().all()


def test_padding_is_never_read():
    log_alpha, beta, k, _ = delta_rule_gates(3)
    clean = families.gated_delta_rule(log_alpha, beta, k, V).exponents(MASK)
    k[1, 3] = math.nan
    assert families.gated_delta_rule(log_alpha, beta, k, V).exponents(MASK).equal(clean)


@given(log_alpha=st.floats(-3, 0), weight=st.floats(0, 4), dim=st.integers(2, 4), seed=st.integers(0, 99))
def test_the_delta_rule_contracts_exactly_while_its_gate_allows(log_alpha, weight, dim, seed):
    k = torch.nn.functional.normalize(draw(seed)(1, 1, 1, dim), dim=-1)
    beta = torch.full((1, 1, 1), weight, dtype=torch.float64)
    found = families.gated_delta_rule(torch.full_like(beta, log_alpha), beta, k, 1).log_norm_BL().item()
    threshold = 1 + math.exp(-log_alpha)
    if abs(weight - threshold) > 1e-9:
        assert (found <= 1e-12) == (weight <= threshold)


def test_synthetic_delta_rule_gates_break_stability_and_a_norm_above_one_alone_does_not():
    same = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, L, 1, 2)
    beta, zero = torch.full((1, L, 1), 3.0, dtype=torch.float64), torch.zeros(1, L, 1, dtype=torch.float64)
    grown = families.gated_delta_rule(zero, beta, same, 1).exponents(MASK[:1])
    assert grown.max().item() == pytest.approx(math.log(2.0), rel=1e-12)  # |1 − 3| at every token
    turning = torch.eye(2, dtype=torch.float64).repeat(1, L // 2, 1)[:, :, None]  # k alternates between the axes
    mild = families.gated_delta_rule(zero + math.log(0.9), beta * 2.2 / 3.0, turning, 1)
    assert mild.log_norm_BL().min() > 0
    assert mild.exponents(MASK[:1]).max().item() == pytest.approx(math.log(0.9) + 0.5 * math.log(1.2), rel=1e-12)
    assert mild.exponents(MASK[:1]).max() < 0


def rwkv7_gates(decay: float, tokens: int) -> MatrixJacobian:
    """Two alternating steps found by search: each forgets along one axis of a vector that leans to the other."""
    angle = torch.tensor([1.1502620, 0.4205343], dtype=torch.float64).repeat(tokens // 2)
    kappa = torch.stack([angle.cos(), angle.sin()], dim=-1).view(1, tokens, 1, 2)
    a = torch.eye(2, dtype=torch.float64).repeat(tokens // 2, 1).view(1, tokens, 1, 2)
    return families.rwkv7(torch.full_like(a, decay), a, kappa, 1)


def test_rwkv7_is_not_guaranteed_to_be_stable():
    tokens = 2000
    exponents = rwkv7_gates(0.9999, tokens).exponents(torch.ones(1, tokens))
    assert math.exp(exponents.max().item()) == pytest.approx(math.sqrt(1.25), abs=1e-3)  # 1.118 a step
    best = torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)], dtype=torch.float64)
    one = torch.ones(1, 1, 1, 2, dtype=torch.float64)
    edge = families.rwkv7(one, torch.tensor([[[[0.0, 1.0]]]], dtype=torch.float64), best.view(1, 1, 1, 2), 1)
    assert edge.log_norm_BL().item() <= math.log(2 / math.sqrt(3)) + 1e-12


@seeds
@settings(max_examples=20)
def test_one_step_of_rwkv7_never_exceeds_its_bound(seed):
    random = draw(seed)
    w, a = torch.rand(1, 500, 1, 3, dtype=torch.float64), torch.rand(1, 500, 1, 3, dtype=torch.float64)
    kappa = torch.nn.functional.normalize(random(1, 500, 1, 3), dim=-1)
    assert families.rwkv7(w, a, kappa, 1).log_norm_BL().max().item() <= math.log(2 / math.sqrt(3))


def test_mamba3_can_grow_for_one_step_but_not_for_long():
    delta, A = torch.full((1, L, 1), 0.01, dtype=torch.float64), -torch.ones(1, dtype=torch.float64)
    jacobian = families.mamba3(delta, A, torch.ones_like(delta), 1)
    assert (jacobian.log_norm_BL() > 0).all()
    assert jacobian.exponents(MASK[:1])[0].tolist() == [pytest.approx(-0.01), -math.inf]


@seeds
@settings(max_examples=10)
def test_the_running_product_is_that_of_the_jacobians(seed):
    jacobian = kda(seed).jacobian
    found, product = jacobian.log_running_product(MASK), torch.eye(K, dtype=torch.float64).expand(B, H, K, K)
    for t in range(L):
        product = torch.where(MASK[:, t].bool().view(B, 1, 1, 1), jacobian.J_BLHKK[:, t] @ product, product)
        assert_close(found[:, t], torch.linalg.matrix_norm(product, 2).log(), **CLOSE)


def test_transient_growth_may_come_before_decay():
    shear = torch.tensor([[0.5, 4.0], [0.0, 0.5]], dtype=torch.float64).expand(1, 60, 1, 2, 2)
    nothing = torch.zeros(1, 60, 1, dtype=torch.float64)
    jacobian = MatrixJacobian(shear, nothing, nothing)
    product = jacobian.log_running_product(torch.ones(1, 60))[0, :, 0]
    assert product.max() > math.log(4.0)
    assert product[-1] < -30
    assert jacobian.exponents(torch.ones(1, 60)).max() < 0


def test_a_stack_has_the_exponents_of_its_layers():
    """With the tokens held fixed the state Jacobian of two layers is block-lower-triangular: the second layer's step
    sizes follow the first one's output, the first knows nothing of the second."""
    random, tokens = draw(11), 1500
    delta, inputs = random(tokens, 1, D).exp() * 0.2, random(tokens, 1, D)
    A, A2, mix = -random(D, 1).exp(), -random(D, 1).exp(), random(D, D)

    def step(state: Tensor, t: int) -> Tensor:
        x, x2 = state.view(2, 1, D, 1)
        x = steps.selective_scan(x, delta[t], A, torch.ones(1, 1, dtype=torch.float64), inputs[t])
        out = x[..., 0] @ mix
        delta2 = 0.2 * torch.nn.functional.softplus(out)
        x2 = steps.selective_scan(x2, delta2, A2, torch.ones(1, 1, dtype=torch.float64), out)
        return torch.stack([x, x2]).flatten()

    state, jacobians, deltas = torch.zeros(2 * D, dtype=torch.float64), [], []
    jacobian = torch.func.jacrev(step)
    for t in range(tokens):
        jacobians.append(jacobian(state, t))
        state = step(state, t)
        deltas.append(0.2 * torch.nn.functional.softplus(state[:D] @ mix))
    J, mask = torch.stack(jacobians)[None], torch.ones(1, tokens)
    assert (J[..., :D, D:] == 0).all()
    assert (J[..., D:, :D] != 0).any()
    layers = [families.selective_scan(delta[:, 0][None], A), families.selective_scan(torch.stack(deltas)[None], A2)]
    union = torch.cat([layer.exponents(mask) for layer in layers], dim=1).sort(descending=True).values
    window = torch.linalg.multi_dot(list(J[0, :8].flip(0)))
    diagonals = torch.cat([layer.log_BLCN()[0, :8, :, 0].sum(0) for layer in layers]).exp()
    assert_close(torch.linalg.eigvals(window).abs().sort().values, diagonals.sort().values, **CLOSE)
    by_qr = MatrixJacobian(J[:, :, None], J.new_zeros(1, tokens, 1), J.new_zeros(1, tokens, 1)).exponents(mask)
    assert_close(by_qr, union, rtol=0, atol=50 / tokens)  # what is bounded fades as 1/T
