"""The specification of `token_logprobs`: plain torch that holds all M × V logits.

It imports nothing of the faster implementations, which are tested against it. Rows are tokens, M of
them: padding never reaches this package.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlkl.types import Head


class TokenStats(NamedTuple):
    """(M,) each, in nats, float32 (float64 for float64 states). None where it was not requested."""

    logprobs: Tensor
    entropy: Tensor | None
    kl_pi_ref: Tensor | None
    kl_ref_pi: Tensor | None


def reference_logprobs(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    temperature: float | Tensor,
    ref_hidden: Tensor | None,
    ref_head: Head | None,
    entropy: bool,
    keep_bytes: int = 0,  # not used: autograd keeps all logits here
) -> TokenStats:
    """Log-prob of `ids` (M,), entropy, and with a reference both exact KLs, each (M,)."""
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature[:, None]
    logp = (logits(hidden, head) / temperature).log_softmax(-1)
    logprobs = logp.gather(-1, ids[:, None]).squeeze(-1)
    stats = TokenStats(logprobs, -_expectation(logp, logp) if entropy else None, None, None)
    if ref_hidden is None or ref_head is None:
        return stats

    logp = logp[:, : vocabulary(head)]
    ref_logp = (logits(ref_hidden, ref_head) / temperature).log_softmax(-1).detach()
    ref_logp = ref_logp[:, : vocabulary(head)]
    return stats._replace(
        kl_pi_ref=_expectation(logp, logp - ref_logp),
        kl_ref_pi=_expectation(ref_logp, ref_logp - logp),
    )


def logits(hidden: Tensor, head: Head) -> Tensor:
    """(M, D) → (M, V) logits, at least float32: bf16 logits cost 1–2 % per token in the ratio."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return logits_of_products(hidden.to(wide) @ head.weight.to(wide).T, head)


def head_logits(hidden: Tensor, head: Head) -> Tensor:
    """(M, D) → (M, V) logits, at least float32.

    For sampling: without gradients, CUDA needs no float32 copy of the unembedding.
    """
    if torch.is_grad_enabled():
        return logits(hidden, head)
    return logits_of_products(product(hidden, head.weight), head)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T in at least float32, not rounded to a narrower dtype of the operands."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.dtype == wide:
        return a @ b.T
    if a.is_cuda:
        return torch.mm(a, b.T, out_dtype=wide)
    return a.to(wide) @ b.to(wide).T


def logits_of_products(products: Tensor, head: Head) -> Tensor:
    """(M, V) h @ W.T → (M, V) logits: bias, scale, soft-cap. Padding ids get -inf."""
    x = products if head.bias is None else products + head.bias.to(products.dtype)
    if head.scale != 1:
        x = x * head.scale
    if head.softcap is not None:
        x = head.softcap * torch.tanh(x / head.softcap)
    if vocabulary(head) < len(head.weight):
        ids = torch.arange(len(head.weight), device=x.device)
        x = x.masked_fill(ids >= vocabulary(head), -torch.inf)
    return x


def vocabulary(head: Head) -> int:
    """The number of ids that are not padding rows of the embedding."""
    return min(len(head.weight), head.vocab_size or len(head.weight))


def _expectation(logp: Tensor, x: Tensor) -> Tensor:
    """(M,) E_{a~p}[x(a)]. An id of probability 0 counts 0, also where x is infinite there."""
    return (logp.exp() * x.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
