"""Several examples in one row, kept apart: less padding, the same losses.

State, convolution and attention start anew at each example: recurrences are told by the seam (`Seam.sequence`),
attention by position ids that start at 0 again. Letters: B rows, L tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lyapft.data.batches import IGNORE, TokenDataset

# Model types whose packed logits and gradients are tested to equal the unpacked ones.
PACKABLE = frozenset(
    {
        "mamba", "falcon_mamba", "mamba2", "jamba", "bamba", "falcon_h1", "nemotron_h", "zamba", "zamba2",
         "gpt_neox", "llama", "mistral", "olmo", "olmo2", "qwen2", "qwen3",
    }
)  # fmt: skip
IMPOSSIBLE = {"granitemoehybrid": "transformers builds its attention mask without the position ids"}
OPEN = 64  # rows that are still being filled: looking further gains little


def faults(model_type: str, unknown: Sequence[str], tuned_state: bool) -> list[str]:
    """Why a model's sequences cannot be packed; empty where they can.

    Args:
        model_type: transformers' name.
        unknown: modules with a recurrence that the seam does not know.
        tuned_state: a learned first state, which a packed row has in front of its first sequence only.
    """
    found = []
    if unknown:
        found.append(f"data.packing=true: nothing resets the recurrence of {', '.join(unknown)} between sequences")
    elif model_type in IMPOSSIBLE:
        found.append(f"data.packing=true cannot keep sequences of {model_type} apart: {IMPOSSIBLE[model_type]}")
    elif model_type not in PACKABLE:
        found.append(
            f"data.packing=true is not tested for {model_type} models (tested: {', '.join(sorted(PACKABLE))}): "
            "their sequences might see each other"
        )
    if tuned_state:
        found.append("data.packing=true: a tuned initial state is in front of a row, not of each of its sequences")
    return [f"{fault}. Use data.packing=false" for fault in found]


@dataclass
class PackedDataset(TokenDataset):
    """Rows of a `TokenDataset`, several to a pack of at most `max_length` tokens."""

    packs: Sequence[Sequence[int]] = ()

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids`, `labels`, `sequence` and `position_ids` of one pack, int64, and `row`, those that are in it.

        The first token of an example is no target: what stands before it belongs to another one.
        """
        rows = [super(PackedDataset, self).__getitem__(row) for row in self.packs[index]]
        for row in rows:
            row["labels"][0] = IGNORE
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        joined = {key: torch.cat([row[key] for row in rows]) for key in ("input_ids", "labels", "row")}
        joined["sequence"] = torch.arange(len(rows)).repeat_interleave(lengths)
        joined["position_ids"] = torch.cat([torch.arange(int(length)) for length in lengths])
        return joined

    def collate(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """As for unpacked rows, with `sequence` and `position_ids`; padding is a sequence of its own."""
        batch = super().collate(rows)
        length = batch["input_ids"].shape[1]
        batch["sequence"] = torch.full_like(batch["input_ids"], -1)
        batch["position_ids"] = torch.zeros_like(batch["input_ids"])
        for i, row in enumerate(rows):
            real = len(row["input_ids"])
            batch["sequence"][i, :real] = row["sequence"]
            batch["position_ids"][i, :real] = row["position_ids"]
            batch["position_ids"][i, real:] = torch.arange(length - real)
        return batch

    def record(self) -> dict[str, Any]:
        """What the unpacked rows were, and in how many packs they are."""
        return super().record() | {"rows": len(self.starts) - 1, "packs": len(self.packs)}


def pack(dataset: TokenDataset, max_length: int) -> PackedDataset:
    """Fill packs with rows, first fit in the rows' own order; an ordered source fills one pack after the other.

    >>> import numpy as np
    >>> ids, starts = np.arange(9, dtype=np.int32), np.array([0, 4, 7, 9])
    >>> pack(TokenDataset("n", "h", ids, np.ones(9, bool), starts, pad_id=0), 6).packs
    [[0, 2], [1]]
    """
    lengths = (dataset.starts[1:] - dataset.starts[:-1]).tolist()
    packs: list[list[int]] = []
    free: list[list[int]] = []  # [tokens left, pack]
    for row, length in enumerate(lengths):
        fitting = next((entry for entry in free if entry[0] >= length), None)
        if fitting is None:
            packs.append([])
            fitting = [max_length, len(packs) - 1]
            free = [*free, fitting][-1 if dataset.ordered else -OPEN :]
        fitting[0] -= length
        packs[fitting[1]].append(row)
    return PackedDataset(**{f.name: getattr(dataset, f.name) for f in fields(TokenDataset)}, packs=packs)
