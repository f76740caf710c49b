"""Figures of experiments, from the record of each alone; `page` puts them on one."""

from collections.abc import Callable
from typing import Any

from lyapft.errors import InputError
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
    """The figures of an experiment's record.

    Raises:
        InputError: it is that of no experiment known here, or not whole.
    """
    try:
        return FIGURES[content["name"]](content)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        name = content.get("name") if isinstance(content, dict) else None
        raise InputError(
            f"an experiment named {name!r} cannot be drawn ({type(error).__name__}: {error}): its record is not whole, "
            f"or of another lyapft; known are {', '.join(FIGURES)}"
        ) from None
