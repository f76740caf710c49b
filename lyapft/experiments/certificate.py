"""The rounding certificate on real weights and texts: the deviation it promises against the one that is there.

Letters: B prompts, L tokens, K entries of a layer's state, drawn at random. An entry is a state of one channel (of a
head, in Mamba-2) by itself: what others hold does not enter it, so K single states with their own Δ, A, u and b are the
layer. The exact trajectory is that of the float32 model's inputs, in float64. The format's inputs are other ones
already, since projections and convolution ran in it; the certificate is told how far they are off.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from scipy import stats
from torch import Tensor

from lyapft import config, precision, scan
from lyapft.data import pydoc
from lyapft.errors import InputError
from lyapft.evaluation import finished
from lyapft.experiments import subjects
from lyapft.experiments.frame import Result, correlation_interval, track
from lyapft.lyapunov.certificate import KERNELS, certificate
from lyapft.lyapunov.rounding import Inputs
from lyapft.lyapunov.ssd_certificate import KERNELS as SSD_KERNELS
from lyapft.lyapunov.ssd_certificate import ssd_certificate
from lyapft.recurrence import Layer
from lyapft.scan.ssd import CHUNK


class Entries(NamedTuple):
    """K states of a layer, each a channel of its own: u, Δ, b (B, L, K), A (K,), float32; `key` is equal where b is."""

    family: str
    inputs: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    key: Tensor

    def recurrence(self) -> Inputs:
        """Each entry's own recurrence from a state of zero, in float64."""
        delta, A, inputs, B = (t.double() for t in (self.delta, self.A, self.inputs, self.B))
        write = delta * inputs * B
        return Inputs(delta * A, write, torch.zeros_like(write[:, 0]))


def run(
    models: list[str], prompts: int, tokens: int, entries: int, precision: str, seed: int, progress: bool = False
) -> Result:
    """One row per model and layer: promised and measured deviation, and their rank correlation over entries.

    A run is measured in its own number format, a base model by name in `precision`. The interval of the correlation is
    over prompts.

    Raises:
        InputError: a model without a recurrence that the certificate covers.
    """
    rows, points = [], []
    for name in track(models, "models", progress):
        for one in _layers(name, prompts, tokens, entries, precision, seed):
            kept = one.measured.isfinite().all(0) & one.promised.isfinite().all(0)
            promised, measured = one.promised[:, kept], one.measured[:, kept]
            ranks = [float(stats.spearmanr(*pair).statistic) for pair in zip(promised, measured, strict=True)]
            found = correlation_interval(ranks)
            shared = {"model": Path(name).name, "layer": one.layer, "format": one.form}
            rows.append(
                shared
                | {"family": one.family, "kernel": one.kernel}
                | {"promised": float(promised.max()), "measured": float(measured.max())}
                | {"median_ratio": float((promised / measured)[measured > 0].median())}
                | {"violations": int((measured > promised).sum()), "entries": int(kept.sum())}
                | {"rank_correlation": found.mean, "low": found.low, "high": found.high, "n": found.n}
            )
            points.append(shared | {"promised": promised.amax(0).tolist(), "measured": measured.amax(0).tolist()})
    return Result(rows, {"points": points})


class _Layer(NamedTuple):
    """Promised and measured deviation (B, K) of the drawn entries of one layer."""

    layer: str
    family: str
    kernel: str
    form: str
    promised: Tensor
    measured: Tensor


def _layers(name: str, prompts: int, tokens: int, entries: int, form: str, seed: int) -> list[_Layer]:
    chosen = _precision_of(name, form)
    exact = _entries(name, None, prompts, tokens, entries, seed)
    given = _entries(name, chosen, prompts, tokens, entries, seed)
    if not exact:
        raise InputError(f"experiment.models: {name} has no recurrence that the certificate covers (Mamba, Mamba-2)")
    found = []
    for layer, reference in exact.items():
        kernel = "torch" if scan.available()["cpu"] else "cpu"
        both = _promised_and_measured(kernel, reference, given[layer])
        found.append(_Layer(layer, reference.family, kernel, chosen.name, *both))
    return found


