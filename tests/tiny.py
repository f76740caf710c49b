"""Random models and a tokenizer made on the spot, and the files of the tasks in their published formats."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from lyapft import tasks

FIXTURES = Path(__file__).parent / "fixtures"
MMLU, WINOGRANDE = str(FIXTURES / "mmlu"), str(FIXTURES / "winogrande.jsonl")
HELLASWAG, PIQA, ARC = (str(FIXTURES / f"{name}.jsonl") for name in ("hellaswag", "piqa", "arc"))
SINGLE_SPLIT = {tasks.Winogrande: WINOGRANDE, tasks.Hellaswag: HELLASWAG, tasks.Piqa: PIQA, tasks.Arc: ARC}
VOCAB = 300
SMALL = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "use_cache": False}
ATTENTION = {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 4096}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, **ATTENTION),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=4096),
    "gpt_neox": GPTNeoXConfig(**SMALL, **ATTENTION),
    "mamba": MambaConfig(**SMALL, state_size=4),
    "mamba2": Mamba2Config(**SMALL, state_size=4, head_dim=8, num_heads=4, n_groups=1, chunk_size=8),
}


def random_model(name: str, spread: float = 4.0, **changes: Any) -> PreTrainedModel:
    """A random model whose likelihoods differ clearly between tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict() | changes)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0, spread / 4)
    return model


def byte_tokenizer(bos: bool = False, texts: tuple[str, ...] = (), vocabulary: int = VOCAB) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the spot; `bos` puts a beginning-of-text token before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<eot>", "<bot>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(
        texts or ("Answer: A Answer: B Answer: C Answer: D", "the of and a b c ->") * 20, trainer
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bot> $A", special_tokens=[("<bot>", 1)])
    special = {"eos_token": "<eot>"} | ({"bos_token": "<bot>"} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


class Recorder(torch.nn.Module):
    """A stand-in for a model: logits from a table by the last token, and the shape of every call."""

    def __init__(self, logits_V: torch.Tensor) -> None:
        super().__init__()
        self.logits_V, self.shapes, self.kept = torch.nn.Parameter(logits_V), [], []

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool, logits_to_keep: int = 0
    ) -> SimpleNamespace:
        self.shapes.append(tuple(input_ids.shape))
        self.kept.append(logits_to_keep)
        assert not use_cache
        return SimpleNamespace(logits=self.logits_V.expand(*input_ids[:, -logits_to_keep:].shape, -1))
