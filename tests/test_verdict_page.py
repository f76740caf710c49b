"""The verdict's one page: within its limit, true to the findings, and honest about what it leaves out."""

import html
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lyapft.report import exports, latex
from lyapft.report.page import _verdict as as_html
from lyapft.verdict import Settings, Verdict, judge
from lyapft.verdict.page.advice import KINDS
from lyapft.verdict.page.common import LONGEST_NAME
from lyapft.verdict.page.layout import WORDS, words
from tests.test_verdict import STEADY, WILD, WORSE, run, study
from tests.test_verdict_blame import SMALL, adapting, shadowed
from tests.test_verdict_learning import LITTLE, icl_study, tied_study

LIMIT = 570  # words of one sheet
LAYERS = {"lora": {"in_proj": 2, "out_proj": 2, "dt_proj": 0}, "lora_all": {"in_proj": 2, "out_proj": 2, "dt_proj": 2}}
RECIPES = [(form, peft) for form in ("fp32", "bf16", "fp16") for peft in ("none", "lora", "lora_all")]
SIZES = {"130m": 130_000_000, "370m": 370_000_000, "790m": 790_000_000, "1.4b": 1_400_000_000, "2.8b": 2_800_000_000}


def lines(found: Verdict, title: str = "") -> list[str]:
    return [line for section in found.page if section.title.startswith(title) for line in section.lines]


def setting(
    rng: np.random.Generator,
    model: str,
    place: tuple[str, str] = ("skills", "skills"),
    seeds: int = 8,
    recipes: Sequence[tuple[str, str]] = RECIPES[1:],
    **options: Any,
) -> list[dict[str, Any]]:
    """Recipes of one model on one data set, each with an offset, a spread and a cost of its own."""
    cells = {key: rng.normal(rng.choice([0.0, -4.0]), rng.choice([0.2, 2.0]), seeds).round(1) for key in recipes}
    costs = {key: (rng.uniform(0.8, 2.0), rng.uniform(0.5, 1.2)) for key in recipes}
    made = study(cells, model, costs, overrides=(f"data={place[0]}", f"task={place[1]}"), **options)
    for record in made:
        record["choices"] |= {"data": place[0], "task": place[1]}
        record["cost"]["tokens_per_s"] *= rng.uniform(0.98, 1.02)
        if counts := LAYERS.get(record["choices"]["peft"]):
            record["peft"]["coverage"] = {name: {"adapted": n, "present": 2} for name, n in counts.items()}
    return made


def lost(record: dict[str, Any], status: str) -> None:
    record |= {"status": status, "scores": [], "divergence": [], "error": {"type": "E", "message": status}}


@pytest.fixture(scope="module")
def matrix() -> Verdict:
    """The shipped matrix: three models, formats and pefts, eight seeds, reruns; some failed."""
    rng = np.random.default_rng(4)
    records = [one for model in ("mamba_tiny", "mamba2_tiny", "llama_tiny") for one in setting(rng, model, beyond=5)]
    half = [record for record in records if record["choices"]["precision"] == "fp16"]
    for record, status in zip(half[3:60:13], ("nonfinite", "oom", "loss_scale_underflow", "failed"), strict=False):
        lost(record, status)
    records += [one | {"id": f"{one['id']}r", "role": "rerun", "replicate": 1} for one in records[:8]]
    return judge(records)


@pytest.fixture(scope="module")
def paper() -> Verdict:
    """Twenty models of four families, two data sets, two tasks, six seeds."""
    rng = np.random.default_rng(5)
    records: list[dict[str, Any]] = []
    for family in ("mamba", "mamba2", "pythia", "llama"):
        for size, parameters in SIZES.items():
            for place in (("alpaca", "mmlu"), ("alpaca", "winogrande"), ("openhermes", "mmlu")):
                chosen = [("bf16", "none"), ("bf16", "lora"), ("fp32", "lora")]
                records += setting(rng, f"{family}_{size}", place, 6, chosen, parameters=parameters, beyond=2)
    half = [record for record in records if record["choices"]["precision"] != "fp32"]  # nothing is compared with them
    for place, record in enumerate(half[7:400:41]):
        lost(record, ("oom", "nonfinite")[place % 2])
    return judge(records)


