"""The selective-scan and SSD mixers of a model, known by what they hold, whether or not a seam is installed."""

from torch import nn


def mixers(model: nn.Module) -> dict[str, nn.Module]:
    """Mixers by full name: modules with a decay `A_log` between an `in_proj` and an `out_proj`."""
    marks = ("A_log", "in_proj", "out_proj")
    return {name: m for name, m in model.named_modules() if all(hasattr(m, mark) for mark in marks)}


def is_selective_scan(mixer: nn.Module) -> bool:
    """Whether its decay has one entry per channel and state (Mamba-1), not one per head (Mamba-2)."""
    return mixer.A_log.dim() > 1  # type: ignore[operator]
