"""The engine is `naive`, token for token, whatever slots, company and refills; it wastes nothing, leaves nothing."""

import gc
import importlib
import itertools
import logging
import weakref

import pytest
import torch
from models import EOS, ROWS, VOCAB, prompts, rule, tiny_policy, uniforms
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, Qwen3NextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rlkl.model import Policy, left_pad
from rlkl.rollout import cached, engine, naive, pick, slots
from rlkl.rollout.engine import Run, chunks
from rlkl.rollout.one_pass import TILE, inverse_cdf, one_pass
from rlkl.rollout.slots import ATTENTION, Slots, dynamic_positions, ragged, slot_attention, unsupported
from rlkl.types import Batch, Sampling

module = importlib.import_module("rlkl.rollout.engine")
SERVED = ["llama", "tied", "qwen2", "qwen3", "gemma", "granite", "gpt2", "cohere", "phi", "mistral", "gemma3", "phi3",
          "olmo2", "smollm3", "gpt_neox"]
LONGEST = 24  # tokens of a reply: past every window, over several refills


@pytest.fixture(autouse=True)
def _every_line_is_new():
    module.say.cache_clear()


def many(rows: int = 36, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Nine prompts of 1 to 33 tokens, and uniforms for `rows` replies."""
    g = torch.Generator().manual_seed(seed)
    lengths = [1, 33, 7, 2, 19, 3, 12, 1, 5]
    ids, mask = left_pad([torch.randint(VOCAB, (n,), generator=g).tolist() for n in lengths], 0)
    return ids, mask, uniforms(rows, LONGEST, seed)


def same(a: Batch, b: Batch, tolerance: float) -> None:
    for field in ("prompt_ids", "prompt_mask", "response_ids", "mask", "truncated"):
        assert torch.equal(getattr(a, field), getattr(b, field)), field
    assert a.temperature == b.temperature
    assert (a.sampler_logprobs - b.sampler_logprobs).abs().max() <= tolerance


def run_of(policy: Policy, ids: Tensor, mask: Tensor, u: Tensor, chosen: Sampling, count: int, kv_gb=None) -> Run:
    with torch.no_grad():
        return Run(policy, [i[m].tolist() for i, m in zip(ids, mask, strict=True)], u, chosen, count, kv_gb)


# ---------------------------------------------------------------- twins


@pytest.mark.parametrize(("count", "every"), list(itertools.product([1, 3, 16, 64], [1, 7, 64])))
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_any_number_of_slots_and_any_interval_give_the_tokens_of_naive(name, count, every, monkeypatch):
    monkeypatch.setattr(module, "PREFILL_TOKENS", 70)  # prompts are read in several goes, the later ones mid-run
    policy, (ids, mask, u) = tiny_policy(name, torch.float64), many()
    found = engine(policy, ids, mask, u, rule(), slots=count, sync_every=every)
    assert len(set(found.mask.sum(1).tolist())) > 8, "lengths must differ, or no slot is ever refilled early"
    same(found, naive(policy, ids, mask, u, rule()), 1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("name", SERVED)
def test_every_architecture_gives_the_tokens_of_naive(name, temperature):
    policy, (ids, mask, u) = tiny_policy(name, torch.float64), many()
    assert unsupported(policy) is None
    found = engine(policy, ids, mask, u, rule(temperature), slots=5, sync_every=3)
    same(found, naive(policy, ids, mask, u, rule(temperature)), 1e-12)


@pytest.mark.parametrize("name", SERVED)
def test_float32_gives_the_tokens_of_naive_at_a_pinned_draw_and_the_scorers_logprobs(name):
    policy, (ids, mask, u) = tiny_policy(name), many()
    for temperature in (1.0, 0.7):
        found = engine(policy, ids, mask, u, rule(temperature), slots=5, sync_every=3)
        same(found, naive(policy, ids, mask, u, rule(temperature)), 2e-5)
        assert (policy.evaluate(found).logprobs - found.sampler_logprobs).abs().max() <= 2e-5
        assert found.sampler_logprobs.dtype == torch.float32


@pytest.mark.parametrize("name", SERVED)
def test_greedy_is_what_transformers_generates(name):
    policy, (ids, mask, u) = tiny_policy(name, torch.float64, vocab_size=None), many(9)
    found = engine(policy, ids, mask, u, rule(0.0, vocab_size=None), slots=4, sync_every=4)
    for row, prompt, kept in zip(found.replies(), ids, mask, strict=True):
        alone = prompt[kept][None]
        want = policy.lm.generate(alone, attention_mask=torch.ones_like(alone), do_sample=False,
                                  max_new_tokens=LONGEST, eos_token_id=list(EOS), pad_token_id=0)
        assert row == want[0, alone.shape[1] :].tolist()


def test_bf16_gives_the_scorers_logprobs_to_rounding():
    policy, (ids, mask, u) = tiny_policy("qwen2", torch.bfloat16), many()
    found = engine(policy, ids, mask, u, rule(), slots=5)
    gap = (policy.evaluate(found).logprobs - found.sampler_logprobs)[found.mask].abs()
    assert gap.mean() < 0.02
    assert found.sampler_logprobs.dtype == torch.float32


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize("read", [1, 16_384])
def test_with_a_look_at_every_step_no_slot_works_in_vain(monkeypatch, read):
    """Refills and closed gaps: as many slot-steps as tokens, in as many steps as the longest queue of a slot needs.
    Also where each prompt is read alone, whose rows do not fill the slots."""
    monkeypatch.setattr(module, "PREFILL_TOKENS", read)
    policy, (ids, mask, u) = tiny_policy("llama"), many()
    run = run_of(policy, ids, mask, u, rule(), 6)
    with torch.no_grad():
        run.to_the_end(1, graphs=False, compile=False)
    tokens = int(run.length[:-1].sum())
    assert run.slot_steps == tokens
    assert run.steps < tokens / 6 + LONGEST


def test_a_slot_that_is_done_waits_at_the_first_position():
    """Where it would walk on, a step would read beyond what it was told to."""
    policy, (ids, mask, u) = tiny_policy("llama"), many()
    run, waited = run_of(policy, ids, mask, u, rule(), 6), []
    run.look, look = lambda: (waited.append(run.kv.position[:6][run.row[:6] == run.idle]), look()), run.look
    with torch.no_grad():
        run.to_the_end(7, graphs=False, compile=False)
    assert torch.cat(waited).numel() > 10
    assert not torch.cat(waited).any()


def test_rarer_looks_cost_at_most_the_interval_for_each_row():
    policy, (ids, mask, u) = tiny_policy("llama"), many()
    run, looks = run_of(policy, ids, mask, u, rule(), 6), []
    run.look, look = lambda: (looks.append(1), look()), run.look
    with torch.no_grad():
        run.to_the_end(5, graphs=False, compile=False)
    assert run.slot_steps <= int(run.length[:-1].sum()) + 4 * 36
    assert len(looks) <= -(-run.steps // 5) + 1, "the host waits for the device only when it looks"


@pytest.mark.parametrize("fixed", [True, False])
def test_where_every_batch_size_costs_a_graph_sizes_are_halves(fixed, monkeypatch):
    policy, (ids, mask, u) = tiny_policy("llama"), many()
    monkeypatch.setattr(torch, "compile", lambda step, **kw: step)
    run, sizes = run_of(policy, ids, mask, u, rule(), 32), []
    run.step, step = lambda n, reach: (sizes.append((n, reach)), step(n, reach)), run.step
    with torch.no_grad():
        run.to_the_end(2, graphs=False, compile=fixed)
    assert {n for n, _ in sizes} <= {32, 16, 8} if fixed else len({n for n, _ in sizes}) > 4
    assert len({reach for _, reach in sizes}) == 1 if fixed else len({reach for _, reach in sizes}) > 1


def test_each_prompt_is_read_once_for_all_of_its_samples():
    policy, (ids, mask, u) = tiny_policy("llama"), many()
    read = []
    policy.backbone.register_forward_pre_hook(lambda m, a, kw: read.append(kw["input_ids"].shape), with_kwargs=True)
    engine(policy, ids, mask, u, rule(), slots=4)
    assert [tuple(shape) for shape in read if shape[1] > 1] == [(9, 32)], "and without its last token"


def test_prompts_are_read_longest_first_within_the_token_budget(monkeypatch):
    monkeypatch.setattr(module, "PREFILL_TOKENS", 20)
    assert chunks([[0] * n for n in (3, 9, 2, 30, 8)]) == [[3], [1, 4], [0, 2]]


def test_fewer_slots_where_the_budget_holds_fewer():
    policy, (ids, mask, u) = tiny_policy("llama"), many()
    each = 2 * 2 * 2 * 12 * 4 * (33 + LONGEST - 1)  # keys and values, layers, heads, dim, bytes, tokens
    for budget, want in ((3.5 * each, 3), (0.1 * each, 1), (1e9, 16)):
        assert run_of(policy, ids, mask, u, rule(), 16, budget / 1e9).kv.count == want
    found = engine(policy, ids, mask, u, rule(), slots=16, max_kv_gb=3.5 * each / 1e9)
    assert found.replies() == engine(policy, ids, mask, u, rule()).replies()


def test_out_of_memory_halves_the_slots_once_and_says_so(monkeypatch, caplog):
    policy, (ids, mask, u) = tiny_policy("llama"), many()
    want, step, most = engine(policy, ids, mask, u, rule()).replies(), Run.step, 6
    want_few = engine(policy, ids, mask, u[:9], rule()).replies()

    def scarce(self, count, reach):
        if count > most:
            raise torch.OutOfMemoryError
        step(self, count, reach)

    monkeypatch.setattr(Run, "step", scarce)
    with caplog.at_level(logging.WARNING):
        assert engine(policy, ids, mask, u, rule(), slots=12).replies() == want
        module.say.cache_clear()
        assert engine(policy, ids, mask, u[:9], rule(), slots=256).replies() == want_few
    assert caplog.messages == ["sampling ran out of memory: once more with half the slots"] * 2
    most = 2
    with pytest.raises(torch.OutOfMemoryError):
        engine(policy, ids, mask, u, rule(), slots=12)
    assert policy.lm.config._attn_implementation == "sdpa"


def test_nothing_is_held_after_a_run(monkeypatch):
    policy, (ids, mask, u), held = tiny_policy("llama"), many(), []

    class Seen(Slots):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            held.append(weakref.ref(self))

    monkeypatch.setattr(module, "Slots", Seen)
    engine(policy, ids, mask, u, rule())
    gc.collect()
    assert [slot() for slot in held] == [None]


# ---------------------------------------------------------------- what it leaves behind


@pytest.mark.parametrize("training", [True, False])
def test_attention_mode_and_checkpointing_are_as_before_also_after_an_exception(training, monkeypatch):
    policy, (ids, mask, u) = tiny_policy("llama", torch.float64), many()
    want = engine(policy, ids, mask, u, rule()).replies()
    policy.lm.gradient_checkpointing_enable()
    policy.train(training)

    def state() -> tuple:
        flags = {m.training for m in policy.modules()}
        own = policy.lm.config._attn_implementation
        return own, policy.lm.is_gradient_checkpointing, flags, torch.is_grad_enabled()

    before = state()
    assert engine(policy, ids, mask, u, rule()).replies() == want, "checkpointing in train mode would drop the cache"
    assert state() == before
    monkeypatch.setattr(module, "one_pass", None)
    with pytest.raises(TypeError):
        engine(policy, ids, mask, u, rule())
    assert state() == before
    assert before[0] != ATTENTION


# ---------------------------------------------------------------- models that slots cannot serve


@pytest.mark.parametrize(("change", "why"), [
    ({"attn_logit_softcapping": 30.0}, "its attention scores are soft-capped"),
    ({"layer_types": ["linear_attention", "full_attention"]}, "it has layers of linear_attention"),
    ({"layer_types": ["chunked_attention", "full_attention"]}, "it has layers of chunked_attention"),
    ({"num_kv_shared_layers": 1}, "its layers share keys"),
])
def test_what_slots_do_not_do_is_left_to_cached_and_one_line_says_why(change, why, caplog, monkeypatch):
    policy, (ids, mask), u = tiny_policy("llama"), prompts(), uniforms(6, 8)
    monkeypatch.setattr(module, "cached", lambda *arguments: arguments)
    for name, value in change.items():
        setattr(policy.lm.config, name, value)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert engine(policy, ids, mask, u, rule()) == (policy, ids, mask, u, rule())
    assert caplog.messages == [
        f"sampling.backend=engine cannot serve llama ({why}): sampled by cached instead"]


def test_real_configs_are_told_apart():
    def policy(config):
        with torch.device("meta"):
            return Policy(AutoModelForCausalLM.from_config(config))

    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
             "head_dim": 16, "num_key_value_heads": 1, "vocab_size": 32}
    assert unsupported(policy(GptOssConfig(**small, num_local_experts=2))) == "its attention has sinks"
    hybrid = Qwen3NextConfig(**small, num_experts=2, layer_types=["linear_attention", "full_attention"])
    assert unsupported(policy(hybrid)) == "it has layers of linear_attention"
    assert unsupported(policy(LlamaConfig(**small))) is None
    assert unsupported(tiny_policy("gemma2")) == "its attention scores are soft-capped"


def test_an_attention_that_meets_what_it_does_not_do_falls_back_too(monkeypatch, caplog):
    """A model nobody listed: the attention function itself refuses, and the run starts over with `cached`."""
    policy, (ids, mask), u = tiny_policy("gemma2"), prompts(), uniforms(6, 8)
    monkeypatch.setattr(module, "unsupported", lambda policy: None)
    with caplog.at_level(logging.WARNING):
        same(engine(policy, ids, mask, u, rule()), cached(policy, ids, mask, u, rule()), 0)
    assert "sampled by cached instead" in caplog.text
    assert policy.lm.config._attn_implementation != ATTENTION


def test_rotary_embeddings_that_look_at_the_batch_are_found():
    """They wait for the host, which ends the recording of a CUDA graph."""
    policy = tiny_policy("llama")
    for kind in set(ROPE_INIT_FUNCTIONS) | {"default"}:
        policy.lm.config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4}
        assert dynamic_positions(policy) == (kind in ("dynamic", "longrope"))
    policy.lm.config.rope_parameters = {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {}}
    assert dynamic_positions(policy)


# ---------------------------------------------------------------- the compiled step, and the paths of CUDA


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_the_whole_step_is_one_graph(name, monkeypatch):
    """fullgraph=True raises where tracing meets a wait for the host; traced, the tokens are the same."""
    policy, (ids, mask, u), real = tiny_policy(name), many(18), torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **kw: real(step, backend="eager", **kw))
    torch._dynamo.reset()
    found = engine(policy, ids, mask, u, rule(), slots=16, sync_every=4, compile=True)
    same(found, engine(policy, ids, mask, u, rule(), slots=16, sync_every=4), 2e-5)


def test_flash_attention_is_called_as_its_schema_says(monkeypatch):
    """On meta tensors: right names, shapes and a flat view of the slots rather than a copy."""
    assert slots.RAGGED
    kv, called = Slots(1, 6, 40, torch.device("meta")), {}
    query = torch.empty(4, 8, 1, 16, device="meta", dtype=torch.bfloat16)
    key, value = (torch.empty(6, 40, 2, 16, device="meta", dtype=torch.bfloat16)[:4].transpose(1, 2) for _ in range(2))
    real = slots.FLASH

    def spy(q, k, v, *args, **kw):
        called.update(q=q.shape, k=k.shape, stride=k.stride(), used=kw["seqused_k"], window=kw["window_size_left"])
        return real(q, k, v, *args, **kw)

    monkeypatch.setattr(slots, "FLASH", spy)
    assert ragged(query, key, value, kv, 0.25, None).shape == (4, 1, 8, 16)
    assert (called["q"], called["k"], called["stride"]) == ((4, 8, 16), (160, 2, 16), (32, 16, 1))
    assert called["used"].dtype == torch.int32
    assert called["used"].shape == (4,)
    ragged(query, key, value, kv, 0.25, 9)
    assert called["window"] == 8, "9 keys, itself among them"


@pytest.mark.parametrize("window", [None, 5])
def test_ragged_and_dense_attention_see_the_same_keys(window, monkeypatch):
    """The flash call carried out by hand: sequences `room` apart, position + 1 long, a window to the left."""
    kv, g = Slots(1, 4, 40, torch.device("cpu")), torch.Generator().manual_seed(0)
    kv.position[:] = torch.tensor([0, 39, 17, 4])
    query = torch.randn(4, 6, 1, 8, generator=g)
    key, value = (torch.randn(4, 40, 2, 8, generator=g).transpose(1, 2) for _ in range(2))

    def by_hand(q, k, v, starts, key_starts, one, room, dropout, causal, debug, *, scale, seqused_k, window_size_left,
                window_size_right):
        assert (one, room, dropout, causal, debug) == (1, 40, 0.0, False, False)
        assert starts.tolist() == [0, 1, 2, 3, 4]
        out = []
        for i, used in enumerate(seqused_k.tolist()):
            first = int(key_starts[i])
            low = 0 if window_size_left is None else max(used - 1 - window_size_left, 0)
            keys, values = (x[first + low : first + used].repeat_interleave(3, 1) for x in (k, v))
            score = torch.einsum("hd,thd->ht", q[i], keys) * scale
            out.append(torch.einsum("ht,thd->hd", score.softmax(-1), values))
        return (torch.stack(out),)

    monkeypatch.setattr(slots, "FLASH", by_hand)
    kv.begin(40)
    dense, _ = slot_attention(None, query, key, value, scaling=0.3, slots=kv, sliding_window=window)
    assert torch.allclose(ragged(query, key, value, kv, 0.3, window), dense, atol=1e-6)


# ---------------------------------------------------------------- one read of the vocabulary


@pytest.mark.parametrize("size", [1, 5, TILE, TILE + 1, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_one_pass_is_pick(size, temperature):
    g = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(400, size, generator=g, dtype=torch.float64)
    logits[:, 1::3] = -torch.inf
    u = uniforms(400, 1)[:, 0]
    u[:3] = torch.tensor([0.0, 1 - 2**-53, 0.5])
    chosen = Sampling(temperature)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        (a, x), (b, y) = one_pass(logits.to(dtype), u, chosen), pick(logits.to(dtype), u, chosen)
        assert torch.equal(a, b)
        assert (x - y).abs().max() <= tolerance
        assert x.dtype == dtype
        assert x.isfinite().all(), "an id of probability 0 was chosen"


def test_one_pass_never_leaves_the_support_at_the_edges():
    """Whole tiles of probability 0 in front, behind and between; uniforms at both ends."""
    logits = torch.full((1, 6 * TILE), -torch.inf)
    logits[0, [TILE + 3, 4 * TILE]] = torch.tensor([0.0, -90.0])
    for u, want in ((0.0, TILE + 3), (0.5, TILE + 3), (1 - 2**-53, TILE + 3), (1.0, TILE + 3)):
        ids, logprobs = inverse_cdf(logits, torch.tensor([u], dtype=torch.float64))
        assert ids.tolist() in ([want], [4 * TILE])
        assert logprobs.isfinite().all()
    ids, _ = inverse_cdf(torch.full((2, 70), torch.nan), torch.tensor([0.2, 0.9], dtype=torch.float64))
    assert ids.max() < 70, "nan is for the loss to report"


def test_one_pass_draws_every_id_in_proportion():
    p = torch.tensor([0.15, 0.4, 0.05, 0.3, 0.1], dtype=torch.float64)
    grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    ids, logprobs = one_pass(p.log().expand(2000, -1), grid, Sampling())
    assert (ids.bincount(minlength=5) / 2000 - p).abs().max() <= 1.01 / 2000
    assert torch.allclose(logprobs, p.log()[ids])


@pytest.mark.parametrize("change", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"temperature": 0.0},
                                    {"vocab_size": VOCAB}, {"vocab_size": VOCAB, "top_k": 3}])
def test_one_pass_serves_every_rule(change):
    logits = 2 * torch.randn(200, ROWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = uniforms(200, 1)[:, 0]
    for a, b in zip(one_pass(logits, u, Sampling(**change)), pick(logits, u, Sampling(**change)), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


# ---------------------------------------------------------------- stop strings


@pytest.mark.parametrize("sampler", [naive, cached, engine])
def test_a_stop_string_ends_a_reply_where_it_is_complete(sampler):
    """Ids 5 to 30 stand for a string that any of them completes: for evaluation, where a row may end without an EOS."""
    def stop(ids):
        return any(5 <= i < 30 for i in ids)

    policy, (ids, mask, u) = tiny_policy("llama", torch.float64), many()
    whole, found = naive(policy, ids, mask, u, rule()), sampler(policy, ids, mask, u, rule(stop=stop))
    stopped = 0
    for i, (long, short) in enumerate(zip(whole.replies(), found.replies(), strict=True)):
        end = next((t for t, token in enumerate(long) if 5 <= token < 30), None)
        assert short == (long if end is None else long[: end + 1])
        assert found.truncated[i] == (whole.truncated[i] and end is None)
        stopped += end is not None
    assert 5 < stopped < 36
    assert found.mask.shape[1] == found.mask.sum(1).max()
    assert (policy.evaluate(found).logprobs - found.sampler_logprobs)[found.mask].abs().max() < 1e-5


def test_what_is_asked_whether_to_stop_is_the_reply_so_far_without_what_may_follow():
    policy, (ids, mask, u) = tiny_policy("llama"), many()
    whole, asked = naive(policy, ids, mask, u, rule()), []
    engine(policy, ids, mask, u, rule(stop=lambda ids: asked.append(ids) or len(ids) >= 4), slots=4, sync_every=1)
    starts = {tuple(reply[:n]) for reply in whole.replies() for n in range(len(reply) + 1)}
    assert len(asked) > 36
    assert {*map(tuple, asked)} <= starts


def test_a_stop_string_frees_its_slot():
    policy, (ids, mask, u) = tiny_policy("llama"), many()
    for stop, most in ((None, None), (lambda ids: len(ids) >= 2, 36 * (2 + 3))):
        run = run_of(policy, ids, mask, u, rule(stop=stop), 4)
        with torch.no_grad():
            run.to_the_end(3, graphs=False, compile=False)
        assert (run.slot_steps <= most) if most else (run.slot_steps > 36 * 6)
    assert F.one_hot(run.row, 37)[:, :36].sum() == 0
