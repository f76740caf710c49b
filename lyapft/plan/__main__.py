"""Command line of the planner: `python -m lyapft.plan [study=…] [overrides of train.py] [--fits 24GB] [--gpu] …`."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

UNITS = {"B": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan of a command; 0 when all of it fits, 1 when some cell does not, 2 for bad input."""
    given = _parser().parse_intermixed_args(arguments)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # read at import: a plan fetches no weights
        os.environ[name] = "1"
    from lyapft import secrets
    from lyapft.errors import InputError

    logging.basicConfig(level=logging.ERROR)
    try:
        if found := secrets.faults({}, given.overrides):  # before Hydra, whose messages repeat what was typed
            raise InputError("; ".join(found))
        shown, fits = _plan(given)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(shown)
    return 0 if fits else 1


def _plan(given: argparse.Namespace) -> tuple[str, bool]:
    import psutil

    from lyapft.plan import cells, file, gpu, page, prediction
    from lyapft.plan.cores import jobs_of

    card = gpu.Card(given.tflops * 1e12, given.tflops_tf32 * 1e12, given.tflops_fp32 * 1e12, given.utilisation)
    with cells.composing():
        command = cells.composed(given.overrides)
        planned = cells.cells(command)
        found = prediction.predict(planned, card, every=given.gpu, progress=lambda line: print(line, file=sys.stderr))
    states: dict[str, str] = {}
    for folder in {Path(one.config.runs) / one.config.study.name for one in planned}:
        states |= file.states([file.entry(one) for one in planned], file.records_in(folder))
    memory = given.fits
    limits = page.Limits(
        memory or psutil.virtual_memory().total, memory or card.memory, jobs_of(command.hydra.launcher), given.gpus
    )
    fits = all(limits.fits(one) is not False for one in found.values())
    return page.text(planned, states, found, limits, card), fits


def _parser() -> argparse.ArgumentParser:
    from lyapft.plan.gpu import Card

    card = Card()
    parser = argparse.ArgumentParser(
        prog="python -m lyapft.plan",
        description="Every cell that `python train.py` would run with the same overrides, its references and reruns "
        "with it: predicted time and memory, whether it fits, and what is done already. Cells that can run here are "
        "calibrated by short ones, which are kept; the others are modelled for a GPU.",
    )
    parser.add_argument("overrides", nargs="*", help="as behind train.py -m: study=matrix model=a,b 'seed=range(3)'")
    parser.add_argument("--fits", type=_size, metavar="24GB", help="memory to fit in, instead of what there is")
    parser.add_argument("--gpu", action="store_true", help="model every cell for a GPU, calibrate none")
    help_ = "when the study would end on so many of the GPUs, and what it leaves on disk"
    parser.add_argument("--gpus", type=_counts, default=(), metavar="8,64", help=help_)
    for name, peak, what in (
        ("tflops", card.half, "in bf16 and fp16"),
        ("tflops-tf32", card.tf32, "in tf32"),
        ("tflops-fp32", card.single, "in float32"),
    ):
        help_ = f"the GPU's peak {what}, 10^12 operations/s (default: %(default)g, an A100)"
        parser.add_argument(f"--{name}", type=float, default=peak / 1e12, help=help_)
    help_ = "share of the peak that training reaches: an assumption (default: %(default)g)"
    parser.add_argument("--utilisation", type=float, default=card.utilisation, help=help_)
    return parser


def _counts(given: str) -> tuple[int, ...]:
    counts = given.split(",")
    if not all(one.isdecimal() and int(one) for one in counts):
        raise argparse.ArgumentTypeError(f"{given!r} are no numbers of GPUs: write 8 or 8,64,512")
    return tuple(map(int, counts))


def _size(given: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B)", given.strip(), re.IGNORECASE)
    if found is None or found[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"{given!r} is no size: write 24GB or 24GiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


if __name__ == "__main__":
    sys.exit(main())
