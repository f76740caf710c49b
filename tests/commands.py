"""Commands as a person types them, each in a process of its own for which the imports are paid only once.

They are forked from a server that has imported lyapft and done nothing else. A worker of the tests must not be forked
itself: a child of a process whose OpenMP has worked may stand still for ever.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lyapft.cell", "lyapft.evaluation", "lyapft.plan.calibration", "lyapft.report"])


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


class Started:
    """A command that runs.

    Args:
        words: `train.py` or another file (of the checkout, where the folder has none), `-m` and a module, or `-c` and
            code; then the arguments.
        folder: where it runs.
        environment: None is that of this process.
    """

    def __init__(self, *words: str, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self._printed = tempfile.TemporaryDirectory(prefix="lyapft-command-")
        self._paths = tuple(Path(self._printed.name) / name for name in ("stdout", "stderr"))
        given = (words, folder, dict(os.environ if environment is None else environment), self._paths)
        self._process = SERVER.Process(target=_work, args=given)
        with contextlib.chdir(ROOT):  # for the server, if this is the first: it imports this checkout's lyapft
            self._process.start()

    def done(self, seconds: float = 120) -> Done:
        """Wait for the end.

        Raises:
            TimeoutError: it still ran after so many seconds, and was killed.
        """
        self._process.join(seconds)
        late = self._process.exitcode is None
        self._process.kill()
        self._process.join()
        with self._printed:
            printed = [path.read_text(encoding="utf-8") for path in self._paths]
        if late:
            raise TimeoutError("\n".join(printed))
        return Done(self._process.exitcode, *printed)


def run(*words: str, folder: Path, environment: Mapping[str, str] | None = None, seconds: float = 120) -> Done:
    """Type a command and wait for its end."""
    return Started(*words, folder=folder, environment=environment).done(seconds)


def _work(words: tuple[str, ...], folder: Path, environment: dict[str, str], printed: tuple[Path, Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in enumerate(printed, start=1):
        with path.open("w") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1, encoding="utf-8") for n in (1, 2))
    sys.path[:0] = [str(folder), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    kind, *rest = words
    try:
        if kind == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv = ["-c", *rest[1:]]
            main = sys.modules["__main__"] = ModuleType("__main__")  # where a class that the code defines is looked up
            exec(compile(rest[0], "<string>", "exec"), main.__dict__)
        else:
            sys.argv = list(words)
            path = folder / kind
            runpy.run_path(str(path if path.exists() else ROOT / kind), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a fork would leave them out
