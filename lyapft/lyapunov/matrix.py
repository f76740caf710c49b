"""Recurrences whose one-step Jacobian is a matrix: S_t = J_t S_{t-1} + …, S with K rows and V columns.

Letters: B batch, L tokens, H heads, K key dim, V value dim. Every column of S sees the same J_t, so each exponent of
the product of K×K matrices has multiplicity V.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lyapft.lyapunov.tokens import real_tokens


@dataclass(frozen=True)
class MatrixJacobian:
    """J_t per head, and the closed forms that a family has for it.

    Attributes:
        J_BLHKK: one-step Jacobians of one column of the state.
        log_norm_BLH: log‖J_t‖₂ or, where there is no closed form, an upper bound of it.
        log_det_BLH: log|det J_t| of one column.
        multiplicity: columns V.
    """

    J_BLHKK: Tensor
    log_norm_BLH: Tensor
    log_det_BLH: Tensor
    multiplicity: int = 1

    def log_norm_BL(self) -> Tensor:
        """log‖J_t‖₂ of all heads together, or a bound of it."""
        return self.log_norm_BLH.amax(-1)

    def log_det_BL(self) -> Tensor:
        """log|det J_t| over all heads and columns."""
        return self.multiplicity * self.log_det_BLH.sum(-1)

    def exponents(self, mask_BL: Tensor) -> Tensor:
        """(B, H·K·V) finite-time exponents over real tokens by QR, float64, descending within a head.

        Raises:
            ValueError: a sequence without a real token.
        """
        log_R_BLHK = qr_logs(self.J_BLHKK, mask_BL)
        mean_BHK = log_R_BLHK.sum(1) / real_tokens(mask_BL)[:, None, None]
        return mean_BHK.sort(-1, descending=True).values.flatten(1).repeat_interleave(self.multiplicity, dim=1)

    def log_running_product(self, mask_BL: Tensor) -> Tensor:
        """(B, L, H) log‖J_t ⋯ J_1‖₂, float64: what a perturbation of the initial state can have grown to; above 0 for a
        while is transient growth. The product is kept at norm 1, its size as a log; padding leaves it as it is."""
        J, real = self.J_BLHKK.double(), mask_BL.bool()
        product = torch.eye(J.shape[-1], dtype=torch.float64, device=J.device).expand(J.shape[0], *J.shape[2:])
        log_size, sizes = torch.zeros(product.shape[:2], dtype=torch.float64, device=J.device), []
        for t in range(J.shape[1]):
            new = torch.where(real[:, t].reshape(-1, 1, 1, 1), J[:, t] @ product, product)
            norm = torch.linalg.matrix_norm(new, 2)
            log_size = log_size + norm.log()
            product = new / norm.clamp(min=torch.finfo(torch.float64).tiny)[..., None, None]
            sizes.append(log_size)
        return torch.stack(sizes, dim=1)


def qr_logs(J_BLHKK: Tensor, mask_BL: Tensor) -> Tensor:
    """log|diag R_t| of J_t Q_{t-1} = Q_t R_t, Q_0 = I, float64; 0 at padding, where Q stays.

    The sum of the first k over tokens is the log growth of the k-volume that the first k axes span.
    Source: Benettin et al. 1980.
    """
    J, real = J_BLHKK.double(), mask_BL.bool()
    eye = torch.eye(J.shape[-1], dtype=torch.float64, device=J.device)
    Q = eye.expand(J.shape[0], *J.shape[2:])
    logs = []
    for t in range(J.shape[1]):
        here = real[:, t].reshape(-1, 1, 1, 1)
        Q, R = torch.linalg.qr(torch.where(here, J[:, t] @ Q, Q))
        logs.append(torch.where(here[..., 0], R.diagonal(dim1=-2, dim2=-1).abs().log(), 0.0))
    return torch.stack(logs, dim=1)
