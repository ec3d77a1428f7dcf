"""Rollouts: the uniform → token rule, cached = naive token for token, and sampled = scored."""

import itertools
import math

import pytest
import torch
from models import EOS, PROMPTS, ROWS, VOCAB, causal_lm, prompts, rule, tiny_policy, uniforms
from torch import Tensor

from rlkl.rollout import SAMPLERS, cached, naive, pick
from rlkl.rollout.sample import draw_uniforms
from rlkl.types import Batch, Sampling

EVERY = ["llama", "tied", "qwen2", "qwen3", "gemma", "gemma2", "granite", "gpt2", "cohere", "phi", "mistral", "gemma3",
         "phi3", "olmo2", "smollm3", "gpt_neox"]
DOUBLE = [name for name in EVERY if name != "gemma2"]  # transformers' eager attention is nan there with left padding
LAST = math.nextafter(1.0, 0.0)
BOTH = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


# ---------------------------------------------------------------- the one test


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", EVERY)
def test_scoring_pass_gives_the_samplers_logprobs_and_every_finished_row_ends_in_an_eos(name, temperature):
    policy = tiny_policy(name)
    ids, mask = prompts()
    batch = cached(policy, ids, mask, uniforms(48, 24, seed=3), rule(temperature))
    scored = policy.evaluate(batch).logprobs
    assert (scored - batch.sampler_logprobs).abs().max() <= 2e-5
    assert batch.sampler_logprobs.dtype == scored.dtype == torch.float32
    assert (batch.sampler_logprobs[batch.mask] < 0).all()
    ends = set()
    for reply, truncated in zip(batch.replies(), batch.truncated.tolist(), strict=True):
        assert not any(token in EOS for token in reply[:-1])
        assert truncated == (reply[-1] not in EOS)
        assert len(reply) == 24 or not truncated
        ends.add(None if truncated else reply[-1])
    assert len(ends) > 2, "the draw must hold truncated rows and rows that end in different members of the set"
    assert None in ends


