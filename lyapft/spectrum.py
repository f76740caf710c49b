"""Lyapunov spectra of any smooth map, measured: step by step with QR, or by a parallel prefix scan over products.

Letters: B batch of trajectories, T steps, S state size, K ≤ S exponents. Float64 throughout; λ in nats per step.

Both find the growth rates of P = J_T ⋯ J_1. The sequential form keeps an orthonormal frame and adds up log|diag R|
(Benettin et al. 1980). A product itself overflows, and in floating point collapses onto its fastest direction; the
parallel form keeps it graded, P = left · diag(e^logs) · right, where only the logs grow. Two graded products join into
one, so an associative scan gives all prefixes in O(log T) joins (the UDT form of Loh et al. 1992).
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ZERO = -1e30  # stands for log 0: a finite number that no sum of real logs comes near


def benettin(
    step: Callable[[Tensor], Tensor], state_BS: Tensor, steps: int, *, exponents: int, warm_up: int = 0, every: int = 1
) -> Tensor:
    """(B, K) Lyapunov exponents of x ← step(x), descending up to noise, over `steps` after `warm_up`.

    Args:
        step: maps (B, S) to (B, S), row by row, differentiable in forward mode.
        state_BS: where the trajectories start; converted to float64.
        steps, warm_up: multiples of `every`.
        exponents: K, how many of the spectrum.
        every: steps between two QR decompositions; e^(spread · every) must stay far below 1/ε.
    Raises:
        ValueError: K outside 1…S, steps that are no multiple of `every`.
    Source: Benettin et al. 1980; Geist et al. 1990.

    >>> benettin(lambda x: x * torch.tensor([0.5, 2.0], dtype=x.dtype), torch.ones(1, 2), 10, exponents=2).exp()
    tensor([[0.5000, 2.0000]], dtype=torch.float64)
    """
    batch, size = state_BS.shape
    if not 1 <= exponents <= size:
        raise ValueError(f"exponents={exponents}: choose 1 to {size}, the size of the state")
    if steps < 1 or steps % every or warm_up % every:
        raise ValueError(f"steps={steps} and warm_up={warm_up} must be multiples of every={every}")
    x, total = state_BS.double(), torch.zeros(batch, exponents, dtype=torch.float64)
    frame = torch.eye(size, exponents, dtype=torch.float64).expand(batch, -1, -1)
    for at in range(0, warm_up + steps, every):
        for _ in range(every):
            x, frame = push_forward(step, x, frame)
        frame, R = torch.linalg.qr(frame)
        if at >= warm_up:
            total += R.diagonal(dim1=1, dim2=2).abs().log()
    return total / steps


def push_forward(step: Callable[[Tensor], Tensor], x_BS: Tensor, frame_BSK: Tensor) -> tuple[Tensor, Tensor]:
    """step(x) and the frame mapped by its Jacobian at x, without the Jacobian: K Jacobian-vector products."""

    load_forward_mode()

    def along(tangent_BS: Tensor) -> Any:
        pair: Any = torch.func.jvp(step, (x_BS,), (tangent_BS,))
        return pair

    out_dims: Any = (None, -1)  # the state is the same for all of them
    new, pushed_BSK = torch.vmap(along, in_dims=-1, out_dims=out_dims)(frame_BSK)
    return new, pushed_BSK


@cache
def load_forward_mode() -> None:
    """torch loads its rules for forward mode on first use, and warns then that it compiles them by torch.jit."""
    one = torch.ones(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated", category=DeprecationWarning)
        torch.func.jvp(torch.sin, (one,), (one,))


def trajectory_jacobians(step: Callable[[Tensor], Tensor], state_BS: Tensor, steps: int) -> Tensor:
    """(B, T, S, S) float64 Jacobians of `step` along the trajectory from a state."""
    x, eye, found = state_BS.double(), torch.eye(state_BS.shape[1], dtype=torch.float64), []
    for _ in range(steps):
        x, jacobian = push_forward(step, x, eye.expand(len(x), -1, -1))
        found.append(jacobian)
    return torch.stack(found, dim=1)


class Graded(NamedTuple):
    """left · diag(e^logs) · right: `left` orthogonal, `right` well conditioned, `logs` from large to small."""

    left: Tensor
    logs: Tensor
    right: Tensor


def prefix_spectra(J_BTSS: Tensor) -> Tensor:
    """(B, T, S) finite-time exponents of every prefix J_t ⋯ J_1, descending, by a parallel scan.

    They are rates of graded factors: their sum is mean log|det J|, and they are exact where the product is a permuted
    diagonal matrix; else each differs from the rate of a singular value by a bounded number over t.

    Args:
        J_BTSS: one-step Jacobians in order of time.

    >>> prefix_spectra(torch.diag(torch.tensor([2.0, 0.5])).expand(1, 3, 2, 2))[0, -1].exp()
    tensor([2.0000, 0.5000], dtype=torch.float64)
    """
    logs_BTS = _scan(_grade(J_BTSS.double())).logs.sort(-1, descending=True).values
    rates = logs_BTS / torch.arange(1, J_BTSS.shape[1] + 1, dtype=torch.float64)[:, None]
    return rates.masked_fill(logs_BTS <= 0.5 * _ZERO, -torch.inf)


def _scan(graded: Graded) -> Graded:
    """All prefix products along dimension 1: join pairs, scan those, and fill in the ones between."""
    length = graded.logs.shape[1]
    if length == 1:
        return graded
    even, odd = _at(graded, slice(0, None, 2)), _at(graded, slice(1, None, 2))
    pairs = _scan(_join(odd, _at(even, slice(0, length // 2))))
    between = _join(_at(even, slice(1, None)), _at(pairs, slice(0, (length - 1) // 2)))
    parts = []
    for first, at_odd, at_even in zip(_at(even, slice(0, 1)), pairs, between, strict=True):
        part = first.new_empty(first.shape[0], length, *first.shape[2:])
        part[:, :1], part[:, 1::2], part[:, 2::2] = first, at_odd, at_even
        parts.append(part)
    return Graded(*parts)


def _at(graded: Graded, index: slice) -> Graded:
    return Graded(*(part[:, index] for part in graded))


def _join(later: Graded, earlier: Graded) -> Graded:
    """later · earlier: only the matrix between the two scales has to be graded anew."""
    middle = _grade(later.right @ earlier.left, later.logs, earlier.logs)
    return Graded(later.left @ middle.left, middle.logs, middle.right @ earlier.right)


def _grade(M: Tensor, row_logs: Tensor | None = None, column_logs: Tensor | None = None) -> Graded:
    """diag(e^row) · M · diag(e^column) as `Graded`, for scales of any size: they are never exponentiated.

    Gaussian elimination with complete pivoting on scaled entries. The scales cancel from the Schur complements, which
    are formed from M alone, and the choice of the pivot keeps every entry of the triangular factors at 1 or below.
    """
    size, index = M.shape[-1], torch.arange(M.shape[-1])
    row = (M.new_zeros(M.shape[:-1]) if row_logs is None else row_logs).clamp(min=_ZERO)
    column = (M.new_zeros(M.shape[:-1]) if column_logs is None else column_logs).clamp(min=_ZERO)
    done_row, done_column = torch.zeros_like(row, dtype=torch.bool), torch.zeros_like(row, dtype=torch.bool)
    left, logs, right = [], [], []
    for _ in range(size):
        sizes = M.abs().log().clamp(min=_ZERO) + row[..., :, None] + column[..., None, :]
        sizes = sizes.masked_fill(done_row[..., :, None] | done_column[..., None, :], -torch.inf)
        top, best = sizes.flatten(-2).max(-1, keepdim=True)
        p, q = best // size, best % size
        beside, below = _row(M, p), _row(M.mT, q)
        pivot = beside.gather(-1, q)
        left.append(_sign(below) * (_row(sizes.mT, q) - top).exp())
        right.append(_sign(beside) * _sign(pivot) * (_row(sizes, p) - top).exp())
        logs.append(top.squeeze(-1))
        M = M - below[..., :, None] * (beside / torch.where(pivot == 0, 1.0, pivot))[..., None, :]
        done_row, done_column = done_row | (index == p), done_column | (index == q)
    return _orthogonal(torch.stack(left, -1), torch.stack(logs, -1), torch.stack(right, -2))


def _orthogonal(left: Tensor, logs: Tensor, right: Tensor) -> Graded:
    """The same product with an orthogonal left factor: what QR leaves over passes through the scales to the right."""
    Q, R = torch.linalg.qr(left)
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    passed = R / diagonal[..., :, None] * (logs[..., None, :] - logs[..., :, None]).exp().triu()
    return Graded(Q * _sign(diagonal)[..., None, :], logs + diagonal.abs().log(), passed @ right)


def _row(M: Tensor, at: Tensor) -> Tensor:
    return M.gather(-2, at[..., None].expand(*M.shape[:-2], 1, M.shape[-1])).squeeze(-2)


def _sign(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)
