"""Kernels against the float64 loops, over sizes, extremes, states and threads.

Letters: B batch, L tokens, D channels, N states, H heads, P head dim, G groups, K taps.
"""

import ast
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lyapft import scan
from lyapft.errors import InputError
from tests.tolerances import TOL

RTOL = TOL[torch.float32]["rtol"]
CPU = pytest.param("cpu", marks=pytest.mark.skipif(bool(scan.available()["cpu"]), reason="numba is not installed"))
FAST = [CPU, "torch"]
extents = st.integers(1, 40)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation over the largest expected magnitude; what is below 1e-25 counts as that large."""
    return float((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-25))


def random_scan(B, L, D, N, seed=0, state=True, delta=(1e-8, 1e3), decay=(1e-2, 1e4)) -> list[Tensor | None]:
    """u, Δ, A, B, C and a state: Δ and -A log-uniform over their whole ranges."""
    generator = torch.Generator().manual_seed(seed)

    def log_uniform(low, high, *shape):
        low, high = torch.tensor([low, high]).log()
        return (low + (high - low) * torch.rand(*shape, generator=generator)).exp()

    normal = [torch.randn(*shape, generator=generator) for shape in ((B, L, D), (B, L, N), (B, L, N), (B, D, N))]
    return [
        normal[0],
        log_uniform(*delta, B, L, D),
        -log_uniform(*decay, D, N),
        normal[1],
        normal[2],
        normal[3] if state else None,
    ]


def random_ssd(B, L, H, P, G, N, seed=0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, L, H, P), (B, L, G, N), (B, L, G, N), (B, H, P, N))
    x, b, c, state = (torch.randn(*shape, generator=generator) for shape in shapes)
    delta = torch.exp(torch.rand(B, L, H, generator=generator) * 25.3 - 18.4)  # 1e-8 .. 1e3
    A = -torch.exp(torch.rand(H, generator=generator) * 13.8 - 4.6)  # 1e-2 .. 1e4
    return [x, delta, A, b, c, state]


def outputs_and_gradients(function, inputs, seed=1) -> list[Tensor]:
    """y, last state and the gradient of every input for random outgoing gradients."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    y, last = function(*leaves)
    generator = torch.Generator().manual_seed(seed)
    outgoing = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in (y, last)]
    gradients = torch.autograd.grad([y, last], [t for t in leaves if t is not None], outgoing)
    return [y.detach(), last.detach(), *gradients]


def assert_equals_reference(function, reference, inputs, rtol=RTOL) -> None:
    actual = outputs_and_gradients(function, inputs)
    expected = outputs_and_gradients(reference, [None if t is None else t.double() for t in inputs])
    names = ["y", "last state", "u", "delta", "A", "B", "C", "initial state"]
    errors = {name: relative_error(a, e) for name, a, e in zip(names, actual, expected, strict=False)}
    assert max(errors.values()) <= rtol, errors


def ssd(kernel, **options):
    return lambda *inputs: scan.ssd(*inputs, kernel=kernel, **options)


def selective(kernel):
    return lambda *inputs: scan.selective_scan(*inputs, kernel=kernel)


def test_reference_is_the_closed_form_of_a_constant_decay():
    length, decay = 20, -0.3
    ones = torch.ones(1, length, 1, dtype=torch.float64)
    y, last = scan.selective_scan(
        ones, ones, torch.tensor([[decay]], dtype=torch.float64), ones, ones, kernel="reference"
    )
    powers = torch.exp(torch.tensor(decay, dtype=torch.float64)) ** torch.arange(1, length + 1)
    expected = (1 - powers) / (1 - torch.exp(torch.tensor(decay, dtype=torch.float64)))
    torch.testing.assert_close(y[0, :, 0], expected, **TOL[torch.float64])
    torch.testing.assert_close(last.flatten(), expected[-1:], **TOL[torch.float64])


@pytest.mark.parametrize("kernel", FAST)
@given(B=st.integers(1, 3), L=extents, D=extents, N=st.integers(1, 20), seed=st.integers(0, 2**31), state=st.booleans())
@settings(max_examples=25, deadline=None)
def test_selective_scan_equals_the_float64_loop(kernel, B, L, D, N, seed, state):
    inputs = random_scan(B, L, D, N, seed, state)
    assert_equals_reference(selective(kernel), selective("reference"), inputs)


def test_the_plain_twin_in_float64_is_the_float64_loop():
    inputs = [t.double() for t in random_scan(2, 150, 3, 2, seed=3)]
    assert_equals_reference(selective("torch"), selective("reference"), inputs, rtol=TOL[torch.float64]["rtol"])


