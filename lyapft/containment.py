"""Nothing is written through a link that leads out of the folder that a command may write to, or where others may
put what is read back as code.
"""

import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lyapft import secrets
from lyapft.config import FOLDER_PARTS
from lyapft.errors import InputError

FOLDERS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.output_subdir")
SUBMITIT = "hydra.launcher.submitit_folder"
LOGS = ("hydra_logging", "job_logging")
INTERPOLATION = re.compile(r"\$\{\s*([^{}]*?)\s*(?:\}|(?=\{)|$)")
RESOLVER = re.compile(r"\$\{\s*hydra:\s*")  # Hydra's, which answers in a job only
# What a path of Hydra's may be made of in a sweep, lest one job lead out: what all share, plain names and numbers.
KNOWN = {"runs", "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.runtime.output_dir"}
KNOWN |= {"hydra.runtime.cwd", "hydra.job.name", "hydra.job.num", "hydra.job.id", "seed", "replicate", *FOLDER_PARTS}
TIME = re.compile(r"now:[^$]*")  # a sweep's start, for its jobs too
VARIABLE = re.compile(r"oc\.env:\s*(\w+)\s*(?:,[^$]*)?")  # of the environment, which jobs have from their sweep
CHOICE = re.compile(r"hydra\.runtime\.choices\.(\w+)")
OVERRIDES = "hydra.job.override_dirname"  # Hydra joins what was typed, as it was
Given = Sequence[tuple[str, str]]  # key and value of each override, one for each value of a sweep


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


def unresolved(config: DictConfig) -> DictConfig:
    """A copy whose interpolations do without Hydra's resolver: `${hydra:runtime.cwd}` is `${hydra.runtime.cwd}`.

    >>> unresolved(OmegaConf.create({"hydra": {"a": 1}, "b": ["${hydra:a}"]})).b[0]
    1
    """

    def said(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: said(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [said(inner) for inner in value]
        return RESOLVER.sub("${hydra.", value) if isinstance(value, str) else value

    return cast(DictConfig, OmegaConf.create(said(_plain(config))))


def hydra_faults(config: DictConfig, given: Given = ()) -> list[str]:
    """Folders and log files of Hydra and its launchers that lead out of the folder of the runs, or of a run to score.

    A config may set them, and Hydra makes them in the jobs of a sweep before anything of ours is asked.
    """
    tree = unresolved(config)
    typed = _plain(tree.hydra)
    named = {key: _at(typed, key) for key in (*FOLDERS, SUBMITIT, "hydra.job.name")} | dict(log_files(typed))
    if config.hydra.mode == RunMode.MULTIRUN:
        if "study" in tree:
            named["study.name"] = _plain(tree.study)["name"]
        if found := [
            f"{key} may not depend on {name}, {reason}"
            for key, text in named.items()
            for name in INTERPOLATION.findall(str(text))
            if (reason := _in_a_job(name, typed, given)) is not None
        ]:
            return found
    roots, paths = _roots(tree), list(_paths(tree))
    return secrets.faults({}, [f"{key}={path}" for key, path in paths]) or [
        f"{key}={named[key]} leads out of {roots[0]}, to {path.resolve()}: nothing is written there. Leave it out, or "
        "set it to a folder or file below"
        for key, path in paths
        if path.resolve() != Path.cwd() and not any(path.resolve().is_relative_to(root.resolve()) for root in roots)
    ]


def _in_a_job(name: str, hydra: dict[str, Any], given: Given) -> str | None:
    """Why what an interpolation stands for could lead out in a job though it does not here; None if it could not."""
    if name in KNOWN or TIME.fullmatch(name):
        return None
    if variable := VARIABLE.fullmatch(name):
        launcher = INTERPOLATION.sub("", str(hydra.get("launcher")))  # which may use one, but set none
        if not re.search(rf"(?<![$\w]){variable[1]}\b", launcher):
            return None
        return "which hydra.launcher may set for the jobs: write it out"
    if name == OVERRIDES:
        return _in_a_dirname(hydra["job"]["config"]["override_dirname"], given)
    if (choice := CHOICE.fullmatch(name)) and "${" not in str(_at(hydra, name)):
        chosen = [value for key, value in given if key == choice[1]]
        odd = [value for value in chosen if _leads_up(value) or value.startswith("/")]
        return f"as {choice[1]}={odd[0]} is a path that leads elsewhere: write it out" if odd else None
    return "which is known in a job only: write it out, or run without -m"


def _in_a_dirname(form: dict[str, Any], given: Given) -> str | None:
    """Why a folder that is named by the overrides could lead out; those of Hydra's own are not in its name."""
    equals, between = form["kv_sep"], form["item_sep"]
    if "${" in f"{equals}{between}":
        return "whose kv_sep and item_sep have to be written out"
    left_out = form["exclude_keys"] if isinstance(form["exclude_keys"], list) else []
    for key, value in given:
        line = f"{key}={value}".replace("=", equals)
        if not key.startswith(("hydra.", "hydra/")) and key not in left_out and _leads_up(f"{between}{line}{between}"):
            return (
                f"as {key}={value} would stand in it, with '..' or what another setting holds: leave it out "
                f"(hydra.job.config.override_dirname.exclude_keys=[{key}]), or write it out"
            )
    return None


def _leads_up(text: str) -> bool:
    """Whether a part of a path is the folder above, or could become it."""
    return ".." in text.split("/") or "${" in text


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
