"""The verdict's tables as columns of text: a number and its interval side by side, headings in words."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lyapft.report.columns import number
from lyapft.report.tables import ABSENT, Column
from lyapft.verdict import Verdict
from lyapft.verdict.sentences.advice import cost_means
from lyapft.verdict.words import BASE, EMULATED, EMULATED_MEANS, REFERENCE, margin

Cells = Mapping[str, Any]
MOST_ROWS = 1000  # of a table that is read as text


@dataclass(frozen=True)
class Spec:
    """How one column of text is made from a row of numbers."""

    title: str
    text: Callable[[Cells], str]
    group: str = ""
    numeric: bool = True


def _plain(name: str, title: str) -> Spec:
    return Spec(title, lambda row: ABSENT if pd.isna(row[name]) else str(row[name]), numeric=False)


def _number(name: str, title: str, form: str, group: str = "") -> Spec:
    return Spec(title, lambda row: _form(row[name], form), group)


def _with_interval(name: str, title: str, form: str, group: str = "", scale: float = 1.0) -> Spec:
    def text(row: Cells) -> str:
        mean, low, high = (_form(row[key], form, scale) for key in (name, f"{name}_low", f"{name}_high"))
        return mean if low == ABSENT else f"{mean} [{low}, {high}]"

    return Spec(title, text, group)


def _cost(name: str, title: str) -> Spec:
    """A ratio that counts speed, marked where half precision was emulated."""
    plain = _with_interval(name, title, ".2f")

    def text(row: Cells) -> str:
        shown = plain.text(row)
        return f"{shown} {EMULATED}" if row["emulated"] and shown != ABSENT else shown

    return Spec(title, text, "cost")


def _form(value: Any, form: str, scale: float = 1.0) -> str:
    if value is None or pd.isna(value):
        return ABSENT
    if form == "d":
        return number(int(value), form)
    text = number(float(value) * scale, form)
    return text if text.strip("+−0.") else text.lstrip("+−")  # zero has no sign


def _p(name: str, title: str, group: str = "") -> Spec:
    def text(row: Cells) -> str:
        value = row[name]
        return ABSENT if value is None or math.isnan(value) else "<0.001" if value < 0.001 else f"{value:.3f}"

    return Spec(title, text, group)


DIFFERENCE = (
    _number("score", "recipe", ".3f", "score"),
    _number("counterpart_score", "counterpart", ".3f", "score"),
    _with_interval("difference_points", "difference [95%]", "+.2f", "signed points"),
    _plain("outcome", "outcome"),
    _p("p_equivalent", "equivalent", "p, Holm"),
    _p("p_outside", "outside", "p, Holm"),
    _p("p_different", "not 0", "p, Holm"),
)


def _shots(side: str, group: str) -> tuple[Spec, Spec]:
    """The scores behind a gain in in-context learning."""
    few = _number(f"{side}few_shot_score", "few-shot", ".3f", group)
    return _number(f"{side}zero_shot_score", "0-shot", ".3f", group), few


BEYOND = Spec("beyond trained length", lambda row: "yes" if row["beyond_trained_length"] else "", numeric=False)
SETTING = (_plain("data", "data"), _plain("scored_on", "scored on"))  # left out where a table has only one of it
NAMES = (_plain("model", "model"), *SETTING, _plain("recipe", "recipe"))
RECIPE = (
    *NAMES,
    _plain("same_as", "the same as"),
    _number("seeds", "seeds", "d"),
    _number("items", "items", "d"),
    *DIFFERENCE,
    _plain("doubts", "but"),
    _number("seeds_to_decide", "seeds to decide", "d"),
    _number("items_to_decide", "items to decide", "d"),
    _cost("speed_ratio", "× tokens/s"),
    _with_interval("memory_ratio", "× memory/token", ".2f", "cost"),
    _cost("cost", "× both"),
    _p("p_cost", "p, Holm", "cost"),
    _number("cost_seeds_to_decide", "seeds to decide", "d", "cost"),
    _number("floor_speed_ratio", "× tokens/s", ".2f", "cost, same again"),
    _number("floor_memory_ratio", "× memory/token", ".2f", "cost, same again"),
    _with_interval("mean_abs_points", "mean |Δ| [95%]", ".2f", "size, points"),
    _number("floor_replicate_points", "same again", ".2f", "floor, points"),
    _number("floor_threads_points", "threads", ".2f", "floor, points"),
    _number("floor_seeds_points", "seeds", ".2f", "floor, points"),
    Spec("spikes", lambda row: f"{row['spikes']} of {row['scores']}"),
    _p("p_rank", "p", "ranks, uncorrected"),
    _p("smallest_p_rank", "least p", "ranks, uncorrected"),
    _with_interval("flip_rate", "flipped, %", ".1f", "answers", 100.0),
    _with_interval("kl_nats", "KL, nats", ".4f", "answers"),
    _with_interval("nll_gold_nats", "ΔNLL, nats", "+.4f", "answers"),
    Spec("scores beyond trained length", lambda row: _form(row["beyond_trained_length"] or None, "d")),
)
SCORE = (
    *NAMES,
    _plain("task", "task"),
    _number("shots", "shots", "d"),
    _number("seeds", "seeds", "d"),
    *DIFFERENCE,
    _number("chance", "guessing", ".3f", "score"),
    _number("items", "items", "d"),
    _number("beyond_trained_length", "beyond trained length", "d"),
)
SPECS: dict[str, tuple[Spec, ...]] = {
    "recipes": RECIPE,
    "formats": RECIPE,
    "scores": SCORE,
    "format_scores": SCORE,
    "spikes": (
        _plain("model", "model"),
        *SETTING,
        _plain("task", "task"),
        _number("shots", "shots", "d"),
        Spec("spikes", lambda row: f"{row['spikes']} of {row['scores']}"),
        _number("score", "recipes", ".3f", "score"),
        _number("counterpart_score", "counterparts", ".3f", "score"),
        _number("mean_abs_points", "mean |Δ|", ".2f", "size, points"),
        _number("largest_points", "largest", ".2f", "size, points"),
        _number("floor_replicate_points", "same again", ".2f", "floor, points"),
        _number("floor_threads_points", "threads", ".2f", "floor, points"),
        _number("floor_seeds_points", "seeds", ".2f", "floor, points"),
        BEYOND,
    ),
    "architectures": (
        _plain("model", "model"),
        _plain("twin", "twin"),
        *SETTING,
        _plain("recipe", "recipe"),
        _plain("counterpart", "against"),
        _number("seeds", "seeds", "d"),
        _number("score", "model", ".3f", "score"),
        _number("counterpart_score", "its counterpart", ".3f", "score"),
        _number("twin_score", "twin", ".3f", "score"),
        _number("twin_counterpart_score", "its counterpart", ".3f", "score"),
        _number("recipes", "recipes", "d"),
        _with_interval("mean_abs_points", "model [95%]", ".2f", "mean |Δ|, points"),
        _with_interval("twin_mean_abs_points", "twin [95%]", ".2f", "mean |Δ|, points"),
        _with_interval("difference_points", "difference [95%]", "+.2f", "mean |Δ|, points"),
        _p("p_different", "p, Holm"),
        _p("p_pooled_otherwise", "largest p of other poolings"),
        BEYOND,
    ),
    "learning": (
        *NAMES,
        _plain("task", "task"),
        _number("seeds", "seeds", "d"),
        _number("items", "items", "d"),
        *_shots("", "score"),
        _with_interval("gain", "gain of the 0-shot score [95%]", ".2f"),
        _plain("twin", "twin"),
        *_shots("twin_", "twin's score"),
        _with_interval("relative_to_twin", "% of the twin's [95%]", ".0f", scale=100.0),
        BEYOND,
    ),
    "base_and_tuned": (
        *NAMES,
        _plain("base", "base"),
        _plain("task", "task"),
        _plain("shots", "shots"),
        _number("seeds", "seeds", "d"),
        *_shots("base_", "base's score"),
        *_shots("", "tuned score"),
        _number("base_gain", "base", ".2f", "gain of the 0-shot score"),
        _with_interval("gain", "tuned [95%]", ".2f", "gain of the 0-shot score"),
        _with_interval("difference", "difference [95%]", "+.2f", "gain of the 0-shot score"),
        _p("p_different", "p, Holm"),
        BEYOND,
    ),
    "settings": (
        *NAMES,
        _plain("setting", "setting"),
        _plain("value", "value"),
        _plain("other", "against"),
        _plain("task", "task"),
        _number("shots", "shots", "d"),
        _number("seeds", "seeds", "d"),
        _number("score", "value", ".3f", "score"),
        _number("other_score", "other", ".3f", "score"),
        *DIFFERENCE[2:],
        BEYOND,
    ),
    "floors": (
        _plain("model", "model"),
        *SETTING,
        _plain("floor", "runs that differ in"),
        _number("pairs", "pairs", "d"),
        _number("mean_abs_points", "mean |Δ|, points", ".2f"),
        _number("largest_points", "largest", ".2f"),
        _number("lowest_score", "lowest", ".3f", "score of the runs"),
        _number("highest_score", "highest", ".3f", "score of the runs"),
    ),
    "stability": (
        *NAMES,
        _number("seeds", "seeds", "d"),
        _with_interval("margin", "mean [95%]", ".2e", "margin, nats/token"),
        _number("lowest_margin", "lowest", ".2e", "margin, nats/token"),
        _number("highest_margin", "highest", ".2e", "margin, nats/token"),
        _number("counterpart_margin", "counterparts' mean", ".2e", "margin, nats/token"),
        _with_interval("difference", "difference [95%]", "+.2e", "margin, nats/token"),
        _p("p_different", "p, Holm"),
    ),
    "missing": (*NAMES, _number("seed", "seed", "d"), _plain("why", "why"), _plain("error", "error")),
}
TESTED = (
    "Signed differences are tested: equivalent, inside the margin, by two one-sided tests; outside it, on which better "
    "and worse rest; not 0, on which no outcome rests. p adjusted by Holm over the table, those of costs as well, but "
    "not those of ranks."
)
CAPTIONS = {
    "recipes": f"Each recipe against full-precision fine-tuning of all weights, seed by seed. {TESTED} Sizes stand "
    "beside their noise floors.",
    "formats": f"Each recipe against full precision with the same peft: what the number format alone did. {TESTED}",
    "scores": "Every score beside its counterpart's: means over seeds, differences in points.",
    "format_scores": "Every score beside that of full precision with the same peft: means over seeds, differences in "
    "points.",
    "spikes": "How often a single score lies far from its counterpart's, over recipes and seeds; floor: mean size of "
    "the same score's difference between two runs that differ in nothing that should matter.",
    "architectures": "Mean absolute divergence of models with a recurrent state beside the Transformer of their size.",
    "learning": "In-context learning gain: mean over shots of (score − 0-shot score) / 0-shot score; few-shot: mean of "
    "those shots.",
    "base_and_tuned": "In-context learning gain of each tuned recipe beside its untrained base's, seed by seed; the "
    "base is the same for every seed.",
    "settings": "One value of a setting against another one, everything else equal, seed by seed: over all tasks and "
    "shots, then each of them; p adjusted by Holm, the means and the single scores each for themselves.",
    "floors": "How far runs lie apart that differ in nothing that should matter.",
    "stability": "Distance from the edge, −λ_max, of recurrent models: each run's smallest over layers and steps, by "
    "recipe over seeds, and its difference from full-precision fine-tuning of all weights, seed by seed.",
    "missing": "Runs that the tables lack.",
}


def text_columns(verdict: Verdict, name: str) -> list[Column]:
    """One of the verdict's tables as columns of text; columns that are empty throughout are left out.

    Of more than MOST_ROWS rows those with the largest differences are kept, or the first where there are none.
    """
    table = verdict.tables[name]
    if len(table) > MOST_ROWS and "difference_points" in table:
        table = table.loc[table["difference_points"].abs().nlargest(MOST_ROWS).index.sort_values()]
    rows = table.head(MOST_ROWS).to_dict("records")
    alike = [spec for spec in SETTING if len({spec.text(row) for row in rows}) < 2]
    specs = [spec for spec in SPECS[name] if spec not in alike]
    made = [Column(spec.group, spec.title, [spec.text(row) for row in rows], spec.numeric) for spec in specs]
    return [column for column in made if any(cell not in (ABSENT, "") for cell in column.cells)]


def caption(verdict: Verdict, name: str) -> str:
    """What a table shows."""
    text = CAPTIONS[name]
    if not any(recipe.trained for recipe in verdict.recipes):  # a base is one cell whatever the seed
        text = text.replace(f"{REFERENCE}, seed by seed", f"{BASE}, over its items").replace(REFERENCE, BASE)
    if "emulated" in verdict.tables[name] and verdict.tables[name]["emulated"].any():
        text += f" {EMULATED_MEANS}"
    if (rows := len(verdict.tables[name])) > MOST_ROWS:
        largest = " with the largest differences" * ("difference_points" in verdict.tables[name])
        text += f" {MOST_ROWS:,} of {rows:,} rows{largest}; tables/{name}.parquet and .csv have all."
    if "cost" not in verdict.tables[name]:
        return text
    settings = verdict.settings
    return f"{text} {cost_means(settings)} Margin {margin(settings)}, α = {settings.alpha:g}."
