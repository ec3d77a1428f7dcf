"""Log-prob, entropy and exact KL without ever holding M × V logits: tiles of logits, each read once and thrown away.

Forward carries a few running sums per row from tile to tile; backward makes each tile again, turns it into
∂loss/∂logits in place, and multiplies it away. docs/logprobs.md has the formulas and a picture. `reference` in
logprobs.py is the specification; the two functions on a tile are in rlkl/kernels/, in torch and in Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlkl.kernels.plain import TORCH, Caps, Finished, Functions, Sums, Upstream, Work, finish
from rlkl.types import Head

TILE_BYTES = 2**29  # of float32 logits on a GPU: 8192 × 16384
TILE_BYTES_CPU = 2**23  # what the caches hold


class Shape(NamedTuple):
    """Rows and columns of a tile."""

    rows: int
    columns: int


# Products in at least float32, from operands that may be narrower
def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T, not rounded to the dtype of the operands."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.dtype == wide:
        return a @ b.T
    if a.is_cuda:
        return torch.mm(a, b.T, out_dtype=wide)
    return a.to(wide) @ b.to(wide).T


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in the dtype of total, rounded nowhere on the way."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


@dataclass
class Plan:
    """How an op is cut, and with what."""

    functions: Functions
    tile: Shape
    keep_bytes: int = 0  # of logits kept from forward to backward: their product is not made again
    pad: bool = False  # the last tile's rows too: all products have one shape, so a row's bits do not depend on company


def spans(size: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, size)) for i in range(0, size, step))


class Tiled(torch.autograd.Function):
    """(M, D) states, (V, D) unembedding, (M,) ids → log-prob, entropy and, with a reference, both KLs, (M,) each."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, inverse_temperature: Tensor,
                head: Head, ref_hidden: Tensor | None, ref_head: Head | None, plan: Plan) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.head, ctx.ref_head, ctx.plan, ctx.kept = head, ref_head, plan, {}
        sums, budget = Sums.start(len(hidden), hidden, ref_hidden is not None), plan.keep_bytes
        tensors = hidden, weight, bias, ids, inverse_temperature, ref_hidden
        for columns in spans(vocabulary(head), plan.tile.columns):
            for rows in spans(len(hidden), plan.tile.rows):
                z, r = products(ctx, tensors, rows, columns)
                size = z.numel() * z.element_size() * (1 if r is None else 2)
                if any(ctx.needs_input_grad[:3]) and size <= budget:
                    budget -= size
                    ctx.kept[rows.start, columns.start] = (z.clone(), None if r is None else r.clone())
                plan.functions.accumulate(z, r, work_of(ctx, tensors, rows, columns), sums[rows])
                del z, r  # before the next tile is made: one at a time
        done = finish(sums)
        ctx.save_for_backward(*tensors, *done)
        return done.logprobs, done.entropy, done.kl_pi_ref, done.kl_ref_pi

    @staticmethod
    @once_differentiable  # lse is taken as it was
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, done = ctx.saved_tensors[:6], Finished(*ctx.saved_tensors[6:])
        hidden, weight, bias = tensors[:3]
        g, plan = Upstream(*(None if x is None else x.to(done.lse.dtype) for x in upstream)), ctx.plan
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        if all(x is None for x in g):
            return (None,) * 9
        wide = done.lse.dtype
        d_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if for_hidden else None
        d_weight = torch.zeros_like(weight) if for_weight else None
        d_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if for_bias else None
        for columns in spans(vocabulary(ctx.head), plan.tile.columns):
            part = d_weight.new_zeros(weight[columns].shape, dtype=wide) if for_weight else None
            for rows in spans(len(hidden), plan.tile.rows):
                z, r = products(ctx, tensors, rows, columns, with_reference=g.of_kl)
                some = Finished(*(None if x is None else x[rows] for x in done))
                d = plan.functions.dlogits(z, r, work_of(ctx, tensors, rows, columns), some, g.of(rows), hidden.dtype)
                if for_bias:
                    d_bias[columns] += d.sum(0, dtype=wide)
                if for_hidden:
                    add_product(d_hidden[rows], d, weight[columns])
                if for_weight:
                    add_product(part, d.T, hidden[rows])
                del z, r, d
            if for_weight:
                d_weight[columns] = part.to(weight.dtype)  # rounded once
            del part
        found = d_hidden if d_hidden is None else d_hidden.to(hidden.dtype)
        return found, d_weight, None if d_bias is None else d_bias.to(bias.dtype), *(None,) * 6


