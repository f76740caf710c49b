"""How much a small change of a causal model's input or arithmetic grows: Mamba, hybrids and Transformers alike.

Letters: B batch, L tokens, V vocabulary, D hidden size, N residual blocks, K directions.

Everything is measured from outside, by hooks on the input embedding and on the residual blocks, so every causal model
of transformers serves. The model is evaluated without dropout and gradients, the random state of the process is not
touched, and no hook stays behind.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lyapft.errors import InputError
from lyapft.spectrum import load_forward_mode


class Growth(NamedTuple):
    """Deviations after a perturbation of one token's embedding; 0 before it.

    Attributes:
        logits_BL: ‖δ logits_t‖₂. hidden_NBL: ‖δ hidden_t‖₂ after every block.
    """

    logits_BL: Tensor
    hidden_NBL: Tensor


class Shadow(NamedTuple):
    """One batch and one set of weights in a number format against float32.

    Attributes:
        kl: mean over real tokens of KL(float32 ‖ format), nats per token.
        top1_agreement: share of real tokens whose likeliest next token is the same.
        deviation_N: ‖δ hidden‖ / ‖hidden‖ after every block, over real tokens.
    """

    kl: float
    top1_agreement: float
    deviation_N: Tensor


class Depth(NamedTuple):
    """Growth of K directions from block to block, nats per block.

    Attributes:
        blocks_NBK: log|R_ii| of each block, residual path included; its mean over N is the depth exponent.
        sublayers: name of a direct child of a block -> (B, K) log growth of the directions through that child alone.
    """

    blocks_NBK: Tensor
    sublayers: dict[str, Tensor]


class ClosedLoop(NamedTuple):
    """Greedy decoding from a perturbed prompt against the unperturbed one.

    Attributes:
        first_difference_B: new tokens before the first that differs; all of them if none does.
        agreement_B: share of new tokens that are the same.
    """

    first_difference_B: Tensor
    agreement_B: Tensor


def residual_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of every residual block, in order.

    Raises:
        InputError: no list of as many modules as the config has layers.
    """
    config: Any = model.config
    depth = config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return [(f"{name}.{index}", block) for index, block in enumerate(module)]
    raise InputError(
        f"{type(model).__name__} has no list of {depth} blocks: give a causal language model of transformers"
    )


def perturbation_growth(
    model: nn.Module, input_ids_BL: Tensor, mask_BL: Tensor, *, token: int, epsilon: float, seed: int = 0
) -> Growth:
    """Run the model with and without ε · (random unit vector) added to one token's embedding.

    Args:
        token: position of the perturbed token. epsilon: length of the perturbation. seed: of its direction.
    """
    logits, hidden = _run(model, input_ids_BL, attention_mask=mask_BL)
    with _perturbed(model, token, epsilon, seed):
        other_logits, other_hidden = _run(model, input_ids_BL, attention_mask=mask_BL)
    return Growth(
        torch.linalg.vector_norm(other_logits - logits, dim=-1), torch.linalg.vector_norm(other_hidden - hidden, dim=-1)
    )


def growth_rate(norms_BL: Tensor, mask_BL: Tensor, token: int) -> Tensor:
    """(B,) least-squares slope of log‖δ_t‖ over t > token, nats per token; tokens without a deviation are left out.

    >>> norms = torch.tensor([[0.0, 1.0, 0.5, 0.25, 0.125]])
    >>> growth_rate(norms, torch.ones(1, 5), token=1).exp()
    tensor([0.5000], dtype=torch.float64)
    """
    t = torch.arange(norms_BL.shape[1], dtype=torch.float64)
    used = (mask_BL.bool() & (norms_BL > 0) & (t >= token)).double()
    logs, count = norms_BL.double().clamp(min=1e-300).log(), used.sum(1, keepdim=True)
    centred_t = used * (t - (used * t).sum(1, keepdim=True) / count)
    return (centred_t * logs).sum(1) / (centred_t**2).sum(1)


