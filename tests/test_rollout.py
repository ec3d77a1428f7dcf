"""Rollouts: how a uniform becomes a token, cached = naive token for token, and sampled = scored."""

import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from models import (
    ARCHITECTURES,
    EOS,
    FLOAT64,
    PROMPTS,
    ROWS,
    VOCAB,
    assert_same,
    causal_lm,
    prompts,
    sampling_params,
    tiny_policy,
    uniforms,
)
from torch import Tensor

from rlkl.rollout import SAMPLERS, cached, naive, pick
from rlkl.rollout.sampling import decode, draw_uniforms, generate
from rlkl.types import Example, SamplingParams

LAST = math.nextafter(1.0, 0.0)  # the last float below 1
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
shared_policy = functools.cache(tiny_policy)  # for tests that do not change the policy


# ---------------------------------------------------------------- the one test


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scoring_gives_the_samplers_logprobs_and_every_finished_row_ends_in_an_eos(name):
    policy = shared_policy(name)
    for temperature in (1.0, 0.7):
        batch = cached(policy, *prompts(), uniforms(48, 24, seed=3), sampling_params(temperature))
        scored = policy(batch).logprobs
        assert (scored - batch.sampler_logprobs).abs().max() <= 2e-5
        assert batch.sampler_logprobs.dtype == scored.dtype == torch.float32
        assert (batch.sampler_logprobs[batch.mask] < 0).all()
        last_tokens = set()
        for response, truncated in zip(batch.responses(), batch.truncated.tolist(), strict=True):
            assert not any(token in EOS for token in response[:-1])
            assert truncated == (response[-1] not in EOS)
            assert len(response) == 24 or not truncated
            last_tokens.add(None if truncated else response[-1])
        assert None in last_tokens, "no row is truncated"
        assert len(last_tokens) > 2, "rows must end in different members of the EOS set"


# ---------------------------------------------------------------- cached = naive


@pytest.mark.parametrize("name", FLOAT64)
def test_cached_gives_the_tokens_of_naive_in_float64(name):
    for seed, temperature in enumerate((1.0, 0.7, 0.0)):
        policy = tiny_policy(name, torch.float64, seed=seed)
        assert_twins(policy, uniforms(12, 12, seed), sampling_params(temperature), 1e-12)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cached_gives_the_tokens_of_naive_in_float32_at_one_draw(name):
    assert_twins(shared_policy(name), uniforms(12, 12), sampling_params(), 2e-5)


def assert_twins(policy, u: Tensor, params: SamplingParams, tolerance: float) -> None:
    expected = naive(policy, *prompts(), u, params)
    assert expected.mask.sum() > 2 * len(expected), "too short to mean anything"
    assert_same(cached(policy, *prompts(), u, params), expected, tolerance)


# ---------------------------------------------------------------- rows are independent


