"""Tables of a study, built once as text cells and shown either in a terminal or as HTML."""

import html
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lyapft.divergence import SPIKE_POINTS
from lyapft.records import Record
from lyapft.report.cells import COUNTERPARTS, Study, choice, divergence_entry, labels, ordered, read

ABSENT = "–"
NOT_APPLICABLE = "n/a"
STATUS_MARK = {"ok": "✓", "running": "…", "interrupted": "‖"}  # every other status is a failure: ✗
DIVERGENCE_TITLES = {"paper": "from fp32 full", "precision_only": "from fp32 same peft"}


@dataclass(frozen=True)
class Column:
    """One column: its heading (`group` spans neighbours), its cells, and whether those are numbers."""

    group: str
    title: str
    cells: list[str]
    numeric: bool = True


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
    return number(read(record, "stability", field), ".3g")


def divergence_text(record: Record, counterpart: str) -> str:
    """Mean absolute divergence in points, or why there is none."""
    entry = divergence_entry(record, counterpart)
    if entry is None:
        return ABSENT
    if entry.get("status") != "ok":
        return {"self": "is it", "missing": "missing"}.get(str(entry.get("status")), str(entry.get("status")))
    return number(entry.get("mean_abs_points"), ".2f")


def score_keys(all_records: Sequence[Record]) -> list[tuple[str, int]]:
    """Every (task, shots) that any record has, tasks in order of appearance, shots ascending."""
    found = [(str(score["task"]), int(score["shots"])) for record in all_records for score in record.get("scores") or []]
    tasks = list(dict.fromkeys(task for task, _ in found))
    return sorted(set(found), key=lambda key: (tasks.index(key[0]), key[1]))


def summary_columns(all_records: Sequence[Record], names: Sequence[str]) -> list[Column]:
    """The summary of a study: a row per cell."""

    def column(group: str, title: str, text: Callable[[Record], str], numeric: bool = True) -> Column:
        return Column(group, title, [text(record) for record in all_records], numeric)

    def score_column(task: str, shots: int) -> Column:
        def text(record: Record) -> str:
            match = [s for s in record.get("scores") or [] if (s["task"], s["shots"]) == (task, shots)]
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
        title = DIVERGENCE_TITLES[counterpart]
        columns.append(column("divergence (points)", title, lambda record, name=counterpart: divergence_text(record, name)))  # type: ignore[misc]
    if any(read(record, "training", "skipped_steps") for record in all_records):
        columns.append(column("", "skipped steps", lambda record: number(read(record, "training", "skipped_steps"), "d")))
    columns.append(column("", "tokens/s", lambda record: number(read(record, "cost", "tokens_per_s"), ",.0f")))
    columns.append(column("", "peak MiB", lambda record: _mebibytes(read(record, "cost", "peak_bytes"))))
    return columns


def _mebibytes(count: object) -> str:
    return number(count / 2**20, ",.0f") if isinstance(count, int | float) else ABSENT


def errors(all_records: Sequence[Record], names: Sequence[str]) -> list[tuple[str, str]]:
    """Label and error of every cell that has one."""
    found = []
    for record, name in zip(all_records, names, strict=True):
        if error := record.get("error"):
            found.append((name, f"{error.get('type', 'error')}: {error.get('message', '')}"))
    return found


def summary_table(all_records: Sequence[Record], width: int | None = None) -> str:
    """The closing table of a study as plain text: a row per cell, then the error of each failed cell.

    Args:
        all_records: records of one study, at any stage.
        width: columns of the terminal; a wider table is cut into blocks that each repeat the cells' names. None asks the terminal.
    """
    if not all_records:
        return "no cells"
    shown = ordered(all_records)
    names = labels(shown)
    columns = summary_columns(shown, names)
    if len({record.get("role") for record in shown}) == 1:  # nothing to tell apart: save the width
        columns = [column for column in columns if column.title != "role"]
    text = as_text(columns, width or shutil.get_terminal_size((120, 24)).columns)
    failures = [f"✗ {name}: {' '.join(message.split())[:300]}" for name, message in errors(shown, names)]
    return "\n".join([text, *failures])


def as_text(columns: Sequence[Column], width: int) -> str:
    """Columns side by side under two lines of headings, in as many blocks as the width asks for."""
    blocks: list[list[Column]] = [[columns[0]]]
    for group in _grouped(columns[1:]):
        if len(blocks[-1]) > 1 and _block_width([*blocks[-1], *group]) > width:
            blocks.append([columns[0]])
        blocks[-1] += group
    return "\n\n".join(_block(block) for block in blocks)


def _grouped(columns: Sequence[Column]) -> list[list[Column]]:
    """Neighbours of one group together; columns without a group alone."""
    groups: list[list[Column]] = []
    for column in columns:
        if column.group and groups and groups[-1][0].group == column.group:
            groups[-1].append(column)
        else:
            groups.append([column])
    return groups


