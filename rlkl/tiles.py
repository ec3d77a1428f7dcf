"""Log-prob, entropy and exact KL without ever holding M × V logits: tiles of logits, each read once and thrown away.

Forward carries a few running sums per row from tile to tile; backward makes each tile again, turns it into
∂loss/∂logits in place, and multiplies it away. docs/logprobs.md has the formulas and a picture. `reference` in
logprobs.py is the specification; the two functions on a tile are here in torch, and in rlkl/kernels/ in Triton.

Per row, for logits z and reference logits r, all after the temperature, over the columns seen so far:

    m = max z     s = Σ e^(z-m)       t = Σ e^(z-m) (z-m)     chosen = z[id]
    n = max r     q = Σ e^(r-n)       w = Σ e^(z-m) (z-r)     y = Σ e^(r-n) (r-z)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlkl.types import Head

TILE_BYTES = 2**29  # of float32 logits on a GPU: 8192 × 16384
TILE_BYTES_CPU = 2**23  # what the caches hold
FLOOR = -1e30  # stands for -inf, so that 0 · it is 0


class Shape(NamedTuple):
    """Rows and columns of a tile."""

    rows: int
    columns: int


class Caps(NamedTuple):
    """What turns a product h @ W.T into logits: (x + bias) · scale, soft-capped, over the temperature."""

    scale: float
    softcap: float | None
    bias: Tensor | None  # (columns,) of this tile


@dataclass
class Sums:
    """The running sums of some rows, (M,) each, in float32 or float64."""

    m: Tensor
    s: Tensor
    t: Tensor
    chosen: Tensor
    n: Tensor | None = None
    q: Tensor | None = None
    w: Tensor | None = None
    y: Tensor | None = None

    @classmethod
    def start(cls, rows: int, like: Tensor, reference: bool) -> Sums:
        def full(value: float) -> Tensor:
            return torch.full((rows,), value, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))

        first = full(-torch.inf), full(0.0), full(0.0), full(-torch.inf)
        return cls(*first, *((full(-torch.inf), full(0.0), full(0.0), full(0.0)) if reference else ()))

    def __getitem__(self, rows: slice) -> Sums:
        return Sums(*(None if x is None else x[rows] for x in (getattr(self, f.name) for f in fields(self))))


class Finished(NamedTuple):
    """What the sums add up to, (M,) each."""

    lse: Tensor
    logprobs: Tensor
    entropy: Tensor
    ref_lse: Tensor | None
    kl_pi_ref: Tensor | None
    kl_ref_pi: Tensor | None


def finish(sums: Sums) -> Finished:
    """lse - ref_lse is taken as (m - n) + log(s/q): two large maxima cancel before they are rounded."""
    log_s = sums.s.log()
    lse, entropy = sums.m + log_s, log_s - sums.t / sums.s
    if sums.n is None:
        return Finished(lse, sums.chosen - lse, entropy, None, None, None)
    gap = (sums.m - sums.n) + (sums.s / sums.q).log()
    return Finished(
        lse, sums.chosen - lse, entropy, sums.n + sums.q.log(), sums.w / sums.s - gap, sums.y / sums.q + gap)


class Upstream(NamedTuple):
    """∂loss/∂output of some rows, (M,) each; None costs nothing."""

    logprobs: Tensor | None
    entropy: Tensor | None
    kl_pi_ref: Tensor | None
    kl_ref_pi: Tensor | None

    def of(self, rows: slice) -> Upstream:
        return Upstream(*(None if x is None else x[rows] for x in self))

    @property
    def of_kl(self) -> bool:
        return self.kl_pi_ref is not None or self.kl_ref_pi is not None


class Work(NamedTuple):
    """Everything a tile function needs to know of its rows and columns."""

    ids: Tensor  # (rows,) of the chosen tokens, counted from the tile's first column
    inverse_temperature: Tensor  # (rows,)
    caps: Caps
    ref_caps: Caps


# The two functions on a tile, in torch. They may overwrite the tiles they are given.
def capped(x: Tensor, caps: Caps, inverse_temperature: Tensor) -> Tensor:
    """Products → logits, in place."""
    if caps.bias is not None:
        x = x.add_(caps.bias).clamp_(min=FLOOR)  # a banned id
    if caps.softcap is not None:
        x = x.mul_(caps.scale / caps.softcap).tanh_().mul_(caps.softcap)
    elif caps.scale != 1:
        x = x.mul_(caps.scale)
    return x.mul_(inverse_temperature[:, None])


def accumulate(z: Tensor, r: Tensor | None, work: Work, sums: Sums) -> None:
    """Take a tile of products (and one of the reference's) into the sums."""
    z = capped(z, work.caps, work.inverse_temperature)
    inside = (work.ids >= 0) & (work.ids < z.shape[1])
    chosen = z.gather(1, work.ids.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)
    sums.chosen.copy_(torch.where(inside, chosen.masked_fill(chosen < FLOOR / 1e6, -torch.inf), sums.chosen))
    m = torch.maximum(sums.m, z.amax(1))
    shrink = (sums.m - m).exp()
    gap = None
    if r is not None:
        r = capped(r, work.ref_caps, work.inverse_temperature)
        n = torch.maximum(sums.n, r.amax(1))
        ref_shrink, gap = (sums.n - n).exp(), z - r
        e = r.sub_(n[:, None]).exp_()
        sums.q.mul_(ref_shrink).add_(e.sum(1))
        sums.y.mul_(ref_shrink).sub_(torch.linalg.vecdot(e, gap))
        sums.n.copy_(n)
    z = z.sub_(m[:, None])
    e = z.exp()
    shift = torch.where(sums.m == -torch.inf, 0.0, sums.m - m)
    sums.t.add_(sums.s * shift).mul_(shrink).add_(torch.linalg.vecdot(e, z))
    sums.s.mul_(shrink).add_(e.sum(1))
    if gap is not None:
        sums.w.mul_(shrink).add_(torch.linalg.vecdot(e, gap))
    sums.m.copy_(m)


def dlogits(z: Tensor, r: Tensor | None, work: Work, done: Finished, g: Upstream, dtype: torch.dtype) -> Tensor:
    """A tile of products → one of ∂loss/∂products, of `dtype`:  g_ℓ [j = id] + p_j (-g_ℓ - g_H (log p_j + H)
    + g_K (log p_j - log q_j - K) + g_R) - g_R q_j,  through temperature, soft-cap and scale."""
    z = capped(z, work.caps, work.inverse_temperature)
    slope = None
    if work.caps.softcap is not None:
        slope = 1 - (z / (work.caps.softcap * work.inverse_temperature[:, None])).square_()
    z = z.sub_(done.lse[:, None])  # log p
    p, q = z.exp(), None
    constant = torch.zeros_like(done.lse)
    if g.logprobs is not None:
        constant -= g.logprobs
    if g.entropy is not None:
        constant -= g.entropy * done.entropy
    if g.of_kl:
        r = capped(r, work.ref_caps, work.inverse_temperature).sub_(done.ref_lse[:, None])  # log q
        if g.kl_pi_ref is not None:
            constant -= g.kl_pi_ref * done.kl_pi_ref
        if g.kl_ref_pi is not None:
            constant += g.kl_ref_pi
            q = r.exp().mul_(g.kl_ref_pi[:, None])
    factor = None if g.entropy is None else -g.entropy
    if g.kl_pi_ref is not None:
        factor = g.kl_pi_ref if factor is None else factor + g.kl_pi_ref
    d = constant[:, None].expand_as(z).clone() if factor is None else z.mul_(factor[:, None]).add_(constant[:, None])
    if g.kl_pi_ref is not None:
        d.addcmul_(r, g.kl_pi_ref[:, None], value=-1)
    d.mul_(p)
    if q is not None:
        d.sub_(q)
    if g.logprobs is not None:
        inside = (work.ids >= 0) & (work.ids < d.shape[1])
        d.scatter_add_(1, work.ids.clamp(0, d.shape[1] - 1)[:, None], (g.logprobs * inside)[:, None])
    d.mul_((work.inverse_temperature * work.caps.scale)[:, None])
    return (d if slope is None else d.mul_(slope)).to(dtype)


class Functions(NamedTuple):
    """The two functions on a tile: torch's here, Triton's in rlkl/kernels/."""

    accumulate: Callable[[Tensor, Tensor | None, Work, Sums], None]
    dlogits: Callable[[Tensor, Tensor | None, Work, Finished, Upstream, torch.dtype], Tensor]


TORCH = Functions(accumulate, dlogits)


# Products in at least float32, from operands that may be narrower
def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b.T, not rounded to the dtype of the operands."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.dtype == wide:
        return torch.mm(a, b.T, out=out)
    if a.is_cuda:
        return torch.mm(a, b.T, out_dtype=wide, out=out)
    return torch.mm(a.to(wide), b.to(wide).T, out=out)


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

