"""Every command and every piece of code in docs/ runs, in order, from the root of a checkout; those of README.md exist.

Commands in the running text too: what stands between backticks and begins with `python` and an argument.

What would take hours runs on a smaller study: `SMALLER` says what is put in place of what, and why nothing else is.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lyapft import cell
from lyapft.plan import cells
from tests import commands, synthetic

PAGES = ("tutorial", "reading", "extending", "scaling", "results/README")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TYPED = re.compile(rf"{BLOCK.pattern}|`(python [^`]+)`", re.MULTILINE | re.DOTALL)
MADE_UP = {"reading": ("STUDY", "OLD", "NEW")}  # studies that a page speaks of and does not make
LINKED = ("train.py", "evaluate.py", "conf", "lyapft", "benchmarks")
SHORT = "trainer.steps=4 trainer.batch_size=4 data.limit=96 task.limit=4 seed=0 model=mamba_tiny"
RATES = "peft=lora,none trainer.learning_rate=1e-3,2e-3 trainer.validation_rows=16"
SMALLER = {
    "tutorial": {"'seed=range(2)' trainer.steps=20": "seed=0 trainer.steps=4"},
    "extending": {
        "reference=off study.name=": "trainer.steps=4 task.limit=4 reference=off study.name=",
        "trainer.steps=20 ": "",
    },
    "reading": {"benchmarks.false_positives": "benchmarks.false_positives --studies 2 --seeds 3 --noise normal"},
    "scaling": {  # 612 cells, eight GPUs, every item of a task, a file of the reader's, 100,000 cells
        "study=paper": "study=paper model=mamba_130m precision=fp32,bf16 seed=0",
        "torchrun --nproc-per-node 8 train.py": "python train.py --cfg job",
        "reference=off trainer.steps=40": "reference=off trainer.steps=4 task.limit=4",
        "train.py data=alpaca data.path=FOLDER": "train.py --cfg job data=alpaca data.path=FOLDER",
        "benchmarks/streaming.py": "benchmarks/streaming.py --help",
        "benchmarks/report_scale.py": "benchmarks/report_scale.py --cells 40 --seeds 2",
    },
    "results/README": {  # two hours; and real data, which not every machine has: planned instead (its files: below)
        "train.py study=lr": f"train.py study=lr {SHORT} {RATES}",
        "train.py study=matrix": f"train.py study=matrix {SHORT} precision=bf16 peft=lora 'study.noise_floor=[]'",
        "python train.py -m model": "python -m lyapft.plan --gpu model",
        # a single cell; and who forked a command waits for the workers of its launcher (test_launchers has it)
        " hydra/launcher=joblib hydra.launcher.n_jobs=2": "",
    },
}
# a command of lyapft's own that means the same without a shell
PLAIN = re.compile(r"python (?:-m lyapft|train\.py|evaluate\.py)[^|<>&;$*?`\\]+")
LAUNCHER = "hydra/launcher="
DOES_NOT_FIT = "--fits"  # the planner's exit code is 1 then, as the pages say


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def typed(page: Path) -> list[tuple[str, str]]:
    """Language and code of every block, and of every command in between, in the order of the page."""
    found = TYPED.findall(page.read_text(encoding="utf-8"))
    return [("sh", " ".join(inline.split())) if inline else (kind, code) for kind, code, inline in found]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_typed_from_top_to_bottom(name: str, root: Path, tmp_path: Path) -> None:
    for link in LINKED:
        (tmp_path / link).symlink_to(root / link)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(tmp_path)
    for study in MADE_UP.get(name, ()):
        synthetic.study(tmp_path / "runs" / study, synthetic.matrix(seeds=2), n_steps=4, n_items=8)
    found = typed(root / "docs" / f"{name}.md")
    assert found
    whole = "".join(code for _, code in found)
    for long, short in SMALLER.get(name, {}).items():
        assert long in whole, f"{name}.md has no {long!r} any more: nothing to shorten"
        found = [(kind, code.replace(long, short)) for kind, code in found]
    for kind, code in found:
        assert kind in ("sh", "python"), f"{name}.md has a block of {kind or 'no language'}: every block is run"
        # a pipe into head ends what writes into it
        allowed = [0, *[141] * ("head" in code), *[1] * (DOES_NOT_FIT in code)]
        for done in outcomes(kind, code, tmp_path, environment):
            assert done.returncode in allowed, f"{code}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


def outcomes(
    kind: str, code: str, folder: Path, environment: dict[str, str]
) -> Iterator[commands.Done | subprocess.CompletedProcess[str]]:
    """Run a block: what only calls lyapft without an interpreter of its own, the rest by a shell."""
    lines = [line for line in code.splitlines() if line and not line.startswith("#")]
    if kind == "python":
        yield commands.run("-c", code, folder=folder, environment=environment, seconds=240)
    elif all(PLAIN.fullmatch(line) for line in lines):
        for _, *words in (shlex.split(line, comments=True) for line in lines):
            yield commands.run(*words, folder=folder, environment=environment, seconds=240)
    else:
        shell = ["bash", "-euo", "pipefail", "-c", code]
        yield subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def commands_of(page: Path) -> Iterator[list[str]]:
    """The words of every line that calls Python."""
    for _, code in blocks(page):
        for line in code.splitlines():
            if line.startswith("python "):
                yield shlex.split(line, comments=True)[1:]


def test_every_command_of_the_readme_is_one_that_exists(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each override composes to cells, each module is there and knows the options."""
    found = list(commands_of(root / "README.md"))
    assert len(found) > 20
    with cells.composing():
        for first, *rest in found:
            if first == "train.py":
                # a launcher is no matter of the cells, and its package need not be installed
                launchers = {word.removeprefix(LAUNCHER) for word in rest if word.startswith(LAUNCHER)}
                assert launchers <= {"joblib", *(path.stem for path in (root / "conf/hydra/launcher").iterdir())}
                # rates= names a file that the command before it makes
                left_out = ("rates=", LAUNCHER)
                command = cells.composed([word for word in rest if "=" in word and not word.startswith(left_out)])
                # every cell of the presets is composed in test_study_presets
                assert any(word.startswith("study=") for word in rest) or cells.cells(command), rest
    for first, *rest in found:
        if first == "-m":
            module, *words = rest
            subcommand = [word for word in words[:1] if word.isalpha()]
            monkeypatch.setattr(sys, "argv", [module, *subcommand, "--help"])
            with pytest.raises(SystemExit):
                main_of(module)()
            printed = capsys.readouterr().out
            assert all(word.split("=")[0] in printed for word in words if word.startswith("--")), rest


