"""What live adapters on the layers whose weights are read raw cost: a LoRA step against one with LoRA on in_proj alone.

    python benchmarks/adapters.py [--repeats 15] [--threads N]

Every variant takes the same steps (forward, backward, AdamW) on the same batch, in turn within one process: Mamba and
Mamba-2, hidden 256, 4 layers, B = 8, L = 128, r = 8. `live` adapts the mixer's other layers (x_proj, dt_proj, conv1d,
out_proj; Mamba-2: conv1d, out_proj), `every` those and in_proj. `linear` leaves the convolution out, and `passed by`
is `linear` with peft's layers as they are, so that the adapter of dt_proj gets no gradient: the difference is what
carrying costs. Prints medians; the last line is one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lyapft.backbone import Backbone
from lyapft.peft import Lora, adapted_layers
from lyapft.peft.carry import Carried
from lyapft.recurrence import install

VOCABULARY, HIDDEN, LAYERS, BATCH, LENGTH, RANK = 4096, 256, 4, 8, 128, 8
DIMS = {
    "mamba": {"state_size": 16},
    "mamba2": {"state_size": 128, "head_dim": 64, "num_heads": 8, "n_groups": 1, "tie_word_embeddings": True},
}
OTHERS = {"mamba": ["x_proj", "dt_proj", "conv1d", "out_proj"], "mamba2": ["conv1d", "out_proj"]}


def adapted(kind: str, targets: list[str], carried: bool = True) -> PreTrainedModel:
    """A model with LoRA on targets; without carrying, as peft leaves it."""
    torch.manual_seed(0)
    dims = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS} | DIMS[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **dims)).train()
    base = Backbone(model, None, kind, kind, "", None, None)  # type: ignore[arg-type]  # no text is read
    Lora(r=RANK, targets=targets).attach(base, install(model))
    if not carried:
        for _, layer in adapted_layers(model):
            if isinstance(layer, Carried):
                layer.__class__ = type(layer).__mro__[2]  # peft's own, behind the two that carry
    return model


def training_step(model: PreTrainedModel) -> Callable[[], None]:
    """A function that takes one step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    input_ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def interleaved(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds per step of each variant, taken in turn, after two steps that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure both families."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    result: dict[str, float] = {"threads": torch.get_num_threads()}
    for kind, others in OTHERS.items():
        variants = {
            "in_proj": adapted(kind, ["in_proj"]),
            "live": adapted(kind, others),
            "every": adapted(kind, ["in_proj", *others]),
        }
        called = [name for name in others if name != "conv1d"]
        variants["linear"] = adapted(kind, ["in_proj", *called])
        variants["passed by"] = adapted(kind, ["in_proj", *called], carried=False)
        medians = interleaved({name: training_step(model) for name, model in variants.items()}, options.repeats)
        for name, seconds in medians.items():
            print(f"{kind:8s} {name:14s} {seconds * 1e3:8.1f} ms  {seconds / medians['in_proj']:.3f}")
        result |= {f"{kind}_{name.replace(' ', '_')}_vs_in_proj": s / medians["in_proj"] for name, s in medians.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