@every_sampler
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_a_row_does_not_depend_on_other_rows_slots_groups_or_padding(name, sampler):
    """Row (n g) is a function of prompt n and of its own uniforms."""
    policy, u = shared_policy(name, torch.float64), uniforms(12, 12)

    def sample(ids: Tensor, mask: Tensor, u: Tensor) -> list[list[int]]:
        return sampler(policy, ids, mask, u, sampling_params()).responses()

    expected = sample(*prompts(), u)
    assert len({len(response) for response in expected}) > 2
    assert sample(*prompts(groups=4), u) == expected, "four times the prompt, each with G = 1"
    assert sample(*prompts(extra=5), u) == expected, "five more columns of padding"
    ids, mask = prompts(groups=4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    permuted = sample(ids[order], mask[order], u[order])
    assert permuted == [expected[i] for i in order], "in another order"
    for i in (0, 5, 11):
        alone = torch.tensor([PROMPTS[i // 4]])
        response = sample(alone, torch.ones_like(alone, dtype=torch.bool), u[[i]])
        assert response == [expected[i]], "alone, without padding"
    assert sample(torch.where(mask, ids, 77), mask, u) == expected, "other ids in the padding"


@every_sampler
def test_fewer_columns_of_uniforms_give_a_prefix(sampler):
    policy, u = shared_policy("llama", torch.float64), uniforms(12, 12)
    long = sampler(policy, *prompts(), u, sampling_params())
    short = sampler(policy, *prompts(), u[:, :5], sampling_params())
    assert short.responses() == [response[:5] for response in long.responses()]


# ---------------------------------------------------------------- mask, EOS, truncation


@every_sampler
def test_the_mask_covers_the_response_up_to_its_first_eos_and_padding_follows(sampler):
    """Also where the pad id is an id that the model samples: a sampled one is an action."""
    policy = shared_policy("llama", torch.float64)
    plain = cached(policy, *prompts(), uniforms(24, 12), sampling_params())
    counts = plain.response_ids[plain.mask].bincount(minlength=VOCAB)
    counts[list(EOS)] = 0
    pad = int(counts.argmax())
    batch = sampler(policy, *prompts(), uniforms(24, 12), sampling_params(pad_id=pad))
    assert (batch.response_ids[batch.mask] == pad).any(), "the draw must sample the pad id"
    is_eos = torch.isin(batch.response_ids, torch.tensor(EOS))
    for row, eos in enumerate(is_eos.tolist()):
        length = eos.index(True) + 1 if True in eos else len(eos)
        assert batch.mask[row].tolist() == [t < length for t in range(len(eos))]
        assert (batch.response_ids[row, length:] == pad).all()
        assert not batch.sampler_logprobs[row, length:].any()
    assert batch.truncated.tolist() == [True not in eos for eos in is_eos.tolist()]


@every_sampler
def test_an_eos_as_the_last_allowed_token_is_not_truncation(sampler):
    policy, u = shared_policy("llama"), uniforms(12, 12)
    lengths = sampler(policy, *prompts(), u, sampling_params()).mask.sum(1)
    length = int(lengths[(lengths > 1) & (lengths < 12)].min())
    batch = sampler(policy, *prompts(), u[:, :length], sampling_params())
    assert torch.equal(batch.truncated, lengths > length)
    assert not batch.truncated.all()


@every_sampler
def test_an_eos_as_the_first_token_is_a_response_of_length_one(sampler):
    policy = shared_policy("llama")
    every_id = sampling_params(eos_ids=tuple(range(VOCAB)))
    batch = sampler(policy, *prompts(), uniforms(6, 12), every_id)
    assert batch.mask.tolist() == [[True]] * 6
    assert not batch.truncated.any()
    assert (policy(batch).logprobs - batch.sampler_logprobs).abs().max() <= 2e-5


@every_sampler
def test_room_for_one_token(sampler):
    policy, u = shared_policy("gpt2"), uniforms(24, 12)
    one = sampler(policy, *prompts(), u[:, :1], sampling_params())
    full = sampler(policy, *prompts(), u, sampling_params())
    assert one.mask.tolist() == [[True]] * 24
    assert torch.equal(one.response_ids, full.response_ids[:, :1])
    assert one.truncated.tolist() == [t not in EOS for [t] in one.response_ids.tolist()]
    assert one.truncated.any()


@every_sampler
def test_without_eos_ids_every_row_is_truncated(sampler):
    batch = sampler(shared_policy("llama"), *prompts(), uniforms(6, 7), sampling_params(eos_ids=()))
    assert batch.mask.tolist() == [[True] * 7] * 6
    assert batch.truncated.all()


@every_sampler
def test_decoding_stops_when_the_last_row_has_ended(sampler):
    batch = sampler(shared_policy("gpt2"), *prompts(), uniforms(3, 100, seed=2), sampling_params())
    assert not batch.truncated.any()
    assert batch.mask.shape[1] == batch.mask.sum(1).max() < 100


@every_sampler
def test_the_batch_has_each_prompt_g_times_and_the_temperature(sampler):
    policy, (ids, mask) = shared_policy("llama"), prompts()
    for temperature, recorded in ((0.7, 0.7), (1.0, 1.0), (0.0, 1.0)):
        batch = sampler(policy, ids, mask, uniforms(6, 3), sampling_params(temperature))
        assert batch.temperature == recorded, "greedy reports the log-probs of temperature 1"
        assert torch.equal(batch.prompt_ids, ids[[0, 0, 1, 1, 2, 2]])
        assert torch.equal(batch.prompt_mask, mask[[0, 0, 1, 1, 2, 2]])


# ---------------------------------------------------------------- the right distribution


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
def test_first_tokens_come_in_the_proportions_of_the_model(name):
    """On an even grid of n uniforms, inverse-CDF sampling meets n·p of every id to within one."""
    n, policy = 3000, shared_policy(name)
    u = even_grid(n).repeat(3)[:, None]
    batch = cached(policy, *prompts(), u, sampling_params(0.7))
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            logits = policy.lm(torch.tensor([prompt])).logits[0, -1, :VOCAB].double()
        counts = batch.response_ids[row * n : (row + 1) * n].flatten().bincount(minlength=ROWS)
        assert not counts[VOCAB:].any()
        assert (counts[:VOCAB] - n * (logits / 0.7).softmax(-1)).abs().max() < 1.01


def test_whole_responses_come_in_the_proportions_of_the_model():
    """χ² of 4000 responses of two tokens, over the pairs that are expected at least 10 times."""
    n, policy = 4000, shared_policy("llama", torch.float64)
    prompt = torch.tensor(PROMPTS[:1])
    u = draw_uniforms(n, 2, torch.Generator().manual_seed(5), "cpu")
    mask = torch.ones_like(prompt, dtype=torch.bool)
    batch = cached(policy, prompt, mask, u, sampling_params(eos_ids=()))
    counts = torch.zeros(VOCAB, VOCAB)
    for first, second in batch.response_ids.tolist():
        counts[first, second] += 1
    with torch.no_grad():
        pairs = torch.cat([prompt.expand(VOCAB, -1), torch.arange(VOCAB)[:, None]], 1)
        p = policy.lm(pairs).logits[:, -2:, :VOCAB].softmax(-1)
    expected = n * p[0, 0, :, None] * p[:, 1]
    often = expected >= 10
    cells = int(often.sum())
    assert cells > 30
    rest = counts[~often].sum() - expected[~often].sum()
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum()
    chi2 = chi2 + rest**2 / expected[~often].sum()
    assert abs(chi2 - cells) < 4 * math.sqrt(2 * cells)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral", "phi"])
def test_greedy_is_what_transformers_generates(name):
    policy, (ids, mask) = shared_policy(name, vocab_size=None), prompts()
    eos = (3, 11, 23)
    expected = policy.lm.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=list(eos),
        pad_token_id=0,
    )
    greedy = sampling_params(0.0, eos_ids=eos, vocab_size=None)
    batch = cached(policy, ids, mask, uniforms(3, 12), greedy)
    assert batch.response_ids.tolist() == expected[:, ids.shape[1] :].tolist()
    assert (policy(batch).logprobs - batch.sampler_logprobs).abs().max() <= 2e-5


# ---------------------------------------------------------------- what sampling leaves behind


@every_sampler
def test_sampling_ignores_dropout_and_the_global_generator_and_restores_the_mode(sampler):
    policy, u = tiny_policy("gpt2", torch.float64), uniforms(6, 8)
    assert policy.lm.config.resid_pdrop > 0
    expected = sampler(policy, *prompts(), u, sampling_params()).responses()
    for training in (True, False):
        policy.train(training)
        before = torch.get_rng_state()
        assert sampler(policy, *prompts(), u, sampling_params()).responses() == expected
        assert torch.equal(torch.get_rng_state(), before)
        assert policy.training == policy.lm.training == training
        assert torch.is_grad_enabled()


@every_sampler
def test_the_mode_is_restored_after_an_exception(sampler):
    policy, (ids, mask) = tiny_policy("llama"), prompts()
    unknown_ids = torch.where(mask, ids + ROWS, ids)
    for training in (True, False):
        policy.train(training)
        with pytest.raises(IndexError):
            sampler(policy, unknown_ids, mask, uniforms(3, 4), sampling_params())
        assert policy.training == policy.lm.training == training
        assert torch.is_grad_enabled()


@every_sampler
def test_a_weight_changed_in_place_changes_the_next_sample(sampler):
    """No backend keeps a copy of the weights: the optimizer writes into the tensors it reads."""
    policy, u = tiny_policy("llama", torch.float64), uniforms(6, 8)
    before = sampler(policy, *prompts(), u, sampling_params())
    other = causal_lm("llama", torch.float64, seed=1)
    with torch.no_grad():
        for p, q in zip(policy.parameters(), other.parameters(), strict=True):
            p.copy_(q)
    after = sampler(policy, *prompts(), u, sampling_params())
    assert before.responses() != after.responses()
    fresh = naive(tiny_policy("llama", torch.float64, seed=1), *prompts(), u, sampling_params())
    assert after.responses() == fresh.responses()


@every_sampler
def test_a_sampled_batch_can_enter_a_loss(sampler):
    """No inference tensors, which autograd refuses to save; and no graph left from sampling."""
    policy = tiny_policy("llama")
    batch = sampler(policy, *prompts(), uniforms(6, 8), sampling_params())
    assert not batch.sampler_logprobs.requires_grad
    ratio = (policy(batch).logprobs - batch.sampler_logprobs).exp()
    scale = torch.ones(()).requires_grad_()
    (scale * batch.sampler_logprobs * ratio).sum().backward()
    assert scale.grad < 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())


@every_sampler
def test_arguments_are_not_written_to(sampler):
    arguments = (*prompts(), uniforms(6, 8))
    before = [x.clone() for x in arguments]
    sampler(shared_policy("llama"), *arguments, sampling_params())
    assert all(torch.equal(a, b) for a, b in zip(before, arguments, strict=True))


# ---------------------------------------------------------------- pick: from uniform to token

P = torch.tensor([0.15, 0.4, 0.05, 0.3, 0.1], dtype=torch.float64)


def even_grid(n: int) -> Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def frequencies(
    logits: Tensor, params: SamplingParams, n: int = 2000
) -> tuple[Tensor, dict[int, float]]:
    """(V,) frequencies of one row over an even grid of uniforms, and each id's log-prob."""
    ids, logprobs = pick(logits.expand(n, -1), even_grid(n), params)
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
        frequency, reported = frequencies(logits, SamplingParams(temperature))
        assert (frequency - p).abs().max() <= 1.01 / 2000
        assert all(reported[i] == pytest.approx(math.log(p[i]), abs=1e-5) for i in reported)


def test_pick_is_the_first_id_whose_cumulative_probability_exceeds_the_uniform():
    edges = [0.0, 0.149, 0.151, 0.549, 0.551, 0.599, 0.601, 0.899, 0.901, LAST]
    u = torch.tensor(edges, dtype=torch.float64)
    ids, _ = pick(P.log().expand(10, -1), u, SamplingParams())
    assert ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_each_row_has_its_own_logits_and_its_own_uniform():
    logits = torch.stack([P.log(), P.flip(0).log()]).repeat(3, 1)
    u = torch.tensor([0.2, 0.2, 0.99, 0.99, 0.0, 0.0], dtype=torch.float64)
    ids, logprobs = pick(logits, u, SamplingParams())
    assert ids.tolist() == [1, 1, 4, 4, 0, 0]
    assert logprobs.exp().tolist() == pytest.approx([0.4, 0.3, 0.1, 0.15, 0.15, 0.1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("support", [(2,), (0,), (4,), (1, 3), (0, 4), (0, 1, 2, 3, 4)], ids=str)
def test_an_id_of_probability_zero_is_never_picked(support, dtype):
    """Not at u = 0, at the last float below 1 or at 1.0, with impossible ids at either end."""
    logits = torch.full((5,), -torch.inf, dtype=dtype)
    logits[list(support)] = torch.linspace(-1, 2, len(support), dtype=dtype)
    for u in (0.0, 5e-324, 1e-20, 0.5, 1 - 2**-24, LAST, 1.0):
        for u_dtype in (torch.float64, torch.float32):
            ids, logprobs = pick(logits[None], torch.tensor([u], dtype=u_dtype), SamplingParams())
            assert ids.item() in support, u
            assert logprobs.isfinite().all(), u
            if u in (0.0, LAST, 1.0):
                assert ids.item() == (support[0] if u == 0 else support[-1]), u


def test_a_large_vocabulary_whose_float32_probabilities_do_not_add_up_to_one():
    logits = torch.randn(7, 50_257, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, :100] = logits[:, -100:] = -torch.inf
    for u in (0.0, LAST, 1.0):
        ids, logprobs = pick(logits, torch.full((7,), u, dtype=torch.float64), SamplingParams())
        assert ids.tolist() == [100 if u == 0 else 50_156] * 7, u
        assert logprobs.isfinite().all(), u


def test_greedy_is_the_argmax_with_the_logprobs_of_temperature_one():
    logits = torch.randn(9, 23, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids, logprobs = pick(logits, uniforms(9, 1)[:, 0], SamplingParams(0.0))
    assert torch.equal(ids, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1))


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_padding_rows_of_the_embedding_are_never_sampled_and_have_no_mass(temperature):
    logits = torch.cat([P.log(), torch.tensor([9.0, 50.0], dtype=torch.float64)])
    frequency, reported = frequencies(logits, SamplingParams(temperature, vocab_size=5))
    assert not frequency[5:].any()
    expected = (P.log() / (temperature or 1.0)).log_softmax(-1)
    assert all(reported[i] == pytest.approx(expected[i].item()) for i in reported)
    edges = torch.tensor([LAST, 1.0], dtype=torch.float64)
    ids, _ = pick(logits.expand(2, -1), edges, SamplingParams(vocab_size=5))
    assert ids.tolist() == [4, 4]


TRUNCATED_SAMPLING = [  # options, and the ids that they keep of P
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
    # At temperature 0.5 the most likely id has p² / Σ p² = 0.56.
    ({"top_p": 0.41, "temperature": 0.5}, {1}),
    ({"min_p": 0.3, "temperature": 0.5}, {1, 3}),
    ({"top_k": 3, "vocab_size": 4}, {0, 1, 3}),
    # Of the four ids that are left, the most likely has 0.44.
    ({"top_p": 0.42, "vocab_size": 4}, {1}),
]


def test_truncated_sampling_keeps_exactly_its_ids_and_renormalises():
    """The reported log-probs are those of the distribution that was sampled from."""
    for options, support in TRUNCATED_SAMPLING:
        ids = sorted(support)
        p = torch.zeros(5, dtype=torch.float64)
        p[ids] = P[ids] ** (1 / options.get("temperature", 1.0))
        p /= p.sum()
        frequency, reported = frequencies(P.log(), SamplingParams(**options))
        assert set(reported) == support, options
        assert (frequency - p).abs().max() <= 1.01 / 2000, options
        assert all(reported[i] == pytest.approx(math.log(p[i])) for i in support), options


def test_truncated_sampling_does_not_depend_on_the_order_of_the_ids():
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 7):
        frequency, _ = frequencies(P[list(order)].log(), SamplingParams(top_p=0.71), n=200)
        assert {order[i] for i in frequency.nonzero().flatten().tolist()} == {0, 1, 3}


@every_sampler
def test_truncated_sampling_reaches_the_rollout(sampler):
    policy = shared_policy("llama")
    greedy = sampler(policy, *prompts(), uniforms(6, 6), sampling_params(0.0))
    top_one = sampler(policy, *prompts(), uniforms(6, 6, seed=9), sampling_params(top_k=1))
    assert top_one.responses() == greedy.responses()
    assert not top_one.sampler_logprobs.any(), "log 1"


# ---------------------------------------------------------------- uniforms


def test_uniforms_are_in_the_unit_interval_and_belong_to_their_generator():
    before = torch.get_rng_state()
    first, again, other = (
        draw_uniforms(50, 40, torch.Generator().manual_seed(seed), "cpu") for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.dtype == torch.float64
    assert 0 <= first.min() < 0.01 < 0.99 < first.max() < 1
    assert first.unique().numel() == 2000


def test_generate_pads_prompts_and_calls_any_sampler_in_eval_mode_without_gradients():
    """Also a plug-in that takes no care of it. The text of a response is without its padding."""
    policy = tiny_policy("gpt2").train()
    modes = []

    def plug_in(policy, prompt_ids, prompt_mask, uniforms, params):
        modes.append((policy.training, torch.is_grad_enabled()))
        return naive(policy, prompt_ids, prompt_mask, uniforms, params)

    class Tokenizer:
        def __call__(self, text):
            return SimpleNamespace(input_ids=[int(token) for token in text.split()])

        def decode(self, ids, skip_special_tokens):
            return " ".join(map(str, ids.tolist()))

    models = SimpleNamespace(policy=policy, tokenizer=Tokenizer(), sampler=plug_in, chat=None)
    examples = [Example("5 6 7"), Example("4")]
    batch = generate(models, examples, uniforms(4, 6), sampling_params())
    assert modes == [(False, False)]
    assert policy.training
    assert batch.prompt_ids[::2].tolist() == [[5, 6, 7], [0, 0, 4]]
    assert batch.prompt_mask[::2].tolist() == [[True] * 3, [False, False, True]]
    texts = [" ".join(map(str, ids)) for ids in batch.responses()]
    assert decode(models.tokenizer, batch) == texts
    assert len({len(ids) for ids in batch.responses()}) > 1
