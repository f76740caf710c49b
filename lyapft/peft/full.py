"""Full fine-tuning: every weight trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lyapft.backbone import Backbone, no_progress_bars
from lyapft.errors import InputError
from lyapft.peft.base import Strategy, copy_into, written_whole

if TYPE_CHECKING:
    from lyapft.recurrence import Seam

WEIGHTS_FOLDER = "weights"  # inside the folder of a cell


class FullFineTuning(Strategy):
    """Every weight trains."""

    def __init__(self, name: str = "none") -> None:
        super().__init__(name)

    def attach(self, backbone: Backbone, seam: Seam) -> None:
        """Make every parameter trainable."""
        backbone.model.requires_grad_(True)
        self._backbone = backbone

    def save(self, folder: Path) -> str:
        """Write model and tokenizer in transformers' layout."""
        with written_whole(folder / WEIGHTS_FOLDER) as partial:
            self.write(partial)
        return f"{WEIGHTS_FOLDER}/"

    def write(self, folder: Path) -> None:
        """Write model and tokenizer in transformers' layout into a folder that exists."""
        with no_progress_bars():
            self.backbone.model.save_pretrained(folder)
        self.backbone.tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Load the weights that `save` wrote.

        Raises:
            InputError: a folder without those weights, or weights of another model.
        """
        model = self.backbone.model
        where, kept = folder / WEIGHTS_FOLDER, {name for name, _ in model.named_parameters()}
        try:
            # by transformers itself: it may store a weight under another name than the model's
            with no_progress_bars():
                saved, info = type(model).from_pretrained(
                    where, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
                )
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{where} holds no weights of this model: {error}. Give the folder of a finished run"
            ) from error
        weights = {n: p.detach() for n, p in saved.named_parameters() if n not in info["missing_keys"]}
        copy_into(dict(model.named_parameters(remove_duplicate=False)), weights, kept, where)

    def merge(self) -> None:
        """Nothing to do: the model is an ordinary one already."""

    def record(self) -> dict[str, Any]:
        """Method and counts."""
        return {"method": self.name, "targets": "all"} | self.parameters()