@pytest.mark.skipif(bool(scan.available()["cpu"]), reason="numba is not installed")
@pytest.mark.parametrize("length", [1000, 65536])
def test_long_sequences_keep_five_digits(length):
    inputs = random_scan(1, length, 2, 2, delta=(1e-8, 1.0), decay=(1e-2, 10.0))
    assert_equals_reference(selective("cpu"), selective("torch"), inputs)  # the twin is given float64: see above


@pytest.mark.parametrize(("kernel", "length"), [pytest.param("cpu", 8192, marks=CPU.marks), ("torch", 512)])
@pytest.mark.parametrize("step", [1e-8, 1e-4, 1e-2, 1e3])
def test_a_constant_step_does_not_accumulate_the_rounding_of_its_decay(kernel, length, step):
    u, _, _, b, c, state = random_scan(1, length, 4, 2)
    delta, A = torch.full((1, length, 4), step), -torch.tensor([[1.0, 3.0]] * 4)
    assert_equals_reference(selective(kernel), selective("torch"), [u, delta, A, b, c, state])


@pytest.mark.parametrize("kernel", FAST)
def test_a_state_decays_to_zero_and_the_past_cannot_leak_through(kernel):
    u, delta, A, b, c, _ = random_scan(1, 64, 17, 3)
    u[:, 1:], delta[:], A[:] = 0.0, 2.0, -30.0
    y, last = scan.selective_scan(u, delta, A, b, c, kernel=kernel)
    assert torch.equal(last, torch.zeros_like(last))
    assert torch.equal(y[:, 5:], torch.zeros_like(y[:, 5:]))
    u[:, 1:], delta[:], A[:] = 1e-6, 1.0, -1e4  # the state forgets a first token of 1e6 at once
    u[:, 0] = 1e6
    y, _ = scan.selective_scan(u, delta, A, b, c, kernel=kernel)
    expected, _ = scan.selective_scan(u, delta, A, b, c, kernel="reference")
    assert relative_error(y[:, 1:], expected[:, 1:].double()) <= RTOL


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_non_finite_inputs_show(kernel, position):
    inputs = random_scan(1, 8, 5, 2, state=False)
    inputs[position].view(-1)[0] = torch.nan
    assert scan.selective_scan(*inputs, kernel=kernel)[0].isnan().any()


@pytest.mark.parametrize("kernel", FAST)
def test_growing_states_of_a_positive_exponent_are_right(kernel):
    u, _, A, b, c, state = random_scan(2, 12, 19, 3)
    inputs = [u, torch.rand(2, 12, 19), A.sign() * -torch.rand(19, 3), b, c, state]
    assert_equals_reference(selective(kernel), selective("reference"), inputs)


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("exponent", [-0.25, -0.5, -1.0, -1.5, -2.5, -126.5, -127.0])
def test_a_decay_half_way_between_two_powers_of_two_is_rounded_to_neither(kernel, exponent):
    """exp(ΔA) = 2^exponent to the last bit of float32: where the kernel's range reduction has a tie to break."""
    u, _, _, b, c, state = random_scan(1, 6, 17, 2)
    A = torch.full((17, 2), -0.6931471805599453)
    delta = torch.full((1, 6, 17), -exponent)
    assert_equals_reference(selective(kernel), selective("reference"), [u, delta, A, b, c, state])


@pytest.mark.parametrize("kernel", FAST)
def test_a_state_handed_over_continues_the_sequence(kernel):
    u, delta, A, b, c, state = random_scan(2, 50, 20, 4, delta=(1e-3, 1.0), decay=(0.1, 10.0))
    whole, last = scan.selective_scan(u, delta, A, b, c, state, kernel=kernel)
    head, middle = scan.selective_scan(u[:, :21], delta[:, :21], A, b[:, :21], c[:, :21], state, kernel=kernel)
    tail, end = scan.selective_scan(u[:, 21:], delta[:, 21:], A, b[:, 21:], c[:, 21:], middle, kernel=kernel)
    torch.testing.assert_close(torch.cat([head, tail], 1), whole, **TOL[torch.float32])
    torch.testing.assert_close(end, last, **TOL[torch.float32])


def behind_others(t: Tensor) -> Tensor:
    """The same numbers as a contiguous part of a tensor that begins before them."""
    return torch.cat([torch.full_like(t[:1], torch.nan), t])[1:]


@pytest.mark.parametrize("kernel", FAST)
def test_parts_of_larger_tensors_are_read_where_they_lie(kernel):
    for function, inputs in (
        (selective(kernel), random_scan(2, 20, 18, 4)),
        (ssd(kernel), random_ssd(2, 70, 4, 5, 2, 3)),
    ):
        expected = outputs_and_gradients(function, inputs)
        parts = outputs_and_gradients(lambda *given, f=function: f(*map(behind_others, given)), inputs)
        assert all(torch.equal(a, b) for a, b in zip(parts, expected, strict=True))


