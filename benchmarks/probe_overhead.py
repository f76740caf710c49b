"""What probes cost: the Lyapunov probe's share of a training step, and of what autodiff of the state map would cost.

    python benchmarks/probe_overhead.py [--threads N] [--pairs 60]

Steps with and without the probe alternate in one process on the same model and batch (forward, backward, AdamW). The
share compares the fastest quarter of both, so that a busy moment of the machine counts for neither. The Jacobian that
autodiff (`torch.func.jacrev`) would need is timed for one token of one layer and multiplied by the tokens and layers of
the batch. The resource probe is timed by its own clock, on the same steps. The last line is one JSON object.
"""

import argparse
import json
import statistics
import time
import types
from collections.abc import Callable

import torch
from omegaconf import OmegaConf
from transformers import MambaConfig, MambaForCausalLM

from lyapft import recurrence
from lyapft.config import TrainerConfig
from lyapft.lyapunov import steps
from lyapft.probes import LyapunovProbe, ResourceProbe

# model -> (vocabulary, hidden size, layers, states, batch, length); the second is what `python train.py` trains
SIZES = {"lyapunov_fraction": (4096, 256, 4, 16, 8, 128), "lyapunov_fraction_tiny": (1024, 96, 2, 8, 24, 64)}


def training(size: tuple[int, ...]) -> tuple[Callable[[bool], float], Callable[[], tuple[float, float]]]:
    """(seconds of a step with or without the probe, seconds of both probes' own code in the last one that had it)."""
    vocabulary, hidden, layers, states, batch, length = size
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, state_size=states)
    model = MambaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    seam, probe, resources = recurrence.install(model), LyapunovProbe(), ResourceProbe()
    probe.bind(seam)
    trainer = types.SimpleNamespace(global_step=0, max_steps=99)
    settings = OmegaConf.structured(TrainerConfig(steps=1))
    module = types.SimpleNamespace(observed={}, settings=settings, device=torch.device("cpu"))
    ids = torch.randint(1, vocabulary, (batch, length))
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    clock = [0.0, 0.0]

    def timed(function: Callable, *args: object, on: int = 0) -> None:
        started = time.perf_counter()
        function(*args)
        clock[on] += time.perf_counter() - started

    def step(probed: bool) -> float:
        started = time.perf_counter()
        if probed:
            clock[:] = 0.0, 0.0
            timed(probe.on_train_batch_start, trainer, module, data, 0)
            reduce = seam.tap
            seam.tap = lambda *shown: timed(reduce, *shown)
        model(**data, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if probed:
            timed(probe.on_train_batch_end, trainer, module, None, data, 0)
        taken = time.perf_counter() - started
        if probed:
            module.observed["tokens"] = ids.numel()
            timed(resources.on_train_batch_end, trainer, module, None, data, 0, on=1)
        return taken

    return step, lambda: (clock[0], clock[1])


def share(size: tuple[int, ...], pairs: int) -> tuple[float, float, float, float]:
    """Shares of a step: paired, by the clock around the probe, seconds of that; the resource probe's share."""
    step, own_seconds = training(size)
    for probed in (True, False, True, False):
        step(probed)
    times: dict[bool, list[float]] = {True: [], False: []}
    inside = []
    for turn in range(pairs):
        for probed in (True, False) if turn % 2 else (False, True):
            times[probed].append(step(probed))
        inside.append(own_seconds())
    fast = {probed: statistics.mean(sorted(found)[: max(1, pairs // 4)]) for probed, found in times.items()}
    own, used = (statistics.median(column) for column in zip(*inside, strict=True))
    extra = fast[True] - fast[False]
    print(f"step {1e3 * fast[False]:.1f} ms; probe {1e3 * own:.3f} ms by its own clock, {1e3 * extra:+.3f} ms paired")
    return extra / fast[False], own / fast[False], own, used / fast[False]


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
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, float] = {}
    for name, size in SIZES.items():
        paired, own, seconds, resources = share(size, arguments.pairs)
        result |= {name: round(paired, 5), f"{name}_by_own_clock": round(own, 5)}
        result[name.replace("lyapunov", "resources")] = round(resources, 5)
        if name == "lyapunov_fraction":
            result["times_cheaper_than_jacrev"] = round(jacrev_seconds(size) / seconds)
    print(json.dumps(result | {"threads": arguments.threads}))


if __name__ == "__main__":
    main()