@pytest.fixture(params=["matrix", "paper"])
def found(request: pytest.FixtureRequest) -> Verdict:
    verdict: Verdict = request.getfixturevalue(request.param)
    return verdict


# --- the limit -------------------------------------------------------------------------------------------------------


def test_the_page_is_one_page_in_markdown_and_html(found: Verdict) -> None:
    page, detail = exports.as_markdown(found).split(f"## {exports.DETAIL}\n")
    assert LIMIT - 60 < len(page.split()) <= LIMIT  # and no word too few: there is more to say
    assert len(detail.split()) > len(page.split())
    shown = as_html(found).split("<details>", 1)[0]
    assert len(re.sub(r"<[^>]+>", " ", shown).split()) <= LIMIT
    assert not [line for line in lines(found) if "  " in line or ".." in line or line[-1] not in ".:"]


def test_every_setting_of_the_shipped_matrix_has_its_line(matrix: Verdict) -> None:
    said = lines(matrix, "Which recipe to use on skills")
    assert len(said) == len(matrix.recommendations) == 3
    assert {line.split(":")[0] for line in said} == {one.setting[0] for one in matrix.recommendations}
    compared = lines(matrix, "Mamba")
    shown = len([line for line in compared if ", difference " in line])
    left = [int(line.split()[1]) for line in compared if line.startswith("And ")]
    assert shown + sum(left) == sum(one.overall for one in matrix.contrasts) == 4


def test_what_is_left_to_the_details_is_counted(paper: Verdict) -> None:
    advice, contrasts = (lines(paper, title) for title in ("Which recipe", "Mamba"))
    whole = [line for line in lines(paper, "Where") if " is worse by" in line or " is better by" in line]
    pairs = [one for one in paper.contrasts if one.overall]
    told = {
        "settings": (advice, Counter(
            f"with {one.chosen.recipe.label} to use" if one.chosen else
            KINDS.get(one.advice, "undecided")
            for one in paper.recommendations)),
        "comparisons": (contrasts, Counter(
            "undecided" if not (who := one.steadier(paper.settings)) else
            f"with the {'Mamba' if who == one.model else 'Transformer'} steadier" for one in pairs)),
    }  # fmt: skip
    for noun, (said, counts) in told.items():
        assert said[0].startswith(f"Of {counts.total()} {noun}: ")
        named = re.findall(r"(\d+) ([^,]+)", said[0].removesuffix(".").split(": ")[1])
        assert sum(int(count) for count, _ in named) == counts.total()
        assert all(counts[kind] == int(count) for count, kind in named if kind != "otherwise")
        place = next(place for place, line in enumerate(said) if line.startswith("And "))
        assert place - 1 + int(re.findall(r"\d+", said[place])[0]) == counts.total()
    left = next(line for line in lines(paper, "Where") if line.startswith("And "))
    assert len(whole) + int(re.findall(r"\d+", left)[0]) == len(paper.failures.whole)


def test_the_largest_models_come_first_and_no_outcome_hides_another(paper: Verdict) -> None:
    said = lines(paper, "Which recipe")[1:-1]
    shown = [next(one for one in paper.recommendations if line.startswith(f"{one.setting[0]} on {one.setting[1]} "
             f"({one.setting[2]}): ")) for line in said]  # fmt: skip
    kinds = Counter(one.advice == "use" for one in shown)
    assert all(one.setting[0].endswith(("2.8b", "1.4b")) for one in shown)
    assert min(kinds.values()) >= 1
    furthest = max(abs(one.row.comparison.estimate.mean) for one in paper.failures.whole)
    assert f"{furthest:.2f}" in lines(paper, "Where")[0]


