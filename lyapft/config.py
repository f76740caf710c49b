"""Typed schema of a cell, cross-field validation and cell identity.

Nothing here imports torch: `train.py --help` and shell completion stay quick. One dataclass per group of `conf/`; a
choice that needs more fields than its group has a subclass. Every class is stored in Hydra's ConfigStore under
`schema/<group>/<name>`, and the YAML files of `conf/` extend it, so a misspelt key or a wrong type is refused before
anything runs.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lyapft import secrets, watch
from lyapft.errors import InputError


@dataclass
class ModelConfig:
    """A backbone: where its weights and tokenizer come from, and the learning rates tuned for it."""

    name: str = MISSING
    path: str | None = None  # a folder or a hub name; null = the checkpoint shipped with lyapft
    tokenizer: str | None = None  # a folder or a hub name; null = the one beside the weights
    init: str = "pretrained"  # pretrained | scratch (random weights from `dims`)
    dims: dict[str, Any] = field(default_factory=dict)  # transformers config fields, for init=scratch
    learning_rate: dict[str, float] = field(default_factory=dict)  # by peft name: tuned per (architecture, peft)
    pretrain_steps: int = 3000  # study=pretrain: how long this architecture needs
    pretrain_seed: int = 0  # study=pretrain: the seed that the shipped checkpoint was made with
    trust_remote_code: bool = False


@dataclass
class DataConfig:
    """Fine-tuning examples: a source and how it is cut into sequences."""

    _target_: str = MISSING
    name: str = MISSING
    path: str | None = None  # a local file or folder, or a data set name on the hub
    max_length: int = 64  # tokens per sequence
    max_bad_fraction: float = 0.01  # rows with null or non-string fields beyond this share stop the run
    limit: int | None = None  # use the first N rows only
    packing: bool = False  # several examples to a row of max_length tokens, kept apart; a row of a batch is a pack


@dataclass
class TaskConfig:
    """What a cell is scored on: few-shot multiple choice."""

    _target_: str = MISSING
    name: str = MISSING
    path: str | None = None
    shots: list[int] = field(default_factory=lambda: [0, 1, 3, 5])
    limit: int | None = None  # items of each subset (subject, rule set); null = all
    batch_tokens: int = 8192  # padded tokens in one forward pass
    max_bad_fraction: float = 0.01  # rows that cannot be scored (null fields, no blank) beyond this share stop the run
    truncate: bool = (
        False  # cut the left of contexts that do not fit the model's positions, as lm-eval does, not refuse
    )


@dataclass
class PeftConfig:
    """Which parameters train."""

    _target_: str = MISSING
    name: str = MISSING


@dataclass
class PrecisionConfig:
    """Formats of operands, accumulation and storage."""

    name: str = MISSING
    emulate: str = "auto"  # auto | never | always: half matmuls on a CPU without half arithmetic
    init_scale: float = 65536.0  # fp16: first loss scale
    growth_interval: int = 200  # fp16: steps without overflow before the scale doubles


@dataclass
class ProbeConfig:
    """A callback that only observes."""

    _target_: str = MISSING


@dataclass
class TrainerConfig:
    """Optimisation: AdamW, a warm-up and a schedule; one step is one optimizer update."""

    steps: int = 120  # 0: the base as it is, scored in the cell's format
    validation_rows: int = 0  # the last rows of the data, kept from training; the loss on them is recorded
    batch_size: int = 24
    accumulate: int = 1  # micro-batches per step, each of batch_size rows; the step's loss is the mean of theirs
    learning_rate: float | None = None  # null = model.learning_rate of this peft; a number is a shared-rate variant
    schedule: str = "cosine"  # constant | linear | cosine | hold_then_decay
    warmup: float = 0.05  # share of the steps
    hold: float = 0.6  # hold_then_decay: share of the steps at the full rate
    final_lr: float = 0.1  # share of the learning rate at the last step
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    grad_clip: float = 1.0  # largest gradient norm
    max_nonfinite: int = 10  # steps in a row without a finite gradient before the cell ends; fp16: see the loss scale
    strategy: str = "ddp"  # ddp | fsdp: over several processes, copies of the weights or a part of each for each
    oom: str = "stop"  # stop | halve: where memory runs out, go on with half the rows at once; recorded
    progress: bool = True
    record_every_s: float = 30.0  # how often the step series is written while training
    checkpoint_every_s: float = 60.0  # how often a training that may be killed writes what it continues from


@dataclass
class LoggerConfig:
    """Where live numbers go besides the record."""

    name: str = MISSING


@dataclass
class WandbLoggerConfig(LoggerConfig):
    """A run on the Weights & Biases dashboard, or offline below the cell's folder."""

    project: str = "lyapft"
    entity: str | None = None  # user or team
    mode: str | None = None  # online | offline | disabled; null = WANDB_MODE, else by whether there is a login


