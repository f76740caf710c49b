"""Typed schema of a cell, cross-field validation and cell identity.

Nothing here imports torch: `train.py --help` and shell completion stay quick. One dataclass per group of `conf/`; a
choice that needs more fields than its group has a subclass. Every class is stored in Hydra's ConfigStore under
`schema/<group>/<name>`, and the YAML files of `conf/` extend it, so a misspelt key or a wrong type is refused before
anything runs.
"""

from lyapft.config.choices import AdaLoraPeft, AdapterPeft, LoraPeft, SdtPeft, VeraPeft
from lyapft.config.groups import (
    CellConfig,
    KernelConfig,
    ModelConfig,
    PeftConfig,
    PrecisionConfig,
    StudyConfig,
    TrainerConfig,
)
from lyapft.config.identities import identity, learning_rate, paths_of, science, settled, without_paths
from lyapft.config.store import CONF_DIR, SCHEMAS, load_choice, register
from lyapft.config.twins import noise_floor_configs, reference_configs
from lyapft.config.validation import FOLDER_PARTS, faults, name_faults

__all__ = [
    "CONF_DIR",
    "FOLDER_PARTS",
    "SCHEMAS",
    "AdaLoraPeft",
    "AdapterPeft",
    "CellConfig",
    "KernelConfig",
    "LoraPeft",
    "ModelConfig",
    "PeftConfig",
    "PrecisionConfig",
    "SdtPeft",
    "StudyConfig",
    "TrainerConfig",
    "VeraPeft",
    "faults",
    "identity",
    "learning_rate",
    "load_choice",
    "name_faults",
    "noise_floor_configs",
    "paths_of",
    "reference_configs",
    "register",
    "science",
    "settled",
    "without_paths",
]
