"""The models that an experiment compares: base models by name, or finished runs by folder, in float32 at rest."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lyapft import backbone, config, records, recurrence
from lyapft.errors import InputError
from lyapft.evaluation import rebuild_config


class Subject(NamedTuple):
    """A model with its name as given, its transformers model_type, and whether it has a recurrent state."""

    name: str
    architecture: str
    recurrent: bool
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase


@contextmanager
def load(name: str) -> Iterator[Subject]:
    """A base model of conf/model/, or the trained weights of runs/STUDY/CELL; stock kernels, which JVPs need.

    Raises:
        InputError: neither; or a run that did not end well.
    """
    folder = Path(name)
    record = records.load(folder) if (folder / records.RECORD).is_file() else None
    if record is not None and record["status"] != "ok":
        raise InputError(f"{folder} has status {record['status']}: only a finished run can be looked at")
    cell: Any = rebuild_config(record) if record is not None else None
    chosen: Any = cell.model if cell is not None else config.load_choice("model", name)
    base = backbone.load(chosen)
    seam = recurrence.install(base.model, "stock")
    if cell is not None:
        peft = instantiate(cell.peft)
        peft.attach(base, seam)
        peft.load(folder)
    label = folder.name if record is not None else name
    yield Subject(label, base.architecture, bool(seam.layers), base.model.eval(), base.tokenizer)


def prompts(subject: Subject, texts: Sequence[str], count: int, tokens: int) -> Tensor:
    """(count, tokens) ids: the first texts that are long enough, cut to one length, so that nothing is padding.

    Raises:
        InputError: too few of them are.
    """
    found: list[list[int]] = []
    for text in texts:
        ids = subject.tokenizer(text)["input_ids"][:tokens]
        found += [ids] if len(ids) == tokens else []
        if len(found) == count:
            return torch.tensor(found)
    raise InputError(
        f"{subject.name}: only {len(found)} of {len(texts)} texts have {tokens} tokens: ask for fewer prompts or tokens"
    )
