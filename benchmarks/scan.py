"""How fast the selective scan alone is, forward and backward in float32, and how much memory a step with it takes.

    python benchmarks/scan.py [--only speed threads memory] [--repeats 9] [--threads N]

speed    B=4, D=512, N=16 at L=512 and L=2048: lyapft's kernel, mambapy's parallel scan (which must give the same
         outputs and gradients) and the floor: what no scan can go below. The floor is a kernel compiled by the same
         means and run on the same threads. It reads x and Δ and writes y three times over (forward, recomputation,
         gradients), the first time with one exp2 by the same polynomial for each of the B·L·D·N decays, summed over
         n; it computes no state and no gradient, and it allocates nothing.
threads  the same at L=512, one thread against two.
memory   one training step of a whole Mamba or Mamba-2 (hidden 256, 4 layers, B=4, L=1024): peak resident memory above
         that of the process before it, each variant in a fresh process that has taken a short step already, so that
         imports, kernels, weights, gradients and optimizer state are there. Linux only.

Every variant runs in turn within one process, so that a change in the machine's load meets all alike. Prints a table
of medians; the last line is one JSON object of ratios.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lyapft import scan
from lyapft.environment import keep_freed_memory

BATCH, CHANNELS, STATES = 4, 512, 16
VARIANTS = ("mamba lyapft", "mamba mambapy", "mamba2 lyapft", "mamba2 transformers")


def inputs(length: int) -> list[Tensor]:
    """x, Δ, A, B, C as a Mamba layer sees them: Δ in [1e-3, 1e-1], A in [-16, -1]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, length, CHANNELS, generator=generator)
    delta = 10 ** (torch.rand(BATCH, length, CHANNELS, generator=generator) * 2 - 3)
    A = -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1)
    b, c = (torch.randn(BATCH, length, STATES, generator=generator) for _ in range(2))
    return [tensor.requires_grad_() for tensor in (x, delta, A, b, c)]


