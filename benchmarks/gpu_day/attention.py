"""Attention over shared prompts: padded parts against torch's variable-length flash attention.

Forward and backward of one layer's attention in bfloat16, at the heads of Qwen2.5. Errors are
relative 2-norms against the padded parts in float32. "rows" is what shared prompts replace: each
response is read with a copy of its prompt, padded behind. Its outputs are not compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from benchmarks.machine import clock, where
from rlkl.errors import first_line
from rlkl.policy.attention import attention_in_parts, flash_attention
from rlkl.policy.shared_prompts import SharedPrompts, share_prompts
from rlkl.types import Batch

GROUP = 8


class Work(NamedTuple):
    """GROUP responses to each prompt, and the heads that read them."""

    heads: int
    kv_heads: int
    head_size: int
    prompts: int = 8
    prompt: int = 512  # tokens; the shortest has half as many
    response: int = 512  # tokens; the shortest has 30 % of them


WORKS = {
    "0.5B": Work(14, 2, 64),
    "1.5B": Work(12, 2, 128),
    "tiny": Work(4, 2, 16, prompts=2, prompt=24, response=16),
}


def random_batch(work: Work, device: str) -> Batch:
    """A batch whose token ids are all different, but for prompts that are equal."""
    rng = torch.Generator().manual_seed(0)
    rows = work.prompts * GROUP
    lengths = (work.prompt * (0.5 + 0.5 * torch.rand(work.prompts, generator=rng))).long()
    responses = (work.response * (0.3 + 0.7 * torch.rand(rows, generator=rng))).long()
    prompt_mask = torch.arange(work.prompt) >= work.prompt - lengths[:, None]
    prompt_ids = torch.arange(prompt_mask.numel()).view(prompt_mask.shape)
    mask = torch.arange(work.response) < responses[:, None]
    response_ids = prompt_ids.numel() + torch.arange(mask.numel()).view(mask.shape)
    return Batch(
        prompt_ids=prompt_ids.repeat_interleave(GROUP, 0).to(device),
        prompt_mask=prompt_mask.repeat_interleave(GROUP, 0).to(device),
        response_ids=response_ids.to(device),
        mask=mask.to(device),
        sampler_logprobs=torch.zeros(mask.shape, device=device),
        truncated=torch.zeros(rows, dtype=torch.bool, device=device),
    )


class Operands(NamedTuple):
    """Queries, keys and values by token id, and the gradient of the outputs: (ids, heads, size)."""

    query: Tensor
    key: Tensor
    value: Tensor
    upstream: Tensor

    def of(self, ids: Tensor, dtype: torch.dtype) -> Operands:
        """Those of some tokens; the first three are leaves."""
        query, key, value, upstream = (x[ids].to(dtype) for x in self)
        leaves = (x.requires_grad_() for x in (query, key, value))
        return Operands(*leaves, upstream)


def operands(work: Work, ids: int, device: str) -> Operands:
    """Random operands, as bfloat16 holds them."""
    rng = torch.Generator(device).manual_seed(1)
    heads = (work.heads, work.kv_heads, work.kv_heads, work.heads)
    return Operands(
        *(
            torch.randn(ids, n, work.head_size, generator=rng, device=device).bfloat16()
            for n in heads
        )
    )


class Variant(NamedTuple):
    """One way to attend: (L, heads, size) of query, key, value → outputs of the query's shape."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ids: Tensor  # of the L tokens, or of the tokens of each row
    compared: bool = True


