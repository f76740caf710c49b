"""Adapted layers whose weight *is* the adapted weight, so that an adapter lives wherever its layer is read.

A mixer calls some of its projections and reads the weights of others: `dt_proj` and `conv1d` everywhere, and all that a
fused kernel takes in (`x_proj`, `out_proj`). An adapter of peft acts when its layer is called; the `weight` of the
adapted layer is that of its base, and whoever reads it passes the adapter by without a word. `carry` gives the layer a
`weight` (and a `bias`) that carries the adapter, differentiably; calling the layer still runs peft's own forward.

What the adapted weight is, is said once, in `effective_weight`; merging writes the same tensor.

Letters: O outputs, I inputs, R rank, V vocabulary, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.adalora import SVDLinear
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.vera import VeraLayer
from peft.utils.other import transpose
from torch import Tensor, nn

from lyapft.peft.views import MatrixView, SplitRows

ADAPTER = "default"  # peft's name of the one adapter that a model carries here
READ_RAW = ("conv1d", "dt_proj", "x_proj", "out_proj")  # of a mixer: some kernel reads the weight without a call


def effective_weight(layer: BaseTunerLayer) -> Tensor:
    """The weight that an adapted layer acts with, in the shape and the dtype of its base.

    Computed in float32 at least, outside autocast, and rounded once; the base's own where the adapter is switched off
    or merged.
    """
    base = cast(Tensor, layer.get_base_layer().weight)
    if layer.disable_adapters or layer.merged:
        return base
    with torch.autocast(base.device.type, enabled=False):
        return _adapted(layer, _wide(base)).to(base.dtype)


def effective_bias(layer: BaseTunerLayer) -> Tensor | None:
    """The bias that an adapted layer acts with: the base's, but (IA)³ on outputs scales it too."""
    base = cast("Tensor | None", getattr(layer.get_base_layer(), "bias", None))  # an embedding has none
    scaled = isinstance(layer, IA3Layer) and not layer.is_feedforward
    if base is None or not scaled or layer.disable_adapters or layer.merged:
        return base
    return (_wide(base) * _wide(layer.ia3_l[ADAPTER]).flatten()).to(base.dtype)


def _adapted(layer: BaseTunerLayer, weight: Tensor) -> Tensor:
    for kind, formula in FORMULAS:
        if isinstance(layer, kind):
            return formula(layer, weight)
    raise TypeError(f"no formula for the adapted weight of a {type(layer).__name__}")


def _low_rank(layer: LoraLayer, weight_OI: Tensor) -> Tensor:
    """LoRA, rsLoRA, PiSSA: W + s B A. DoRA: m (W + s B A) / ‖W + s B A‖, a norm per output, held constant."""
    thin_RI, thick_OR = (_wide(factor[ADAPTER].weight) for factor in (layer.lora_A, layer.lora_B))
    turned = cast(bool, layer.fan_in_fan_out)
    adapted = weight_OI + layer.scaling[ADAPTER] * transpose(thick_OR @ thin_RI, turned)
    if ADAPTER not in layer.lora_magnitude_vector:
        return adapted
    return transpose(transpose(adapted, turned) * dora_factor(layer, transpose(adapted, turned))[:, None], turned)


def _low_rank_embedding(layer: LoraEmbedding, weight_VD: Tensor) -> Tensor:
    """W + s (B A)ᵀ; under DoRA with a norm per embedding dimension."""
    product_DV = _wide(layer.lora_embedding_B[ADAPTER]) @ _wide(layer.lora_embedding_A[ADAPTER])
    adapted = weight_VD + layer.scaling[ADAPTER] * product_DV.T
    return adapted * dora_factor(layer, adapted.T) if ADAPTER in layer.lora_magnitude_vector else adapted


def _svd(layer: SVDLinear, weight_OI: Tensor) -> Tensor:
    """AdaLoRA: W + s B diag(E) A / ranks."""
    thin_RI, value_R1, thick_OR = (_wide(f[ADAPTER]) for f in (layer.lora_A, layer.lora_E, layer.lora_B))
    scale = layer.scaling[ADAPTER] / (_wide(layer.ranknum[ADAPTER]) + 1e-5)  # as peft has it
    return weight_OI + scale * transpose(thick_OR @ (thin_RI * value_R1), cast(bool, layer.fan_in_fan_out))


def _vera(layer: VeraLayer, weight_OI: Tensor) -> Tensor:
    """VeRA: W + diag(b) B diag(d) A, with B and A shared by all layers and frozen."""
    outputs, inputs = layer.out_features, layer.in_features
    assert layer.vera_A is not None
    assert layer.vera_B is not None
    b_O1, d_R1 = (_wide(scale[ADAPTER])[:, None] for scale in (layer.vera_lambda_b, layer.vera_lambda_d))
    thin_RI, thick_OR = _wide(layer.vera_A[ADAPTER])[:, :inputs], _wide(layer.vera_B[ADAPTER])[:outputs]
    product = (b_O1 * thick_OR.to(weight_OI.device)) @ (d_R1 * thin_RI.to(weight_OI.device))
    return weight_OI + transpose(product, cast(bool, layer.fan_in_fan_out))


