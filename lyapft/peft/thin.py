"""peft's LoRA on a linear layer with the scale on the thin side: y = x Wᵀ + ((alpha / r) x Aᵀ) Bᵀ.

peft scales the update itself, as wide as the layer's output, forward and backward; the R columns of x Aᵀ are 10 to 500
times fewer. Where alpha / r is a power of two, as by default, the numbers are the same to the bit.
"""

from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor


class ThinLinear(LoraLinear):
    """Register it with `LoraConfig._register_custom_module({nn.Linear: ThinLinear})`, peft's way to extend a method."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., K) -> (..., N); every state but one plain adapter at work is peft's own business."""
        if args or kwargs or self.disable_adapters or self.merged or self.lora_variant or len(self.active_adapters) > 1:
            return super().forward(x, *args, **kwargs)
        (adapter,) = self.active_adapters
        thin = self.lora_A[adapter](self.lora_dropout[adapter](x)) * self.scaling[adapter]
        update: Tensor = self.base_layer(x) + self.lora_B[adapter](thin)
        return update