@pytest.mark.skipif(bool(scan.available()["cpu"]), reason="numba is not installed")
def test_compiled_kernels_take_float32_whatever_torchs_default_is():
    given = [(selective("cpu"), random_scan(2, 20, 18, 4)), (ssd("cpu"), random_ssd(2, 70, 4, 5, 2, 3))]
    expected = [outputs_and_gradients(function, inputs) for function, inputs in given]
    torch.set_default_dtype(torch.float64)
    try:
        actual = [outputs_and_gradients(f, [t.float() for t in inputs]) for f, inputs in given]
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(actual, expected, strict=True):
        assert [t.dtype for t in one] == [torch.float32] * len(one)
        assert [t.shape for t in one] == [t.shape for t in other]


def test_a_cached_kernel_is_of_all_the_files_that_it_is_made_of():
    """numba looks at a kernel's own file alone; the digest stands for those whose functions it takes in."""
    folder = Path(scan.__file__).parent
    taken_in = {"simd"}
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lyapft.scan."):
                name = node.module.rpartition(".")[2]
                source = (folder / f"{name}.py").read_text()
                if any(
                    f"{mark}\ndef {alias.name}(" in source for mark in ("@helper", "@inlined") for alias in node.names
                ):
                    taken_in.add(name)
    simd = pytest.importorskip("lyapft.scan.simd", reason="numba is not installed")
    assert taken_in == {path.stem for path in simd.SOURCES}


