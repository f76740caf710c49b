"""Two studies before and after a change: what got worse beyond its noise ends the command with 1, nothing else does."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lyapft.report.__main__ import main
from lyapft.report.regression import QUANTITIES, Change, Floor, changes, matching
from lyapft.verdict.evidence import gather
from tests import synthetic

Records = list[dict[str, Any]]


def compared(old: Records, new: Records, quantities: list[str]) -> list[Change]:
    return changes(matching(gather(old), gather(new)).same, quantities)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Records]:
    folder = tmp_path_factory.mktemp("old")
    return folder, synthetic.study(folder, synthetic.matrix(seeds=5))


def changed(folder: Path, records: Records, score: float = 0.0, speed: float = 1.0, noise: float = 0.0) -> Records:
    """The study again, bf16 · lora moved by so many points and by a factor in speed."""
    rng = np.random.default_rng(0)
    made = copy.deepcopy(records)
    for record in made:
        if (record["choices"]["precision"], record["choices"]["peft"]) == ("bf16", "lora"):
            off = (score + noise * rng.standard_normal()) / 100
            for one in record["scores"]:
                one["value"] += off
            record["cost"]["tokens_per_s"] *= speed * float(np.exp(0.02 * rng.standard_normal()))
        home = folder / record["name"]
        home.mkdir(parents=True)
        (home / "record.json").write_text(json.dumps(record), encoding="utf-8")
    return made


@pytest.mark.parametrize(
    ("options", "fail_on", "code"),
    [
        ({}, "score", 0),
        ({"score": -3.0, "noise": 0.5}, "score", 1),
        ({"score": -3.0, "noise": 0.5}, "loss,margin", 0),  # what is not chosen does not fail
        ({"score": 3.0, "noise": 0.5}, "score", 0),
        ({"score": -0.3, "noise": 2.0}, "score", 0),  # within its noise
        ({"speed": 0.7}, "score,tokens_per_s", 1),
        ({"speed": 1.4}, "tokens_per_s,peak_bytes_per_token", 0),
    ],
)
def test_only_what_got_worse_beyond_its_noise_fails(
    old: tuple[Path, Records], tmp_path: Path, options: dict[str, float], fail_on: str, code: int
) -> None:
    changed(tmp_path, old[1], **options)
    assert main(["compare", str(old[0]), str(tmp_path), f"--fail-on={fail_on}"]) == code


def test_p_is_that_of_a_paired_t_test(old: tuple[Path, Records], tmp_path: Path) -> None:
    new = changed(tmp_path, old[1], score=-2.0, noise=1.0)
    found = {c.recipe.label: c for c in compared(old[1], new, ["score"])}
    change = found["bf16 · lora"]
    means = [
        [
            np.mean([s["value"] for s in r["scores"]])
            for r in side
            if r["name"].startswith("mamba_tiny-skills-bf16-lora")
        ]
        for side in (old[1], new)
    ]
    expected = stats.ttest_rel(*means).pvalue * change.comparison.family
    assert change.comparison.p_different == pytest.approx(min(1.0, expected))
    assert change.outcome == "worse"
    assert {c.outcome for label, c in found.items() if label != "bf16 · lora"} == {"same"}


def test_one_seed_is_never_called_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = synthetic.study(tmp_path / "old", synthetic.matrix(seeds=1))
    changed(tmp_path / "new", records, score=-20.0)
    command = ["compare", str(tmp_path / "old"), str(tmp_path / "new")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "1 changed on their only common seed" in printed
    assert "numbers got worse, 1 undecided." in printed
    assert main([*command, "--fail-on-undecided"]) == 1  # unless nobody wants to take that for no change
    assert main([*command, "--fail-on=loss", "--fail-on-undecided"]) == 0  # that one is the same


def test_undecided_fails_on_demand_only(old: tuple[Path, Records], tmp_path: Path) -> None:
    for name, (score, noise, plain, strict) in {
        "same": (0.0, 0.0, 0, 0),
        "noise": (-0.3, 2.0, 0, 1),
        "better": (3.0, 0.5, 0, 0),
        "worse": (-3.0, 0.5, 1, 1),
    }.items():
        changed(tmp_path / name, old[1], score=score, noise=noise)
        command = ["compare", str(old[0]), str(tmp_path / name)]
        assert (main(command), main([*command, "--fail-on-undecided"])) == (plain, strict), name


def test_every_number_can_be_chosen(old: tuple[Path, Records], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(old[0]), str(old[0]), f"--fail-on={','.join(QUANTITIES)}"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in QUANTITIES)
    marked = [line for line in printed.splitlines() if "tokens_per_s (emulated)" in line]
    assert len(marked) == 4
    assert not any("fp32" in line for line in marked)
    assert "(emulated): half precision ran in software" in printed
    assert "0 of" in printed


def test_a_run_that_fails_now_is_worse_whatever_was_chosen(
    old: tuple[Path, Records], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = copy.deepcopy(old[1])
    lost, stopped = (r for r in records if r["name"].startswith("mamba_tiny-skills-fp16-none") and r["seed"] < 2)
    lost |= {"status": "nonfinite", "scores": [], "divergence": []}
    stopped |= {"status": "interrupted", "scores": [], "divergence": []}
    changed(tmp_path, records)
    assert main(["compare", str(old[0]), str(tmp_path), "--fail-on=margin"]) == 1
    printed = capsys.readouterr().out
    assert f"fp16 · none, seed {lost['seed']}: finished before, now nonfinite" in printed
    assert "interrupted" not in printed


@pytest.mark.parametrize("fail_on", ["speed", ""])
def test_bad_input_is_refused(old: tuple[Path, Records], fail_on: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(old[0]), str(old[0]), f"--fail-on={fail_on}"]) == 2
    assert "choose from score, loss" in capsys.readouterr().err


def test_studies_that_share_nothing_are_refused(
    old: tuple[Path, Records], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    synthetic.study(tmp_path, [synthetic.record("llama_tiny")])
    assert main(["compare", str(old[0]), str(tmp_path)]) == 2
    assert "share no recipe" in capsys.readouterr().err


def without(folder: Path, records: Records, drop: str) -> None:
    """The study again without one recipe, a seed of it, its status `ok`, or some of its scores."""
    for record in changed(folder, records):
        if (record["choices"]["precision"], record["choices"]["peft"]) != ("bf16", "lora"):
            continue
        path = folder / record["name"] / "record.json"
        if drop == "recipe" or (drop == "seed" and record["seed"] == 1):
            path.unlink()
        if drop == "interrupted":
            path.write_text(json.dumps(record | {"status": "interrupted"}), encoding="utf-8")
        if drop == "scores":
            kept = [score for score in record["scores"] if score["shots"] == 0]
            path.write_text(json.dumps(record | {"scores": kept}), encoding="utf-8")


@pytest.mark.parametrize(
    ("drop", "named"),
    [
        ("recipe", "mamba_tiny · bf16 · lora: not in the new study"),
        ("seed", "mamba_tiny · bf16 · lora: no finished run of seed 1"),
        ("interrupted", "mamba_tiny · bf16 · lora: no finished run of seeds 0, 1, 2, 3, 4"),
        ("scores", "mamba_tiny · bf16 · lora: not scored on skills_new 1-shot"),
    ],
)
def test_what_the_new_study_lacks_is_named_and_no_success(
    old: tuple[Path, Records], tmp_path: Path, capsys: pytest.CaptureFixture[str], drop: str, named: str
) -> None:
    without(tmp_path, old[1], drop)
    command = ["compare", str(old[0]), str(tmp_path)]
    assert main(command) == 1
    printed = capsys.readouterr().out
    assert f"✗ {named}" in printed
    assert "0 of" in printed  # fewer scores of the same model are no worse ones
    assert main([*command, "--allow-missing"]) == 0


def test_numbers_without_a_value_are_left_out(old: tuple[Path, Records], tmp_path: Path) -> None:
    new = changed(tmp_path, old[1])
    for record in new:
        record["cost"]["tokens_per_s"] = 0.0
        record["training"]["loss_mean_last_10pct"] = float("nan")
    assert compared(old[1], new, ["tokens_per_s", "loss"]) == []


def rerun(record: dict[str, Any], points: float = 0.0, speed: float = 1.0, threads: int = 2) -> dict[str, Any]:
    """The same cell again, its scores moved by so many points, and its speed by a factor."""
    made = copy.deepcopy(record)
    made |= {"id": f"{made['id'][:8]}{threads:04d}", "name": f"{made['name']}-again{threads}", "role": "rerun"}
    made["environment"]["threads"] = threads
    made["replicate"] = int(threads == 2)
    for one in made["scores"]:
        one["value"] += points / 100
    made["cost"]["tokens_per_s"] *= speed
    return made


def saved(folder: Path, records: Records) -> Path:
    for record in records:
        home = folder / record["name"]
        home.mkdir(parents=True)
        (home / "record.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def of_recipe(records: Records, precision: str, peft: str) -> Records:
    return [r for r in records if (r["choices"]["precision"], r["choices"]["peft"]) == (precision, peft)]


def test_what_a_rerun_moves_too_is_not_worse(
    old: tuple[Path, Records], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = changed(tmp_path / "new", old[1], score=-0.6, noise=0.01)  # all seeds agree, so the t test alone is sure
    assert main(["compare", str(old[0]), str(tmp_path / "new")]) == 1
    again = [rerun(record, points) for record, points in zip(of_recipe(new, "bf16", "lora"), (2.0, -1.0), strict=False)]
    (change,) = (c for c in compared(old[1], [*new, *again], ["score"]) if c.recipe.label == "bf16 · lora")
    assert change.floor is not None
    assert (change.floor.size, change.floor.n) == (pytest.approx(np.sqrt((2.0**2 + 1.0**2) / 2)), 2)
    assert change.outcome == "undecided"
    saved(tmp_path / "new", again)
    capsys.readouterr()
    assert main(["compare", str(old[0]), str(tmp_path / "new")]) == 0
    assert "1.58" in capsys.readouterr().out


def test_reruns_that_agree_hide_nothing(old: tuple[Path, Records], tmp_path: Path) -> None:
    new = changed(tmp_path / "new", old[1], score=-3.0, noise=0.5)
    before = saved(tmp_path / "old", [*old[1], *(rerun(record) for record in old[1])])
    (change,) = (c for c in compared([*old[1], *map(rerun, old[1])], new, ["score"]) if c.recipe.label == "bf16 · lora")
    assert (change.floor.size, change.outcome) == (0.0, "worse")  # type: ignore[union-attr]
    assert main(["compare", str(before), str(tmp_path / "new")]) == 1


def test_a_shift_of_all_seeds_alike_must_exceed_the_floor(tmp_path: Path) -> None:
    records = synthetic.study(tmp_path, synthetic.matrix(seeds=16), n_steps=2, n_items=30)
    new = changed(tmp_path / "new", records, score=-0.9, noise=0.01)
    again = rerun(of_recipe(records, "bf16", "lora")[0], points=1.0)
    (change,) = (c for c in compared([*records, again], new, ["score"]) if c.recipe.label == "bf16 · lora")
    assert change.comparison.p_different < 0.05  # sixteen seeds make even this spread small
    assert change.outcome == "undecided"


@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_the_bar_of_a_mean_change_is_t_times_the_floor(pairs: int) -> None:
    bar = Floor(0.02, pairs).bar
    assert bar == pytest.approx(0.02 * stats.t.ppf(0.975, pairs))


def loaded(rng: np.random.Generator, recipes: int, slower: float = 1.0) -> Records:
    """A study on a machine whose load all runs share, and its reruns, made later under another load."""

    def run(peft: str, seed: int, load: float, replicate: int = 0) -> dict[str, Any]:
        speed = 1000 * np.exp(load + 0.02 * rng.standard_normal()) / slower
        role = "rerun" if replicate else "cell"
        made = {"id": f"{peft}-{seed}-{replicate}", "status": "ok", "role": role, "replicate": replicate, "seed": seed}
        choices = {"model": "m", "data": "d", "task": "t", "precision": "bf16", "peft": peft}
        return made | {"choices": choices, "config": {}, "cost": {"tokens_per_s": float(speed)}, "scores": []}

    load, later = 0.05 * rng.standard_normal(2)
    pefts = [f"p{i}" for i in range(recipes)]
    runs = [run(peft, seed, load) for peft in pefts for seed in range(8)]
    return [*runs, *(run(peft, 0, later, replicate=1) for peft in pefts)]


@pytest.mark.parametrize(("recipes", "studies"), [(1, 600), (9, 600)])
def test_load_of_the_machine_alone_is_called_worse_in_one_study_of_twenty_at_most(recipes: int, studies: int) -> None:
    rng = np.random.default_rng(1)
    pairs = [(loaded(rng, recipes), loaded(rng, recipes)) for _ in range(studies)]
    worse = sum(any(c.outcome == "worse" for c in compared(*pair, ["tokens_per_s"])) for pair in pairs)
    assert worse / studies <= 0.05
    half_as_fast = [loaded(rng, recipes, slower=2.0) for _ in range(50)]
    found = [
        compared(old, new, ["tokens_per_s"])[0].outcome for (old, _), new in zip(pairs, half_as_fast, strict=False)
    ]
    assert found.count("worse") > 40


def test_another_thread_count_is_noise_of_scores_and_not_of_costs(old: tuple[Path, Records], tmp_path: Path) -> None:
    again = rerun(of_recipe(old[1], "bf16", "lora")[0], points=1.0, speed=0.5, threads=1)
    floors = {c.quantity: c.floor for c in compared([*old[1], again], old[1], ["score", "tokens_per_s"])}
    assert floors["score"].size == pytest.approx(1.0)  # type: ignore[union-attr]
    assert floors["tokens_per_s"] is None


def longer(records: Records, steps: int) -> Records:
    made = copy.deepcopy(records)
    for record in of_recipe(made, "bf16", "lora"):
        record["config"]["trainer"]["steps"] = steps
    return made


def test_other_settings_are_named_and_compared_on_demand_only(
    old: tuple[Path, Records], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = saved(tmp_path, longer(old[1], steps=60))
    command = ["compare", str(old[0]), str(new)]
    assert main(command) == 1
    printed = capsys.readouterr().out
    assert "✗ mamba_tiny · bf16 · lora: trainer.steps 120 → 60: another recipe, not compared" in printed
    assert "0 of 5 numbers" in printed
    for allowed in ("trainer", "trainer.steps"):
        assert main([*command, f"--allow-changed=kernel,{allowed}"]) == 0
        printed = capsys.readouterr().out
        assert "compared although changed: mamba_tiny · bf16 · lora: trainer.steps 120 → 60" in printed
        assert "0 of 6 numbers" in printed
    assert main([*command, "--allow-changed=trainer.st"]) == 1


def test_recipes_are_matched_by_their_settings_not_by_their_labels(old: tuple[Path, Records]) -> None:
    """Of two lengths in one study, the label names them; in the other study there is one, without a name."""
    both = [*old[1], *({**r, "id": f"{r['id'][:8]}60"} for r in of_recipe(longer(old[1], steps=60), "bf16", "lora"))]
    found = matching(gather(both), gather(longer(old[1], steps=60)))
    by_label = {before.label: after for before, after in found.same}
    assert by_label["bf16 · lora · trainer.steps=60"].label == "bf16 · lora"
    assert [recipe.label for recipe in found.gone] == ["bf16 · lora · trainer.steps=120"]
    assert not found.different


def test_versions_that_differ_are_named(
    old: tuple[Path, Records], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = copy.deepcopy(old[1])
    for record in new:
        record["environment"]["torch"] = "2.14.0"
    assert main(["compare", str(old[0]), str(saved(tmp_path, new))]) == 0
    assert "not the same on both sides: torch: 2.13.0 → 2.14.0" in capsys.readouterr().out
