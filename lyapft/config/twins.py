"""The cells that a cell is compared with: its full-precision counterparts, and its reruns."""

from omegaconf import DictConfig, OmegaConf

from lyapft.config.store import load_choice


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
