"""A plan as text: every cell, what each recipe's memory holds, and the sum."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from operator import add

from lyapft.plan import fleet
from lyapft.plan.cells import Planned
from lyapft.plan.file import NOT_RUN
from lyapft.plan.gpu import Card
from lyapft.plan.prediction import MEASURED, MODELLED, Prediction
from lyapft.plan.sizes import Memory
from lyapft.records import FINAL

MIB = 2**20
Predictions = Mapping[tuple[str, int], Prediction]


@dataclass(frozen=True)
class Limits:
    """Bytes that a cell may take, where it is measured here and where it is modelled; cells run at a time, and on
    how many GPUs."""

    here: int
    card: int
    jobs: int = 1
    gpus: tuple[int, ...] = ()

    def of(self, found: Prediction) -> int:
        """Bytes that a cell with this prediction may take."""
        return self.here // self.jobs if found.source == MEASURED else self.card

    def fits(self, found: Prediction) -> bool | None:
        """Whether a cell fits; None where its memory is not known."""
        return None if found.memory is None else found.memory.total <= self.of(found)

    def rows(self, found: Prediction, batch_size: int) -> int:
        """The rows per micro-batch with which a cell would fit, from what it takes with `batch_size`; 0 for none."""
        if found.memory is None:
            return 0
        per_batch = found.memory.activations + found.memory.logits
        return max(0, int((self.of(found) - (found.memory.total - per_batch)) / per_batch * batch_size))


def text(cells: Sequence[Planned], states: Mapping[str, str], found: Predictions, limits: Limits, card: Card) -> str:
    """The whole page."""
    parts = [_cells(cells, states, found, limits), _recipes(cells, found), _total(cells, states, found, limits)]
    if any(one.source == MODELLED for one in found.values()):
        parts.append(_model(card))
    return "\n\n".join(parts)


def _cells(cells: Sequence[Planned], states: Mapping[str, str], found: Predictions, limits: Limits) -> str:
    rows = [("cell", "role", "status", "time", "memory", "fits")]
    for one in cells:
        own = found[one.recipe, one.threads]
        memory = "?" if own.memory is None else _bytes(own.memory.total)
        fits = {True: "yes", False: "NO", None: "?"}[limits.fits(own)]
        if fits == "NO" and one.config.trainer.steps:
            rows_fit = limits.rows(own, one.config.trainer.batch_size)
            fits = f"NO, {rows_fit or 'not even 1'} row{'s' * (rows_fit > 1)} of {one.config.trainer.batch_size}"
        rows.append((_name(one), one.role, states.get(one.key, NOT_RUN), duration(own.seconds), memory, fits))
    return _table(rows)


def _recipes(cells: Sequence[Planned], found: Predictions) -> str:
    """What the memory of each recipe holds, in MiB."""
    parts = [part.name for part in fields(Memory)]
    rows: dict[tuple[str, int], tuple[str, ...]] = {}
    notes: list[str] = []
    for one in cells:
        own = found[one.recipe, one.threads]
        held = ("?" for _ in parts) if own.memory is None else (f"{getattr(own.memory, p) / MIB:,.1f}" for p in parts)
        if own.note and own.note not in notes:
            notes.append(own.note)
        how = own.source + (f" [{notes.index(own.note) + 1}]" if own.note else "")
        rows.setdefault((one.recipe, one.threads), (_recipe(one), *held, how))
    table = _table([("recipe", *parts, "how"), *rows.values()])
    return "\n".join(["Memory in MiB:", table, *(f"[{place}] {note}" for place, note in enumerate(notes, 1))])


def _total(cells: Sequence[Planned], states: Mapping[str, str], found: Predictions, limits: Limits) -> str:
    left = [one for one in cells if states.get(one.key, NOT_RUN) not in FINAL]
    own = [found[one.recipe, one.threads] for one in left]
    lines = [f"{len(cells)} cells, {len(cells) - len(left)} done already, {len(left)} to run."]
    here = sum(p.seconds for p in own if p.source == MEASURED and p.seconds is not None)
    card = sum(p.seconds for p in own if p.source == MODELLED and p.seconds is not None)
    if here:
        beside = f", {limits.jobs} at a time {duration(here / limits.jobs)}" if limits.jobs > 1 else ""
        lines.append(f"On this machine: {duration(here)} of work{beside}, the start of Python and the report besides.")
    if card:
        lines.append(f"On the modelled GPU: {card / 3600:,.0f} GPU hours.")
        modelled = [p.seconds for p in own if p.source == MODELLED and p.seconds is not None]
        lines += [f"On {gpus} of them: {fleet.wall(modelled, gpus) / 3600:,.1f} hours." for gpus in limits.gpus]
        if limits.gpus:
            lines.append(f"The longest cell takes {duration(max(modelled))}.")
    if limits.gpus:
        left_ = reduce(add, (found[one.recipe, one.threads].left for one in cells))
        lines.append(
            f"On disk: {left_.records / 1e9:,.1f} GB of records, series and answers, {left_.weights / 1e9:,.0f} GB of "
            f"trained tensors. To W&B: {left_.sent / 1e9:,.1f} GB."
        )
    if unknown := sum(p.seconds is None for p in own):
        lines.append(f"Of {unknown} the time is not known.")
    if too_large := sum(limits.fits(p) is False for p in own):
        lines.append(f"{too_large} do NOT fit.")
    return "\n".join(lines)


def _model(card: Card) -> str:
    return (
        "GPU times are a model, not measured on any: operations of training and scoring over "
        f"{card.half / 1e12:g} (half), {card.tf32 / 1e12:g} (tf32) and {card.single / 1e12:g} (fp32) TFLOP/s at "
        f"{card.utilisation:.0%} of the peak, rows at data.max_length tokens. Their memory counts tensors, without "
        "workspaces and fragmentation: leave some room."
    )


def _name(one: Planned) -> str:
    rerun = f" r{one.config.replicate}" if one.config.replicate else ""
    return f"{_recipe(one)} s{one.seed}{rerun}"


def _recipe(one: Planned) -> str:
    names = " · ".join(one.choices[group] for group in ("model", "data", "precision", "peft"))
    return f"{names} ({one.threads} thread{'s' * (one.threads > 1)})"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numbers = [i > 0 and any(row[i][:1].isdigit() for row in rows[1:]) for i in range(len(widths))]
    lines = [
        "  ".join(
            text.rjust(w) if number else text.ljust(w) for text, w, number in zip(row, widths, numbers, strict=True)
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in [lines[0], "─" * len(lines[0]), *lines[1:]])


def _bytes(count: int) -> str:
    return f"{count / MIB:,.0f} MiB" if count < 10 * 2**30 else f"{count / 2**30:,.1f} GiB"


def duration(seconds: float | None) -> str:
    """A time as people say it.

    >>> duration(75), duration(7300), duration(None)
    ('1 min 15 s', '2 h 1 min', '?')
    """
    if seconds is None:
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"
