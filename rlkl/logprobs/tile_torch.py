"""The two functions on a tile of logits, in torch: `accumulate` (forward), `dlogits` (backward).

tiled.py calls them tile by tile; tile_triton.py has the same two as Triton kernels. For each row,
with logits z and reference logits r, both after the temperature, over the columns seen so far:

    m = max z     s = Σ e^(z-m)       t = Σ e^(z-m) (z-m)     target = z[id]
    n = max r     q = Σ e^(r-n)       w = Σ e^(z-m) (z-r)     y = Σ e^(r-n) (r-z)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlkl.types import UNSET

FLOOR = -1e30  # stands for -inf, because 0 · -inf would be nan


class LogitTransform(NamedTuple):
    """What turns products h @ W.T into logits: (x + bias) · scale, then the soft-cap."""

    scale: float
    softcap: float | None
    bias: Tensor | None  # (columns,) of this tile


class TileInputs(NamedTuple):
    """What the tile functions need to know of a tile's rows and columns."""

    ids: Tensor  # (rows,) of the sampled tokens, counted from the tile's first column
    inverse_temperature: Tensor  # (rows,)
    transform: LogitTransform
    ref_transform: LogitTransform
    valid: int  # columns from here on are padding: probability and gradient 0


@dataclass
class Sums:
    """The running sums of some rows, (M,) each, in float32 or float64."""

    m: Tensor
    s: Tensor
    t: Tensor
    target: Tensor
    n: Tensor = UNSET  # this one and the rest only with a reference
    q: Tensor = UNSET
    w: Tensor = UNSET
    y: Tensor = UNSET

    @classmethod
    def start(cls, rows: int, like: Tensor, reference: bool) -> Sums:
        """The sums before the first tile. reference: also n, q, w and y."""
        dtype = torch.promote_types(like.dtype, torch.float32)

        def full(value: float) -> Tensor:
            return torch.full((rows,), value, device=like.device, dtype=dtype)

        sums = cls(m=full(-torch.inf), s=full(0.0), t=full(0.0), target=full(-torch.inf))
        if reference:
            sums.n = full(-torch.inf)
            sums.q = full(0.0)
            sums.w = full(0.0)
            sums.y = full(0.0)
        return sums

    def __getitem__(self, rows: slice) -> Sums:
        return Sums(**{name: x[rows] for name, x in vars(self).items() if x is not None})


class Totals(NamedTuple):
    """What the sums add up to over all columns, (M,) each, in nats."""

    lse: Tensor
    logprobs: Tensor
    entropy: Tensor
    ref_lse: Tensor = UNSET  # this one and the rest only with a reference
    kl_pi_ref: Tensor = UNSET
    kl_ref_pi: Tensor = UNSET

    def of(self, rows: slice) -> Totals:
        return Totals(**{name: x[rows] for name, x in self._asdict().items() if x is not None})


def finish(sums: Sums) -> Totals:
    """The totals of finished sums.

    lse - ref_lse is computed as (m - n) + log(s/q): two large maxima cancel before anything rounds.
    """
    log_s = sums.s.log()
    lse = sums.m + log_s
    logprobs = sums.target - lse
    entropy = log_s - sums.t / sums.s
    if sums.n is None:
        return Totals(lse, logprobs, entropy)
    ref_lse = sums.n + sums.q.log()
    gap = (sums.m - sums.n) + (sums.s / sums.q).log()
    return Totals(lse, logprobs, entropy, ref_lse, sums.w / sums.s - gap, sums.y / sums.q + gap)


class Upstream(NamedTuple):
    """∂loss/∂output of some rows, (M,) each; None where the loss does not use the output."""

    logprobs: Tensor | None
    entropy: Tensor | None
    kl_pi_ref: Tensor | None
    kl_ref_pi: Tensor | None

    def of(self, rows: slice) -> Upstream:
        return Upstream(*(None if x is None else x[rows] for x in self))

    @property
    def of_kl(self) -> bool:
        return self.kl_pi_ref is not None or self.kl_ref_pi is not None