def shadow(
    model: nn.Module,
    input_ids_BL: Tensor,
    mask_BL: Tensor,
    arithmetic: Callable[[], AbstractContextManager[Any]],
    *,
    full: Callable[[], AbstractContextManager[Any]] = nullcontext,
    weights: Mapping[str, Tensor] | None = None,
    **tokens: Tensor,
) -> Shadow:
    """The same batch in float32 and inside `arithmetic()`, an autocast or an emulation of a format.

    Args:
        full: makes the context of the float32 pass, where flags of the process would reduce it.
        weights: by name, those of the float32 pass, where the model stores them in half.
        tokens: what the model is told of the tokens instead of the mask, such as the position_ids of packed rows.
    """
    told: dict[str, Any] = tokens or {"attention_mask": mask_BL}
    with full():
        logits, hidden = _run(model, input_ids_BL, weights=weights, **told)
    with arithmetic():
        other_logits, other_hidden = _run(model, input_ids_BL, autocast=True, **told)
    real = mask_BL.bool()
    log_p, log_q = logits[real].log_softmax(-1), other_logits[real].log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    deviation = torch.linalg.vector_norm((other_hidden - hidden)[:, real], dim=(1, 2))
    size = torch.linalg.vector_norm(hidden[:, real], dim=(1, 2))
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean()
    return Shadow(float(kl), float(agreement), deviation / size)


def closed_loop(
    model: nn.Module, input_ids_BL: Tensor, *, token: int, epsilon: float, new_tokens: int, seed: int = 0
) -> ClosedLoop:
    """Decode greedily from prompts without padding, as they are and with ε · (random unit vector) on one embedding."""
    plain = _decode(model, input_ids_BL, new_tokens)
    with _perturbed(model, token, epsilon, seed):
        other = _decode(model, input_ids_BL, new_tokens)
    same = plain == other
    return ClosedLoop(same.long().cumprod(1).sum(1), same.double().mean(1))


def depth_exponents(
    model: nn.Module, input_ids_BL: Tensor, mask_BL: Tensor, *, directions: int, seed: int = 0
) -> Depth:
    """Push K random directions through the blocks by Jacobian-vector products, with QR after each (Benettin in depth).

    A direction is a change of the whole residual stream of a sequence, all tokens at once; what blocks get besides it
    (positions, masks) is held fixed.

    Raises:
        InputError: a block whose operations have no forward-mode rule, as those of compiled kernels.
    """
    calls: list[tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    handles = [
        block.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: calls.append((name, module, args, kwargs)), with_kwargs=True
        )
        for name, block in residual_blocks(model)
    ]
    with _removed(handles):
        _run(model, input_ids_BL, attention_mask=mask_BL)
    first = calls[0][2][0] if calls[0][2] else calls[0][3]["hidden_states"]
    real = mask_BL[..., None].to(first.dtype)
    generator = torch.Generator().manual_seed(seed)
    frame, _ = _orthonormal(torch.randn(directions, *first.shape, generator=generator, dtype=first.dtype) * real)
    logs: list[Tensor] = []
    sublayers: dict[str, Tensor] = {}
    load_forward_mode()
    for name, block, args, kwargs in calls:
        try:
            pushed, inner = _push(block, args, kwargs, frame)
        except (RuntimeError, NotImplementedError) as error:
            raise InputError(
                f"{name} cannot be differentiated in forward mode ({str(error).splitlines()[0]}):"
                " use the model's own kernels (kernel.name=stock, and experts_implementation='eager' for experts)"
            ) from error
        frame, log_R_BK = _orthonormal(pushed * real)
        logs.append(log_R_BK)
        sublayers |= {f"{name}.{child}": growth for child, growth in inner.items()}
    return Depth(torch.stack(logs), sublayers)


