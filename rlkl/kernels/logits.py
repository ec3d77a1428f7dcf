"""Two kernels that read a tile of products once: into the running sums, and into ∂loss/∂products in its own place.

The same two functions as in plain.py, whose docstrings have the formulas. One program a row. Offsets of rows are
int64 (M · V exceeds 2³¹), rows lie on grid x (the others end at 65535). Widths are compile-time constants: that makes
the loads 16 bytes wide, and Triton 3.6's interpreter needs it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkl.kernels.plain import Caps, Finished, Functions, Sums, Upstream, Work

ACCUMULATE = {"BLOCK": 4096, "num_warps": 8}
ACCUMULATE_BOTH = {"BLOCK": 1024, "num_warps": 4}  # two logits an element: more columns spill registers
DLOGITS = {"BLOCK": 2048, "num_warps": 4}


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0  # needs no device library


@triton.jit
def _logits(
    x, bias, column, inside, scale, softcap, inverse_temperature, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr
):
    """A block of products → logits; -inf beyond the tile."""
    if HAS_BIAS:
        x += tl.load(bias + column, mask=inside, other=0.0)
    x *= scale
    if HAS_CAP:
        x = softcap * _tanh(x / softcap)
    return tl.where(inside, x * inverse_temperature, float("-inf"))


@triton.jit
def _weighted(e, x):
    """Σ e·x, where e = 0 counts 0 whatever x is."""
    return tl.sum(tl.where(e > 0, e * x, 0.0), 0)


@triton.jit
def accumulate_kernel(
    Z, stride_z, R, stride_r, IDS, INV_T, BIAS, REF_BIAS, M_, S_, T_, CHOSEN_, N_, Q_, W_, Y_,
    scale, softcap, ref_scale, ref_softcap,
    WIDTH: tl.constexpr, HAS_REF: tl.constexpr, HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    REF_CAP: tl.constexpr, REF_HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    inverse_temperature = tl.load(INV_T + row)
    m, s, t = tl.load(M_ + row), tl.load(S_ + row), tl.load(T_ + row)
    if HAS_REF:
        n, q, w, y = tl.load(N_ + row), tl.load(Q_ + row), tl.load(W_ + row), tl.load(Y_ + row)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        z = tl.load(Z + row * stride_z + column, mask=inside, other=0.0).to(tl.float32)
        z = _logits(z, BIAS, column, inside, scale, softcap, inverse_temperature, HAS_BIAS, HAS_CAP)
        m_new = tl.maximum(m, tl.max(z, 0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row of banned ids so far
        shift = tl.where(m == float("-inf"), 0.0, m - base)
        shrink = tl.exp(m - base)
        e = tl.exp(z - base)
        t = shrink * (t + shift * s) + _weighted(e, z - base)
        s = shrink * s + tl.sum(e, 0)
        m = m_new
        if HAS_REF:
            r = tl.load(R + row * stride_r + column, mask=inside, other=0.0).to(tl.float32)
            r = _logits(r, REF_BIAS, column, inside, ref_scale, ref_softcap, inverse_temperature, REF_HAS_BIAS, REF_CAP)
            n_new = tl.maximum(n, tl.max(r, 0))
            ref_base = tl.where(n_new == float("-inf"), 0.0, n_new)
            ref_shrink = tl.exp(n - ref_base)
            ref_e = tl.exp(r - ref_base)
            w = shrink * w + _weighted(e, z - r)
            y = ref_shrink * y + _weighted(ref_e, r - z)
            q = ref_shrink * q + tl.sum(ref_e, 0)
            n = n_new
    chosen = tl.load(IDS + row)
    if (chosen >= 0) & (chosen < WIDTH):
        x = tl.load(Z + row * stride_z + chosen).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(BIAS + chosen)
        x *= scale
        if HAS_CAP:
            x = softcap * _tanh(x / softcap)
        tl.store(CHOSEN_ + row, x * inverse_temperature)
    tl.store(M_ + row, m)
    tl.store(S_ + row, s)
    tl.store(T_ + row, t)
    if HAS_REF:
        tl.store(N_ + row, n)
        tl.store(Q_ + row, q)
        tl.store(W_ + row, w)
        tl.store(Y_ + row, y)


@triton.jit
def dlogits_kernel(
    Z, stride_z, R, stride_r, OUT, stride_out, IDS, INV_T, BIAS, REF_BIAS,
    LSE, ENTROPY, REF_LSE, KL, G_LOGPROBS, G_ENTROPY, G_KL_PI_REF, G_KL_REF_PI,
    scale, softcap, ref_scale, ref_softcap,
    WIDTH: tl.constexpr, HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr, REF_CAP: tl.constexpr,
    REF_HAS_BIAS: tl.constexpr, OF_LOGPROBS: tl.constexpr, OF_ENTROPY: tl.constexpr, OF_KL_PI_REF: tl.constexpr,
    OF_KL_REF_PI: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT may lie in the memory of Z, in a narrower dtype: blocks go left to right, each read before it is written."""
    row = tl.program_id(0).to(tl.int64)
    inverse_temperature, lse, chosen = tl.load(INV_T + row), tl.load(LSE + row), tl.load(IDS + row)
    constant, factor, g_logprobs = 0.0, 0.0, 0.0
    if OF_LOGPROBS:
        g_logprobs = tl.load(G_LOGPROBS + row)
        constant -= g_logprobs
    if OF_ENTROPY:
        g = tl.load(G_ENTROPY + row)
        constant -= g * tl.load(ENTROPY + row)
        factor -= g
    if OF_KL_PI_REF:
        g_kl_pi_ref = tl.load(G_KL_PI_REF + row)
        constant -= g_kl_pi_ref * tl.load(KL + row)
        factor += g_kl_pi_ref
    if OF_KL_REF_PI:
        g_kl_ref_pi = tl.load(G_KL_REF_PI + row)
        constant += g_kl_ref_pi
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        x = tl.load(Z + row * stride_z + column, mask=inside, other=0.0).to(tl.float32)
        z = _logits(x, BIAS, column, inside, scale, softcap, inverse_temperature, HAS_BIAS, HAS_CAP)
        logp = z - lse
        p = tl.exp(logp)
        c = constant + factor * logp
        if OF_KL_PI_REF or OF_KL_REF_PI:
            r = tl.load(R + row * stride_r + column, mask=inside, other=0.0).to(tl.float32)
            r = _logits(r, REF_BIAS, column, inside, ref_scale, ref_softcap, inverse_temperature, REF_HAS_BIAS, REF_CAP)
            logq = r - tl.load(REF_LSE + row)
            if OF_KL_PI_REF:
                c -= g_kl_pi_ref * logq
        d = tl.where(p > 0, p * c, 0.0)
        if OF_KL_REF_PI:
            d -= g_kl_ref_pi * tl.exp(logq)
        if OF_LOGPROBS:
            d += tl.where(column == chosen, g_logprobs, 0.0)
        d *= inverse_temperature * scale
        if HAS_CAP:
            y = z / (softcap * inverse_temperature)
            d *= tl.where(inside, 1.0 - y * y, 0.0)
        tl.debug_barrier()  # every thread has read its part of this block
        tl.store(OUT + row * stride_out + column, d.to(OUT.dtype.element_ty), mask=inside)


