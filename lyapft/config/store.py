"""The schemas in Hydra's ConfigStore, and single choices of `conf/` read by name."""

import math
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from lyapft.config.choices import (
    AdaLoraPeft,
    AlertProbe,
    ArcTask,
    BitFitPeft,
    CertificateExperiment,
    ClosedLoopExperiment,
    DepthExperiment,
    FullPeft,
    GrowthExperiment,
    Ia3Peft,
    LoraPeft,
    LyapunovProbe,
    MixtureData,
    MmluTask,
    PydocData,
    ResourceProbe,
    SdtPeft,
    ShadowProbe,
    SkillsData,
    SkillsTask,
    StallExperiment,
    StatePeft,
    SuiteTask,
    TableData,
    TheoremExperiment,
    VeraPeft,
)
from lyapft.config.groups import (
    CellConfig,
    DataConfig,
    EvaluateConfig,
    GuardConfig,
    KernelConfig,
    LoggerConfig,
    ModelConfig,
    PrecisionConfig,
    StudyConfig,
    TaskConfig,
    TrainerConfig,
    WandbLoggerConfig,
)
from lyapft.errors import InputError

SCHEMAS: dict[str, dict[str, type]] = {
    "model": {"model": ModelConfig},
    "data": {"data": DataConfig, "skills": SkillsData, "mixture": MixtureData, "pydoc": PydocData, "table": TableData},
    "task": {"task": TaskConfig, "skills": SkillsTask, "mmlu": MmluTask, "arc": ArcTask, "suite": SuiteTask},
    "peft": {
        "none": FullPeft,
        "lora": LoraPeft,
        "adalora": AdaLoraPeft,
        "vera": VeraPeft,
        "ia3": Ia3Peft,
        "bitfit": BitFitPeft,
        "state": StatePeft,
        "sdt": SdtPeft,
    },
    "precision": {"precision": PrecisionConfig},
    "probe": {"lyapunov": LyapunovProbe, "shadow": ShadowProbe, "resources": ResourceProbe, "alerts": AlertProbe},
    "guard": {"guard": GuardConfig},
    "kernel": {"kernel": KernelConfig},
    "trainer": {"trainer": TrainerConfig},
    "logger": {"logger": LoggerConfig, "wandb": WandbLoggerConfig},
    "study": {"study": StudyConfig},
    "experiment": {
        "theorem": TheoremExperiment,
        "stall": StallExperiment,
        "growth": GrowthExperiment,
        "depth": DepthExperiment,
        "closed_loop": ClosedLoopExperiment,
        "certificate": CertificateExperiment,
    },
}
CONF_DIR = Path(__file__).resolve().parent.parent.parent / "conf"


def register() -> None:
    """Put every schema in Hydra's ConfigStore and `${mul:a,b}` among OmegaConf's resolvers; call before composing."""
    OmegaConf.register_new_resolver("mul", lambda *factors: math.prod(factors), replace=True)
    store = ConfigStore.instance()
    store.store(name="root", group="schema", node=CellConfig, package="_global_")
    store.store(name="evaluate", group="schema", node=EvaluateConfig, package="_global_")
    for group, choices in SCHEMAS.items():
        for name, node in choices.items():
            store.store(name=name, group=f"schema/{group}", node=node)
    _prefer_own_launchers(store)


def _prefer_own_launchers(store: ConfigStore) -> None:
    """Drop what launcher packages store under the names of the presets in `conf/`.

    Hydra warns, and will refuse, where a file and a stored config of one name meet.
    """
    Plugins.instance()  # has every package store its own
    stored = store.repo.get("hydra", {}).get("launcher", {})
    for preset in (CONF_DIR / "hydra" / "launcher").glob("*.yaml"):
        stored.pop(preset.name, None)


def load_choice(group: str, choice: str) -> DictConfig:
    """One choice of a group by itself, typed, as `group=choice` would compose it.

    Raises:
        InputError: no such choice.
    """
    path = CONF_DIR / group / f"{choice}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in (CONF_DIR / group).glob("*.yaml"))
        raise InputError(f"{group}={choice} is not a choice of conf/{group}/: use one of {', '.join(known)}")
    values = OmegaConf.load(path)
    if not isinstance(values, DictConfig):
        raise InputError(f"{path} must hold a mapping of settings")
    defaults = values.pop("defaults", [])
    schema = next(str(v) for entry in defaults if isinstance(entry, DictConfig) for v in entry.values())
    node = OmegaConf.structured(SCHEMAS[group][schema])
    return OmegaConf.merge(node, values)  # type: ignore[return-value]
