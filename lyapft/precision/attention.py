"""Scaled dot-product attention on half operands with float32 accumulation, forward and backward.

    S = scale Q Kᵀ + mask,  P = softmax(S),  O = P V

Q, K, V and the incoming gradient are half. As in the flash kernels, S stays in float32, P and dS are operands of a
matmul and so are rounded to half, all sums run in float32 and O, dQ, dK, dV are rounded once. Signatures are those of
torch's `aten::_scaled_dot_product_flash_attention_for_cpu` and its backward.
Letters: B batch, H query heads, G key heads (G divides H), L queries, S keys, D head dim.
Source: Dao, FlashAttention-2, 2023, algorithms 1 and 2, with one block of keys.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lyapft.precision.workspace import Workspace

LOG2_E = math.log2(math.e)
BLOCK_ELEMENTS = 2**22  # scores held at once, 16 MB: longer sequences are worked off in blocks of queries


def attention(
    query_BHLD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    workspace: Workspace,
) -> tuple[Tensor, Tensor]:
    """Attention output in the operands' dtype and the log-sum-exp of each row of S, float32.

    A row whose keys are all masked (−∞) attends to nothing: its output is 0.

    Raises:
        NotImplementedError: dropout, which torch never sends here.
    """
    if dropout_p:
        raise NotImplementedError("dropout in half attention on a CPU: torch's own choice for it is the math backend")
    B, H, L, D = query_BHLD.shape
    dtype, factor = query_BHLD.dtype, D**-0.5 if scale is None else scale
    query = workspace.widen(0, query_BHLD)
    key, value = (_per_query_head(workspace.widen(1 + i, t), H) for i, t in enumerate((key_BGSD, value_BGSD)))
    output = torch.empty_like(query_BHLD)
    logsumexp_BHL = torch.empty(B, H, L)
    for rows in _blocks(B * H * key.shape[2], L):
        scores = _scores(query, key, rows, is_causal, attn_mask, factor, workspace)
        top = scores.amax(-1, keepdim=True)
        top.masked_fill_(top == -math.inf, 0.0)
        weights = scores.sub_(top).exp2_()
        total = weights.sum(-1, keepdim=True)
        product = _matmul(_round(weights, dtype), value, workspace.empty(4, (*weights.shape[:3], D)))
        output[:, :, rows] = product.div_(total.masked_fill(total == 0, 1.0))
        logsumexp_BHL[:, :, rows] = (top + total.log2()).squeeze(-1) / LOG2_E
    return output, logsumexp_BHL


def attention_backward(
    gradient_BHLD: Tensor,
    query_BHLD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    output_BHLD: Tensor,
    logsumexp_BHL: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    workspace: Workspace,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in their dtype.

    dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O)),  dQ = scale dS K,  dK = scale dSᵀ Q
    """
    B, H, L, D = query_BHLD.shape
    G, S = key_BGSD.shape[1:3]
    dtype, factor = query_BHLD.dtype, D**-0.5 if scale is None else scale
    query, gradient = workspace.widen(0, query_BHLD), workspace.widen(5, gradient_BHLD)
    key, value = (_per_query_head(workspace.widen(1 + i, t), H) for i, t in enumerate((key_BGSD, value_BGSD)))
    delta = (gradient * output_BHLD).sum(-1, keepdim=True)
    log2sumexp = logsumexp_BHL.masked_fill(logsumexp_BHL == -math.inf, 0.0).unsqueeze(-1) * LOG2_E
    d_query = torch.empty_like(query_BHLD)
    d_key, d_value = torch.zeros(B, H, S, D), torch.zeros(B, H, S, D)
    for rows in _blocks(B * H * S, L):
        scores = _scores(query, key, rows, is_causal, attn_mask, factor, workspace)
        weights = scores.sub_(log2sumexp[:, :, rows]).exp2_()
        d_rows, block = gradient[:, :, rows], (*weights.shape[:3], D)
        d_scores = _matmul(d_rows, value.mT, workspace.empty(6, weights.shape))
        d_scores = _round(d_scores.sub_(delta[:, :, rows]).mul_(weights), dtype)
        d_value += _matmul(_round(weights, dtype).mT, d_rows, workspace.empty(4, d_value.shape))
        d_query[:, :, rows] = _matmul(d_scores, key, workspace.empty(4, block)).mul_(factor)
        d_key += _matmul(d_scores.mT, query[:, :, rows], workspace.empty(4, d_key.shape))
    d_key.mul_(factor)
    shared = (B, G, H // G, S, D)
    return d_query, d_key.view(shared).sum(2).to(dtype), d_value.view(shared).sum(2).to(dtype)


def _blocks(scores_per_query: int, queries: int) -> Iterator[slice]:
    size = max(1, BLOCK_ELEMENTS // max(1, scores_per_query))
    return (slice(start, min(start + size, queries)) for start in range(0, queries, size))


def _scores(
    query: Tensor, key: Tensor, rows: slice, is_causal: bool, mask: Tensor | None, factor: float, workspace: Workspace
) -> Tensor:
    """log₂e · S for a block of queries, in workspace slot 3.

    Base 2, because exp at −∞ (a masked key) leaves the vectorised path of MKL and takes sixty times as long; exp2
    does not.
    """
    B, H, S, _ = key.shape
    scores = _matmul(query[:, :, rows], key.mT, workspace.empty(3, (B, H, rows.stop - rows.start, S)))
    scores.mul_(factor * LOG2_E)
    if mask is not None:
        scores.add_(mask if mask.shape[-2] == 1 else mask[..., rows, :], alpha=LOG2_E)
    if is_causal:
        seen = torch.arange(S) <= torch.arange(rows.start, rows.stop).unsqueeze(1)
        scores += seen.float().log2()  # 0 where seen, −∞ where not: adding is ten times as quick as masked_fill
    return scores


def _matmul(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out=out.flatten(0, 1))
    return out


def _round(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values that half can hold, kept in float32, in place."""
    return values.copy_(values.to(dtype))


def _per_query_head(keys_BGSD: Tensor, heads: int) -> Tensor:
    groups = keys_BGSD.shape[1]
    return keys_BGSD if groups == heads else keys_BGSD.repeat_interleave(heads // groups, dim=1)