def caps_arguments(caps: Caps, ref_caps: Caps, dummy: Tensor) -> tuple[dict, dict]:
    """Pointers and numbers of the two heads; and what is compiled in."""
    pointers = {"BIAS": dummy if caps.bias is None else caps.bias,
                "REF_BIAS": dummy if ref_caps.bias is None else ref_caps.bias,
                "scale": caps.scale, "softcap": caps.softcap or 0.0, "ref_scale": ref_caps.scale,
                "ref_softcap": ref_caps.softcap or 0.0}
    return pointers, {"HAS_CAP": caps.softcap is not None, "HAS_BIAS": caps.bias is not None,
                      "REF_CAP": ref_caps.softcap is not None, "REF_HAS_BIAS": ref_caps.bias is not None}


def fitted(options: dict, width: int) -> dict:
    return options | {"BLOCK": min(options["BLOCK"], triton.next_power_of_2(width))}


def accumulate(z: Tensor, r: Tensor | None, work: Work, sums: Sums) -> None:
    """Take a tile of products (and one of the reference's) into the sums."""
    dummy = sums.m
    pointers, compiled = caps_arguments(work.caps, work.ref_caps, dummy)
    has_ref = r is not None
    r, n, q, w, y = (r, sums.n, sums.q, sums.w, sums.y) if has_ref else (z, dummy, dummy, dummy, dummy)
    accumulate_kernel[(len(z),)](
        Z=z, stride_z=z.stride(0), R=r, stride_r=r.stride(0), IDS=work.ids, INV_T=work.inverse_temperature,
        M_=sums.m, S_=sums.s, T_=sums.t, CHOSEN_=sums.chosen, N_=n, Q_=q, W_=w, Y_=y, WIDTH=z.shape[1], HAS_REF=has_ref,
        **pointers, **compiled, **fitted(ACCUMULATE_BOTH if has_ref else ACCUMULATE, z.shape[1]))


def dlogits(z: Tensor, r: Tensor | None, work: Work, done: Finished, g: Upstream, dtype: torch.dtype) -> Tensor:
    """A tile of products → one of ∂loss/∂products of `dtype`, in the memory of the tile."""
    dummy = done.lse
    pointers, compiled = caps_arguments(work.caps, work.ref_caps, dummy)
    out = z.view(dtype)[:, : z.shape[1]]
    optional = (done.ref_lse, done.kl_pi_ref, g.logprobs, g.entropy, g.kl_pi_ref, g.kl_ref_pi)
    ref_lse, kl, *upstream = (dummy if x is None else x.contiguous() for x in optional)
    r = z if r is None else r
    dlogits_kernel[(len(z),)](
        Z=z, stride_z=z.stride(0), R=r, stride_r=r.stride(0), OUT=out, stride_out=out.stride(0), IDS=work.ids,
        INV_T=work.inverse_temperature, LSE=done.lse, ENTROPY=done.entropy, REF_LSE=ref_lse, KL=kl,
        G_LOGPROBS=upstream[0], G_ENTROPY=upstream[1], G_KL_PI_REF=upstream[2], G_KL_REF_PI=upstream[3],
        WIDTH=z.shape[1], OF_LOGPROBS=g.logprobs is not None, OF_ENTROPY=g.entropy is not None,
        OF_KL_PI_REF=g.kl_pi_ref is not None, OF_KL_REF_PI=g.kl_ref_pi is not None,
        **pointers, **compiled, **fitted(DLOGITS, z.shape[1]))
    return out


TRITON = Functions(accumulate, dlogits)
