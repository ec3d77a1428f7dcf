"""CUDA graphs of the decoding step, which later rollouts replay.

A graph repeats kernels on fixed addresses: of the weights, and of the tensors of a `DecodeState`.
The optimizer writes weights in place, so graphs stay valid, and see the new weights. Where a weight
lies elsewhere, or another adapter is in force, they are recorded again.

Whoever keeps graphs keeps their keys and values too, which learning could use. Only what is small
beside the device is therefore kept. A large model's graphs are recorded again in each rollout,
which is little beside the time that it decodes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from rlkl.policy.policy import Policy
from rlkl.rollout.decoding import DecodeState, Sizes

# Of the device's memory. On an H200 that is 7 GB: enough for 256 slots of 768 tokens of a model of
# 1.5B parameters. On 24 GB it is 1.2 GB, which learning can do without.
KEEP_SHARE = 0.05
# What decides how a step of an adapted layer computes, in PEFT.
ADAPTER_FIELDS = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")


class StepGraphs:
    """A decoding step as one CUDA graph for each number of slots."""

    def __init__(self) -> None:
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.pool: Any = None  # of memory, shared by the graphs

    def __call__(self, step: Callable[[], None], slots: int) -> None:
        """Do one step of so many slots: replay its graph, or do it and record it for the next."""
        if slots in self.graphs:
            self.graphs[slots].replay()
            return
        self.graphs[slots] = record(step, self.pool)
        self.pool = self.graphs[slots].pool()


def record(step: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """Do one step, and record it as a graph whose memory comes from `pool`.

    Recording alone does nothing, so the step that is done is also the warm-up that it needs.
    """
    stream = side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads, such as those of wandb, may use CUDA meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        step()
    return graph


@functools.cache
def side_stream(device: int) -> torch.cuda.Stream:
    """The stream on which graphs are recorded: one, as PyTorch keeps a cuBLAS workspace for each.

    A workspace has 32 MiB on Hopper.
    """
    return torch.cuda.Stream(device)


# ------------------------------------------------------------------ from one rollout to the next


class Recorded:
    """Graphs, the state they work on, and what else they depend on."""

    def __init__(self, state: DecodeState, depends_on: Hashable) -> None:
        self.state = state
        self.depends_on = depends_on
        self.graphs = StepGraphs()


# The policy is not kept alive: neither a state nor a graph refers to it.
KEPT: WeakKeyDictionary[Policy, Recorded] = WeakKeyDictionary()


def take(policy: Policy, sizes: Sizes, depends_on: Hashable) -> Recorded | None:
    """What was kept for this policy if it serves these sizes. It is no longer kept in any case.

    So a rollout that fails leaves nothing, and memory is free before other tensors take its place.
    """
    kept = KEPT.pop(policy, None)
    if kept is None or kept.depends_on != depends_on or not kept.state.sizes.hold(sizes):
        return None
    return kept


def keep(policy: Policy, recorded: Recorded, keep_gb: float | None) -> None:
    """Keep the graphs and their state for the next rollout if they take at most `keep_gb` GB."""
    limit = KEEP_SHARE * device_bytes() if keep_gb is None else keep_gb * 1e9
    if state_bytes(recorded.state) + pool_bytes(recorded.graphs.pool) <= limit:
        KEPT[policy] = recorded


def addresses(policy: Policy) -> Hashable:
    """Where the weights lie, how the head reads them, and which adapters are in force."""
    modules = list(policy.lm.modules())
    tensors = [*policy.lm.parameters(), *policy.lm.buffers()]
    adapters = [[str(getattr(m, name, None)) for name in ADAPTER_FIELDS] for m in modules]
    return (
        tuple((x.data_ptr(), x.dtype, x.shape) for x in tensors),
        tuple(map(tuple, adapters)),
        policy.head[2:],
    )


def state_bytes(state: DecodeState) -> int:
    """Bytes of keys and values, and of the tensors per row."""
    per_row = [state.uniforms, state.tokens, state.logprobs]
    layers: Any = state.cache.layers
    per_slot = [x for layer in layers for x in (layer.keys, layer.values)]
    return sum(x.numel() * x.element_size() for x in [*per_row, *per_slot])


def pool_bytes(pool: Any) -> int:
    """Bytes that a pool of graphs holds, above all for the logits of a step."""
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] for s in segments if s["segment_pool_id"] == pool)


def device_bytes() -> int:
    """Bytes of memory that the CUDA device has."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