def with_repeated_keys(row: SharedPrompts, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`flash_attention` where torch does not let query heads share keys: before 2.12."""
    packed = row.packed
    assert packed is not None
    repeats = q.shape[1] // k.shape[1]
    has_window = "window_size" in signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if has_window else {"is_causal": True}
    out: Any = varlen_attn(
        q,
        k[packed.keys].repeat_interleave(repeats, 1),
        v[packed.keys].repeat_interleave(repeats, 1),
        packed.cu_seqlens_q,
        packed.cu_seqlens_k,
        packed.max_seqlen_q,
        packed.max_seqlen_k,
        **causal,
    )
    return out


def in_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in rows of prompt and response: (B, W, heads, size)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def variants(batch: Batch) -> dict[str, Variant]:
    """By name, with the padded parts first."""
    parts, flash = share_prompts(batch, flash=False), share_prompts(batch, flash=True)
    attended = torch.cat([batch.prompt_mask, batch.attended], 1)
    order = (~attended).int().argsort(dim=1, stable=True)[:, : int(attended.sum(1).max())]
    rows = torch.cat([batch.prompt_ids, batch.response_ids], 1).gather(1, order)

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_in_parts(q, k, v, parts, None, None)

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, flash, None, None)

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return with_repeated_keys(flash, q, k, v)

    return {
        "padded parts": Variant(padded, parts.ids[0]),
        "varlen flash": Variant(varlen, flash.ids[0]),
        "varlen flash, keys repeated": Variant(repeated, flash.ids[0]),
        "rows": Variant(in_rows, rows, compared=False),
    }


def outputs_and_gradients(variant: Variant, x: Operands, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients in float32, by token id; 0 where no token has the id."""
    leaves = x.of(variant.ids, dtype)
    out = variant.attend(leaves.query, leaves.key, leaves.value)
    out.backward(leaves.upstream)
    found = {"out": out, "dq": leaves.query.grad, "dk": leaves.key.grad, "dv": leaves.value.grad}
    by_id = {}
    for name, tensor in found.items():
        assert tensor is not None
        by_id[name] = tensor.new_zeros(len(x.query), *tensor.shape[1:], dtype=torch.float32)
        by_id[name][variant.ids] = tensor.detach().float()
    return by_id


def times(variant: Variant, x: Operands) -> tuple[float, float]:
    """Seconds of one forward and one backward pass."""
    leaves = x.of(variant.ids, torch.bfloat16)
    start = clock()
    out = variant.attend(leaves.query, leaves.key, leaves.value)
    middle = clock()
    out.backward(leaves.upstream)
    return middle - start, clock() - middle


def measure(work: Work, repetitions: int) -> dict[str, Any]:
    """Errors and times of each variant, or why it does not run. They take turns."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = random_batch(work, device)
    x = operands(work, int(batch.response_ids.max()) + 1, device)
    all_variants = variants(batch)
    truth = outputs_and_gradients(all_variants["padded parts"], x, torch.float32)
    rows: dict[str, dict[str, Any]] = {}
    for name, variant in all_variants.items():
        try:
            if variant.compared:
                found = outputs_and_gradients(variant, x, torch.bfloat16)
                rows[name] = {
                    key: float((found[key] - right).norm() / right.norm())
                    for key, right in truth.items()
                }
            else:
                times(variant, x)
                rows[name] = {}
        except Exception as error:  # a kernel may refuse a device or a torch in any way
            rows[name] = {"failed": first_line(error)[:200]}
    running = [name for name, row in rows.items() if "failed" not in row]
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
    for _ in range(repetitions):
        for name in running:
            seconds[name].append(times(all_variants[name], x))
    for name, pairs in seconds.items():
        rows[name]["forward"] = statistics.median(forward for forward, _ in pairs)
        rows[name]["backward"] = statistics.median(backward for _, backward in pairs)
    return {**work._asdict(), "tokens": len(all_variants["padded parts"].ids), "variants": rows}


def main() -> None:
    """Measure the works and write the results after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--works", nargs="+", choices=WORKS, default=["0.5B", "1.5B"])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    measured: dict[str, Any] = {**where("transformers"), "works": {}}
    for name in args.works:
        measured["works"][name] = measure(WORKS[name], args.repetitions)
        args.out.write_text(json.dumps(measured, indent=1) + "\n")
    print(json.dumps(measured["works"], indent=1))


if __name__ == "__main__":
    main()
