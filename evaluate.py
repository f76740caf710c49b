"""Score a finished cell again, or on other tasks. `--help` teaches."""

import sys

import hydra
from omegaconf import DictConfig

from lyapft import config, study

config.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Evaluate one run, or run an experiment that needs none."""
    if cfg.experiment is not None:
        from lyapft.experiments import record

        record.run(cfg)
        return
    from lyapft import evaluation  # here, so that --help and shell completion need no torch

    evaluation.run(cfg)


if __name__ == "__main__":
    sys.exit(study.closing(main, "evaluate"))
