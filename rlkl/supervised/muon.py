"""Muon in float32, for the tiny base model.

torch.optim.Muon computes in bfloat16, which is ten times slower on a CPU without it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is a matrix with singular values near 1 (Jordan et al. 2024).

    params: matrices. A step has the size of AdamW's (Liu et al. 2025, arXiv:2502.16982, eq. 4).
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Move each matrix along its orthogonalised Nesterov momentum."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                direction = orthogonalize(p.grad.lerp(state["momentum"], group["momentum"]))
                p.sub_(direction, alpha=0.2 * group["lr"] * max(p.shape) ** 0.5)


def orthogonalize(matrix: Tensor) -> Tensor:
    """About U V' of the matrix U S V': every singular value comes near 1.

    Five Newton-Schulz steps; their coefficients are those of Jordan et al.
    """
    x = matrix / matrix.norm().clamp_min(1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x
