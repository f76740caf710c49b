"""The project as others receive it: one version, a complete lock, a licence, nothing of its authors' machines."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lyapft

# Import names that differ from the distribution that brings them.
DISTRIBUTION = {
    "hydra": "hydra-core",
    "lm_eval": "lm-eval",
    "causal_conv1d": "causal-conv1d",
    "mamba_ssm": "mamba-ssm",
    "markdown_it": "markdown-it-py",
    "yaml": "pyyaml",
}
# Needed by another package's feature that lyapft uses, so never imported by lyapft itself.
INDIRECT = {
    "pyarrow": "pandas reads and writes parquet with it",
    "hydra-joblib-launcher": "Hydra finds it as hydra/launcher=joblib",
}
COMMANDS = {"hydra-submitit-launcher", "mypy", "pre-commit", "pytest-xdist", "ruff"}  # run or plugged in, not imported


@pytest.fixture(scope="module")
def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def requirements(lines: list[str]) -> dict[str, Requirement]:
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def locked(path: Path) -> dict[str, str]:
    """Versions by canonical name; every line of a lock is `name==version`."""
    rows = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", row) for row in rows), rows
    pairs = [row.split("==") for row in rows]
    assert len({canonicalize_name(name) for name, _ in pairs}) == len(pairs), "a package is locked twice"
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.fixture(scope="module")
def runtime_lock(root: Path) -> dict[str, str]:
    return locked(root / "requirements.lock")


@pytest.fixture(scope="module")
def dev_lock(root: Path) -> dict[str, str]:
    return locked(root / "requirements-dev.lock")


@pytest.fixture(scope="module")
def kernels_lock(root: Path) -> dict[str, str]:
    return locked(root / "requirements-kernels.lock")


def tracked(root: Path) -> list[Path]:
    """Files that git tracks or would add."""
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout.decode()
    paths = [root / name for name in listed.split("\0") if name]
    return [path for path in paths if path.is_file()]


def imported(paths: list[Path]) -> set[str]:
    """Distributions that these sources import, the standard library and the checkout's own modules left out."""
    own = {"lyapft", "tests", "benchmarks", "train", "evaluate", "tolerances", "conftest"} | {
        path.stem for path in paths
    }
    found = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
    return {canonicalize_name(DISTRIBUTION.get(name, name)) for name in found - own - sys.stdlib_module_names}


def product_sources(root: Path) -> list[Path]:
    return [
        *(root / "lyapft").rglob("*.py"),
        *(root / name for name in ("train.py", "evaluate.py") if (root / name).exists()),
    ]


def test_version_is_the_installed_one_and_stands_in_one_place(project):
    assert project["project"]["dynamic"] == ["version"]
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "lyapft.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", lyapft.__version__)
    try:
        installed = importlib.metadata.version("lyapft")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("lyapft is imported from the checkout without being installed")
    assert installed == lyapft.__version__


def test_licence_text_and_name_agree(project, root):
    text = (root / "LICENSE").read_text(encoding="utf-8")
    assert project["project"]["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text


def test_every_dependency_is_locked_at_a_version_it_admits(project, runtime_lock, dev_lock, kernels_lock):
    runtime = requirements(project["project"]["dependencies"])
    dev = requirements(project["project"]["optional-dependencies"]["dev"])
    kernels = requirements(project["project"]["optional-dependencies"]["kernels"])
    for wanted, lock in ((runtime, runtime_lock), (dev, runtime_lock | dev_lock), (kernels, kernels_lock)):
        for name, requirement in wanted.items():
            assert name in lock, f"{name} is not locked"
            assert lock[name] in requirement.specifier, f"{requirement} does not admit the locked {lock[name]}"


def test_lock_is_closed_under_the_requirements_of_what_it_locks(runtime_lock, dev_lock):
    """What the installed releases require in turn is locked too, so pip never chooses a version by itself."""
    assert not runtime_lock.keys() & dev_lock.keys()
    for lock in (runtime_lock, runtime_lock | dev_lock):
        for name, version in lock.items():
            distribution = importlib.metadata.distribution(name)
            if distribution.version.split("+")[0] != version:
                pytest.skip(
                    f"{name} {distribution.version} is installed, {version} is locked: not the environment of the lock"
                )
            for line in distribution.requires or []:
                requirement = Requirement(line)
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    needed = canonicalize_name(requirement.name)
                    if re.match(r"nvidia|cuda|triton", needed):
                        continue  # a CUDA build of torch pins these by itself
                    assert needed in lock, f"{name} requires {requirement}: lock it"
                    assert requirement.specifier.contains(lock[needed], prereleases=True), (
                        f"{name} requires {requirement}"
                    )


def test_imports_and_dependencies_are_the_same_set(project, root):
    runtime = requirements(project["project"]["dependencies"])
    extras = {name: requirements(lines) for name, lines in project["project"]["optional-dependencies"].items()}
    used = imported(product_sources(root))
    assert not used - runtime.keys() - extras["cuda"].keys() - extras["dashboards"].keys(), "imported but not declared"
    assert not runtime.keys() - used - INDIRECT.keys(), "declared but never imported"
    test_sources = [path for folder in ("tests", "benchmarks") for path in (root / folder).rglob("*.py")]
    used_in_tests = imported(test_sources) - {"packaging"}  # packaging comes with pytest itself
    declared = set(runtime).union(*(extras[name].keys() for name in ("dev", "cuda", "kernels", "dashboards", "fuzz")))
    assert not used_in_tests - declared, "imported but not declared"
    assert not extras["dev"].keys() - used_in_tests - COMMANDS, "declared but never used"


def test_no_machine_path_or_registry_host_in_any_file(root):
    homes = rb"(?<![\w.$}>-])/(?:home|root|Users|work|opt|mnt|scratch)/[\w.-]+"
    hosts = rb"(?:pypi|pythonhosted|npmjs)\.org|download\.pytorch\.org|\b(?:index-url|find-links|trusted-host)\b"
    # a checkout in the folder of temporary files proves nothing: that has one name on many machines
    own = len(root.parts) > 2 and str(root.parent) != tempfile.gettempdir()
    here = re.escape(str(root.parent).encode()) if own else rb"\0"
    pattern = re.compile(rb"|".join([homes, hosts, here + rb"/"]))
    hits = []
    for path in tracked(root):
        content = path.read_bytes()
        of_images = any(map(path.is_relative_to, (root / "docker", root / "tests" / "cluster")))
        if of_images or path.name == "test_docker.py":
            content = content.replace(b"/opt/", b"")  # folders of the image
        if path == Path(__file__).resolve() or b"\0" in content[:8192]:
            continue
        hits += [
            f"{path.relative_to(root)}: {match.group().decode(errors='replace')}" for match in pattern.finditer(content)
        ]
    assert not hits


def test_tracked_files_are_small(root):
    """A checkpoint is at most 2 MB; nothing else comes near."""
    large = {
        str(path.relative_to(root)): path.stat().st_size for path in tracked(root) if path.stat().st_size > 2_000_000
    }
    assert not large


def test_ci_runs_the_test_command_of_the_readme(root):
    script = (root / ".ci" / "run").read_text(encoding="utf-8")
    assert script.startswith("#!/usr/bin/env bash\n")
    assert script.rstrip().splitlines()[-1] == "make test"
    assert (root / ".ci" / "run").stat().st_mode & 0o111
    assert "make test" in (root / "README.md").read_text(encoding="utf-8")
