"""What this machine has: `python -m lyapft.doctor` prints versions, kernels, the path each recurrence takes, and what
to install for a better one.

Exit code 0 where lyapft can run, 1 where something that it needs is missing; a container's health check.
"""

import argparse
import importlib.metadata
import json
import os
import sys
from dataclasses import asdict, dataclass

NEEDED = ("torch", "transformers", "peft", "lightning", "hydra-core", "omegaconf", "datasets", "torchmetrics", "wandb")
KERNELS = ("numba", "triton", "mamba-ssm", "causal-conv1d")
MODELS = {
    "selective_scan": "mamba, falcon_mamba, jamba, zamba",
    "ssd": "mamba2, bamba, falcon_h1, granitemoehybrid, nemotron_h, zamba2",
    "causal_conv1d": "the convolution of all of them",
}
WORDS = {"cpu": "compiled for this CPU by numba", "torch": "plain torch", "mamba_ssm": "mamba-ssm's CUDA kernels"}


@dataclass
class Findings:
    """What was found; a version is None where the package is absent.

    Attributes:
        versions: package -> version. cuda: why there is no GPU, or its name. half: format -> native or emulated.
        paths: device -> operation -> (kernel that kernel=auto runs, why it is not the preferred one).
        advice: one line each on what to install or set.
    """

    python: str
    versions: dict[str, str | None]
    cpu: str
    threads: int
    cuda: str
    half: dict[str, str]
    paths: dict[str, dict[str, tuple[str, str | None]]]
    advice: list[str]

    @property
    def healthy(self) -> bool:
        """Whether every package that lyapft needs is there."""
        return all(self.versions[name] for name in NEEDED)


def examine() -> Findings:
    """Look at this machine; loads torch, runs nothing."""
    versions = {name: _version(name) for name in (*NEEDED, *KERNELS, "lyapft")}
    missing = [name for name in NEEDED if versions[name] is None]
    if missing:
        advice = [f"pip install {' '.join(missing)}: lyapft cannot run without"]
        return Findings(sys.version.split()[0], versions, "", os.cpu_count() or 1, "not asked", {}, {}, advice)
    import torch

    from lyapft import recurrence
    from lyapft.environment import cpu_name, resolve_threads
    from lyapft.precision.hardware import NATIVE, has_half_arithmetic

    has_cuda = torch.cuda.is_available()
    devices = ["cpu"] + (["cuda"] if has_cuda else [])
    paths = {device: recurrence.describe(device) for device in devices}
    half = {
        str(dtype).removeprefix("torch."): "native" if has_half_arithmetic(dtype) else "emulated on a CPU"
        for dtype in NATIVE
    }
    advice = [
        f"{operation} on {device} runs plain torch: {reason}"
        for device, operations in paths.items()
        for operation, (_, reason) in operations.items()
        if reason
    ]
    built = torch.version.cuda
    cuda = torch.cuda.get_device_name() if has_cuda else f"none: {_why_no_cuda(built)}"
    if not has_cuda and built is None:
        advice.append(
            "for a GPU: a CUDA build of torch (https://pytorch.org/get-started), then pip install -e '.[cuda]'"
        )
    return Findings(sys.version.split()[0], versions, cpu_name(), resolve_threads(None), cuda, half, paths, advice)


def _why_no_cuda(built: str | None) -> str:
    return "this torch is built without CUDA" if built is None else f"torch is built for CUDA {built}, but sees no GPU"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def text(found: Findings) -> str:
    """The findings as a person reads them."""
    lines = [f"lyapft {found.versions['lyapft'] or '(not installed)'}, Python {found.python}", "", "packages"]
    lines += [f"  {name:14s} {found.versions[name] or 'MISSING'}" for name in NEEDED]
    lines += ["", "kernels"] + [f"  {name:14s} {found.versions[name] or 'not installed'}" for name in KERNELS]
    lines += ["", "machine", f"  CPU            {found.cpu}, {found.threads} threads", f"  GPU            {found.cuda}"]
    lines += [f"  {name:14s} {how}" for name, how in found.half.items()]
    for device, operations in found.paths.items():
        lines += ["", f"what kernel=auto runs on {device}"]
        for name, (kernel, _) in operations.items():
            lines.append(f"  {name:14s} {WORDS[kernel]:32s} ({MODELS[name]})")
    lines += ["", "to do"] + [f"  {line}" for line in found.advice or ["nothing: every path is the preferred one"]]
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m lyapft.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a page")
    options = parser.parse_args()
    found = examine()
    print(json.dumps(asdict(found)) if options.json else text(found))
    return 0 if found.healthy else 1


if __name__ == "__main__":
    sys.exit(main())
