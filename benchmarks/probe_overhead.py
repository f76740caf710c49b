"""What the probes of every step cost: their share of a training step; the Lyapunov probe beside autodiff of the state.

    python benchmarks/probe_overhead.py [--threads N] [--pairs 60] [--only resources_fraction]

Steps with and without a probe alternate in one process on the same model and batch (forward, backward, AdamW). The
share compares the fastest quarter of both, so that a busy moment of the machine counts for neither. The Jacobian that
autodiff (`torch.func.jacrev`) would need is timed for one token of one layer and multiplied by the tokens and layers of
the batch. The last line is one JSON object.
"""

import argparse
import json
import statistics
import time
import types
from collections.abc import Callable

import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from transformers import MambaConfig, MambaForCausalLM

from lyapft import recurrence
from lyapft.config import TrainerConfig
from lyapft.lyapunov import steps
from lyapft.module import FineTuner
from lyapft.probes import LyapunovProbe, ResourceProbe

# model -> (vocabulary, hidden size, layers, states, batch, length); the second is what `python train.py` trains
SIZES = {"": (4096, 256, 4, 16, 8, 128), "_tiny": (1024, 96, 2, 8, 24, 64)}
PROBES = {"lyapunov_fraction": LyapunovProbe, "resources_fraction": ResourceProbe}


def training(probe: Callback, size: tuple[int, ...]) -> tuple[Callable[[bool], float], Callable[[], float]]:
    """(seconds of a step with or without the probe, seconds of the probe's own code in the last one that had it)."""
    vocabulary, hidden, layers, states, batch, length = size
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, state_size=states)
    model = MambaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    seam = recurrence.install(model)
    if isinstance(probe, LyapunovProbe):
        probe.bind(seam)
    trainer = types.SimpleNamespace(global_step=0, max_steps=99)
    module = FineTuner(model, OmegaConf.structured(TrainerConfig(steps=1)), 1e-4, seam=seam)
    module.observed = {"tokens": batch * length}
    ids = torch.randint(1, vocabulary, (batch, length))
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    clock = [0.0]
    probe.on_train_start(trainer, module)

    def timed(function: Callable, *args: object) -> None:
        started = time.perf_counter()
        function(*args)
        clock[0] += time.perf_counter() - started

    def step(probed: bool) -> float:
        started = time.perf_counter()
        if probed:
            clock[0] = 0.0
            timed(probe.on_train_batch_start, trainer, module, data, 0)
            if (reduce := seam.tap) is not None:
                seam.tap = lambda *shown: timed(reduce, *shown)
        model(**data, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if probed:
            timed(probe.on_train_batch_end, trainer, module, None, data, 0)
        return time.perf_counter() - started

    return step, lambda: clock[0]


def share(probe: Callback, size: tuple[int, ...], pairs: int) -> tuple[float, float, float]:
    """(share of a step by paired steps, share by the clock around the probe's code, seconds of that code)."""
    step, own_seconds = training(probe, size)
    for probed in (True, False, True, False):
        step(probed)
    times: dict[bool, list[float]] = {True: [], False: []}
    inside = []
    for turn in range(pairs):
        for probed in (True, False) if turn % 2 else (False, True):
            times[probed].append(step(probed))
        inside.append(own_seconds())
    fast = {probed: statistics.mean(sorted(found)[: max(1, pairs // 4)]) for probed, found in times.items()}
    own, extra = statistics.median(inside), fast[True] - fast[False]
    name = type(probe).__name__
    print(f"step {1e3 * fast[False]:.1f} ms; {name} {1e3 * own:.3f} ms by its own clock, {1e3 * extra:+.3f} ms paired")
    return extra / fast[False], own / fast[False], own


def jacrev_seconds(size: tuple[int, ...]) -> float:
    """Seconds to get every one-step Jacobian of a batch from autodiff of the reference step, from one token's."""
    _, hidden, layers, N, batch, length = size
    D = 2 * hidden
    delta, inputs, B = torch.rand(1, D), torch.randn(1, D), torch.randn(1, N)
    A = -torch.rand(D, N)
    jacobian = torch.func.jacrev(lambda x: steps.selective_scan(x, delta, A, B, inputs), chunk_size=256)
    started = time.perf_counter()
    jacobian(torch.randn(1, D, N))
    return (time.perf_counter() - started) * batch * length * layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--only", choices=PROBES)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, float] = {}
    for probe in [arguments.only] if arguments.only else PROBES:
        for suffix, size in SIZES.items():
            name = f"{probe}{suffix}"
            paired, own, seconds = share(PROBES[probe](), size, arguments.pairs)
            result |= {name: round(paired, 5), f"{name}_by_own_clock": round(own, 5)}
            if name == "lyapunov_fraction":
                result["times_cheaper_than_jacrev"] = round(jacrev_seconds(size) / seconds)
    print(json.dumps(result | {"threads": arguments.threads}))


if __name__ == "__main__":
    main()