@dataclass
class StudyConfig:
    """The folder that a matrix, its references and its reruns share."""

    name: str = "default"
    noise_floor: list[str] = field(default_factory=list)  # reruns of cells: replicate (the same again), threads
    noise_floor_seeds: list[int] = field(default_factory=lambda: [0])  # the cells with these seeds run again


@dataclass
class KernelConfig:
    """Which implementation runs the recurrence."""

    name: str = MISSING
    require: str | None = None  # forbid any other than this one
    fused: bool = True  # mamba_ssm, stock: convolution, scan and output projection by one kernel where it can


@dataclass
class RuleConfig:
    """One number and where it must not go: at least one of below, above, sigma and fall."""

    metric: str = MISSING
    below: float | None = None
    above: float | None = None
    sigma: float | None = None  # standard deviations above the mean of the last `window` steps
    fall: float | None = None  # factor below the largest of the last `window` steps
    window: int = 128


@dataclass
class GuardConfig:
    """What a training does where a number breaks a rule; part of the cell's identity."""

    _target_: str | None = None
    name: str = MISSING
    action: str | None = None  # skip | rollback | stop
    rules: dict[str, Any] = field(default_factory=dict)  # by name, each as RuleConfig
    skip_steps: int = 0
    every: int = 10
    limit: int = 10


@dataclass
class CellConfig:
    """One cell, fully resolved."""

    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    task: TaskConfig = MISSING
    peft: PeftConfig = MISSING
    precision: PrecisionConfig = MISSING
    probe: dict[str, ProbeConfig] = field(default_factory=dict)
    trainer: TrainerConfig = MISSING
    logger: LoggerConfig = MISSING
    study: StudyConfig = MISSING
    kernel: KernelConfig = MISSING
    guard: GuardConfig = MISSING
    seed: int = 0  # order of the data, dropout, adapter initialisation
    replicate: int = 0  # the same cell again, for the noise floor
    threads: int | None = None  # CPU threads; null = every core that this process may use
    device: str = "auto"  # auto | cpu | cuda
    reference: str = "auto"  # auto: find or make the full-precision counterparts; off
    runs: str = "runs"  # folder of all studies
    rates: str | None = None  # learning_rates.yaml of a study=lr: its rates, where it has them, before model's own


@dataclass
class EvaluateConfig:
    """A finished run to score again."""

    run: str = MISSING  # runs/STUDY/CELL
    task: TaskConfig | None = None  # null = the tasks of the run
    experiment: Any = None  # instead of scoring a run
    threads: int | None = None
    device: str = "auto"
    progress: bool = True


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

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"
NOT_SCIENCE = (
    "runs",
    "rates",
    "study",
    "logger",
    "probe",
    "reference",
    "device",
    "threads",
)  # cannot change a number by themselves
NOT_SCIENCE_TRAINER = ("progress", "record_every_s", "checkpoint_every_s")
GUARD_ACTIONS = ("skip", "rollback", "stop")
NOISE_FLOORS = ("replicate", "threads")
PATHS = ("path", "tokenizer")  # known by content instead
FOLDER_PARTS = (
    "study.name",
    *(f"{group}.name" for group in ("model", "data", "peft", "precision")),
)  # of a run's folder
FOLDER_PART = re.compile(r"[\w][\w.+-]*")


