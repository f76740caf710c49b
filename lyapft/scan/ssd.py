"""Chunked state space duality (Mamba-2) as batched matrix products.

Letters: B batch, L tokens, H heads, P head dim, G groups (K = H/G heads share B and C), N states; C chunks of T tokens.

Inside a chunk the recurrence is attention with weights (C_i·B_j) exp(s_i - s_j) Δ_j, s the running sum of Δ A;
between chunks one state per head is carried (Dao & Gu 2024, §6). s is summed and subtracted in float64, so that one
large |ΔA| does not swallow the small ones that follow it, then rounded once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
_FORGET = -1e3  # added to ΔA where a sequence begins: its exponential is 0 in every float format


def chunked_ssd(
    x_BLHP: Tensor,
    delta_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    initial_BHPN: Tensor | None,
    chunk: int,
    begins_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_BLHP and the last state of h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_tᵀ, y_t = h_t C_t; differentiable."""
    batch, length, heads, _ = x_BLHP.shape
    groups = B_BLGN.shape[2]
    chunk = min(chunk, length)
    pad = -length % chunk
    parts = (length + pad) // chunk

    def split(tensor: Tensor, *last: int) -> Tensor:  # (B,L,H or G,...) -> (B,C,G,K or 1,T,...)
        if pad:
            tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, pad))
        return tensor.reshape(batch, parts, chunk, groups, -1, *last).movedim(2, 4)

    x = split(x_BLHP * delta_BLH[..., None], x_BLHP.shape[3])
    B, C = split(B_BLGN, B_BLGN.shape[3]), split(C_BLGN, C_BLGN.shape[3])
    log_decay = delta_BLH.double() * A_H.double()
    if begins_BL is not None:
        log_decay = log_decay + _FORGET * begins_BL[..., None]
    s = split(log_decay).cumsum(-1)  # (B,C,G,K,T), <= 0
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    decay = (s[..., :, None] - s[..., None, :]).to(x.dtype).masked_fill_(future, -torch.inf).exp_()
    y = (C @ B.transpose(-1, -2) * decay) @ x
    written = (x * (s[..., -1:] - s).to(x.dtype).exp()[..., None]).transpose(-1, -2) @ B  # (B,C,G,K,P,N)
    kept = s[..., -1].to(x.dtype).exp()[..., None, None]
    shape = written.shape[0], *written.shape[2:]
    state = written.new_zeros(shape) if initial_BHPN is None else initial_BHPN.reshape(shape)
    starts = []
    for part in range(parts):
        starts.append(state)
        state = torch.addcmul(written[:, part], kept[:, part], state)
    y = y + (C * s.to(x.dtype).exp()[..., None]) @ torch.stack(starts, dim=1).transpose(-1, -2)
    y = y.movedim(4, 2).reshape(batch, length + pad, heads, -1)[:, :length].contiguous()
    return y, state.reshape(batch, heads, *shape[-2:])
