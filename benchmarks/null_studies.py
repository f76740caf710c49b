"""Studies whose truth is known, drawn straight into the records that the verdict judges.

Three models by the recipes of a matrix. What a recipe's scores, costs, margins and rounding really are is chosen, noise
is added to each run, its counterpart's included, and the records get the numbers that a run would have written.

Letters: M models, R recipes, S seeds, K scores, B blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from lyapft.verdict.evidence import PAPER, PRECISION_ONLY, Evidence, gather

Array = np.ndarray[Any, Any]
Model = tuple[str, str | None, int]  # name, recurrence, parameters
MODELS: tuple[Model, ...] = (
    ("mamba", "selective_scan", 230_000),
    ("mamba2", "ssd", 250_000),
    ("transformer", None, 320_000),
)
LAYERS = {"lora": ("in_proj", "out_proj"), "lora_all": ("in_proj", "out_proj", "dt_proj")}
SHOTS, ITEMS = (0, 5), 2000
SCORES_K = np.array([0.25, 0.7])  # of every counterpart, and of the base models
BLOCKS = ("layers.0", "layers.1")
SPREAD = 0.3  # points of one score over seeds: small beside the margin, as a wide one leaves nothing to be claimed
COST_SPREAD = 0.05  # of ln time and ln memory


class Recipe(NamedTuple):
    """A column of the matrix."""

    precision: str
    peft: str
    memory_buffer: str = "untied"
    steps: int = 120


FULL = Recipe("fp32", "none")
MATRIX = tuple(Recipe(form, peft) for peft in ("none", "lora", "lora_all") for form in ("fp32", "bf16", "fp16"))
TIED = (FULL, *(Recipe(form, "lora", tied) for form in ("fp32", "bf16", "fp16") for tied in ("tied", "untied")))
ICL = (Recipe("fp32", "none", steps=0), *MATRIX)


# --- noise -----------------------------------------------------------------------------------------------------------


def normal(truth: Array, spread: float, rng: np.random.Generator) -> Array:
    """Points with normal noise."""
    return truth + spread * rng.standard_normal(truth.shape)


def heavy(truth: Array, spread: float, rng: np.random.Generator) -> Array:
    """Points with noise of heavy tails: Student's t with three degrees of freedom, of the same standard deviation."""
    return truth + spread * rng.standard_t(3, truth.shape) / np.sqrt(3)


