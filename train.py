"""Fine-tune one cell, or a matrix of cells with -m; then show the table and write the report. `--help` teaches."""

import sys

import hydra
from omegaconf import DictConfig

from lyapft import config, study

config.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """Run one cell."""
    from lyapft import cell  # here, so that --help and shell completion need no torch

    cell.run(cfg)


if __name__ == "__main__":
    sys.exit(study.closing(main, "train"))