# --- true to the findings --------------------------------------------------------------------------------------------


def numbers(value: Any, seen: set[int]) -> Iterator[float]:
    """Every number in structures and tables, and what a page makes of it."""
    if isinstance(value, bool | str) or value is None or id(value) in seen:
        return
    if isinstance(value, int | float | np.number):
        yield float(value)
    elif isinstance(value, pd.DataFrame):
        yield from value.select_dtypes("number").to_numpy(float, na_value=np.nan).ravel().tolist()
    elif is_dataclass(value):
        seen.add(id(value))
        for field in fields(value):
            if field.name not in ("page", "sections", "recipes", "recipe", "pairs"):
                yield from numbers(getattr(value, field.name), seen)
    elif isinstance(value, dict):
        for one in value.values():
            yield from numbers(one, seen)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from numbers(one, seen)


def forms(value: float) -> set[str]:
    """How a page may write a number."""
    if not np.isfinite(value):
        return set()
    texts = {format(abs(value), form) for form in (".2f", ".3f", ".3g", "g")}
    return texts | {f"{100 * abs(value):.0f}%", f"{abs(round(100 * (1 - value)))}%"}


def test_every_number_of_the_page_stands_in_a_structure_or_table(found: Verdict) -> None:
    known = {text for value in set(numbers(found, set())) for text in forms(value)}
    known |= {"95%", f"{found.settings.power:.0%}"}
    names = sorted({part for row in found.recipes for part in row.setting}, key=len, reverse=True)
    text = "\n".join(lines(found))
    for name in names:
        text = text.replace(name, "")
    shown = re.findall(r"\d+\.\d+%?|\d+%|(?<=< )\d\.\d+", text)
    assert len(shown) > 30
    assert not [number for number in shown if number not in known and number != "0.001"]
    needed = {
        max(count, row.n + 1)
        for row in found.rows
        if (count := row.comparison.seeds_needed(found.settings.alpha, found.settings.power))
    }
    needed |= {
        max(count, row.cost.index.n + 1)
        for row in found.rows
        if (count := row.cost.seeds_needed(found.settings.alpha, found.settings.power))
    }
    assert set(map(int, re.findall(r"about (\d+)", text))) <= needed


def test_what_the_page_advises_is_what_was_found(found: Verdict) -> None:
    by_name = {one.setting: one for one in found.recommendations}
    checked = Counter[str]()
    for line in lines(found, "Which recipe"):
        own = [one for key, one in by_name.items() if line.startswith(key[0]) and all(part in line for part in key[1:])]
        if line.startswith("And ") or not own:
            own = [one for key, one in by_name.items() if line.startswith(f"{key[0]}:")]
        if len(own) != 1:
            assert line.startswith(("And ", "Of "))
            continue
        (one,) = own
        checked[one.advice] += 1
        if one.chosen:
            assert f"use {one.chosen.recipe.label}, equivalent (" in line
        assert ("use " in line) == bool(one.chosen)
        assert ("undecided. " in line) == (one.advice in ("cost_open", "open", "unsound"))
        assert ("stay with the reference" in line) == (one.advice in ("dear", "outside"))
    assert checked
    for line in lines(found, "Mamba"):
        if "is steadier" in line:
            name = re.findall(r": (\S+) is steadier", line)[0]
            assert any(one.steadier(found.settings) == name for one in found.contrasts)


def test_every_difference_has_its_scores_beside_it(found: Verdict) -> None:
    said = [line for line in lines(found) if re.search(r"\d\.\d\d \[", line)]
    assert len(said) > 3
    for line in said:
        assert re.search(r"\d\.\d{3} against \d\.\d{3}", line), line


# --- small studies ---------------------------------------------------------------------------------------------------


