"""What `test_mamba_ssm.py` reads: run as `python -m tests.mamba_ssm_measured`, prints one JSON object."""

import copy
import json
import sys
from collections.abc import Callable
from typing import Any

from tests import mamba_ssm_on_cpu

mamba_ssm_on_cpu.install()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from lyapft import recurrence  # noqa: E402
from lyapft.errors import InputError  # noqa: E402

TINY = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1}
CONFIGS = {
    "mamba": {**TINY, "state_size": 5},
    "falcon_mamba": {**TINY, "state_size": 5},
    "mamba2": {**TINY, "state_size": 16, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
}
LENGTH = 20
IDS = torch.randint(1, 60, (2, LENGTH), generator=torch.Generator().manual_seed(1))
Measured = dict[str, Any]


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **CONFIGS[kind])).train()


def step(model: nn.Module, mask: Tensor | None = None, ids: Tensor = IDS) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = model(input_ids=ids, attention_mask=mask)
    weights = torch.randn(output.logits.shape, generator=torch.Generator().manual_seed(2))
    (output.logits * weights * (1 if mask is None else mask[..., None])).sum().backward()
    logits = output.logits.detach()
    return logits, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(actual: tuple, expected: tuple, mask: Tensor | None = None) -> Measured:
    """Largest deviations relative to the largest value: of the logits, and of any gradient."""
    keep = torch.ones_like(IDS, dtype=torch.bool) if mask is None else mask.bool()
    assert actual[1].keys() == expected[1].keys()
    return {
        "logits": relative(actual[0][keep], expected[0][keep]),
        "gradients": max(relative(actual[1][n], expected[1][n]) for n in expected[1]),
    }


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def routed(model: nn.Module, kernel: str, **options: Any) -> tuple[nn.Module, recurrence.Seam, list[Tensor]]:
    model, seen = copy.deepcopy(model), []
    seam = recurrence.install(model, kernel, **options)
    seam.tap = lambda layer, delta, A: seen.append(delta)
    return model, seam, seen


def equality(kind: str) -> Measured:
    base, found = build(kind), {}
    left, right = torch.ones_like(IDS), torch.ones_like(IDS)
    left[0, :3], right[1, -4:] = 0, 0
    for padding, mask in {"none": None, "left": left, "right": right}.items():
        model, _, seen = routed(base, "torch")
        plain = step(model, mask)
        found[padding] = {}
        for path in ("fused", "unfused"):
            model, seam, shown = routed(base, "mamba_ssm", require="mamba_ssm", fused=path == "fused")
            result = distance(step(model, mask), plain, mask)
            result |= {"kernels": seam.kernels, "delta": relative(shown[0], seen[0])}
            found[padding][path] = result
    return found


def decoding(kind: str) -> float:
    logits = {}
    for kernel in ("torch", "mamba_ssm"):
        model, seam, _ = routed(build(kind).eval(), kernel)
        with torch.no_grad():
            cache = model(IDS[:, :9], use_cache=True).cache_params
            steps = [model(IDS[:, t : t + 1], cache_params=cache, use_cache=True).logits for t in range(9, 13)]
        logits[kernel] = torch.cat(steps, 1)
        assert all(ran.startswith(kernel) for ran in seam.kernels.values()), seam.kernels
    return relative(logits["mamba_ssm"], logits["torch"])


def packing(kind: str) -> Measured:
    """One packed row against its sequences run apart, batch of one each, the plain path."""
    base, lengths = build(kind), (7, 1, 12)
    model, seam, _ = routed(base, "mamba_ssm", require="mamba_ssm")
    seam.sequence = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].expand(2, -1)
    packed = step(model)
    apart, _, _ = routed(base, "torch")
    weights = torch.randn(packed[0].shape, generator=torch.Generator().manual_seed(2))
    pieces, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        logits = apart(input_ids=IDS[:, part]).logits
        (logits * weights[:, part]).sum().backward()
        pieces.append(logits.detach())
        start += length
    gradients = {n: p.grad for n, p in apart.named_parameters()}
    return distance(packed, (torch.cat(pieces, 1), gradients))


def adapters(kind: str) -> Measured:
    """LoRA on every projection, fused: by peft on the stock model with its guard lifted, and through the seam."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    from lyapft.peft import carry

    class Unguarded(LoraModel):
        def _check_target_module_compatiblity(self, *_: Any) -> None:
            """peft refuses out_proj by name."""

    targets = ["in_proj", "out_proj"] + (["x_proj", "dt_proj"] if kind == "mamba" else [])
    config = LoraConfig(target_modules=targets, r=2, init_lora_weights=False)
    stock = build(kind)
    torch.manual_seed(3)
    Unguarded(stock, config, "default")
    seam = recurrence.install(stock, "stock")
    _, gradients = step(stock)
    dead = {n.split(".lora_")[0].rpartition(".")[2] for n, p in stock.named_parameters() if lifeless(n, p, gradients)}
    found = {"stock": {"dead": sorted(dead), "kernels": names(seam)}}
    carried, plain = copy.deepcopy(stock), copy.deepcopy(stock)
    for kernel, model in (("mamba_ssm", carried), ("torch", plain)):
        for layer in (module for module in model.modules() if isinstance(module.__dict__.get("forward"), object)):
            layer.__dict__.pop("forward", None)
        seam = recurrence.install(model, kernel)
        carry.carry(model)
        result = step(model)
        if kernel == "mamba_ssm":
            alive, ran = result, seam
    dead = [n for n, p in carried.named_parameters() if lifeless(n, p, alive[1])]
    found["seam"] = {"dead": dead, "kernels": names(ran)} | distance(alive, result)
    return found


def names(seam: recurrence.Seam) -> list[str]:
    return sorted(name.replace("stock", "mamba_ssm") for name in seam.kernels.values())


def lifeless(name: str, parameter: nn.Parameter, gradients: dict[str, Tensor]) -> bool:
    return "lora_" in name and (name not in gradients or not bool(gradients[name].any()))


def state(kind: str) -> Measured:
    """A learned first state, and a learned offset, each against the float64 reference."""
    found: Measured = {}
    for name in (recurrence.INITIAL_STATE, recurrence.STATE_OFFSET):
        base = build(kind)
        mixer = base.backbone.layers[0].mixer
        shape = (64, 5) if kind == "mamba" else (4, 16, 16)
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(4))
        setattr(mixer, name, nn.Parameter(tensor))
        reference, _, _ = routed(base, "reference")
        model, seam, _ = routed(base, "mamba_ssm")
        left = torch.ones_like(IDS)
        left[0, :3] = 0
        result = distance(step(model, left), step(reference, left), left)
        found[name] = result | {"kernels": seam.kernels, "fallbacks": seam.fallbacks}
        if kind == "mamba" and name == recurrence.INITIAL_STATE:
            strict, _, _ = routed(base, "mamba_ssm", require="mamba_ssm")
            try:
                step(strict)
            except InputError as error:
                found["required"] = str(error)
    return found


MEASUREMENTS: dict[str, tuple[Callable[[str], Any], tuple[str, ...]]] = {
    "equality": (equality, tuple(CONFIGS)),
    "decoding": (decoding, tuple(CONFIGS)),
    "packing": (packing, tuple(CONFIGS)),
    "adapters": (adapters, ("mamba", "mamba2")),
    "state": (state, ("mamba", "mamba2")),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    only = sys.argv[1:] or MEASUREMENTS
    print(json.dumps({n: {kind: MEASUREMENTS[n][0](kind) for kind in MEASUREMENTS[n][1]} for n in only}))
