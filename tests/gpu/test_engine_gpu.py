"""The engine on CUDA: graphs, FlashAttention, the sampling kernel, torch.compile, memory."""

import gc
import importlib
import math

import pytest
import torch
from models import ROWS, SERVED, VOCAB, sampling_params, tiny_policy, uniforms
from transformers import AutoModelForCausalLM, Qwen2Config

from rlkl.policy.policy import Policy
from rlkl.rollout import engine, naive
from rlkl.rollout import graphs as cuda_graphs
from rlkl.rollout.graphs import KEPT, pool_bytes
from rlkl.rollout.one_pass import inverse_cdf, one_pass
from rlkl.rollout.sampling import left_pad
from rlkl.rollout.slots import SlotCache, flash_attention, flash_serves, slot_attention
from rlkl.types import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
module = importlib.import_module("rlkl.rollout.engine")


def draw(
    rows: int = 72, columns: int = 24, seed: int = 3, longest: int = 33
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Nine ragged prompts, and uniforms for `rows` responses of `columns` tokens."""
    g = torch.Generator().manual_seed(seed)
    lengths = (1, longest, 7, 2, 19, 3, 12, 1, 5)
    ids, mask = left_pad([torch.randint(VOCAB, (n,), generator=g).tolist() for n in lengths], 0)
    return ids.cuda(), mask.cuda(), uniforms(rows, columns, seed).cuda()


@pytest.mark.parametrize("name", SERVED)
def test_a_replayed_graph_gives_the_tokens_of_the_eager_step_and_of_naive(name):
    """In float64, where rounding cannot change a token."""
    policy, inputs = tiny_policy(name, torch.float64).cuda(), draw()
    expected = naive(policy, *inputs, sampling_params()).responses()
    for graphs in (True, False):
        batch = engine(policy, *inputs, sampling_params(), slots=16, sync_every=4, graphs=graphs)
        assert batch.responses() == expected


@pytest.fixture
def recorded(monkeypatch):
    """The numbers of slots of all graphs, in the order in which they are recorded."""
    sizes, record = [], cuda_graphs.record

    def note_and_record(step, pool):
        sizes.append(step.args[2])
        return record(step, pool)

    monkeypatch.setattr(cuda_graphs, "record", note_and_record)
    return sizes


def test_a_step_is_recorded_once_for_each_batch_size(recorded):
    engine(tiny_policy("llama").cuda(), *draw(), sampling_params(), slots=32, sync_every=4)
    assert recorded == sorted(set(recorded), reverse=True)


@pytest.mark.parametrize("compile", [False, True])
def test_later_rollouts_replay_the_graphs_with_the_weights_of_today(compile, recorded):
    """In float64, with other prompts and uniforms, until the weights lie elsewhere."""
    policy = tiny_policy("qwen2", torch.float64).cuda()
    options = {"slots": 16, "sync_every": 4, "compile": compile}
    engine(policy, *draw(), sampling_params(), **options)
    first = list(recorded)
    for seed in range(4):
        with torch.no_grad():
            for p in policy.lm.parameters():
                p.mul_(1.02)
        inputs = draw(seed=seed, longest=33 - seed)
        batch = engine(policy, *inputs, sampling_params(), **options)
        assert batch.responses() == naive(policy, *inputs, sampling_params()).responses()
    assert set(recorded) <= {16, 8}
    assert recorded[: len(first)] == first
    assert len(recorded) == len(set(recorded)), "none is recorded twice"
    before = len(recorded)
    for p in policy.lm.parameters():
        p.data = 0.9 * p.data
    batch = engine(policy, *draw(), sampling_params(), **options)
    assert batch.responses() == naive(policy, *draw(), sampling_params()).responses()
    assert len(recorded) > before


@pytest.mark.parametrize("name", SERVED)
def test_bf16_gives_the_scorers_logprobs(name):
    policy, inputs = tiny_policy(name, torch.bfloat16).cuda(), draw()
    for graphs in (True, False):
        batch = engine(policy, *inputs, sampling_params(), slots=16, graphs=graphs)
        with torch.no_grad():
            gap = (policy(batch).logprobs - batch.sampler_logprobs)[batch.mask].abs()
        assert gap.mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(14, 2, 64), (28, 4, 128), (8, 8, 96), (4, 1, 256)]
)
def test_flash_attention_over_slots_is_dense_attention(heads, kv_heads, dim, window, dtype):
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device="cuda", dtype=dtype)

    g, slots = torch.Generator("cuda").manual_seed(0), SlotCache(1, 40, 512, torch.device("cuda"))
    slots.positions[:] = torch.randint(512, (40,), generator=g, device="cuda")
    query = normal(40, heads, 1, dim)
    key, value = (normal(40, 512, kv_heads, dim).transpose(1, 2) for _ in range(2))

    def flash() -> torch.Tensor:
        slots.begin_step(40, 512)
        return flash_attention(query, key, value, slots, dim**-0.5, window)

    def dense() -> torch.Tensor:
        slots.begin_step(40, 512)
        return slot_attention(
            None,
            query.double(),
            key.double(),
            value.double(),
            scaling=dim**-0.5,
            slots=slots,
            sliding_window=window,
        )[0]

    assert flash_serves(query, value)
    assert (flash() - dense()).abs().max() < 2e-2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flash()
    slots.positions.random_(512)  # other lengths, with the same recording
    graph.replay()
    assert (captured - dense()).abs().max() < 2e-2


@pytest.mark.parametrize("width", [VOCAB, 32_000, 151_643])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampling_kernel_is_its_twin(width, temperature):
    g = torch.Generator("cuda").manual_seed(0)
    columns = math.ceil(width / 16) * 16 + 16
    rows = 3 * torch.randn(256, columns, generator=g, device="cuda")
    rows[:, width:] = 50.0  # padding rows of the embedding, which would win
    u = torch.rand(256, generator=g, device="cuda", dtype=torch.float64)
    ids, logprobs = one_pass(rows, u, SamplingParams(temperature, vocab_size=width))
    twin, twin_logprobs = inverse_cdf(rows[:, :width].double() / temperature, u)
    assert (ids != twin).float().mean() < 0.01  # rounding at the edge between two ids
    assert (logprobs - twin_logprobs)[ids == twin].abs().max() < 2e-5


def test_the_compiled_step_gives_the_same_logprobs():
    policy = tiny_policy("qwen2", torch.bfloat16).cuda()
    batch = engine(policy, *draw(), sampling_params(), slots=16, compile=True)
    with torch.no_grad():
        gap = (policy(batch).logprobs - batch.sampler_logprobs)[batch.mask].abs()
    assert gap.mean() < 0.02


def test_compiled_steps_serve_other_prompts_and_rows():
    """By Inductor, with the sampling kernel: its temperature arrives as a float64."""
    policy = tiny_policy("qwen2").cuda()
    unique_graphs = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    for graphs in (False, True):
        for seed in range(10):
            inputs = draw(18 + 9 * (seed % 2), seed=seed, longest=25 + seed)
            params = sampling_params(0.7)
            options = {"slots": 8, "graphs": graphs, "compile": True}
            batch = engine(policy, *inputs, params, **options)
            with torch.no_grad():
                gap = (policy(batch).logprobs - batch.sampler_logprobs)[batch.mask].abs()
            assert gap.max() < 1e-3
            if seed == 9 and not graphs:
                compiled = unique_graphs["unique_graphs"]
    assert unique_graphs["unique_graphs"] == compiled, "graphs record what is compiled already"


def held() -> int:
    """Bytes of all tensors alive. Kept graphs and their tensors are counted too."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


@pytest.fixture
def small_qwen2():
    config = Qwen2Config(
        vocab_size=ROWS,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    return Policy(AutoModelForCausalLM.from_config(config).cuda().bfloat16().eval())


def test_memory_is_released_after_each_rollout_that_keeps_nothing(small_qwen2):
    """At once: learning does not wait until Python looks for cycles."""
    inputs = draw(256, 512)
    engine(small_qwen2, *inputs, SamplingParams(), slots=128, keep_gb=0.0)
    before = held()
    gc.disable()
    try:
        for _ in range(2):
            engine(small_qwen2, *inputs, SamplingParams(), slots=128, keep_gb=0.0)
            torch.cuda.synchronize()
            assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("keep_gb", [None, 0.0])
def test_memory_is_stable_over_ten_rollouts(small_qwen2, keep_gb):
    """Reserved memory too: each new stream would cost a cuBLAS workspace."""
    sizes = []
    for seed in range(10):
        inputs = draw(256, 128, seed=seed)
        engine(small_qwen2, *inputs, SamplingParams(), slots=128, keep_gb=keep_gb)
        sizes.append((held(), torch.cuda.memory_reserved()))
    assert sizes[2:] == [sizes[1]] * 8
    assert (small_qwen2 in KEPT) == (keep_gb is None)
    if keep_gb is None:
        kept = KEPT[small_qwen2]
        assert 0 < pool_bytes(kept.graphs.pool) < 1e9
        del kept
        before = held()
        KEPT.clear()
        assert held() < before
