"""The hot path: log-prob, entropy and exact KL of sampled tokens from final hidden states and the unembedding.

One signature, `token_logprobs`, three implementations: `reference`, plain torch, is the specification; `tiled` never
holds M × V logits, on any device; `fused` is `tiled` with Triton kernels, on CUDA. Rows are tokens: M = mask.sum() of
them, so padding never reaches this file.
"""

from __future__ import annotations

import importlib.util
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlkl.kernels.plain import TORCH, Functions
from rlkl.tiles import product, tiled, vocabulary
from rlkl.types import Head

LOGITS_BUDGET = 2**28  # bytes of logits up to which the plain way is the fast one
Backend = Literal["auto", "reference", "tiled", "fused"]


class TokenStats(NamedTuple):
    """(M,) each, nats, float32 (float64 for float64 states); None where it was not asked for."""

    logprobs: Tensor
    entropy: Tensor | None
    kl_pi_ref: Tensor | None
    kl_ref_pi: Tensor | None


def head_logits(hidden: Tensor, head: Head) -> Tensor:
    """(M, D) → (M, V) logits in float32, also from bf16 states: rounded logits cost 1–2 % per token in the ratio."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    sampling = hidden.is_cuda and not torch.is_grad_enabled()  # then without a float32 copy of the weights
    logits = product(hidden, head.weight) if sampling else hidden.to(wide) @ head.weight.to(wide).T
    logits = (logits if head.bias is None else logits + head.bias.to(wide)) * head.scale
    logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
    if vocabulary(head) < len(head.weight):
        logits = logits.masked_fill(torch.arange(len(head.weight), device=logits.device) >= head.vocab_size, -torch.inf)
    return logits


def token_logprobs(hidden: Tensor, head: Head, ids: Tensor, *, temperature: float | Tensor = 1.0,
        ref_hidden: Tensor | None = None, ref_head: Head | None = None, entropy: bool = True,
        backend: Backend = "auto", keep_bytes: int = 0) -> TokenStats:
    """What softmax(logits / temperature) says of `ids`; with a reference also both exact KLs over the vocabulary.

    hidden (M, D), ids (M,), temperature a number or (M,); ref_hidden (M, D'). Differentiable in hidden and head, not in
    the reference. `keep_bytes` of logits are kept for the backward pass, which then need not make them again.
    Raises ValueError on a backend that is not in BACKENDS, on one of ref_hidden and ref_head without the other, or on
    two vocabularies.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"token_logprobs: backend {backend!r}; choose auto, {', '.join(BACKENDS)}")
    if ref_hidden is not None or ref_head is not None:
        check_reference(head, ref_hidden, ref_head)
    run = BACKENDS[chosen(len(hidden), head) if backend == "auto" else backend]
    return run(hidden, head, ids, temperature, ref_hidden, ref_head, entropy, keep_bytes)


def check_reference(head: Head, ref_hidden: Tensor | None, ref_head: Head | None) -> None:
    if ref_hidden is None or ref_head is None:
        raise ValueError("token_logprobs: ref_hidden and ref_head come together")
    if vocabulary(ref_head) != vocabulary(head):
        raise ValueError(f"token_logprobs: vocabularies of {vocabulary(head)} and, in the reference, "
                         f"{vocabulary(ref_head)} ids: a KL between them would be infinite")


def chosen(rows: int, head: Head) -> str:
    """The backend of `auto`: plain where all logits fit the budget."""
    if rows * vocabulary(head) * 4 <= LOGITS_BUDGET:
        return "reference"
    triton = head.weight.is_cuda and head.weight.dtype != torch.float64 and importlib.util.find_spec("triton")
    return "fused" if triton else "tiled"


def reference(hidden: Tensor, head: Head, ids: Tensor, temperature, ref_hidden, ref_head, entropy, _) -> TokenStats:
    """The specification: hold all M × V logits."""
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature[:, None]
    logp = (head_logits(hidden, head) / temperature).log_softmax(-1)
    chosen = logp.gather(-1, ids[:, None]).squeeze(-1)
    h = -_expectation(logp, logp) if entropy else None
    if ref_head is None:
        return TokenStats(chosen, h, None, None)
    logp = logp[:, : vocabulary(head)]
    ref_logp = (head_logits(ref_hidden, ref_head) / temperature).log_softmax(-1).detach()[:, : vocabulary(head)]
    return TokenStats(chosen, h, _expectation(logp, logp - ref_logp), _expectation(ref_logp, ref_logp - logp))


def _expectation(logp: Tensor, x: Tensor) -> Tensor:
    """E_{a~p}[x(a)] per row, where an id of probability 0 counts 0 whatever x is there."""
    return (logp.exp() * x.masked_fill(logp == -torch.inf, 0.0)).sum(-1)


def in_tiles(hidden: Tensor, head: Head, ids: Tensor, temperature, ref_hidden, ref_head, entropy, keep_bytes,
             functions: Functions = TORCH) -> TokenStats:
    """One tile of logits at a time, and again in the backward pass."""
    found = TokenStats(
        *tiled(hidden, head, ids, temperature, ref_hidden, ref_head, functions=functions, keep_bytes=keep_bytes))
    return found if entropy else found._replace(entropy=None)


def fused(*args) -> TokenStats:
    """`in_tiles` with Triton."""
    from rlkl.kernels.logits import TRITON

    return in_tiles(*args, functions=TRITON)


BACKENDS = {"reference": reference, "tiled": in_tiles, "fused": fused}
