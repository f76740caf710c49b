"""The loss on rows that a cell did not train on: what learning rates are chosen by."""

from typing import Any

import torch
from torch.utils.data import DataLoader

from lyapft.cell.preparation import Cell
from lyapft.data import TokenDataset
from lyapft.module import IGNORED, response_loss
from lyapft.tasks.scoring import Autocast


@torch.no_grad()
def validation(
    model: torch.nn.Module, held_out: TokenDataset, cell: Cell, autocast: Autocast, rows: int
) -> dict[str, Any]:
    """Mean cross-entropy over every target token of the held-out rows, in nats, in the cell's own number format.

    Args:
        rows: at once.
    """
    loader: DataLoader[dict[str, torch.Tensor]] = DataLoader(held_out, batch_size=rows, collate_fn=held_out.collate)
    mode, total, count = model.training, 0.0, 0
    model.eval()
    for batch in loader:
        here = {name: tensor.to(cell.device) for name, tensor in batch.items()}
        with autocast():
            logits = model(input_ids=here["input_ids"], attention_mask=here["attention_mask"], use_cache=False).logits
        targets = int((here["labels"][:, 1:] != IGNORED).sum())
        total += float(response_loss(logits, here["labels"])) * targets
        count += targets
    model.train(mode)
    return {"loss": total / count, "rows": len(held_out), "target_tokens": count}