@pytest.mark.parametrize("kernel", FAST)
def test_layout_of_the_inputs_changes_nothing(kernel):
    inputs = random_scan(2, 37, 33, 5)
    expected = outputs_and_gradients(selective(kernel), inputs)

    def strided(u, delta, A, b, c, state):
        wide = torch.cat([u, u], -1)
        return selective(kernel)(
            wide[..., :33], delta.transpose(1, 2).contiguous().transpose(1, 2), A, b, c.flip(0).flip(0), state
        )

    for actual, wanted in zip(outputs_and_gradients(strided, inputs), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


@pytest.mark.skipif(bool(scan.available()["cpu"]), reason="numba is not installed")
def test_thread_count_and_repetition_change_no_bit():
    inputs = random_scan(3, 70, 300, 4, delta=(1e-3, 1.0), decay=(0.1, 10.0))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(selective("cpu"), inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(bool(scan.available()["cpu"]), reason="numba is not installed")
@given(B=st.integers(1, 3), L=extents, D=extents, N=st.integers(1, 9), parts=st.tuples(*[st.booleans()] * 4))
@settings(max_examples=30, deadline=None)
def test_fused_scan_equals_softplus_scan_skip_and_gate(B, L, D, N, parts):
    from lyapft.scan.cpu import FusedSelectiveScan

    has_bias, has_skip, has_gate, softplus = parts
    u, delta, A, b, c, state = random_scan(B, L, D, N, seed=B + L + D + N, decay=(1e-2, 100.0))
    dt = torch.randn(B, D, L).transpose(1, 2) * 6 - 3 if softplus else delta
    bias = torch.randn(D) if has_bias and softplus else None
    skip, gate = torch.randn(D) if has_skip else None, torch.randn(B, L, 2 * D)[..., D:] * 5 if has_gate else None

    def fused(u, dt, A, b, c, state, bias, skip, gate):
        y, last, _ = FusedSelectiveScan.apply(u, dt, A, b, c, bias, skip, gate, state, softplus)
        return y, last

    def plain(u, dt, A, b, c, state, bias, skip, gate):
        step = dt if bias is None else dt + bias
        y, last = scan.selective_scan(u, F.softplus(step) if softplus else step, A, b, c, state, kernel="reference")
        y = y if skip is None else y + u * skip
        return y if gate is None else y * F.silu(gate), last

    assert_equals_reference(fused, plain, [u, dt, A, b, c, state, bias, skip, gate])


@pytest.mark.skipif(bool(scan.available()["cpu"]), reason="numba is not installed")
@given(B=st.integers(1, 3), L=extents, D=extents, K=st.integers(1, 6), silu=st.booleans(), has_bias=st.booleans())
@settings(max_examples=30, deadline=None)
def test_causal_convolution_equals_torch_in_float64(B, L, D, K, silu, has_bias):
    from lyapft.scan.conv import CausalConv

    x, weight = torch.randn(B, L, D + 3)[..., 3:], torch.randn(D, K)
    bias = torch.randn(D) if has_bias else None

    def compiled(x, weight, bias):
        return CausalConv.apply(x, weight, bias, silu), x.sum()

    def stock(x, weight, bias):
        y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=K - 1, groups=D)[..., :L].transpose(1, 2)
        return F.silu(y) if silu else y, x.sum()

    assert_equals_reference(compiled, stock, [x, weight, bias])


@pytest.mark.parametrize("family", ["selective scan", "ssd"])
@pytest.mark.parametrize("kernel", FAST)
def test_errors_are_those_of_rounded_inputs(kernel, family):
    """Sizes near 1, where a gradient may be a sum of few numbers that cancel: five digits of it cannot be had then, nor
    has the float64 loop them where its inputs are off by half a unit in their last place."""
    seed = random.SystemRandom().randrange(2**31)  # another one each time: named where it fails
    draw = random.Random(seed)
    for _ in range(60):
        B, L, H, P, N = (draw.choice((1, 1, 2, 3, 9)) for _ in range(5))
        if family == "ssd":
            run, inputs = ssd, random_ssd(B, L, 2 * H, P, draw.choice((1, 2)), N, draw.randrange(2**31))
        else:
            run, inputs = selective, random_scan(B, L, H * P, N, draw.randrange(2**31))
        exact = outputs_and_gradients(run("reference"), [t.double() for t in inputs])
        off = torch.zeros(len(exact))
        for _ in range(4):
            near = [t.double() * (1 + 2.0**-24 * (2 * torch.rand_like(t.double()) - 1)) for t in inputs]
            moved = outputs_and_gradients(run("reference"), near)
            off = off.maximum(torch.tensor([float((a - b).abs().max()) for a, b in zip(moved, exact, strict=True)]))
        actual = outputs_and_gradients(run(kernel), inputs)
        for one, expected, alone in zip(actual, exact, off, strict=True):
            allowed = max(RTOL * float(expected.abs().max()), 30 * float(alone), 1e-30)
            assert float((one.double() - expected).abs().max()) <= allowed, (seed, B, L, H, P, N)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", FAST)
def test_half_inputs_are_computed_in_float32_and_returned_in_half(kernel, dtype):
    u, delta, A, b, c, _ = random_scan(2, 20, 18, 4, delta=(1e-2, 1.0), decay=(0.1, 3.0))
    half = [t.to(dtype) for t in (u, delta, A, b, c)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, last = scan.selective_scan(*half, kernel=kernel)
    expected, _ = scan.selective_scan(*[t.float() for t in half], kernel="reference")
    assert y.dtype == last.dtype == dtype
    torch.testing.assert_close(y.float(), expected, **TOL[dtype])


def test_wrong_use_is_an_input_error_that_says_what_to_do():
    u, delta, A, b, c, _ = random_scan(1, 4, 3, 2)
    with pytest.raises(InputError, match="choose one of reference, cpu, torch"):
        scan.selective_scan(u, delta, A, b, c, kernel="cuda")
    with pytest.raises(InputError, match=r"delta has \(1, 3, 3\), not \(1, 4, 3\)"):
        scan.selective_scan(u, delta[:, 1:], A, b, c, kernel="torch")
    with pytest.raises(InputError, match="at least 1 token"):
        scan.ssd(*random_ssd(1, 4, 2, 3, 1, 2), kernel="torch", chunk=0)
    with pytest.raises(InputError, match="delta, B, C empty: give at least one"):
        scan.ssd(*random_ssd(1, 0, 2, 3, 1, 2), kernel="torch")
    with pytest.raises(InputError, match="empty"):
        scan.selective_scan(*random_scan(0, 4, 3, 2), kernel="torch")
    with pytest.raises(InputError, match="multiple of groups"):
        scan.ssd(*random_ssd(1, 4, 3, 3, 2, 2), kernel="torch")


def test_without_numba_the_plain_twin_is_offered_and_works():
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch\nfrom lyapft import scan\nones = torch.ones(1, 3, 1)\n"
        "assert 'numba' in scan.available()['cpu'], scan.available()\n"
        "assert scan.selective_scan(ones, ones, torch.zeros(1, 1), ones, ones, kernel='torch')[0].sum() == 6\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kernel", [*FAST, "reference"])
def test_the_last_state_alone_has_gradients(kernel):
    inputs = random_scan(2, 20, 5, 3, delta=(1e-3, 1.0), decay=(0.1, 10.0))
    leaves = [t.clone().requires_grad_() for t in inputs]
    _, last = scan.selective_scan(*leaves, kernel=kernel)
    found = torch.autograd.grad(last.sum(), [leaves[i] for i in (0, 1, 2, 3, 5)])
    exact = [t.double().requires_grad_() for t in inputs]
    _, last = scan.selective_scan(*exact, kernel="reference")
    for a, b in zip(found, torch.autograd.grad(last.sum(), [exact[i] for i in (0, 1, 2, 3, 5)]), strict=True):
        assert relative_error(a, b) <= RTOL
