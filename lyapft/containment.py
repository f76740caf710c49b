"""Nothing is written through a link that leads out of the folder that a command may write to, or where others may
put what is read back as code.
"""

import os
import stat
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


def own(folder: Path) -> None:
    """Make a folder that nobody else may enter: what submitit reads back from it are pickles, which could run anything.

    Raises:
        InputError: it is there, and another user's or open to others; its rights are not changed, for it may hold more.
    """
    folder.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)
    there = folder.stat()
    if there.st_uid != os.geteuid():
        whose, first = "is another user's", ""
    elif stat.S_IMODE(there.st_mode) & (stat.S_IRWXG | stat.S_IRWXO):
        whose, first = "may be entered by other users", f"chmod 700 {folder}, or "
    else:
        return
    raise InputError(
        f"{folder} {whose}, who could exchange the pickles of jobs that lie there for other code: {first}set "
        f"hydra.launcher.submitit_folder={folder}-NAME/%j"
    )
