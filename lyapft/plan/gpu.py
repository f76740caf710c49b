"""A model of a cell's time on a GPU: operations over what the card does in a second. Nothing here was measured on one.

Peak rates are the maker's, without sparsity; the share of them that training reaches is an assumption to be set.
"""

from dataclasses import dataclass

from omegaconf import DictConfig

from lyapft.plan.sizes import Sizes
from lyapft.precision.strategy import MIXED, TRUE_HALF

CHARACTERS_PER_TOKEN = 4.0  # English under a byte-pair tokenizer of 50,000 words: a rule of thumb


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        half, tf32, single: peak operations per second with operands in bf16 or fp16, in tf32, in float32.
        utilisation: share of the peak that a step reaches, optimizer and loading included.
        memory: bytes.
    """

    half: float = 312e12  # NVIDIA A100 80 GB, data sheet of 2021
    tf32: float = 156e12
    single: float = 19.5e12
    utilisation: float = 0.3  # PaLM reports 0.46, GPT-3 0.21 (Chowdhery et al. 2022, table 3)
    memory: int = 80 * 10**9

    def rate(self, precision: str) -> float:
        """Operations per second that a cell of this precision is taken to do."""
        half = precision in MIXED or precision in TRUE_HALF
        return self.utilisation * (self.half if half else self.tf32 if precision == "tf32" else self.single)


@dataclass(frozen=True)
class Published:
    """Size of a published task: items that are scored, rows per item that need a pass of their own (choices that are
    one letter share one), and characters of a row: with no example before it, and of each example.

    Characters are means over the sets themselves, as lyapft writes them (12 subjects of MMLU; the validation sets of
    WinoGrande, PIQA and ARC-Easy); ARC-Challenge is taken as ARC-Easy, HellaSwag as its authors' context and endings
    of about 75 words.
    """

    items: int
    rows: float
    characters: float
    shot: float

    def tokens(self, shots: int) -> float:
        """Tokens of all rows."""
        return self.items * self.rows * (self.characters + shots * self.shot) / CHARACTERS_PER_TOKEN


TASKS = {
    "mmlu": Published(14042, 1.0, 352.0, 329.0),
    "winogrande": Published(1267, 2.0, 106.0, 85.0),
    "hellaswag": Published(10042, 4.0, 400.0, 400.0),
    "piqa": Published(1838, 2.0, 153.0, 144.0),
    "arc_easy": Published(2376, 4.0, 155.0, 136.0),
    "arc_challenge": Published(1172, 4.0, 155.0, 136.0),
}


def seconds(cfg: DictConfig, sizes: Sizes, card: Card) -> float | None:
    """Predicted wall time of a cell; None where a task's size is not published here.

    Training counts every row at its greatest length, data.max_length: rows are padded to the longest of their batch
    only, so this is the most it can be.
    """
    scored = scored_tokens(cfg.task)
    if scored is None:
        return None
    trained = cfg.trainer.steps * cfg.trainer.accumulate * tokens_in_flight(cfg)
    operations = trained * sizes.training_operations(cfg.data.max_length)
    operations += scored * sizes.scoring_operations(cfg.data.max_length)
    return operations / card.rate(cfg.precision.name)


def tokens_in_flight(cfg: DictConfig) -> int:
    """Tokens of a full micro-batch, or of a forward pass where nothing is trained."""
    return int(cfg.trainer.batch_size * cfg.data.max_length if cfg.trainer.steps else cfg.task.batch_tokens)


def scored_tokens(task: DictConfig) -> float | None:
    """Tokens that scoring a published task, or a suite of them, reads."""
    parts = task.get("tasks")
    names = [task.name] if not parts else list(task.names or parts)
    if any(name not in TASKS for name in names) or task.limit is not None:
        return None
    return sum(TASKS[name].tokens(shots) for name in names for shots in task.shots)
