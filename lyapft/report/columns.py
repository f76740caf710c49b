"""What the tables of a study say: records as columns of text."""

import math
from collections.abc import Callable, Sequence
from functools import partial

from lyapft.divergence import SPIKE_POINTS, is_spike
from lyapft.records import Record, accuracies, costs, divergence_entry
from lyapft.report.cells import COUNTERPARTS, COUNTERPARTS_SHORT, Study, choice, read
from lyapft.report.tables import ABSENT, NOT_APPLICABLE, Column
from lyapft.verdict.words import EMULATED

STATUS_MARK = {"ok": "✓", "running": "…", "interrupted": "○"}  # every other status is a failure: ✗


def number(value: object, form: str) -> str:
    """A number in the given format, or a dash where there is none."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return ABSENT
    return format(value, form).replace("-", "−")


def status_text(record: Record) -> str:
    """The status with a mark that reads without colour."""
    status = str(record.get("status", "?"))
    return f"{STATUS_MARK.get(status, '✗')} {status}"


def stability_text(record: Record, field: str) -> str:
    """λ_max or margin to three digits; n/a for a model without a recurrent state."""
    if read(record, "stability", "not_applicable"):
        return NOT_APPLICABLE
    return number(read(record, "stability", field), "#.3g")


def divergence_text(record: Record, counterpart: str) -> str:
    """Mean absolute divergence in points, or why there is none."""
    entry = divergence_entry(record, counterpart)
    if entry is None:
        return ABSENT
    if entry.get("status") != "ok":
        return str(entry.get("status"))
    return number(entry.get("mean_abs_points"), ".2f")


def score_keys(all_records: Sequence[Record]) -> list[tuple[str, int]]:
    """Every (task, shots) that any record has, tasks in order of appearance, shots ascending."""
    found = [(str(score["task"]), int(score["shots"])) for record in all_records for score in accuracies(record)]
    tasks = list(dict.fromkeys(task for task, _ in found))
    return sorted(set(found), key=lambda key: (tasks.index(key[0]), key[1]))


def summary_columns(all_records: Sequence[Record], names: Sequence[str]) -> list[Column]:
    """The summary of a study: a row per cell."""

    def column(group: str, title: str, text: Callable[[Record], str], numeric: bool = True) -> Column:
        return Column(group, title, [text(record) for record in all_records], numeric)

    def score_column(task: str, shots: int) -> Column:
        def text(record: Record) -> str:
            match = [s for s in accuracies(record) if (s["task"], s["shots"]) == (task, shots)]
            return number(match[0]["value"], ".3f") if match else ABSENT

        return column(task, f"{shots}-shot", text)

    columns = [Column("", "cell", list(names), numeric=False)]
    columns.append(column("", "status", status_text, numeric=False))
    columns.append(column("", "role", lambda record: str(record.get("role", ABSENT)), numeric=False))
    columns.append(column("", "loss", lambda record: number(read(record, "training", "loss_mean_last_10pct"), ".3f")))
    columns += [score_column(task, shots) for task, shots in score_keys(all_records)]
    columns += [
        column("nats/token", "λ_max", lambda record: stability_text(record, "lambda_max")),
        column("nats/token", "margin", lambda record: stability_text(record, "margin")),
    ]
    for counterpart in COUNTERPARTS:
        title = f"from {COUNTERPARTS_SHORT[counterpart]}"
        columns.append(column("divergence (points)", title, partial(divergence_text, counterpart=counterpart)))
    if any(read(record, "training", "skipped_steps") for record in all_records):
        columns.append(
            column("", "skipped steps", lambda record: number(read(record, "training", "skipped_steps"), "d"))
        )
    columns.append(column("", "tokens/s", speed_text))
    columns.append(column("", "peak MiB", lambda record: _mebibytes(costs(record).get("peak_bytes"))))
    if any(record.get("oom") for record in all_records):
        columns.append(column("", "memory ran out", halved_text, numeric=False))
    return columns


def speed_text(record: Record) -> str:
    """Training speed, marked where half precision was emulated, as that is no hardware's."""
    speed = number(costs(record).get("tokens_per_s"), ",.0f")
    return f"{speed} {EMULATED}" if speed != ABSENT and read(record, "precision", "emulated") else speed


