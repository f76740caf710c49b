"""One dataclass per group of `conf/`, and the two configs that are made of them: a cell's and an evaluation's."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


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
    streaming: bool = False  # read the rows as the training needs them, whatever the size of the data: of tables only


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
    strategy: str = (
        "ddp"  # ddp | fsdp | tensor: over several processes, copies of the weights, or parts; see conf/trainer
    )
    tensor_parallel_size: int = 1  # strategy=tensor: processes that compute each layer together
    # auto | halve | stop: where memory runs out, go on with half the rows at once, recorded; auto: with one process
    oom: str = "auto"
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
    nonfinite: bool = True
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
    trust_remote_code: bool = False  # of a run whose model brought code of its own
    threads: int | None = None
    device: str = "auto"
    progress: bool = True
