"""Nothing is written through a link that leads out of the folder that a command may write to."""

from collections.abc import Iterable
from pathlib import Path

from lyapft.errors import InputError


def check(root: Path, paths: Iterable[Path]) -> None:
    """Refuse paths that lead out of a folder, which itself may be a link; those that do not exist lead nowhere yet.

    Raises:
        InputError: one does; it names where to.

    >>> check(Path("runs"), [Path("runs/study"), Path("runs/study/cell")])
    """
    home = root.resolve()
    for path in paths:
        if not path.resolve().is_relative_to(home):
            raise InputError(
                f"{path} leads out of {root}, to {path.resolve()}: nothing is written there. Put a folder in the place "
                "of the link, or set runs=FOLDER"
            )