def halved_text(record: Record) -> str:
    """What a cell did with less of at once, and from where on: its cost is no other's.

    >>> training = {"during": "training", "step": 7, "rows": 12}
    >>> halved_text({"oom": [training, {"during": "evaluation", "batch_tokens": 4096}]})
    '12 rows at once from step 7, scored 4,096 tokens at once'
    """
    how = {
        "training": "{rows} rows at once from step {step}",
        "selection": "selected with {rows} rows at once",
        "validation": "validated with {rows} rows at once",
        "evaluation": "scored {batch_tokens:,} tokens at once",
    }
    texts = [how[entry["during"]].format(**entry) for entry in record.get("oom") or []]
    return ", ".join(texts) or ABSENT


def _mebibytes(count: object) -> str:
    return number(count / 2**20, ",.0f") if isinstance(count, int | float) else ABSENT


def errors(all_records: Sequence[Record], names: Sequence[str]) -> list[tuple[str, str]]:
    """Label and error of every cell that has one."""
    found = []
    for record, name in zip(all_records, names, strict=True):
        if error := record.get("error"):
            found.append((name, f"{error.get('type', 'error')}: {error.get('message', '')}"))
    return found


def divergence_columns(study: Study, threshold_points: float = SPIKE_POINTS) -> list[Column]:
    """Signed divergence per score and the share of flipped answers: a row per pair of cell and counterpart."""
    pairs = [
        (cell, counterpart, entry)
        for counterpart in COUNTERPARTS
        for cell in study.cells
        if (entry := divergence_entry(cell.record, counterpart)) and entry.get("status") == "ok"
    ]
    if not pairs:
        return []
    signed = [{(s["task"], s["shots"]): float(s["signed_points"]) for s in entry["per_score"]} for *_, entry in pairs]

    def text(value: float | None) -> str:
        if value is None:
            return ABSENT
        mark = "" if not is_spike(value, threshold_points) else ("▲ " if value > 0 else "▼ ")
        return mark + (number(value, "+.2f") if value else "0.00")

    columns = [Column("", "cell", [cell.label for cell, *_ in pairs], numeric=False)]
    columns.append(
        Column("", "against", [COUNTERPARTS_SHORT[counterpart] for _, counterpart, _ in pairs], numeric=False)
    )
    for task, shots in score_keys([cell.record for cell in study.cells]):
        columns.append(Column(task, f"{shots}-shot", [text(row.get((task, shots))) for row in signed]))
    columns.append(Column("", "mean |Δ|", [number(entry.get("mean_abs_points"), ".2f") for *_, entry in pairs]))
    flips = [study.flips(cell, counterpart) for cell, counterpart, _ in pairs]
    columns.append(
        Column(
            "items",
            "answers flipped",
            [f"{f.flipped:,} of {f.n:,} ({100 * f.rate:.1f}%)" if f else ABSENT for f in flips],
        )
    )
    columns.append(Column("items", "gained / lost", [f"{f.gained} / {f.lost}" if f else ABSENT for f in flips]))
    return columns


def provenance_columns(study: Study) -> list[Column]:
    """What ran: formats, kernels, parameters, data and machine of each cell."""

    def column(title: str, text: Callable[[Record], str], numeric: bool = False) -> Column:
        return Column("", title, [text(cell.record) for cell in study.cells], numeric)

    def precision(record: Record) -> str:
        effective = read(record, "precision", "effective") or ABSENT
        requested = read(record, "precision", "requested") or choice(record, "precision")
        arrow = "" if effective in (requested, ABSENT) else f"{requested} → "
        return f"{arrow}{effective}{f' {EMULATED}' if read(record, 'precision', 'emulated') else ''}"

    def parameters(record: Record) -> str:
        parts = [number(read(record, "model", f"parameters_{part}"), ",d") for part in ("trainable", "total")]
        return " / ".join(parts)

    def kernels(record: Record) -> str:
        return ", ".join(f"{op}: {name}" for op, name in (record.get("kernels") or {}).items()) or ABSENT

    return [
        Column("", "cell", [cell.label for cell in study.cells], numeric=False),
        column("id", lambda record: str(record.get("id", ABSENT))),
        column("precision that ran", precision),
        column("recurrence kernels", kernels),
        column("trainable / all parameters", parameters, numeric=True),
        column("data", lambda record: f"{read(record, 'data', 'name')} {str(read(record, 'data', 'hash'))[:8]}"),
        column("rows", lambda record: number(read(record, "data", "rows"), ",d"), numeric=True),
        column("truncated", lambda record: number(read(record, "data", "rows_truncated"), ",d"), numeric=True),
        column("seconds", lambda record: number(read(record, "cost", "wall_s"), ",.0f"), numeric=True),
        column("device", lambda record: str(read(record, "environment", "device") or ABSENT)),
        column("started", lambda record: str(record.get("created", ABSENT))[:19].replace("T", " ")),
    ]