def _scaled(layer: IA3Layer, weight_OI: Tensor) -> Tensor:
    """(IA)³: a factor per output, or per input where the layer counts as feed-forward."""
    return weight_OI * transpose(_wide(layer.ia3_l[ADAPTER]), cast(bool, layer.fan_in_fan_out))


FORMULAS: tuple[tuple[type, Callable[[Any, Tensor], Tensor]], ...] = (  # subclasses before what they derive from
    (SVDLinear, _svd),
    (LoraEmbedding, _low_rank_embedding),
    (LoraLayer, _low_rank),
    (VeraLayer, _vera),
    (IA3Layer, _scaled),
)


def dora_factor(layer: LoraLayer, adapted_OI: Tensor) -> Tensor:
    """m / ‖W + ΔW‖ per output; the norm gets no gradient (Liu et al. 2024, section 4.3)."""
    magnitude = _wide(cast(Tensor, layer.lora_magnitude_vector[ADAPTER].weight))
    return magnitude / torch.linalg.vector_norm(adapted_OI.detach(), dim=1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class Carried:
    """Mixed into the class of an adapted layer: whoever reads its weight or bias gets the adapted one."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """By the two classes that it is made of: the class itself exists at run time only."""
        return _bare, type(self).__bases__, self.__dict__

    @property
    def weight(self) -> Tensor:
        """The adapted weight, with a gradient to the adapter."""
        return effective_weight(cast(BaseTunerLayer, self))

    @property
    def bias(self) -> Tensor | None:
        """The adapted bias."""
        return effective_bias(cast(BaseTunerLayer, self))


class CarriedView(Carried):
    """A carried layer whose base is the matrix of a layer of another kind: calling it runs that kind's operation."""

    @property
    def weight(self) -> Tensor:
        """The adapted weight, in the shape of the layer that is viewed."""
        layer = cast(BaseTunerLayer, self)
        return cast(MatrixView, layer.get_base_layer()).shaped(effective_weight(layer))

    def forward(self, inputs: Tensor) -> Tensor:
        """What the viewed layer does, with the adapted weight."""
        view = cast(MatrixView, cast(BaseTunerLayer, self).get_base_layer())
        return view.operation(inputs, self.weight, self.bias)


def carry(model: nn.Module) -> None:
    """Make the adapted weights of a model readable: in its mixers, where kernels read them, and in every view.

    A mixer is a module that holds `A_log`, the decay of its recurrence.
    """
    for name, layer in adapted_layers(model):
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        if isinstance(layer.get_base_layer(), MatrixView):
            layer.__class__ = _with(CarriedView, cast(Hashable, type(layer)))
        elif isinstance(owner, SplitRows) or (leaf in READ_RAW and hasattr(owner, "A_log")):
            layer.__class__ = _with(Carried, cast(Hashable, type(layer)))


def _bare(mixin: Hashable, layer: Hashable) -> object:
    kind: Any = _with(mixin, layer)
    return object.__new__(kind)


@functools.cache
def _with(mixin: Hashable, layer: Hashable) -> type:
    """The class of a layer with the mixin in front."""
    front, kind = cast("type[Carried]", mixin), cast("type[BaseTunerLayer]", layer)
    return type(f"{front.__name__}{kind.__name__}", (front, kind), {})


def adapted_layers(model: nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    """Every layer of a model that carries an adapter, by full name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


class TiedHead(nn.Module):
    """The output layer of a model whose adapted embeddings are tied to it: h times the adapted matrix.

    Under LoRA, W_VD the shared matrix and ΔW_VD = s (B_DR A_RV)ᵀ, two thin products serve: h Wᵀ + s (h B) A; under
    DoRA h is scaled first by the factor of each dimension. Other methods form the adapted matrix.
    """

    def __init__(self, linear: nn.Linear, embedding: BaseTunerLayer) -> None:
        super().__init__()
        self.linear = linear
        self._embedding = [embedding]  # in a list: it belongs to the model, and must not be registered a second time

    @property
    def weight(self) -> nn.Parameter:
        """The shared base matrix, V x D, without the update (models ask for its dtype)."""
        return cast(nn.Parameter, self.linear.weight)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        """Logits, (..., D) -> (..., V)."""
        adapter = self._embedding[0]
        if adapter.disable_adapters or adapter.merged:
            return cast(Tensor, self.linear(hidden_BLD))
        if not isinstance(adapter, LoraEmbedding):
            return F.linear(hidden_BLD, cast(Tensor, adapter.weight), self.linear.bias)
        if ADAPTER in adapter.lora_magnitude_vector:
            with torch.no_grad():  # only its norm is needed
                product_DV = adapter.lora_embedding_B[ADAPTER] @ adapter.lora_embedding_A[ADAPTER]
                adapted_DV = self.linear.weight.T + adapter.scaling[ADAPTER] * product_DV
            hidden_BLD = hidden_BLD * dora_factor(adapter, adapted_DV).to(hidden_BLD.dtype)
        thin = F.linear(hidden_BLD, adapter.lora_embedding_B[ADAPTER].T)
        update = F.linear(thin, adapter.lora_embedding_A[ADAPTER].T)
        return cast(Tensor, self.linear(hidden_BLD) + adapter.scaling[ADAPTER] * update)
