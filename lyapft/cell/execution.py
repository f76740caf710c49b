"""A cell from its model to its scores: build, train, evaluate, save."""

import logging
import time
from typing import cast

from lightning.pytorch.loggers import Logger

from lyapft import data, ranks, records, tasks
from lyapft.cell.assembly import Assembly, assemble, gathered
from lyapft.cell.crew import call, together
from lyapft.cell.preparation import Cell
from lyapft.cell.state import clean_state
from lyapft.cell.training import train
from lyapft.cell.validation import validation
from lyapft.data import Stream, Table, TokenDataset
from lyapft.halving import EVALUATION, VALIDATION, Halvings
from lyapft.records import Record
from lyapft.resume import Signals

log = logging.getLogger(__name__)


def execute(cell: Cell, record: Record, loggers: list[Logger], signals: Signals, halvings: Halvings) -> None:
    """Build, train, evaluate, save; fills the record as it goes. Only the first of several processes evaluates."""
    settings, started = cell.config.trainer, time.perf_counter()
    if settings.steps:
        call(cell)
    with clean_state(cell) as precision:
        parts = assemble(cell, precision)
        rows, held_out = _rows(cell, parts)
        record |= _described(cell, parts, rows)
        record["cost"] = {}
        if settings.steps:
            with together():
                train(cell, record, parts, rows, loggers, signals, halvings)
                record["data"] = rows.record()  # of a stream it is known now
                if settings.strategy != "ddp":
                    parts = gathered(cell, parts)
        if not ranks.leads():
            return
        if held_out is not None:
            model, halvings.doing = parts.backbone.model.to(cell.device), VALIDATION
            record["validation"] = validation(model, held_out, cell, precision.autocast, halvings.rows)
        halvings.doing = EVALUATION
        evaluation = time.perf_counter()
        _score(cell, record, parts, halvings)
        signals.heed()
        if settings.steps:  # else they are the base's
            record["files"]["weights"] = parts.peft.save(cell.folder)
        ended = time.perf_counter()
        earlier = record.get("resumed", {}).get("earlier_s", 0.0)
        record["cost"] |= {"eval_wall_s": ended - evaluation, "wall_s": ended - started + earlier}


def _rows(cell: Cell, parts: Assembly) -> tuple[TokenDataset | Stream, TokenDataset | None]:
    """The rows to train on, and those kept from training, if any."""
    cfg, tokenizer = cell.config, parts.backbone.tokenizer
    if cfg.data.get("streaming", False):  # only tables can be
        table, content = cast(Table, cell.source), cell.science["data"]["content"]
        stream = Stream(table, tokenizer, cfg.data.max_length, content, cfg.data.packing)
        return stream.split(cfg.trainer.validation_rows)
    whole = data.tokenised(
        cell.source,
        tokenizer,
        cfg.data.max_length,
        cell.science["data"],
        cell.tokens,
        cfg.trainer.progress,
    )
    rows, held_out = whole.split(cfg.trainer.validation_rows)
    if not cfg.data.packing:
        return rows, held_out
    packs = data.pack(rows, cfg.data.max_length)
    alone = " (none fits beside another)" * (len(packs) == len(rows))
    log.info("data.packing: %d rows in %d packs%s", len(rows), len(packs), alone)
    return packs, held_out


def _described(cell: Cell, parts: Assembly, rows: TokenDataset | Stream) -> Record:
    """What a record says before the training; of the peft, so that an attempt that fails says it too."""
    base, seam, peft, precision = parts
    model = {"name": cell.config.model.name, "architecture": base.architecture, "hash": base.hash}
    return {
        "model": model | peft.parameters(),
        "precision": precision.record(),
        "recurrences_unknown": seam.unknown,
        "data": rows.record(),
        "tasks": cell.task.record(),
        "peft": peft.record(),
    }


def _score(cell: Cell, record: Record, parts: Assembly, halvings: Halvings) -> None:
    """Answer the tasks; scores go into the record, answers beside it."""
    base, seam, _, precision = parts
    scores, items = tasks.evaluate(
        base.model.to(cell.device),
        base.tokenizer,
        cell.task,
        batch_tokens=halvings.batch_tokens,
        autocast=precision.autocast,
        trained_length=base.trained_length,
        max_positions=base.max_positions,
        folder=cell.tokens,
        progress=cell.config.trainer.progress,
    )
    record["scores"] = [score.as_dict() for score in scores]
    records.save_items(cell.folder, items)
    record["kernels"], record["kernel_fallbacks"] = dict(seam.kernels), dict(seam.fallbacks)
