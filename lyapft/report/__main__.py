"""Command line of the report: `python -m lyapft.report runs/STUDY [--output FILE]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lyapft.errors import InputError
from lyapft.report import DEFAULT_NAME, write


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page of a study; 0 when it is there, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m lyapft.report", description="One self-contained HTML page from a study."
    )
    parser.add_argument("study", type=Path, help="folder of a study, runs/STUDY")
    parser.add_argument("--output", type=Path, help=f"file to write (default: {DEFAULT_NAME} in the study's folder)")
    options = parser.parse_args(arguments)
    try:
        print(write(options.study, options.output))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
