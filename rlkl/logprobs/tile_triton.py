"""The two functions on a tile as Triton kernels: each reads a tile of products once.

They are those of tile_torch.py, whose docstrings have the formulas. One program works on one row.
Row offsets are int64, because M · V exceeds 2³¹. Rows lie on grid x, because y and z end at 65535.

WIDTH, the columns in memory, is a compile-time constant: that makes loads 16 bytes wide, and Triton
3.6's interpreter cannot loop to a number that it learns at run time. A kernel is compiled anew for
each width: `tile_for` sees to it that few occur. `valid`, the columns that are no padding, is an
argument at run time, and none that Triton specialises on: it would compile again where it is 1 or a
multiple of 16.
"""

# pyright: reportArgumentType=false
# Its stubs want a tl.constexpr where a kernel is launched with a plain number.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkl.logprobs.tile_torch import (
    LogitTransform,
    Sums,
    TileFunctions,
    TileInputs,
    Totals,
    Upstream,
)

ACCUMULATE = {"BLOCK": 4096, "num_warps": 8}
# Two logits an element: wider blocks would spill registers.
ACCUMULATE_BOTH = {"BLOCK": 1024, "num_warps": 4}
DLOGITS = {"BLOCK": 2048, "num_warps": 4}


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0  # needs no device library


@triton.jit
def _logits(
    x, bias, column, inside, scale, softcap, inv_t, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr
):
    """A block of products → logits after the temperature; any number in padding."""
    if HAS_BIAS:
        x += tl.load(bias + column, mask=inside, other=0.0)
    x *= scale
    if HAS_CAP:
        x = softcap * _tanh(x / softcap)
    return x * inv_t


@triton.jit
def _weighted(e, x):
    """Σ e·x, where e = 0 counts 0 whatever x is."""
    return tl.sum(tl.where(e > 0, e * x, 0.0), 0)