def vocabulary(head: Head) -> int:
    """Columns that are not padding."""
    return min(len(head.weight), head.vocab_size or len(head.weight))


def products(ctx: Any, tensors: tuple, rows: slice, columns: slice, with_reference: bool = True
             ) -> tuple[Tensor, Tensor | None]:
    """hidden @ weight.T of a tile, and the reference's; kept ones as copies, as they will be overwritten."""
    hidden, weight, ref_hidden, ref_head = tensors[0], tensors[1], tensors[5], ctx.ref_head
    if (rows.start, columns.start) in ctx.kept:
        z, r = ctx.kept[rows.start, columns.start]
        return z.clone(), r.clone() if with_reference and r is not None else None
    height, size = rows.stop - rows.start, ctx.plan.tile.rows
    states = [hidden[rows]] if ref_hidden is None or not with_reference else [hidden[rows], ref_hidden[rows]]
    if ctx.plan.pad and height < size:
        states = [torch.cat([x, x.new_zeros(size - height, x.shape[1])]) for x in states]
    if len(states) == 1:
        return product(states[0], weight[columns])[:height], None
    if ref_head.weight is ctx.head.weight and ref_hidden.shape == hidden.shape:  # one product for both
        z, r = product(torch.cat(states), weight[columns]).chunk(2)
    else:
        z, r = product(states[0], weight[columns]), product(states[1], ref_head.weight[columns])
    return z[:height], r[:height]


def work_of(ctx: Any, tensors: tuple, rows: slice, columns: slice) -> Work:
    _, _, bias, ids, inverse_temperature, ref_hidden = tensors
    head, ref_head = ctx.head, ctx.ref_head
    caps = Caps(head.scale, head.softcap, None if bias is None else bias[columns].to(inverse_temperature.dtype))
    ref_caps = caps
    if ref_hidden is not None:
        ref_bias = None if ref_head.bias is None else ref_head.bias[columns].to(inverse_temperature.dtype)
        ref_caps = Caps(ref_head.scale, ref_head.softcap, ref_bias)
    return Work(ids[rows] - columns.start, inverse_temperature[rows], caps, ref_caps)


def tile_for(rows: int, columns: int, bytes_each: int, cuda: bool) -> Shape:
    """A tile of the byte budget, as square as multiples of 256 columns allow: both sides long keeps products fast."""
    budget = TILE_BYTES if cuda else TILE_BYTES_CPU
    height = min(rows, 8192 if cuda else 512)
    width = max(budget // (bytes_each * max(height, 1)) // 256 * 256, 256)
    return Shape(max(height, 1), min(width, columns))


def tiled(hidden: Tensor, head: Head, ids: Tensor, temperature: float | Tensor, ref_hidden: Tensor | None,
          ref_head: Head | None, functions: Functions = TORCH, tile: Shape | None = None, keep_bytes: int = 0,
          pad: bool = False) -> tuple[Tensor | None, ...]:
    """The op on its arguments: log-prob, entropy, KL(pi || ref), KL(ref || pi), or None without a reference."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    given = temperature if isinstance(temperature, Tensor) else hidden.new_full((), temperature, dtype=wide)
    temperatures = given.to(hidden.device, wide).expand(len(hidden))
    keep_bytes = keep_bytes if torch.is_grad_enabled() else 0
    tile = tile or tile_for(len(hidden), vocabulary(head), wide.itemsize, hidden.is_cuda)
    if ref_hidden is not None:
        ref_hidden = ref_hidden.detach()
    return Tiled.apply(hidden, head.weight, head.bias, ids, 1 / temperatures, head, ref_hidden, ref_head,
                       Plan(functions, tile, keep_bytes, pad))
