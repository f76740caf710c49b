"""A study: the folder of a matrix, its references and its reruns, and what is said of it when a command ends."""

import errno
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lyapft import admission, containment, launch, records
from lyapft.config import register
from lyapft.errors import InputError

log = logging.getLogger(__name__)
# exit codes: of a process that Ctrl-C ended, as shells have it; and where the same command would change nothing
INTERRUPTED, BROKE_DOWN = 130, 3


class CellFailed(CompactHydraException):
    """A cell did not finish; the message says why, its record and log keep the details."""


class CellBrokeDown(CellFailed):
    """A cell, or the reference of one, has an outcome that is not `ok`: running it again would say the same."""


class StudyFolder(Callback):
    """Hydra callback that remembers which study a command works on, in the process that the user started.

    Hydra's own end-of-sweep callback is not called when a cell failed, so `closing` asks this one.
    """

    planned: Path | None = None  # by the command as a whole
    touched: ClassVar[list[Path]] = []  # by its jobs, which may sweep over study.name
    failures: ClassVar[list[Any]] = []  # exceptions of its jobs, where they run in this process

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """One cell."""
        self._start(config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """A sweep."""
        self._start(config)

    def _start(self, config: DictConfig) -> None:
        if not launch.found().leads:
            return
        folder = _folder(config)
        type(self).planned = folder
        if folder is not None:
            _write_plan(config)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """One cell of either; what it touched is known where jobs run in this process."""
        register()  # a worker of a launcher has not run the entry point
        folder = _folder(config) if launch.found().leads else None
        if folder is not None and folder not in self.touched:
            self.touched.append(folder)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """One cell of either has ended; what Hydra reports of a sweep is the first failure alone."""
        if job_return.status == JobStatus.FAILED:
            self.failures.append(job_return._return_value)  # the property would raise it


def _folder(config: DictConfig) -> Path | None:
    runs, name = OmegaConf.select(config, "runs"), OmegaConf.select(config, "study.name")
    if not runs or not name:
        return None
    folder = Path(runs) / name
    try:
        containment.check(Path(runs), [folder, *records.folders(folder)])
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):  # asks also whether its file system is read-only
            raise OSError(errno.EACCES, "no right to write, or a read-only file system")
        if config.hydra.mode == RunMode.MULTIRUN and (jobs := containment.jobs_of_submitit(config)):
            containment.own(jobs)
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    except OSError as error:
        print(
            f"runs={runs} cannot be made or written ({error.strerror}): set runs=FOLDER to a folder of your own",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    return folder


def _write_plan(config: DictConfig) -> None:
    """Keep what this command will run beside its records; what is wrong with a cell, the cell itself will say."""
    from lyapft.plan import cells, file  # here, so that --help needs no pandas

    try:
        file.save(cells.cells(config))
    except (InputError, OSError) as error:
        log.debug("no plan of this command: %s", error)


def closing(command: Callable[[], None], name: str) -> int:
    """Run a Hydra command, then show the table of its study and write the report, also when a cell failed.

    Args:
        name: of its config in `conf/`.
    Returns:
        The exit code: 0 all well; 1 something failed; 3 all is done that can be, and some of it broke down (a result;
        of cells in other processes, as launchers have them, that counts as a failure); 130 interrupted.
    """
    code = 0
    StudyFolder.failures.clear()
    try:
        admission.check_typed(sys.argv[1:], name)
        code = _worst(_exit_code(command), _come_back())
    except KeyboardInterrupt:
        print("\ninterrupted: the same command continues the study", file=sys.stderr)
        code = INTERRUPTED
    except SystemExit as stop:  # a signal of the scheduler leaves no time for a report
        return stop.code if isinstance(stop.code, int) else 1
    planned = [] if StudyFolder.planned is None else [StudyFolder.planned]
    for folder in StudyFolder.touched or planned:
        if any(folder.glob("*/record.json")):
            code = _worst(code, _show(folder))
    return code


def _worst(*codes: int) -> int:
    """The exit code of several parts of a command: a breakdown is less than a failure.

    >>> _worst(0, BROKE_DOWN), _worst(BROKE_DOWN, 1), _worst(1, INTERRUPTED)
    (3, 1, 130)
    """
    return max(codes, key=lambda code: (code != 0, code != BROKE_DOWN, code))


_postponed: list[tuple[Any, Callable[[], Any]]] = []  # Hydra's state of a job, and the job


def can_postpone() -> bool:
    """Whether this is a sweep whose jobs run one after another in this process."""
    if not HydraConfig.initialized():
        return False
    hydra = HydraConfig.get()
    return hydra.mode == RunMode.MULTIRUN and str(hydra.launcher._target_).endswith("BasicLauncher")


def postpone(job: Callable[[], Any]) -> None:
    """Run a job of the sweep once the others are done."""
    _postponed.append((HydraConfig.instance().cfg, job))


def _exit_code(command: Callable[[], None]) -> int:
    """What a Hydra command ends with, unless a signal ended it."""
    try:
        command()
    except SystemExit as stop:  # how Hydra ends after it has printed an error
        if isinstance(stop.code, int) and stop.code > 128:
            raise
        known = any(stop.__context__ is failure for failure in StudyFolder.failures)  # else Hydra itself failed
        if known and all(isinstance(failure, CellBrokeDown) for failure in StudyFolder.failures):
            return BROKE_DOWN
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def _come_back() -> int:
    """Run what was postponed, now waiting for whoever runs it; the exit code of the worst of them."""
    code = 0
    while _postponed:
        HydraConfig.instance().cfg, job = _postponed.pop(0)
        try:
            job()
        except CompactHydraException as error:
            print(error, file=sys.stderr)
            code = _worst(code, BROKE_DOWN if isinstance(error, CellBrokeDown) else 1)
    return code


def _show(folder: Path) -> int:
    """Print the table and write the report; 1 if that fails, so that no failure is silent."""
    from lyapft import report
    from lyapft.plan import file

    try:
        found = report.load_study(folder)
        for note in found.notes:
            print(note, file=sys.stderr)
        records = [cell.record for cell in found.cells]
        print(report.summary_table(records))
        if planned := file.load(folder):
            print(file.summary(file.states(planned, records)))
        print(f"report: {report.write(folder, found=found)}")
    except (InputError, OSError) as error:
        print(f"no report: {error}", file=sys.stderr)
        return 1
    return 0