def test_what_is_equivalent_and_cheaper_is_used_with_what_it_saves() -> None:
    cells = {("bf16", "lora"): STEADY, ("bf16", "none"): STEADY, ("fp16", "lora"): WORSE}
    costs = {("bf16", "lora"): (2.0, 0.5), ("bf16", "none"): (1.2, 0.9), ("fp16", "lora"): (4.0, 0.25)}
    found = judge(study(cells, costs=costs))
    (line,) = lines(found, "Which recipe to use on skills instead of full-precision fine-tuning of all weights")
    row = found.rows[0].comparison.estimate
    assert line == (
        f"mamba_tiny: use bf16 · lora, equivalent (+0.01 [−{abs(row.low):.2f}, +{row.high:.2f}]; 0.376 against 0.376), "
        "at 2 × the tokens/s and 50% less memory per token (emulated)."
    )
    key = lines(found, "How to read")
    assert "same seeds [95% interval; n = 8 seeds, unless named]; then" in key[0]
    assert key[-1].startswith("(emulated): half precision in software")
    assert lines(found, "Where it fails")[0].startswith(
        "mamba_tiny · fp16 · lora is worse by more than 1 point (−3.00 ["
    )
    assert "(reference)" not in line


def test_what_costs_no_less_is_not_used_and_what_is_better_is_named() -> None:
    found = judge(study({("bf16", "none"): STEADY}, costs={("bf16", "none"): (0.5, 1.0)}))
    (line,) = lines(found, "Which recipe")
    assert line.startswith("mamba_tiny: stay with the reference. bf16 · none is equivalent (+0.01 [")
    assert line.endswith(
        "but is shown to cost more (p < 0.001): 0.5 × the tokens/s and as much memory per token (emulated)."
    )
    found = judge(study({("bf16", "lora"): [-x for x in WORSE], ("fp16", "lora"): WORSE}))
    (line,) = lines(found, "Which recipe")
    assert line.startswith("mamba_tiny: no recipe is equivalent; bf16 · lora scores higher (+3.00 [")
    (line,) = lines(judge(study({("fp16", "lora"): WORSE})), "Which recipe")
    assert line == "mamba_tiny: stay with the reference: every other recipe is shown to lie outside ±1 point."


def test_too_little_power_names_the_cheapest_recipe_the_fewest_seeds_and_the_seeds() -> None:
    cells = {("bf16", "lora"): WILD, ("fp16", "lora"): [x + 1.2 for x in WILD]}
    costs = {("bf16", "lora"): (1.0, 1.44), ("fp16", "lora"): (1.0, 0.81)}
    found = judge(study(cells, costs=costs))
    (line,) = lines(found, "Which recipe")
    wild, off = (row.comparison.seeds_needed() for row in found.rows)
    assert line.startswith("mamba_tiny: undecided. Cheapest left: fp16 · lora (+1.20 [")
    assert f"at 0.9 × the cost (emulated): about {off} seeds would show that it is not; " in line
    assert line.endswith(f"; fewest for equivalence: about {wild}, with bf16 · lora (dearer on average).")
    assert "Seeds: with 80% chance, if mean and spread stay." in lines(found, "How to read")[0]
    (line,) = lines(judge(study(cells, costs=dict(zip(costs, reversed(costs.values()), strict=True)))), "Which recipe")
    assert line.startswith("mamba_tiny: undecided. Cheapest left: bf16 · lora (0.00 [")
    assert line.endswith(f"at 0.9 × the cost (emulated): about {wild} seeds would show that it is equivalent.")
    assert lines(found, "Where it fails") == [
        "No recipe is shown to lie outside ±1 point; 2 of 2 are undecided, which does not mean that they agree."
    ]


def test_one_seed_decides_nothing() -> None:
    twin = study({("bf16", "lora"): [0.5]}, model="llama_tiny", parameters=300_000)
    found = judge(study({("bf16", "lora"): [0.0]}) + twin)
    text = "\n".join(lines(found))
    assert "same seeds: one seed, so no interval, and nothing is decided; then" in text
    assert "undecided. Left: bf16 · lora (0.00; 0.375 against 0.375)" in text
    assert "one seed has no spread, so run at least three" in text
    assert "one common seed, so neither can be called steadier" in text
    assert " [" not in text
    assert "p = " not in text
    assert " is steadier" not in text


