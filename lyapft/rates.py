"""Learning rates chosen on the validation loss of a study, and used by another: `python -m lyapft.rates runs/lr`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from lyapft import records
from lyapft.errors import NOT_JSON, InputError
from lyapft.records import Record, write_atomically

FILE = "learning_rates.yaml"


def table(found: Sequence[Record]) -> pd.DataFrame:
    """Mean validation loss over seeds by (model, peft, learning rate), and which rate is the best of its recipe.

    A rate with which a training broke down has the loss infinity: one bad seed is enough.

    Returns:
        columns model, peft, learning_rate, loss, seeds, chosen, edge (chosen, and the largest or smallest tried).
    Raises:
        InputError: no record has a validation loss.
    """
    rows = [
        {
            "model": record["choices"]["model"],
            "peft": record["choices"]["peft"],
            "learning_rate": float(record["config"]["trainer"]["learning_rate"]),
            "loss": (record.get("validation") or {}).get("loss", float("inf")),
        }
        for record in found
        if records.is_final(record) and (record["status"] != "ok" or record.get("validation"))
    ]
    if not rows:
        raise InputError(
            "no finished cell with a validation loss: run `python train.py study=lr`, or set trainer.validation_rows"
        )
    frame = pd.DataFrame(rows)
    mean = frame.groupby(["model", "peft", "learning_rate"])["loss"].agg(["mean", "size"]).reset_index()
    mean.columns = pd.Index(["model", "peft", "learning_rate", "loss", "seeds"])
    recipe = mean.groupby(["model", "peft"])
    mean["chosen"] = mean.index.isin(recipe["loss"].idxmin()) & (mean["loss"] < float("inf"))
    ends = mean.index.isin(recipe.head(1).index) | mean.index.isin(recipe.tail(1).index)
    mean["edge"] = mean["chosen"] & ends
    return mean


def chosen(choices: pd.DataFrame) -> dict[str, dict[str, float]]:
    """The best rate by model and peft, from `table`."""
    best: dict[str, dict[str, float]] = {}
    for row in choices[choices["chosen"]].itertuples():
        best.setdefault(str(row.model), {})[str(row.peft)] = float(row.learning_rate)
    return best


def applied(cfg: DictConfig) -> DictConfig:
    """A cell's config with the rates of the file that `rates` names, where that has its model and peft.

    Raises:
        InputError: no such file, or not one of `python -m lyapft.rates`.
    """
    if cfg.rates is None:
        return cfg
    path = Path(cfg.rates)
    try:
        known = OmegaConf.to_container(OmegaConf.load(path))
        own = {str(peft): float(rate) for peft, rate in (known or {}).get(cfg.model.name, {}).items()}  # type: ignore[union-attr]
    except OSError as error:
        raise InputError(f"rates={path}: {error.strerror}; python -m lyapft.rates runs/lr writes {FILE}") from None
    except (YAMLError, OmegaConfBaseException, AttributeError, TypeError, *NOT_JSON) as error:
        raise InputError(f"rates={path} is no file of learning rates, model: {{peft: rate}}: {error}") from None
    settled = cfg.copy()
    settled.model.learning_rate = {**cfg.model.learning_rate, **own}
    settled.rates = None  # they are in the config now
    return settled


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, write the choice into the study's folder; 0 when it is there, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m lyapft.rates",
        description="The learning rate of each model and peft with the smallest validation loss in a study (made by "
        f"`python train.py study=lr`), written to its {FILE}; `python train.py rates=runs/lr/{FILE} …` uses them.",
    )
    parser.add_argument("study", type=Path, help="folder of the study, runs/lr")
    options = parser.parse_args(arguments)
    try:
        choices = table([record for _, record in records.load_study(options.study)])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shown = choices.assign(chosen=choices["chosen"].map({True: "*", False: ""})).drop(columns="edge")
    print(shown.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    for row in choices[choices["edge"]].itertuples():
        print(
            f"{row.model}, {row.peft}: the best rate {row.learning_rate:g} is the last one tried: try beyond it",
            file=sys.stderr,
        )
    path = options.study / FILE
    write_atomically(path, lambda temporary: OmegaConf.save(OmegaConf.create(chosen(choices)), temporary))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
