"""The choices of a group that need more fields than it has: a subclass each."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from lyapft.config.groups import DataConfig, PeftConfig, ProbeConfig, TaskConfig


@dataclass
class SkillsData(DataConfig):
    """Procedural episodes: short rules on letters, with exact answers."""

    _target_: str = "lyapft.data.Skills"
    rules: list[str] = field(default_factory=lambda: ["rotate", "previous", "flip", "title"])
    rows: int = 3072  # episodes, before they repeat
    shots: list[int] = field(
        default_factory=lambda: [6]
    )  # solved lines before the last, one of these numbers per episode
    named_fraction: float = 0.0  # share of the episodes that name their rule
    data_seed: int = 0  # draws the episodes; the cell's seed orders them


@dataclass
class MixtureData(DataConfig):
    """What the shipped checkpoints were trained on, in a fixed order."""

    _target_: str = "lyapft.data.Mixture"
    rows: int = 72000  # examples; steps x batch size of them are one pass
    rules: list[str] = field(default_factory=lambda: ["copy", "reverse", "next", "upper"])
    shots: list[int] = field(default_factory=lambda: [6])
    text_fraction: float = 0.05  # running text of the interpreter's documentation
    pairs_fraction: float = 0.02  # questions and answers about the standard library
    inferred_first: float = 0.7  # first half: share of the episodes whose rule has to be inferred
    inferred_second: float = 0.9
    data_seed: int = 0


@dataclass
class PydocData(DataConfig):
    """The running interpreter's own documentation."""

    _target_: str = "lyapft.data.Pydoc"
    kind: str = "pairs"  # pairs | text


@dataclass
class TableData(DataConfig):
    """Rows of a local file, or of a data set by its name."""

    split: str = "train"  # of a data set by name
    shuffle_buffer: int = 4096  # streaming: examples that are held and shuffled at once
    workers: int = 0  # streaming: processes that read and tokenise ahead


@dataclass
class SkillsTask(TaskConfig):
    """Which rule do the lines follow? Rules that the cell trains, and rules that the base knows."""

    _target_: str = "lyapft.tasks.SkillsTask"
    new_rules: list[str] = field(default_factory=lambda: ["rotate", "previous", "flip", "title"])
    old_rules: list[str] = field(default_factory=lambda: ["copy", "reverse", "next", "upper"])
    items: int = 200  # queries per rule set
    named: bool = False  # write the rule's name in each line instead of leaving it to be inferred
    task_seed: int = 0  # draws the queries


@dataclass
class MmluTask(TaskConfig):
    """Four lettered choices per question."""

    _target_: str = "lyapft.tasks.Mmlu"
    subjects: list[str] | None = None  # null = all that are there


@dataclass
class ArcTask(TaskConfig):
    """Science questions of school exams."""

    _target_: str = "lyapft.tasks.Arc"
    subset: str = "ARC-Easy"  # ARC-Easy | ARC-Challenge, where the set is loaded by name


@dataclass
class SuiteTask(TaskConfig):
    """Several tasks, scored after one training."""

    _target_: str = "lyapft.tasks.Suite"
    _convert_: str = "partial"  # its tasks as they are: Hydra would make settings of these dataclasses again
    tasks: dict[str, Any] = field(default_factory=dict)  # task settings by name
    names: list[str] | None = None  # which of them; null = all


@dataclass
class AdapterPeft(PeftConfig):
    """Adapters of peft: which layers they go on."""

    targets: Any = "auto"  # auto | sll | all | memory_buffer | usual | a list of module names | a regular expression
    min_coverage: float = 1.0  # least share of the layers of a name that has to be adapted, of names that are at all
    memory_buffer: str = "tied"  # tied | untied, for targets=memory_buffer


@dataclass
class LoraPeft(AdapterPeft):
    """Low-rank adapters."""

    _target_: str = "lyapft.peft.Lora"
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rank_stabilized: bool = False  # scale by alpha / sqrt(r) instead of alpha / r
    dora: bool = False  # train magnitudes apart from directions
    init: str = "zero"  # zero | pissa
    lr_ratio: float = 1.0  # rate of B over that of A
    lr_ratio_embedding: float = 1.0  # rate of an embedding's adapter over that of A


@dataclass
class AdaLoraPeft(AdapterPeft):
    """Low-rank adapters whose ranks move to where they matter."""

    _target_: str = "lyapft.peft.AdaLora"
    init_r: int = 12  # ranks a layer at first
    target_r: int = 8  # on average, at the end
    alpha: float = 16.0
    dropout: float = 0.0
    warmup: float = 0.1  # share of the steps before the budget shrinks
    final: float = 0.3  # share of the steps after it has
    every: int = 1  # steps between two allocations
    orthogonality: float = 0.5  # weight of the penalty on factors that are not orthonormal
    steps: int = MISSING  # of the training


