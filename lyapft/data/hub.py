"""Data sets by name: from the hub, or from the local cache of `datasets` where the hub cannot be reached."""

from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import huggingface_hub
from datasets import IterableDataset, load_dataset
from huggingface_hub import HfApi
from huggingface_hub.utils import get_session

from lyapft.data.files import Row
from lyapft.errors import InputError

TIMEOUT_S = 5.0


@contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Offline mode while the hub is silent: the client fails, or finds its cache, in a second, not half a minute."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        get_session().head(huggingface_hub.constants.ENDPOINT, timeout=TIMEOUT_S)
    except Exception:  # noqa: BLE001 - the kinds differ between versions of the client; each means no connection
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def load_rows(name: str, split: str) -> list[Row]:
    """All rows of a split.

    Raises:
        InputError: neither the hub nor the cache gave them.
    """
    with _named(name), _offline_if_unreachable():
        return list(load_dataset(name, split=split))


def stream_rows(name: str, split: str, commit: str) -> IterableDataset:
    """The rows of a split one after the other, as they are fetched.

    Raises:
        InputError: the hub does not give them.
    """
    with _named(name):
        return load_dataset(name, split=split, revision=commit, streaming=True)


def commit_of(name: str) -> str:
    """Which state of a data set the hub has now.

    Raises:
        InputError: it cannot be asked.
    """
    with _named(name):
        return str(HfApi().dataset_info(name, timeout=TIMEOUT_S).sha)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say what it means that a name gave no rows."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a dozen kinds; whichever it is, the name gave no rows
        reason = str(error).split("\n")[0]
        raise InputError(
            f"data.path={name} is no local file or folder, and no data set of this name could be loaded "
            f"({type(error).__name__}: {reason}): check the path, or the name and the network"
        ) from None
