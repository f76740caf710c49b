"""Command line of the report: `python -m lyapft.report runs/STUDY [--output FILE] [--margin POINTS] …`."""

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lyapft.errors import InputError
from lyapft.report import DEFAULT_NAME, regression, write
from lyapft.verdict import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page of a study and the verdict's tables; 0 when they are there, 2 for bad input."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["compare"]:
        return regression.main(given[1:])
    parser = argparse.ArgumentParser(
        prog="python -m lyapft.report",
        description="One self-contained HTML page from a study, and its verdict as Markdown, CSV, Parquet and LaTeX. "
        "`python -m lyapft.report compare OLD NEW` compares two studies instead.",
    )
    parser.add_argument("study", type=Path, help="folder of a study, runs/STUDY")
    parser.add_argument("--output", type=Path, help=f"file to write (default: {DEFAULT_NAME} in the study's folder)")
    default = Settings()
    for name, what in (
        ("margin", "percentage points: differences inside ± this do not matter"),
        ("alpha", "risk of a false claim over a whole table"),
        ("power", "chance with which the seeds that an undecided recipe needs would decide"),
        ("spike", "percentage points: a single score further from its counterpart's is called a spike"),
        ("speed-weight", "how much time counts in the cost of a recipe"),
        ("memory-weight", "how much memory counts in the cost of a recipe"),
    ):
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=float, default=value, help=f"{what} (default: %(default)s)")
    options = parser.parse_args(given)
    gc.disable()  # all records are needed to the end: looking for garbage among them takes as long as reading them
    try:
        settings = replace(
            default,
            margin=options.margin,
            alpha=options.alpha,
            power=options.power,
            spike=options.spike,
            speed_weight=options.speed_weight,
            memory_weight=options.memory_weight,
        )
        print(write(options.study, options.output, settings))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        gc.enable()
    return 0


if __name__ == "__main__":
    sys.exit(main())
