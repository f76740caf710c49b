"""Find the files that make a backbone, check them without reading a weight, and name them by content.

A backbone comes from a folder, a Hugging Face hub name, a checkpoint that ships with lyapft, or from dimensions only
(scratch). Two layouts are known: transformers' own, and that of state-spaces/mamba (see `state_spaces.py`). A fault is
a sentence that says what is wrong, what was given and what to do.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open

from lyapft.backbone import state_spaces
from lyapft.config import ModelConfig
from lyapft.errors import NOT_JSON, InputError

SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)  # any one makes a tokenizer
TOKENIZER_FILES = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
)
HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
HUB_TIMEOUT_S = 10.0
TRANSFORMERS, STATE_SPACES, SCRATCH = "transformers", "state-spaces", "scratch"


@dataclass(frozen=True)
class Source:
    """The files of one backbone; `config` is the content of config.json, or the dimensions of a scratch model."""

    layout: str  # TRANSFORMERS | STATE_SPACES | SCRATCH
    config: Mapping[str, Any]
    folder: Path | None  # None for SCRATCH
    weights: tuple[Path, ...]
    tokenizer_folder: Path

    @property
    def tokenizer_files(self) -> list[Path]:
        """The files that define the tokenizer, those that exist."""
        return [self.tokenizer_folder / name for name in TOKENIZER_FILES if (self.tokenizer_folder / name).is_file()]

    def fingerprint(self) -> str:
        """sha256 over the content of weights, config and tokenizer files; the folder's place and name do not enter."""
        parts: list[tuple[str, str, str]] = [("tokenizer", f.name, file_hash(f)) for f in self.tokenizer_files]
        parts += [("weights", f.name, file_hash(f)) for f in self.weights]
        config = json.dumps(self.config, sort_keys=True, default=str)
        parts.append(("config", self.layout, hashlib.sha256(config.encode()).hexdigest()))
        return hashlib.sha256(json.dumps(sorted(parts)).encode()).hexdigest()


def inspect(cfg: ModelConfig) -> tuple[Source | None, list[str]]:
    """Locate a backbone and check everything that can be known before a weight is read.

    Returns:
        (source, []) when all is well, else (None, faults), every fault at once.
    """
    if cfg.init == "scratch":
        return _inspect_scratch(cfg)
    try:
        folder = _folder(cfg)
    except InputError as error:
        return None, [str(error)]
    config, faults = _read_config(folder)
    if not faults:
        faults += _config_faults(config, folder, cfg)
    if (folder / "adapter_config.json").is_file():  # transformers would load the adapter with the model, unasked
        faults.append(
            f"{folder} holds an adapter (adapter_config.json) beside the model: merge it first, or move it away"
        )
    layout = STATE_SPACES if state_spaces.is_layout(config) else TRANSFORMERS
    weights, weight_faults = _weights(folder)
    tokenizer_folder, tokenizer_faults = _tokenizer_folder(cfg, folder, layout)
    faults += weight_faults + tokenizer_faults
    if faults or tokenizer_folder is None:
        return None, faults
    return Source(layout, config, folder, weights, tokenizer_folder), []


def positions(config: Mapping[str, Any]) -> int | None:
    """The longest sequence that a config allows; None where the architecture has no such limit (a recurrence)."""
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(config.get(key), int):
            return int(config[key])
    return None


def plain_dims(cfg: ModelConfig) -> dict[str, Any]:
    """`model.dims` as plain Python, whether it came from Hydra or from a test."""
    dims = OmegaConf.to_container(cfg.dims, resolve=True) if OmegaConf.is_config(cfg.dims) else dict(cfg.dims)
    return {str(key): value for key, value in dims.items()}  # type: ignore[union-attr]


