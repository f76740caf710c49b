"""Every command and every piece of code in docs/ runs, in order, from the root of a checkout."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = ("tutorial", "reading", "extending")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINKED = ("train.py", "evaluate.py", "conf", "lyapft")


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_typed_from_top_to_bottom(name: str, root: Path, tmp_path: Path) -> None:
    for link in LINKED:
        (tmp_path / link).symlink_to(root / link)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(tmp_path)
    found = blocks(root / "docs" / f"{name}.md")
    assert found
    for kind, code in found:
        assert kind in ("sh", "python"), f"{name}.md has a block of {kind or 'no language'}: every block is run"
        command = ["bash", "-euo", "pipefail", "-c", code] if kind == "sh" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        # a pipe into head ends what writes into it
        assert done.returncode == 0 or (done.returncode == 141 and "head" in code), f"{code}\n{done.stderr[-3000:]}"


def test_the_pages_and_their_links_are_there(root: Path) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    for name in PAGES:
        assert f"docs/{name}.md" in readme
        page = root / "docs" / f"{name}.md"
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
