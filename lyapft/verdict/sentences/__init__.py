"""The verdict in plain sentences: each number with its n, nothing said that the tables do not show."""

from lyapft.verdict.sentences.advice import recommendations
from lyapft.verdict.sentences.failures import failures
from lyapft.verdict.sentences.models import architectures, base_and_tuned, learning, settings_asked
from lyapft.verdict.sentences.state import beyond_training, guessing, missing, noise, repeated

__all__ = [
    "architectures",
    "base_and_tuned",
    "beyond_training",
    "failures",
    "guessing",
    "learning",
    "missing",
    "noise",
    "recommendations",
    "repeated",
    "settings_asked",
]