@dataclass
class VeraPeft(AdapterPeft):
    """Trained vectors around frozen random factors."""

    _target_: str = "lyapft.peft.Vera"
    r: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    projection_seed: int = 0  # draws the frozen factors


@dataclass
class Ia3Peft(AdapterPeft):
    """One factor per activation."""

    _target_: str = "lyapft.peft.Ia3"


@dataclass
class BitFitPeft(PeftConfig):
    """The biases alone."""

    _target_: str = "lyapft.peft.BitFit"


@dataclass
class StatePeft(PeftConfig):
    """A state of the recurrence that is learnt."""

    _target_: str = "lyapft.peft.StateTuning"
    state: str = MISSING  # initial_state | state_offset


@dataclass
class SdtPeft(PeftConfig):
    """Selected channels and states of the recurrence."""

    _target_: str = "lyapft.peft.SelectiveDimensionTuning"
    channels: float = 0.1  # share of the channels (Mamba-2: heads) of each layer
    states: float = 0.25  # share of the states
    warmup_steps: int = 10  # after which the dimensions that changed most are selected
    warmup_learning_rate: float = 1e-3


@dataclass
class FullPeft(PeftConfig):
    """Every weight trains."""

    _target_: str = "lyapft.peft.FullFineTuning"


@dataclass
class LyapunovProbe(ProbeConfig):
    """λ_max, norm bound and margin of every recurrent layer, each step."""

    _target_: str = "lyapft.probes.LyapunovProbe"
    every: int = 1  # steps
    per_layer: bool = True  # a column per layer in the step series, besides the model's


@dataclass
class ShadowProbe(ProbeConfig):
    """The cell's number format against float32, on the same batch and weights."""

    _target_: str = "lyapft.probes.ShadowProbe"
    every: int = 20  # steps


@dataclass
class ResourceProbe(ProbeConfig):
    """Memory and processors."""

    _target_: str = "lyapft.probes.ResourceProbe"
    every: int = 1  # steps


@dataclass
class AlertProbe(ProbeConfig):
    """Numbers that somebody wants to be told of."""

    _target_: str = "lyapft.probes.AlertProbe"
    rules: dict[str, Any] = field(default_factory=dict)  # by name, each as RuleConfig


@dataclass
class ExperimentConfig:
    """An experiment, instead of scoring a run."""

    _target_: str = MISSING


@dataclass
class TheoremExperiment(ExperimentConfig):
    """Random Mamba layers: do perturbations decay?"""

    layers: int = 500  # of each family
    tokens: int = 4096
    sizes: list[float] = field(default_factory=lambda: [10.0**k for k in range(-8, 0)])  # ε
    seed: int = 0


@dataclass
class StallExperiment(ExperimentConfig):
    """A state that stops, and what helps."""

    step: float = 1e-3  # Δ, with A = −1
    starts: list[float] = field(default_factory=lambda: [0.0, 2.0])  # initial states
    tokens: int = 10000
    draws: int = 64  # of stochastic rounding
    sweep: list[float] = field(default_factory=lambda: [1e-4, 1e-3, 1e-2, 1e-1])  # Δ of the second figure
    seed: int = 0


@dataclass
class ModelsExperiment(ExperimentConfig):
    """Models beside each other on the same texts."""

    models: list[str] = MISSING  # names in conf/model/, or folders runs/STUDY/CELL
    prompts: int = 8  # texts: intervals are over them
    tokens: int = 48  # of a prompt
    seeds: int = 2  # draws per prompt


@dataclass
class GrowthExperiment(ModelsExperiment):
    """A change of one token's embedding, over later tokens."""

    token: int = 8  # whose embedding is changed
    epsilon: float = 1e-3  # length of the change


@dataclass
class DepthExperiment(ModelsExperiment):
    """Directions of the residual stream, from block to block."""

    directions: int = 4


@dataclass
class ClosedLoopExperiment(ModelsExperiment):
    """Greedy decoding after a change of the prompt."""

    new_tokens: int = 48
    sizes: list[float] = field(default_factory=lambda: [1e-4, 1e-3, 1e-2, 1e-1, 1.0])  # ε


@dataclass
class CertificateExperiment(ExperimentConfig):
    """Promised rounding of the recurrent state against the measured one."""

    models: list[str] = MISSING  # folders runs/STUDY/CELL, in their own format, or names in conf/model/
    prompts: int = 8  # texts: intervals are over them
    tokens: int = 96  # of a prompt
    entries: int = 256  # states of a layer, drawn at random
    precision: str = "bf16"  # of models by name
    seed: int = 0  # draws the entries
