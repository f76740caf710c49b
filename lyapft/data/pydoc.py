"""Real English without a download: the documentation that the running interpreter brings along.

`pydoc_data.topics` (the language reference) and the standard library's docstrings, read from their sources with `ast`:
nothing is imported or executed. The text differs between Python versions; its hash goes into the record.
"""

import ast
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from lyapft.data.examples import Example, Segment, digest
from lyapft.errors import InputError

SKIPPED_FOLDERS = frozenset(
    ["site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__", "ensurepip", "encodings"]
)
MIN_TEXT = 80  # characters; shorter docstrings are left out of the running text
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Docstring:
    """A documented object of the standard library: `json.dumps`, `function`, its docstring."""

    name: str
    kind: str
    text: str


def _walk(node: ast.AST, name: str) -> Iterator[Docstring]:
    if not isinstance(node, DOCUMENTED):
        return
    kind = {ast.Module: "module", ast.ClassDef: "class"}.get(type(node), "function")
    if text := ast.get_docstring(node):
        yield Docstring(name, kind, text)
    for child in node.body:
        if isinstance(child, DOCUMENTED[1:]):
            yield from _walk(child, f"{name}.{child.name}")


@cache
def docstrings() -> tuple[Docstring, ...]:
    """Every docstring of the standard library's Python sources, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[Docstring] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(s for s in subfolders if s not in SKIPPED_FOLDERS and not s.startswith("config-"))
        for file in sorted(f for f in files if f.endswith(".py")):
            path = Path(folder, file)
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue  # the library ships a few files that are broken on purpose
            found += _walk(tree, name)
    return tuple(found)


@cache
def texts() -> tuple[str, ...]:
    """The language reference's topics, then every docstring of some length."""
    from pydoc_data.topics import topics  # absent from some stripped-down installations: imported where it is needed

    return (*(topics[key] for key in sorted(topics)), *(d.text for d in docstrings() if len(d.text) > MIN_TEXT))


def first_sentence(text: str) -> str | None:
    """The sentence that says what an object is for, or None where there is no plain one.

    >>> first_sentence("dumps(obj) -> str\\n\\nSerialise an object to JSON. More.")
    'Serialise an object to JSON.'
    """
    paragraphs = text.split("\n\n")
    signature = re.match(r"^[\w.]+\(.*\)( -> .*)?$", paragraphs[0].split("\n")[0])
    line = " ".join(paragraphs[1 if signature and len(paragraphs) > 1 else 0].split())
    sentence = re.match(r"(.{20,200}?[.!])( |$)", line)
    if sentence:
        return sentence.group(1)
    return line if 20 <= len(line) <= 200 else None


@cache
def pairs() -> tuple[tuple[str, str], ...]:
    """(question, answer) about each public object that has a plain first sentence, no answer twice."""
    answers: dict[str, str] = {}
    for doc in docstrings():
        private = doc.name.startswith("_") or doc.name.rsplit(".", 1)[-1].startswith("_")
        sentence = None if private else first_sentence(doc.text)
        if sentence:
            answers.setdefault(sentence, f"What does the Python {doc.kind} {doc.name} do?")
    return tuple((question, answer) for answer, question in answers.items())


def pair_example(id: str, question: str, answer: str) -> Example:
    """A question and its answer, the loss on the answer."""
    prompt = Segment(f"Question: {question}\nAnswer:", target=False)
    return Example(id, (prompt, Segment(f" {answer}", target=True, end=True)))


@dataclass
class Pydoc:
    """The interpreter's documentation as training data: `lyapft.data.Pydoc`.

    Args:
        kind: `pairs`, questions and answers about the library's objects; `text`, running text in full blocks.
    """

    name: str = "pydoc"
    path: str | None = None
    max_length: int = 256
    packing: bool = False
    max_bad_fraction: float = 0.01
    limit: int | None = None
    streaming: bool = False
    kind: str = "pairs"
    packed: bool = field(default=False, init=False)
    ordered: bool = field(default=False, init=False)
    rows_bad: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.kind not in ("pairs", "text"):
            raise InputError(f"data.kind={self.kind} is unknown: use pairs or text")
        if self.path is not None:
            raise InputError(
                f"data.path={self.path}: pydoc reads the running Python's own documentation; leave data.path out"
            )
        self.packed = self.kind == "text"

    def examples(self) -> Iterator[Example]:
        """Pairs, or texts, as many as `limit` allows."""
        if self.kind == "pairs":
            for i, (question, answer) in enumerate(pairs()[: self.limit]):
                yield pair_example(f"pair {i}", question, answer)
        else:
            for i, text in enumerate(texts()[: self.limit]):
                yield Example(f"text {i}", (Segment(text, target=True, end=True),))

    def fingerprint(self) -> str:
        """SHA-256 of the text; it differs between Python versions."""
        return digest(self.examples())
