"""Log-prob, entropy and exact KL, one tile of logits at a time: M × V logits are never held.

Forward keeps a few running sums for each row. Backward computes each tile of logits again, turns it
into ∂loss/∂logits in place, and multiplies that into the gradients. docs/logprobs.md has the
formulas and a picture. reference.py is the specification; the two functions on a tile are in
tile_torch.py and tile_triton.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlkl.logprobs.reference import product, vocabulary
from rlkl.logprobs.tile_torch import (
    TORCH,
    LogitTransform,
    Sums,
    TileFunctions,
    TileInputs,
    Totals,
    Upstream,
    finish,
)
from rlkl.types import Head

TILE_BYTES = 2**29  # of float32 logits on a GPU: 8192 × 16384
TILE_BYTES_CPU = 2**23  # what the caches hold


class Shape(NamedTuple):
    """Rows and columns of a tile."""

    rows: int
    columns: int


@dataclass
class Plan:
    """How one call is cut into tiles, and what works on them."""

    functions: TileFunctions
    tile: Shape
    keep_bytes: int = 0  # of logits, kept from forward to backward instead of computed again


class Operands(NamedTuple):
    """The tensors that both passes read."""

    hidden: Tensor  # (M, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    ids: Tensor  # (M,)
    inverse_temperature: Tensor  # (M,)
    ref_hidden: Tensor | None  # (M, D')


def tiled_logprobs(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    temperature: float | Tensor,
    ref_hidden: Tensor | None,
    ref_head: Head | None,
    functions: TileFunctions = TORCH,
    tile: Shape | None = None,
    keep_bytes: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(M,) each: log-prob, entropy, KL(pi || ref), KL(ref || pi); the KLs None without a reference.

    The arguments are those of `reference_logprobs`. tile, keep_bytes: see Plan.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if not isinstance(temperature, Tensor):
        temperature = hidden.new_full((), temperature, dtype=wide)
    temperature = temperature.to(hidden.device, wide).expand(len(hidden))
    tile = tile or tile_for(len(hidden), vocabulary(head), wide.itemsize, hidden.is_cuda)
    keep_bytes = keep_bytes if torch.is_grad_enabled() else 0
    return Tiled.apply(
        hidden,
        head.weight,
        head.bias,
        ids,
        1 / temperature,
        head,
        None if ref_hidden is None else ref_hidden.detach(),
        ref_head,
        Plan(functions, tile, keep_bytes),
    )


class Tiled(torch.autograd.Function):
    """The op of `tiled_logprobs`: differentiable once, in hidden, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        inverse_temperature: Tensor,
        head: Head,
        ref_hidden: Tensor | None,
        ref_head: Head | None,
        plan: Plan,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)  # an output outside the loss has no upstream gradient
        ctx.head, ctx.ref_head = head, ref_head
        ctx.plan = plan
        ctx.kept = {}  # (first row, first column) of a tile → its products
        operands = Operands(hidden, weight, bias, ids, inverse_temperature, ref_hidden)
        sums = Sums.start(len(hidden), hidden, reference=ref_hidden is not None)
        bytes_left = plan.keep_bytes if any(ctx.needs_input_grad[:3]) else 0
        for columns in spans(vocabulary(head), plan.tile.columns):
            for rows in spans(len(hidden), plan.tile.rows):
                z, r = tile_products(ctx, operands, rows, columns)
                size = z.nbytes * (1 if r is None else 2)
                if size <= bytes_left:
                    bytes_left -= size
                    ctx.kept[rows.start, columns.start] = _copy(z), _copy(r)
                inputs = tile_inputs(ctx, operands, rows, columns)
                plan.functions.accumulate(z, r, inputs, sums[rows])
                del z, r  # before the next tile is computed: one at a time
        totals = finish(sums)
        ctx.save_for_backward(*operands, *totals)
        return totals.logprobs, totals.entropy, totals.kl_pi_ref, totals.kl_ref_pi

    @staticmethod
    @once_differentiable  # the saved totals are constants here, so a second derivative is wrong
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(x is None for x in upstream):
            return (None,) * 9
        saved = ctx.saved_tensors
        operands = Operands(*saved[: len(Operands._fields)])
        totals = Totals(*saved[len(Operands._fields) :])
        hidden, weight = operands.hidden, operands.weight
        wide = totals.lse.dtype
        g = Upstream(*(None if x is None else x.to(wide) for x in upstream))
        d_hidden, d_weight, d_bias = _zero_gradients(ctx, operands, wide)
        for columns in spans(vocabulary(ctx.head), ctx.plan.tile.columns):
            d_weight_slice = None
            if d_weight is not None:
                d_weight_slice = d_weight.new_zeros(weight[columns].shape, dtype=wide)
            for rows in spans(len(hidden), ctx.plan.tile.rows):
                z, r = tile_products(ctx, operands, rows, columns, with_reference=g.of_kl)
                inputs = tile_inputs(ctx, operands, rows, columns)
                d = ctx.plan.functions.dlogits(
                    z, r, inputs, totals.of(rows), g.of(rows), hidden.dtype
                )
                if d_bias is not None:
                    d_bias[columns] += d.sum(0, dtype=wide)
                if d_hidden is not None:
                    add_product(d_hidden[rows], d, weight[columns])
                if d_weight_slice is not None:
                    add_product(d_weight_slice, d.T, hidden[rows])
                del z, r, d  # before the next tile is computed
            if d_weight is not None and d_weight_slice is not None:
                d_weight[columns] = d_weight_slice.to(weight.dtype)  # rounded once
            del d_weight_slice
        if d_hidden is not None:
            d_hidden = d_hidden.to(hidden.dtype)
        if d_bias is not None and operands.bias is not None:
            d_bias = d_bias.to(operands.bias.dtype)
        return d_hidden, d_weight, d_bias, *(None,) * 6


