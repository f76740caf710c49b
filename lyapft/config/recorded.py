"""Settings that a record has: read by the schemas that made them, whoever may have written the file since."""

from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lyapft.config.store import SCHEMAS
from lyapft.errors import InputError


def part(tree: Any, place: str, *kinds: type | None) -> Any:
    """What a tree of JSON has at a place like `config.model.content`.

    Raises:
        InputError: it has nothing there, or something of another kind.
    """
    for key in place.split("."):
        if not isinstance(tree, dict) or key not in tree:
            raise InputError(f"{place} is missing")
        tree = tree[key]
    if not any(tree is None if kind is None else isinstance(tree, kind) for kind in kinds):
        wanted = " or ".join("null" if kind is None else kind.__name__ for kind in kinds)
        raise InputError(f"{place}={tree!r:.60} is no {wanted}")
    return tree


def typed(group: str, values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a group, of their types; those of the tasks of a suite too.

    Raises:
        InputError: a key that the group does not have, one that has no value, or a value of another type.
    """
    try:
        node = OmegaConf.merge(OmegaConf.structured(_schema(group, values)), values)
        missing = OmegaConf.missing_keys(node)
    except OmegaConfBaseException as error:
        place = f"{group}.{error.full_key}" if error.full_key else group
        raise InputError(f"{place}: {str(error).splitlines()[0]}") from None
    if missing:
        raise InputError(f"{', '.join(f'{group}.{key}' for key in sorted(missing))} is missing")
    found: dict[str, Any] = OmegaConf.to_container(node)  # type: ignore[assignment]
    if group == "task" and "tasks" in found:
        found["tasks"] = {name: typed(group, part(found["tasks"], name, dict)) for name in found["tasks"]}
    return found


def _schema(group: str, values: dict[str, Any]) -> type:
    """That of the class the settings name; else, as a class of someone's own may have any, the one with these keys."""
    choices = SCHEMAS[group]
    named = [one for one in choices.values() if values.get("_target_") == getattr(one, "_target_", None) is not None]
    alike = [one for one in choices.values() if {field.name for field in fields(one)} == set(values)]
    found = next(iter([*named, *alike]), choices.get(group))
    if found is None:
        if "_target_" not in values:
            raise InputError(f"{group}._target_ is missing")
        raise InputError(f"{group}._target_={values['_target_']} has other settings: {', '.join(values)}")
    return found


def merged(values: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """Settings with the paths that `paths_of` took out of them.

    Raises:
        InputError: they do not fit together.
    """
    try:
        both = OmegaConf.merge(values, paths)
        return OmegaConf.to_container(both) if isinstance(both, DictConfig) else {}  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise InputError(str(error).splitlines()[0]) from None