def file_hash(path: Path) -> str:
    """sha256 of a file, remembered for as long as its size and modification time stay the same."""
    stat = path.stat()
    return _file_hash(path.resolve(), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _file_hash(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _inspect_scratch(cfg: ModelConfig) -> tuple[Source | None, list[str]]:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    dims, faults = plain_dims(cfg), []
    kind = dims.get("model_type")
    if kind not in CONFIG_MAPPING:
        faults.append(
            f"model.init=scratch needs model.dims.model_type to be an architecture of transformers; given: {kind!r}"
        )
    else:
        try:
            config = AutoConfig.for_model(**dims)
        except Exception as error:  # noqa: BLE001 - each config class validates in its own way
            faults.append(f"model.dims do not make a {kind} model: {error}")
        else:
            unknown = sorted(set(dims) - _fields(type(config)))
            faults += [f"model.dims.{key} is not a setting of {type(config).__name__}" for key in unknown]
    shipped = SHIPPED / cfg.name
    tokenizer_folder, tokenizer_faults = _tokenizer_folder(cfg, shipped, SCRATCH)
    faults += tokenizer_faults
    if faults or tokenizer_folder is None:
        return None, faults
    return Source(SCRATCH, dims, None, (), tokenizer_folder), []


def _fields(config_class: type) -> set[str]:
    """Every key that a config class declares, `model_type` included."""
    annotated = {name for base in config_class.__mro__ for name in getattr(base, "__annotations__", {})}
    return annotated | set(getattr(config_class, "attribute_map", {})) | {"model_type", "trained_length"}


def _folder(cfg: ModelConfig) -> Path:
    """Where the weights lie on this machine, fetched from the hub if they have to be."""
    if cfg.path is not None:
        return _local_or_hub(cfg.path, "model.path", lambda folder: bool(_weights(folder)[0]))
    folder = SHIPPED / cfg.name
    if folder.is_dir():
        return folder
    if not SHIPPED.is_dir() or cfg.name == "hf":
        raise InputError(
            f"model={cfg.name} needs model.path: a folder with config.json, weights and a tokenizer, or a hub name"
        )
    known = ", ".join(sorted(p.name for p in SHIPPED.iterdir() if p.is_dir())) or "none"
    raise InputError(
        f"model={cfg.name} has no checkpoint that ships with lyapft (there are: {known}): give model.path=FOLDER, "
        "or model.init=scratch for random weights"
    )


def _local_or_hub(name: str, key: str, complete: Callable[[Path], bool]) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(
            f"{key}={name} is a file: give the folder that holds config.json, the weights and the tokenizer"
        )
    if not HUB_NAME.fullmatch(name):
        raise InputError(f"{key}={name}: there is no such folder ({path.absolute()})")
    return _hub_folder(name, key, complete)


def _hub_folder(name: str, key: str, complete: Callable[[Path], bool]) -> Path:
    """A hub repository's files in the local cache, fetched when they are not there yet."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        cached = Path(snapshot_download(name, local_files_only=True))
        if complete(cached):
            return cached
    except OSError:  # nothing of it is in the cache
        pass
    try:
        present = [s.rfilename for s in HfApi().model_info(name, timeout=HUB_TIMEOUT_S).siblings or []]
        return Path(snapshot_download(name, allow_patterns=_wanted(present), etag_timeout=HUB_TIMEOUT_S))
    except Exception as error:  # the network fails in many ways, none of them a fault of this program
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{key}={name} is neither a folder here nor in the local Hugging Face cache, and could not be "
            f"fetched from the hub ({reason}). On a machine with a network run "
            f"`hf download {name} --local-dir FOLDER`, then give {key}=FOLDER"
        ) from error


def _wanted(present: list[str]) -> list[str]:
    """Of a hub repository's files those that `load` reads: never two formats of the same weights, never code."""
    safe = [f for f in present if f.endswith(".safetensors") and "/" not in f]
    weights = (
        [*safe, "model.safetensors.index.json"] if safe else ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
    )
    return ["config.json", "generation_config.json", *weights, *TOKENIZER_FILES]


def _read_config(folder: Path) -> tuple[dict[str, Any], list[str]]:
    file = folder / "config.json"
    if not file.is_file():
        return {}, [f"{folder} holds no config.json: it is not a checkpoint folder (it holds: {_listing(folder)})"]
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except NOT_JSON as error:
        return {}, [f"{file} is not valid JSON: {error}. Fetch the checkpoint again"]
    if not isinstance(config, dict):
        return {}, [f"{file} must hold a JSON object, not a {type(config).__name__}. Fetch the checkpoint again"]
    return config, []


def _config_faults(config: Mapping[str, Any], folder: Path, cfg: ModelConfig) -> list[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if state_spaces.is_layout(config):
        faults, kind = state_spaces.faults(config, folder / "config.json"), state_spaces.architecture(config)
    else:
        faults, kind = [], config.get("model_type")
        custom = bool(config.get("auto_map"))
        if custom and cfg.trust_remote_code:
            return []
        if kind not in CONFIG_MAPPING or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            hint = (
                " It brings Python code of its own: read it, then allow it with model.trust_remote_code=true"
                if custom
                else " Use a checkpoint of a causal language model"
            )
            faults.append(
                f"{folder / 'config.json'}: model_type {kind!r} is no causal language model of transformers.{hint}"
            )
    expected = plain_dims(cfg).get("model_type")
    if not faults and expected is not None and kind != expected:
        faults.append(
            f"model={cfg.name} is a {expected} model, but {folder} holds a {kind} checkpoint: "
            f"use model=hf model.path={folder}"
        )
    return faults


def _weights(folder: Path) -> tuple[tuple[Path, ...], list[str]]:
    """The weight files that would be read, safetensors before .bin, with their faults."""
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        return (), [f"{folder} holds no weights: expected {WEIGHTS[0]} or {WEIGHTS[2]} (it holds: {_listing(folder)})"]
    files: tuple[Path, ...] = (found,)
    if found.suffix == ".json":
        try:
            files = tuple(
                folder / name for name in sorted(set(json.loads(found.read_text("utf-8"))["weight_map"].values()))
            )
        except (*NOT_JSON, KeyError, AttributeError, TypeError) as error:
            return (), [f"{found} is not an index of weight files ({error}). Fetch the checkpoint again"]
    return files, [fault for file in files if (fault := _weight_fault(file))]


def _weight_fault(file: Path) -> str | None:
    if not file.is_file():
        return f"{file} is missing though the index beside it names it. Fetch the checkpoint again"
    if file.stat().st_size == 0:
        return f"{file} is empty. Fetch the checkpoint again"
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="np"):  # reads the header and compares it with the file's length
                pass
        except SafetensorError as error:
            return f"{file} is damaged or cut short ({error}). Fetch the checkpoint again"
    return None


def _tokenizer_folder(cfg: ModelConfig, folder: Path, layout: str) -> tuple[Path | None, list[str]]:
    """Where the tokenizer lies: `model.tokenizer`, else beside the weights, else state-spaces' one."""
    name = cfg.tokenizer
    if name is None and layout == STATE_SPACES and not _has_tokenizer(folder):
        name = state_spaces.TOKENIZER
    if name is None:
        found = folder
    else:
        try:
            found = _local_or_hub(name, "model.tokenizer", _has_tokenizer)
        except InputError as error:
            return None, [str(error)]
    if _has_tokenizer(found):
        return found, []
    what = (
        f"holds no tokenizer (it holds: {_listing(found)})"
        if found.is_dir()
        else "does not exist, so there is no tokenizer"
    )
    return None, [f"{found} {what}: give model.tokenizer=FOLDER, a folder with one of {', '.join(TOKENIZERS)}"]


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def _listing(folder: Path, most: int = 8) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return (", ".join(names[:most]) + (", …" if len(names) > most else "")) or "nothing"
