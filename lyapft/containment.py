"""Nothing is written through a link that leads out of the folder that a command may write to, or where others may
put what is read back as code.
"""

import os
import re
import stat
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lyapft.config import FOLDER_PARTS
from lyapft.errors import InputError

FOLDERS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.output_subdir")
SUBMITIT = "hydra.launcher.submitit_folder"
LOGS = ("hydra_logging", "job_logging")
INTERPOLATION = re.compile(r"\$\{([^{}]*)\}?")
# What a path of Hydra's may be made of in a sweep, lest one job lead out: what all share, plain names and numbers.
KNOWN = {"runs", "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.runtime.output_dir"}
KNOWN |= {"hydra.runtime.cwd", "hydra.job.name", "hydra.job.num", "hydra.job.id", "seed", "replicate", *FOLDER_PARTS}


def check(root: Path, paths: Iterable[Path]) -> None:
    """Refuse paths that lead out of a folder, which itself may be a link; those that do not exist lead nowhere yet.

    Raises:
        InputError: one does; it names where to.

    >>> check(Path("runs"), [Path("runs/study"), Path("runs/study/cell")])
    """
    home = root.resolve()
    for path in paths:
        if not path.resolve().is_relative_to(home):
            raise InputError(
                f"{path} leads out of {root}, to {path.resolve()}: nothing is written there. Put a folder in the place "
                "of the link, or set runs=FOLDER"
            )


def own(folder: Path) -> None:
    """Make a folder that nobody else may enter: what submitit reads back from it are pickles, which could run anything.

    Raises:
        InputError: it is there, and another user's or open to others; its rights are not changed, for it may hold more.
    """
    folder.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)
    there = folder.stat()
    if there.st_uid != os.geteuid():
        whose, first = "is another user's", ""
    elif stat.S_IMODE(there.st_mode) & (stat.S_IRWXG | stat.S_IRWXO):
        whose, first = "may be entered by other users", f"chmod 700 {folder}, or "
    else:
        return
    raise InputError(
        f"{folder} {whose}, who could exchange the pickles of jobs that lie there for other code: {first}set "
        f"hydra.launcher.submitit_folder={folder}-NAME/%j"
    )


def hydra_faults(config: DictConfig) -> list[str]:
    """Folders and log files of Hydra and its launchers that lead out of the folder of the runs, or of a run to score.

    A config may set them, and Hydra makes them in the jobs of a sweep before anything of ours is asked.
    """
    tree, typed = OmegaConf.create(_plain(config)), _plain(config.hydra)
    named = {key: _at(typed, key) for key in (*FOLDERS, SUBMITIT, "hydra.job.name")} | dict(log_files(typed))
    if config.hydra.mode == RunMode.MULTIRUN:
        if "study" in config:
            named["study.name"] = _plain(config.study)["name"]
        made_of = [(key, INTERPOLATION.findall(str(text))) for key, text in named.items()]
        if found := [
            f"{key} may not depend on {name}, which is known in a job only: write it out, or run without -m"
            for key, names in made_of
            for name in names
            if name not in KNOWN
        ]:
            return found
    roots = _roots(config)
    return [
        f"{key}={named[key]} leads out of {roots[0]}, to {path.resolve()}: nothing is written there. Leave it out, or "
        "set it to a folder or file below"
        for key, path in _paths(tree)
        if path.resolve() != Path.cwd() and not any(path.resolve().is_relative_to(root.resolve()) for root in roots)
    ]


def log_files(hydra: Any) -> Iterator[tuple[str, str]]:
    """(dotted name, file) of every handler of its logs that has one.

    Args:
        hydra: the node, as plain dictionaries.

    >>> list(log_files({"job_logging": {"handlers": {"file": {"class": "logging.FileHandler", "filename": "a.log"}}}}))
    [('hydra.job_logging.handlers.file.filename', 'a.log')]
    """
    for log in LOGS:
        stack = [(f"hydra.{log}.handlers", (hydra.get(log) or {}).get("handlers"))]
        while stack:
            key, value = stack.pop()
            if isinstance(value, dict):
                stack += [(f"{key}.{name}", inner) for name, inner in value.items()]
            elif value is not None and key.lower().endswith("filename"):  # or `baseFilename`, set as an attribute
                yield key, str(value)


def jobs_of_submitit(config: DictConfig) -> Path | None:
    """The folder in which submitit has a folder for each job; None for another launcher."""
    folder = OmegaConf.select(config, SUBMITIT)
    return None if folder is None else Path(*takewhile(lambda part: "%" not in part, Path(folder).parts))


def _paths(tree: DictConfig) -> Iterator[tuple[str, Path]]:
    """(setting, path) of all that would be made, in the folder of a run and in that of a sweep's job."""
    OmegaConf.update(tree, "hydra.job", {"num": 0, "id": "0"}, force_add=True)
    sweep = Path(tree.hydra.sweep.dir)
    yield "hydra.sweep.dir", sweep
    for key, output in (
        ("hydra.run.dir", Path(tree.hydra.run.dir)),
        ("hydra.sweep.subdir", sweep / str(tree.hydra.sweep.subdir)),
    ):
        yield key, output
        OmegaConf.update(tree, "hydra.runtime.output_dir", str(output), force_add=True)
        if (subdir := tree.hydra.output_subdir) is not None:
            yield "hydra.output_subdir", output / str(subdir)
        logs = {log: _plain(tree.hydra[log], resolve=True) for log in LOGS if tree.hydra[log]}
        yield from ((key, Path(file)) for key, file in log_files(logs))
    if (jobs := jobs_of_submitit(tree)) is not None:
        yield SUBMITIT, jobs


def _plain(node: DictConfig, resolve: bool = False) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(node, resolve=resolve))


def _roots(config: DictConfig) -> list[Path]:
    """Where a command may write: `runs`; without such a setting, in the run that it scores and among experiments."""
    if "runs" in config:
        return [Path(config.runs)]
    run = None if OmegaConf.is_missing(config, "run") else config.run
    return [*([Path(run)] if run else []), Path("runs")]


def _at(hydra: Any, key: str) -> Any:
    """The value of `hydra.a.b` in plain dictionaries; None where there is none."""
    for part in key.split(".")[1:]:
        hydra = (hydra or {}).get(part)
    return hydra
