"""The Lyapunov probe over two processes says what one process says of the whole batch."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

from lyapft import lyapunov
from lyapft.probes.lyapunov import over_ranks
from tests.tolerances import TOL

MAXIMA = [i for i, field in enumerate(lyapunov.FIELDS) if field not in lyapunov.MEANS]


def whole_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Step sizes of two layers, A, and a mask: ranks get three and two of the sequences, of different lengths."""
    generator = torch.Generator().manual_seed(3)
    delta = torch.rand(2, 5, 12, 6, generator=generator) * torch.logspace(-8, 0, 12)[:, None]
    mask = (torch.arange(12) < torch.tensor([12, 3, 7, 9, 1])[:, None]).long()
    return delta, -torch.rand(6, 4, generator=generator), mask


def numbers(delta: torch.Tensor, A: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.stack([lyapunov.stability_profile(layer, A, mask).numbers for layer in delta])


def one_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    delta, A, mask = whole_batch()
    own = slice(0, 3) if rank == 0 else slice(3, 5)
    torch.save(over_ranks(numbers(delta[:, own], A, mask[own]), mask[own]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    expected = numbers(*whole_batch())
    assert torch.equal(first, second)
    assert torch.equal(first[:, MAXIMA], expected[:, MAXIMA])
    assert_close(first, expected, **TOL[torch.float32])
    delta, A, mask = whole_batch()
    part = numbers(delta[:, :3], A, mask[:3])
    assert not torch.allclose(part, expected)  # a rank alone would say something else
