"""How long one training step takes (forward, backward, AdamW), against what a user would otherwise run.

    PYTHONPATH=. python benchmarks/train_step.py [--only lora] [--threads N] [--repeats 7] [--slow-repeats 2]

Every variant takes the same steps on the same batch, in turn within one process, so that a change in the machine's
load meets all alike. Prints a table of medians; the last line is one JSON object of ratios.
"""

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable

import torch
from lora_step import lora_vs_trainer_peft
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from lyapft import precision
from lyapft.config import PrecisionConfig
from lyapft.environment import keep_freed_memory
from lyapft.recurrence import install

VOCABULARY, HIDDEN, LAYERS = 4096, 256, 4
SHORT, LONG = (8, 128), (4, 512)  # sequences, tokens


def mamba(**options: bool) -> MambaForCausalLM:
    """Four layers of Mamba, 16 states per channel."""
    torch.manual_seed(0)
    dims = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "state_size": 16}
    return MambaForCausalLM(MambaConfig(**dims, **options)).train()


def mamba2() -> Mamba2ForCausalLM:
    """Four layers of Mamba-2: 8 heads of 64, 64 states, one group, chunks as transformers takes them."""
    torch.manual_seed(0)
    dims = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "state_size": 64}
    return Mamba2ForCausalLM(Mamba2Config(**dims, head_dim=64, num_heads=8, n_groups=1)).train()


def routed(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its recurrence on lyapft's kernels."""
    install(model, kernel="auto")
    return model


def training_step(model: torch.nn.Module, size: tuple[int, int] = SHORT) -> Callable[[], float]:
    """A function that takes one step and returns its loss; size: sequences, tokens of each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    input_ids = torch.randint(VOCABULARY, size, generator=torch.Generator().manual_seed(1))

    def step() -> float:
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def interleaved(steps: dict[str, Callable[[], float]], repeats: dict[str, int], rtol: float = 1e-4) -> dict[str, float]:
    """Median seconds per step of each variant, taken in turn, after one step that is not counted."""
    first = {name: step() for name, step in steps.items()}
    lowest, highest = min(first.values()), max(first.values())
    if highest - lowest > rtol * abs(lowest):
        raise RuntimeError(f"the variants do not compute the same loss: {first}")
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(max(repeats.values())):
        for name, step in steps.items():
            if turn < repeats[name]:
                start = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name:28s} {seconds * 1e3:10.1f} ms  (n = {len(times[name])}, fastest {min(times[name]) * 1e3:.1f} ms)")
    return medians


def recurrence(options: argparse.Namespace) -> dict[str, float]:
    """Times faster than transformers' own paths and than mambapy's, at B=8, L=128 and at B=4, L=512."""
    ratios: dict[str, float] = {}
    for size in (SHORT, LONG):
        at = f"L={size[1]}"
        mamba_1 = {
            f"mamba, lyapft, {at}": training_step(routed(mamba()), size),
            f"mamba, mambapy, {at}": training_step(mamba(use_mambapy=True), size),
        }
        ours, mambapy = interleaved(mamba_1, dict.fromkeys(mamba_1, options.repeats)).values()
        mamba_2 = {
            f"mamba2, lyapft, {at}": training_step(routed(mamba2()), size),
            f"mamba2, transformers, {at}": training_step(mamba2(), size),
        }
        ours_2, transformers = interleaved(mamba_2, dict.fromkeys(mamba_2, options.repeats)).values()
        ratios |= {
            f"mamba_{size[1]}_vs_mambapy": mambapy / ours,
            f"mamba2_{size[1]}_vs_transformers": transformers / ours_2,
        }
    slow = {"mamba, lyapft": training_step(routed(mamba())), "mamba, transformers default": training_step(mamba())}
    repeats = dict(zip(slow, (options.repeats, options.slow_repeats), strict=True))
    ours, default = interleaved(slow, repeats).values()
    return ratios | {"mamba_128_vs_transformers_default": default / ours}


def tiny(family: str) -> torch.nn.Module:
    """A model of the size of the shipped checkpoints: d = 96, two layers, vocabulary 1024."""
    torch.manual_seed(0)
    dims = {"vocab_size": 1024, "hidden_size": 96, "num_hidden_layers": 2}
    if family == "mamba":
        return routed(MambaForCausalLM(MambaConfig(**dims, state_size=8)).train())
    if family == "mamba2":
        heads = {"num_heads": 8, "head_dim": 24, "state_size": 16, "n_groups": 1}
        return routed(Mamba2ForCausalLM(Mamba2Config(**dims, **heads)).train())
    return LlamaForCausalLM(LlamaConfig(**dims, num_attention_heads=4, intermediate_size=256)).train()


def mixed_step(family: str, name: str) -> Callable[[], float]:
    """A function that takes one step in the format `name`, scaled where that format needs it, and returns its loss."""
    model = tiny(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    input_ids = torch.randint(1024, (24, 64), generator=torch.Generator().manual_seed(1))
    strategy = precision.build(PrecisionConfig(name=name, emulate="always", init_scale=1024.0), "cpu")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=name == "fp16")

    def step() -> float:
        with strategy:
            with strategy.autocast():
                loss = model(input_ids=input_ids, labels=input_ids).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def half_formats(options: argparse.Namespace) -> dict[str, float]:
    """Times the time of a float32 step on tiny models, per family; `bf16_vs_fp32`, `fp16_vs_fp32` are the worst.

    Half products are emulated on every machine: this measures the emulation's own cost.
    """
    ratios: dict[str, float] = {}
    for family in ("mamba", "mamba2", "llama"):
        steps = {f"{family}, {name}": mixed_step(family, name) for name in ("fp32", "bf16", "fp16")}
        seconds = interleaved(steps, dict.fromkeys(steps, 3 * options.repeats), rtol=1e-2)
        for name in ("bf16", "fp16"):
            ratio = ratios[f"{family}_{name}_vs_fp32"] = seconds[f"{family}, {name}"] / seconds[f"{family}, fp32"]
            ratios[f"{name}_vs_fp32"] = max(ratio, ratios.get(f"{name}_vs_fp32", 0.0))
    return ratios


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "recurrence": recurrence,
    "half_formats": half_formats,
    "lora": lora_vs_trainer_peft,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(MEASUREMENTS), action="append", help="run these measurements only")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each variant")
    parser.add_argument(
        "--slow-repeats", type=int, default=2, help="timed steps of transformers' default Mamba (20 s each)"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as a cell does; every variant profits
    logging.getLogger("transformers").setLevel(logging.ERROR)
    print(f"torch {torch.__version__}, {options.threads} threads")
    ratios: dict[str, float] = {}
    for name in options.only or MEASUREMENTS:
        ratios |= MEASUREMENTS[name](options)
    print(json.dumps({name: round(value, 3) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
