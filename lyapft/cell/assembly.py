"""What a cell trains: a model with its kernels, its adapters and its number format."""

from typing import NamedTuple

from hydra.utils import instantiate

from lyapft import backbone, ranks, recurrence, sharding
from lyapft.cell.preparation import Cell
from lyapft.peft import Strategy
from lyapft.precision import Precision


class Assembly(NamedTuple):
    """A model as its recipe wants it."""

    backbone: backbone.Backbone
    seam: recurrence.Seam
    peft: Strategy
    precision: Precision


def assemble(cell: Cell, precision: Precision) -> Assembly:
    """The model of a cell before its training."""
    cfg = cell.config
    base = backbone.load(cfg.model)
    if cfg.model.init == "scratch":  # so that whoever loads these weights knows which lengths they have seen
        base.model.config.trained_length = base.trained_length = cfg.data.max_length
    kernel = cfg.kernel
    seam = recurrence.install(base.model, kernel.name, kernel.require, fused=kernel.fused, device=cell.device)
    peft = instantiate(cfg.peft)
    peft.attach(base, seam)
    precision.cast(base.model)
    return Assembly(base, seam, peft, precision)


def gathered(cell: Cell, trained: Assembly) -> Assembly:
    """On the first process a model with the whole of the weights that the processes have trained in parts."""
    if not ranks.leads():
        sharding.copy_weights(trained.backbone.model, None)
        return trained
    whole = assemble(cell, trained.precision)
    sharding.copy_weights(trained.backbone.model, whole.backbone.model)
    whole.seam.kernels.update(trained.seam.kernels)
    whole.seam.fallbacks.update(trained.seam.fallbacks)
    return whole
