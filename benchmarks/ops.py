"""The ops that benchmarks/logprobs.py measures: rlkl's in all its modes, and the naive baseline."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlkl.logprobs import token_logprobs
from rlkl.logprobs.tile_torch import TORCH, LogitTransform, Sums, TileInputs, Upstream, finish
from rlkl.logprobs.tiled import spans
from rlkl.types import Head

# How many matrix products an op needs, relative to the three of (logits, dh, dw).
PLAIN = (1, 1, 1)
AGAIN = (2, 1, 1)  # the logits are computed again in the backward pass
TWO_HEADS = (2, 1, 1)  # and those of the reference
TWO_HEADS_AGAIN = (4, 1, 1)
KEEP_ALL = 2**62  # bytes of logits


class Inputs(NamedTuple):
    """One set of operands, of N rows. M of them are no padding; only `hidden` has the others."""

    hidden: Tensor  # (N, D), or (N, V) logits
    weight: Tensor | None  # (V, D)
    ids: Tensor  # (M,)
    ref_hidden: Tensor | None  # (M, D)
    ref_weight: Tensor | None  # (V, D)
    upstream: Tensor  # (3, M) random ∂loss/∂(log-prob, entropy, KL), float32
    kept: Tensor | None = None  # (M,) the rows of hidden that are no padding; None is all

    @property
    def rows(self) -> Tensor:
        """(M, D) the rows of hidden that are no padding."""
        return self.hidden if self.kept is None else self.hidden[self.kept]


Outputs = tuple[Tensor, ...]  # log-prob, entropy, KL(pi || ref): as many as the op has
Forward = Callable[[Inputs], Outputs]
Step = Callable[[Inputs, Callable[[], None]], tuple[Outputs, Outputs]]


class Op(NamedTuple):
    """An op: either a forward pass, or a whole `step`.

    A step returns outputs and gradients, and calls its second argument between the two.
    """

    name: str
    outputs: int  # 1: log-prob, 2: and entropy, 3: and KL(pi || ref)
    gemms: tuple[float, ...]  # products, relative to each of the ceilings
    forward: Forward | None = None
    step: Step | None = None
    frozen: bool = False  # no gradient of the head
    compiled: bool = False
    failed: str = ""  # why there is no such op here


def naive(outputs: int, wide: bool = False) -> Forward:
    """The baseline: all logits, in the dtype of the operands; or, where `wide`, in float32."""

    def log_softmax(hidden: Tensor, weight: Tensor | None) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        if wide:
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        return (hidden if weight is None else hidden @ weight.T).to(dtype).log_softmax(-1)

    def forward(x: Inputs) -> Outputs:
        logprobs = log_softmax(x.hidden, x.weight)
        results = [logprobs.gather(-1, x.ids[:, None]).squeeze(-1)]
        if outputs > 1:
            results.append(-(logprobs.exp() * logprobs).sum(-1))
        if outputs > 2:
            with torch.no_grad():
                ref_logprobs = log_softmax(x.ref_hidden, x.ref_weight)
            results.append((logprobs.exp() * (logprobs - ref_logprobs)).sum(-1))
        return tuple(results)

    return forward


def ours(outputs: int, backend: str, keep_bytes: int = 0) -> Forward:
    """rlkl's token_logprobs with one of its backends."""

    def forward(x: Inputs) -> Outputs:
        reference = {}
        if outputs > 2:
            reference = {"ref_hidden": x.ref_hidden, "ref_head": Head(x.ref_weight)}
        stats = token_logprobs(
            x.hidden,
            Head(x.weight),
            x.ids,
            entropy=outputs > 1,
            backend=backend,
            keep_bytes=keep_bytes,
            **reference,
        )
        return stats[:outputs]

    return forward