def _push(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], frame_KBLD: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The frame mapped by the block's Jacobian, and the growth through each direct child that maps tangents."""
    outputs, seen = [], []
    for direction in frame_KBLD:
        met: dict[str, tuple[Tensor, Tensor]] = {}
        handles = [child.register_forward_hook(_keep_tangents(name, met)) for name, child in block.named_children()]
        with _removed(handles), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_mode.dual_level():
            hidden = args[0] if args else kwargs["hidden_states"]
            dual = forward_mode.make_dual(hidden, direction)
            rest = kwargs if args else kwargs | {"hidden_states": dual}
            tangent = forward_mode.unpack_dual(_first(block(*(dual, *args[1:]) if args else (), **rest))).tangent
            outputs.append(torch.zeros_like(direction) if tangent is None else tangent)
        seen.append(met)
    growth = {}
    for name in seen[0]:
        entering, leaving = (torch.stack([met[name][side] for met in seen]) for side in (0, 1))
        growth[name] = _orthonormal(leaving)[1] - _orthonormal(entering)[1]
    return torch.stack(outputs), growth


def _keep_tangents(name: str, met: dict[str, tuple[Tensor, Tensor]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tensors = (args[0] if args else None, _first(output))
        if all(isinstance(tensor, Tensor) and tensor.dim() == 3 for tensor in tensors):
            pair = tuple(forward_mode.unpack_dual(tensor).tangent for tensor in tensors)
            if pair[0] is not None and pair[1] is not None:
                met[name] = pair

    return hook


def _orthonormal(frame_KBLD: Tensor) -> tuple[Tensor, Tensor]:
    """The frame with orthonormal directions per sequence, and log|R_ii|, (B, K), float64."""
    columns = frame_KBLD.double().flatten(2).permute(1, 2, 0)
    Q, R = torch.linalg.qr(columns)
    frame = Q.permute(2, 0, 1).reshape(frame_KBLD.shape).to(frame_KBLD.dtype)
    return frame, R.diagonal(dim1=1, dim2=2).abs().log()


def _run(
    model: nn.Module,
    input_ids_BL: Tensor,
    *,
    autocast: bool = False,
    weights: Mapping[str, Tensor] | None = None,
    **tokens: Any,
) -> tuple[Tensor, Tensor]:
    """Logits and the residual stream after every block (N, B, L, D), in float32 or wider.

    `weights`: by name, instead of the model's own.
    """
    hidden: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, args, output: hidden.append(_wide(_first(output))))
        for _, block in residual_blocks(model)
    ]
    full = nullcontext() if autocast else torch.autocast(input_ids_BL.device.type, enabled=False)
    with _removed(handles), _at_rest(model), full:
        out = functional_call(model, dict(weights or {}), (), {"input_ids": input_ids_BL, "use_cache": False, **tokens})
    return _wide(out.logits), torch.stack(hidden)


def _decode(model: nn.Module, input_ids_BL: Tensor, new_tokens: int) -> Tensor:
    with _at_rest(model):
        found = model.generate(  # type: ignore[operator]
            input_ids_BL,
            attention_mask=torch.ones_like(input_ids_BL),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )
    return found[:, input_ids_BL.shape[1] :]


@contextmanager
def _perturbed(model: nn.Module, token: int, epsilon: float, seed: int) -> Iterator[None]:
    """Add ε · (random unit vector) to one token of the first batch that is embedded."""
    done = False

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal done
        if done:  # a token that was decoded, not read
            return output
        done = True
        direction = torch.randn(output.shape[0], output.shape[-1], generator=torch.Generator().manual_seed(seed))
        direction = epsilon * nn.functional.normalize(direction, dim=-1)
        changed = output.clone()
        changed[:, token] += direction.to(output)
        return changed

    with _removed([model.get_input_embeddings().register_forward_hook(hook)]):  # type: ignore[operator]
        yield


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the modes of all modules and the random state come back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _removed(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
