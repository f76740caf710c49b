"""Callbacks that observe a training run and never change it; no mathematics lives here.

`LyapunovProbe` measures the recurrent state, `ShadowProbe` the distance of the number format from float32,
`ResourceProbe` what the training uses, `AlertProbe` watches any of these numbers, `AdapterLiveness` proves that every
trainable tensor learns. They leave their numbers in `FineTuner.observed`; `StepRecorder` writes these into the step
series, `ProgressBar` shows some.
"""

from lyapft.probes.alerts import AlertProbe
from lyapft.probes.liveness import AdapterLiveness
from lyapft.probes.lyapunov import LyapunovProbe
from lyapft.probes.recorder import ProgressBar, StepRecorder
from lyapft.probes.resources import ResourceProbe
from lyapft.probes.shadow import ShadowProbe

__all__ = [
    "AdapterLiveness",
    "AlertProbe",
    "LyapunovProbe",
    "ProgressBar",
    "ResourceProbe",
    "ShadowProbe",
    "StepRecorder",
]
