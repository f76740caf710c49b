"""Sentences for LaTeX, and tables that fit a page: a wide one is cut into parts that repeat the names of its rows.

For `\\usepackage{booktabs,longtable}`; any engine, no packages for letters. Widths are estimated from Computer Modern.
"""

from collections.abc import Sequence
from functools import cache

from lyapft.report.tables import Column, grouped
from lyapft.verdict import Section

TEXT_WIDTH = 345.0  # pt, of article at 10 pt, A4 and letter
LONGEST = 40  # rows of a table that stays on one page; a longer one is broken over pages
GAP = 6.0  # pt between columns
EM = 8.5  # pt of \footnotesize, where a digit is half of it
KEYS = ("model", "twin", "data", "scored on", "recipe", "against", "task", "shots", "seed", "runs that differ in")
KEYS_SHARE = 0.6  # of the width, for the names of a row: wider ones are broken into lines
NARROW, WIDE = ".,:;|[]()'ijl /·-", "−×±Δα≤≥<>→≈+=mwMW%"

CHARS = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
CHARS |= {char: f"\\{char}" for char in "&%$#_{}"}
CHARS |= {"−": "$-$", "×": r"$\times$", "±": r"$\pm$", "·": r"$\cdot$", "Δ": r"$\Delta$", "α": r"$\alpha$"}
CHARS |= {"–": "--", "≤": r"$\le$", "≥": r"$\ge$", "<": "$<$", ">": "$>$", "|": "$|$", "λ": r"$\lambda$"}
CHARS |= {"†": r"$\dagger$", "→": r"$\to$", "…": r"\ldots{}", "“": "``", "”": "''", "’": "'"}
ESCAPED = str.maketrans(CHARS)


def as_latex(columns: Sequence[Column], text: str, label: str) -> str:
    """A table as LaTeX, in as many parts as the text width asks for.

    Args:
        columns: those named in `KEYS` that come first name the rows.
        text: the caption. label: the first part's is `tab:LABEL`, the others' `tab:LABEL-2` and so on.
    """
    parts = _parts(columns)
    made = []
    for place, (part, widths) in enumerate(parts, start=1):
        caption = f"{text} (part {place} of {len(parts)})" if len(parts) > 1 else text
        made.append(_table(part, widths, _escaped(caption), label if place == 1 else f"{label}-{place}"))
    return "\n".join(made)


def as_lists(sections: Sequence[Section]) -> str:
    """Headings with a list of sentences under each, to be put into a document."""
    lines = []
    for section in sections:
        items = [rf"\item{{}} {_escaped(line)}" for line in section.lines]  # {}: a line may begin with a bracket
        lines += [rf"\paragraph{{{_escaped(section.title)}}}", r"\begin{itemize}", *items, r"\end{itemize}"]
    return "\n".join([*lines, ""])


Part = tuple[list[Column], list[float]]


def _parts(columns: Sequence[Column]) -> list[Part]:
    """Columns of each part with their widths in points; neighbours of one group stay together where they fit."""
    count = next((i for i, column in enumerate(columns) if column.title not in KEYS), len(columns))
    keys, others = list(columns[:count]), columns[count:]
    widths = _capped([_width(column) for column in keys], KEYS_SHARE * TEXT_WIDTH - GAP * len(keys))
    room = TEXT_WIDTH - sum(widths) - GAP * len(keys)
    parts: list[Part] = []
    left = 0.0
    for piece in _pieces(others, room):
        own = [min(_width(column), room - GAP) for column in piece]
        need = sum(own) + GAP * len(own)
        if not parts or need > left:
            parts.append(([*keys], [*widths]))
            left = room
        parts[-1][0].extend(piece)
        parts[-1][1].extend(own)
        left -= need
    return parts or [(keys, widths)]


def _pieces(columns: Sequence[Column], room: float) -> list[list[Column]]:
    """What must not be parted: the groups that fit beside the keys, else their columns one by one."""
    found: list[list[Column]] = []
    for group in grouped(columns):
        fits = sum(map(_width, group)) + GAP * len(group) <= room
        found += [group] if fits else [[column] for column in group]
    return found


def _capped(widths: Sequence[float], limit: float) -> list[float]:
    """Widths of which the widest are cut to one size, so that all together stay within the limit.

    >>> _capped([10.0, 50.0, 90.0], 100.0)
    [10.0, 45.0, 45.0]
    """
    left = limit
    for place, width in enumerate(sorted(widths)):
        wider = len(widths) - place
        if width * wider > left:
            return [min(one, left / wider) for one in widths]
        left -= width
    return list(widths)


def _width(column: Column) -> float:
    """Points that a column takes where nothing is broken into lines."""
    return max(map(_text_width, (column.title, *column.cells)))


def _text_width(text: str) -> float:
    """Points of a text, rather more than less."""
    return EM * sum(map(_ems, text))


@cache
def _ems(char: str) -> float:
    if char in NARROW:
        return 0.34
    return 0.88 if char in WIDE else 0.72 if char.isupper() else 0.54


def _table(columns: Sequence[Column], widths: Sequence[float], caption: str, label: str) -> str:
    align = "@{}" + "".join(_align(column, width) for column, width in zip(columns, widths, strict=True)) + "@{}"
    rows = [_line([column.cells[i] for column in columns]) for i in range(len(columns[0].cells))]
    head = [r"\toprule", *_head(columns), r"\midrule"]
    title, small = rf"\caption{{{caption}}}\label{{tab:{label}}}", r"\footnotesize\setlength{\tabcolsep}{3pt}"
    if len(rows) > LONGEST:
        begin = [rf"\begingroup{small}", rf"\begin{{longtable}}{{{align}}}", rf"{title}\\"]
        heads = [*head, r"\endfirsthead", *head, r"\endhead", r"\bottomrule", r"\endlastfoot"]
        return "\n".join([*begin, *heads, *rows, r"\end{longtable}", r"\endgroup", ""])
    begin = [r"\begin{table}", rf"\centering{small}", title, rf"\begin{{tabular}}{{{align}}}"]
    return "\n".join([*begin, *head, *rows, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _align(column: Column, width: float) -> str:
    if _width(column) > width:
        return rf"p{{{width:.0f}pt}}"
    return "r" if column.numeric else "l"


def _head(columns: Sequence[Column]) -> list[str]:
    """The titles, and above them the groups that they belong to."""
    titles = _line([column.title for column in columns])
    if not any(column.group for column in columns):
        return [titles]
    spans, rules, place = [], [], 1
    for group in grouped(columns):
        end = place + len(group) - 1
        name = group[0].group
        spans.append(rf"\multicolumn{{{len(group)}}}{{c}}{{{_escaped(name)}}}" if name else "")
        rules += [rf"\cmidrule(lr){{{place}-{end}}}"] if name else []
        place = end + 1
    return [" & ".join(spans) + r" \\", "".join(rules), titles]


def _line(cells: Sequence[str]) -> str:
    return " & ".join(map(_escaped, cells)) + r" \\"


def _escaped(text: str) -> str:
    return " ".join(text.split()).translate(ESCAPED)
