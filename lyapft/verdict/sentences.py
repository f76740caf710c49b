"""The verdict in plain sentences: each number with its n, nothing said that the tables do not show."""

import math
from collections.abc import Sequence
from itertools import groupby

from lyapft.divergence import is_spike
from lyapft.verdict.architectures import Contrast, Gain
from lyapft.verdict.blame import blame, remedy
from lyapft.verdict.evidence import PAPER, PRECISION_ONLY, Evidence, Settings
from lyapft.verdict.floors import KINDS, Floor
from lyapft.verdict.gaps import Gap
from lyapft.verdict.recipes import Cost, Row, ScoreRow
from lyapft.verdict.recommendation import Recommendation
from lyapft.verdict.words import difference, interval, joined, margin, needed, p_value, ratio, seeds, signed, size

REFERENCE = "full-precision fine-tuning of all weights"
AGAINST = {PAPER: REFERENCE, PRECISION_ONLY: "full precision with the same peft"}
MOST_LISTED = 3


def recommendations(found: Sequence[Recommendation], settings: Settings) -> list[str]:
    """Which recipe to use for each model, what it saves, and what stays open."""
    lines = []
    for one in found:
        lines.append(_recommended(one, settings) if one.chosen else _not_recommended(one, settings))
        lines += [
            f"Not equivalent but better: {row.recipe.name}, {_at_cost(row)}, {difference(row.comparison)}; "
            f"{_scores(row)}."
            for row in one.better
        ]
        lines += [_open(row, settings) for row in one.open[:MOST_LISTED]]
        if more := one.open[MOST_LISTED:]:
            lines.append(f"Undecided too: {joined([row.recipe.name for row in more])}.")
        lines += [
            f"{row.recipe.name} is not recommended: equivalent on the seeds that finished, but training broke down on "
            f"{len(row.recipe.broke_down())} of {len(row.recipe.broke_down()) + len(row.recipe.runs)}."
            for row in one.unsound
        ]
    return lines or [f"No recipe has a counterpart to be compared with ({REFERENCE}): nothing can be recommended."]


def _reference(one: Recommendation) -> str:
    return REFERENCE if one.trained else "the full-precision base (nothing was trained)"


def _at_cost(row: Row) -> str:
    cost = row.cost.index.mean
    return "its cost not measured" if math.isnan(cost) else f"at {ratio(cost)} the cost"


def _scores(row: Row) -> str:
    return f"score {row.score:.3f} against {row.counterpart_score:.3f}"


def _where(one: Recommendation) -> str:
    return where_of(one.setting)


def where_of(setting: tuple[str, str, str]) -> str:
    """Model, data and task.

    >>> where_of(("m", "alpaca", "mmlu")), where_of(("m", "skills", "skills"))
    ('m on alpaca, scored on mmlu', 'm on skills')
    """
    model, data, task = setting
    return f"{model} on {data}, scored on {task}" if data != task else f"{model} on {data}"


def _recommended(one: Recommendation, settings: Settings) -> str:
    row = one.chosen
    assert row is not None
    family = row.comparison.family
    return (
        f"{_where(one)}: use {row.recipe.label}, the cheapest recipe that is equivalent to {_reference(one)} within "
        f"{margin(settings)}: {difference(row.comparison)}; TOST {p_value(row.comparison.p_equivalent)}"
        f"{f', adjusted for {family} recipes' if family > 1 else ''}; {_scores(row)}. "
        f"{_savings(row.cost)}{_troubled(row)}"
    )


def _savings(cost: Cost) -> str:
    """What a recipe saves, in time and memory."""
    parts = ["its speed was not measured", "its memory was not measured"]
    if cost.speed.n:
        parts[0] = f"it trains {ratio(cost.speed.mean)} the tokens/s ({interval(cost.speed, '.2f')})"
    if cost.memory.n:
        less = round(100 * (1 - cost.memory.mean))
        amount = "as much memory" if less == 0 else f"{abs(less)}% {'less' if less > 0 else 'more'} memory"
        parts[1] = f"needs {amount} per token"
    note = " Half precision was emulated: this is not the speed of hardware that has it." if cost.emulated else ""
    if cost.halved:
        note += f" Memory ran out in {cost.halved} of its pairs, whose cost is left out."
    text = " and ".join(parts)
    return f"{text[0].upper()}{text[1:]}.{note}"


def _troubled(row: Row) -> str:
    """Seeds of a recipe that did not finish, whatever the reason."""
    failed = len(row.recipe.failed)
    return f" {failed} of {failed + len(row.recipe.runs)} of its runs did not finish." if failed else ""