# ---------------------------------------------------------------- twins


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", DOUBLE)
def test_cached_is_naive_token_for_token(name, seed):
    policy, (ids, mask) = tiny_policy(name, torch.float64, seed=seed), prompts()
    u, temperature = uniforms(12, 12, seed), (1.0, 0.7, 0.0)[seed]
    assert_same(naive(policy, ids, mask, u, rule(temperature)), cached(policy, ids, mask, u, rule(temperature)), 1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_cached_is_naive_in_float32_at_a_pinned_draw(name):
    policy, (ids, mask) = tiny_policy(name), prompts()
    u = uniforms(12, 12)
    assert_same(naive(policy, ids, mask, u, rule()), cached(policy, ids, mask, u, rule()), 2e-5)


def assert_same(a: Batch, b: Batch, tolerance: float) -> None:
    for field in ("prompt_ids", "prompt_mask", "response_ids", "mask", "truncated"):
        assert torch.equal(getattr(a, field), getattr(b, field)), field
    assert a.temperature == b.temperature
    assert (a.sampler_logprobs - b.sampler_logprobs).abs().max() <= tolerance
    assert a.mask.sum() > 2 * len(a), "too short to mean anything"


# ---------------------------------------------------------------- rows are independent


@BOTH
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_a_row_does_not_depend_on_its_neighbours_slot_group_or_padding(name, sampler):
    """Row (n g) is a function of prompt n and its own uniforms: alone, permuted, ungrouped, padded, it is the same."""
    policy, u = tiny_policy(name, torch.float64), uniforms(12, 12)

    def rows(ids: Tensor, mask: Tensor, u: Tensor) -> list[list[int]]:
        return sampler(policy, ids, mask, u, rule()).replies()

    want = rows(*prompts(), u)
    assert len({len(r) for r in want}) > 2
    assert rows(*prompts(groups=4), u) == want, "G = 4 and four times the prompt with G = 1"
    assert rows(*prompts(extra=5), u) == want, "five more columns of padding"
    ids, mask = prompts(groups=4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    assert rows(ids[order], mask[order], u[order]) == [want[i] for i in order], "another slot"
    for i in (0, 5, 11):
        alone = torch.tensor([PROMPTS[i // 4]])
        assert rows(alone, torch.ones_like(alone, dtype=torch.bool), u[[i]]) == [want[i]], "alone, without padding"
    garbage = torch.where(mask, ids, 77)
    assert rows(garbage, mask, u) == want, "other ids behind the prompt's mask"


@BOTH
def test_fewer_columns_of_uniforms_give_a_prefix(sampler):
    policy, (ids, mask), u = tiny_policy("llama", torch.float64), prompts(), uniforms(12, 12)
    whole, short = (sampler(policy, ids, mask, x, rule()) for x in (u, u[:, :5]))
    assert short.replies() == [r[:5] for r in whole.replies()]


# ---------------------------------------------------------------- mask, EOS, truncation


@BOTH
def test_the_mask_is_the_reply_up_to_its_first_eos_and_padding_follows(sampler):
    """Also where the pad id is an id the model samples: a sampled one is an action, and only its place tells."""
    policy, (ids, mask) = tiny_policy("llama", torch.float64), prompts()
    plain = cached(policy, ids, mask, uniforms(24, 12), rule())
    often = plain.response_ids[plain.mask].bincount(minlength=VOCAB)
    often[list(EOS)] = 0
    pad = int(often.argmax())
    batch = sampler(policy, ids, mask, uniforms(24, 12), rule(pad_id=pad))
    assert (batch.response_ids[batch.mask] == pad).any(), "the draw must sample the pad id"
    is_eos = torch.isin(batch.response_ids, torch.tensor(EOS))
    for row, eos in enumerate(is_eos.tolist()):
        length = eos.index(True) + 1 if True in eos else len(eos)
        assert batch.mask[row].tolist() == [t < length for t in range(len(eos))]
        assert (batch.response_ids[row, length:] == pad).all()
        assert not batch.sampler_logprobs[row, length:].any()
    assert batch.truncated.tolist() == [True not in eos for eos in is_eos.tolist()]


@BOTH
def test_an_eos_on_the_last_allowed_token_is_not_truncation(sampler):
    policy, (ids, mask), u = tiny_policy("llama"), prompts(), uniforms(12, 12)
    lengths = sampler(policy, ids, mask, u, rule()).mask.sum(1)
    length = int(lengths[(lengths > 1) & (lengths < 12)].min())
    batch = sampler(policy, ids, mask, u[:, :length], rule())
    assert torch.equal(batch.truncated, lengths > length)
    assert not batch.truncated.all()


@BOTH
def test_an_eos_as_the_very_first_token_is_a_reply_of_length_one(sampler):
    policy, (ids, mask) = tiny_policy("llama"), prompts()
    batch = sampler(policy, ids, mask, uniforms(6, 12), rule(eos_ids=tuple(range(VOCAB))))
    assert batch.mask.tolist() == [[True]] * 6
    assert not batch.truncated.any()
    assert (policy.evaluate(batch).logprobs - batch.sampler_logprobs).abs().max() <= 2e-5


@BOTH
def test_room_for_one_token(sampler):
    policy, (ids, mask), u = tiny_policy("gpt2"), prompts(), uniforms(24, 12)
    one, whole = sampler(policy, ids, mask, u[:, :1], rule()), sampler(policy, ids, mask, u, rule())
    assert one.mask.tolist() == [[True]] * 24
    assert torch.equal(one.response_ids, whole.response_ids[:, :1])
    assert one.truncated.tolist() == [t not in EOS for [t] in one.response_ids.tolist()]
    assert one.truncated.any()


@BOTH
def test_without_eos_ids_every_row_is_truncated(sampler):
    policy, (ids, mask) = tiny_policy("llama"), prompts()
    batch = sampler(policy, ids, mask, uniforms(6, 7), rule(eos_ids=()))
    assert batch.mask.tolist() == [[True] * 7] * 6
    assert batch.truncated.all()


@BOTH
def test_decoding_stops_when_the_last_row_has_ended(sampler):
    policy, (ids, mask) = tiny_policy("gpt2"), prompts()
    batch = sampler(policy, ids, mask, uniforms(3, 100, seed=2), rule())
    assert not batch.truncated.any()
    assert batch.mask.shape[1] == batch.mask.sum(1).max() < 100


@BOTH
def test_batch_carries_the_prompts_repeated_by_group_and_the_temperature(sampler):
    policy, (ids, mask) = tiny_policy("llama"), prompts()
    for temperature, carried in ((0.7, 0.7), (1.0, 1.0), (0.0, 1.0)):
        batch = sampler(policy, ids, mask, uniforms(6, 3), rule(temperature))
        assert batch.temperature == carried, "greedy reports the log-probs of temperature 1"
        assert torch.equal(batch.prompt_ids, ids[[0, 0, 1, 1, 2, 2]])
        assert torch.equal(batch.prompt_mask, mask[[0, 0, 1, 1, 2, 2]])


# ---------------------------------------------------------------- the right distribution


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
def test_first_tokens_come_in_exactly_the_models_proportions(name):
    """An even grid of uniforms: inverse-CDF sampling then meets n·p of every id to within one."""
    n, policy, (ids, mask) = 3000, tiny_policy(name), prompts()
    grid = ((torch.arange(n, dtype=torch.float64) + 0.5) / n).repeat(3)[:, None]
    batch = cached(policy, ids, mask, grid, rule(0.7))
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            logits = policy.lm(torch.tensor([prompt])).logits[0, -1, :VOCAB].double()
        counts = batch.response_ids[row * n : (row + 1) * n].flatten().bincount(minlength=ROWS)
        assert not counts[VOCAB:].any()
        assert (counts[:VOCAB] - n * (logits / 0.7).softmax(-1)).abs().max() < 1.01


def test_whole_replies_come_in_the_models_proportions():
    """χ² of 4000 two-token replies over the pairs expected at least 10 times."""
    n, policy = 4000, tiny_policy("llama", torch.float64)
    prompt = torch.tensor(PROMPTS[:1])
    u = draw_uniforms(n, 2, torch.Generator().manual_seed(5), "cpu")
    counts = torch.zeros(VOCAB, VOCAB)
    for a, b in cached(policy, prompt, prompt == prompt, u, rule(eos_ids=())).response_ids.tolist():
        counts[a, b] += 1
    with torch.no_grad():
        pairs = torch.cat([prompt.expand(VOCAB, -1), torch.arange(VOCAB)[:, None]], 1)
        p = policy.lm(pairs).logits[:, -2:, :VOCAB].softmax(-1)
    expected = n * p[0, 0, :, None] * p[:, 1]
    often = expected >= 10
    assert often.sum() > 30
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum() + (
        counts[~often].sum() - expected[~often].sum()
    ) ** 2 / expected[~often].sum()
    cells = int(often.sum())
    assert abs(chi2 - cells) < 4 * math.sqrt(2 * cells)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral", "phi"])
def test_greedy_is_what_transformers_generates(name):
    policy, (ids, mask) = tiny_policy(name, vocab_size=None), prompts()
    eos = (3, 11, 23)
    want = policy.lm.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=12, eos_token_id=list(eos), pad_token_id=0
    )[:, ids.shape[1] :]
    got = cached(policy, ids, mask, uniforms(3, 12), rule(0.0, eos_ids=eos, vocab_size=None))
    assert got.response_ids.tolist() == want.tolist()
    assert (policy.evaluate(got).logprobs - got.sampler_logprobs).abs().max() <= 2e-5


# ---------------------------------------------------------------- what sampling leaves behind


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_sampling_ignores_dropout_and_the_global_generator_and_restores_the_mode(sampler, training):
    policy, (ids, mask), u = tiny_policy("gpt2", torch.float64), prompts(), uniforms(6, 8)
    assert policy.lm.config.resid_pdrop > 0
    want = sampler(policy, ids, mask, u, rule()).replies()
    policy.train(training)
    before = torch.get_rng_state()
    assert sampler(policy, ids, mask, u, rule()).replies() == want
    assert torch.equal(torch.get_rng_state(), before)
    assert policy.training == policy.lm.training == training
    assert torch.is_grad_enabled()


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_after_an_exception(sampler, training):
    policy, (ids, mask) = tiny_policy("llama").train(training), prompts()
    with pytest.raises(IndexError):
        sampler(policy, torch.where(mask, ids + ROWS, ids), mask, uniforms(3, 4), rule())
    assert policy.training == policy.lm.training == training
    assert torch.is_grad_enabled()


@BOTH
def test_a_weight_changed_in_place_changes_the_next_sample(sampler):
    """No backend may keep a copy of the weights: the optimizer writes into the tensors the sampler reads."""
    policy, (ids, mask), u = tiny_policy("llama", torch.float64), prompts(), uniforms(6, 8)
    before = sampler(policy, ids, mask, u, rule())
    other = causal_lm("llama", torch.float64, seed=1)
    with torch.no_grad():
        for p, q in zip(policy.parameters(), other.parameters(), strict=True):
            p.copy_(q)
    after = sampler(policy, ids, mask, u, rule())
    assert before.replies() != after.replies()
    fresh = naive(tiny_policy("llama", torch.float64, seed=1), ids, mask, u, rule())
    assert after.replies() == fresh.replies()


@BOTH
def test_what_was_sampled_can_enter_a_loss(sampler):
    """No inference tensors, which autograd refuses to save; and no graph left from sampling."""
    policy, (ids, mask) = tiny_policy("llama"), prompts()
    batch = sampler(policy, ids, mask, uniforms(6, 8), rule())
    assert not batch.sampler_logprobs.requires_grad
    new = policy.evaluate(batch)
    scale = torch.ones(()).requires_grad_()
    (scale * batch.sampler_logprobs * (new.logprobs - batch.sampler_logprobs).exp()).sum().backward()
    assert scale.grad < 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())


@BOTH
def test_arguments_are_not_written_to(sampler):
    policy, (ids, mask), u = tiny_policy("llama"), prompts(), uniforms(6, 8)
    before = [x.clone() for x in (ids, mask, u)]
    sampler(policy, ids, mask, u, rule())
    assert all(torch.equal(a, b) for a, b in zip(before, (ids, mask, u), strict=True))


# ---------------------------------------------------------------- pick: the uniform → token rule

P = torch.tensor([0.15, 0.4, 0.05, 0.3, 0.1], dtype=torch.float64)


def grid(n: int) -> Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def frequencies(logits: Tensor, rule: Sampling, n: int = 2000) -> tuple[Tensor, dict[int, float]]:
    """(V,) empirical frequencies of one row over an even grid of uniforms, and the log-prob reported for each id."""
    ids, logprobs = pick(logits.expand(n, -1), grid(n), rule)
    reported = dict(zip(ids.tolist(), logprobs.tolist(), strict=True))
    assert all(reported[i] == x for i, x in zip(ids.tolist(), logprobs.tolist(), strict=True))
    return ids.bincount(minlength=logits.shape[-1]) / n, reported


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
def test_pick_follows_the_distribution_and_reports_its_logprobs(temperature, dtype):
    g = torch.Generator().manual_seed(0)
    for size in (1, 2, 23):
        logits = 2 * torch.randn(size, generator=g, dtype=dtype)
        p = (logits.double() / temperature).softmax(-1)
        freq, reported = frequencies(logits, Sampling(temperature))
        assert (freq - p).abs().max() <= 1.01 / 2000
        assert all(reported[i] == pytest.approx(math.log(p[i]), abs=1e-5) for i in reported)


def test_pick_is_the_first_id_whose_cumulative_probability_exceeds_u():
    edges = [0.0, 0.149, 0.151, 0.549, 0.551, 0.599, 0.601, 0.899, 0.901, LAST]
    ids, _ = pick(P.log().expand(10, -1), torch.tensor(edges, dtype=torch.float64), Sampling())
    assert ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_each_row_has_its_own_logits_and_its_own_uniform():
    logits = torch.stack([P.log(), P.flip(0).log()]).repeat(3, 1)
    u = torch.tensor([0.2, 0.2, 0.99, 0.99, 0.0, 0.0], dtype=torch.float64)
    ids, logprobs = pick(logits, u, Sampling())
    assert ids.tolist() == [1, 1, 4, 4, 0, 0]
    assert logprobs.exp().tolist() == pytest.approx([0.4, 0.3, 0.1, 0.15, 0.15, 0.1])


@pytest.mark.parametrize("u", [0.0, 5e-324, 1e-20, 0.5, 1 - 2**-24, LAST, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("support", [(2,), (0,), (4,), (1, 3), (0, 4), (0, 1, 2, 3, 4)], ids=str)
def test_an_id_of_probability_zero_is_never_returned(support, dtype, u):
    """searchsorted at u = 0, at the last float below 1 and at 1.0 itself, with impossible ids at either end."""
    logits = torch.full((5,), -torch.inf, dtype=dtype)
    logits[list(support)] = torch.linspace(-1, 2, len(support), dtype=dtype)
    for exact in (torch.tensor([u], dtype=torch.float64), torch.tensor([u], dtype=torch.float32)):
        ids, logprobs = pick(logits[None], exact, Sampling())
        assert ids.item() in support
        assert logprobs.isfinite().all()
    assert u not in (0.0, LAST, 1.0) or ids.item() == (support[0] if u == 0 else support[-1])


@pytest.mark.parametrize("u", [0.0, LAST, 1.0])
def test_a_large_vocabulary_whose_float32_probabilities_do_not_add_up_to_one(u):
    logits = torch.randn(7, 50_257, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, :100] = logits[:, -100:] = -torch.inf
    ids, logprobs = pick(logits, torch.full((7,), u, dtype=torch.float64), Sampling())
    assert ids.tolist() == [100 if u == 0 else 50_156] * 7
    assert logprobs.isfinite().all()


def test_greedy_is_the_argmax_with_the_logprobs_of_temperature_one():
    logits = torch.randn(9, 23, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids, logprobs = pick(logits, uniforms(9, 1)[:, 0], Sampling(0.0))
    assert torch.equal(ids, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1))


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_padding_rows_of_the_embedding_are_never_sampled_and_have_no_mass(temperature):
    logits = torch.cat([P.log(), torch.tensor([9.0, 50.0], dtype=torch.float64)])
    freq, reported = frequencies(logits, Sampling(temperature, vocab_size=5))
    assert not freq[5:].any()
    want = (P.log() / (temperature or 1.0)).log_softmax(-1)
    assert all(reported[i] == pytest.approx(want[i].item()) for i in reported)
    ids, _ = pick(logits.expand(2, -1), torch.tensor([LAST, 1.0], dtype=torch.float64), Sampling(vocab_size=5))
    assert ids.tolist() == [4, 4]


@pytest.mark.parametrize(
    ("options", "support"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 3}, {0, 1, 3}),
        ({"top_k": 5}, {0, 1, 2, 3, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 1e-9}, {1}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.69}, {1, 3}),
        ({"top_p": 0.71}, {0, 1, 3}),
        ({"top_p": 0.96}, {0, 1, 2, 3, 4}),
        ({"min_p": 1.0}, {1}),
        ({"min_p": 0.76}, {1}),
        ({"min_p": 0.74}, {1, 3}),
        ({"min_p": 0.3}, {0, 1, 3}),
        ({"min_p": 0.1}, {0, 1, 2, 3, 4}),
        ({"top_k": 4, "min_p": 0.3}, {0, 1, 3}),
        ({"top_k": 2, "top_p": 0.99, "min_p": 0.01}, {1, 3}),
        ({"top_p": 0.41, "temperature": 0.5}, {1}),  # p^2 / sum p^2 of the most likely id is 0.56
        ({"min_p": 0.3, "temperature": 0.5}, {1, 3}),
        ({"top_k": 3, "vocab_size": 4}, {0, 1, 3}),
        ({"top_p": 0.42, "vocab_size": 4}, {1}),  # of the four ids that are left, the most likely has 0.44
    ],
    ids=str,
)
def test_truncated_sampling_keeps_exactly_its_ids_and_renormalises(options, support):
    """p = .15 .4 .05 .3 .1; the reported log-probs are those of the distribution that was sampled from."""
    kept = torch.zeros(5, dtype=torch.float64)
    kept[list(support)] = P[list(support)] ** (1 / options.get("temperature", 1.0))
    kept /= kept.sum()
    freq, reported = frequencies(P.log(), Sampling(**options))
    assert set(reported) == support
    assert (freq - kept).abs().max() <= 1.01 / 2000
    assert all(reported[i] == pytest.approx(math.log(kept[i])) for i in support)


def test_truncation_does_not_depend_on_the_order_of_the_ids():
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 7):
        freq, _ = frequencies(P[list(order)].log(), Sampling(top_p=0.71), n=200)
        assert {order[i] for i in freq.nonzero().flatten().tolist()} == {0, 1, 3}


@BOTH
def test_truncated_sampling_reaches_the_rollout(sampler):
    policy, (ids, mask) = tiny_policy("llama"), prompts()
    greedy = sampler(policy, ids, mask, uniforms(6, 6), rule(0.0))
    top_one = sampler(policy, ids, mask, uniforms(6, 6, seed=9), rule(top_k=1))
    assert top_one.replies() == greedy.replies()
    assert not top_one.sampler_logprobs.any(), "log 1"


# ---------------------------------------------------------------- uniforms


def test_uniforms_are_in_the_unit_interval_and_belong_to_their_generator():
    before = torch.get_rng_state()
    first, again, other = (draw_uniforms(50, 40, torch.Generator().manual_seed(s), "cpu") for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.dtype == torch.float64
    assert 0 <= first.min() < 0.01 < 0.99 < first.max() < 1
    assert first.unique().numel() == 2000
