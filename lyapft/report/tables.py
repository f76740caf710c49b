"""Columns of text, shown in a terminal or as HTML."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

ABSENT = "–"
NOT_APPLICABLE = "n/a"


@dataclass(frozen=True)
class Column:
    """One column: its heading (`group` spans neighbours), its cells, and whether those are numbers."""

    group: str
    title: str
    cells: list[str]
    numeric: bool = True


def as_text(columns: Sequence[Column], width: int) -> str:
    """Columns side by side under two lines of headings, in as many blocks as the width asks for."""
    blocks: list[list[Column]] = [[columns[0]]]
    for group in grouped(columns[1:]):
        if len(blocks[-1]) > 1 and _block_width([*blocks[-1], *group]) > width:
            blocks.append([columns[0]])
        blocks[-1] += group
    return "\n\n".join(_block(block) for block in blocks)


def grouped(columns: Sequence[Column]) -> list[list[Column]]:
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
    widths = [width for group in grouped(block) for width in _column_widths(group)]
    return sum(widths) + 2 * (len(widths) - 1)


def _block(block: Sequence[Column]) -> str:
    groups = grouped(block)
    widths = [_column_widths(group) for group in groups]
    heads = [group[0].group.center(sum(own) + 2 * (len(own) - 1)) for group, own in zip(groups, widths, strict=True)]
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
    groups = grouped(columns)
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
    kind = "" if column.numeric else f' class="{"text name" if column.title == "cell" else "text"}"'
    return f'<th scope="col"{kind}{extra}>{html.escape(column.title).replace("-shot", "&#8209;shot")}</th>'


def _cell(column: Column, text: str) -> str:
    classes = [] if column.numeric else ["text"]
    if text.startswith("✗"):
        classes.append("bad")
    elif text.startswith(("▲", "▼")):
        classes.append("spike")
    elif text in (ABSENT, NOT_APPLICABLE, "self", "missing"):
        classes.append("quiet")
    kind = f' class="{" ".join(classes)}"' if classes else ""
    return f"<td{kind}>{html.escape(text)}</td>"
