"""Killed anywhere, a training goes on from its last checkpoint and ends bitwise as if it had not been."""

from lyapft.resume.callback import Resume
from lyapft.resume.files import CheckpointFiles
from lyapft.resume.signals import Interrupted, Signals

__all__ = ["CheckpointFiles", "Interrupted", "Resume", "Signals"]
