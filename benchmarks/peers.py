"""What benchmarks/logprobs.py compares with: other libraries' ops, called and not copied. None is required.

They are taken as published, installed or in a folder of unzipped wheels. Of TRL and verl only the files with the
kernels are imported: behind empty packages, as their own ones import whole trainers.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.ops import AGAIN, PLAIN, Forward, Inputs, Op, Outputs, Step
from rlkl.errors import first_line

DISTRIBUTIONS = ("trl", "verl", "liger-kernel", "cut-cross-entropy", "triton")


class Peer(NamedTuple):
    name: str
    outputs: int
    gemms: tuple[float, ...]
    load: Callable[[], Forward]
    cuda: bool = False  # runs nowhere else
    compiled: bool = False
    logits: bool = False  # takes logits
    scalar: bool = False  # only a sum over tokens, so every weight is 1
    forward_only: bool = False


def packages(*names: str) -> None:
    """Empty packages where the real ones would import a trainer and all that it needs."""
    if names[0] in sys.modules:
        return
    spec = importlib.util.find_spec(names[0])
    if spec is None:
        raise ImportError("not installed")
    for name in names:
        module = types.ModuleType(name)
        module.__path__ = [os.path.join(folder, *name.split(".")[1:]) for folder in spec.submodule_search_locations]
        sys.modules[name] = module


def stand_in(name: str, **attributes: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(attributes)
    sys.modules.setdefault(name, module)


def trl_packages() -> None:
    packages("trl", "trl.trainer", "trl.kernels")
    stand_in("trl.trainer.utils", maybe_gather_lm_head_ctx=lambda *_: contextlib.nullcontext())


def verl_packages() -> None:
    packages("verl", "verl.utils", "verl.utils.kernel", "verl.utils.experimental")
    cuda = torch.cuda.is_available()
    stand_in("verl.utils.device", is_cuda_available=cuda, get_device_name=lambda: "cuda" if cuda else "cpu",
             get_device_capability=lambda *_: torch.cuda.get_device_capability() if cuda else (0, 0),
             get_torch_device=lambda: torch.cuda)


def trl_logprob() -> Forward:
    trl_packages()
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction as Chunked

    return lambda x: Chunked.apply(x.hidden, x.weight, None, x.ids, 1.0, 32768, None, 1.0, ("entropy",))[:2]


def trl_divergence() -> Forward:
    logprob = trl_logprob()
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction as Chunked

    def forward(x: Inputs) -> Outputs:
        divergence = Chunked.apply(x.hidden, x.weight, None, x.ref_hidden, x.ref_weight, None, 1.0)[0]
        return *logprob(x), divergence

    return forward


def trl_from_logits() -> Forward:
    trl_packages()
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    return lambda x: selective_log_softmax_and_entropy(x.hidden, x.ids)


def verl_torch() -> Forward:
    verl_packages()
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    op = FusedLinearForPPO()
    return lambda x: op(x.hidden, x.weight, x.ids)


def verl_triton() -> Forward:
    verl_packages()
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda x: linear_cross_entropy(x.hidden, x.weight, x.ids, 1.0, "none")


def liger_selective() -> Forward:
    from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction as Chunked

    return lambda x: (Chunked.apply(x.hidden, x.weight, x.ids, None, 1.0, 4096),)


def liger_cross_entropy() -> Forward:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Fused

    def forward(x: Inputs) -> Outputs:
        return (-Fused.apply(x.hidden, x.weight, x.ids, None, None, -100, 0.0, 0.0, "none", None, False,
                             torch.float32)[0],)

    return forward


def liger_scaled() -> Forward:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Scaled

    def forward(x: Inputs) -> Outputs:
        nll, entropy = Scaled.apply(x.hidden, x.weight, x.ids, 1.0, -100, 1, True)
        return -nll, entropy

    return forward


def liger_from_logits() -> Forward:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    return lambda x: fused_selective_log_softmax(x.hidden[None], x.ids[None, :-1], 1.0)  # leaves the last row out


def cut(**options: Any) -> Callable[[], Forward]:
    def load() -> Forward:
        from cut_cross_entropy import linear_cross_entropy

        return lambda x: (-linear_cross_entropy(x.hidden, x.weight, x.ids, reduction="none", **options),)

    return load


def torch_linear(**options: Any) -> Callable[[], Forward]:
    def load() -> Forward:
        if not hasattr(F, "linear_cross_entropy"):
            raise ImportError(f"not in torch {torch.__version__}")
        return lambda x: (-F.linear_cross_entropy(x.hidden, x.weight, x.ids, **options),)

    return load


def torch_chunked() -> Forward:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"not in torch {torch.__version__}")
    return torch_linear(reduction="sum", options=torch.nn.LinearCrossEntropyOptions())()


PEERS = (
    Peer("torch linear_cross_entropy", 1, PLAIN, torch_linear(reduction="none")),
    Peer("torch, chunked, weights all 1", 1, PLAIN, torch_chunked, scalar=True),
    Peer("cut-cross-entropy", 1, AGAIN, cut(impl="cce"), cuda=True),
    Peer("cut-cross-entropy, no filter", 1, AGAIN, cut(impl="cce", filter_eps=None), cuda=True),
    Peer("cut-cross-entropy, compiled", 1, PLAIN, cut(impl="torch_compile"), compiled=True),
    Peer("Liger FLCE, per token", 1, AGAIN, liger_cross_entropy, cuda=True),
    Peer("Liger selective log-prob", 1, AGAIN, liger_selective),
    Peer("Liger scaled CE", 2, AGAIN, liger_scaled),
    Peer("TRL ChunkedLogProb", 2, AGAIN, trl_logprob),
    Peer("verl FusedLinearForPPO", 2, AGAIN, verl_torch),
    Peer("verl Triton", 2, AGAIN, verl_triton, cuda=True),
    Peer("TRL ChunkedLogProb + ChunkedDivergence", 3, (6, 2, 2), trl_divergence),
    Peer("TRL from logits", 2, (1.5,), trl_from_logits, cuda=True, logits=True),
    Peer("Liger from logits, forward only", 1, (0.5,), liger_from_logits, cuda=True, logits=True, forward_only=True),
)


def reason(error: BaseException) -> str:
    text = first_line(error)
    return text if len(text) <= 90 else text[:87] + "..."


def summed(forward: Forward) -> Step:
    """A step of an op that is one number for all tokens: its gradients are of other weights, so none are compared."""
    def step(x: Inputs, mark: Callable[[], None]) -> tuple[Outputs, Outputs]:
        (total,) = forward(x._replace(hidden=x.rows))
        mark()
        return (), torch.autograd.grad(total, (x.hidden, x.weight))

    return step


def peers(logits: bool, device: str, compiled: bool) -> list[Op]:
    """Every peer for hidden states, or for logits; those that do not load here say why."""
    found = []
    for peer in PEERS:
        if peer.logits != logits:
            continue
        try:
            if peer.compiled and not compiled:
                raise ImportError("not run without --compile")
            forward = peer.load()  # "not installed" comes first
            if peer.cuda and device != "cuda":
                raise ImportError("needs CUDA")
        except Exception as error:  # a peer may fail in any way
            found.append(Op(peer.name, peer.outputs, peer.gemms, failed=reason(error)))
            continue
        step = None
        if peer.scalar:
            step = summed(forward)
        elif peer.forward_only:
            step = lambda x, _, forward=forward: (forward(x), ())  # noqa: E731
        found.append(Op(peer.name, peer.outputs, peer.gemms, forward, step, compiled=peer.compiled))
    return found


def installed() -> list[str]:
    """Which of the peers' distributions are here."""
    return [name for name in DISTRIBUTIONS if list(importlib.metadata.distributions(name=name))]
