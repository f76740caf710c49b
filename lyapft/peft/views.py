"""Layers as peft can adapt them: the matrix of a convolution or an embedding, the rows of one projection apart.

Every method of peft adapts `nn.Linear`; few adapt embeddings, none a depthwise convolution that can be merged. A view
stands in the model in a layer's place while it is adapted, and gives the layer back, with the view's weights, after.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call


class MatrixView(nn.Linear):
    """A layer's weight as a matrix, rows first: (C, K) of a depthwise convolution, (V, D) of an embedding.

    Raises:
        TypeError: a layer that is neither.
    """

    def __init__(self, layer: nn.Module) -> None:
        nn.Module.__init__(self)
        if not isinstance(layer, nn.Conv1d | nn.Embedding):
            raise TypeError(f"no matrix view of a {type(layer).__name__}")
        self.shape, weight = layer.weight.shape, layer.weight
        # an embedding's is a matrix already, and stays the one that an output layer may be tied to
        self.weight = weight if weight.dim() == 2 else nn.Parameter(weight.detach().flatten(1), weight.requires_grad)
        self.out_features, self.in_features = self.weight.shape
        self.bias = getattr(layer, "bias", None)  # type: ignore[assignment]  # as nn.Linear has it without one
        self._layer = [_emptied(layer)]  # in a list: not part of the model while the view is

    def shaped(self, matrix: Tensor) -> Tensor:
        """The matrix in the shape of the layer's weight."""
        return matrix.view(self.shape)

    def operation(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer does, with a weight of its shape."""
        tensors = {"weight": weight} | ({} if bias is None else {"bias": bias})
        return cast(Tensor, functional_call(self._layer[0], tensors, (inputs,)))

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layer does, with the weight of the view."""
        return self.operation(inputs, self.shaped(self.weight), self.bias)

    def restored(self) -> nn.Module:
        """The layer, with the weights that the view now has."""
        layer, weight = self._layer[0], self.weight
        same = weight.shape == self.shape
        layer.weight = weight if same else nn.Parameter(self.shaped(weight.detach()), weight.requires_grad)
        if self.bias is not None:
            layer.bias = self.bias
        return layer


class SplitRows(nn.Module):
    """A linear layer as several, each of which makes some of its outputs; their order is that of the rows.

    Args:
        linear: the layer.
        rows: how many rows each block has, by name; together all of them.
    Raises:
        ValueError: blocks that do not make up the layer.
    """

    def __init__(self, linear: nn.Linear, rows: dict[str, int]) -> None:
        super().__init__()
        if sum(rows.values()) != linear.out_features:
            raise ValueError(f"rows {rows} do not make up the {linear.out_features} rows of the layer")
        self.names = tuple(rows)
        weights, start = linear.weight, 0
        for name, count in rows.items():
            block = nn.Linear(linear.in_features, count, bias=linear.bias is not None, device="meta")
            block.weight = nn.Parameter(weights.detach()[start : start + count], weights.requires_grad)
            if linear.bias is not None:
                block.bias = nn.Parameter(linear.bias.detach()[start : start + count], linear.bias.requires_grad)
            self.add_module(name, block)
            start += count
        self._linear = [_emptied(linear)]

    @property
    def weight(self) -> Tensor:
        """All rows, adapted where a block is."""
        return torch.cat([block.weight for block in self._blocks()])  # type: ignore[misc]

    @property
    def bias(self) -> Tensor | None:
        """All biases, or None."""
        biases = [block.bias for block in self._blocks()]
        return None if biases[0] is None else torch.cat(biases)  # type: ignore[arg-type]

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return torch.cat([block(inputs) for block in self._blocks()], dim=-1)

    def restored(self) -> nn.Module:
        """The layer, with the weights that the blocks now have."""
        linear, trains = self._linear[0], any(p.requires_grad for p in self.parameters())
        linear.weight = nn.Parameter(self.weight.detach(), trains)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach(), trains)
        return linear

    def _blocks(self) -> list[nn.Module]:
        return [self.get_submodule(name) for name in self.names]


def _emptied(layer: nn.Module) -> nn.Module:
    """The layer without the values of its tensors, which the view now holds."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        setattr(layer, name, nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad))
    return layer
