"""What each planned cell will take: measured by calibration where the cell can run here, else modelled for a GPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from lyapft import cell
from lyapft.environment import resolve_device
from lyapft.errors import InputError
from lyapft.plan import calibration, fleet, gpu, sizes
from lyapft.plan.cells import Planned
from lyapft.plan.fleet import NOTHING, Bytes
from lyapft.plan.gpu import Card
from lyapft.plan.sizes import Memory

LARGEST = 3e12  # operations of a calibration on a CPU: a minute or so
MEASURED, MODELLED = "measured here", "model of a GPU"


@dataclass(frozen=True)
class Prediction:
    """Time and memory of a cell.

    Attributes:
        seconds: wall time; None where it is not known. memory: None where the model's sizes are not known.
        source: MEASURED or MODELLED. note: why it is not the one or neither.
        left: bytes that it leaves on disk and sends.
    """

    seconds: float | None
    memory: Memory | None
    source: str
    note: str = ""
    left: Bytes = NOTHING


def predict(
    planned: Sequence[Planned], card: Card, every: bool = False, progress: Callable[[str], None] = lambda _: None
) -> dict[tuple[str, int], Prediction]:
    """A prediction for each recipe and thread count.

    Args:
        planned: cells.
        card: the GPU to model for cells that cannot run here. every: model it for all, calibrate none.
        progress: told which recipe is being calibrated.
    """
    found: dict[tuple[str, int], Prediction] = {}
    todo = calibration.recipes(planned)
    for place, one in enumerate(todo, 1):
        if not every:
            choices = one.choices
            name = " · ".join(choices[group] for group in ("model", "data", "precision", "peft"))
            progress(f"calibrating {place}/{len(todo)}: {name}, {one.threads} threads")
        found[one.recipe, one.threads] = _predict(one, card, every)
    return found


def _predict(one: Planned, card: Card, every: bool) -> Prediction:
    try:
        counted = sizes.count(one.config)
    except InputError as error:
        return Prediction(None, None, MODELLED, str(error).splitlines()[0])
    note = ""
    if not every:
        try:
            return _measured(one, counted)
        except (InputError, cell.CellFailed) as error:
            note = f"not calibrated: {_first_fault(error)}"
    return _modelled(one, counted, card, note)


def _measured(one: Planned, counted: sizes.Sizes) -> Prediction:
    cfg, device = one.config, resolve_device(one.config.device)[0]
    operations = calibration.STEPS * gpu.tokens_in_flight(cfg) * counted.training_operations(cfg.data.max_length)
    if device == "cpu" and operations > LARGEST:
        raise InputError("too large to calibrate on a CPU")
    short = calibration.calibrate(one)
    seconds = short.seconds(cfg.trainer.steps, calibration.queries(cfg))
    process = psutil.Process().memory_info().rss if device == "cpu" else 0
    memory = counted.memory(cfg.precision.name, gpu.tokens_in_flight(cfg), process=process)
    if short.peak_bytes is not None:  # what is not accounted for otherwise is held for the backward pass, or for work
        rest = memory.training - memory.activations
        memory = counted.memory(cfg.precision.name, gpu.tokens_in_flight(cfg), max(0, short.peak_bytes - rest), process)
    return Prediction(seconds, memory, MEASURED, left=fleet.left(cfg, counted))


def _modelled(one: Planned, counted: sizes.Sizes, card: Card, note: str) -> Prediction:
    cfg = one.config
    seconds = gpu.seconds(cfg, counted, card)
    if seconds is None:
        note = note or f"task {cfg.task.name} has no published size here"
    memory = counted.memory(cfg.precision.name, gpu.tokens_in_flight(cfg))
    return Prediction(seconds, memory, MODELLED, note, fleet.left(cfg, counted))


def _first_fault(error: Exception) -> str:
    lines = [line.strip(" -") for line in str(error).splitlines() if not line.endswith("cannot run:")]
    return lines[0] if lines else type(error).__name__
