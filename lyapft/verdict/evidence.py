"""Records sorted into recipes: which runs are seeds of one thing, which are reruns, which failed."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import pandas as pd

from lyapft.divergence import ALPHA, MARGIN_POINTS, POWER, SPIKE_POINTS
from lyapft.errors import InputError
from lyapft.records import Record, divergence_entry, is_seedless

PAPER, PRECISION_ONLY = "paper", "precision_only"
BROKE_DOWN = (
    "nonfinite",
    "loss_scale_underflow",
    "stopped_by_guard",
)  # the recipe's own doing: a result, not an accident
ScoreKey = tuple[str, int]  # task, shots
Part = frozenset[tuple[str, str]]  # of a config: settings and values
NOT_THE_RECIPE = ("seed", "replicate", "runs_as.threads")  # what may differ between runs of one recipe


@dataclass(frozen=True)
class Settings:
    """What the reader decides: how much difference matters, at what risk, and what is paid for."""

    margin: float = MARGIN_POINTS  # percentage points: differences inside ± this do not matter
    alpha: float = ALPHA
    power: float = POWER  # of the study that an undecided recipe would need
    spike: float = SPIKE_POINTS  # percentage points: a single score further off is called a spike
    speed_weight: float = 1.0  # how much time counts in the cost
    memory_weight: float = 1.0  # how much memory counts in the cost

    def __post_init__(self) -> None:
        wrong = {name: value for name, value in vars(self).items() if not math.isfinite(value)}
        if wrong or self.margin <= 0 or not 0 < self.alpha < 0.5 or not 0 < self.power < 1:
            given = wrong or {"margin": self.margin, "alpha": self.alpha, "power": self.power}
            text = ", ".join(f"{name} {value:g}" for name, value in given.items())
            raise InputError(f"finite numbers are needed, margin > 0, 0 < alpha < 0.5 and 0 < power < 1; given: {text}")
        if min(self.speed_weight, self.memory_weight) < 0 or self.speed_weight + self.memory_weight == 0:
            raise InputError(
                "cost weights must not be negative, nor both 0; given: "
                f"speed {self.speed_weight:g}, memory {self.memory_weight:g}"
            )


@dataclass(frozen=True)
class Recipe:
    """One way to fine-tune one model on one data set: everything but the seed.

    `runs` are its finished runs, one per seed; `reruns` the same again (another replicate or thread count); `failed`
    the others.
    """

    model: str
    data: str
    task: str
    precision: str
    peft: str
    label: str
    runs: tuple[Record, ...]
    reruns: tuple[Record, ...] = ()
    failed: tuple[Record, ...] = ()

    @property
    def setting(self) -> tuple[str, str, str]:
        """What recipes must share to be compared: model, data and task."""
        return self.model, self.data, self.task

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells it from every other recipe of the study."""
        return *self.setting, self.label

    @property
    def name(self) -> str:
        """Model and recipe, as sentences name it."""
        return f"{self.model} · {self.label}"

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the finished runs."""
        return tuple(seed_of(run) for run in self.runs)

    @property
    def trained(self) -> bool:
        """Whether its runs took any step, not only scored a base."""
        return any(((run.get("config") or {}).get("trainer") or {}).get("steps") != 0 for run in self.runs)

    @property
    def seedless(self) -> bool:
        """Whether a seed changes nothing: a pretrained model that is not trained runs once, for all seeds."""
        runs = (*self.runs, *self.failed)
        return bool(runs) and all(map(is_seedless, runs))

    @property
    def but_format(self) -> str:
        """The label without the number format."""
        return self.label.removeprefix(f"{self.precision} · ")

    @cached_property
    def settings(self) -> dict[str, str]:
        """The config as flat names and JSON values, without what may differ between its runs."""
        run = next(iter((*self.runs, *self.reruns, *self.failed)), {})
        return {key: value for key, value in flat(run.get("config") or {}).items() if key not in NOT_THE_RECIPE}

    def differs_only_in(self, other: "Recipe", *groups: str) -> bool:
        """Whether all settings are those of the other recipe, but for these groups (or single names)."""
        sides = [
            {key: value for key, value in recipe.settings.items() if not key.startswith(groups)}
            for recipe in (self, other)
        ]
        return sides[0] == sides[1]

    @cached_property
    def adapted(self) -> frozenset[str]:
        """Names of the layers that the peft adapts, as the runs' records have them."""
        pefts = {id(peft): peft for run in self.runs if (peft := run.get("peft"))}  # records share equal parts
        return frozenset(
            name
            for peft in pefts.values()
            for name, counts in (peft.get("coverage") or {}).items()
            if counts.get("adapted")
        )

    def broke_down(self) -> tuple[Record, ...]:
        """Runs whose training ended in numbers that are not finite, at most one per seed; reruns are none of them."""
        return tuple(run for run in self.failed_seeds().values() if run["status"] in BROKE_DOWN)

    def failed_seeds(self) -> dict[int, Record]:
        """Runs that did not finish, of the seeds that have no other; reruns for the noise floor are none of them."""
        again = set(map(id, self.failed_reruns()))
        return {seed_of(run): run for run in self.failed if id(run) not in again}

    def failed_reruns(self) -> tuple[Record, ...]:
        """Runs that did not finish and are not what the recipe is judged by: replicates, other thread counts."""
        finished = set(self.seeds) if self.failed else ()
        return tuple(run for run in self.failed if is_rerun(run) or seed_of(run) in finished)

    def breakdowns(self) -> list[str]:
        """On how many of its seeds, and in how many reruns apart from them, the training broke down, in words."""
        seeds, reruns = len(self.runs) + len(self.failed_seeds()), len(self.reruns) + len(self.failed_reruns())
        again = [run for run in self.failed_reruns() if run["status"] in BROKE_DOWN]
        counted = ((self.broke_down(), f"on {{}} of {seeds} seeds"), (again, f"in {{}} of {reruns} reruns"))
        return [
            f"training broke down {where.format(len(runs))} ({', '.join(sorted({str(run['status']) for run in runs}))})"
            for runs, where in counted
            if runs
        ]


