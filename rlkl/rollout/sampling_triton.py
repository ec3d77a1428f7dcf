"""Inverse-CDF sampling as a Triton kernel. Its twin in torch is rollout/one_pass.py.

One program works on one row. It reads the logits once and keeps the sum of each block in registers.
It then reads one block again: the one in which the cumulative sum passes the uniform. Sums are
float64, exponentials float32. Widths are compile-time constants (see logprobs/tile_triton.py).
"""

# pyright: reportArgumentType=false
# Its stubs want a tl.constexpr where a kernel is launched with a plain number.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SAMPLE = {"BLOCK": 4096, "num_warps": 16}


@triton.jit
def _block(X, column, inverse_temperature, WIDTH: tl.constexpr, READ: tl.constexpr):
    """A block of a row, -inf from WIDTH on.

    READ >= WIDTH is a multiple of 16 where the row has room, so that loads are 16 bytes wide.
    """
    x = tl.load(X + column, mask=column < READ, other=float("-inf"))
    return tl.where(column < WIDTH, x * inverse_temperature, float("-inf"))


@triton.jit
def inverse_cdf_kernel(
    X, stride_x, UNIFORMS, IDS, LOGPROBS, inverse_temperature,
    WIDTH: tl.constexpr, READ: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    inverse_temperature = tl.cast(inverse_temperature, tl.float32)  # torch.compile: float64
    row = tl.program_id(0).to(tl.int64)
    block, column = tl.arange(0, BLOCKS), tl.arange(0, BLOCK)
    # The maximum of each block, and its sum of exp(x - maximum).
    tops = tl.full((BLOCKS,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCKS,), tl.float64)
    for start in range(0, WIDTH, BLOCK):
        x = _block(X + row * stride_x, start + column, inverse_temperature, WIDTH, READ)
        top = tl.max(x, 0)
        e = tl.exp(x - tl.where(top == float("-inf"), 0.0, top))
        current = block == start // BLOCK
        tops = tl.where(current, top, tops)
        sums = tl.where(current, tl.sum(e.to(tl.float64), 0), sums)
    top = tl.max(tops, 0)
    sums *= tl.exp(tops - top).to(tl.float64)
    total = tl.sum(sums, 0)
    target = tl.load(UNIFORMS + row) * total

    # The block that holds the target. Never beyond the last one with any probability.
    last = tl.max(tl.where(sums > 0, block, 0), 0)
    sampled_block = tl.minimum(tl.sum((tl.cumsum(sums, 0) <= target).to(tl.int32), 0), last)
    rest = target - tl.sum(tl.where(block < sampled_block, sums, 0.0), 0)

    # The id within that block, in the same way.
    start = sampled_block * BLOCK
    x = _block(X + row * stride_x, start + column, inverse_temperature, WIDTH, READ)
    e = tl.exp(x - top).to(tl.float64)
    last = tl.max(tl.where(e > 0, column, 0), 0)
    index = tl.minimum(tl.sum((tl.cumsum(e, 0) <= rest).to(tl.int32), 0), last)
    logit = tl.sum(tl.where(column == index, x, 0.0), 0)
    tl.store(IDS + row, (start + index).to(tl.int64))
    tl.store(LOGPROBS + row, logit - top - tl.log(total).to(tl.float32))


def inverse_cdf(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(B,) ids, and their (B,) log-probs in nats under softmax(logits / temperature).

    logits: (B, V) float32, not yet divided by the temperature. uniforms: (B,).
    """
    ids = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    logprobs = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    width = logits.shape[1]
    options = SAMPLE | {"BLOCK": min(SAMPLE["BLOCK"], triton.next_power_of_2(width))}
    inverse_cdf_kernel[(len(logits),)](
        logits,
        logits.stride(0),
        uniforms.double().contiguous(),
        ids,
        logprobs,
        1 / temperature,
        WIDTH=width,
        READ=min(triton.cdiv(width, 16) * 16, max(logits.stride(0), width)),
        BLOCKS=triton.next_power_of_2(triton.cdiv(width, options["BLOCK"])),
        **options,
    )
    return ids, logprobs
