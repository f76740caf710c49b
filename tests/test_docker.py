"""Facts of the images and cluster files that can be checked without building them."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose as compose_config
from hydra import initialize_config_dir
from hydra.types import RunMode

from lyapft import config, study

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
SCRIPTS = sorted([*DOCKER.glob("*.sh"), *(ROOT / "tests" / "cluster").glob("*.sh")])
SERVICE = {"build", "image", "user", "environment", "volumes", "shm_size", "stop_grace_period", "profiles", "deploy"}
pytestmark = pytest.mark.skipif(not DOCKER.is_dir(), reason="an installed package has no docker/")


def instructions() -> list[tuple[str, str]]:
    """(name, arguments) of the Dockerfile, with joined lines."""
    text = (DOCKER / "Dockerfile").read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2]) for line in text.splitlines() if line.strip()]


def stages() -> dict[str, list[tuple[str, str]]]:
    found, name = {}, ""
    for word, rest in instructions():
        if word == "FROM":
            name = rest.partition(" AS ")[2] or f"stage {len(found)}"
            found[name] = [(word, rest)]
        elif name:
            found[name].append((word, rest))
    return found


def test_the_base_is_an_argument_and_the_last_stage_is_the_runtime():
    first, last = instructions()[0], list(stages().values())[-1]
    assert first[0] == "ARG"
    assert first[1].startswith("BASE=")
    assert last == [("FROM", "runtime")]
    assert {"system", "environment", "runtime", "test"} <= set(stages())


def test_every_install_is_from_a_lock():
    installs = [c for _, rest in instructions() for c in rest.split("&&") if re.search(r"\bpip install\b", c)]
    assert installs
    for command in installs:
        from_lock = "-r requirements" in command or "requirements.lock" in command
        assert from_lock or "--no-deps --no-build-isolation --no-index --editable ." in command, command
    for name in ("requirements-cuda.lock",):
        lines = [x for x in (DOCKER / name).read_text().splitlines() if not x.startswith("#")]
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)


def test_cuda_kernels_have_the_versions_of_the_kernel_lock():
    def pinned(path: Path) -> dict[str, str]:
        return dict(x.split("==") for x in path.read_text().splitlines() if "==" in x and not x.startswith("#"))

    cuda, kernels = pinned(DOCKER / "requirements-cuda.lock"), pinned(ROOT / "requirements-kernels.lock")
    assert all(cuda[name] == kernels[name] for name in cuda.keys() & kernels.keys())
    assert {"mamba_ssm", "causal_conv1d"} <= cuda.keys()
    (line,) = [rest for _, rest in instructions() if "install" in rest and "requirements-cuda.lock" in rest]
    assert "test ! -x /usr/local/cuda/bin/nvcc ||" in line
    assert {"MAMBA_FORCE_BUILD=TRUE", "CAUSAL_CONV1D_FORCE_BUILD=TRUE"} <= set(line.split())  # else a ready wheel


def test_the_cuda_base_is_one_and_of_the_cuda_of_torch():
    """Extensions are refused by a torch of another major version of CUDA."""
    texts = [path.read_text() for path in DOCKER.iterdir() if path.is_file()]
    (base,) = {name for text in texts for name in re.findall(r"nvidia/cuda:[\w.-]+", text)}
    assert base.endswith("-devel-ubuntu24.04")  # with nvcc, and a python3 that is new enough
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA")
    assert base.split(":")[1].split(".")[0] == torch.version.cuda.split(".")[0]


def test_the_user_is_not_root_at_the_end_of_a_stage_that_runs():
    for name in ("runtime", "test"):
        users = [rest for word, rest in stages()[name] if word == "USER"]
        assert users[-1] not in ("root", "0")


def test_layers_that_rarely_change_come_first_and_keep_no_caches():
    """Packages are installed where nothing but their locks has been copied; code is copied on top of them."""
    words = [(word, rest) for word, rest in stages()["environment"] if word in ("COPY", "RUN")]
    assert words[0] == ("COPY", "requirements.lock docker/requirements-cuda.lock ./")
    assert {word for word, _ in words[1:]} == {"RUN"}
    copies = [rest for word, rest in stages()["runtime"] if word == "COPY"]
    assert copies[0].startswith("--from=environment ")
    assert {"conf conf", "lyapft lyapft"} <= set(copies[1:])
    assert "PIP_NO_CACHE_DIR=1" in dict(stages()["environment"])["ENV"]
    for _, rest in instructions():
        assert "apt-get install" not in rest or "rm -rf /var/lib/apt/lists/*" in rest


def test_kernels_for_cuda_are_in_no_other_image():
    for name in ("requirements.lock", "requirements-dev.lock"):
        assert not re.search(r"^(mamba|causal)[-_](ssm|conv1d)", (ROOT / name).read_text(), re.MULTILINE)
    assert not any("requirements-kernels.lock" in rest for word, rest in instructions() if word == "RUN")


def test_nothing_secret_is_an_argument_or_a_variable():
    for word, rest in instructions():
        if word in ("ARG", "ENV"):
            assert not re.search(r"token|secret|passw|api_?key|credential|://", rest, re.IGNORECASE), rest
        if "pip install" in rest and "--no-index" not in rest:
            assert "--mount=type=secret,id=pip" in rest


def test_the_health_check_is_the_doctor():
    (check,) = [rest for word, rest in stages()["runtime"] if word == "HEALTHCHECK"]
    assert check.endswith('CMD ["python", "-m", "lyapft.doctor"]')


def test_the_image_has_what_the_package_needs_and_the_context_nothing_else():
    allowed = {x[1:] for x in (ROOT / ".dockerignore").read_text().splitlines() if x.startswith("!")}
    copied = set()
    for word, rest in stages()["runtime"] + stages()["environment"] + stages()["test"]:
        if word == "COPY" and "--from" not in rest:
            copied |= set(shlex.split(rest)[:-1])
    assert {"pyproject.toml", "README.md", "LICENSE", "train.py", "evaluate.py", "conf", "lyapft"} <= copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in allowed, source
    assert {x.split("/")[0] for x in copied} == allowed


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_are_sound(script):
    assert subprocess.run(["shellcheck", script], capture_output=True, text=True).stdout == ""


@pytest.mark.parametrize("name", ["Dockerfile", "compose.yaml", "kubernetes.yaml", "slurm.sh"])
def test_a_file_says_what_of_it_was_never_run(name):
    comments = [line for line in (DOCKER / name).read_text().splitlines() if line.startswith("#")]
    assert re.search(r"\bnever\b", "\n".join(comments), re.IGNORECASE)


def test_everybody_leaves_a_cell_two_minutes_to_stop():
    """For the step that it is in, and the checkpoint behind it."""
    script = (DOCKER / "slurm.sh").read_text()
    assert "#SBATCH --requeue\n" in script
    assert "#SBATCH --signal=TERM@120\n" in script
    launcher = yaml.safe_load((ROOT / "conf" / "hydra" / "launcher" / "submitit_slurm.yaml").read_text())
    assert launcher["signal_delay_s"] == 120
    (job,) = (one for one in yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text()) if one["kind"] == "Job")
    assert job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 120
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    assert {service["stop_grace_period"] for service in compose["services"].values()} == {"2m"}


def test_compose_and_kubernetes_files_are_well_formed():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    assert compose.keys() == {"services"}
    for service in compose["services"].values():
        assert service.keys() <= SERVICE, service.keys() - SERVICE
        assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).resolve().is_file()
        assert all("=" not in variable for variable in service["environment"])  # from the caller's shell
    volume, job = yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    assert (volume["kind"], job["kind"]) == ("PersistentVolumeClaim", "Job")
    assert pod["securityContext"]["runAsNonRoot"] is True
    mounts = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    assert mounts == {v["name"] for v in pod["volumes"]}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == volume["metadata"]["name"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    (container,) = pod["containers"]
    secret = {entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in container["env"] if "valueFrom" in entry}
    assert secret.keys() == {"WANDB_API_KEY", "HF_TOKEN"}
    assert all(reference["optional"] for reference in secret.values())
    assert pod["restartPolicy"] == "Never"  # else the API server refuses the policy
    assert job["spec"]["completionMode"] == "Indexed"  # and backoffLimitPerIndex
    (rule,) = (rule for rule in job["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in rule)
    assert rule["action"] == "FailIndex"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [study.BROKE_DOWN]}
    assert job["spec"]["backoffLimitPerIndex"] > 0
    python, script, *overrides = container["command"]
    assert (python, script) == ("python", "train.py")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config.register()
        assert compose_config("train", overrides, return_hydra_config=True).hydra.mode == RunMode.MULTIRUN
