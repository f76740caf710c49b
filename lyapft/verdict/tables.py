"""The verdict's numbers as tidy tables: one row per case, one column per number, units in the names."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lyapft.divergence import Comparison, Estimate, bca_coverage, bca_interval, by_size
from lyapft.verdict.ablations import Ablation
from lyapft.verdict.architectures import Contrast
from lyapft.verdict.evidence import Recipe, Settings
from lyapft.verdict.floors import KINDS, Floor
from lyapft.verdict.gaps import Gap
from lyapft.verdict.learning import Gain, Learned, Raw
from lyapft.verdict.margins import Margins
from lyapft.verdict.recipes import Row, ScoreRow
from lyapft.verdict.recommendation import doubts
from lyapft.verdict.spikes import Spikes


def recipe_table(found: Sequence[Row], floors: Sequence[Floor], settings: Settings) -> pd.DataFrame:
    """Every recipe against one kind of counterpart: raw scores, difference, tests, outcome, cost, answers, floors."""
    by_setting = {(floor.setting, floor.kind): floor.mean_abs for floor in floors}
    dear = {floor.setting: floor.costs for floor in floors if floor.costs}
    return pd.DataFrame(
        [
            _recipe(row, interval, by_setting, settings) | _cost_floors(dear, row)
            for row, interval in zip(found, _bootstrapped(found), strict=True)
        ]
    )


def _cost_floors(floors: Mapping[tuple[str, str, str], Mapping[str, float]], row: Row) -> dict[str, float | None]:
    """By which ratio the costs of the same cell again lie apart."""
    own = floors.get(row.recipe.setting, {})
    return {"floor_speed_ratio": own.get("tokens_per_s"), "floor_memory_ratio": own.get("peak_bytes_per_token")}


def _recipe(
    row: Row,
    bootstrapped: dict[str, float],
    floors: Mapping[tuple[tuple[str, str, str], str], float],
    settings: Settings,
) -> dict[str, Any]:
    cost = row.cost
    outcome = row.outcome(settings)
    risk = settings.alpha, settings.power
    needed = row.comparison.seeds_needed(*risk) if outcome == "undecided" else None
    over_items = row.comparison.estimate.unit == "items"  # a base is one cell whatever the seed
    cost_needed = cost.seeds_needed(*risk) if cost.undecided(settings.alpha) else None
    return (
        _named(row.recipe)
        | {"counterpart": row.counterpart, "seeds": row.n, "few_seeds": row.comparison.estimate.few}
        | {"items": row.comparison.estimate.n if over_items else None}
        | {"score": row.score, "counterpart_score": row.counterpart_score}
        | _compared(row.comparison)
        | bootstrapped
        | {"outcome": outcome, "doubts": "; ".join(doubts(row)), "seeds_to_decide": None if over_items else needed}
        | {"items_to_decide": needed if over_items else None}
        | {"same_as": row.same_as.label if row.same_as else ""}
        | _estimated("mean_abs_points", row.size)
        | {f"floor_{kind}_points": floors.get((row.recipe.setting, kind)) for kind in KINDS}
        | {"spikes": row.spikes, "scores": row.scores, "beyond_trained_length": len(row.beyond)}
        | _estimated("speed_ratio", cost.speed)
        | _estimated("memory_ratio", cost.memory)
        | _estimated("cost", cost.index)
        | {"p_cost": cost.p, "cost_seeds_to_decide": cost_needed}
        | {"emulated": cost.emulated, "broke_down": len(row.recipe.broke_down())}
        | _estimated("flip_rate", row.flips)
        | _estimated("kl_nats", row.kl)
        | _estimated("nll_gold_nats", row.nll_gold)
    )


def score_table(found: Sequence[ScoreRow], settings: Settings) -> pd.DataFrame:
    """Every score of every recipe beside its counterpart's, with the signed difference."""
    return pd.DataFrame(
        [
            _named(one.row.recipe)
            | {"counterpart": one.row.counterpart, "task": one.task, "shots": one.shots}
            | {"seeds": one.comparison.estimate.n, "items": one.items}
            | {"score": one.score, "counterpart_score": one.counterpart_score, "chance": one.chance}
            | _compared(one.comparison)
            | {"outcome": one.comparison.outcome(settings.alpha), "beyond_trained_length": one.beyond_trained_length}
            for one in found
        ]
    )


def contrast_table(found: Sequence[Contrast]) -> pd.DataFrame:
    """Mean absolute divergence of each recurrent model beside its Transformer twin's, and their difference."""
    return pd.DataFrame(
        [
            {"model": c.model, "twin": c.twin, "data": c.data, "scored_on": c.task, "recipe": c.recipe}
            | {"counterpart": c.counterpart}
            | {"seeds": c.comparison.estimate.n}
            | dict(zip(("score", "counterpart_score"), c.scores, strict=True))
            | dict(zip(("twin_score", "twin_counterpart_score"), c.twin_scores, strict=True))
            | _estimated("mean_abs_points", c.size)
            | _estimated("twin_mean_abs_points", c.twin_size)
            | _estimated("difference_points", c.comparison.estimate)
            | {"recipes": c.pooled, "p_different": c.comparison.p_different}
            | {"p_pooled_otherwise": max((one.comparison.p_different for one in c.others), default=None)}
            | {"beyond_trained_length": c.beyond}
            for c in found
        ]
    )


