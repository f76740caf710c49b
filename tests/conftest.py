"""What every test starts from: no network, no account, one thread, its own caches, its own random numbers.

The environment is set before anything imports a library that reads it; commands that tests start inherit it.
"""

import gc
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

_CACHES = tempfile.TemporaryDirectory(prefix="lyapft-tests-")
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": f"{_CACHES.name}/huggingface",
        "HYDRA_FULL_ERROR": "0",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_DIR": _CACHES.name,
        "WANDB_CACHE_DIR": f"{_CACHES.name}/wandb-cache",
        "WANDB_CONFIG_DIR": f"{_CACHES.name}/wandb-config",
        "WANDB_DATA_DIR": f"{_CACHES.name}/wandb-data",
    }
)
os.environ.pop("WANDB_API_KEY", None)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from tests.tiny import byte_tokenizer  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
# programs: importing them puts stand-ins in place of CUDA extensions, or instruments lyapft for a fuzzer
collect_ignore = ["mamba_ssm_measured.py", "campaigns/guided.py"]

# The same examples on every machine and no time limit on a shared core: a failure is the code's.
settings.register_profile(
    "lyapft",
    derandomize=True,
    deadline=None,
    max_examples=25,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("lyapft")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Seeds, threads, default dtype, switches, Hydra's config: as in a fresh process, whatever the test before did."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)
    HydraConfig.instance().cfg = None
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets in their published formats: LYAPFT_SHARED_DATA, else ../shared/data; skips without one."""
    folder = Path(os.environ.get("LYAPFT_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no folder of real data sets: set LYAPFT_SHARED_DATA to run this at size")
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level one, without a token that begins a text."""
    return byte_tokenizer()


def pytest_collection_finish() -> None:
    """Leave what the imports made out of later garbage collections: every cell collects before it measures memory."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Give it back, so that bindings find no leak at the end."""
    gc.unfreeze()