def in_chunks(forward: Forward, frozen: bool) -> Step:
    """Forward, loss and backward for a chunk of rows at a time, as in Policy.forward_in_chunks.

    So no chunk's logits are computed twice.
    """

    def step(x: Inputs, _: Callable[[], None]) -> tuple[Outputs, Outputs]:
        rows = x.rows
        leaf = rows.detach().requires_grad_()
        weight = x.weight.detach().requires_grad_(not frozen)
        chunks = []
        for chunk in spans(len(leaf), min(2048, max(len(leaf) // 4, 1))):
            ref_hidden = None if x.ref_hidden is None else x.ref_hidden[chunk]
            part = x._replace(
                hidden=leaf[chunk], weight=weight, ids=x.ids[chunk], ref_hidden=ref_hidden
            )
            outputs = forward(part)
            torch.autograd.backward(outputs, upstream_of(outputs, x.upstream[:, chunk]))
            chunks.append([y.detach() for y in outputs])
        joined = tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))
        gradient = leaf.grad
        if x.kept is not None:
            (gradient,) = torch.autograd.grad(rows, x.hidden, gradient)
        return joined, (gradient,) if frozen else (gradient, weight.grad)

    return step


def upstream_of(outputs: Outputs, upstream: Tensor) -> list[Tensor]:
    """The gradients of the loss in the outputs, in their dtypes."""
    return [g.to(y.dtype) for g, y in zip(upstream, outputs, strict=False)]


def on_a_tile(x: Inputs, mark: Callable[[], None]) -> tuple[Outputs, Outputs]:
    """rlkl's two functions on a tile, with all logits as the tile: the kernels without products."""
    logits = x.hidden.detach()
    if logits.is_cuda:
        from rlkl.logprobs.tile_triton import TRITON as functions
    else:
        functions = TORCH

    def tile() -> Tensor:
        return logits if logits.is_cuda else logits.float().clone()  # torch's overwrite their tile

    transform = LogitTransform(1.0, None, None)
    columns = logits.shape[1]
    work = TileInputs(x.ids, torch.ones_like(x.upstream[0]), transform, transform, columns)
    sums = Sums.start(len(logits), logits, reference=False)
    functions.accumulate(tile(), None, work, sums)
    done = finish(sums)
    mark()
    upstream = Upstream(x.upstream[0], x.upstream[1], None, None)
    dlogits = functions.dlogits(tile(), None, work, done, upstream, logits.dtype)
    return (done.logprobs, done.entropy), (dlogits,)


def own(logits: bool, dtype: str, device: str, compiled: bool) -> list[Op]:
    """rlkl's ops and the naive ones, for hidden states or for given logits."""
    if logits:
        return [
            Op("naive", 1, (1.5,), naive(1)),
            Op("naive", 2, (1.5,), naive(2)),
            Op("rlkl functions on a tile", 2, (1.5,), None, on_a_tile),
        ]
    ops = []
    for outputs in (1, 2, 3):
        ops += naive_ops(outputs, dtype, compiled)
        ops += rlkl_ops(outputs, device)
        if outputs > 1:
            ops += kept_logits_ops(outputs, device)
    return ops


def naive_ops(outputs: int, dtype: str, compiled: bool) -> list[Op]:
    """The baseline: as it is, with float32 logits, and compiled."""
    plain = TWO_HEADS if outputs == 3 else PLAIN
    ops = [Op("naive", outputs, plain, naive(outputs))]
    if outputs < 3 and dtype == "bfloat16":
        ops.append(Op("naive, float32 logits", outputs, plain, naive(outputs, wide=True)))
    ops.append(
        Op(
            "naive, torch.compile",
            outputs,
            plain,
            torch.compile(naive(outputs)) if compiled else None,
            compiled=True,
            failed="" if compiled else "not run without --compile",
        )
    )
    return ops


def rlkl_ops(outputs: int, device: str) -> list[Op]:
    """rlkl's backends."""
    plain = TWO_HEADS if outputs == 3 else PLAIN
    again = TWO_HEADS_AGAIN if outputs == 3 else AGAIN
    needs_cuda = "" if device == "cuda" else "needs CUDA"
    ops = []
    if outputs > 1:
        ops.append(Op("rlkl reference", outputs, plain, ours(outputs, "reference")))
    return [
        *ops,
        Op("rlkl tiled", outputs, again, ours(outputs, "tiled")),
        Op("rlkl fused", outputs, again, ours(outputs, "fused"), failed=needs_cuda),
    ]


def kept_logits_ops(outputs: int, device: str) -> list[Op]:
    """rlkl's ways not to compute logits twice, and ops with a head that is not trained."""
    plain = TWO_HEADS if outputs == 3 else PLAIN
    again = TWO_HEADS_AGAIN if outputs == 3 else AGAIN
    best = "fused" if device == "cuda" else "tiled"
    keeping = ours(outputs, best, KEEP_ALL)
    chunks = in_chunks(keeping, frozen=False)
    frozen_chunks = in_chunks(keeping, frozen=True)
    no_dw = (*plain[:2], 0)
    no_dw_again = (*again[:2], 0)
    frozen_name = f"rlkl {best}, frozen head"
    return [
        Op(f"rlkl {best}, kept logits", outputs, plain, keeping),
        Op(f"rlkl {best}, head chunks", outputs, plain, None, chunks),
        Op("naive, frozen head", outputs, no_dw, naive(outputs), frozen=True),
        Op(frozen_name, outputs, no_dw_again, ours(outputs, best), frozen=True),
        Op(f"{frozen_name}, head chunks", outputs, no_dw, None, frozen_chunks, frozen=True),
    ]


def step(op: Op, x: Inputs, mark: Callable[[], None]) -> tuple[Outputs, Outputs]:
    """Outputs and gradients of one op."""
    if op.step is not None:
        return op.step(x, mark)
    assert op.forward is not None, op.name
    weight = x.weight.detach() if op.frozen else x.weight
    outputs = tuple(op.forward(x._replace(hidden=x.rows, weight=weight, kept=None)))
    mark()
    leaves = [t for t in (x.hidden, weight) if t is not None and t.requires_grad]
    return outputs, torch.autograd.grad(outputs, leaves, upstream_of(outputs, x.upstream))
