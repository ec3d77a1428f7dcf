"""The critic: V(s), the expected sum of rewards still to come, in each state of a response."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlkl.types import Batch

CriticKind = Literal["none", "head", "network"]


class Critic(nn.Module):
    """A linear head on hidden states: those of the policy, or of a backbone of the critic's own.

    The head starts at zero, so V = 0 at first: a random head gives gradient norms in the hundreds.
    """

    def __init__(self, lm: Any, own_backbone: bool) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(lm.base_model) if own_backbone else None
        weight = lm.get_output_embeddings().weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.head = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, T) V(s_t), zero outside the mask, and (B,) V after the last sampled token.

        hidden: (B, T+1, D) hidden states of the policy, or of this critic's own backbone.
        """
        values = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)
        last = values.gather(1, batch.attended.sum(1, keepdim=True)).squeeze(1)
        return values[:, :-1].masked_fill(~batch.mask, 0.0), last