def lyapft_scan(x: Tensor, delta: Tensor, A: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return scan.selective_scan(x, delta, A, b, c, kernel="cpu")[0]


def mambapy_scan(x: Tensor, delta: Tensor, A: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """As mambapy's own Mamba calls its parallel scan."""
    from mambapy.pscan import pscan

    states = pscan(torch.exp(delta[..., None] * A), (delta[..., None] * b[:, :, None]) * x[..., None])
    return (states @ c[..., None]).squeeze(3)


def forward_backward(function: Callable[..., Tensor], given: list[Tensor]) -> Callable[[], list[Tensor]]:
    """A function that computes the output and the gradient of every input for one fixed outgoing gradient."""
    outgoing = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(1))

    def run() -> list[Tensor]:
        y = function(*given)
        return [y.detach(), *torch.autograd.grad(y, given, outgoing)]

    return run


def floor(given: list[Tensor]) -> Callable[[], None]:
    """The floor described above, ready to run."""
    import numba

    from lyapft.scan import simd, threads
    from lyapft.scan.simd import LOG2E, WIDTH

    @numba.njit(nogil=True)
    def stream(first, last, states, channels, x_RD, delta_RD, a2_ND, y_RD):  # type: ignore[no-untyped-def]
        for row in range(first, last):
            for d in range(0, channels, WIDTH):
                at = row * channels + d
                delta, total = simd.load(delta_RD, at), simd.load(x_RD, at)
                for n in range(states):
                    total = simd.add(total, simd.exp2(simd.mul(delta, simd.load(a2_ND, n * channels + d))))
                simd.store(y_RD, at, total)

    x, delta, a2 = (
        np.ascontiguousarray(t.detach().numpy()).ravel() for t in (given[0], given[1], given[2].t() * LOG2E)
    )
    y = np.empty_like(x)
    rows = x.size // CHANNELS

    def once(states: int) -> None:
        threads.run(rows, lambda i, j, _: stream(i, j, states, CHANNELS, x, delta, a2, y))

    def run() -> None:
        for states in (STATES, 0, 0):
            once(states)

    return run


def check_equal(results: dict[str, list[Tensor]], rtol: float = 1e-3) -> None:
    """Raises unless all variants give the same outputs and gradients."""
    (name, first), *others = results.items()
    for other, values in others:
        for label, a, b in zip(("y", "x", "delta", "A", "B", "C"), first, values, strict=True):
            error = float((a - b).abs().max() / a.abs().max())
            if not error <= rtol:
                raise RuntimeError(f"{name} and {other} differ by {error:.1e} in {label}")


def interleaved(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each variant, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return report(times)


def report(times: dict[str, list[float]]) -> dict[str, float]:
    """The median of each variant's seconds, printed."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name:28s} {seconds * 1e3:10.1f} ms  (n = {len(times[name])}, fastest {min(times[name]) * 1e3:.1f} ms)")
    return medians


def speed(options: argparse.Namespace) -> dict[str, float]:
    """Times faster than mambapy, and times as slow as the floor."""
    ratios = {}
    for length in (512, 2048):
        given = inputs(length)
        ours, theirs = forward_backward(lyapft_scan, given), forward_backward(mambapy_scan, given)
        bound = floor(given)
        check_equal({"lyapft": ours(), "mambapy": theirs()})
        bound()
        runs = {f"lyapft, L={length}": ours, f"floor, L={length}": bound}
        # its own turns: what mambapy leaves in the caches and in the allocator is no part of another's time
        seconds = interleaved(runs | {f"mambapy, L={length}": theirs}, options.repeats)
        ratios[f"scan_{length}_vs_mambapy"] = seconds[f"mambapy, L={length}"] / seconds[f"lyapft, L={length}"]
        ratios[f"scan_{length}_over_floor"] = seconds[f"lyapft, L={length}"] / seconds[f"floor, L={length}"]
    return ratios


def thread_scaling(options: argparse.Namespace) -> dict[str, float]:
    """Times faster on two threads than on one."""
    run = forward_backward(lyapft_scan, inputs(512))
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(3 * options.repeats):
        for count, seconds in times.items():
            torch.set_num_threads(count)
            run()  # untimed: a change of the count makes the runtime end its threads and start new ones
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    torch.set_num_threads(options.threads)
    one, two = report({f"lyapft, L=512, {count} thread": seconds for count, seconds in times.items()}).values()
    return {"two_threads_vs_one": one / two}


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field + ":")).split()[1])


def peak_bytes(variant: str) -> int:
    """Peak resident memory of one training step above what the process held before it."""
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    from lyapft.recurrence import install

    torch.manual_seed(0)
    family, implementation = variant.split()
    dims = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4}
    if family == "mamba":
        model = MambaForCausalLM(MambaConfig(**dims, state_size=16, use_mambapy=implementation == "mambapy"))
    else:
        model = Mamba2ForCausalLM(Mamba2Config(**dims, state_size=64, head_dim=64, num_heads=8, n_groups=1))
    model.train()
    if implementation == "lyapft":
        install(model, kernel="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(length: int) -> None:
        ids = torch.randint(4096, (BATCH, length))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    step(32)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    step(1024)
    return _status("VmHWM") - before


def memory(options: argparse.Namespace) -> dict[str, float]:
    """The memory of mambapy, and of transformers' Mamba-2, as a multiple of lyapft's."""
    peaks = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--peak-of", variant, "--threads", str(options.threads)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[variant] = int(done.stdout.split()[-1])
        print(f"{variant + ', L=1024':28s} {peaks[variant] / 2**20:10.0f} MiB")
    return {
        "memory_vs_mambapy": peaks["mamba mambapy"] / peaks["mamba lyapft"],
        "mamba2_memory_vs_transformers": peaks["mamba2 transformers"] / peaks["mamba2 lyapft"],
    }


MEASUREMENTS = {"speed": speed, "threads": thread_scaling, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each variant")
    parser.add_argument("--peak-of", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        return print(peak_bytes(options.peak_of))
    keep_freed_memory()  # as a cell does; every variant profits
    print(f"torch {torch.__version__}, {options.threads} threads")
    ratios: dict[str, float] = {}
    for name in options.only:
        ratios |= MEASUREMENTS[name](options)
    print(json.dumps({name: round(value, 3) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
