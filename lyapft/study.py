"""A study: the folder of a matrix, its references and its reruns, and what is said of it when a command ends."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

INTERRUPTED = 130  # exit code of a process that Ctrl-C ended, as shells have it


class StudyFolder(Callback):
    """Hydra callback that remembers which study a command works on, in the process that the user started.

    Hydra's own end-of-sweep callback is not called when a cell failed, so `closing` asks this one.
    """

    current: Path | None = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """One cell."""
        type(self).current = _folder(config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """A sweep."""
        type(self).current = _folder(config)


def _folder(config: DictConfig) -> Path | None:
    runs, name = OmegaConf.select(config, "runs"), OmegaConf.select(config, "study.name")
    return Path(runs) / name if runs and name else None


def closing(command: Callable[[], None]) -> int:
    """Run a Hydra command, then show the table of its study and write the report, also when a cell failed.

    Returns:
        The exit code: 0 all well, 1 something failed, 130 interrupted.
    """
    code = 0
    try:
        command()
    except KeyboardInterrupt:
        print("\ninterrupted: the same command continues the study", file=sys.stderr)
        code = INTERRUPTED
    except SystemExit as stop:  # how Hydra ends after it has printed an error
        code = stop.code if isinstance(stop.code, int) else 1
    if StudyFolder.current is not None and any(StudyFolder.current.glob("*/record.json")):
        code = max(code, _show(StudyFolder.current))
    return code


def _show(folder: Path) -> int:
    """Print the table and write the report; 1 if that fails, so that no failure is silent."""
    from lyapft import records, report
    from lyapft.errors import InputError

    try:
        print(report.summary_table(records.load_study(folder)))
        print(f"report: {report.write(folder)}")
    except (InputError, OSError) as error:
        print(f"no report: {error}", file=sys.stderr)
        return 1
    return 0