def test_few_seeds_and_uneven_ones_are_labelled() -> None:
    (line,) = lines(judge(study({("bf16", "lora"): [-2.0, -4.0]})), "Which recipe")
    assert line.endswith(" seeds would show that it is not (guessed from 2).")
    assert "n = 4 seeds, preliminary, unless" in lines(judge(study({("bf16", "lora"): STEADY[:4]})), "How to read")[0]
    records = study({("bf16", "lora"): STEADY, ("fp16", "lora"): WORSE})
    lost(records[-1], "oom")
    text = "\n".join(lines(judge(records)))
    assert "[95% interval; n = 8 seeds, unless named]" in text
    assert "; n = 8 seeds]" not in text
    assert "; n = 7 seeds, preliminary]" in text


def test_a_study_without_runs_or_without_counterparts_says_so() -> None:
    (advice, *_) = lines(judge([]), "Which recipe to use")
    assert advice.endswith("nothing can be recommended.")
    assert not lines(judge([]), "How to read")
    (advice, *_) = lines(judge([run("mamba_tiny", "bf16", "lora", 0, {0: 0.5})]), "Which")
    assert advice.endswith("nothing can be recommended.")


def test_failed_runs_are_counted_with_their_reasons() -> None:
    records = study({("bf16", "lora"): STEADY, ("fp32", "lora"): STEADY, ("fp16", "lora"): STEADY})
    half = [record for record in records if record["choices"]["precision"] == "fp16"]
    lost(half[0], "oom")
    for record in half[1:3]:
        lost(record, "nonfinite")
    found = judge(records)
    line = next(line for line in lines(found, "How far") if line.startswith("Missing"))
    assert line == "Missing or failed: nonfinite (2) and oom (1), in mamba_tiny · fp16 · lora (3)."
    assert "mamba_tiny · fp16 · lora: training broke down on 2 of 8 seeds (nonfinite)." in lines(found, "Where")
    only = [r for r in records if (r["choices"]["precision"] == "fp16") == (r["choices"]["peft"] == "lora")]
    (line,) = lines(judge(only), "Which recipe")
    assert "undecided. fp16 · lora is equivalent on 5 seeds (" in line
    assert "but training broke down on 2 of 8 seeds (nonfinite) and 1 of 8 seeds did not finish (oom)" in line
    complete = [record for record in records if record["choices"]["precision"] != "fp16"]
    assert "Nothing is missing: every recipe has every seed" in "\n".join(lines(judge(complete), "How far"))


def test_blame_is_only_what_is_shown() -> None:
    cells = {("fp32", "lora"): WORSE, ("fp32", "lora_all"): [w + 2.0 + x for w, x in zip(WORSE, LITTLE, strict=True)]}
    found = judge(adapting(cells, {"lora": SMALL, "lora_all": {"in_proj": 2, "dt_proj": 2}}))
    line = next(line for line in lines(found, "Where") if line.startswith("mamba_tiny · fp32 · lora is worse"))
    assert "To blame: the peft (lora on in_proj; in part leaving dt_proj alone)." in line
    assert f"Tried peft=lora_all: undecided (−{abs(np.mean(cells['fp32', 'lora_all'])):.2f} [" in line
    blocks = [{"layers.0": 0.001, "layers.1": 0.011, "layers.2": 0.012}] * 8
    (line, *_) = lines(judge(shadowed(blocks)), "Where")
    assert "To blame: the format (fp16, most of whose rounding enters in layers.1). No remedy was tried." in line
    parts = {("fp32", "lora"): WORSE, ("fp16", "lora"): [w + x for w, x in zip(WORSE, LITTLE, strict=True)]}
    line = next(line for line in lines(judge(study(parts)), "Where") if "fp16 · lora is worse" in line)
    assert "To blame: the peft (lora)." in line
    (line, *_) = lines(judge(study({("bf16", "lora"): WORSE})), "Where")
    assert "To blame: peft or format, the records cannot tell." in line


