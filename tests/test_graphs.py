"""CUDA graphs that outlive a rollout, on a CPU: with a stand-in that repeats operations as they do.

A CUDA graph repeats kernels on the addresses of the tensors that it saw. So does the stand-in: it
repeats each operation on the very tensors of the recording, and sees no Python. A graph that is
stale therefore gives wrong tokens here too.
"""

import contextlib
import gc
import importlib
import weakref
from types import SimpleNamespace

import pytest
import torch
from models import VOCAB, assert_same, sampling_params, tiny_policy, uniforms
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlkl.policy import lora
from rlkl.rollout import cached, engine, graphs, naive
from rlkl.rollout.sampling import left_pad

module = importlib.import_module("rlkl.rollout.engine")
MAX_TOKENS = 16


def address(x):
    """Where the storage of a tensor lies."""
    return x.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """Records operations, and repeats them into the tensors that they returned."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a wait for the host"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                # A view, or what was written in place, is there already.
                if isinstance(old, Tensor) and address(old) != address(new):
                    old.copy_(new)

    def pool(self):
        return None


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """The numbers of slots of all recordings, in their order."""
    sizes = []

    def record(step, pool):
        sizes.append(step.args[2])
        with Tape() as tape:
            step()
        return tape

    monkeypatch.setattr(module, "graphs_serve", lambda policy: True)
    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "pool_bytes", lambda pool: 0)
    monkeypatch.setattr(graphs, "device_bytes", lambda: 80e9)
    yield sizes
    graphs.KEPT.clear()


def draw(seed=0, prompts=9, longest=20, group=4):
    """Prompts of different lengths, the longest of `longest` tokens, and uniforms."""
    g = torch.Generator().manual_seed(seed)
    lengths = [longest, *torch.randint(1, longest + 1, (prompts - 1,), generator=g).tolist()]
    ids, mask = left_pad([torch.randint(VOCAB, (n,), generator=g).tolist() for n in lengths], 0)
    return ids, mask, uniforms(prompts * group, MAX_TOKENS, seed)


def check(policy, arguments=None, params=None, **options):
    """The engine gives the tokens of naive."""
    arguments, params = arguments or draw(), params or sampling_params()
    batch = engine(policy, *arguments, params, slots=16, sync_every=3, **options)
    assert_same(batch, naive(policy, *arguments, params), 1e-12)


def spoil(policy, seed=7):
    """Change all weights in place, as an optimizer does."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.lm.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_later_rollouts_record_nothing_and_see_the_weights_of_today(name, recorded):
    """Also with other prompts, fewer rows and other uniforms."""
    policy = tiny_policy(name, torch.float64)
    check(policy)
    assert recorded == [16, 8]
    for seed in range(1, 5):
        spoil(policy, seed)
        check(policy, draw(seed, prompts=9 - seed, longest=20 - seed))
    assert recorded == [16, 8]


def test_a_batch_is_not_overwritten_by_the_next_rollout():
    policy = tiny_policy("llama")
    first = engine(policy, *draw(0), sampling_params())
    tokens, logprobs = first.response_ids.clone(), first.sampler_logprobs.clone()
    engine(policy, *draw(1), sampling_params())
    assert torch.equal(first.response_ids, tokens)
    assert torch.equal(first.sampler_logprobs, logprobs)


def test_longer_prompts_and_more_rows_are_recorded_again_and_shorter_ones_are_not(recorded):
    policy = tiny_policy("llama", torch.float64)
    for prompts, longest, again in ((9, 20, 2), (9, 50, 2), (9, 20, 0), (20, 50, 2), (9, 20, 0)):
        before = len(recorded)
        check(policy, draw(0, prompts, longest))
        assert len(recorded) - before == again


def assign(policy):
    state = {name: 0.9 * x for name, x in policy.lm.state_dict().items()}
    policy.lm.load_state_dict(state, assign=True)


def set_data(policy):
    for p in policy.lm.parameters():
        p.data = 0.9 * p.data


def move(policy):
    policy.float().double()


def adapt(policy):
    pytest.importorskip("peft")
    options = {"r": 2, "alpha": 8.0, "target_modules": "all-linear", "modules_to_save": []}
    lora.adapt(policy.lm, **options)
    spoil(policy)


@pytest.mark.parametrize("change", [assign, set_data, move, adapt])
def test_weights_that_lie_elsewhere_are_recorded_again(change, recorded):
    policy = tiny_policy("qwen2", torch.float64)
    check(policy)
    change(policy)
    check(policy)
    assert recorded == [16, 8, 16, 8]


def test_an_adapter_that_is_switched_off_and_on(recorded):
    pytest.importorskip("peft")
    policy = tiny_policy("qwen2", torch.float64)
    adapt(policy)
    check(policy)
    with lora.switched_off(policy.lm):
        check(policy)
        check(policy)
    check(policy)
    spoil(policy)
    check(policy)
    assert recorded == 3 * [16, 8]


def test_other_parameters_are_recorded_again(recorded):
    policy = tiny_policy("llama", torch.float64)
    for count, params in enumerate(
        (
            sampling_params(),
            sampling_params(0.0),
            sampling_params(top_k=3),
            sampling_params(0.7, eos_ids=(3,)),
            sampling_params(),
        ),
        1,
    ):
        for _ in range(2):
            check(policy, params=params)
        assert len(recorded) == 2 * count
    check(policy, params=sampling_params(stop=lambda ids: 7 in ids))
    assert len(recorded) == 10, "a stop string is looked for on the host"
    policy.vocab_size = VOCAB - 40
    check(policy, params=sampling_params(vocab_size=VOCAB - 40))
    assert len(recorded) == 12


