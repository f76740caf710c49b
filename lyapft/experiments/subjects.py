"""The models that an experiment compares: base models by name, or finished runs by folder, in float32 at rest."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lyapft import backbone, config, precision, records, recurrence
from lyapft.errors import InputError
from lyapft.evaluation import finished


class Subject(NamedTuple):
    """A model with its name as given, its transformers model_type, and whether it has a recurrent state."""

    name: str
    architecture: str
    recurrent: bool
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    seam: recurrence.Seam
    record: records.Record | None = None  # of a run

    def named(self) -> dict[str, Any]:
        """What the rows of an experiment say of the model; runs of one `recipe` differ in their seed alone."""
        choices = (self.record or {}).get("choices") or {}
        recipe = " · ".join(str(choices[key]) for key in ("model", "data", "precision", "peft")) if choices else None
        return {"model": self.name, "recipe": recipe, "architecture": self.architecture, "recurrent": self.recurrent}


def record_of(name: str) -> records.Record | None:
    """The record of a run, if the name is the folder of one."""
    return records.load(Path(name)) if (Path(name) / records.RECORD).is_file() else None


@contextmanager
def load(name: str, kernel: str = "stock", strategy: precision.Precision | None = None) -> Iterator[Subject]:
    """A base model of conf/model/, or the trained weights of runs/STUDY/CELL.

    Args:
        name: of the model, or the folder of the run.
        kernel: stock can be differentiated forward.
        strategy: stores the weights in its format; None: float32.
    Raises:
        InputError: neither; or a run that did not end well.
    """
    folder, record = Path(name), record_of(name)
    if record is None and not (config.CONF_DIR / "model" / f"{name}.yaml").is_file():
        raise InputError(
            f"experiment.models: {name!r} is neither a model of conf/model/ nor the folder of a finished run"
        )
    cell: Any = finished(folder)[1] if record is not None else None
    chosen: Any = cell.model if cell is not None else config.load_choice("model", name)
    base = backbone.load(chosen)
    seam = recurrence.install(base.model, kernel)
    if cell is not None:
        peft = instantiate(cell.peft)
        peft.attach(base, seam)
    if strategy is not None:
        strategy.cast(base.model)
    if record is not None and record["files"]["weights"] is not None:  # a cell of no steps is its base
        peft.load(folder)
    label = folder.name if record is not None else name
    yield Subject(label, base.architecture, bool(seam.layers), base.model.eval(), base.tokenizer, seam, record)


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
