"""Log-likelihoods of continuations from as few and as full forward passes as possible.

Letters: R rows of a batch, L tokens, V vocabulary, M scored tokens of a batch.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from lyapft.tasks.encoding import Pair

Ids = tuple[int, ...]
Autocast = Callable[[], AbstractContextManager[Any]]


def share_rows(inputs: Sequence[Ids]) -> tuple[list[Ids], list[int]]:
    """The fewest rows that contain every input as a prefix, and for each input the row it is read from.

    A causal model computes the same at a position whatever follows it, so an input that begins another needs no pass of
    its own: all single-token choices of a question share one. Sorted, the inputs that begin with x stand right after x.

    >>> share_rows([(1, 2), (1, 2, 3), (4,), (1, 2)])
    ([(1, 2, 3), (4,)], [0, 0, 1, 0])
    """
    order = sorted(range(len(inputs)), key=lambda i: inputs[i], reverse=True)
    rows: list[Ids] = []
    row_of = [0] * len(inputs)
    for i in order:
        if not rows or rows[-1][: len(inputs[i])] != inputs[i]:
            rows.append(inputs[i])
        row_of[i] = len(rows) - 1
    # Longest first, so that a batch pads little and the largest one comes first; equal lengths stay in sorted order.
    place = sorted(range(len(rows)), key=lambda r: (-len(rows[r]), rows[r]))
    new = {old: position for position, old in enumerate(place)}
    return [rows[r] for r in place], [new[r] for r in row_of]


def batches(lengths: Sequence[int], batch_tokens: int) -> list[range]:
    """Cut rows, longest first, into runs of at most `batch_tokens` padded tokens and at least one row.

    >>> batches([4, 4, 2, 1], 8)
    [range(0, 2), range(2, 4)]
    """
    cuts, start = [], 0
    while start < len(lengths):
        stop = min(len(lengths), start + max(1, batch_tokens // lengths[start]))
        cuts.append(range(start, stop))
        start = stop
    return cuts


@torch.no_grad()
def log_likelihoods(
    model: nn.Module,
    pairs: Sequence[Pair],
    *,
    batch_tokens: int = 8192,
    max_positions: int | None = None,
    autocast: Autocast = nullcontext,
    progress: Callable[[int], object] | None = None,
) -> list[float]:
    """ln p(continuation | context) of each pair, in nats, summed over the continuation's tokens.

    Rows are padded on the right behind an attention mask, so a pair's value depends on its batch by rounding only.
    The softmax is taken in float32 whatever format the logits have.

    Args:
        max_positions: drop the left of a context beyond this many tokens; None never does.
        autocast: makes the context that each forward pass runs in.
        progress: called with the number of pairs done after each batch.
    """
    inputs = [pair.model_input(max_positions) for pair in pairs]
    rows, row_of = share_rows(inputs)
    members: list[list[int]] = [[] for _ in rows]
    for i, row in enumerate(row_of):
        members[row].append(i)
    starts = [len(ids) - len(pair.continuation) for ids, pair in zip(inputs, pairs, strict=True)]
    values = [0.0] * len(pairs)
    for batch in batches([len(row) for row in rows], batch_tokens):
        own = [(i, position) for position, row in enumerate(batch) for i in members[row]]
        first = min(starts[i] for i, _ in own)
        logits_RLV, offset = _forward(model, rows[batch.start : batch.stop], first, autocast)
        # One entry per continuation token: (row of the batch, position in its logits, token).
        wanted = [(r, starts[i] - offset + k, t) for i, r in own for k, t in enumerate(pairs[i].continuation)]
        log_p = iter(_token_log_p(logits_RLV, torch.tensor(wanted, device=logits_RLV.device)))
        for i, _ in own:
            values[i] = math.fsum(islice(log_p, len(pairs[i].continuation)))
        if progress is not None:
            progress(len(own))
    return values


def progress_bar(total: int, title: str, show: bool) -> tqdm:
    """A bar on stderr that counts choices and vanishes when it is done."""
    return tqdm(total=total, desc=title, unit=" choices", leave=False, disable=not show)


def _forward(model: nn.Module, rows: Sequence[Ids], first: int, autocast: Autocast) -> tuple[Tensor, int]:
    """Logits of the right-padded rows from position `first` on, and the position that the first of them stands for."""
    length, device = len(rows[0]), next(model.parameters()).device
    input_ids = torch.tensor([row + (0,) * (length - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    # A large vocabulary makes the logits of a whole batch the largest tensor by far: keep only those that are read.
    keep = {"logits_to_keep": length - first} if _keeps_logits(model) else {}
    with autocast():
        logits_RLV = model(input_ids=input_ids, attention_mask=mask, use_cache=False, **keep).logits
    return logits_RLV, length - logits_RLV.shape[1]


def _keeps_logits(model: nn.Module) -> bool:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def _token_log_p(logits_RLV: Tensor, wanted_M3: Tensor, chunk: int = 512) -> list[float]:
    """ln p of each wanted (row, position, token); in chunks, so that a large vocabulary needs little memory."""
    log_p: list[float] = []
    for row, position, token in (part.unbind(1) for part in wanted_M3.split(chunk)):
        log_p_MV = logits_RLV[row, position].float().log_softmax(-1)
        log_p += log_p_MV.gather(1, token[:, None]).squeeze(1).tolist()
    return log_p
