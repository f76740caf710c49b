"""SSD (Mamba-2) alone: every kernel against the float64 loop, whatever the sizes, chunks, states and threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lyapft import scan
from tests.test_scan import CPU, FAST, assert_equals_reference, outputs_and_gradients, random_ssd, ssd
from tests.tolerances import TOL


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kernel", FAST)
def test_a_state_of_ssd_handed_over_continues_the_sequence(kernel, batch):
    x, delta, A, b, c, state = random_ssd(batch, 150, 4, 5, 2, 3)
    whole, last = scan.ssd(x, delta, A, b, c, state, kernel=kernel)
    head, middle = scan.ssd(x[:, :71], delta[:, :71], A, b[:, :71], c[:, :71], state, kernel=kernel)
    tail, end = scan.ssd(x[:, 71:], delta[:, 71:], A, b[:, 71:], c[:, 71:], middle, kernel=kernel)
    torch.testing.assert_close(torch.cat([head, tail], 1), whole, **TOL[torch.float32])
    torch.testing.assert_close(end, last, **TOL[torch.float32])


@pytest.mark.skipif(bool(scan.available()["cpu"]), reason="numba is not installed")
@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_products_of_every_block_size_are_matrix_products(blocks, monkeypatch):
    """What a processor without AVX-512 runs, and what is left at the right edge of a matrix."""
    import numpy as np
    from numba import njit

    from lyapft.scan import products

    monkeypatch.setattr(products, "BLOCKS", blocks)
    multiply, transpose = njit(products.multiply.py_func), njit(products.transpose.py_func)

    @njit
    def run(scratch, part, only_lower):
        transpose(scratch, 5120, 32, scratch, 2048, 80, 32, 80)  # (32,80) -> (80,32)
        multiply(scratch, 0, 80, 16, 80, 8192, 32, 1, 2048, 80, 32, products.FULL, False)
        multiply(scratch, 12288, 32, 32, 32, 14336, 1, 32, 16384, 32, 32, part, only_lower)

    scratch = np.random.default_rng(blocks).standard_normal(20000).astype(np.float32)
    left, right = scratch[8192 : 8192 + 512].reshape(16, 32).copy(), scratch[2048 : 2048 + 2560].reshape(32, 80).copy()
    scratch[14336 : 14336 + 1024] = np.tril(scratch[14336 : 14336 + 1024].reshape(32, 32)).ravel()
    square, other = scratch[14336 : 14336 + 1024].reshape(32, 32).T, scratch[16384 : 16384 + 1024].reshape(32, 32)
    for part, only_lower in ((products.FULL, False), (products.UPPER, False), (products.FULL, True)):
        scratch[: 80 * 16] = scratch[12288 : 12288 + 1024] = 0.0
        run(scratch, part, only_lower)
        np.testing.assert_allclose(scratch[: 80 * 16].reshape(16, 80), left @ right, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(scratch[5120 : 5120 + 2560].reshape(80, 32), right.T)
        found, expected = scratch[12288 : 12288 + 1024].reshape(32, 32), square @ other
        kept = np.tri(32, dtype=bool) if only_lower else np.ones((32, 32), bool)
        np.testing.assert_allclose(found[kept], expected[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "chunk"), [("torch", 1), ("torch", 7), ("torch", 64), pytest.param("cpu", 64, marks=CPU.marks)]
)
@given(
    B=st.integers(1, 2),
    L=st.integers(1, 150),
    heads=st.integers(1, 3),
    P=st.integers(1, 40),
    G=st.integers(1, 3),
    N=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=15, deadline=None)
def test_chunked_ssd_equals_the_float64_loop(kernel, chunk, B, L, heads, P, G, N, seed):
    inputs = random_ssd(B, L, heads * G, P, G, N, seed)
    assert_equals_reference(ssd(kernel, chunk=chunk), ssd("reference"), inputs)


def test_the_twin_of_ssd_in_float64_is_the_float64_loop():
    inputs = [t.double() for t in random_ssd(2, 150, 2, 3, 1, 2, seed=3)]
    assert_equals_reference(ssd("torch"), ssd("reference"), inputs, rtol=TOL[torch.float64]["rtol"])


@pytest.mark.parametrize(
    ("kernel", "length"),
    [("torch", 200), ("torch", 3000), *[pytest.param("cpu", n, marks=CPU.marks) for n in (3000, 65536)]],
)
def test_ssd_keeps_five_digits_on_long_sequences(kernel, length):
    inputs = random_ssd(1, length, 2, 3, 1, 2)
    assert_equals_reference(ssd(kernel), ssd("torch"), inputs)  # the twin is given float64: see above


@pytest.mark.skipif(bool(scan.available()["cpu"]), reason="numba is not installed")
@pytest.mark.parametrize("step", [1e-8, 1e-4, 1e-2, 1e3])
def test_a_constant_step_of_ssd_does_not_accumulate_the_rounding_of_its_decay(step):
    x, _, _, b, c, state = random_ssd(1, 8192, 2, 3, 1, 2)
    delta, A = torch.full((1, 8192, 2), step), -torch.tensor([1.0, 3.0])
    assert_equals_reference(ssd("cpu"), ssd("torch"), [x, delta, A, b, c, state])


@pytest.mark.skipif(bool(scan.available()["cpu"]), reason="numba is not installed")
@pytest.mark.parametrize("missing", [None, "skip", "state"])
def test_the_compiled_ssd_takes_rows_with_gaps_a_skip_and_no_state(missing):
    """As a model hands them over: x, B and C are parts of one tensor."""
    from lyapft.scan.ssd_cpu import FusedSSD

    together = torch.randn(2, 100, 3 * 20 + 2 * 2 * 7)
    _, delta, A, _, _, state = random_ssd(2, 100, 3 * 2, 10, 2, 7)
    skip = torch.randn(6)

    def parts(given):
        x, b, c = given.split([60, 14, 14], dim=-1)
        return x.unflatten(-1, (6, 10)), b.unflatten(-1, (2, 7)), c.unflatten(-1, (2, 7))

    def fused(given, delta, A, skip, state):
        x, b, c = parts(given)
        return FusedSSD.apply(x, delta, A, b, c, skip, state)

    def plain(given, delta, A, skip, state):
        x, b, c = parts(given)
        y, last = scan.ssd(x, delta, A, b, c, state, kernel="reference")
        return (y if skip is None else y + x * skip[:, None]), last

    given = [together, delta, A, None if missing == "skip" else skip, None if missing == "state" else state]
    assert_equals_reference(fused, plain, given)


@pytest.mark.skipif(bool(scan.available()["cpu"]), reason="numba is not installed")
def test_the_compiled_ssd_does_not_depend_on_the_number_of_threads():
    inputs, threads = random_ssd(3, 130, 8, 5, 2, 4), torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(ssd("cpu"), inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_ssd_is_the_selective_scan_of_a_scalar_decay():
    x, delta, A, b, c, state = random_ssd(2, 15, 1, 4, 1, 3)
    y, last = scan.ssd(x, delta, A, b, c, state, kernel="reference")
    args = (x[:, :, 0], delta.expand(2, 15, 4), A.expand(4, 3), b[:, :, 0], c[:, :, 0], state[:, 0])
    y2, last2 = scan.selective_scan(*args, kernel="reference")
    torch.testing.assert_close(y[:, :, 0], y2, **TOL[torch.float32])
    torch.testing.assert_close(last[:, 0], last2, **TOL[torch.float32])