@dataclass(frozen=True, slots=True)
class Scores:
    """What a record says of each task and number of shots.

    `values` are the scores by which cells are compared, as fractions, `items` the numbers of items behind them.
    `beyond` counts, where there are any, items that are longer than what the base model was trained on: the most, over
    metrics. `chance` is the accuracy of a blind guess, where the record has it.
    """

    values: Mapping[ScoreKey, float]
    items: Mapping[ScoreKey, int]
    beyond: Mapping[ScoreKey, int]
    chance: Mapping[ScoreKey, float]


@dataclass(frozen=True)
class Evidence:
    """All recipes of a study, its records by identity, and the answers of those whose items are at hand."""

    study: str
    recipes: tuple[Recipe, ...]
    by_id: Mapping[str, Record]
    items: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    _scores: dict[int, Scores] = field(default_factory=dict, init=False, repr=False, compare=False)

    def scores(self, record: Record) -> Scores:
        """The scores of one of its records, read once: whatever it is a counterpart of asks for them."""
        found = self._scores.get(id(record))
        return self._scores.setdefault(id(record), scores_of(record)) if found is None else found


def gather(records: Sequence[Record], items: Mapping[str, pd.DataFrame] | None = None) -> Evidence:
    """Sort the records of one study into recipes, in the order in which they are given."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    known: dict[tuple[str, int], Part] = {}  # by identity: records of a study share equal parts
    for record in records:
        groups.setdefault((*_choices(record), _science(record, known)), []).append(record)
    names = _labels(groups)
    recipes = [_recipe(key, name, runs) for (key, runs), name in zip(groups.items(), names, strict=True)]
    study = next((str(record["study"]) for record in records if record.get("study")), "")
    return Evidence(study, tuple(recipes), {str(record["id"]): record for record in records}, items or {})


def is_own_counterpart(recipe: Recipe) -> bool:
    """Whether the recipe is full precision with every weight trained: what the others are measured against."""
    return any((divergence_entry(run, PAPER) or {}).get("status") == "self" for run in recipe.runs)


def scores_of(record: Record) -> Scores:
    """Its scores, each looked at once: a large study has a million."""
    values, items, beyond = dict[ScoreKey, float](), dict[ScoreKey, int](), dict[ScoreKey, int]()
    chance: dict[ScoreKey, float] = {}
    for score in record.get("scores") or ():
        key = _key(score["task"], score["shots"])
        whole = score.get("value") is not None and score.get("n")  # else there is nothing to compare
        if whole and score.get("metric", "acc") == "acc":  # as `records.accuracies`
            values[key], items[key] = float(score["value"]), int(score["n"])
            if 0.0 < float(score.get("chance") or 0.0) < 1.0:  # else there is nothing to guess
                chance[key] = float(score["chance"])
        if count := int(score.get("beyond_trained_length") or 0):
            beyond[key] = max(beyond.get(key, 0), count)
    return Scores(values, items, beyond, chance)


def score_key(score: Mapping[str, Any]) -> ScoreKey:
    """Task and number of shots of a score; one object for all scores that are alike, as a study has very many."""
    return _key(str(score["task"]), int(score["shots"]))


@cache
def _key(task: str, shots: int) -> ScoreKey:
    return task, shots


def _choices(record: Record) -> tuple[str, ...]:
    chosen = record.get("choices") or {}
    return tuple(str(chosen.get(group, "?")) for group in ("model", "data", "task", "precision", "peft"))


_encoded = json.JSONEncoder(sort_keys=True, default=str).encode


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by their dotted names, values as JSON."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = _encoded(value)
    return found


def _science(record: Record, known: dict[tuple[str, int], Part]) -> frozenset[Part]:
    """The config of a run, part by part, without what may differ between runs of one recipe."""
    parts = []
    for key, value in (record.get("config") or {}).items():
        place = key, id(value)
        if place not in known:
            known[place] = frozenset((k, v) for k, v in flat({key: value}).items() if k not in NOT_THE_RECIPE)
        parts.append(known[place])
    return frozenset(parts)


def _labels(groups: Iterable[tuple[Any, ...]]) -> list[str]:
    """Precision and peft, and the settings that tell recipes apart which share both."""
    alike: dict[tuple[Any, ...], list[dict[str, str]]] = {}
    for key in groups:
        alike.setdefault(key[:-1], []).append({k: v for part in key[-1] for k, v in part})
    varying = {key: _varying(found) for key, found in alike.items()}
    own = {key: iter(found) for key, found in alike.items()}
    names = []
    for key in groups:
        settings = next(own[key[:-1]])
        told = [f"{k}={settings[k]}" for k in varying[key[:-1]] if k in settings]
        names.append(" · ".join([key[3], key[4], *told]))
    return names


def _varying(alike: Sequence[Mapping[str, str]]) -> list[str]:
    """Settings that some of the recipes have otherwise, by name."""
    return sorted(k for k in {k for one in alike for k in one} if len({one.get(k) for one in alike}) > 1)


def _recipe(key: tuple[Any, ...], label: str, records: Sequence[Record]) -> Recipe:
    finished = [record for record in records if record["status"] == "ok"]
    # The usual thread count stands for the recipe, the others measure the floor.
    first = [record for record in finished if not is_rerun(record)]
    counts = Counter(threads(record) for record in first)
    usual = max(counts, key=lambda count: counts[count], default=None)
    firsts = set(map(id, first))
    runs: dict[int, Record] = {}
    reruns = []
    for record in finished:
        if id(record) not in firsts or threads(record) != usual or seed_of(record) in runs:
            reruns.append(record)
        else:
            runs[seed_of(record)] = record
    failed = tuple(record for record in records if record["status"] != "ok")
    ordered = tuple(runs[seed] for seed in sorted(runs))
    model, data, task, precision, peft = key[:5]
    return Recipe(model, data, task, precision, peft, label, ordered, tuple(reruns), failed)


def is_rerun(record: Record) -> bool:
    """Whether a run is another of the same cell, made for the noise floor."""
    return bool(record.get("replicate")) or record.get("role") == "rerun"


def seed_of(record: Record) -> int:
    """Seed of a run; 0 where a record is so incomplete that it has none."""
    return int(record.get("seed") or 0)


def threads(record: Record) -> int | None:
    """CPU threads that the run had."""
    count = (record.get("environment") or {}).get("threads")
    return None if count is None else int(count)