def _precision_of(name: str, form: str) -> DictConfig:
    if subjects.record_of(name) is None:
        return config.load_choice("precision", form)
    return OmegaConf.create(OmegaConf.to_container(finished(Path(name))[1].precision))  # type: ignore[return-value]


def _entries(
    name: str, form: DictConfig | None, prompts: int, tokens: int, entries: int, seed: int
) -> dict[str, Entries]:
    """What the scans of a model read, for the same drawn entries and texts in every format; None: float32."""
    found: dict[str, Entries] = {}
    generator = torch.Generator().manual_seed(seed)

    def keep(layer: Layer, inputs: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> None:
        found[f"{layer.name}{'' if layer.name not in found else f'#{len(found)}'}"] = _drawn(
            layer.family, inputs.float(), delta.float(), A.float(), B.float(), entries, generator
        )

    strategy = None if form is None else precision.build(form, "cpu")
    with subjects.load(name, "torch", strategy) as subject, torch.no_grad():
        ids = subjects.prompts(subject, pydoc.texts(), prompts, tokens)
        subject.seam.input_tap = keep
        if strategy is None:
            subject.model(input_ids=ids, use_cache=False)
        else:
            with strategy.autocast():
                subject.model(input_ids=ids, use_cache=False)
    return found


def _drawn(
    family: str, inputs: Tensor, delta: Tensor, A: Tensor, B: Tensor, entries: int, generator: torch.Generator
) -> Entries:
    """At most `entries` states of a layer, drawn without replacement."""
    if family == "ssd":
        H, P, G, N = *inputs.shape[2:], *B.shape[2:]
        h, p, n = _draw((H, P, N), entries, generator)
        g = h * G // H
        return Entries(family, inputs[:, :, h, p], delta[:, :, h], A[h], B[:, :, g, n], g * N + n)
    d, n = _draw(tuple(A.shape), entries, generator)
    return Entries(family, inputs[:, :, d], delta[:, :, d], A[d, n], B[:, :, n], n)


def _draw(shape: tuple[int, ...], entries: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    count = int(torch.tensor(shape).prod())
    return torch.unravel_index(torch.randperm(count, generator=generator)[:entries], shape)


def _promised_and_measured(kernel: str, reference: Entries, given: Entries) -> tuple[Tensor, Tensor]:
    """(B, K) largest bound and largest deviation over tokens; of ssd, which shows no other state, at the last token."""
    exact, read, factor = reference.recurrence(), given.recurrence(), float(given.B.abs().max())
    states = exact.states()
    if given.family == "ssd":
        bound = ssd_certificate(SSD_KERNELS[kernel], exact, read, states, chunk=CHUNK, write_factor=factor)
    else:
        bound = certificate(KERNELS[kernel], exact, read, states, write_factor=factor)
    computed = _computed(kernel, given)
    deviation = (computed.double() - states[:, -computed.shape[1] :]).abs()
    return bound[:, -computed.shape[1] :].amax(1), deviation.amax(1)


def _computed(kernel: str, given: Entries) -> Tensor:
    """(B, L, K) states that the kernel computes; of ssd the last alone, (B, 1, K)."""
    if given.family == "ssd":
        B = given.B[..., None]  # a group for each entry
        return scan.ssd(given.inputs[..., None], given.delta, given.A, B, B, kernel=kernel)[1].flatten(1)[:, None]
    states = torch.empty_like(given.inputs)
    for key in given.key.unique():  # channels that share b; with C = 1 the output is the state
        own = given.key == key
        B = given.B[:, :, own][..., :1]
        states[:, :, own] = scan.selective_scan(
            given.inputs[:, :, own], given.delta[:, :, own], given.A[own][:, None], B, torch.ones_like(B), kernel=kernel
        )[0]
    return states
