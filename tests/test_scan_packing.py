"""Rows that hold several sequences, against the float64 loops over each sequence alone.

Letters as in `test_scan`.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lyapft import scan
from lyapft.errors import InputError
from tests.test_scan import (
    CPU,
    assert_equals_reference,
    outputs_and_gradients,
    random_scan,
    random_ssd,
)

KERNELS = [CPU, "torch", "reference"]
packed_sizes = {"B": st.integers(1, 3), "L": st.integers(1, 70), "seed": st.integers(0, 2**31)}


def random_sequence(B: int, L: int, seed: int) -> Tensor:
    """Boundaries of every density, other ones in each row; indices of any sign that come again; padding is -1."""
    generator = torch.Generator().manual_seed(seed)
    density = torch.tensor([0.02, 0.2, 0.9])[torch.randint(3, (B, 1), generator=generator)]
    runs = (torch.rand(B, L, generator=generator) < density).cumsum(1)
    return runs % 5 - 3


def spans(row_L: Tensor) -> list[slice]:
    """Where the index stays the same: the sequences of one row."""
    bounds = [0, *(i for i in range(1, len(row_L)) if row_L[i] != row_L[i - 1]), len(row_L)]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def apart(function, sequence: Tensor, tokenwise: tuple[int, ...], state: int):
    """function over each sequence of each row alone; the initial state goes to the first, the last state is of the
    last."""

    def run(*inputs):
        rows, lasts = [], []
        for b, row in enumerate(sequence):
            pieces = []
            for i, span in enumerate(spans(row)):
                piece = [t[b : b + 1, span] if k in tokenwise else t for k, t in enumerate(inputs)]
                piece[state] = None if i or inputs[state] is None else inputs[state][b : b + 1]
                y, last = function(*piece)
                pieces.append(y)
            rows.append(torch.cat(pieces, 1))
            lasts.append(last)
        return torch.cat(rows), torch.cat(lasts)

    return run


@pytest.mark.parametrize("kernel", KERNELS)
@given(**packed_sizes, D=st.integers(1, 20), N=st.integers(1, 5), state=st.booleans())
@settings(max_examples=15, deadline=None)
def test_selective_scan_of_packed_sequences_equals_each_alone(kernel, B, L, seed, D, N, state):
    sequence = random_sequence(B, L, seed)
    loop = apart(lambda *given: scan.selective_scan(*given, kernel="reference"), sequence, (0, 1, 3, 4), 5)
    assert_equals_reference(
        lambda *given: scan.selective_scan(*given, sequence_BL=sequence, kernel=kernel),
        loop,
        random_scan(B, L, D, N, seed, state),
    )


@pytest.mark.parametrize(
    ("kernel", "chunk"),
    [("torch", 1), ("torch", 7), ("torch", 64), ("reference", 64), pytest.param("cpu", 64, marks=CPU.marks)],
)
@given(**packed_sizes, heads=st.integers(1, 2), P=st.integers(1, 4), G=st.integers(1, 2), N=st.integers(1, 5))
@settings(max_examples=10, deadline=None)
def test_ssd_of_packed_sequences_equals_each_alone(kernel, chunk, B, L, seed, heads, P, G, N):
    sequence = random_sequence(B, L, seed)
    loop = apart(lambda *given: scan.ssd(*given, kernel="reference"), sequence, (0, 1, 3, 4), 5)
    assert_equals_reference(
        lambda *given: scan.ssd(*given, sequence_BL=sequence, kernel=kernel, chunk=chunk),
        loop,
        random_ssd(B, L, heads * G, P, G, N, seed),
    )


@pytest.mark.skipif(bool(scan.available()["cpu"]), reason="numba is not installed")
@given(**packed_sizes, D=st.integers(1, 40), K=st.integers(1, 6), silu=st.booleans(), has_bias=st.booleans())
@settings(max_examples=30, deadline=None)
def test_convolution_of_packed_sequences_equals_each_alone(B, L, seed, D, K, silu, has_bias):
    from lyapft.scan.conv import CausalConv

    sequence = random_sequence(B, L, seed)
    x, weight, bias = torch.randn(B, L, D), torch.randn(D, K), torch.randn(D) if has_bias else None

    def packed(x, weight, bias):
        return CausalConv.apply(x, weight, bias, silu, sequence), x.sum()

    def alone(x, weight, bias):
        def one(piece: Tensor) -> Tensor:
            y = F.conv1d(piece.t()[None], weight[:, None], bias, padding=K - 1, groups=D)[0, :, : len(piece)].t()
            return F.silu(y) if silu else y

        rows = [torch.cat([one(row[span]) for span in spans(index)]) for row, index in zip(x, sequence, strict=True)]
        return torch.stack(rows), x.sum()

    assert_equals_reference(packed, alone, [x, weight, bias])


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_sequence_in_a_row_changes_no_bit(kernel):
    given = random_scan(2, 40, 18, 3)
    one = torch.tensor([[-1], [7]]).expand(2, 40)
    plain = outputs_and_gradients(lambda *t: scan.selective_scan(*t, kernel=kernel), given)
    packed = outputs_and_gradients(lambda *t: scan.selective_scan(*t, sequence_BL=one, kernel=kernel), given)
    assert all(torch.equal(a, b) for a, b in zip(plain, packed, strict=True))


def test_a_sequence_that_is_no_index_of_every_token_is_refused():
    given, ssd = random_scan(1, 4, 3, 2), random_ssd(1, 4, 2, 3, 1, 2)
    with pytest.raises(InputError, match=r"torch.int64 of shape \(1, 3\).*\(1, 4\)"):
        scan.selective_scan(*given, sequence_BL=torch.zeros(1, 3, dtype=torch.int64), kernel="torch")
    with pytest.raises(InputError, match=r"torch.float32 of shape \(1, 4\)"):
        scan.ssd(*ssd, sequence_BL=torch.zeros(1, 4), kernel="torch")