def items(truth: Array, spread: float, rng: np.random.Generator) -> Array:
    """Points by counted answers: of the right ones and of the wrong ones a share changes, of which the spread is."""
    flip = min(0.45, ITEMS * (spread / 100) ** 2)
    flip = np.maximum(flip, 1.2 * np.abs(truth) / 100)
    won, lost = (rng.binomial(ITEMS // 2, flip + sign * truth / 100) for sign in (1, -1))
    return 100.0 * (won - lost) / ITEMS


NOISES: dict[str, Callable[[Array, float, np.random.Generator], Array]] = {
    "normal": normal,
    "heavy": heavy,
    "items": items,
}


# --- truth -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """What recipes really do: points beside full precision with all weights, and ln of their cost."""

    points: Callable[[Recipe], float] = lambda _: 0.0
    ln_cost: float = 0.0  # of every recipe but the counterpart
    spread: float = SPREAD  # points

    def part(self, ours: Recipe, theirs: Recipe) -> float:
        """True difference of two recipes in points."""
        return self.points(ours) - self.points(theirs)


# --- studies ---------------------------------------------------------------------------------------------------------


class Study:
    """Records of one shape, which get new numbers for every study, and the evidence that they are."""

    def __init__(self, recipes: Sequence[Recipe], seeds: int, models: Sequence[Model] = MODELS) -> None:
        self.recipes, self.seeds, self.models = tuple(recipes), seeds, tuple(models)
        self._places = {place: self._record(*place) for place in self._all()}
        for (m, r, s), record in self._places.items():
            record["divergence"] = [self._entry(kind, m, r, s, other) for kind, other in self._counterparts(r).items()]
        self.evidence: Evidence = gather(list(self._places.values()))

    def _all(self) -> Iterator[tuple[int, int, int]]:
        for m in range(len(self.models)):
            for r, recipe in enumerate(self.recipes):
                yield from ((m, r, s) for s in range(self.seeds if recipe.steps else 1))

    def _record(self, m: int, r: int, s: int) -> dict[str, Any]:
        (model, kernel, parameters), own = self.models[m], self.recipes[r]
        adapted = {name: {"adapted": 2} for name in LAYERS.get(own.peft, ())}
        return {
            "id": f"{model}-{r}-{s}",
            "status": "ok",
            "choices": {"model": model, "data": "d", "task": "t", "precision": own.precision, "peft": own.peft},
            "config": {
                "trainer": {"steps": own.steps},
                "model": {"init": "pretrained"},
                "peft": {"memory_buffer": own.memory_buffer, "targets": own.peft},
            },
            "seed": s,
            "kernels": {kernel: "cpu"} if kernel else {},
            "model": {"parameters_total": parameters},
            "peft": {"coverage": adapted},
            "scores": [{"task": "t", "shots": shots, "metric": "acc", "value": 0.0, "n": ITEMS} for shots in SHOTS],
            "cost": {},
            "stability": {},
        }

    def _counterparts(self, r: int) -> dict[str, int]:
        """Places of the counterparts; its own where the recipe is its own."""
        own = self.recipes[r]
        return {
            PAPER: self.recipes.index(FULL) if own.steps else r,
            PRECISION_ONLY: self.recipes.index(own._replace(precision="fp32")),
        }

    def _entry(self, kind: str, m: int, r: int, s: int, other: int) -> dict[str, Any]:
        scores = [] if other == r else [{"task": "t", "shots": shots, "signed_points": 0.0} for shots in SHOTS]
        status = "self" if other == r else "ok"
        return {"counterpart": kind, "reference_id": self._places[m, other, s]["id"], "status": status} | {
            "per_score": scores
        }

    def draw(self, truth: Truth, noise: str, rng: np.random.Generator) -> None:
        """Give every record the numbers of a run."""
        shape = len(self.models), len(self.recipes), self.seeds
        true_R = np.array([truth.points(recipe) for recipe in self.recipes])
        points = NOISES[noise](np.broadcast_to(true_R[:, None, None], (*shape, len(SHOTS))), truth.spread, rng)
        cost_R = np.array([truth.ln_cost * (recipe != FULL) for recipe in self.recipes])
        spread = rng.standard_t(3, (2, *shape)) / np.sqrt(3) if noise == "heavy" else rng.standard_normal((2, *shape))
        ln_costs = cost_R[:, None] + COST_SPREAD * spread
        margins = np.exp(0.1 * rng.standard_normal(shape)) * 1e-3
        blocks = np.exp(0.1 * rng.standard_normal((*shape, len(BLOCKS)))).cumsum(axis=-1) * 1e-3
        values = SCORES_K + points / 100
        for (m, r, s), record in self._places.items():
            # an untrained base is what its model is, without the noise of a training
            own = values[m, r, s] if self.recipes[r].steps else SCORES_K
            for score, value in zip(record["scores"], own.tolist(), strict=True):
                score["value"] = value
            for entry, other in zip(record["divergence"], self._counterparts(r).values(), strict=True):
                apart = points[m, r, s] - points[m, other, s]
                for score, signed in zip(entry["per_score"], apart.tolist(), strict=False):
                    score["signed_points"] = signed
            time, memory = np.exp(ln_costs[:, m, r, s]).tolist()
            record["cost"] |= {"tokens_per_s": 1000.0 / time, "peak_bytes_per_token": 100.0 * memory}
            record["stability"]["margin"] = float(margins[m, r, s])
            record["shadow"] = {"deviation_max_by_block": dict(zip(BLOCKS, blocks[m, r, s].tolist(), strict=True))}
        self.evidence = replace(self.evidence)  # which remembers no score of the study before

    @property
    def records(self) -> list[dict[str, Any]]:
        """Of all runs."""
        return list(self._places.values())
