"""Which of several processes of one cell this one is, as torchrun or srun says; nothing here imports torch."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """The place of this process among those that train one cell.

    Attributes:
        launcher: `torchrun`, `srun`, or None where this process is alone.
        rank: from 0; the first leads.
        ranks: processes in all.
        per_node: processes on each machine.
    """

    launcher: str | None = None
    rank: int = 0
    ranks: int = 1
    per_node: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0


def found(environment: Mapping[str, str] | None = None) -> Launch:
    """What the environment says; a batch job of several tasks is one process until srun starts the others.

    >>> found({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "2"})
    Launch(launcher='torchrun', rank=3, ranks=4, per_node=2)
    >>> found({"SLURM_NTASKS": "2"}).launcher is None
    True
    """
    told = os.environ if environment is None else environment

    def number(key: str, otherwise: int) -> int:
        text = told.get(key, "")
        return int(text) if text.isdigit() else otherwise

    if number("WORLD_SIZE", 1) > 1:
        ranks = number("WORLD_SIZE", 1)
        return Launch("torchrun", number("RANK", 0), ranks, number("LOCAL_WORLD_SIZE", ranks))
    if "SLURM_STEP_ID" in told and number("SLURM_NTASKS", 1) > 1:
        ranks, nodes = number("SLURM_NTASKS", 1), number("SLURM_NNODES", 1)
        return Launch("srun", number("SLURM_PROCID", 0), ranks, max(1, ranks // nodes))
    return Launch()


def together(trainer: Any) -> int:
    """How many processes compute each layer together, each a part of it."""
    return int(trainer.tensor_parallel_size) if trainer.strategy == "tensor" else 1


def faults(
    launch: Launch, accumulate: int, batch_size: int, precision: str, oom: str = "auto", together: int = 1
) -> list[str]:
    """Why these processes cannot share the micro-batches of a step.

    Args:
        together: processes that have the same micro-batches, each a part of every layer.

    >>> faults(Launch("torchrun", 0, 2, 2), 2, 12, "bf16")
    []
    """
    found = []
    if launch.ranks > 1 and precision == "fp16_true":
        found.append(
            f"precision=fp16_true keeps float32 gradients of float16 weights, which DDP cannot add up over "
            f"{launch.ranks} processes: use precision=fp16 or bf16_true, or one process"
        )
    if launch.ranks > 1 and oom == "halve":
        found.append(f"trainer.oom=halve halves for one process, not for {launch.ranks}: set a smaller batch_size")
    if launch.ranks % launch.per_node:
        found.append(f"{launch.launcher} started {launch.ranks} processes unevenly: start as many on each machine")
    copies = max(1, launch.ranks // together)
    if accumulate > 0 and accumulate % copies:
        rows = accumulate * batch_size
        same = -(-accumulate // copies) * copies
        of = f" that are {copies} copies" if together > 1 else ""
        found.append(
            f"trainer.accumulate={accumulate} micro-batches a step cannot be shared by {launch.ranks} processes{of}: "
            f"use a multiple of {copies}, for about as many rows a step as now ({rows}) trainer.accumulate={same} "
            f"trainer.batch_size={max(1, rows // same)}"
        )
    return found


TESTED = {"peft": ("none", "lora", "lora_all", "rslora"), "precision": ("fp32", "tf32", "bf16")}  # in parts


def sharding_faults(
    launch: Launch, trainer: Any, peft: Any, precision: str, probes: Collection[str], guard: str | None
) -> list[str]:
    """Why a training cannot have its weights in parts (`trainer.strategy=fsdp` or `tensor`).

    Args:
        trainer: and peft: their settings. precision: and probes: names of choices. guard: its action.
    """
    found, strategy = [], trainer.strategy
    if launch.ranks == 1:
        found.append("needs several processes: torchrun --nproc-per-node N train.py …")
    for group, name in {"peft": peft.name, "precision": precision}.items():
        if name not in TESTED[group]:
            found.append(f"is not tested with {group}={name}: use {', '.join(TESTED[group])}")
    if "shadow" in probes:
        found.append("cannot have probe=shadow, which reads whole weights")
    if guard == "rollback":
        found.append("cannot have guard=rollback, which copies whole weights: use skip or stop")
    if strategy == "tensor":
        found += _tensor_faults(launch, trainer.tensor_parallel_size, peft.get("dropout", 0.0))
    return [f"trainer.strategy={strategy} {fault}; or trainer.strategy=ddp" for fault in found]


def _tensor_faults(launch: Launch, size: int, dropout: float) -> list[str]:
    found = []
    if size < 2:
        found.append(f"needs trainer.tensor_parallel_size of 2 or more, not {size}: how many compute a layer together")
    elif launch.ranks > 1 and launch.per_node % size:
        found.append(
            f"with trainer.tensor_parallel_size={size} needs a multiple of that many processes on each machine, not "
            f"{launch.per_node}"
        )
    if dropout:
        found.append("draws the random numbers of a layer's parts apart: use peft.dropout=0")
    return found


def identity(launch: Launch) -> dict[str, int]:
    """What of it is part of a cell's identity: like threads, how many processes share a sum can change its rounding."""
    return {"ranks": launch.ranks} if launch.ranks > 1 else {}
