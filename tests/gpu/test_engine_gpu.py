"""The engine on CUDA: graphs, FlashAttention over slots, the sampling kernel, the compiled step, memory given back."""

import gc
import importlib

import pytest
import torch
from models import ROWS, VOCAB, rule, tiny_policy, uniforms
from transformers import AutoModelForCausalLM, Qwen2Config

from rlkl.model import Policy, left_pad
from rlkl.rollout import engine, naive
from rlkl.rollout.one_pass import inverse_cdf, one_pass
from rlkl.rollout.slots import Slots, ragged, serves, slot_attention
from rlkl.types import Sampling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
module = importlib.import_module("rlkl.rollout.engine")
MODELS = ["llama", "qwen2", "qwen3", "gemma", "mistral", "gemma3", "phi3", "olmo2", "smollm3", "gpt_neox", "gpt2"]


def many(rows: int = 72, columns: int = 24):
    g = torch.Generator().manual_seed(3)
    ids, mask = left_pad([torch.randint(VOCAB, (n,), generator=g).tolist() for n in (1, 33, 7, 2, 19, 3, 12, 1, 5)], 0)
    return ids.cuda(), mask.cuda(), uniforms(rows, columns, 3).cuda()


@pytest.mark.parametrize("name", MODELS)
def test_a_replayed_graph_gives_the_tokens_of_the_eager_step_and_of_naive(name):
    """float64: no rounding can move a token."""
    policy, given = tiny_policy(name, torch.float64).cuda(), many()
    want = naive(policy, *given, rule()).replies()
    assert engine(policy, *given, rule(), slots=16, sync_every=4).replies() == want
    assert engine(policy, *given, rule(), slots=16, sync_every=4, graphs=False).replies() == want


def test_a_step_is_recorded_once_for_each_batch_size(monkeypatch):
    sizes, step = [], module.Run.step
    monkeypatch.setattr(module.Run, "step", lambda self, n, reach: (sizes.append(n), step(self, n, reach)))
    engine(tiny_policy("llama").cuda(), *many(), rule(), slots=32, sync_every=4)
    assert sizes == [n for size in sorted(set(sizes), reverse=True) for n in (size, size)], "once done, once recorded"


@pytest.mark.parametrize("name", MODELS)
def test_bf16_gives_the_scorers_logprobs(name):
    policy, given = tiny_policy(name, torch.bfloat16).cuda(), many()
    for graphs in (True, False):
        found = engine(policy, *given, rule(), slots=16, graphs=graphs)
        with torch.no_grad():
            gap = (policy.evaluate(found).logprobs - found.sampler_logprobs)[found.mask].abs()
        assert gap.mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(14, 2, 64), (28, 4, 128), (8, 8, 96), (4, 1, 256)])
def test_flash_attention_over_slots_is_dense_attention(heads, kv_heads, dim, window, dtype, monkeypatch):
    g, kv = torch.Generator("cuda").manual_seed(0), Slots(1, 40, 512, torch.device("cuda"))
    kv.position[:] = torch.randint(512, (40,), generator=g, device="cuda")
    query = torch.randn(40, heads, 1, dim, generator=g, device="cuda", dtype=dtype)
    key, value = (torch.randn(40, 512, kv_heads, dim, generator=g, device="cuda", dtype=dtype).transpose(1, 2)
                  for _ in range(2))
    assert serves(query, value)
    fast = ragged(query, key, value, kv, dim**-0.5, window)
    kv.begin(512)
    dense, _ = slot_attention(None, query.double(), key.double(), value.double(), scaling=dim**-0.5, slots=kv,
                              sliding_window=window)
    assert (fast - dense).abs().max() < 2e-2
    graph = torch.cuda.CUDAGraph()  # lengths that change under one recording
    with torch.cuda.graph(graph):
        again = ragged(query, key, value, kv, dim**-0.5, window)
    kv.position.random_(512)
    graph.replay()
    kv.begin(512)
    dense, _ = slot_attention(None, query.double(), key.double(), value.double(), scaling=dim**-0.5, slots=kv,
                              sliding_window=window)
    assert (again - dense).abs().max() < 2e-2


@pytest.mark.parametrize("width", [VOCAB, 32_000, 151_643])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampling_kernel_is_its_twin(width, temperature):
    g = torch.Generator("cuda").manual_seed(0)
    rows = 3 * torch.randn(256, -(-width // 16) * 16 + 16, generator=g, device="cuda")
    rows[:, width:] = 50.0  # padding rows of the embedding, which would win
    u = torch.rand(256, generator=g, device="cuda", dtype=torch.float64)
    ids, logprobs = one_pass(rows, u, Sampling(temperature, vocab_size=width))
    twin, twin_logprobs = inverse_cdf(rows[:, :width].double() / temperature, u)
    assert (ids != twin).float().mean() < 0.01, "rounding at the edge between two ids"
    assert (logprobs - twin_logprobs)[ids == twin].abs().max() < 2e-5


def test_the_compiled_step_gives_the_same_logprobs():
    policy, given = tiny_policy("qwen2", torch.bfloat16).cuda(), many()
    found = engine(policy, *given, rule(), slots=16, compile=True)
    with torch.no_grad():
        assert (policy.evaluate(found).logprobs - found.sampler_logprobs)[found.mask].abs().mean() < 0.02


def test_memory_comes_back_after_each_rollout():
    config = Qwen2Config(vocab_size=ROWS, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096)
    policy, given = Policy(AutoModelForCausalLM.from_config(config).cuda().bfloat16().eval()), many(256, 512)

    def held() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    engine(policy, *given, Sampling(), slots=128)
    before = held()
    for _ in range(2):
        engine(policy, *given, Sampling(), slots=128)
    assert held() == before
