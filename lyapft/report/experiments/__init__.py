"""Figures of experiments, from the record of each alone; `page` puts them on one."""

from collections.abc import Callable
from typing import Any

from lyapft.report.drawing import Figure
from lyapft.report.experiments import certificate, compared, stall, theorem

Content = dict[str, Any]  # the JSON record of an experiment

FIGURES: dict[str, Callable[[Content], list[Figure]]] = {
    "theorem": theorem.figures,
    "stall": stall.figures,
    "growth": compared.growth,
    "depth": compared.depth,
    "closed_loop": compared.closed_loop,
    "certificate": certificate.figures,
}


def figures(content: Content) -> list[Figure]:
    """The figures of an experiment's record."""
    return FIGURES[content["name"]](content)