def main_of(module: str) -> Callable[[], int]:
    """What `python -m` would call."""
    found = importlib.util.find_spec(module)
    assert found, f"there is no {module}"
    package = found.submodule_search_locations is not None
    return importlib.import_module(f"{module}.__main__" if package else module).main


def test_the_pages_and_their_links_are_there(root: Path) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    for name in PAGES:
        page = root / "docs" / f"{name}.md"
        assert f"docs/{name}.md" in readme
        for target in re.findall(r"\]\(([^)#]+)\)", BLOCK.sub("", page.read_text(encoding="utf-8"))):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_real_data_lie_where_the_page_says_and_can_be_read(root: Path, shared_data: Path) -> None:
    """The command that is only planned above, up to what checks a cell before its model is loaded."""
    code = "".join(code for _, code in blocks(root / "docs/results/README.md"))
    paths = re.findall(r"\.path=\$DATA/([\w./-]+)", code)
    assert len(paths) == 5
    assert [path for path in paths if not (shared_data / path).exists()] == []
    (line,) = (line for line in code.splitlines() if "$DATA" in line)
    with cells.composing():
        words = shlex.split(line.replace("$DATA", str(shared_data)))[3:]
        first = [word if "[" in word else word.split(",")[0] for word in words]  # of each choice
        prepared = cell.prepare(cells.cells(cells.composed(first))[0].config)
    assert sum(len(prepared.task.queries(shots)) for shots in prepared.task.shots) == 2 * 5528  # as the page has it


def test_commands_between_backticks_are_typed_too(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Paste it into `python`. `python -m a\n b` is one:\n\n```sh\npython c.py `d`\n```\n", encoding="utf-8"
    )
    assert typed(page) == [("sh", "python -m a b"), ("sh", "python c.py `d`\n")]