def test_the_padding_ids_of_the_policy_are_never_sampled():
    """Also where the sampling parameters know of none."""
    policy = tiny_policy("llama", torch.float64, vocab_size=20)
    for temperature in (1.0, 0.0):
        params = sampling_params(temperature, vocab_size=None)
        check(policy, params=params)
        assert engine(policy, *draw(), params).response_ids.max() < 20


def test_each_policy_has_graphs_of_its_own(recorded):
    one, other = (tiny_policy("llama", torch.float64, seed=seed) for seed in (0, 1))
    for _ in range(3):
        check(one)
        check(other)
    assert recorded == [16, 8, 16, 8]


def test_nothing_keeps_a_policy_alive():
    policy = tiny_policy("llama", torch.float64)
    check(policy)
    assert len(graphs.KEPT) == 1
    state = weakref.ref(next(iter(graphs.KEPT.values())).state)
    alive = weakref.ref(policy)
    del policy
    gc.collect()
    assert alive() is None
    assert state() is None
    assert not graphs.KEPT


def test_only_little_memory_is_kept(recorded, monkeypatch):
    policy = tiny_policy("llama", torch.float64)
    check(policy)
    held = graphs.state_bytes(graphs.KEPT[policy].state)
    slot_tokens, row_tokens = 16 * 40, (64 + 1) * MAX_TOKENS  # 40: 20 + 16 - 1 and its bucket
    assert held == slot_tokens * 2 * 2 * 2 * 12 * 8 + row_tokens * 3 * 8
    check(policy, keep_gb=held / 1e9)
    assert policy in graphs.KEPT
    check(policy, keep_gb=0.99 * held / 1e9)
    assert policy not in graphs.KEPT
    check(policy, keep_gb=0.0)
    assert policy not in graphs.KEPT
    monkeypatch.setattr(graphs, "pool_bytes", lambda pool: 1)
    check(policy, keep_gb=held / 1e9)
    assert policy not in graphs.KEPT
    monkeypatch.setattr(graphs, "pool_bytes", lambda pool: graphs.KEEP_SHARE * 80e9)
    check(policy)
    assert policy not in graphs.KEPT


def test_a_rollout_that_fails_leaves_nothing(monkeypatch):
    policy = tiny_policy("llama", torch.float64)
    check(policy)
    with monkeypatch.context() as patch:
        patch.setattr(module.ContinuousBatch, "sync", None)
        with pytest.raises(TypeError):
            check(policy)
    assert policy not in graphs.KEPT
    check(policy)


def test_what_a_broken_policy_left_in_the_slots_is_not_read():
    policy = tiny_policy("llama", torch.float64)
    weights = [p.detach().clone() for p in policy.lm.parameters()]
    with torch.no_grad():
        for p in policy.lm.parameters():
            p.fill_(torch.nan)
        engine(policy, *draw(), sampling_params(), slots=16)
        for p, weight in zip(policy.lm.parameters(), weights, strict=True):
            p.copy_(weight)
    check(policy)


def test_without_graphs_nothing_is_kept(recorded):
    policy = tiny_policy("llama", torch.float64)
    check(policy, graphs=False)
    assert not recorded
    assert not graphs.KEPT
    assert_same(
        engine(policy, *draw(), sampling_params()),
        cached(policy, *draw(), sampling_params()),
        1e-12,
    )


# ---------------------------------------------------------------- how a graph is recorded


def test_all_graphs_are_recorded_on_one_stream(monkeypatch):
    monkeypatch.undo()  # the stand-in for `record`
    events, streams = [], []

    def capture(graph, pool, stream, capture_error_mode):
        events.append((pool, stream))
        return contextlib.nullcontext()

    def make_stream(device):
        streams.append(device)
        return SimpleNamespace(wait_stream=lambda other: None)

    current = SimpleNamespace(wait_stream=lambda other: None)
    cuda = {
        "Stream": make_stream,
        "current_device": lambda: 3,
        "current_stream": lambda: current,
        "stream": contextlib.nullcontext,
        "CUDAGraph": lambda: "graph",
        "graph": capture,
    }
    for name, stand_in in cuda.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    graphs.side_stream.cache_clear()
    steps = []
    for pool in (None, (0, 1), (0, 1)):
        assert graphs.record(lambda: steps.append(1), pool) == "graph"
    graphs.side_stream.cache_clear()
    assert streams == [3]
    assert len(steps) == 6, "each graph: one step that is done, one that is recorded"
    assert [pool for pool, _ in events] == [None, (0, 1), (0, 1)]
    assert len({id(stream) for _, stream in events}) == 1


def test_the_memory_of_a_pool_and_of_the_device(monkeypatch):
    monkeypatch.undo()
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 1},
        {"segment_pool_id": (0, 7), "total_size": 20},
        {"segment_pool_id": (0, 7), "total_size": 300},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    properties = {3: SimpleNamespace(total_memory=10**9, multi_processor_count=132)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.get)
    assert graphs.pool_bytes((0, 7)) == 320
    assert graphs.pool_bytes(None) == 0
    assert graphs.device_bytes() == 10**9
