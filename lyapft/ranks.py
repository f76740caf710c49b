"""What the processes that train one cell together tell one another.

torchrun or srun has started them; they share the micro-batches of every step, and the first one leads. Where a process
is alone every function here gives back what it was given.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from lyapft import launch, sharding

PATIENCE = timedelta(days=7)  # the others wait while the first evaluates; one that died is noticed at once
T = TypeVar("T")

if TYPE_CHECKING:
    from lyapft.module import FineTuner


def many() -> bool:
    """Whether this process is one of several."""
    return dist.is_initialized()


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if many() else 0


def count() -> int:
    """How many there are."""
    return dist.get_world_size() if many() else 1


def leads() -> bool:
    """Whether this is the first, which evaluates and writes."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """All processes of the launch, met."""
    here = launch.found()
    if here.ranks == 1:
        yield
        return
    environment = _environment(here)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(environment.local_rank())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, rank=here.rank, world_size=here.ranks, timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


class SummedDDP(DDPStrategy):
    """DDP whose gradients are sums over the processes; `FineTuner` divides the loss instead of DDP the gradients.

    So the backward pass in float16 meets the numbers that it meets in one process with as many micro-batches.
    """

    def configure_ddp(self) -> None:
        """Wrap the module, and sum."""
        super().configure_ddp()
        cast(DistributedDataParallel, self.model).register_comm_hook(None, _summed)


def _summed(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return cast("torch.futures.Future[Tensor]", work.get_future().then(lambda done: done.value()[0]))


class Sharded(DDPStrategy):
    """Lightning's DDP with the weights in parts instead of in copies; gradients are summed as in `SummedDDP`.

    What Lightning's `ModelParallelStrategy` does, with the checkpoints of `resume` and on CPUs too.
    """

    def __init__(self, tensor_parallel: int, **others: Any) -> None:
        super().__init__(**others)
        self.tensor_parallel = tensor_parallel

    def configure_ddp(self) -> None:
        """Share the backbone out where it would be wrapped."""
        model = cast("FineTuner", self.lightning_module).model
        sharding.share_out(cast(PreTrainedModel, model), self.tensor_parallel)


def _environment(here: launch.Launch) -> ClusterEnvironment:
    """Lightning's view of the launch. Signals are lyapft's own: SLURM's requeueing is left to SLURM."""
    if here.launcher == "srun":
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(here.per_node))  # Lightning does not count by itself
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment() if here.launcher is None else TorchElasticEnvironment()


def trainer_arguments(settings: DictConfig) -> dict[str, Any]:
    """What Lightning's Trainer is told of the launch; it starts no process itself.

    Args:
        settings: of the trainer.
    """
    here = launch.found()
    environment = _environment(here)
    strategy: DDPStrategy | str = "auto"
    if here.ranks > 1:
        common: dict[str, Any] = {"cluster_environment": environment, "timeout": PATIENCE}
        parts = settings.strategy != "ddp"
        strategy = Sharded(launch.together(settings), **common) if parts else SummedDDP(**common)
    return {
        "devices": here.per_node,
        "num_nodes": here.ranks // here.per_node,
        "strategy": strategy,
        "plugins": [] if here.ranks > 1 else [environment],
    }


def from_first(value: T) -> T:
    """The first process's value, on every process."""
    return _from(value, 0)


def from_last(value: T) -> T:
    """The last process's value, on every process: it has the last micro-batch of a step."""
    return _from(value, count() - 1)


def _from(value: T, source: int) -> T:
    if not many():
        return value
    told = [value]
    dist.broadcast_object_list(told, source)
    return told[0]


def gathered(value: T) -> list[T]:
    """Every process's value, by rank, on every process."""
    if not many():
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def largest(numbers: Tensor) -> Tensor:
    """The largest over the processes, each number for itself."""
    if not many():
        return numbers
    found = numbers.clone()
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found


def any_signal(caught: int | None) -> int | None:
    """A signal that any process has caught, so that all stop after the same step."""
    if not many():
        return caught
    number = int(largest(torch.tensor(caught or 0)))
    return number or None


def copies(settings: DictConfig) -> int:
    """How many micro-batches are trained at once: processes that compute each layer together have the same one."""
    return count() // launch.together(settings) if many() else 1


def place(settings: DictConfig) -> int:
    """Whose share of the micro-batches this process has, of as many as there are copies."""
    return rank() // launch.together(settings) if many() else 0


def share(settings: DictConfig) -> DictConfig:
    """The settings of a trainer with this process's part of a step's micro-batches."""
    own = settings.copy()
    own.accumulate = settings.accumulate // copies(settings)
    return own


def part_random_numbers(seed: int, place: int) -> None:
    """Dropout of its own for every copy: the same on all of them would not be that of a larger batch."""
    if place:
        torch.manual_seed(seed + place)


def step_totals(loss: float, tokens: int, copies: int) -> tuple[float, int]:
    """The mean loss and the tokens of a whole step, from those of this process's micro-batches."""
    if not many():
        return loss, tokens
    sums = torch.tensor([loss, tokens], dtype=torch.float64)
    dist.all_reduce(sums)
    return float(sums[0]) / count(), int(sums[1]) * copies // count()


def of_copies(values: list[T], copies: int) -> list[T]:
    """Of what every process has given, one of each copy."""
    return values[:: max(1, len(values) // copies)]
