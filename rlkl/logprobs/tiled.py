"""Log-prob, entropy and exact KL, one tile of logits at a time: M × V logits are never held.

Forward keeps a few running sums for each row. Backward computes each tile of logits again, turns it
into ∂loss/∂logits in place, and multiplies that into the gradients. docs/logprobs.md has the
formulas and a picture. reference.py is the specification; the two functions on a tile are in
tile_torch.py and tile_triton.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
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
# The columns of a product are a multiple of this where W has the rows: then every row of a tile can
# be read 16 bytes at a time, and 128 is the edge of a block of a matrix product.
ALIGNED = 128


class Shape(NamedTuple):
    """Rows and columns of a tile."""

    rows: int
    columns: int


@dataclass
class Plan:
    """How one call is cut into tiles, and what works on them."""

    functions: TileFunctions
    tile: Shape
    columns: int  # that are multiplied: the vocabulary and some padding
    keep_bytes: int = 0  # of logits, kept from forward to backward instead of computed again


class Operands(NamedTuple):
    """The tensors that both passes read."""

    hidden: Tensor  # (M, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    ids: Tensor  # (M,)
    inverse_temperature: Tensor  # (M,)
    ref_hidden: Tensor | None  # (M, D')

    def with_factors(self) -> Operands:
        """The same, with the states as products read them: cast once, not once a tile."""
        ref_hidden = None if self.ref_hidden is None else factor(self.ref_hidden)
        return self._replace(hidden=factor(self.hidden), ref_hidden=ref_hidden)


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
    columns = aligned_columns(head, ref_head)
    tile = tile or tile_for(len(hidden), columns, wide.itemsize, hidden.is_cuda)
    keep_bytes = keep_bytes if torch.is_grad_enabled() else 0
    with products_of_bf16(hidden.dtype):
        return Tiled.apply(
            hidden,
            head.weight,
            head.bias,
            ids,
            1 / temperature,
            head,
            None if ref_hidden is None else ref_hidden.detach(),
            ref_head,
            Plan(functions, tile, columns, keep_bytes),
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
        saved = Operands(hidden, weight, bias, ids, inverse_temperature, ref_hidden)
        operands = saved.with_factors()
        sums = Sums.start(len(hidden), hidden, reference=ref_hidden is not None)
        bytes_left = plan.keep_bytes if any(ctx.needs_input_grad[:3]) else 0
        for columns in column_spans(vocabulary(head), plan):
            weights = weight_slices(ctx, weight, columns)
            for rows in spans(len(hidden), plan.tile.rows):
                z, r = tile_products(operands, *weights, rows)
                size = z.nbytes * (1 if r is None else 2)
                if size <= bytes_left:
                    bytes_left -= size
                    copied = plan.functions.accumulate_overwrites
                    pair = (_copy(z), _copy(r)) if copied else (z, r)
                    ctx.kept[rows.start, columns.start] = pair
                inputs = tile_inputs(ctx, operands, rows, columns)
                plan.functions.accumulate(z, r, inputs, sums[rows])
                del z, r  # before the next tile is computed: one at a time
        totals = finish(sums)
        ctx.save_for_backward(*saved, *totals)
        return totals.logprobs, totals.entropy, totals.kl_pi_ref, totals.kl_ref_pi

    @staticmethod
    @once_differentiable  # the saved totals are constants here, so a second derivative is wrong
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(x is None for x in upstream):
            return (None,) * 9
        with products_of_bf16(ctx.saved_tensors[0].dtype):
            return *gradients_of_inputs(ctx, upstream), *(None,) * 6


def gradients_of_inputs(ctx: Any, upstream: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of hidden, weight and bias, where they are needed."""
    saved = ctx.saved_tensors
    hidden, weight, bias, *_ = saved
    operands = Operands(*saved[: len(Operands._fields)]).with_factors()
    totals = Totals(*saved[len(Operands._fields) :])
    wide = totals.lse.dtype
    g = Upstream(*(None if x is None else x.to(wide).contiguous() for x in upstream))
    d_hidden, d_weight, d_bias = memory_for_gradients(ctx, hidden, weight, bias, wide)
    # A slice of the weight's gradient is a sum over all rows. It needs no float32 buffer where
    # it is one product, or float32 itself.
    in_place = weight.dtype == wide or len(hidden) <= ctx.plan.tile.rows
    for columns in column_spans(vocabulary(ctx.head), ctx.plan):
        weights = weight_slices(ctx, weight, columns, with_reference=g.of_kl)
        d_weight_slice = None
        if d_weight is not None:
            d_weight_slice = d_weight[columns]
            if not in_place:
                d_weight_slice = torch.empty_like(d_weight_slice, dtype=wide)
        for rows in spans(len(hidden), ctx.plan.tile.rows):
            # Gone from `kept`, because dlogits overwrites it: a second backward pass computes
            # it again.
            kept = ctx.kept.pop((rows.start, columns.start), None)
            z, r = kept or tile_products(operands, *weights, rows)
            inputs = tile_inputs(ctx, operands, rows, columns)
            d = ctx.plan.functions.dlogits(
                z, r, inputs, totals.of(rows), g.of(rows), operands.hidden.dtype
            )
            if d_bias is not None:
                d_bias[columns] += d.sum(0, dtype=wide)
            if d_hidden is not None:
                add_product(d_hidden[rows], d, weights[0], first=columns.start == 0)
            if d_weight_slice is not None:
                add_product(d_weight_slice, d.T, operands.hidden[rows], first=rows.start == 0)
            del kept, z, r, d  # before the next tile is computed
        if d_weight is not None and d_weight_slice is not None and not in_place:
            d_weight[columns] = d_weight_slice  # rounded once
        del d_weight_slice
    if d_hidden is not None:
        d_hidden = d_hidden.to(hidden.dtype)
    if d_bias is not None:
        d_bias = d_bias.to(bias.dtype)
    return d_hidden, d_weight, d_bias