def register() -> None:
    """Put every schema in Hydra's ConfigStore and `${mul:a,b}` among OmegaConf's resolvers; call before composing."""
    OmegaConf.register_new_resolver("mul", lambda *factors: math.prod(factors), replace=True)
    store = ConfigStore.instance()
    store.store(name="root", group="schema", node=CellConfig, package="_global_")
    store.store(name="evaluate", group="schema", node=EvaluateConfig, package="_global_")
    for group, choices in SCHEMAS.items():
        for name, node in choices.items():
            store.store(name=name, group=f"schema/{group}", node=node)


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


def learning_rate(cfg: DictConfig) -> float:
    """The rate that this cell trains with: its own if set, else the one tuned for its (architecture, peft)."""
    if cfg.trainer.learning_rate is not None:
        return float(cfg.trainer.learning_rate)
    return float(cfg.model.learning_rate[cfg.peft.name])


def faults(cfg: DictConfig) -> list[str]:
    """Everything that is wrong with a cell's own values; what needs files or devices is checked by their owners."""
    found = []
    positive = {
        "trainer.batch_size": cfg.trainer.batch_size,
        "trainer.accumulate": cfg.trainer.accumulate,
        "trainer.max_nonfinite": cfg.trainer.max_nonfinite,
        "trainer.grad_clip": cfg.trainer.grad_clip,
        "data.max_length": cfg.data.max_length,
        "task.batch_tokens": cfg.task.batch_tokens,
    }
    optional = {"data.limit": cfg.data.limit, "task.limit": cfg.task.limit, "threads": cfg.threads}
    optional["trainer.learning_rate"] = cfg.trainer.learning_rate
    positive.update({key: value for key, value in optional.items() if value is not None})
    found += [f"{key}={value} must be greater than 0" for key, value in positive.items() if value <= 0]
    counts = {"seed": cfg.seed, "replicate": cfg.replicate}
    counts |= {f"trainer.{key}": cfg.trainer[key] for key in ("steps", "validation_rows")}
    found += [f"{key}={value} must not be negative" for key, value in counts.items() if value < 0]
    found += [
        f"study.noise_floor: {kind!r} is unknown: use {' and '.join(NOISE_FLOORS)}"
        for kind in cfg.study.noise_floor
        if kind not in NOISE_FLOORS
    ]
    choices = {
        "trainer.schedule": (cfg.trainer.schedule, ("constant", "linear", "cosine", "hold_then_decay")),
        "reference": (cfg.reference, ("auto", "off")),
        "device": (cfg.device, ("auto", "cpu", "cuda")),
        "model.init": (cfg.model.init, ("pretrained", "scratch")),
        "trainer.strategy": (cfg.trainer.strategy, ("ddp", "fsdp")),
        "trainer.oom": (cfg.trainer.oom, ("stop", "halve")),
    }
    found += [
        f"{k}={v} is unknown: use one of {', '.join(known)}" for k, (v, known) in choices.items() if v not in known
    ]
    for key in ("warmup", "hold", "final_lr"):
        if not 0 <= cfg.trainer[key] <= 1:
            found.append(f"trainer.{key}={cfg.trainer[key]} must lie between 0 and 1")
    if len(cfg.trainer.betas) != 2 or not all(0 <= b < 1 for b in cfg.trainer.betas):
        found.append(f"trainer.betas={list(cfg.trainer.betas)} must be two numbers in [0, 1)")
    if not cfg.task.shots or any(s < 0 for s in cfg.task.shots) or len(set(cfg.task.shots)) != len(cfg.task.shots):
        found.append(
            f"task.shots={list(cfg.task.shots)} must be one or more different numbers, none negative: task.shots=[0,5]"
        )
    if cfg.trainer.learning_rate is None and cfg.peft.name not in cfg.model.learning_rate:
        known = ", ".join(cfg.model.learning_rate) or "none"
        found.append(
            f"model {cfg.model.name} has no learning rate for peft={cfg.peft.name} (it has: {known}): "
            f"set trainer.learning_rate=… or +model.learning_rate.{cfg.peft.name}=…"
        )
    wants_reference = cfg.reference == "auto" and cfg.trainer.learning_rate is None
    if wants_reference and "none" not in cfg.model.learning_rate:
        found.append(
            f"model {cfg.model.name} has no learning rate for its full fine-tuning reference: "
            "set +model.learning_rate.none=… or reference=off"
        )
    for name, probe in cfg.probe.items():
        if "every" in probe and probe.every < 1:
            found.append(f"probe.{name}.every={probe.every} must be 1 or more")
    found += _guard_faults(cfg)
    for key in FOLDER_PARTS:
        found += name_faults(key, [OmegaConf.select(cfg, key)])
    return found + secrets.faults(OmegaConf.to_container(cfg, resolve=True))


