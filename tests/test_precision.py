"""Number formats: emulated half matmuls against float64 and torch's own, the plugins in real fits, clean exits."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from lyapft.precision import attention as attention_module
from lyapft.precision import build, emulated_half, faults, has_half_arithmetic
from lyapft.precision.emulation import is_active
from lyapft.precision.workspace import KEPT_ELEMENTS, Workspace
from tests.tolerances import TOL

HALF = [torch.bfloat16, torch.float16]
NAME = {"bf16": torch.bfloat16, "fp16": torch.float16}
FRACTION_BITS = {torch.bfloat16: 7, torch.float16: 10}


def cfg(name: str, **changes: Any) -> Any:
    defaults = {"name": name, "emulate": "auto", "init_scale": 65536.0, "growth_interval": 200}
    return SimpleNamespace(**(defaults | changes))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    assert not is_active()


def units_apart(a: Tensor, b: Tensor) -> int:
    """Largest distance of two half tensors of one sign pattern, in units in the last place."""
    return int((a.view(torch.int16).int() - b.view(torch.int16).int()).abs().max())


def rounding_bound(exact: Tensor, magnitude: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """Half a unit of the result plus the float32 sum's error, γ_k Σ|a||b| (Higham 2002, §3.1)."""
    return exact.abs() * 2.0 ** -(FRACTION_BITS[dtype] + 1) + 2 * terms * 2.0**-24 * magnitude


def matmul_cases(dtype: torch.dtype, draw: Callable[..., Tensor]) -> dict[str, tuple[Callable[..., Tensor], list[Any]]]:
    def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
        return [draw(s).to(dtype) for s in shapes]

    return {
        "mm": (torch.mm, tensors((33, 50), (50, 17))),
        "mm_transposed": (lambda a, b: a.t() @ b.t(), tensors((50, 33), (17, 50))),
        "addmm": (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2.0), tensors((17,), (33, 50), (50, 17))),
        "linear": (F.linear, tensors((2, 9, 50), (17, 50), (17,))),
        "bmm": (torch.bmm, tensors((4, 11, 30), (4, 30, 7))),
        "baddbmm": (torch.baddbmm, tensors((4, 11, 7), (4, 11, 30), (4, 30, 7))),
        "mv": (torch.mv, tensors((13, 40), (40,))),
        "addmv": (torch.addmv, tensors((13,), (13, 40), (40,))),
        "dot": (torch.dot, tensors((60,), (60,))),
        "einsum": (lambda a, b: torch.einsum("bln,bdn->bld", a, b), tensors((3, 10, 16), (3, 12, 16))),
        "sliced": (lambda a, b: a[:, ::2] @ b[1:], tensors((12, 40), (21, 5))),
    }


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("op", list(matmul_cases(torch.float16, torch.rand)))
def test_matmuls_are_within_one_unit_of_torchs_own_and_rounded_once(op: str, dtype: torch.dtype) -> None:
    function, positive = matmul_cases(dtype, torch.rand)[op]
    own = function(*positive)
    with emulated_half():
        emulated = function(*positive)
    assert emulated.dtype == dtype
    assert emulated.shape == own.shape
    assert units_apart(emulated, own) <= 1
    function, signed = matmul_cases(dtype, torch.randn)[op]
    exact = function(*(t.double() for t in signed))
    magnitude = function(*(t.double().abs() for t in signed))
    with emulated_half():
        error = (function(*signed).double() - exact).abs()
    assert (error <= rounding_bound(exact, magnitude, 60, dtype)).all()