def _not_recommended(one: Recommendation, settings: Settings) -> str:
    where = _where(one)
    if one.dear:
        shown = [
            f"{row.recipe.label} ({_at_cost(row)}, {difference(row.comparison)}, {_scores(row)})" for row in one.dear
        ]
        return (
            f"{where}: stay with {_reference(one)}. Equivalent to it within {margin(settings)}, but not shown to cost "
            f"less: {joined(shown)}."
        )
    if one.open:
        return (
            f"{where}: undecided. No recipe is shown to be equivalent to {_reference(one)} within {margin(settings)}."
        )
    if one.unsound or one.better:
        return f"{where}: no recipe that trained soundly is equivalent to {_reference(one)} within {margin(settings)}."
    return f"{where}: stay with {_reference(one)}. Every other recipe is shown to lie outside {margin(settings)}."


def _open(row: Row, settings: Settings) -> str:
    return (
        f"Undecided: {row.recipe.name}, {_at_cost(row)}, {difference(row.comparison)}; {_scores(row)}; "
        f"{needed(row.comparison, settings)}."
    )


def failures(evidence: Evidence, found: Sequence[Row], scores: Sequence[ScoreRow], settings: Settings) -> list[str]:
    """Recipes and single scores that lie outside the margin, whose doing it is, and trainings that broke down."""
    lines = [_failure(evidence, row, found, settings) for row in found if row.outcome(settings) in ("worse", "better")]
    lines += [_outside(row, own, settings) for row, own in _scores_outside(scores, settings)]
    if not lines and found:
        undecided = sum(row.outcome(settings) == "undecided" for row in found)
        open_ones = f"; {undecided} of {len(found)} are undecided, which does not mean that they agree" * bool(
            undecided
        )
        lines.append(f"No recipe is shown to lie outside {margin(settings)}{open_ones}.")
    for recipe in evidence.recipes:
        if broken := recipe.broke_down():
            kinds = joined(sorted({str(run["status"]) for run in broken}))
            total = len(recipe.runs) + len(recipe.failed)
            lines.append(f"{recipe.name}: training broke down on {len(broken)} of {total} seeds ({kinds}).")
    spikes, total = sum(row.spikes for row in found), sum(row.scores for row in found)
    return [*lines, _spikes(found, spikes, total, settings)] if total else lines


def _failure(evidence: Evidence, row: Row, found: Sequence[Row], settings: Settings) -> str:
    tried = remedy(evidence, row, found, settings) if row.outcome(settings) == "worse" else ""
    return (
        f"{row.recipe.name} is {row.outcome(settings)} than {REFERENCE} by more than {settings.margin:g} "
        f"point{'s' * (settings.margin != 1)}: {difference(row.comparison)}, {p_value(row.comparison.p_outside)}; "
        f"{_scores(row)}.{blame(evidence, row.recipe)}{tried}"
    )


def _spikes(found: Sequence[Row], spikes: int, total: int, settings: Settings) -> str:
    fewest = min(pair.fewest_items for row in found for pair in row.pairs)
    grain = 100.0 / fewest
    note = f"; one answer is worth {grain:.2f} points there, so few answers make one" if is_spike(grain, 0.2) else ""
    return (
        f"Spikes: {spikes} of {total} single scores lie over {settings.spike:g} point{'s' * (settings.spike != 1)} "
        f"from their counterpart's{note}."
    )


def _scores_outside(scores: Sequence[ScoreRow], settings: Settings) -> list[tuple[Row, list[ScoreRow]]]:
    outside = [score for score in scores if score.comparison.outcome(settings.alpha) in ("worse", "better")]
    return [(group[0].row, group) for _, rows in groupby(outside, key=lambda s: id(s.row)) if (group := list(rows))]


def _outside(row: Row, own: Sequence[ScoreRow], settings: Settings) -> str:
    worst = sorted(own, key=lambda score: -abs(score.comparison.estimate.mean))
    shown = [
        f"{s.task} {s.shots}-shot{_beyond(s)} {difference(s.comparison)}, {s.score:.3f} against "
        f"{s.counterpart_score:.3f}"
        for s in worst[:MOST_LISTED]
    ]
    more = f" and {len(worst) - len(shown)} more" if len(worst) > len(shown) else ""
    return f"{row.recipe.name}: single scores outside {margin(settings)}, {seeds(row.n)}: {'; '.join(shown)}{more}."


def _beyond(score: ScoreRow) -> str:
    return " (beyond the trained length)" if score.beyond_trained_length else ""


def architectures(
    found: Sequence[Contrast], recurrent: Sequence[str], floors: Sequence[Floor], settings: Settings
) -> list[str]:
    """Whether models with a recurrent state diverge less than the Transformer of their size."""
    if not found:
        beside = f" beside {joined(list(recurrent))}" if recurrent else ""
        return [
            f"No recipe that a Mamba and a Transformer of about its size share has a counterpart{beside}: nothing can "
            "be compared."
        ]
    lines = [_contrast(contrast, settings) + _floors_of(contrast, floors) for contrast in found if contrast.overall]
    return [*lines, "Each line is about these checkpoints on this data, not about the architectures as such."]