def name_faults(key: str, names: Iterable[Any]) -> list[str]:
    """Names that are no plain part of a folder's name: they would lead out of the folder that a run may write to."""
    return [
        f"{key}={name!r} must be a plain folder name: letters, digits and . _ + - after a letter, a digit or _"
        for name in names
        if not FOLDER_PART.fullmatch(str(name))
    ]


def _guard_faults(cfg: DictConfig) -> list[str]:
    """What is wrong with the guard, and with the rules of guard and alerts."""
    guard, found = cfg.guard, []
    ruled = {"guard": guard.rules} | {f"probe.{name}": p.rules for name, p in cfg.probe.items() if "rules" in p}
    for where, rules in ruled.items():
        for name, rule in rules.items():
            try:
                watch.Rule(str(name), **OmegaConf.merge(OmegaConf.structured(RuleConfig), rule))  # type: ignore[arg-type]
            except InputError as error:
                found.append(f"{where}.rules: {error}")
            except (OmegaConfBaseException, ValueError) as error:
                fields = ", ".join(RuleConfig.__dataclass_fields__)
                found.append(f"{where}.rules.{name}: {str(error).splitlines()[0]}; a rule has {fields}")
    if guard._target_ is None:
        return found
    if guard.action not in GUARD_ACTIONS:
        found.append(f"guard.action={guard.action} is unknown: use one of {', '.join(GUARD_ACTIONS)}")
    if not guard.rules:
        found.append(f"guard={guard.name} has no rules: it would never act")
    for name, rule in guard.rules.items():
        try:
            probe = watch.measured_by(str(rule.get("metric")))
        except InputError as error:
            found.append(f"guard.rules.{name}: {error}")
            continue
        if probe is not None and probe not in cfg.probe:
            found.append(f"guard.rules.{name} reads {rule.metric}, which probe={probe} measures: switch it on")
    late = [str(name) for name, rule in guard.rules.items() if rule.get("metric") not in ("loss", "grad_norm")]
    if guard.action == "skip" and late:
        found.append(
            f"guard.rules {', '.join(late)}: only loss and grad_norm are known before an update, which action=skip "
            "withholds: use action=rollback or stop"
        )
    if guard.action == "rollback" and OmegaConf.get_type(cfg.peft) is AdaLoraPeft:
        found.append("guard.action=rollback cannot restore what adalora remembers of each rank: use skip or stop")
    values = {"skip_steps": (guard.skip_steps, 0), "every": (guard.every, 1), "limit": (guard.limit, 0)}
    return found + [f"guard.{k}={v} must be at least {least}" for k, (v, least) in values.items() if v < least]


