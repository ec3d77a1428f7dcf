"""The ops that benchmarks/logprobs.py measures: rlkl's in all its modes, and the naive way that all are compared to."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlkl.kernels.plain import TORCH, Caps, Sums, Upstream, Work, finish
from rlkl.logprobs import token_logprobs
from rlkl.tiles import spans
from rlkl.types import Head

PLAIN, AGAIN = (1, 1, 1), (2, 1, 1)  # products: logits once, or again in the backward pass


class Inputs(NamedTuple):
    """One set of operands. `kept` are the rows of hidden that are no padding; everything else has those only."""

    hidden: Tensor  # (N, D), or (N, V) logits
    weight: Tensor | None  # (V, D)
    ids: Tensor
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    upstream: Tensor  # (3, M) random ∂loss/∂(log-prob, entropy, KL), float32
    kept: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        return self.hidden if self.kept is None else self.hidden[self.kept]


Outputs = tuple[Tensor, ...]  # log-prob, entropy, KL(pi || ref): as many as the op has
Forward = Callable[[Inputs], Outputs]
Step = Callable[[Inputs, Callable[[], None]], tuple[Outputs, Outputs]]


class Op(NamedTuple):
    """`step` makes outputs and gradients and calls its argument between the two; without one `forward` is enough."""

    name: str
    outputs: int  # 1: log-prob, 2: and entropy, 3: and KL(pi || ref)
    gemms: tuple[float, ...]  # how many products it needs, of each of the ceilings
    forward: Forward | None = None
    step: Step | None = None
    frozen: bool = False  # no gradient of the head
    compiled: bool = False
    failed: str = ""  # why there is no such op here


def naive(outputs: int, wide: bool = False) -> Forward:
    """What one writes down: logits in the dtype of the operands, or in float32 from them."""
    def log_softmax(hidden: Tensor, weight: Tensor | None) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        if wide:
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        return (hidden if weight is None else hidden @ weight.T).to(dtype).log_softmax(-1)

    def forward(x: Inputs) -> Outputs:
        logp = log_softmax(x.hidden, x.weight)
        found = [logp.gather(-1, x.ids[:, None]).squeeze(-1)]
        if outputs > 1:
            found.append(-(logp.exp() * logp).sum(-1))
        if outputs > 2:
            with torch.no_grad():
                ref_logp = log_softmax(x.ref_hidden, x.ref_weight)
            found.append((logp.exp() * (logp - ref_logp)).sum(-1))
        return tuple(found)

    return forward


def ours(outputs: int, backend: str, keep_bytes: int = 0) -> Forward:
    def forward(x: Inputs) -> Outputs:
        reference = {"ref_hidden": x.ref_hidden, "ref_head": Head(x.ref_weight)} if outputs > 2 else {}
        found = token_logprobs(x.hidden, Head(x.weight), x.ids, entropy=outputs > 1, backend=backend,
                               keep_bytes=keep_bytes, **reference)
        return found[:outputs]

    return forward


def in_chunks(forward: Forward, frozen: bool) -> Step:
    """Forward, loss and backward per chunk of rows, as Policy.in_head_chunks does: no chunk's logits are made twice."""
    def step(x: Inputs, _: Callable[[], None]) -> tuple[Outputs, Outputs]:
        whole, found = x.rows, []
        leaf, weight = whole.detach().requires_grad_(), x.weight.detach().requires_grad_(not frozen)
        for rows in spans(len(leaf), min(2048, max(len(leaf) // 4, 1))):
            ref_hidden = None if x.ref_hidden is None else x.ref_hidden[rows]
            part = forward(x._replace(hidden=leaf[rows], weight=weight, ids=x.ids[rows], ref_hidden=ref_hidden))
            torch.autograd.backward(part, [g[rows].to(y.dtype) for g, y in zip(x.upstream, part, strict=False)])
            found.append([y.detach() for y in part])
        grad = leaf.grad if x.kept is None else torch.autograd.grad(whole, x.hidden, leaf.grad)[0]
        return tuple(map(torch.cat, zip(*found, strict=True))), (grad,) if frozen else (grad, weight.grad)

    return step


def on_a_tile(x: Inputs, mark: Callable[[], None]) -> tuple[Outputs, Outputs]:
    """The two functions on a tile, with the logits as the tile: the kernels without the products."""
    z, copies = x.hidden.detach(), not x.hidden.is_cuda  # the ones in torch overwrite what they are given
    if copies:
        functions = TORCH
    else:
        from rlkl.kernels.logits import TRITON as functions
    caps = Caps(1.0, None, None)
    work, sums = Work(x.ids, torch.ones_like(x.upstream[0]), caps, caps), Sums.start(len(z), z, reference=False)
    functions.accumulate(z.float().clone() if copies else z, None, work, sums)
    done = finish(sums)
    mark()
    upstream = Upstream(x.upstream[0], x.upstream[1], None, None)
    d = functions.dlogits(z.float().clone() if copies else z, None, work, done, upstream, z.dtype)
    return (done.logprobs, done.entropy), (d,)


def own(logits: bool, dtype: str, device: str, compiled: bool) -> list[Op]:
    """rlkl's and the naive way, for hidden states or for logits."""
    if logits:
        return [Op("naive", 1, (1.5,), naive(1)), Op("naive", 2, (1.5,), naive(2)),
                Op("rlkl functions on a tile", 2, (1.5,), None, on_a_tile)]
    best, everything, found = "fused" if device == "cuda" else "tiled", 2**62, []
    off = "" if device == "cuda" else "needs CUDA"
    for n in (1, 2, 3):
        plain, again, kept = (PLAIN, AGAIN, PLAIN) if n < 3 else ((2, 1, 1), (4, 1, 1), (2, 1, 1))
        found.append(Op("naive", n, plain, naive(n)))
        if n < 3 and dtype == "bfloat16":
            found.append(Op("naive, float32 logits", n, plain, naive(n, wide=True)))
        found.append(Op("naive, torch.compile", n, plain, torch.compile(naive(n)) if compiled else None, compiled=True,
                        failed="" if compiled else "not run without --compile"))
        if n > 1:
            found.append(Op("rlkl reference", n, plain, ours(n, "reference")))
        found += [Op("rlkl tiled", n, again, ours(n, "tiled")),
                  Op("rlkl fused", n, again, ours(n, "fused"), failed=off)]
        if n > 1:
            keeping = ours(n, best, everything)
            found += [Op(f"rlkl {best}, kept logits", n, kept, keeping),
                      Op(f"rlkl {best}, head chunks", n, kept, None, in_chunks(keeping, False)),
                      Op("naive, frozen head", n, (*plain[:2], 0), naive(n), frozen=True),
                      Op(f"rlkl {best}, frozen head", n, (*again[:2], 0), ours(n, best), frozen=True),
                      Op(f"rlkl {best}, frozen head, head chunks", n, (*kept[:2], 0), None, in_chunks(keeping, True),
                         frozen=True)]
    return found


def step(op: Op, x: Inputs, mark: Callable[[], None]) -> tuple[Outputs, Outputs]:
    """Outputs and gradients of one op."""
    if op.step is not None:
        return op.step(x, mark)
    weight = x.weight.detach() if op.frozen else x.weight
    found = tuple(op.forward(x._replace(hidden=x.rows, weight=weight, kept=None)))
    mark()
    leaves = [t for t in (x.hidden, weight) if t is not None and t.requires_grad]
    return found, torch.autograd.grad(found, leaves, [g.to(y.dtype) for g, y in zip(x.upstream, found, strict=False)])
