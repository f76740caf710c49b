"""The oracles: both recurrences as float64 loops over tokens, differentiable, never optimised.

Where sequence_BL, the index of the sequence that each token belongs to, changes, the state starts anew from zero.

Letters: B batch, L tokens, D channels, N states, H heads, P head dim, G groups.
"""

import torch
from torch import Tensor

from lyapft.scan.packing import begins


def selective_scan(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    initial_state_BDN: Tensor | None = None,
    sequence_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t u_t B_t;  y_t = Σ_n C_{t,n} h_{t,n}, all in float64 (Gu & Dao 2024, eq. 2).

    Returns y_BLD and the last state h_BDN in float64.
    """
    u, delta, A, B, C = (tensor.double() for tensor in (u_BLD, delta_BLD, A_DN, B_BLN, C_BLN))
    zero = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    h = zero if initial_state_BDN is None else initial_state_BDN.double()
    anew = None if sequence_BL is None else begins(sequence_BL)
    outputs = []
    for t in range(u.shape[1]):
        if anew is not None:
            h = h.masked_fill(anew[:, t, None, None], 0.0)
        decay = torch.exp(delta[:, t, :, None] * A)
        h = decay * h + (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        outputs.append((h * C[:, t, None, :]).sum(-1))
    return torch.stack(outputs, dim=1), h


def ssd(
    x_BLHP: Tensor,
    delta_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    initial_state_BHPN: Tensor | None = None,
    sequence_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_tᵀ;  y_t = h_t C_t per head  (Dao & Gu 2024, eq. 1 and §3), all in float64.

    Head i uses group i // (H/G) of B and C. Returns y_BLHP and the last state h_BHPN in float64.
    """
    x, delta, A = x_BLHP.double(), delta_BLH.double(), A_H.double()
    heads = x.shape[2] // B_BLGN.shape[2]
    B, C = (tensor.double().repeat_interleave(heads, dim=2) for tensor in (B_BLGN, C_BLGN))
    zero = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    h = zero if initial_state_BHPN is None else initial_state_BHPN.double()
    anew = None if sequence_BL is None else begins(sequence_BL)
    outputs = []
    for t in range(x.shape[1]):
        if anew is not None:
            h = h.masked_fill(anew[:, t, None, None, None], 0.0)
        decay = torch.exp(delta[:, t] * A)[:, :, None, None]
        h = decay * h + (delta[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        outputs.append((h * C[:, t, :, None, :]).sum(-1))
    return torch.stack(outputs, dim=1), h