def science(cfg: DictConfig, fingerprints: dict[str, str], runs_as: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that can change numbers; inputs by content, never by path.

    Args:
        cfg: the resolved cell config.
        fingerprints: content hashes by input: `model`, `data`, `task`.
        runs_as: what the cell really runs with: threads, device, kernel, emulated half arithmetic or not.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    kept = {key: value for key, value in plain.items() if key not in NOT_SCIENCE}
    for key in NOT_SCIENCE_TRAINER:
        kept["trainer"].pop(key)
    if cfg.guard._target_ is None:
        kept.pop("guard")
    else:
        read = {watch.measured_by(rule["metric"]) for rule in kept["guard"]["rules"].values()}
        settings = {name: probe for name, probe in plain["probe"].items() if name in read}
        kept["guard"] |= {"probes": settings} if settings else {}  # they say at which steps it sees a number
    if not kept["trainer"]["validation_rows"]:
        kept["trainer"].pop("validation_rows")
    if kept["trainer"]["strategy"] == "ddp":
        kept["trainer"].pop("strategy")
    if kept["trainer"]["oom"] == "stop":  # can stop a cell, not change it
        kept["trainer"].pop("oom")
    kept["trainer"]["learning_rate"] = learning_rate(cfg)
    kept["kernel"].pop("require")  # it can stop a cell, not change it
    for key in ("learning_rate", "pretrain_steps", "pretrain_seed"):  # they act through the trainer and the seed
        kept["model"].pop(key)
    for group, content in fingerprints.items():
        kept[group] = without_paths(kept[group]) | {"content": content}
    return kept | {"runs_as": runs_as}


def settled(cfg: DictConfig) -> DictConfig:
    """The config that a cell of it runs: a pretrained model that is not trained is one cell whatever the seed."""
    if cfg.trainer.steps or cfg.model.init != "pretrained" or not cfg.seed:
        return cfg
    once = cfg.copy()
    once.seed = 0
    return once


def without_paths(node: dict[str, Any]) -> dict[str, Any]:
    """A group's settings without the paths in it, those of the tasks of a suite too."""
    kept = {key: value for key, value in node.items() if key not in PATHS}
    return {key: without_paths(value) if isinstance(value, dict) else value for key, value in kept.items()}


def paths_of(node: DictConfig) -> dict[str, Any]:
    """The paths in a group, of the tasks of a suite too: what the science part leaves out."""
    found = {key: node[key] for key in PATHS if key in node}
    parts = {key: paths_of(value) for key, value in node.items() if isinstance(value, DictConfig)}
    return found | {str(key): value for key, value in parts.items() if value}


def identity(science_part: dict[str, Any]) -> str:
    """Twelve hex digits that name a cell by its science part."""
    canonical = json.dumps(science_part, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def reference_configs(cfg: DictConfig) -> dict[str, DictConfig]:
    """The two full-precision counterparts of a cell (THEORY: divergence of a fine-tuning cell).

    `paper`: full precision, every weight trained. `precision_only`: full precision, the same peft. Same seed, data
    order and initial weights; each with the learning rate tuned for its own (architecture, peft) unless the cell sets
    a shared one.
    """
    counterparts = {}
    for role, peft in (("paper", load_choice("peft", "none")), ("precision_only", cfg.peft)):
        twin = cfg.copy()
        twin.peft = peft
        twin.precision = load_choice("precision", "fp32")
        twin.replicate = 0
        counterparts[role] = twin
    return counterparts


def noise_floor_configs(cfg: DictConfig, threads: int) -> dict[str, DictConfig]:
    """The reruns of a cell that `study.noise_floor` asks for (THEORY: noise floor), by kind.

    `replicate`: the same again. `threads`: on two threads where the cell had one, else on one.

    Args:
        threads: of the cell.
    """
    if cfg.replicate or cfg.seed not in cfg.study.noise_floor_seeds:
        return {}
    changes = {"replicate": {"replicate": 1}, "threads": {"threads": 2 if threads == 1 else 1}}
    twins = {kind: OmegaConf.merge(cfg, changes[kind] | {"reference": "off"}) for kind in cfg.study.noise_floor}
    return twins  # type: ignore[return-value]
