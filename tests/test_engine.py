"""The engine: the tokens of `naive` for any number of slots, and nothing wasted or left behind."""

import functools
import gc
import importlib
import logging
import weakref
from typing import Any

import pytest
import torch
from models import (
    EOS,
    ROWS,
    SERVED,
    VOCAB,
    assert_same,
    prompts,
    sampling_params,
    tiny_policy,
    uniforms,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, Qwen3NextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rlkl.policy.attention import unsupported
from rlkl.policy.policy import Policy
from rlkl.rollout import cached, decoding, engine, naive, pick, slots
from rlkl.rollout.decoding import compiled_step, decode_step
from rlkl.rollout.engine import ContinuousBatch, capacity_bucket
from rlkl.rollout.one_pass import TILE, inverse_cdf, one_pass
from rlkl.rollout.sampling import left_pad
from rlkl.rollout.slots import (
    SLOT_ATTENTION,
    SlotCache,
    batch_dependent_rope,
    flash_attention,
    slot_attention,
)
from rlkl.types import SamplingParams

module = importlib.import_module("rlkl.rollout.engine")
MAX_TOKENS = 24  # of a response: longer than every window, and slots are filled several times
shared_policy = functools.cache(tiny_policy)  # for tests that do not change the policy


@pytest.fixture(autouse=True)
def _forget_warnings():
    module.warn_once.cache_clear()


def draw(rows: int = 36, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Nine prompts of 1 to 33 tokens, and uniforms for `rows` responses."""
    g = torch.Generator().manual_seed(seed)
    lengths = [1, 33, 7, 2, 19, 3, 12, 1, 5]
    ids, mask = left_pad([torch.randint(VOCAB, (n,), generator=g).tolist() for n in lengths], 0)
    return ids, mask, uniforms(rows, MAX_TOKENS, seed)


def continuous_batch(
    policy: Policy, params: SamplingParams, slots: int, **options: Any
) -> ContinuousBatch:
    """`draw()`, not decoded yet."""
    ids, mask, u = draw()
    token_lists = [row[attended].tolist() for row, attended in zip(ids, mask, strict=True)]
    with torch.no_grad():
        return ContinuousBatch(policy, token_lists, u, params, slots, **options)


def decode(batch: ContinuousBatch, sync_every: int) -> None:
    with torch.no_grad():
        batch.decode(sync_every)


# ---------------------------------------------------------------- the tokens of naive


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_any_number_of_slots_and_any_sync_interval_give_the_tokens_of_naive(name, monkeypatch):
    monkeypatch.setattr(module, "PREFILL_TOKENS", 70)  # so that some prompts are read mid-run
    policy, arguments = shared_policy(name, torch.float64), draw()
    expected = naive(policy, *arguments, sampling_params())
    lengths = set(expected.mask.sum(1).tolist())
    assert len(lengths) > 8, "lengths must differ, or no slot is ever filled again early"
    for count in (1, 3, 16, 64):
        for interval in (1, 7, 64):
            batch = engine(policy, *arguments, sampling_params(), slots=count, sync_every=interval)
            assert_same(batch, expected, 1e-12)


@pytest.mark.parametrize("name", SERVED)
def test_every_architecture_gives_the_tokens_of_naive_in_float64(name):
    policy, arguments = shared_policy(name, torch.float64), draw(rows=18)
    assert unsupported(policy.backbone) is None
    for temperature in (1.0, 0.7, 0.0):
        batch = engine(policy, *arguments, sampling_params(temperature), slots=5, sync_every=3)
        assert_same(batch, naive(policy, *arguments, sampling_params(temperature)), 1e-12)


@pytest.mark.parametrize("name", SERVED)
def test_float32_gives_the_tokens_of_naive_at_one_draw_and_the_scorers_logprobs(name):
    policy, arguments = shared_policy(name), draw(rows=18)
    for temperature in (1.0, 0.7):
        batch = engine(policy, *arguments, sampling_params(temperature), slots=5, sync_every=3)
        assert_same(batch, naive(policy, *arguments, sampling_params(temperature)), 2e-5)
        assert (policy(batch).logprobs - batch.sampler_logprobs).abs().max() <= 2e-5
        assert batch.sampler_logprobs.dtype == torch.float32


@pytest.mark.parametrize("name", SERVED)
def test_greedy_is_what_transformers_generates(name):
    policy = shared_policy(name, torch.float64, vocab_size=None)
    ids, mask, u = draw(rows=9)
    greedy = sampling_params(0.0, vocab_size=None)
    batch = engine(policy, ids, mask, u, greedy, slots=4, sync_every=4)
    for response, prompt, attended in zip(batch.responses(), ids, mask, strict=True):
        alone = prompt[attended][None]
        expected = policy.lm.generate(
            alone,
            attention_mask=torch.ones_like(alone),
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            eos_token_id=list(EOS),
            pad_token_id=0,
        )
        assert response == expected[0, alone.shape[1] :].tolist()


def test_bf16_gives_the_scorers_logprobs_to_rounding():
    policy = shared_policy("qwen2", torch.bfloat16)
    batch = engine(policy, *draw(), sampling_params(), slots=5)
    gap = (policy(batch).logprobs - batch.sampler_logprobs)[batch.mask].abs()
    assert gap.mean() < 0.02
    assert batch.sampler_logprobs.dtype == torch.float32


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize("prefill_tokens", [1, 16_384])
def test_with_a_sync_at_every_step_no_slot_works_in_vain(monkeypatch, prefill_tokens):
    """As many slot-steps as tokens, in as many steps as the longest queue of a slot needs.

    Also where each prompt is read alone, and its rows do not fill the slots.
    """
    monkeypatch.setattr(module, "PREFILL_TOKENS", prefill_tokens)
    batch = continuous_batch(shared_policy("llama"), sampling_params(), slots=6)
    decode(batch, sync_every=1)
    tokens = int(batch.state.lengths[:-1].sum())
    assert batch.slot_steps == tokens
    assert batch.steps < tokens / 6 + MAX_TOKENS


def test_no_step_is_done_after_the_longest_response_must_have_ended():
    """Also where the host looks at the slots in intervals that do not divide its length."""
    batch = continuous_batch(shared_policy("llama"), sampling_params(eos_ids=()), slots=36)
    decode(batch, sync_every=7)
    assert batch.steps == MAX_TOKENS


def test_an_idle_slot_stays_at_position_zero():
    """If it moved on, a step would read more keys than the limit it was given."""
    batch = continuous_batch(shared_policy("llama"), sampling_params(), slots=6)
    positions, sync = [], batch.sync

    def record_and_sync():
        state = batch.state
        positions.append(state.cache.positions[state.slot_row == state.idle_row])
        sync()

    batch.sync = record_and_sync
    decode(batch, sync_every=7)
    assert torch.cat(positions).numel() > 10
    assert not torch.cat(positions).any()


def test_rarer_syncs_cost_at_most_the_interval_for_each_row():
    batch = continuous_batch(shared_policy("llama"), sampling_params(), slots=6)
    syncs, sync = [], batch.sync

    def count_and_sync():
        syncs.append(1)
        sync()

    batch.sync = count_and_sync
    decode(batch, sync_every=5)
    assert batch.slot_steps <= int(batch.state.lengths[:-1].sum()) + 4 * 36
    assert len(syncs) <= -(-batch.steps // 5) + 1, "the host waits for the device only in a sync"


@pytest.mark.parametrize("compile", [True, False])
def test_a_compiled_step_sees_few_batch_sizes_and_one_length(compile, monkeypatch):
    calls = []

    def record_and_step(state, policy, slots, max_length):
        calls.append((slots, max_length))
        decode_step(state, policy, slots, max_length)

    monkeypatch.setattr(module, "decode_step", record_and_step)
    monkeypatch.setattr(module, "compiled_step", lambda: record_and_step)
    policy = shared_policy("llama")
    decode(continuous_batch(policy, sampling_params(), slots=32, compile=compile), sync_every=2)
    sizes = {slots for slots, _ in calls}
    max_lengths = {max_length for _, max_length in calls}
    if compile:
        assert sizes <= {32, 16, 8}
        assert len(max_lengths) == 1
    else:
        assert len(sizes) > 4
        assert len(max_lengths) > 1


def test_each_prompt_is_read_once_for_all_of_its_samples_and_without_its_last_token():
    policy, shapes = tiny_policy("llama"), []

    def record(module, arguments, options):
        shapes.append(tuple(options["input_ids"].shape))

    policy.backbone.register_forward_pre_hook(record, with_kwargs=True)
    engine(policy, *draw(), sampling_params(), slots=4)
    assert [shape for shape in shapes if shape[1] > 1] == [(9, 32)]


def test_prompts_are_read_longest_first_within_the_token_budget(monkeypatch):
    """The prompts have 1, 33, 7, 2, 19, 3, 12, 1 and 5 tokens."""
    monkeypatch.setattr(module, "PREFILL_TOKENS", 24)
    read, prefill = [], module.prefill

    def record_and_prefill(policy, token_lists):
        read.append([len(tokens) for tokens in token_lists])
        return prefill(policy, token_lists)

    monkeypatch.setattr(module, "prefill", record_and_prefill)
    decode(continuous_batch(shared_policy("llama"), sampling_params(), slots=4), sync_every=4)
    assert read == [[33], [19], [12, 7], [5, 3, 2, 1], [1]]


def test_fewer_slots_where_the_budget_holds_fewer():
    policy, arguments = shared_policy("llama"), draw()
    # keys and values · layers · heads · dim · bytes · tokens
    slot_bytes = 2 * 2 * 2 * 12 * 4 * (33 + MAX_TOKENS - 1)
    for budget, expected in ((3.5 * slot_bytes, 3), (0.1 * slot_bytes, 1), (1e9, 16)):
        batch = continuous_batch(policy, sampling_params(), slots=16, max_kv_gb=budget / 1e9)
        assert batch.state.cache.slots == expected
    few = {"slots": 16, "max_kv_gb": 3.5 * slot_bytes / 1e9}
    batch = engine(policy, *arguments, sampling_params(), **few)
    assert batch.responses() == engine(policy, *arguments, sampling_params()).responses()


def test_out_of_memory_halves_the_slots_once_and_warns(monkeypatch, caplog):
    policy, (ids, mask, u) = shared_policy("llama"), draw()
    expected = engine(policy, ids, mask, u, sampling_params()).responses()
    expected_few = engine(policy, ids, mask, u[:9], sampling_params()).responses()
    most_slots = 6

    def step_with_little_memory(state, policy, slots, max_length):
        if slots > most_slots:
            raise torch.OutOfMemoryError
        decode_step(state, policy, slots, max_length)

    monkeypatch.setattr(module, "decode_step", step_with_little_memory)
    with caplog.at_level(logging.WARNING):
        assert engine(policy, ids, mask, u, sampling_params(), slots=12).responses() == expected
        module.warn_once.cache_clear()
        # Nine rows take nine slots at most: half of those, and not half of 256.
        few = engine(policy, ids, mask, u[:9], sampling_params(), slots=256)
        assert few.responses() == expected_few
    assert len(caplog.messages) == 2
    assert all("half the slots" in message for message in caplog.messages)
    most_slots = 2
    with pytest.raises(torch.OutOfMemoryError):
        engine(policy, ids, mask, u, sampling_params(), slots=12)
    assert policy.lm.config._attn_implementation == "sdpa"


def test_no_cache_is_held_after_a_rollout(monkeypatch):
    """Nor until Python looks for cycles: learning needs the memory at once."""
    caches = []

    class RecordedCache(SlotCache):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            caches.append(weakref.ref(self))

    monkeypatch.setattr(decoding, "SlotCache", RecordedCache)
    gc.disable()
    try:
        engine(shared_policy("llama"), *draw(), sampling_params())
        assert [cache() for cache in caches] == [None]
    finally:
        gc.enable()


# ---------------------------------------------------------------- what it leaves behind


@pytest.mark.parametrize("training", [True, False])
def test_attention_and_mode_are_restored_also_after_an_exception(training, monkeypatch):
    """Gradient checkpointing is on: in train mode it would drop the cache."""
    policy, arguments = tiny_policy("llama", torch.float64), draw()
    expected = engine(policy, *arguments, sampling_params()).responses()
    policy.lm.gradient_checkpointing_enable()
    policy.train(training)

    def state() -> tuple:
        modes = {m.training for m in policy.modules()}
        attention = policy.lm.config._attn_implementation
        return attention, policy.lm.is_gradient_checkpointing, modes, torch.is_grad_enabled()

    before = state()
    assert engine(policy, *arguments, sampling_params()).responses() == expected
    assert state() == before
    monkeypatch.setattr(decoding, "one_pass", None)
    with pytest.raises(TypeError):
        engine(policy, *arguments, sampling_params())
    assert state() == before
    assert before[0] != SLOT_ATTENTION


# ---------------------------------------------------------------- models that slots cannot serve


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attn_logit_softcapping": 30.0}, "its attention scores are soft-capped"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "it has layers of linear_"),
        ({"layer_types": ["chunked_attention", "full_attention"]}, "it has layers of chunked_"),
        ({"num_kv_shared_layers": 1}, "its layers share keys"),
    ],
)
def test_other_models_are_sampled_by_cached_with_one_warning(change, reason, caplog, monkeypatch):
    policy, arguments = tiny_policy("llama"), (*prompts(), uniforms(6, 8), sampling_params())
    monkeypatch.setattr(module, "cached", lambda *arguments: arguments)
    for name, value in change.items():
        setattr(policy.lm.config, name, value)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert engine(policy, *arguments) == (policy, *arguments)
    assert len(caplog.messages) == 1
    assert reason in caplog.text


def test_unsupported_recognises_real_configurations():
    def policy(config):
        with torch.device("meta"):
            return Policy(AutoModelForCausalLM.from_config(config))

    small = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "head_dim": 16,
        "num_key_value_heads": 1,
        "vocab_size": 32,
    }
    sinks = GptOssConfig(**small, num_local_experts=2)
    layers = ["linear_attention", "full_attention"]
    hybrid = Qwen3NextConfig(**small, num_experts=2, layer_types=layers)
    assert unsupported(policy(sinks).backbone) == "its attention has sinks"
    assert unsupported(policy(hybrid).backbone) == "it has layers of linear_attention"
    assert unsupported(policy(LlamaConfig(**small)).backbone) is None
    assert unsupported(shared_policy("gemma2").backbone) == "its attention scores are soft-capped"


def test_a_model_that_attention_itself_refuses_is_sampled_by_cached_too(monkeypatch, caplog):
    """As a model would that `unsupported` does not know."""
    policy, arguments = tiny_policy("gemma2"), (*prompts(), uniforms(6, 8))
    monkeypatch.setattr(module, "unsupported", lambda backbone: None)
    with caplog.at_level(logging.WARNING):
        batch = engine(policy, *arguments, sampling_params())
    assert_same(batch, cached(policy, *arguments, sampling_params()), 0)
    assert "sampled by cached instead" in caplog.text
    assert policy.lm.config._attn_implementation != SLOT_ATTENTION


def test_rotary_embeddings_that_depend_on_the_batch_are_recognised():
    """They wait for the host, which a CUDA graph cannot record."""
    policy = tiny_policy("llama")
    for kind in set(ROPE_INIT_FUNCTIONS) | {"default"}:
        policy.lm.config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4}
        assert batch_dependent_rope(policy) == (kind in ("dynamic", "longrope"))
    policy.lm.config.rope_parameters = {
        "full_attention": {"rope_type": "dynamic"},
        "sliding_attention": {},
    }
    assert batch_dependent_rope(policy)


# ---------------------------------------------------------------- the compiled step, FlashAttention


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without a compiler: the step as traced. Lists the traces."""
    torch_compile, traces = torch.compile, []

    def count_and_run(graph, inputs):
        traces.append(graph)
        return graph.forward

    def trace_only(step, **options):
        return torch_compile(step, backend=count_and_run, **options)

    monkeypatch.setattr(torch, "compile", trace_only)
    compiled_step.cache_clear()
    torch._dynamo.reset()
    yield traces
    compiled_step.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "count"), [("llama", 16), ("qwen2", 8), ("gemma3", 8)])
