"""`pick` with one read of the vocabulary: sums of tiles, then the one tile that holds the token.

In torch, or on CUDA in Triton (sampling_triton.py). The engine samples with it.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor
from torch.nn import functional as F

from rlkl.rollout.sampling import first_above, pick, widest_float
from rlkl.types import SamplingParams

TILE = 64  # ids that are summed at once
HAS_TRITON = importlib.util.find_spec("triton") is not None


def one_pass(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The ids and log-probs of `pick`, up to rounding where a uniform falls between two ids.

    Greedy and truncated sampling, which only evaluation uses, call `pick` itself.
    """
    if params.temperature == 0 or params.top_k or params.top_p < 1 or params.min_p:
        return pick(logits, uniforms, params)
    logits = logits[:, : params.vocab_size]
    if logits.is_cuda and logits.dtype == torch.float32 and HAS_TRITON:
        from rlkl.rollout.sampling_triton import inverse_cdf as kernel

        return kernel(logits, uniforms, params.temperature)
    if params.temperature != 1:
        logits = logits / params.temperature
    return inverse_cdf(logits, uniforms)


def inverse_cdf(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """(B, V) logits, (B,) uniforms → (B,) ids and their (B,) log-probs in nats.

    The id is the first one whose cumulative probability is above the uniform. Sums over tiles are
    float64 (float32 on MPS).
    """
    wide = widest_float(logits.device)
    highest = logits.amax(-1, keepdim=True)
    weights = (logits - highest).exp_()
    tiles = F.pad(weights, (0, -weights.shape[1] % TILE)).unflatten(1, (-1, TILE))
    # A sum in float64 would copy the vocabulary. The weights are no more exact than their sum.
    tile_sums = tiles.sum(-1).to(wide)
    total = tile_sums.sum(-1)

    cdf = tile_sums.cumsum(-1)
    tile, target = first_above(cdf, uniforms.to(wide) * total)
    sum_before = F.pad(cdf, (1, 0)).gather(1, tile[:, None])[:, 0]
    chosen_tile = tiles.gather(1, tile[:, None, None].expand(-1, 1, TILE))[:, 0]
    cdf_inside = chosen_tile.to(wide).cumsum(-1)
    share = (target - sum_before) / tile_sums.gather(1, tile[:, None])[:, 0]  # of the tile, below
    column, _ = first_above(cdf_inside, share * cdf_inside[:, -1])
    ids = tile * TILE + column
    ids = ids.clamp_max(logits.shape[1] - 1)  # the last tile is padded
    shifted = (logits.gather(1, ids[:, None]) - highest)[:, 0]
    return ids, shifted - total.log().to(logits.dtype)
