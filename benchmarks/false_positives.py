"""Share of simulated studies in which the verdict claims what is not so, for every claim that it can make.

Each case is a truth under which some claims are false: a page counts where it makes any false claim of that kind, of
whatever recipe, model or score. Beside it the power that the case leaves for what is true. Every study is made of
records and goes through the verdict's own path: compared with both counterparts, contrasted, adjusted.

python -m benchmarks.false_positives [--studies N] [--cases NAME …] [--noise KIND …] [--seeds N …] [--processes N]
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import claims as said
from benchmarks.claims import Claim, Page
from benchmarks.null_studies import ICL, MATRIX, MODELS, NOISES, TIED, Model, Recipe, Study, Truth
from lyapft.verdict.evidence import PAPER, PRECISION_ONLY

# --- cases -----------------------------------------------------------------------------------------------------------

LOSS = {3: 6.0, 5: 2.3, 8: 1.6}  # points, by seeds, that most pages show of most recipes that lose them
LITTLE = {3: 2.0, 5: 1.35, 8: 1.25}  # that a page shows of one or two: there noise chooses which


@dataclass(frozen=True)
class Case:
    """A truth, and the claims that it makes false; `truth` depends on the seeds where power does."""

    recipes: Sequence[Recipe]
    truth: Callable[[int], Truth]
    claims: dict[str, Callable[[Page], Iterable[Claim]]]


BLAME = {
    "format to blame": said.blame_format,
    "peft to blame": said.blame_peft,
    "layers to blame": said.blame_layers,
    "block to blame": said.blame_block,
    "remedy": said.remedy,
}


def _half(recipe: Recipe) -> bool:
    return recipe.precision != "fp32"


CASES = {
    "nothing differs": Case(
        MATRIX,
        lambda _: Truth(),
        {
            "outside the margin": said.beyond(PAPER),
            "single scores outside": said.single_scores,
            "steadier": said.steadier,
            "cheaper": said.cheaper,
            "stability margin differs": said.margin_differs,
            "compare": said.worse_than_before,
        },
    ),
    "half precision lies on the margin": Case(
        MATRIX,
        lambda _: Truth(lambda recipe: float(_half(recipe))),
        {
            "equivalent": said.equivalent(PAPER),
            "equivalent to the same peft": said.equivalent(PRECISION_ONLY),
            "outside the margin": said.beyond(PAPER),
            "outside, same peft": said.beyond(PRECISION_ONLY),
            "single scores outside": said.single_scores,
        },
    ),
    "all cost half": Case(MATRIX, lambda _: Truth(ln_cost=-0.7), {"cheaper": said.cheaper, "cheapest": said.cheapest}),
    "pefts lose": Case(
        MATRIX,
        lambda seeds: Truth(lambda recipe: -LOSS[seeds] * (recipe.peft != "none")),
        BLAME,
    ),
    "pefts lose little": Case(
        MATRIX,
        lambda seeds: Truth(lambda recipe: -LITTLE[seeds] * (recipe.peft != "none")),
        BLAME,
    ),
    "formats lose": Case(
        MATRIX,
        lambda seeds: Truth(lambda recipe: -LOSS[seeds] * _half(recipe)),
        BLAME,
    ),
    "one set of layers loses": Case(
        MATRIX, lambda seeds: Truth(lambda recipe: -LOSS[seeds] * (recipe.peft == "lora")), BLAME
    ),
    "tied as untied": Case(
        TIED,
        lambda _: Truth(),
        {"setting": said.asked(single=False), "single scores of a setting": said.asked(single=True)},
    ),
    "tied on the margin": Case(
        TIED,
        lambda _: Truth(lambda recipe: float(recipe.memory_buffer == "tied")),
        {"setting equivalent": said.asked_equivalent, "setting": said.asked(single=False)},
    ),
    "tuned as base": Case(ICL, lambda _: Truth(spread=3.0), {"base against tuned": said.tuned}),
}


# --- counting --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """Studies with a false claim, of how many; and true claims made, of how many that could be."""

    false: int
    studies: int
    made: int = 0
    true: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def count(
    case: Case,
    noise: str,
    seeds: int,
    studies: int,
    rng: np.random.Generator,
    models: Sequence[Model] = MODELS,
    only: Sequence[str] = (),
) -> dict[str, Count]:
    """Of each kind of claim, over simulated studies."""
    wanted = {name: claims for name, claims in case.claims.items() if not only or name in only}
    found = dict.fromkeys(wanted, Count(0, 0))
    again = "compare" in wanted
    now, earlier = (Study(case.recipes, seeds, models) if used else None for used in (True, again))
    assert now is not None
    truth = case.truth(seeds)
    for _ in range(studies):
        for study in (now, earlier):
            if study is not None:
                study.draw(truth, noise, rng)
        page = Page(now.evidence, earlier.evidence if earlier else None, truth)
        for name, claims in wanted.items():
            own = list(claims(page))
            made = [is_made for is_made, is_false in own if not is_false]
            found[name] += Count(int(any(made and false for made, false in own)), 1, sum(made), len(made))
    return found


def _part(job: tuple[str, str, int, int, np.random.SeedSequence]) -> dict[str, Count]:
    case, noise, seeds, studies, seed = job
    return count(CASES[case], noise, seeds, studies, np.random.default_rng(seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="NAME")
    parser.add_argument("--noise", nargs="+", default=list(NOISES), choices=list(NOISES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(LOSS), choices=list(LOSS))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with ProcessPoolExecutor(options.processes) as pool:
        for case, noise, seeds in itertools.product(options.cases, options.noise, options.seeds):
            parts = np.random.SeedSequence(0).spawn(options.processes)
            share = [len(own) for own in np.array_split(range(options.studies), options.processes)]
            jobs = [(case, noise, seeds, studies, seed) for studies, seed in zip(share, parts, strict=True)]
            done = list(pool.map(_part, jobs))
            for name in done[0]:
                total = sum((one[name] for one in done), Count(0, 0))
                rate = total.false / total.studies
                power = total.made / total.true if total.true else None
                found[f"{case}: {name}, {noise}, {seeds} seeds"] = {"false": rate, "power": power}
                left = "" if power is None else f"; {power:.1%} of {total.true} true claims made"
                print(
                    f"{case}, {noise}, {seeds} seeds: {name} falsely in {rate:.2%} of {total.studies}{left}", flush=True
                )
    print(json.dumps({"benchmark": "false_positives", "studies": options.studies, "claims": found}))


if __name__ == "__main__":
    main()
