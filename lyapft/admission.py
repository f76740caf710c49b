"""What is refused before a command has written anything: credentials, folders outside of `runs`, sweeps in a rank.

A Hydra callback, since Hydra makes its output folder before it calls the entry point, and a sweep's overrides are seen
whole only here. Nothing here imports torch.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lyapft import config, containment, launch, secrets

EXTRAS = {"hydra_plugins.hydra_submitit_launcher": "cluster", "hydra_plugins.hydra_ray_launcher": "ray"}


class Admission(Callback):
    """Ends the command with exit code 1 and every reason at once; else `${hydra:…}` has an answer from here on, not
    only in a job: a sweep's folder and those of studies are made before."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """One cell, or an evaluation."""
        _admit(_asked(config, lone_faults, faults))
        HydraConfig.instance().set_config(config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """A sweep."""
        found = rank_faults(dict(os.environ), sys.argv)
        _admit(found + _asked(config, launcher_faults, faults))
        HydraConfig.instance().set_config(config)


def _asked(config: DictConfig, *checks: Callable[[DictConfig], list[str]]) -> list[str]:
    """What is wrong; also a config that cannot be asked, for Hydra would only warn of an exception and go on."""
    try:
        return [fault for check in checks for fault in check(config)]
    except Exception as error:  # noqa: BLE001 - whatever broke, what was not checked is not admitted
        return [f"these settings cannot be checked: {secrets.hidden(str(error))}"]


def _admit(found: list[str]) -> None:
    if found:
        print("this command cannot run:\n" + "\n".join(f"  - {fault}" for fault in found), file=sys.stderr)
        raise SystemExit(1)


def check_typed(words: list[str], config_name: str) -> None:
    """Refuse what no callback could stop: Hydra's messages repeat a credential, and it opens the files of its own log
    before it calls one.

    Raises:
        SystemExit: there is such.
    """
    _admit(secrets.faults({}, words))
    if any("hydra_logging" in word or "searchpath" in word or word.startswith(("-c", "--c")) for word in words):
        _admit(_own_log_faults(words, config_name))


def _own_log_faults(words: list[str], config_name: str) -> list[str]:
    """Files of Hydra's own log, in settings composed as Hydra will compose them; what it cannot, it will say itself."""
    given = get_args_parser().parse_args(words)
    search = create_config_search_path(str(config.CONF_DIR.parent / (given.config_path or config.CONF_DIR.name)))
    if given.config_dir is not None:
        folder = os.path.abspath(given.config_dir)
        search.prepend("command-line", f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
    mode = RunMode.MULTIRUN if given.multirun else RunMode.RUN
    try:
        found = ConfigLoaderImpl(search).load_configuration(given.config_name or config_name, given.overrides, mode)
    except (HydraException, OmegaConfBaseException):
        return []
    return [
        f"{key}={path}: Hydra's own log would be opened before the folder of the runs is known. It goes to the "
        "console: take the file out; each cell has its log beside its record"
        for key, path in containment.log_files(OmegaConf.to_container(found.hydra, resolve=False))
        if key.startswith("hydra.hydra_logging.")
    ]


def faults(cfg: DictConfig) -> list[str]:
    """Credentials among the settings and overrides; else names and paths that lead out of the folder of the runs.

    Args:
        cfg: composed, with its `hydra` node; need not be resolvable.
    """
    cfg = containment.unresolved(cfg)
    own: Any = OmegaConf.to_container(cfg, resolve=False)
    hydra = own.pop("hydra", None) or {}  # its overrides are in `typed`, and the rest holds this machine's paths
    typed = [text for kind in ("task", "hydra") for text in (hydra.get("overrides") or {}).get(kind) or []]
    params = (hydra.get("sweeper") or {}).get("params") or {}
    typed += [f"{key}={value}" for key, value in params.items()]
    own |= {"hydra": {"job": {"env_set": (hydra.get("job") or {}).get("env_set")}, "launcher": hydra.get("launcher")}}
    names = {key: [OmegaConf.select(cfg, key)] for key in config.FOLDER_PARTS if OmegaConf.select(cfg, key)}
    given = list(_swept(typed))
    for key, value in given:
        if key in config.FOLDER_PARTS:
            names.setdefault(key, []).append(value)
    found = secrets.faults(own, typed) or secrets.faults(names)  # as they were typed, and names as they will be
    if found:
        return found  # the others would repeat what was given
    found = containment.hydra_faults(cfg, given) if hydra else []
    return found + [fault for key, values in names.items() for fault in config.name_faults(key, values)]


def _swept(overrides: list[str]) -> Iterator[tuple[str, str]]:
    """(key, value) of every value that an override gives its key; one that cannot be parsed is for Hydra to refuse."""
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except OverrideParseException:
            continue
        key = override.key_or_group
        if override.is_sweep_override():
            yield from ((key, str(value).strip("'\"")) for value in override.sweep_string_iterator())
        else:
            yield key, str(override.value())


def rank_faults(environment: dict[str, str], argv: list[str]) -> list[str]:
    """A sweep inside one of several processes that torchrun or srun started: each would run all of its cells.

    >>> rank_faults({"WORLD_SIZE": "2"}, ["train.py", "-m", "seed=0,1"])[0].split(":")[0]
    'a sweep (-m) cannot run inside 2 processes started by torchrun'
    """
    here = launch.found(environment)
    if here.launcher is None:
        return []
    typed = " ".join(word for word in argv[1:] if word not in ("-m", "--multirun"))
    start = (
        f"torchrun --nproc-per-node {here.per_node}" if here.launcher == "torchrun" else f"srun -n {here.ranks} python"
    )
    return [
        f"a sweep (-m) cannot run inside {here.ranks} processes started by {here.launcher}: each would run all cells. "
        f"For one cell over several processes: {start} train.py without -m, a single value for each setting. "
        f"For many cells, from one process: python train.py -m {typed} hydra/launcher=submitit_slurm, submitit_local "
        "or joblib"
    ]


def launcher_faults(cfg: DictConfig) -> list[str]:
    """A launcher whose package is not installed."""
    package = ".".join(str(OmegaConf.select(cfg, "hydra.launcher._target_")).split(".")[:2])
    if not package.startswith("hydra_plugins.") or importlib.util.find_spec(package) is not None:
        return []
    choice = OmegaConf.select(cfg, "hydra.runtime.choices")["hydra/launcher"]
    extra = EXTRAS.get(package)
    install = f"pip install -e '.[{extra}]'" if extra else f"install {package}"
    return [f"hydra/launcher={choice} needs {package}, which is not installed: {install}"]


def lone_faults(cfg: DictConfig) -> list[str]:
    """An evaluation inside one of several processes: each would do all of it."""
    here = launch.found()
    if here.launcher is None or "trainer" in cfg:
        return []
    return [f"evaluate.py is one process, and {here.launcher} started {here.ranks}: python evaluate.py does all of it"]
