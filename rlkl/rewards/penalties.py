"""Penalties on the shape of a reply, by its tokens: too long, or saying the same again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlkl.types import Batch, Example


def overlong(mask: Tensor, max_tokens: int, buffer: int) -> Tensor:
    """(B,) from 0 to -1 over the last `buffer` tokens of the room: DAPO's soft overlong punishment (eq. 13)."""
    return (max_tokens - buffer - mask.sum(1)).clamp(max=0) / buffer


def repetition(examples: Sequence[Example], replies: Sequence[str], batch: Batch, *, n: int = 20, coef: float = 1.0
               ) -> tuple[Tensor, dict[str, Tensor]]:
    """-coef · (1 - distinct n-grams / n-grams) of the reply's tokens (Yeo et al. 2025, arXiv:2502.03373, app. C.2).

    0 for a reply shorter than n. Open-R1 counts words, we count tokens: any language, any tokenizer.
    """
    if n < 1:
        raise ValueError(f"reward.n={n}: an n-gram has at least one token")
    grams = [list(zip(*(reply[i:] for i in range(n)), strict=False)) for reply in batch.replies()]
    repeated = [1 - len(set(g)) / len(g) if g else 0.0 for g in grams]
    return -coef * torch.tensor(repeated, device=batch.mask.device), {}
