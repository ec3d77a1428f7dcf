"""What benchmarks/logprobs.py compares with: the ops of other libraries. None is required.

The libraries are used as published, installed or in a folder of unzipped wheels. Of TRL and verl
only the files with the kernels are imported, from empty packages, because their own packages import
whole trainers.
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
    """An op of another library, not yet imported."""

    name: str
    outputs: int
    gemms: tuple[float, ...]
    load: Callable[[], Forward]
    cuda: bool = False  # runs only there
    compiled: bool = False
    logits: bool = False  # takes logits, not hidden states
    scalar: bool = False  # returns only the sum over tokens
    forward_only: bool = False


def packages(*names: str) -> None:
    """Put empty packages where the real ones would import a trainer and its dependencies."""
    if names[0] in sys.modules:
        return
    spec = importlib.util.find_spec(names[0])
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("not installed")
    for name in names:
        module = types.ModuleType(name)
        module.__path__ = [
            os.path.join(folder, *name.split(".")[1:]) for folder in spec.submodule_search_locations
        ]
        sys.modules[name] = module


def stand_in(name: str, **attributes: Any) -> None:
    """Put a module with these attributes where the real one is not imported."""
    module = types.ModuleType(name)
    vars(module).update(attributes)
    sys.modules.setdefault(name, module)


def trl_packages() -> None:
    packages("trl", "trl.trainer", "trl.kernels")
    stand_in("trl.trainer.utils", maybe_gather_lm_head_ctx=lambda *_: contextlib.nullcontext())


def verl_packages() -> None:
    packages("verl", "verl.utils", "verl.utils.kernel", "verl.utils.experimental")
    cuda = torch.cuda.is_available()
    stand_in(
        "verl.utils.device",
        is_cuda_available=cuda,
        get_device_name=lambda: "cuda" if cuda else "cpu",
        get_device_capability=lambda *_: torch.cuda.get_device_capability() if cuda else (0, 0),
        get_torch_device=lambda: torch.cuda,
    )


def trl_logprob() -> Forward:
    trl_packages()
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction as Chunked

    return lambda x: Chunked.apply(
        x.hidden, x.weight, None, x.ids, 1.0, 32768, None, 1.0, ("entropy",)
    )[:2]


def trl_divergence() -> Forward:
    logprob = trl_logprob()
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction as Chunked

    def forward(x: Inputs) -> Outputs:
        operands = x.hidden, x.weight, None, x.ref_hidden, x.ref_weight, None, 1.0
        divergence = Chunked.apply(*operands)[0]
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
    from liger_kernel.chunked_loss.fused_linear_ppo import (
        _ChunkedSelectiveLogProbFunction as Chunked,
    )

    return lambda x: (Chunked.apply(x.hidden, x.weight, x.ids, None, 1.0, 4096),)


def liger_cross_entropy() -> Forward:
    from liger_kernel.ops.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyFunction as Fused,
    )

    options = None, None, -100, 0.0, 0.0, "none", None, False, torch.float32

    def forward(x: Inputs) -> Outputs:
        return (-Fused.apply(x.hidden, x.weight, x.ids, *options)[0],)

    return forward


def liger_scaled() -> Forward:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Scaled

    def forward(x: Inputs) -> Outputs:
        nll, entropy = Scaled.apply(x.hidden, x.weight, x.ids, 1.0, -100, 1, True)
        return -nll, entropy

    return forward


def liger_from_logits() -> Forward:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    # It leaves the last row out.
    return lambda x: fused_selective_log_softmax(x.hidden[None], x.ids[None, :-1], 1.0)


def cut(**options: Any) -> Callable[[], Forward]:
    def load() -> Forward:
        from cut_cross_entropy import linear_cross_entropy

        return lambda x: (
            -linear_cross_entropy(x.hidden, x.weight, x.ids, reduction="none", **options),
        )

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
    Peer(
        "Liger from logits, forward only",
        1,
        (0.5,),
        liger_from_logits,
        cuda=True,
        logits=True,
        forward_only=True,
    ),
)


def reason(error: BaseException) -> str:
    """An error in at most 90 characters."""
    text = first_line(error)
    return text if len(text) <= 90 else text[:87] + "..."


def summed(forward: Forward) -> Step:
    """A step of an op that returns one number for all tokens.

    It has no outputs to compare: its gradients are those of another loss, with every weight 1.
    """

    def step(x: Inputs, mark: Callable[[], None]) -> tuple[Outputs, Outputs]:
        (total,) = forward(x._replace(hidden=x.rows))
        mark()
        return (), torch.autograd.grad(total, (x.hidden, x.weight))

    return step


def without_backward(forward: Forward) -> Step:
    """A step of an op that has no backward pass."""

    def step(x: Inputs, _: Callable[[], None]) -> tuple[Outputs, Outputs]:
        return forward(x), ()

    return step


def peers(logits: bool, device: str, compiled: bool) -> list[Op]:
    """Every peer for hidden states, or for logits. Those that do not load say why."""
    selected = [peer for peer in PEERS if peer.logits == logits]
    return [load_peer(peer, device, compiled) for peer in selected]


def load_peer(peer: Peer, device: str, compiled: bool) -> Op:
    """The op of a peer; one that does not run here says why."""
    try:
        if peer.compiled and not compiled:
            raise ImportError("not run without --compile")
        forward = peer.load()  # before the device: "not installed" is the better reason
        if peer.cuda and device != "cuda":
            raise ImportError("needs CUDA")
    except Exception as error:  # a peer may fail in any way
        return Op(peer.name, peer.outputs, peer.gemms, failed=reason(error))
    step = None
    if peer.scalar:
        step = summed(forward)
    elif peer.forward_only:
        step = without_backward(forward)
    return Op(peer.name, peer.outputs, peer.gemms, forward, step, compiled=peer.compiled)


def installed() -> list[str]:
    """The peers' distributions that are installed."""
    return [name for name in DISTRIBUTIONS if list(importlib.metadata.distributions(name=name))]
