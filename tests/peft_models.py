"""Tiny random models of every family, and the few steps that tests of adapters take with them."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lyapft import recurrence
from lyapft.backbone import Backbone
from lyapft.peft import Strategy

MAMBA_1 = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 40}
MAMBA_2 = MAMBA_1 | {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8, "tie_word_embeddings": True}
TRANSFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}
HYBRID = TRANSFORMER | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SSD_OF_A_HYBRID = {
    "mamba_d_state": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
DIMS: dict[str, dict[str, object]] = {
    "mamba": MAMBA_1,
    "mamba2": MAMBA_2,
    "gpt_neox": TRANSFORMER,
    "llama": TRANSFORMER | {"tie_word_embeddings": True},
    "falcon_mamba": MAMBA_1 | {"expand": 2},
    "jamba": HYBRID
    | {"mamba_d_state": 4, "mamba_dt_rank": 3, "num_experts": 1, "num_experts_per_tok": 1}
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": HYBRID | SSD_OF_A_HYBRID | {"attn_layer_indices": [1]},
    "falcon_h1": HYBRID | SSD_OF_A_HYBRID | {"mamba_d_ssm": 32},
    "granitemoehybrid": HYBRID
    | SSD_OF_A_HYBRID
    | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 24, "num_local_experts": 0},
    "nemotron_h": HYBRID
    | {"ssm_state_size": 4, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 8}
    | {"layers_block_type": ["mamba", "mlp", "attention"], "num_hidden_layers": 3},
    "zamba": HYBRID  # two hybrid layers that share one block, under names of their own
    | {"mamba_d_state": 4, "mamba_dt_rank": 3, "n_mamba_heads": 2, "attention_hidden_size": 32}
    | {"attention_head_dim": 16, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": HYBRID
    | {"mamba_d_state": 4, "n_mamba_heads": 4, "mamba_headdim": 8, "mamba_ngroups": 1, "chunk_size": 8}
    | {"layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "adapter_rank": 4, "hybrid_layer_ids": [1]},
}
FOUR = ("mamba", "mamba2", "gpt_neox", "llama")  # those that models are shipped of
MAMBAS = ("mamba", "mamba2")
HYBRIDS = ("falcon_mamba", "jamba", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba", "zamba2")
TOKENS = torch.arange(24).view(2, 12) % 40


class Tokenizer:
    """Stands in for one: only saved."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def backbone(kind: str, seed: int = 0, **dims: object) -> tuple[Backbone, recurrence.Seam]:
    """A small random model of an architecture, its seam installed."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(DIMS[kind] | dims)))
    base = Backbone(model, Tokenizer(), kind, kind, f"hash-of-{kind}-{seed}", None, None)  # type: ignore[arg-type]
    return base, recurrence.install(model, "torch")


def attached(kind: str, strategy: Strategy, seed: int = 0, **dims: object) -> Strategy:
    """The strategy on a new model."""
    base, seam = backbone(kind, seed, **dims)
    strategy.attach(base, seam)
    return strategy


def logits(model: nn.Module) -> Tensor:
    """Of the same tokens, always."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def randomize(strategy: Strategy, seed: int = 1, scale: float = 0.1) -> None:
    """Move every trainable tensor away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in strategy.trainable_parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))


def train(
    strategy: Strategy, steps: int = 3, watch: Callable[[int], None] | None = None, lr: float = 1e-2
) -> list[float]:
    """Plain AdamW steps; `watch` is called before each optimizer step with its index."""
    model = strategy.backbone.model.train()
    optimizer, losses = torch.optim.AdamW(strategy.parameter_groups(model, lr, 0.0), weight_decay=0.0), []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        penalty = strategy.penalty()
        (loss if penalty is None else loss + penalty).backward()
        if watch is not None:
            watch(step)
        optimizer.step()
        strategy.after_step(step + 1)
        losses.append(loss.item())
    return losses
