"""Number formats of a cell: which ones run where, and the Lightning plugin that trains in them."""

from lyapft.precision.emulation import emulated_half
from lyapft.precision.flags import matmul_flags
from lyapft.precision.hardware import has_half_arithmetic
from lyapft.precision.plugins import FullPlugin, MixedPlugin, TrueHalfPlugin
from lyapft.precision.strategy import Precision, build, faults

__all__ = [
    "FullPlugin",
    "MixedPlugin",
    "Precision",
    "TrueHalfPlugin",
    "build",
    "emulated_half",
    "faults",
    "has_half_arithmetic",
    "matmul_flags",
]