def _copy(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.clone()


def _zero_gradients(
    ctx: Any, operands: Operands, wide: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Zeros for hidden, weight and bias, where a gradient is needed.

    hidden and bias are summed over many tiles, in `wide`. The weight has its own dtype: each slice
    of it is summed elsewhere and written once.
    """
    hidden, weight, bias = operands.hidden, operands.weight, operands.bias
    for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
    d_hidden = d_weight = d_bias = None
    if for_hidden:
        d_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
    if for_weight:
        d_weight = torch.zeros_like(weight)
    if for_bias and bias is not None:
        d_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device)
    return d_hidden, d_weight, d_bias


def tile_products(
    ctx: Any, operands: Operands, rows: slice, columns: slice, with_reference: bool = True
) -> tuple[Tensor, Tensor | None]:
    """hidden @ weight.T of a tile, and the reference's; both may be overwritten."""
    hidden, weight, ref_hidden = operands.hidden, operands.weight, operands.ref_hidden
    if (rows.start, columns.start) in ctx.kept:
        z, r = ctx.kept[rows.start, columns.start]
        return z.clone(), _copy(r) if with_reference else None

    states = hidden[rows]
    if ref_hidden is None or not with_reference:
        return product(states, weight[columns]), None
    ref_states = ref_hidden[rows]
    same_head = ctx.ref_head.weight is ctx.head.weight and ref_hidden.shape == hidden.shape
    if same_head:  # one product for both
        z, r = product(torch.cat([states, ref_states]), weight[columns]).chunk(2)
    else:
        z = product(states, weight[columns])
        r = product(ref_states, ctx.ref_head.weight[columns])
    return z, r


def tile_inputs(ctx: Any, operands: Operands, rows: slice, columns: slice) -> TileInputs:
    """What the tile functions need beside the products."""
    inverse_temperature = operands.inverse_temperature
    transform = _transform(ctx.head, operands.bias, columns, inverse_temperature.dtype)
    ref_transform = transform
    if operands.ref_hidden is not None:
        ref_head = ctx.ref_head
        ref_transform = _transform(ref_head, ref_head.bias, columns, inverse_temperature.dtype)
    return TileInputs(
        operands.ids[rows] - columns.start, inverse_temperature[rows], transform, ref_transform
    )


def _transform(
    head: Head, bias: Tensor | None, columns: slice, dtype: torch.dtype
) -> LogitTransform:
    bias_of_tile = None if bias is None else bias[columns].to(dtype)
    return LogitTransform(head.scale, head.softcap, bias_of_tile)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in the dtype of total, without rounding to a narrower dtype on the way."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def spans(size: int, step: int) -> Iterator[slice]:
    """Slices of at most `step` that cover range(size)."""
    return (slice(i, min(i + step, size)) for i in range(0, size, step))


def tile_for(rows: int, columns: int, bytes_each: int, cuda: bool) -> Shape:
    """The tile for (rows, columns) logits: within the byte budget, in multiples of 256 columns.

    Both sides are long, which keeps the matrix products fast.
    """
    budget = TILE_BYTES if cuda else TILE_BYTES_CPU
    height = min(rows, 8192 if cuda else 512)
    width = max(budget // (bytes_each * max(height, 1)) // 256 * 256, 256)
    return Shape(max(height, 1), min(width, columns))