def test_the_whole_step_is_one_graph(name, count, traced):
    """fullgraph=True raises where tracing meets a wait for the host."""
    policy, arguments = tiny_policy(name), draw(rows=18)
    options = {"slots": count, "sync_every": 4}
    batch = engine(policy, *arguments, sampling_params(), compile=True, **options)
    assert_same(batch, engine(policy, *arguments, sampling_params(), **options), 2e-5)


def test_compiled_steps_serve_later_rollouts_with_other_prompts_rows_and_weights(traced):
    """Two capacities and two numbers of rows, whatever the 20 rollouts ask for."""
    policy, g = tiny_policy("llama", torch.float64), torch.Generator().manual_seed(0)
    for i in range(20):
        group, longest = 2 + i % 3, 18 + i // 2  # 16 … 32 rows; at most 41 … 50 tokens
        lengths = [longest, *torch.randint(1, longest, (7,), generator=g).tolist()]
        prompts = [torch.randint(VOCAB, (n,), generator=g).tolist() for n in lengths]
        arguments = (*left_pad(prompts, 0), uniforms(8 * group, MAX_TOKENS, i))
        batch = engine(policy, *arguments, sampling_params(), slots=8, compile=True)
        assert_same(batch, naive(policy, *arguments, sampling_params()), 1e-5)
        with torch.no_grad():
            for p in policy.lm.parameters():
                p.mul_(1.01)
    assert len(traced) <= 2 * 2
    alive = weakref.ref(policy)
    del policy
    gc.collect()
    assert alive() is None, "compiled steps keep no policy"


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 9, 639, 640, 641, 1025])
def test_a_capacity_is_one_of_few_and_at_most_a_quarter_too_large(tokens):
    assert tokens <= capacity_bucket(tokens) < 1.25 * tokens + (tokens < 4)
    assert capacity_bucket(capacity_bucket(tokens)) == capacity_bucket(tokens)
    assert len({capacity_bucket(n) for n in range(513, 1025)}) == 4


