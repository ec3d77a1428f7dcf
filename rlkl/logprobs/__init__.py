"""The hot path: log-prob, entropy and exact KL of tokens, from hidden states and unembedding.

    reference.py    the specification: plain torch, all M × V logits at once
    tiled.py        never holds M × V logits: one tile at a time, forward and backward, any device
    tile_torch.py   the two functions on a tile, in torch
    tile_triton.py  the same two in Triton: the backend `fused` is `tiled` with them, on CUDA

Rows are tokens: M = mask.sum() of them, so padding never reaches this package.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor

from rlkl.logprobs.reference import TokenStats, reference_logprobs, vocabulary
from rlkl.logprobs.tile_torch import TORCH, TileFunctions
from rlkl.logprobs.tiled import tiled_logprobs
from rlkl.types import Head

LOGITS_BUDGET = 2**28  # bytes of logits up to which the reference is the fastest
Backend = Literal["auto", "reference", "tiled", "fused"]


def token_logprobs(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ref_hidden: Tensor | None = None,
    ref_head: Head | None = None,
    entropy: bool = True,
    backend: Backend = "auto",
    keep_bytes: int = 0,
) -> TokenStats:
    """Log-prob of `ids` and entropy under softmax(logits / temperature), (M,) each, in nats.

    hidden: (M, D). ids: (M,). temperature: a number, or (M,).
    ref_hidden (M, D') and ref_head: also return KL(pi || ref) and KL(ref || pi), summed over the
    whole vocabulary. The gradient goes to hidden and head, never to the reference.
    keep_bytes: how many bytes of logits to keep for the backward pass instead of computing them
    again.
    Raises ValueError on an unknown backend, on only one of ref_hidden and ref_head, and where the
    two vocabularies differ.
    """
    if backend != "auto" and backend not in BACKENDS:
        choices = ", ".join(BACKENDS)
        raise ValueError(f"token_logprobs: unknown backend {backend!r}; choose auto, {choices}")
    if ref_hidden is not None or ref_head is not None:
        check_reference(head, ref_hidden, ref_head)
    name = choose_backend(len(hidden), head) if backend == "auto" else backend
    return BACKENDS[name](hidden, head, ids, temperature, ref_hidden, ref_head, entropy, keep_bytes)


def check_reference(head: Head, ref_hidden: Tensor | None, ref_head: Head | None) -> None:
    """ValueError unless the reference is complete and has the policy's vocabulary."""
    if ref_hidden is None or ref_head is None:
        raise ValueError("token_logprobs: ref_hidden and ref_head come together")
    if vocabulary(ref_head) != vocabulary(head):
        raise ValueError(
            f"token_logprobs: the policy's vocabulary has {vocabulary(head)} ids, the reference's "
            f"{vocabulary(ref_head)}; a KL between them would be infinite"
        )


def choose_backend(rows: int, head: Head) -> str:
    """The backend of `auto`: reference where all logits fit the budget, else tiles.

    On a CPU tiles for bf16, whose products are fast only there.
    """
    slow_reference = head.weight.dtype == torch.bfloat16 and head.weight.device.type == "cpu"
    if rows * vocabulary(head) * 4 <= LOGITS_BUDGET and not slow_reference:
        return "reference"
    kernels_apply = head.weight.is_cuda and head.weight.dtype != torch.float64
    return "fused" if kernels_apply and importlib.util.find_spec("triton") else "tiled"


def in_tiles(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    temperature: float | Tensor,
    ref_hidden: Tensor | None,
    ref_head: Head | None,
    entropy: bool,
    keep_bytes: int,
    functions: TileFunctions = TORCH,
) -> TokenStats:
    """The backend `tiled`: one tile of logits at a time, computed again in the backward pass."""
    outputs = tiled_logprobs(
        hidden,
        head,
        ids,
        temperature,
        ref_hidden,
        ref_head,
        functions=functions,
        keep_bytes=keep_bytes,
    )
    stats = TokenStats(*outputs)
    return stats if entropy else stats._replace(entropy=None)


def fused(*args: Any) -> TokenStats:
    """The backend `fused`: `in_tiles` with the Triton kernels."""
    from rlkl.logprobs.tile_triton import TRITON

    return in_tiles(*args, functions=TRITON)


BACKENDS = {"reference": reference_logprobs, "tiled": in_tiles, "fused": fused}
