"""Stability of linear recurrences from their one-step state Jacobians. Nothing here knows a model or a trainer.

| module | holds |
| --- | --- |
| `steps` | the reference: one step of every recurrence in float64, in unscaled coordinates |
| `diagonal`, `matrix` | norms, determinants and exponents of the two kinds of Jacobian |
| `families` | which Jacobian each recurrence has: a row of the table, a function |
| `summary` | the few numbers that a probe reports at every step, at the price of one pass over Δ (`compiled`) |
| `certificate`, `ssd_certificate` | a sound bound on what rounding does to the state, kernel by kernel |

λ is in nats per token, computed in log space, in float32 or better.
"""

from lyapft.lyapunov.diagonal import DiagonalJacobian, selective_scan_exponents, slowest, ssd_exponents
from lyapft.lyapunov.matrix import MatrixJacobian
from lyapft.lyapunov.summary import (
    FIELDS,
    MEANS,
    NEUTRAL_ZONE,
    Profile,
    Stability,
    gain,
    log_one_step_norm,
    log_running_product,
    memory,
    spectrum,
    stability,
    stability_profile,
    stability_tensors,
)

__all__ = [
    "FIELDS",
    "MEANS",
    "NEUTRAL_ZONE",
    "DiagonalJacobian",
    "MatrixJacobian",
    "Profile",
    "Stability",
    "gain",
    "log_one_step_norm",
    "log_running_product",
    "memory",
    "selective_scan_exponents",
    "slowest",
    "spectrum",
    "ssd_exponents",
    "stability",
    "stability_profile",
    "stability_tensors",
]
