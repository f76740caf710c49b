"""A LoRA step of ours (lyapft's own training, as `train.py` runs it) against transformers' Trainer + peft.

Same base and adapter weights, rows, order, optimizer (AdamW), schedule, clipping and number of steps, both without
progress bars; ours with its default probes, liveness proof and a recorded row per step, the Trainer with its defaults.
Short fits take turns, and a step is the time between two batches being collated by the same function.
"""

import contextlib
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from lyapft import config, precision, recurrence
from lyapft.backbone import Backbone
from lyapft.cell.assembly import Assembly
from lyapft.cell.training import Training
from lyapft.config import PrecisionConfig, TrainerConfig
from lyapft.data import TokenDataset
from lyapft.halving import Halvings
from lyapft.peft import Lora, adapted_layers
from lyapft.resume import CheckpointFiles, Signals

SIZES = {
    "": {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4, "batch": 8, "length": 128},
    "_tiny": {"vocab_size": 1024, "hidden_size": 96, "num_hidden_layers": 2, "batch": 24, "length": 64},
}
STEPS, ROUNDS, WARM_UP = 15, 7, 5
RATE = 1e-3
CONSTANT: dict[str, Any] = {"schedule": "constant", "warmup": 0.0, "progress": False}


class Clocked(TokenDataset):
    """Random rows that note when each batch is put together."""

    def __init__(self, vocabulary: int, rows: int, length: int) -> None:
        ids = np.random.default_rng(0).integers(3, vocabulary, rows * length, dtype=np.int32)
        starts = np.arange(0, rows * length + 1, length)
        super().__init__("random", "", ids, np.ones(ids.shape, np.bool_), starts, pad_id=0, ordered=True)
        self.seen: list[float] = []

    def collate(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """As TokenDataset does."""
        self.seen.append(time.perf_counter())
        return super().collate(rows)

    def step_seconds(self) -> list[float]:
        """Time between batches since the last call, the first few left out."""
        seconds = np.diff(self.seen)[WARM_UP:].tolist()
        self.seen.clear()
        return seconds


def base(family: str, size: dict[str, int]) -> PreTrainedModel:
    """A random model; the same from call to call."""
    torch.manual_seed(0)
    dims = {key: size[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
    dims |= {"num_attention_heads": 4, "intermediate_size": 4 * size["hidden_size"]}
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**dims))
    return GPTNeoXForCausalLM(GPTNeoXConfig(**dims))


class Ours:
    """One cell's training, again and again on the same model."""

    def __init__(self, family: str, size: dict[str, int], data: Clocked, folder: Path) -> None:
        self.model, self.data = base(family, size), data
        self.seam = recurrence.install(self.model)
        self.backbone = Backbone(self.model, None, family, family, "", None, None)  # type: ignore[arg-type]
        self.peft = Lora()
        self.peft.attach(self.backbone, self.seam)
        settings = TrainerConfig(steps=STEPS, batch_size=size["batch"], learning_rate=RATE, **CONSTANT)
        probes = {"lyapunov": config.load_choice("probe", "lyapunov")}
        trainer, guard = OmegaConf.structured(settings), config.load_choice("guard", "none")
        cfg = OmegaConf.create({"trainer": trainer, "probe": probes, "guard": guard, "seed": 0})
        self.cell: Any = SimpleNamespace(config=cfg, device="cpu", folder=folder, id="", role="cell")

    def fit(self) -> float:
        """Train; returns the mean loss."""
        with warnings.catch_warnings(), precision.build(PrecisionConfig(name="fp32"), "cpu") as strategy:
            warnings.simplefilter("ignore")  # as a cell does
            parts = Assembly(self.backbone, self.seam, self.peft, strategy)
            training = Training(self.cell, parts, Signals(), Halvings([]), {})
            training.fit(self.data, [])
            CheckpointFiles(self.cell.folder, self.cell.id).remove()
        return float(training.series.table()["loss"].mean())


class Theirs:
    """transformers' Trainer on a peft model with the same adapters."""

    def __init__(self, family: str, size: dict[str, int], data: Clocked, folder: Path, like: nn.Module) -> None:
        names = [name for name, _ in adapted_layers(like)]
        self.model = get_peft_model(base(family, size), LoraConfig(r=8, lora_alpha=16, target_modules=names))
        state = {f"base_model.model.{name}": tensor for name, tensor in like.state_dict().items()}
        self.model.load_state_dict(state)
        self.data, settings = data, TrainerConfig()
        self.arguments = TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            max_steps=STEPS,
            per_device_train_batch_size=size["batch"],
            train_sampling_strategy="sequential",
            learning_rate=RATE,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            lr_scheduler_type="constant",
            max_grad_norm=settings.grad_clip,
            logging_steps=STEPS,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )

    def fit(self) -> float:
        """Train; returns the mean loss."""
        trainer = Trainer(self.model, self.arguments, data_collator=self._collate, train_dataset=self.data)
        with contextlib.redirect_stdout(io.StringIO()):
            return float(trainer.train().training_loss)

    def _collate(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = self.data.collate([{"row": torch.tensor([0]), **row} for row in rows])  # the Trainer drops it
        return {name: tensor for name, tensor in batch.items() if name != "rows"}


def lora_vs_trainer_peft(options: Any) -> dict[str, float]:
    """Trainer + peft's time per step over ours, per family and size; above 1, ours is quicker."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    ratios: dict[str, float] = {}
    for suffix, size in SIZES.items():
        for family in ("llama", "pythia"):
            name = f"{family}{suffix}_lora_vs_trainer_peft"
            data = Clocked(size["vocab_size"], STEPS * size["batch"], size["length"])
            seconds: dict[str, list[float]] = {"ours": [], "trainer + peft": []}
            losses: dict[str, float] = {}
            with tempfile.TemporaryDirectory() as folder:
                ours = Ours(family, size, data, Path(folder))
                theirs = Theirs(family, size, data, Path(folder), ours.model)
                fitters = {"ours": ours, "trainer + peft": theirs}
                for turn in range(ROUNDS + 1):
                    for label in sorted(fitters, reverse=turn % 2 == 1):
                        losses[label] = fitters[label].fit()
                        seconds[label].append(statistics.median(data.step_seconds()))
            medians = {label: statistics.median(values[1:]) for label, values in seconds.items()}  # the first compiles
            if abs(losses["ours"] - losses["trainer + peft"]) > 1e-3 * losses["ours"]:
                raise RuntimeError(f"the two do not train alike: {losses}")
            for label, median in medians.items():
                print(
                    f"{family + suffix + ', ' + label:28s} {median * 1e3:10.1f} ms  (n = {ROUNDS} x {STEPS - WARM_UP})"
                )
            ratios[name] = medians["trainer + peft"] / medians["ours"]
    return ratios
