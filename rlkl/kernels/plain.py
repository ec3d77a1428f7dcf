"""The two functions on a tile of logits, in torch: into the running sums, and into ∂loss/∂logits.

rlkl/tiles.py calls them tile by tile; rlkl/kernels/logits.py has the same two in Triton. Per row, for logits z and
reference logits r, all after the temperature, over the columns seen so far:

    m = max z     s = Σ e^(z-m)       t = Σ e^(z-m) (z-m)     chosen = z[id]
    n = max r     q = Σ e^(r-n)       w = Σ e^(z-m) (z-r)     y = Σ e^(r-n) (r-z)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = -1e30  # stands for -inf, so that 0 · it is 0


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