def _floors_of(contrast: Contrast, floors: Sequence[Floor]) -> str:
    """What another seed alone does to both, beside a comparison of sizes, which hold that noise too."""
    place = (contrast.data, contrast.task)
    by_model = {f.setting[0]: f.mean_abs for f in floors if f.kind == "seeds" and f.setting[1:] == place}
    ours, theirs = by_model.get(contrast.model), by_model.get(contrast.twin)
    if ours is None or theirs is None:
        return ""
    return f" Another seed alone moves them by {ours:.2f} and {theirs:.2f} points."


def _contrast(contrast: Contrast, settings: Settings) -> str:
    found = contrast.comparison
    from_ = f"from {AGAINST[contrast.counterpart]}, {contrast.recipe}"
    sizes = f"mean divergence {size(contrast.size)} of {contrast.model}, {size(contrast.twin_size)} of {contrast.twin}"
    if found.estimate.n < 2:
        return (
            f"{contrast.model} and {contrast.twin} ({from_}): {sizes}; one common seed has no interval, so neither can "
            "be called steadier."
        )
    numbers = f"{sizes}; difference {difference(found)}, {p_value(found.p_different)}."
    if found.p_different <= settings.alpha:
        steadier, other = contrast.model, contrast.twin
        if found.estimate.mean > 0:
            steadier, other = other, steadier
        return f"{steadier} is steadier than {other} ({from_}): {numbers}"
    return f"{contrast.model} and {contrast.twin} ({from_}): neither is shown to be steadier; {numbers}"


def learning(found: Sequence[Gain]) -> list[str]:
    """In-context learning of the counterparts, relative to the Transformer twin."""
    lines = []
    for gain in found:
        if gain.reference and gain.twin and gain.relative is not None:
            share = gain.relative
            relative = (
                f"{100 * share.mean:.0f}% of {gain.twin}'s ({interval(share, '.0%')})"
                if share.n > 1 and math.isfinite(share.mean)
                else "one seed gives no ratio to its twin's"
                if share.n < 2
                else f"{gain.twin} gains too little there for a ratio"
            )
            lines.append(
                f"In-context learning of {gain.recipe.name} on {gain.task}: gain {signed(gain.gain.mean)} of the "
                f"0-shot score ({interval(gain.gain, '.2f')}); {relative}."
            )
    return lines


def noise(found: Sequence[Floor], settings: Settings) -> list[str]:
    """How far runs lie apart that should not differ, or that this was not measured."""
    lines = []
    for setting, own in groupby(found, key=lambda floor: floor.setting):
        parts = [f"{KINDS[f.kind]} {f.mean_abs:.2f} points ({f.n} pair{'s' * (f.n != 1)})" for f in own]
        lines.append(f"Noise floor of {where_of(setting)}, mean size of a difference: {'; '.join(parts)}.")
    measured = {floor.kind for floor in found}
    if absent := [name for kind, name in KINDS.items() if kind not in measured]:
        lines.append(f"Not measured: {joined(absent)}.")
    lines.append(
        "A mean size is positive even where nothing but noise differs: compare it with its floor. What is tested above "
        "are signed differences, which noise alone leaves at 0."
    )
    return lines


def missing(found: Sequence[Gap]) -> list[str]:
    """Runs that the tables lack."""
    lines = []
    several = len({gap.recipe.setting[1:] for gap in found}) > 1
    for (*setting, label), group in groupby(found, key=lambda gap: (*gap.recipe.setting, gap.recipe.label)):
        model, data, task = setting
        name = f"{where_of((model, data, task))}, {label}" if several else f"{model} · {label}"
        parts = [
            f"{why} for seed{'s' * (len(own) > 1)} {', '.join(str(gap.seed) for gap in own)}"
            for why, rows in groupby(group, key=lambda gap: gap.why)
            if (own := list(rows))
        ]
        lines.append(f"{name}: {'; '.join(parts)}.")
    return lines or ["Nothing is missing: every recipe has every seed, with its counterpart."]


def beyond_training(scores: Sequence[ScoreRow]) -> list[str]:
    """Scores on texts that are longer than the sequences that the model was trained on."""
    lines = []
    for model, rows in groupby(scores, key=lambda score: score.row.recipe.model):
        found = {(s.task, s.shots): s for s in rows if s.beyond_trained_length}
        parts = [f"{task} {shots}-shot ({s.beyond_trained_length} of {s.items})" for (task, shots), s in found.items()]
        if parts:
            lines.append(
                f"{model}: beyond the trained length: {', '.join(parts)} items are longer than the sequences that the "
                "base model was trained on; these scores also measure extrapolation."
            )
    return lines
