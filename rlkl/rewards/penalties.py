"""Penalties computed from the tokens of a response: for its length, and for repetition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlkl.errors import UserError
from rlkl.types import Batch, Example


def overlong(mask: Tensor, max_tokens: int, buffer: int) -> Tensor:
    """(B,) 0 down to -1 over the last `buffer` of `max_tokens` tokens, linear in the length.

    The soft overlong punishment of DAPO (arXiv:2503.14476, eq. 13).
    """
    return (max_tokens - buffer - mask.sum(1)).clamp(max=0) / buffer


def repetition(
    examples: Sequence[Example],
    responses: Sequence[str],
    batch: Batch,
    *,
    n: int = 20,
    coef: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) -coef · (1 - distinct n-grams / n-grams) of the response's tokens.

    Yeo et al. 2025, arXiv:2502.03373, app. C.2. 0 for a response shorter than n. Open-R1 counts
    words; tokens work for any language. Raises UserError unless n >= 1.
    """
    if n < 1:
        raise UserError(f"reward.n={n}: an n-gram has at least one token; set n >= 1")
    repeated = torch.tensor([repeated_fraction(ids, n) for ids in batch.responses()])
    return -coef * repeated.to(batch.mask.device), {}


def repeated_fraction(ids: Sequence[int], n: int) -> float:
    """The share of n-grams that are not distinct, from 0 to 1."""
    ngrams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