def _copy(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.clone()


def memory_for_gradients(
    ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, wide: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Memory for the gradients of hidden, weight and bias, where one is needed.

    Those of hidden and bias are sums over many tiles, in `wide`. The first product of each row of
    hidden and of the weight writes it; only the padding rows of the weight are set to 0 here.
    """
    for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
    d_hidden = d_weight = d_bias = None
    if for_hidden:
        d_hidden = torch.empty(hidden.shape, dtype=wide, device=hidden.device)
    if for_weight:
        d_weight = torch.empty_like(weight)
        written = vocabulary(ctx.head) if len(hidden) else 0
        d_weight[written:] = 0
    if for_bias and bias is not None:
        d_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device)
    return d_hidden, d_weight, d_bias


def weight_slices(
    ctx: Any, weight: Tensor, columns: slice, with_reference: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The policy's and the reference's rows of W for some columns: one tensor if W is the same."""
    own = factor(weight[columns])
    if ctx.ref_head is None or not with_reference:
        return own, None
    if ctx.ref_head.weight is ctx.head.weight:
        return own, own
    return own, factor(ctx.ref_head.weight[columns])


def tile_products(
    operands: Operands, weight: Tensor, ref_weight: Tensor | None, rows: slice
) -> tuple[Tensor, Tensor | None]:
    """hidden @ weight.T of a tile, and the reference's; both may be overwritten."""
    states, ref_hidden = operands.hidden[rows], operands.ref_hidden
    if ref_hidden is None or ref_weight is None:
        return product(states, weight), None
    if ref_weight is weight:  # one product for both
        z, r = product(torch.cat([states, ref_hidden[rows]]), weight).chunk(2)
        return z, r
    return product(states, weight), product(ref_hidden[rows], ref_weight)


def tile_inputs(ctx: Any, operands: Operands, rows: slice, columns: slice) -> TileInputs:
    """What the tile functions need beside the products."""
    inverse_temperature = operands.inverse_temperature
    transform = _transform(ctx.head, operands.bias, columns, inverse_temperature.dtype)
    ref_transform = transform
    if operands.ref_hidden is not None:
        ref_head = ctx.ref_head
        ref_transform = _transform(ref_head, ref_head.bias, columns, inverse_temperature.dtype)
    return TileInputs(
        operands.ids[rows] - columns.start,
        inverse_temperature[rows],
        transform,
        ref_transform,
        valid=min(vocabulary(ctx.head), columns.stop) - columns.start,
    )


def _transform(
    head: Head, bias: Tensor | None, columns: slice, dtype: torch.dtype
) -> LogitTransform:
    bias_of_tile = None if bias is None else bias[columns].to(dtype)
    return LogitTransform(head.scale, head.softcap, bias_of_tile)


@contextmanager
def products_of_bf16(dtype: torch.dtype) -> Iterator[None]:
    """Within this context a CPU multiplies float32 copies of bf16 numbers as what they are.

    It has no product of bf16 into float32. But oneDNN may round float32 factors to bf16, and sum in
    float32, about twice as fast. With copies of bf16 numbers nothing is lost; in the backward pass
    ∂loss/∂products is rounded, as on a GPU. The setting is the process's, so it is on only while we
    compute. dtype: of states and unembedding.
    """
    mkldnn: Any = torch.backends.mkldnn
    matmul = mkldnn.matmul
    before = matmul.fp32_precision
    if dtype == torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def factor(x: Tensor) -> Tensor:
    """x as products read it. A CPU has none of bf16 into float32: there it is at least float32."""
    return x if x.is_cuda else x.to(torch.promote_types(x.dtype, torch.float32))


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, or total = a @ b if it is the first: rounded once, to the dtype of total.

    A total narrower than float32 holds one product only.
    """
    beta = 0 if first else 1  # with 0, what lies in total is not read
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.is_cuda:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    else:
        total.copy_(a @ b)


def spans(size: int, step: int) -> Iterator[slice]:
    """Slices of at most `step` that cover range(size)."""
    return (slice(i, min(i + step, size)) for i in range(0, size, step))


def column_spans(vocabulary: int, plan: Plan) -> Iterator[slice]:
    """Slices of at most a tile's columns that cover the vocabulary; the last has padding too."""
    step = plan.tile.columns
    return (slice(i, min(i + step, plan.columns)) for i in range(0, vocabulary, step))


def aligned_columns(head: Head, ref_head: Head | None) -> int:
    """The vocabulary and as much padding as makes it a multiple of ALIGNED, where W has the rows.

    len(tokenizer) is often odd: 151,665 of the 151,936 rows of Qwen2.5. Where W itself ends at an
    odd id (50,257 in GPT-2), the last tile is odd too: right, but read 4 bytes at a time.
    """
    rows_of_weights = min(len(h.weight) for h in (head, ref_head) if h is not None)
    return min(math.ceil(vocabulary(head) / ALIGNED) * ALIGNED, rows_of_weights)


def tile_for(rows: int, columns: int, bytes_each: int, cuda: bool) -> Shape:
    """The tile for (rows, columns) logits: within the byte budget, both sides long.

    Long sides keep the matrix products fast. The columns are a power of two, or all: micro-batches
    have thousands of row counts, and Triton compiles its kernels anew for each number of columns.
    """
    budget = TILE_BYTES if cuda else TILE_BYTES_CPU
    height = max(min(rows, 8192 if cuda else 512), 1)
    affordable = budget // (bytes_each * height)
    power_of_two = 1 << (affordable.bit_length() - 1)
    return Shape(height, min(power_of_two, columns))
