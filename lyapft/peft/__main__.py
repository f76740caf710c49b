"""Turn a finished run into an ordinary model of transformers: `python -m lyapft.peft merge runs/STUDY/CELL FOLDER`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.utils import instantiate

from lyapft import backbone, recurrence
from lyapft.backbone import no_progress_bars
from lyapft.errors import InputError
from lyapft.evaluation import check_fit, finished
from lyapft.peft.base import written_whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the merged model of a run; 0 when it is there, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m lyapft.peft", description="What to do with a trained adapter.")
    commands = parser.add_subparsers(dest="command", required=True)
    merging = commands.add_parser("merge", help="write base and adapter as one model, which transformers loads")
    merging.add_argument("run", type=Path, help="folder of a finished run, runs/STUDY/CELL")
    merging.add_argument("folder", type=Path, help="folder to write: model and tokenizer; must not exist yet")
    merging.add_argument("--trust-remote-code", action="store_true", help="run the code that came with its model")
    options = parser.parse_args(arguments)
    try:
        merge(options.run, options.folder, options.trust_remote_code)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.folder)
    return 0


def merge(run: Path, folder: Path, trust_remote_code: bool = False) -> None:
    """Write the model of a finished run, its adapter merged, and its tokenizer, in float32.

    Raises:
        InputError: no finished run; other base weights than it was trained from; a method that cannot be merged; a
            folder that exists.
    """
    if folder.exists():
        raise InputError(f"{folder} exists already: give a folder that does not")
    record, cfg = finished(run, trust_remote_code)
    found = backbone.faults(cfg.model)
    if found:
        raise InputError("\n".join(found))
    content, trained = backbone.fingerprint(cfg.model), record["config"]["model"]["content"]
    if content != trained:
        raise InputError(
            f"the base weights of {cfg.model.name} are not those of {run} ({content[:12]}, {trained[:12]})"
        )
    check_fit(run, record, cfg)
    base = backbone.load(cfg.model)
    strategy = instantiate(cfg.peft)
    strategy.attach(base, recurrence.install(base.model))
    strategy.load(run)
    strategy.merge()
    with written_whole(folder) as partial, no_progress_bars():
        base.model.save_pretrained(partial)
        base.tokenizer.save_pretrained(partial)


if __name__ == "__main__":
    sys.exit(main())