def accumulate(z: Tensor, r: Tensor | None, inputs: TileInputs, sums: Sums) -> None:
    """Add a tile of products (and one of the reference's) to the sums, in place.

    z, r: (rows, columns), overwritten.
    """
    z = z[:, : inputs.valid]
    z = _to_logits(z, inputs.transform, inputs.inverse_temperature)
    inside = (inputs.ids >= 0) & (inputs.ids < z.shape[1])
    target = z.gather(1, inputs.ids.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)
    target = target.masked_fill(target < FLOOR / 1e6, -torch.inf)  # a banned id
    sums.target.copy_(torch.where(inside, target, sums.target))

    m = torch.maximum(sums.m, z.amax(1))
    shrink = (sums.m - m).exp()
    gap = None
    if r is not None:
        r = r[:, : inputs.valid]
        r = _to_logits(r, inputs.ref_transform, inputs.inverse_temperature)
        n = torch.maximum(sums.n, r.amax(1))
        ref_shrink = (sums.n - n).exp()
        gap = z - r
        e = r.sub_(n[:, None]).exp_()
        sums.q.mul_(ref_shrink).add_(e.sum(1))
        sums.y.mul_(ref_shrink).sub_(torch.linalg.vecdot(e, gap))
        sums.n.copy_(n)
    z = z.sub_(m[:, None])
    e = z.exp()
    shift = torch.where(sums.m == -torch.inf, 0.0, sums.m - m)  # no shift on the first tile
    sums.t.add_(sums.s * shift).mul_(shrink).add_(torch.linalg.vecdot(e, z))
    sums.s.mul_(shrink).add_(e.sum(1))
    if gap is not None:
        sums.w.mul_(shrink).add_(torch.linalg.vecdot(e, gap))
    sums.m.copy_(m)


def dlogits(
    z: Tensor,
    r: Tensor | None,
    inputs: TileInputs,
    totals: Totals,
    g: Upstream,
    dtype: torch.dtype,
) -> Tensor:
    """A tile of products → ∂loss/∂products (rows, columns) in `dtype`. z and r are overwritten.

    With upstream gradients g of log-prob, entropy, K = KL(pi || ref) and R = KL(ref || pi), for
    column j, and then through temperature, soft-cap and scale:

        g_logp [j = id] + p_j (-g_logp - g_H (log p_j + H) + g_K (log p_j - log q_j - K) + g_R)
        - g_R q_j
    """
    padding = z.shape[1] - inputs.valid
    z = z[:, : inputs.valid]
    z = _to_logits(z, inputs.transform, inputs.inverse_temperature)
    slope = None
    if inputs.transform.softcap is not None:
        softcap = inputs.transform.softcap
        slope = 1 - (z / (softcap * inputs.inverse_temperature[:, None])).square_()
    logp = z.sub_(totals.lse[:, None])
    p = logp.exp()

    constant = torch.zeros_like(totals.lse)  # terms that are the same in every column
    factor = None  # of log p_j
    if g.logprobs is not None:
        constant -= g.logprobs
    if g.entropy is not None:
        constant -= g.entropy * totals.entropy
        factor = -g.entropy
    logq: Tensor = UNSET  # of the reference
    q = None
    if r is not None and g.of_kl:
        logq = r[:, : inputs.valid]
        logq = _to_logits(logq, inputs.ref_transform, inputs.inverse_temperature)
        logq.sub_(totals.ref_lse[:, None])
    if g.kl_pi_ref is not None:
        constant -= g.kl_pi_ref * totals.kl_pi_ref
        factor = g.kl_pi_ref if factor is None else factor + g.kl_pi_ref
    if g.kl_ref_pi is not None:
        constant += g.kl_ref_pi
        q = logq.exp().mul_(g.kl_ref_pi[:, None])

    if factor is None:
        d = constant[:, None].expand_as(logp).clone()
    else:
        d = logp.mul_(factor[:, None]).add_(constant[:, None])
    if g.kl_pi_ref is not None:
        d.addcmul_(logq, g.kl_pi_ref[:, None], value=-1)
    d.mul_(p)
    if q is not None:
        d.sub_(q)
    if g.logprobs is not None:
        inside = (inputs.ids >= 0) & (inputs.ids < d.shape[1])
        columns = inputs.ids.clamp(0, d.shape[1] - 1)[:, None]
        d.scatter_add_(1, columns, (g.logprobs * inside)[:, None])
    d.mul_((inputs.inverse_temperature * inputs.transform.scale)[:, None])
    if slope is not None:
        d.mul_(slope)
    d = d.to(dtype)
    return pad(d, (0, padding)) if padding else d


def _to_logits(x: Tensor, transform: LogitTransform, inverse_temperature: Tensor) -> Tensor:
    """Products → logits after the temperature, in place."""
    if transform.bias is not None:
        bias = transform.bias[: x.shape[1]]
        x = x.add_(bias).clamp_(min=FLOOR)  # a bias of -inf bans an id
    if transform.softcap is not None:
        x = x.mul_(transform.scale / transform.softcap).tanh_().mul_(transform.softcap)
    elif transform.scale != 1:
        x = x.mul_(transform.scale)
    return x.mul_(inverse_temperature[:, None])


class TileFunctions(NamedTuple):
    """The two functions on a tile: torch's here, Triton's in tile_triton.py."""

    accumulate: Callable[[Tensor, Tensor | None, TileInputs, Sums], None]
    dlogits: Callable[[Tensor, Tensor | None, TileInputs, Totals, Upstream, torch.dtype], Tensor]
    accumulate_overwrites: bool  # z and r; dlogits may always


TORCH = TileFunctions(accumulate, dlogits, accumulate_overwrites=True)