def test_flash_attention_computes_nothing_else_in_each_layer(monkeypatch):
    """Lengths and starts are computed once a step."""

    class ViewsOnly(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            assert out.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr(), func
            return out

    cache = SlotCache(1, 6, 40, torch.device("cpu"))
    query = torch.randn(4, 8, 1, 16)
    key, value = (torch.randn(6, 40, 2, 16)[:4].transpose(1, 2) for _ in range(2))
    monkeypatch.setattr(slots, "FLASH", lambda q, *args, **options: (q,))
    cache.begin_step(4, 40)
    with ViewsOnly():
        flash_attention(query, key, value, cache, 0.25, 9)


def test_flash_attention_is_called_as_its_schema_says(monkeypatch):
    """On meta tensors: right names, right shapes, and a flat view of the slots, not a copy."""
    assert slots.FLASH_READS_LENGTHS
    cache = SlotCache(1, 6, 40, torch.device("meta"))
    query = torch.empty(4, 8, 1, 16, device="meta", dtype=torch.bfloat16)
    key, value = (
        torch.empty(6, 40, 2, 16, device="meta", dtype=torch.bfloat16)[:4].transpose(1, 2)
        for _ in range(2)
    )
    cache.begin_step(4, 40)
    flash, calls = slots.FLASH, []

    def record_and_call(q, k, v, *args, **options):
        calls.append((q, k, options))
        return flash(q, k, v, *args, **options)

    monkeypatch.setattr(slots, "FLASH", record_and_call)
    assert flash_attention(query, key, value, cache, 0.25, None).shape == (4, 1, 8, 16)
    q, k, options = calls[0]
    assert q.shape == (4, 8, 16)
    assert k.shape == (160, 2, 16)
    assert k.stride() == (32, 16, 1)
    assert options["seqused_k"].dtype == torch.int32
    assert options["seqused_k"].shape == (4,)
    flash_attention(query, key, value, cache, 0.25, 9)
    assert calls[1][2]["window_size_left"] == 8, "9 keys, with its own"


@pytest.mark.parametrize("window", [None, 5])
def test_flash_and_dense_attention_see_the_same_keys(window, monkeypatch):
    """The flash call done by hand: sequences 40 apart, position + 1 long, with a left window."""
    cache, g = SlotCache(1, 4, 40, torch.device("cpu")), torch.Generator().manual_seed(0)
    cache.positions[:] = torch.tensor([0, 39, 17, 4])
    query = torch.randn(4, 6, 1, 8, generator=g)
    key, value = (torch.randn(4, 40, 2, 8, generator=g).transpose(1, 2) for _ in range(2))

    def flash_by_hand(q, k, v, query_starts, key_starts, *sizes, scale, seqused_k, **windows):
        max_query, max_key, dropout, causal, return_debug_mask = sizes
        assert (max_query, max_key, dropout) == (1, 40, 0.0)
        assert not causal
        assert not return_debug_mask
        assert query_starts.tolist() == [0, 1, 2, 3, 4]
        left = windows["window_size_left"]
        out = []
        for i, length in enumerate(seqused_k.tolist()):
            start = int(key_starts[i])
            first = 0 if left is None else max(length - 1 - left, 0)
            used = slice(start + first, start + length)
            keys, values = (x[used].repeat_interleave(3, 1) for x in (k, v))
            scores = torch.einsum("hd,thd->ht", q[i], keys) * scale
            out.append(torch.einsum("ht,thd->hd", scores.softmax(-1), values))
        return (torch.stack(out),)

    monkeypatch.setattr(slots, "FLASH", flash_by_hand)
    cache.begin_step(4, 40)
    dense, _ = slot_attention(
        None, query, key, value, scaling=0.3, slots=cache, sliding_window=window
    )
    assert torch.allclose(flash_attention(query, key, value, cache, 0.3, window), dense, atol=1e-6)


# ---------------------------------------------------------------- one read of the vocabulary


@pytest.mark.parametrize("size", [1, 5, TILE, TILE + 1, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_one_pass_is_pick(size, temperature):
    g = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(400, size, generator=g, dtype=torch.float64)
    logits[:, 1::3] = -torch.inf
    u = uniforms(400, 1)[:, 0]
    u[:3] = torch.tensor([0.0, 1 - 2**-53, 0.5])
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        ids, logprobs = one_pass(logits.to(dtype), u, SamplingParams(temperature))
        expected_ids, expected = pick(logits.to(dtype), u, SamplingParams(temperature))
        assert torch.equal(ids, expected_ids)
        assert (logprobs - expected).abs().max() <= tolerance
        assert logprobs.dtype == dtype
        assert logprobs.isfinite().all(), "an id of probability 0 was picked"


def test_one_pass_never_picks_an_id_of_probability_zero_at_the_edges():
    """Whole tiles of probability 0 in front, behind and between; uniforms at both ends."""
    support = [TILE + 3, 4 * TILE]
    logits = torch.full((1, 6 * TILE), -torch.inf)
    logits[0, support] = torch.tensor([0.0, -90.0])
    for u in (0.0, 0.5, 1 - 2**-53, 1.0):
        ids, logprobs = inverse_cdf(logits, torch.tensor([u], dtype=torch.float64))
        assert ids.item() in support, u
        assert logprobs.isfinite().all(), u
    nan = torch.full((2, 70), torch.nan)
    ids, _ = inverse_cdf(nan, torch.tensor([0.2, 0.9], dtype=torch.float64))
    assert ids.max() < 70, "NaN is left to the loss to report"


def test_one_pass_draws_every_id_in_proportion():
    p = torch.tensor([0.15, 0.4, 0.05, 0.3, 0.1], dtype=torch.float64)
    even_grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    ids, logprobs = one_pass(p.log().expand(2000, -1), even_grid, SamplingParams())
    assert (ids.bincount(minlength=5) / 2000 - p).abs().max() <= 1.01 / 2000
    assert torch.allclose(logprobs, p.log()[ids])


def test_one_pass_takes_all_sampling_parameters():
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(200, ROWS, generator=g, dtype=torch.float64)
    u = uniforms(200, 1)[:, 0]
    for change in (
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"temperature": 0.0},
        {"vocab_size": VOCAB},
        {"vocab_size": VOCAB, "top_k": 3},
    ):
        ids, logprobs = one_pass(logits, u, SamplingParams(**change))
        expected_ids, expected = pick(logits, u, SamplingParams(**change))
        assert torch.equal(ids, expected_ids), change
        assert torch.allclose(logprobs, expected, atol=1e-12), change


# ---------------------------------------------------------------- stop strings


@pytest.mark.parametrize("sampler", [naive, cached, engine])
def test_a_stop_string_ends_a_response_where_it_is_complete(sampler):
    """Any id from 5 to 29 completes the stop string. Such a response is not truncated."""

    def stop(ids):
        return any(5 <= i < 30 for i in ids)

    policy, arguments = shared_policy("llama", torch.float64), draw()
    full = naive(policy, *arguments, sampling_params())
    batch = sampler(policy, *arguments, sampling_params(stop=stop))
    stopped = 0
    for i, (long, short) in enumerate(zip(full.responses(), batch.responses(), strict=True)):
        end = next((t for t, token in enumerate(long) if 5 <= token < 30), None)
        assert short == (long if end is None else long[: end + 1])
        assert batch.truncated[i] == (full.truncated[i] and end is None)
        stopped += end is not None
    assert 5 < stopped < 36
    assert batch.mask.shape[1] == batch.mask.sum(1).max()
    assert (policy(batch).logprobs - batch.sampler_logprobs)[batch.mask].abs().max() < 1e-5


def test_the_stop_function_sees_the_response_so_far_and_nothing_behind_it():
    policy, arguments = shared_policy("llama"), draw()
    full, seen = naive(policy, *arguments, sampling_params()), []

    def stop(ids):
        seen.append(tuple(ids))
        return len(ids) >= 4

    engine(policy, *arguments, sampling_params(stop=stop), slots=4, sync_every=1)
    prefixes = {tuple(r[:n]) for r in full.responses() for n in range(len(r) + 1)}
    assert len(seen) > 36
    assert set(seen) <= prefixes


def test_a_stop_string_frees_its_slot():
    policy = shared_policy("llama")
    without = continuous_batch(policy, sampling_params(), slots=4)
    decode(without, sync_every=3)
    assert without.slot_steps > 36 * 6
    stopped = continuous_batch(policy, sampling_params(stop=lambda ids: len(ids) >= 2), slots=4)
    decode(stopped, sync_every=3)
    assert stopped.slot_steps <= 36 * (2 + 3)
    assert (stopped.state.slot_row == stopped.state.idle_row).all()