@settings(max_examples=40, deadline=None)
@given(shape=st.tuples(*[st.integers(0, 9)] * 3), dtype=st.sampled_from(HALF), seed=st.integers(0, 999))
def test_small_products_are_the_correctly_rounded_ones(
    shape: tuple[int, int, int], dtype: torch.dtype, seed: int
) -> None:
    m, k, n = shape
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-8, 9, s, generator=generator).to(dtype) for s in ((m, k), (k, n)))  # exact in float32
    with emulated_half():
        assert torch.equal(a @ b, (a.double() @ b.double()).to(dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_are_products_of_half_operands_rounded_once(dtype: torch.dtype) -> None:
    x, weight, gradient = torch.randn(40, 24), torch.randn(16, 24), torch.randn(40, 16).to(dtype)
    x.requires_grad_()
    weight.requires_grad_()
    with emulated_half():
        with torch.autocast("cpu", dtype):
            y = F.linear(x, weight)
        y.backward(gradient)
    half_x, half_weight = (t.detach().to(dtype).double() for t in (x, weight))
    for got, left, right in ((x.grad, gradient.double(), half_weight), (weight.grad, gradient.double().t(), half_x)):
        assert got is not None
        assert got.dtype == torch.float32
        assert torch.equal(got, got.to(dtype).float()), "a gradient was not rounded to half on its way"
        error = (got.double() - left @ right).abs()
        assert (error <= rounding_bound(left @ right, left.abs() @ right.abs(), 40, dtype)).all()


@pytest.mark.parametrize("dtype", HALF)
def test_causal_depthwise_convolution_and_its_gradients(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(2, 6, 20), torch.randn(6, 1, 4), torch.randn(6)
    gradient = torch.randn(2, 6, 23).to(dtype)

    def run(cast: torch.dtype) -> list[Tensor]:
        inputs = [t.to(dtype).to(cast).requires_grad_() for t in (x, weight, bias)]
        y = F.conv1d(*inputs, padding=3, groups=6)
        return [y.detach(), *torch.autograd.grad(y, inputs, gradient.to(cast))]

    exact = run(torch.float64)
    with emulated_half():
        emulated = run(dtype)
    for got, want in zip(emulated, exact, strict=True):
        assert got.dtype == dtype
        assert_close(got.double(), want, rtol=2.0 ** -FRACTION_BITS[dtype], atol=1e-5)


ATTENTION_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "boolean mask": {"attn_mask": torch.rand(2, 1, 37, 37, generator=torch.Generator().manual_seed(1)) > 0.4},
    "float mask": {"attn_mask": torch.randn(2, 4, 37, 37, generator=torch.Generator().manual_seed(2))},
    "scale": {"is_causal": True, "scale": 0.3},
    "shared keys": {"is_causal": True, "enable_gqa": True},
}


@pytest.mark.parametrize("block", [2**22, 2 * 4 * 37 * 5])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention_is_as_near_to_float64_as_torchs_own(
    case: str, dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module, "BLOCK_ELEMENTS", block)  # the small one makes eight blocks of queries
    options = ATTENTION_CASES[case]
    heads = 2 if options.get("enable_gqa") else 4
    leaves = [torch.randn(2, 37, h, 8).to(dtype).transpose(1, 2).requires_grad_() for h in (4, heads, heads)]
    gradient = torch.randn(2, 4, 37, 8).to(dtype)

    def run(cast: torch.dtype) -> list[Tensor]:
        inputs = [t.detach().to(cast).requires_grad_() for t in leaves]
        mask = {k: v.to(cast) for k, v in options.items() if k == "attn_mask" and v.is_floating_point()}
        y = F.scaled_dot_product_attention(*inputs, **(options | mask))
        return [y.detach(), *torch.autograd.grad(y, inputs, gradient.to(cast))]

    exact, own = run(torch.float64), run(dtype)
    with emulated_half():
        emulated = run(dtype)
    for name, got, want, theirs in zip(("output", "dQ", "dK", "dV"), emulated, exact, own, strict=True):
        assert got.dtype == dtype
        assert torch.isfinite(got).all(), name
        allowed = 1.5 * (theirs.double() - want).abs().max() + 2.0 ** -FRACTION_BITS[dtype] * want.abs().max()
        assert (got.double() - want).abs().max() <= allowed, name


def test_a_query_that_sees_nothing_attends_to_nothing() -> None:
    query = torch.randn(1, 1, 3, 4).to(torch.bfloat16).requires_grad_()
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    mask[..., 1, :] = False
    with emulated_half():
        y = F.scaled_dot_product_attention(query, query, query, attn_mask=mask)
        y.sum().backward()
    assert torch.equal(y[0, 0, 1], torch.zeros(4, dtype=torch.bfloat16))
    assert y[0, 0, 0].abs().sum() > 0
    assert query.grad is not None
    assert torch.isfinite(query.grad).all()


def test_float16_overflows_to_infinity_and_underflows_gradually() -> None:
    big, small = torch.full((1, 4), 200.0).half(), torch.full((1, 1), 2.0**-13).half()
    with emulated_half():
        assert (big @ big.t()).item() == float("inf")  # 160000 > 65504
        assert (-big @ big.t()).item() == float("-inf")
        assert (small @ small.half()).item() == 0.0  # 2^-26 is under half the smallest subnormal
        assert (small @ (small * 4)).item() == 2.0**-24
        assert (big.bfloat16() @ big.bfloat16().t()).item() == 159744.0  # 156 · 2^10: eight bits


def test_half_parameters_train_without_autocast() -> None:
    layer = torch.nn.Linear(8, 4, dtype=torch.bfloat16)
    with emulated_half():
        layer(torch.randn(5, 8, dtype=torch.bfloat16)).square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.bfloat16
    assert layer.weight.grad.abs().sum() > 0


def test_other_dtypes_are_untouched_and_torchs_kernels_come_back_even_after_an_error() -> None:
    def kernels() -> list[str]:
        return [torch._C._dispatch_dump(f"aten::{op}") for op in ("mm", "convolution", "bmm")]

    a, b = torch.randn(30, 40), torch.randn(40, 20)
    before, product, own = kernels(), a @ b, a.half() @ b.half()
    with pytest.raises(RuntimeError, match="same dtype"), emulated_half():  # noqa: PT012
        assert kernels() != before
        assert torch.equal(a @ b, product)
        with emulated_half():
            pass
        assert is_active(), "the inner block closed the outer one"
        a.half() @ b.bfloat16()
    assert kernels() == before
    assert not is_active()
    assert torch.equal(a.half() @ b.half(), own)


def test_inference_mode_first_then_training() -> None:
    weight = torch.randn(6, 6, dtype=torch.float16, requires_grad=True)
    with emulated_half():
        with torch.inference_mode():
            first = weight @ weight
        (weight @ weight).sum().backward()
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()
    assert torch.isfinite(first).all()


def test_workspace_widens_exactly_and_keeps_no_large_buffer() -> None:
    workspace = Workspace()
    half = torch.randn(5, 7).half()
    for operand in (half, half.t(), half[:, ::2], half[0], half.expand(2, 5, 7)):
        assert torch.equal(workspace.widen(0, operand), operand.float())
    assert workspace.empty(0, (3, 4)).data_ptr() == workspace.empty(0, (4, 3)).data_ptr()
    assert workspace.empty(1, (KEPT_ELEMENTS + 1,)).data_ptr() != workspace.empty(1, (2,)).data_ptr()


class TwoProducts(torch.autograd.Function):
    """Multiplies its gradient, doubles it in place, and multiplies it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,), gradient = ctx.saved_tensors, gradients[0].clone()
        first, same = gradient @ weight, gradient @ weight
        assert torch.equal(first, same)
        assert torch.equal(gradient.mul_(2) @ weight, 2 * first), "a widened copy outlived its gradient"
        del gradient
        assert torch.equal((gradients[0] * 4) @ weight, 4 * first)
        return first, None


def test_a_gradient_that_changes_in_backward_is_widened_anew() -> None:
    x, weight = torch.randn(6, 8).bfloat16().requires_grad_(), torch.randn(8, 8).bfloat16()
    with emulated_half():
        TwoProducts.apply(x, weight).square().sum().backward()
    assert x.grad is not None
    assert_close(x.grad, (2 * x.detach()) @ weight, **TOL[torch.bfloat16])


class Regression(pl.LightningModule):
    """A linear map whose third batch can be made to overflow; notes what each update looked like."""

    def __init__(self, overflow_at: int = -1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = torch.nn.Linear(4, 3)
        self.overflow_at = overflow_at
        self.seen: list[dict[str, Any]] = []
        self.gradients: list[Tensor] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        y = self.layer(batch[0].to(self.layer.weight.dtype))
        self.seen.append({"dtype": y.dtype, "weight": self.layer.weight.detach().clone()})
        return (y.float() * (1e9 if index == self.overflow_at else 1.0)).square().mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert self.layer.weight.grad is not None
        self.gradients.append(self.layer.weight.grad.clone())

    def on_train_batch_end(self, *_: Any) -> None:
        plugin: Any = self.trainer.precision_plugin
        self.seen[-1] |= {"skipped": plugin.last_step_skipped, "scale": plugin.loss_scale}
        self.seen[-1]["after"] = self.layer.weight.detach().clone()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(name: str, *, overflow_at: int = -1, clip: float | None = None, **changes: Any) -> Regression:
    torch.manual_seed(2)
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(20, 4)), batch_size=4)
    module = Regression(overflow_at)
    with build(cfg(name, **changes), "cpu") as precision:
        precision.cast(module)
        trainer = pl.Trainer(
            accelerator="cpu",
            plugins=[precision.plugin],
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=clip,
        )
        trainer.fit(module, batches)
    return module


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and log steps
@pytest.mark.parametrize("emulate", ["always", "never"])
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_training_is_in_the_format_asked_for_with_float32_weights(name: str, emulate: str) -> None:
    module, full = fit(name, emulate=emulate), fit("fp32")
    assert {s["dtype"] for s in module.seen} == {NAME[name]}
    assert {s["dtype"] for s in full.seen} == {torch.float32}
    assert {s["scale"] for s in module.seen} == ({65536.0} if name == "fp16" else {None})
    assert not any(s["skipped"] for s in module.seen + full.seen)
    assert module.layer.weight.dtype == torch.float32
    assert not torch.equal(module.layer.weight, full.layer.weight)
    assert_close(module.layer.weight, full.layer.weight, **TOL[NAME[name]])
    assert_close(module.gradients[0], full.gradients[0], **TOL[NAME[name]])  # unscaled


@pytest.mark.filterwarnings("ignore")
def test_an_fp16_overflow_skips_the_step_halves_the_scale_and_is_reported() -> None:
    module = fit("fp16", overflow_at=2)
    assert [s["skipped"] for s in module.seen] == [False, False, True, False, False]
    assert [s["scale"] for s in module.seen] == [65536.0, 65536.0, 32768.0, 32768.0, 32768.0]
    assert torch.equal(module.seen[2]["weight"], module.seen[2]["after"])
    assert not torch.equal(module.seen[3]["weight"], module.seen[3]["after"])


@pytest.mark.filterwarnings("ignore")
def test_the_scale_grows_after_an_interval_without_overflow() -> None:
    assert [s["scale"] for s in fit("fp16", init_scale=8.0, growth_interval=2).seen] == [8.0, 16.0, 16.0, 32.0, 32.0]


@pytest.mark.filterwarnings("ignore")
def test_clipping_acts_on_unscaled_gradients() -> None:
    clipped, full = fit("fp16", clip=1e-3), fit("fp32", clip=1e-3)
    change = (clipped.seen[0]["after"] - clipped.seen[0]["weight"]).norm()
    assert 0 < change <= 0.1 * 1e-3 * 1.001  # lr · clip; clipped while scaled, it would be 65536 times less
    assert_close(change, (full.seen[0]["after"] - full.seen[0]["weight"]).norm(), **TOL[torch.float16])


def test_fp16_on_a_cpu_is_fp16_and_bf16_is_not() -> None:
    value = torch.tensor([[1 + 2.0**-10]])  # one step above 1 in fp16, not a bf16 number
    results = {}
    for name in NAME:
        with build(cfg(name), "cpu") as precision, precision.autocast():
            results[name] = (value @ torch.ones(1, 1)).item()
    assert results == {"fp16": 1 + 2.0**-10, "bf16": 1.0}
    assert build(cfg("fp16"), "cpu").plugin.scaler.is_enabled()  # type: ignore[union-attr]
    assert build(cfg("bf16"), "cpu").plugin.scaler is None  # type: ignore[union-attr]


def test_flags_are_clean_inside_and_put_back_afterwards() -> None:
    def state() -> list[Any]:
        b = torch.backends
        return [
            torch.get_float32_matmul_precision(),
            b.cudnn.allow_tf32,
            b.cuda.matmul.allow_tf32,
            b.cuda.matmul.allow_bf16_reduced_precision_reduction,
            *(x.fp32_precision for x in (b, b.cuda.matmul, b.cudnn.conv, b.mkldnn.matmul, b.mkldnn.conv)),
        ]

    for outer in ("highest", "medium"):
        torch.set_float32_matmul_precision(outer)
        before = state()
        with pytest.raises(KeyError), build(cfg("fp32"), "cpu") as precision:  # noqa: PT012
            assert state()[:4] == ["highest", False, False, False]
            with precision.autocast():
                assert not torch.is_autocast_enabled("cpu")
            raise KeyError
        assert state() == before
    torch.set_float32_matmul_precision("highest")


def test_autocast_works_by_itself_and_leaves_nothing() -> None:
    precision = build(cfg("bf16", emulate="always"), "cpu")
    with precision.autocast():
        assert is_active()
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert not is_active()
    assert not torch.is_autocast_enabled("cpu")


def test_training_that_would_not_be_emulated_as_recorded_is_refused() -> None:
    plugin = build(cfg("bf16", emulate="always"), "cpu").plugin
    with pytest.raises(RuntimeError, match="with build"), plugin.forward_context():
        pass


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_record_says_what_runs(name: str) -> None:
    half = str(NAME[name]).removeprefix("torch.")
    auto, never = build(cfg(name), "cpu").record(), build(cfg(name, emulate="never"), "cpu").record()
    assert auto["emulated"] is not has_half_arithmetic(NAME[name])
    assert never["emulated"] is False
    assert (auto["requested"], auto["effective"]) == (name, name)
    always = build(cfg(name, emulate="always"), "cpu")
    ops = always.record()["ops"]
    matmul = {"storage": half, "operands": half, "accumulation": "float32", "result": half}
    assert ops["matmul"] == ops["conv"] == matmul
    assert set(ops["recurrence scan"].values()) == set(ops["parameters"].values()) == {"float32"}
    with always.autocast():
        x = torch.randn(2, 4, 8)
        y = F.linear(x, torch.randn(8, 8))
        assert y.dtype == F.conv1d(x, torch.randn(4, 4, 3)).dtype == NAME[name]
        assert F.silu(y).dtype == F.softmax(y, -1).dtype == NAME[name]  # "where an input is"
        assert F.silu(x).dtype == F.softmax(x, -1).dtype == torch.float32  # "else float32"


def test_fp32_record_and_plugin() -> None:
    precision = build(cfg("fp32", emulate="always"), "cpu")
    assert precision.record()["emulated"] is False
    assert precision.plugin.precision == "32-true"
    assert {v for formats in precision.record()["ops"].values() for v in formats.values()} == {"float32"}


def test_faults_say_what_to_do_all_at_once() -> None:
    (tf32,) = faults(cfg("tf32"), "cpu")
    assert "precision=tf32 needs a CUDA device" in tf32
    assert "Use precision=fp32" in tf32
    found = faults(cfg("fp16", emulate="sometimes", init_scale=0.0, growth_interval=0), "cpu")
    assert len(found) == 3
    assert "emulate=sometimes" in found[0]
    assert "auto, never, always" in found[0]
    assert "is for CPUs" in faults(cfg("bf16", emulate="always"), "cuda")[0]
    assert "fp32, tf32, bf16, fp16, bf16_true, fp16_true, bf16_true_unpinned" in faults(cfg("fp8"), "cpu")[0]
    assert [faults(cfg(name), "cpu") for name in ("fp32", "bf16", "fp16")] == [[], [], []]
    with pytest.raises(ValueError, match="tf32"):
        build(cfg("tf32"), "cpu")
