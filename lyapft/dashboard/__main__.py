"""Command line of the dashboards: `workspace` builds the saved views, `push` makes W&B runs of a study's records."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from lyapft import dashboard, records
from lyapft.dashboard import workspace
from lyapft.errors import InputError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lyapft.dashboard", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    views = commands.add_parser(
        "workspace",
        help="save the views matrix, stability, divergence and cost of studies",
        description="Saves four views of the studies in a W&B project: matrix, stability, divergence, cost, with runs "
        "grouped by study and recipe. Needs an account and the extra `dashboards`. The specification that is sent is "
        "tested; sending it to a server is not. Each call saves new views.",
    )
    views.add_argument("project", metavar="ENTITY/PROJECT", help="user or team, and project")
    views.add_argument("studies", type=Path, nargs="+", metavar="runs/STUDY", help="folders of studies")
    views.add_argument("--output", type=Path, help="write what would be sent to this JSON file, and send nothing")
    push = commands.add_parser(
        "push",
        help="make W&B runs of a study that was run without W&B",
        description="Makes one W&B run of each record, offline without a login: "
        "`wandb sync runs/STUDY/wandb/offline-run-*` uploads them. Uploading is untested against a server.",
    )
    push.add_argument("study", type=Path, metavar="runs/STUDY", help="folder of a study")
    push.add_argument("--project", default="lyapft", help="default: %(default)s")
    push.add_argument("--entity", help="user or team (default: the account's)")
    push.add_argument("--mode", choices=dashboard.MODES, help="default: WANDB_MODE, else by whether there is a login")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it is done, 2 for bad input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = _parser().parse_args(arguments)
    try:
        if options.command == "push":
            mode = dashboard.wandb_mode(OmegaConf.create({"mode": options.mode}))
            pushed = dashboard.push(options.study, mode, options.project, options.entity)
            print(f"{len(pushed)} runs ({mode}) in {options.study / 'wandb'}")
        else:
            _workspace(options.project, options.studies, options.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _workspace(name: str, studies: Sequence[Path], output: Path | None) -> None:
    entity, slash, project = name.partition("/")
    if not (entity and slash and project) or "/" in project:
        raise InputError(f"{name!r} is no project: give ENTITY/PROJECT, such as my-team/lyapft")
    made = workspace.workspaces(entity, project, studies)
    if output is not None:
        records.save_json(output, workspace.specification(made))
        print(output)
        return
    workspace.save(made)


if __name__ == "__main__":
    sys.exit(main())