def gain_table(found: Sequence[Gain]) -> pd.DataFrame:
    """In-context learning gain per recipe and task, and relative to the Transformer twin."""
    return pd.DataFrame(
        [
            _named(gain.recipe)
            | {"task": gain.task, "seeds": gain.gain.n if gain.gain.unit == "seeds" else 1}
            | {"items": gain.gain.n if gain.gain.unit == "items" else None}
            | _raw("", gain.raw)
            | _estimated("gain", gain.gain)
            | {"twin": gain.twin}
            | _raw("twin_", gain.twin_raw)
            | _estimated("relative_to_twin", gain.relative)
            | {"beyond_trained_length": gain.beyond}
            for gain in found
        ]
    )


def learned_table(found: Sequence[Learned]) -> pd.DataFrame:
    """In-context learning gain of each tuned recipe beside its base's, and their difference seed by seed."""
    return pd.DataFrame(
        [
            _named(one.recipe)
            | {"base": one.base.label, "task": one.task, "shots": " ".join(map(str, one.shots))}
            | {"seeds": one.difference.n}
            | _raw("", one.raw)
            | _raw("base_", one.base_raw)
            | _estimated("gain", one.gain)
            | {"base_gain": one.base_gain}
            | _estimated("difference", one.difference)
            | {"p_different": one.p, "beyond_trained_length": one.beyond}
            for one in found
        ]
    )


def _raw(side: str, found: Raw | None) -> dict[str, float | None]:
    """The scores behind a gain."""
    return {
        f"{side}zero_shot_score": found.zero if found else None,
        f"{side}few_shot_score": found.few if found else None,
    }


def ablation_table(found: Sequence[Ablation], settings: Settings) -> pd.DataFrame:
    """One value of a setting against another one: over all scores (task and shots empty), then for each of them."""
    return pd.DataFrame(
        [
            dict(zip(("model", "data", "scored_on"), one.setting, strict=True))
            | {"recipe": one.recipe, "setting": one.name, "value": one.value, "other": one.other}
            | {"task": one.key[0] if one.key else "", "shots": one.key[1] if one.key else None}
            | {"seeds": one.comparison.estimate.n}
            | {"score": one.score, "other_score": one.other_score}
            | _compared(one.comparison)
            | {"outcome": one.comparison.outcome(settings.alpha), "beyond_trained_length": one.beyond}
            for one in found
        ]
    ).astype({"shots": "Int64"} if found else {})


def spike_table(found: Sequence[Spikes]) -> pd.DataFrame:
    """How often each score lies far from its counterpart's, beside its own noise floors."""
    return pd.DataFrame(
        [
            dict(zip(("model", "data", "scored_on"), one.setting, strict=True))
            | {"task": one.key[0], "shots": one.key[1], "spikes": one.spikes, "scores": one.scores}
            | {"score": one.score, "counterpart_score": one.counterpart_score}
            | {"mean_abs_points": one.mean_abs, "largest_points": one.largest}
            | {f"floor_{kind}_points": one.floors.get(kind) for kind in KINDS}
            | {"beyond_trained_length": one.beyond}
            for one in found
        ]
    )


def floor_table(found: Sequence[Floor]) -> pd.DataFrame:
    """Noise floors."""
    return pd.DataFrame(
        [
            dict(zip(("model", "data", "scored_on"), f.setting, strict=True))
            | {"floor": f.kind, "pairs": f.n}
            | {"mean_abs_points": f.mean_abs, "largest_points": f.largest}
            | {"lowest_score": f.scores[0], "highest_score": f.scores[1]}
            for f in found
        ]
    )


def margin_table(found: Sequence[Margins]) -> pd.DataFrame:
    """Stability margins per recipe, and their difference from full-precision fine-tuning of all weights."""
    return pd.DataFrame(
        [
            _named(one.recipe)
            | {"seeds": one.mean.n}
            | _estimated("margin", one.mean)
            | {"lowest_margin": one.lowest, "highest_margin": one.highest, "counterpart_margin": one.counterpart}
            | _estimated("difference", one.comparison.estimate if one.comparison else None)
            | {"p_different": one.comparison.p_different if one.comparison else None}
            for one in found
        ]
    )


def gap_table(found: Sequence[Gap]) -> pd.DataFrame:
    """Runs that are missing or failed."""
    return pd.DataFrame([_named(g.recipe) | {"seed": g.seed, "why": g.why, "error": g.error} for g in found])


def _bootstrapped(rows: Sequence[Row]) -> list[dict[str, float]]:
    """The BCa intervals beside the t intervals, with what they really cover at this number of seeds."""
    found: dict[int, dict[str, float]] = {}
    for places, signed_rn in by_size([[pair.mean_signed for pair in row.pairs] for row in rows]):
        covered = bca_coverage(signed_rn.shape[-1])
        for place, low, high in zip(places, *bca_interval(signed_rn), strict=True):
            found[place] = {"bca_low_points": float(low), "bca_high_points": float(high), "bca_coverage": covered}
    return [found[place] for place in range(len(rows))]


def _named(recipe: Recipe) -> dict[str, Any]:
    return {"model": recipe.model, "data": recipe.data, "scored_on": recipe.task, "recipe": recipe.label}


def _estimated(name: str, found: Estimate | None) -> dict[str, float | None]:
    if found is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def _compared(found: Comparison) -> dict[str, float]:
    """Signed difference and Holm-adjusted p values; the rank test is not adjusted and says what it could reach."""
    return _estimated("difference_points", found.estimate) | {  # type: ignore[return-value]
        "sd_points": found.sd,
        "p_different": found.p_different,
        "p_equivalent": found.p_equivalent,
        "p_outside": found.p_outside,
        "p_rank": found.rank.p,
        "smallest_p_rank": found.rank.smallest_p,
    }
