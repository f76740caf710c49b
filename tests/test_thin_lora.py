"""LoRA with its scale on the thin side: peft's own layer is the oracle, in every state that peft knows."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.testing import assert_close

from lyapft.peft.thin import ThinLinear
from tests.tolerances import TOL


def layers(alpha: float, **options: object) -> tuple[LoraLinear, LoraLinear]:
    """The same adapted layer twice: peft's, ours."""
    found = []
    for custom in (False, True):
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False, **options)  # type: ignore[arg-type]
        if custom:
            config._register_custom_module({nn.Linear: ThinLinear})
        found.append(inject_adapter_in_model(config, nn.Sequential(nn.Linear(12, 20))).double()[0])
    assert type(found[1]) is ThinLinear
    return found[0], found[1]


def outcome(layer: LoraLinear) -> list[Tensor]:
    x = torch.randn(3, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.manual_seed(2)  # dropout
    y = layer(x)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return [y, *torch.autograd.grad(y.square().sum(), leaves, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("alpha", [8.0, 5.0])
def test_output_and_gradients_are_those_of_peft(alpha: float, dropout: float) -> None:
    theirs, ours = (outcome(layer) for layer in layers(alpha, lora_dropout=dropout))
    assert_close(ours, theirs, **TOL[torch.float64])
    if alpha == 8.0:  # alpha / r = 2
        assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("state", ["disabled", "merged", "dora"])
def test_other_states_are_left_to_peft(state: str) -> None:
    theirs, ours = layers(5.0, use_dora=state == "dora")
    for layer in (theirs, ours):
        if state == "disabled":
            layer.enable_adapters(False)
        elif state == "merged":
            layer.merge()
    assert torch.equal(outcome(ours)[0], outcome(theirs)[0])
