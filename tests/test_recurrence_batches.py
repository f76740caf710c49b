"""What a sequence is batched, padded or packed with changes nothing; tuned states do what their equations say."""

import pytest
import torch
from torch import Tensor, nn

from lyapft import recurrence
from tests.test_recurrence import CONFIGS, FAMILY, assert_same, batch, both, build
from tests.tolerances import TOL


@pytest.mark.parametrize(
    ("kind", "state"),
    [(kind, None) for kind in CONFIGS]
    # Zamba's heads have one state each, which strategies refuse to tune: test_peft_methods.py
    + [(kind, state) for kind in CONFIGS if kind != "zamba" for state in ("initial_state", "state_offset")],
)
def test_logits_do_not_depend_on_what_a_sequence_is_batched_or_padded_with(kind, state):
    model = build(kind).eval()
    seam = recurrence.install(model)
    if state:
        tune_states(seam, state)
    ids = batch()["input_ids"]
    with torch.no_grad():
        alone = model(ids[:1, :9]).logits
        for padded in ("left", "right"):
            rows = torch.cat([ids[:1, :9], ids[1:2, :9]]), torch.ones(2, 9, dtype=torch.long)
            free, wall = torch.full((2, 4), 7), torch.zeros(2, 4, dtype=torch.long)
            free[1], wall[1] = ids[2, :4], 1  # the other row is longer
            order = (lambda a, b: (b, a)) if padded == "left" else (lambda a, b: (a, b))
            given = torch.cat(order(rows[0], free), 1), torch.cat(order(rows[1], wall), 1)
            logits = model(given[0], attention_mask=given[1]).logits[:1]
            mine = logits[:, 4:] if padded == "left" else logits[:, :9]
            torch.testing.assert_close(mine, alone, **TOL[torch.float32])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}
    short = ids[:1, :9]
    padded = torch.cat([torch.full((1, 4), 7), short], 1), torch.cat([torch.zeros(1, 4), torch.ones(1, 9)], 1).long()
    told = [
        torch.stack(model.generate(i, attention_mask=m, **options, return_dict_in_generate=True).logits, 1)
        for i, m in ((short, torch.ones_like(short)), padded)
    ]
    torch.testing.assert_close(told[1], told[0], **TOL[torch.float32])


def tune_states(seam: recurrence.Seam, name: str) -> None:
    """Give every mixer a random state to begin with, or to add."""
    for layer in seam.layers:
        mixer = layer.module
        if layer.family == "selective_scan":
            shape = mixer.A_log.shape
        else:
            shape = (mixer.num_heads, mixer.head_dim, mixer.ssm_state_size)
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(4))
        setattr(mixer, name, nn.Parameter(tensor))


@both
@pytest.mark.parametrize("name", ["initial_state", "state_offset"])
def test_a_tuned_state_is_what_its_equation_says(kind, name):
    """Against the recurrence written out in float64: h_0 decayed, or h', read by C and added before gate and norm."""
    model = build(kind)
    seam = recurrence.install(model)
    mixer = seam.layers[0].module
    hidden = torch.randn(2, 7, 32)
    read, outputs = {}, []
    seam.tap = lambda layer, delta, A: read.update(delta=delta.double(), A=A.double())
    behind = mixer.norm if kind == "mamba2" else mixer.out_proj
    hook = behind.register_forward_pre_hook(lambda _, given: outputs.append(given[0].detach().double()))
    mixer(hidden)
    tune_states(seam, name)
    tuned = mixer(hidden)
    hook.remove()
    assert torch.autograd.grad(tuned.sum(), getattr(mixer, name))[0].abs().min() > 0

    state = getattr(mixer, name).detach().double()
    decay = (
        torch.exp(read["delta"].cumsum(1)[..., None] * read["A"])
        if kind == "mamba"
        else torch.exp(read["delta"].cumsum(1) * read["A"])[..., None, None]
    )
    states = decay * state if name == "initial_state" else state.expand(2, 7, *state.shape)
    projected = mixer.in_proj(hidden).detach().double()
    inner, channels = mixer.intermediate_size, mixer.conv1d.in_channels
    x, gate = projected.chunk(2, -1) if kind == "mamba" else (projected[..., inner : inner + channels], None)
    padded = nn.functional.pad(x.transpose(1, 2), (3, 0))
    weight, bias = mixer.conv1d.weight.detach().double(), mixer.conv1d.bias.detach().double()
    x = nn.functional.silu(nn.functional.conv1d(padded, weight, bias, groups=channels)).transpose(1, 2)
    if kind == "mamba":
        C = (x @ mixer.x_proj.weight.detach().double().T)[..., -mixer.ssm_state_size :]
        expected = torch.einsum("bldn,bln->bld", states, C) * nn.functional.silu(gate)
    else:
        groups = mixer.n_groups
        C = x[..., -groups * mixer.ssm_state_size :].unflatten(-1, (groups, -1))
        C = C.repeat_interleave(mixer.num_heads // groups, 2)
        expected = torch.einsum("blhpn,blhn->blhp", states, C).flatten(2)
    added = outputs[1] - outputs[0]
    torch.testing.assert_close(added, expected, rtol=0, atol=float(expected.abs().max()) * TOL[torch.float32]["rtol"])


@pytest.mark.parametrize("kernel", ["cpu", "torch", "reference", "stock"])
@both
def test_packed_sequences_equal_the_same_ones_apart(kind, kernel):
    model, lengths = build(kind), (6, 1, 9, 5)
    seam = recurrence.install(model, kernel)
    inputs = batch()["input_ids"]
    weights = torch.randn(3, 21, 60, generator=torch.Generator().manual_seed(5))

    def gradients(logits: Tensor, weights: Tensor) -> None:
        (logits * weights).sum().backward()

    apart, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        logits = model(inputs[:, part]).logits
        gradients(logits, weights[:, part])
        apart.append(logits.detach())
        start += length
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    seam.sequence = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None].expand(3, -1)
    packed = model(inputs).logits
    gradients(packed, weights)
    actual = {name: p.grad for name, p in model.named_parameters()}
    assert_same((packed.detach(), actual), (torch.cat(apart, 1), expected))
    if kernel == "stock":
        assert "cannot keep packed sequences apart" in seam.fallbacks[FAMILY[kind]]
