"""Text of a query to token ids, cut between context and continuation as lm-eval cuts it.

Source: lm-eval 0.4.13, `TemplateLM._encode_pair` and `HFLM.tok_encode`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lyapft.errors import InputError
from lyapft.tasks.base import Query


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of a context and of the continuation that is scored after it; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def model_input(self, max_positions: int | None = None) -> tuple[int, ...]:
        """What the model reads: all but the last token, which is only predicted; the last `max_positions` of it."""
        ids = self.context + self.continuation[:-1]
        return ids if max_positions is None else ids[-max_positions:]


def encode_pairs(tokenizer: PreTrainedTokenizerBase, queries: Sequence[Query]) -> list[list[Pair]]:
    """Pairs of every choice of every query.

    The continuation's ids are those of the whole text beyond as many as the context alone has, and whitespace at the
    end of a context belongs to the continuation.

    Raises:
        InputError: a continuation without a token of its own, or an empty context and a tokenizer without bos and eos.
    """
    texts = [[_split(c, t) for c, t in zip(q.contexts, q.continuations, strict=True)] for q in queries]
    wanted = (
        text for choices in texts for context, continuation in choices for text in (context, context + continuation)
    )
    ids = encode(tokenizer, wanted)
    return [
        [_pair(tokenizer, ids, query, *choice) for choice in choices]
        for query, choices in zip(queries, texts, strict=True)
    ]


def encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Ids of each different text, special tokens as the tokenizer adds them, but no bos before one in the text."""
    prefix = prefix_id(tokenizer)
    bos = None if prefix is None else tokenizer.decode(prefix)
    groups: dict[bool, list[str]] = {True: [], False: []}
    for text in dict.fromkeys(texts):
        groups[bos is None or not text.startswith(bos)].append(text)
    ids: dict[str, tuple[int, ...]] = {}
    for special, group in groups.items():
        encoded = (
            tokenizer(group, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
            if group
            else []
        )
        ids |= dict(zip(group, map(tuple, encoded), strict=True))
    return ids


def prefix_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What stands in for an empty context: bos, else eos."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _split(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _pair(
    tokenizer: PreTrainedTokenizerBase, ids: dict[str, tuple[int, ...]], query: Query, context: str, continuation: str
) -> Pair:
    head, whole = ids[context], ids[context + continuation]
    where = f"{query.task}, {query.subset}, item {query.item_id}"
    if not context:
        if (prefix := prefix_id(tokenizer)) is None:
            raise InputError(
                f"{where}: the context is empty, and the tokenizer has no bos or eos for it. Use more shots."
            )
        head, whole = (prefix,), whole if whole[:1] == (prefix,) else (prefix, *whole)
    if len(whole) <= len(head):
        raise InputError(
            f"{where}: this tokenizer leaves no token of its own for {continuation!r} after its context, "
            "so it cannot be scored. Choose another tokenizer or task."
        )
    return Pair(head, whole[len(head) :])