@triton.jit(do_not_specialize=["valid"])
def accumulate_kernel(
    Z, stride_z, R, stride_r, IDS, INV_T, BIAS, REF_BIAS, M_, S_, T_, TARGET_, N_, Q_, W_, Y_,
    scale, softcap, ref_scale, ref_softcap, valid,
    WIDTH: tl.constexpr, HAS_REF: tl.constexpr, HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    REF_CAP: tl.constexpr, REF_HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    inv_t = tl.load(INV_T + row)
    m, s, t = tl.load(M_ + row), tl.load(S_ + row), tl.load(T_ + row)
    if HAS_REF:
        n, q, w, y = tl.load(N_ + row), tl.load(Q_ + row), tl.load(W_ + row), tl.load(Y_ + row)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        z = tl.load(Z + row * stride_z + column, mask=inside, other=0.0).to(tl.float32)
        z = _logits(z, BIAS, column, inside, scale, softcap, inv_t, HAS_BIAS, HAS_CAP)
        z = tl.where(column < valid, z, float("-inf"))
        m_new = tl.maximum(m, tl.max(z, 0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # so far all ids may be banned
        shift = tl.where(m == float("-inf"), 0.0, m - base)
        shrink = tl.exp(m - base)
        e = tl.exp(z - base)
        t = shrink * (t + shift * s) + _weighted(e, z - base)
        s = shrink * s + tl.sum(e, 0)
        m = m_new
        if HAS_REF:
            r = tl.load(R + row * stride_r + column, mask=inside, other=0.0).to(tl.float32)
            r = _logits(
                r, REF_BIAS, column, inside, ref_scale, ref_softcap, inv_t,
                REF_HAS_BIAS, REF_CAP,
            )  # fmt: skip
            r = tl.where(column < valid, r, float("-inf"))
            n_new = tl.maximum(n, tl.max(r, 0))
            ref_base = tl.where(n_new == float("-inf"), 0.0, n_new)
            ref_shrink = tl.exp(n - ref_base)
            ref_e = tl.exp(r - ref_base)
            w = shrink * w + _weighted(e, z - r)
            y = ref_shrink * y + _weighted(ref_e, r - z)
            q = ref_shrink * q + tl.sum(ref_e, 0)
            n = n_new
    target = tl.load(IDS + row)
    if (target >= 0) & (target < valid):
        x = tl.load(Z + row * stride_z + target).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(BIAS + target)
        x *= scale
        if HAS_CAP:
            x = softcap * _tanh(x / softcap)
        tl.store(TARGET_ + row, x * inv_t)
    tl.store(M_ + row, m)
    tl.store(S_ + row, s)
    tl.store(T_ + row, t)
    if HAS_REF:
        tl.store(N_ + row, n)
        tl.store(Q_ + row, q)
        tl.store(W_ + row, w)
        tl.store(Y_ + row, y)


@triton.jit(do_not_specialize=["valid"])
def dlogits_kernel(
    Z, stride_z, R, stride_r, OUT, stride_out, IDS, INV_T, BIAS, REF_BIAS,
    LSE, ENTROPY, REF_LSE, KL, G_LOGPROBS, G_ENTROPY, G_KL_PI_REF, G_KL_REF_PI,
    scale, softcap, ref_scale, ref_softcap, valid,
    WIDTH: tl.constexpr, HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr, REF_CAP: tl.constexpr,
    REF_HAS_BIAS: tl.constexpr, OF_LOGPROBS: tl.constexpr, OF_ENTROPY: tl.constexpr,
    OF_KL_PI_REF: tl.constexpr, OF_KL_REF_PI: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT may lie in the memory of Z, in a narrower dtype.

    Blocks go from left to right, and each is read before it is written.
    """
    row = tl.program_id(0).to(tl.int64)
    inv_t, lse, target = tl.load(INV_T + row), tl.load(LSE + row), tl.load(IDS + row)
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
        z = _logits(x, BIAS, column, inside, scale, softcap, inv_t, HAS_BIAS, HAS_CAP)
        logp = z - lse
        p = tl.exp(logp)
        c = constant + factor * logp
        if OF_KL_PI_REF or OF_KL_REF_PI:
            r = tl.load(R + row * stride_r + column, mask=inside, other=0.0).to(tl.float32)
            r = _logits(
                r, REF_BIAS, column, inside, ref_scale, ref_softcap, inv_t,
                REF_HAS_BIAS, REF_CAP,
            )  # fmt: skip
            logq = r - tl.load(REF_LSE + row)
            if OF_KL_PI_REF:
                c -= g_kl_pi_ref * logq
        d = tl.where(p > 0, p * c, 0.0)
        if OF_KL_REF_PI:
            d -= g_kl_ref_pi * tl.exp(logq)
        if OF_LOGPROBS:
            d += tl.where(column == target, g_logprobs, 0.0)
        d *= inv_t * scale
        if HAS_CAP:
            y = z / (softcap * inv_t)
            d *= 1.0 - y * y
        d = tl.where(column < valid, d, 0.0)
        tl.debug_barrier()  # every thread has read its part of this block
        tl.store(OUT + row * stride_out + column, d.to(OUT.dtype.element_ty), mask=inside)


def accumulate(z: Tensor, r: Tensor | None, inputs: TileInputs, sums: Sums) -> None:
    """Add a tile of products (and one of the reference's) to the sums, in place."""
    has_ref = r is not None
    unused = sums.m  # a pointer that the kernel does not read
    ref_products = z if r is None else r
    accumulate_kernel[(len(z),)](
        Z=z,
        stride_z=z.stride(0),
        R=ref_products,
        stride_r=ref_products.stride(0),
        IDS=inputs.ids,
        INV_T=inputs.inverse_temperature,
        M_=sums.m,
        S_=sums.s,
        T_=sums.t,
        TARGET_=sums.target,
        N_=sums.n if has_ref else unused,
        Q_=sums.q if has_ref else unused,
        W_=sums.w if has_ref else unused,
        Y_=sums.y if has_ref else unused,
        valid=inputs.valid,
        WIDTH=z.shape[1],
        HAS_REF=has_ref,
        **transform_arguments(inputs.transform, inputs.ref_transform, unused),
        **launch_options(ACCUMULATE_BOTH if has_ref else ACCUMULATE, z.shape[1]),
    )


def dlogits(
    z: Tensor,
    r: Tensor | None,
    inputs: TileInputs,
    totals: Totals,
    g: Upstream,
    dtype: torch.dtype,
) -> Tensor:
    """A tile of products → ∂loss/∂products in `dtype`, in the memory of z."""
    unused = totals.lse  # a pointer that the kernel does not read

    def pointer(x: Tensor | None) -> Tensor:
        return unused if x is None else x

    out = z.view(dtype)[:, : z.shape[1]]
    ref_products = z if r is None else r
    dlogits_kernel[(len(z),)](
        Z=z,
        stride_z=z.stride(0),
        R=ref_products,
        stride_r=ref_products.stride(0),
        OUT=out,
        stride_out=out.stride(0),
        IDS=inputs.ids,
        INV_T=inputs.inverse_temperature,
        LSE=totals.lse,
        ENTROPY=totals.entropy,
        REF_LSE=pointer(totals.ref_lse),
        KL=pointer(totals.kl_pi_ref),
        G_LOGPROBS=pointer(g.logprobs),
        G_ENTROPY=pointer(g.entropy),
        G_KL_PI_REF=pointer(g.kl_pi_ref),
        G_KL_REF_PI=pointer(g.kl_ref_pi),
        valid=inputs.valid,
        WIDTH=z.shape[1],
        OF_LOGPROBS=g.logprobs is not None,
        OF_ENTROPY=g.entropy is not None,
        OF_KL_PI_REF=g.kl_pi_ref is not None,
        OF_KL_REF_PI=g.kl_ref_pi is not None,
        **transform_arguments(inputs.transform, inputs.ref_transform, unused),
        **launch_options(DLOGITS, z.shape[1]),
    )
    return out


def transform_arguments(own: LogitTransform, ref: LogitTransform, unused: Tensor) -> dict:
    """The kernel arguments for the two heads: pointers, numbers, and what is compiled in."""
    return {
        "BIAS": unused if own.bias is None else own.bias,
        "REF_BIAS": unused if ref.bias is None else ref.bias,
        "scale": own.scale,
        "softcap": own.softcap or 0.0,
        "ref_scale": ref.scale,
        "ref_softcap": ref.softcap or 0.0,
        "HAS_CAP": own.softcap is not None,
        "HAS_BIAS": own.bias is not None,
        "REF_CAP": ref.softcap is not None,
        "REF_HAS_BIAS": ref.bias is not None,
    }


def launch_options(options: dict, width: int) -> dict:
    """`options` with a block no wider than the tile needs."""
    return options | {"BLOCK": min(options["BLOCK"], triton.next_power_of_2(width))}


TRITON = TileFunctions(accumulate, dlogits, accumulate_overwrites=False)
