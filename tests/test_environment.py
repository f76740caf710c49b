"""What this machine is asked about itself: the peak memory of a training."""

import mmap
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from lyapft import environment
from lyapft.environment import PeakMemory

SIZE = 64 * 2**20
SLACK = 8 * 2**20  # what the interpreter and the C library take meanwhile, or had left

pytestmark = pytest.mark.skipif(not environment.STATUS.exists(), reason="the peak is known on Linux")


@pytest.fixture
def memory() -> PeakMemory:
    started = PeakMemory(nn.Linear(4, 4), "cpu")
    started.start()
    return started


def peak(memory: PeakMemory) -> int:
    found = memory.peak_bytes()
    assert found is not None, memory.source
    return found


def test_what_was_held_and_freed_is_in_the_peak(memory: PeakMemory) -> None:
    held = np.ones(SIZE, dtype=np.uint8)
    assert held.nbytes == SIZE
    del held
    assert abs(peak(memory) - SIZE) <= SLACK


def test_pages_of_files_are_not(memory: PeakMemory, tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    path.write_bytes(bytes(SIZE))
    before = environment._status("RssFile")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) == 0
        assert environment._status("RssFile") - before >= SIZE
        assert peak(memory) <= SLACK


def test_what_is_held_after_the_end_is_not_either(memory: PeakMemory) -> None:
    memory.stop()
    held = np.ones(SIZE, dtype=np.uint8)
    assert held.nbytes == SIZE
    assert peak(memory) <= SLACK


def test_an_attempt_that_continues_keeps_the_higher_peak(memory: PeakMemory) -> None:
    memory.earlier_bytes = 2**40
    assert peak(memory) == 2**40


def test_a_system_that_cannot_say_is_not_guessed_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("VmHWM:\t100 kB\n")
    monkeypatch.setattr(environment, "STATUS", status)
    memory = PeakMemory(nn.Linear(4, 4), "cpu")
    memory.start()
    assert memory.peak_bytes() is None
    assert "not available" in memory.source
