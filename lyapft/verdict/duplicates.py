"""Recipes that are one thing under two names: their target sets resolve to the same layers of this model."""

from collections.abc import Sequence

from lyapft.verdict.evidence import Recipe

NAMES_ONLY = ("peft.name", "peft.targets", "peft.min_coverage")  # what may differ between two of one and the same


def first_of_its_kind(recipes: Sequence[Recipe]) -> dict[tuple[str, str, str, str], Recipe]:
    """For each recipe that repeats another one, by its key, the first of those that it repeats.

    Two are alike where every setting but the name of the target set is, and the same layers were adapted: every run of
    one is then the same computation as the run of the other with its seed.
    """
    groups: dict[tuple[object, ...], list[Recipe]] = {}
    for recipe in recipes:
        if adapted := recipe.adapted:
            groups.setdefault((recipe.setting, recipe.precision, adapted), []).append(recipe)
    found: dict[tuple[str, str, str, str], Recipe] = {}
    for group in (group for group in groups.values() if len(group) > 1):
        firsts: dict[frozenset[tuple[str, str]], Recipe] = {}
        for recipe in group:
            kept = frozenset((k, v) for k, v in recipe.settings.items() if k not in NAMES_ONLY)
            if (first := firsts.setdefault(kept, recipe)) is not recipe:
                found[recipe.key] = first
    return found