def test_a_base_that_nobody_trained_is_compared_with_its_own() -> None:
    records = study({("bf16", "none"): STEADY, ("fp16", "none"): WORSE}, overrides=("trainer.steps=0",))
    for record in records:
        record["config"]["trainer"]["steps"] = 0
    found = judge(records)
    assert lines(found, "Which recipe to use on skills instead of the full-precision base (the reference)")
    assert "fine-tuning" not in "\n".join(lines(found, "Where"))


def test_studies_that_ask_something_else_are_answered() -> None:
    found = judge(icl_study())
    (line,) = lines(found, "What else was asked")
    apart = found.learned[0].difference
    assert line.startswith("mamba_tiny · fp32 · none · trainer.steps=120, t: learns more in context than its base: ")
    assert f"difference +{apart.mean:.2f} [+{apart.low:.2f}, +{apart.high:.2f}], p < 0.001." in line
    assert lines(found, "How to read")  # its brackets are explained, though there is no recommendation
    assert "none to recommend" in lines(found, "Which recipe")[0]
    found = judge(tied_study([x + 2.0 for x in LITTLE], [-x for x in reversed(LITTLE)]))
    (line,) = lines(found, "What else was asked")
    assert "peft.memory_buffer tied against untied: tied scores higher (+2.15 [" in line
    said = lines(judge(tied_study(LITTLE, list(reversed(LITTLE)))), "What else")
    assert ": equivalent (" in said[0]


def test_labels_are_where_they_belong() -> None:
    plain, labelled = (judge(study({("bf16", "lora"): STEADY}, beyond=n)) for n in (0, 7))
    assert "†" not in "\n".join(lines(plain))
    assert "against 0.376 †" in lines(labelled, "Which")[0]
    assert "extrapolation too: mamba_tiny (2 of 2 scores)." in "\n".join(lines(labelled, "How far"))


def test_one_recipe_under_two_names_is_said_to_count_once() -> None:
    records = study({("bf16", "lora"): WORSE, ("bf16", "lora_all"): WORSE})
    for record in records:
        if (peft := record["choices"]["peft"]) != "none":
            record["peft"]["coverage"] = {"in_proj": {"adapted": 2, "present": 2}}
            record["config"] = record["config"] | {"peft": {"name": peft, "targets": peft, "r": 8}}
    said = lines(judge(records))
    assert sum("is worse by" in line for line in said) == 1
    assert "Counted once where they came out alike: lora and lora_all of mamba_tiny, which are one recipe." in said


def test_names_are_escaped_and_cannot_fill_the_page() -> None:
    hostile = "mamba_</script><b>|&" + "x y " * 300
    records = study({("bf16", "lora"): WILD, ("fp16", "lora"): WORSE})
    for record in records:
        record["choices"]["model"] = hostile
        record["choices"]["data"] = "[d] " * 200
    found = judge(records)
    assert words(found.page) <= WORDS
    (line, *_) = lines(found, "Which")
    assert len(line.split(":")[0]) <= LONGEST_NAME
    page = as_html(found).split("<details>")[0]
    assert "<b>" not in page
    assert html.escape("</script><b>|&") in page
    text = exports.as_markdown(found).split(f"## {exports.DETAIL}")[0]
    assert "<b>" not in text
    assert latex.as_lists(found.page).isascii()


def test_what_the_reader_decides_is_on_the_page() -> None:
    found = judge(study({("bf16", "lora"): WORSE}), settings=Settings(margin=4.0, spike=2.0, power=0.9))
    text = "\n".join(lines(found))
    assert "inside ±4 points" in text
    assert "lie over 2 points off" in text
    assert "1 point " not in text