def _column_widths(group: Sequence[Column]) -> list[int]:
    """Characters of each column of a group; the last one grows where the group's heading is wider than its columns."""
    widths = [max(len(column.title), *(len(cell) for cell in column.cells)) for column in group]
    widths[-1] += max(0, len(group[0].group) - (sum(widths) + 2 * (len(widths) - 1)))
    return widths


def _block_width(block: Sequence[Column]) -> int:
    widths = [width for group in _grouped(block) for width in _column_widths(group)]
    return sum(widths) + 2 * (len(widths) - 1)


def _block(block: Sequence[Column]) -> str:
    groups = _grouped(block)
    widths = [_column_widths(group) for group in groups]
    heads = [
        group[0].group.center(sum(own) + 2 * (len(own) - 1)) for group, own in zip(groups, widths, strict=True)
    ]
    flat = [width for own in widths for width in own]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if column.numeric else cell.ljust(width)
            for cell, width, column in zip(cells, flat, block, strict=True)
        ]
        return "  ".join(padded).rstrip()

    rows = [line([column.cells[i] for column in block]) for i in range(len(block[0].cells))]
    titles = line([column.title for column in block])
    top = ["  ".join(heads).rstrip()] if any(column.group for column in block) else []
    return "\n".join([*top, titles, "─" * _block_width(block), *rows])


def as_html(columns: Sequence[Column], caption: str) -> str:
    """The same columns as an HTML table; every text escaped."""
    groups = _grouped(columns)
    top, bottom = [], []
    for group in groups:
        if group[0].group:
            top.append(f'<th colspan="{len(group)}" scope="colgroup" class="group">{html.escape(group[0].group)}</th>')
            bottom += [_head(column) for column in group]
        else:
            top.append(_head(group[0], ' rowspan="2"'))
    body = []
    for i in range(len(columns[0].cells)):
        cells = [_cell(column, column.cells[i]) for column in columns[1:]]
        name = html.escape(columns[0].cells[i])
        body.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>')
    head = f"<thead><tr>{''.join(top)}</tr><tr>{''.join(bottom)}</tr></thead>"
    return f'<div class="scroll"><table><caption>{caption}</caption>{head}<tbody>{"".join(body)}</tbody></table></div>'


def _head(column: Column, extra: str = "") -> str:
    kind = "" if column.numeric else ' class="text"'
    return f'<th scope="col"{kind}{extra}>{html.escape(column.title)}</th>'


def _cell(column: Column, text: str) -> str:
    classes = [] if column.numeric else ["text"]
    if text.startswith("✗"):
        classes.append("bad")
    elif text.startswith(("▲", "▼")):
        classes.append("spike")
    elif text in (ABSENT, NOT_APPLICABLE, "is it", "missing"):
        classes.append("quiet")
    kind = f' class="{" ".join(classes)}"' if classes else ""
    return f"<td{kind}>{html.escape(text)}</td>"


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
        mark = "" if abs(value) <= threshold_points else ("▲ " if value > 0 else "▼ ")
        return mark + number(value, "+.2f")

    columns = [Column("", "cell", [cell.label for cell, *_ in pairs], numeric=False)]
    columns.append(Column("", "against", [COUNTERPARTS[counterpart] for _, counterpart, _ in pairs], numeric=False))
    for task, shots in score_keys([cell.record for cell in study.cells]):
        columns.append(Column(task, f"{shots}-shot", [text(row.get((task, shots))) for row in signed]))
    columns.append(Column("", "mean |·|", [number(entry.get("mean_abs_points"), ".2f") for *_, entry in pairs]))
    flips = [study.flips(cell, counterpart) for cell, counterpart, _ in pairs]
    columns.append(Column("", "answers flipped", [f"{100 * f.rate:.1f}% of {f.n:,}" if f else ABSENT for f in flips]))
    columns.append(Column("", "gained / lost", [f"{f.gained} / {f.lost}" if f else ABSENT for f in flips]))
    return columns


def provenance_columns(study: Study) -> list[Column]:
    """What ran: formats, kernels, parameters, data and machine of each cell."""

    def column(title: str, text: Callable[[Record], str], numeric: bool = False) -> Column:
        return Column("", title, [text(cell.record) for cell in study.cells], numeric)

    def precision(record: Record) -> str:
        effective = read(record, "precision", "effective") or ABSENT
        requested = read(record, "precision", "requested") or choice(record, "precision")
        arrow = "" if effective in (requested, ABSENT) else f"{requested} → "
        return f"{arrow}{effective}{' (emulated)' if read(record, 'precision', 'emulated') else ''}"

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
