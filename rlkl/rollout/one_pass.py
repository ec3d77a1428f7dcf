"""`pick` that reads the vocabulary once: the sums of tiles, then one tile again. In torch, or in Triton on CUDA."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor
from torch.nn import functional as F

from rlkl.rollout.sample import pick
from rlkl.types import Sampling

TILE = 64  # ids that are summed at once
TRITON = importlib.util.find_spec("triton") is not None


def one_pass(logits: Tensor, uniforms: Tensor, rule: Sampling) -> tuple[Tensor, Tensor]:
    """What `pick` gives, up to rounding at the edge between two ids. What only evaluation needs is left to `pick`."""
    if rule.temperature == 0 or rule.top_k or rule.top_p < 1 or rule.min_p:
        return pick(logits, uniforms, rule)
    logits = logits[:, : rule.vocab_size]
    if logits.is_cuda and logits.dtype == torch.float32 and TRITON:
        from rlkl.kernels.sampling import inverse_cdf as kernel

        return kernel(logits, uniforms, rule.temperature)
    return inverse_cdf(logits if rule.temperature == 1 else logits / rule.temperature, uniforms)


def inverse_cdf(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """(B, V), (B,) → the first id whose cumulated probability is above the uniform, and its log-prob, nats.

    Summed in float64, which mps has not.
    """
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp_()
    tiles = F.pad(weights, (0, -weights.shape[1] % TILE)).unflatten(1, (-1, TILE))
    sums = tiles.sum(-1, dtype=wide)
    total = sums.sum(-1)
    tile, rest = first_above(sums, uniforms.to(wide) * total)
    within = tiles.gather(1, tile[:, None, None].expand(-1, 1, TILE))[:, 0]
    ids = tile * TILE + first_above(within.to(wide), rest)[0]
    ids = ids.clamp_max(logits.shape[1] - 1)  # nan logits: let the loss report them
    return ids, (logits.gather(1, ids[:, None]) - top)[:, 0] - total.log().to(logits.dtype)


def first_above(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(B, n) and (B,) → the first index at which the sum of weights is above target, and target less the sum before it.

    A target that rounding put at the whole sum, or above, means the last index whose weight is not 0.
    """
    cdf = weights.cumsum(-1)
    whole = cdf[:, -1]
    target = torch.minimum(target, torch.nextafter(whole, torch.zeros_like(whole)))
    index = torch.searchsorted(cdf, target[:, None], right=True).clamp_max(weights.shape[1] - 1)
    return index[:, 0], target - F.pad(cdf, (1, 0)).gather(1, index)[:, 0]
