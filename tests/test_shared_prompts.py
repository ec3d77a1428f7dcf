"""Each prompt read once for all of its responses: the same states, values and gradients."""

import logging

import pytest
import torch
from models import ARCHITECTURES, SERVED, VOCAB, causal_lm, forced, grouped, tiny_policy
from torch import Tensor

from rlkl.policy import attention, lora
from rlkl.policy.model import checkpoint_layers
from rlkl.policy.policy import Policy, reference_of
from rlkl.policy.shared_prompts import share_prompts
from rlkl.policy.states import states_of_rows, states_of_shared_prompts
from rlkl.types import Batch

WAYS = {"shared": states_of_shared_prompts, "rows": states_of_rows}


@pytest.fixture
def float64_everywhere(monkeypatch) -> None:
    """Models round norms and softmaxes by `torch.float32` or `float()`. Here both are float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def each_row_alone(backbone, batch: Batch) -> Tensor:
    """The specification of `hidden_states`: a forward pass for each row, without any padding."""
    states = []
    for i in range(len(batch)):
        prompt = batch.prompt_ids[i, batch.prompt_mask[i]]
        response = batch.response_ids[i, batch.attended[i]]
        text = torch.cat([prompt, response])[None]
        own = backbone(input_ids=text, use_cache=False).last_hidden_state[0, len(prompt) - 1 :]
        padding = own.new_zeros(batch.mask.shape[1] + 1 - len(own), own.shape[1])
        states.append(torch.cat([own, padding]))
    return torch.stack(states)


def meaningful(batch: Batch) -> Tensor:
    """(B, T+1) bool: the states that have a meaning."""
    return torch.cat([torch.ones(len(batch), 1, dtype=torch.bool), batch.attended], 1)


def states_and_gradients(policy: Policy, batch: Batch, read) -> tuple[Tensor, dict[str, Tensor]]:
    """The states, and each gradient of a loss of log-probs, entropy, values and last values.

    read: takes the place of hidden_states, for the policy and for the critic's own network.
    """
    policy.zero_grad()
    policy.hidden_states = read
    hidden = read(policy.backbone, batch)
    new = policy.read_states(hidden, batch)
    weight = torch.linspace(0.5, 1.5, batch.mask.numel()).view_as(batch.mask)
    loss = (weight * (new.logprobs + 0.3 * new.entropy)).sum()
    if new.values is not None:
        loss = loss + (weight * new.values.square()).sum() + new.last_values.sum()
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    return hidden[meaningful(batch)].detach(), gradients


def assert_equal(got, expected, tolerance: float = 1e-12) -> None:
    states, gradients = got
    expected_states, expected_gradients = expected
    assert (states - expected_states).abs().max() <= tolerance
    assert gradients.keys() == expected_gradients.keys()
    assert len(gradients) > 5
    for name, gradient in expected_gradients.items():
        scale = gradient.abs().max().clamp_min(1)
        assert (gradients[name] - gradient).abs().max() <= tolerance * scale, name


# ------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("critic", ["none", "head", "network"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_states_values_and_gradients_are_those_of_each_row_alone(name, critic, float64_everywhere):
    batch = grouped()
    policy = tiny_policy(name, torch.float64, critic=critic)
    expected = states_and_gradients(policy, batch, each_row_alone)
    for way, read in WAYS.items():
        if way == "rows" or name in SERVED:
            assert_equal(states_and_gradients(policy, batch, read), expected)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("how", ["checkpointed", "adapter", "eager"])
def test_so_they_are_with_checkpointing_an_adapter_and_eager_attention(
    name, how, float64_everywhere
):
    batch = grouped()
    policy = tiny_policy(name, torch.float64, critic="network")
    if how == "adapter":
        lora.adapt(policy.lm, r=4, alpha=8, target_modules="all-linear", modules_to_save=[])
        for parameter_name, p in policy.lm.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(p)
    if how == "eager":
        policy.lm.set_attn_implementation("eager")
    expected = states_and_gradients(policy, batch, each_row_alone)
    if how == "checkpointed":
        checkpoint_layers(policy)
    for read in WAYS.values():
        assert_equal(states_and_gradients(policy, batch, read), expected)


def test_the_reference_of_an_adapter_reads_each_prompt_once_too(float64_everywhere):
    policy = tiny_policy("llama", torch.float64)
    lora.adapt(policy.lm, r=4, alpha=8, target_modules="all-linear", modules_to_save=[])
    reference, original = reference_of(policy), tiny_policy("llama", torch.float64)
    for p in policy.lm.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    batch = grouped()
    assert reference.shared_prompts
    states = reference.hidden_states(reference.backbone, batch)[meaningful(batch)]
    expected = each_row_alone(original.backbone, batch)[meaningful(batch)]
    assert (states - expected).abs().max() <= 1e-12


def varlen_by_hand(
    query, key, value, query_starts, key_starts, most_queries, most_keys,
    *, scale, window_size, enable_gqa,
):  # fmt: skip
    """What torch's flash attention computes: each segment by itself, causal at its end."""
    assert enable_gqa
    heads = query.shape[1] // key.shape[1]
    outputs = []
    for i in range(len(query_starts) - 1):
        q = query[query_starts[i] : query_starts[i + 1]]
        k = key[key_starts[i] : key_starts[i + 1]].repeat_interleave(heads, 1)
        v = value[key_starts[i] : key_starts[i + 1]].repeat_interleave(heads, 1)
        assert 0 < len(q) <= most_queries
        assert len(q) <= len(k) <= most_keys
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        visible = distance >= 0
        if window_size[0] >= 0:
            visible &= distance <= window_size[0]
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        p = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", p, v))
    return torch.cat(outputs)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "phi"])
def test_the_segments_for_flash_attention_give_the_same(name, float64_everywhere, monkeypatch):
    batch, policy = grouped(), tiny_policy(name, torch.float64, critic="network")
    expected = states_and_gradients(policy, batch, each_row_alone)
    monkeypatch.setattr(attention, "varlen_attn", varlen_by_hand)
    monkeypatch.setattr("rlkl.policy.states.flash_serves", lambda *_: True)
    assert_equal(states_and_gradients(policy, batch, states_of_shared_prompts), expected)


def test_rows_without_a_token_and_masks_with_holes_change_nothing(float64_everywhere):
    """A row whose reward failed has no token; a tool's answer is read, and is no action."""
    batch = grouped()
    batch.mask[3] = False
    batch.mask[5, :1] = False
    policy = tiny_policy("llama", torch.float64, critic="head")
    expected = states_and_gradients(policy, batch, each_row_alone)
    for read in WAYS.values():
        assert_equal(states_and_gradients(policy, batch, read), expected)


# ------------------------------------------------------------------ what it costs


def test_the_row_holds_each_prompt_and_each_response_once():
    batch = grouped()
    row = share_prompts(batch, flash=False)
    assert row.ids.shape[1] == 3 + 41 + 1 + 3 + 4 * (5 + 12 + 1 + 8 + 2)
    assert sum(len(part.outputs) for part in row.parts) == row.ids.shape[1]


def test_short_responses_to_a_long_prompt_share_one_copy_of_its_keys():
    """Else 64 answers of 4 tokens would copy a prompt of 512 tokens 64 times in each layer."""
    prompt = [i % VOCAB for i in range(512)]
    batch = forced([(prompt, [i % VOCAB] * 4) for i in range(64)])
    row = share_prompts(batch, flash=False)
    keys = sum(part.keys.numel() for part in row.parts)
    assert keys <= 4 * row.ids.shape[1]
    policy = tiny_policy("llama", torch.float64)
    policy.lm.config.max_position_embeddings = 1024
    states = states_of_shared_prompts(policy.backbone, batch)
    assert (states - states_of_rows(policy.backbone, batch)).abs().max() < 1e-6


def test_responses_of_unlike_lengths_are_not_padded_to_the_longest():
    prompt = [5] * 8
    batch = forced([(prompt, [6] * 100), *((prompt, [7, i]) for i in range(40))])
    row = share_prompts(batch, flash=False)
    scores = sum(part.queries.shape[1] * part.keys.numel() for part in row.parts)
    assert scores <= 2 * (100 * 108 + 8 * 8 + 40 * 2 * 10)


# ------------------------------------------------------------------ models that cannot


def test_a_model_with_soft_capped_scores_reads_its_prompts_with_each_response():
    assert not tiny_policy("gemma2").shared_prompts
    assert all(tiny_policy(name).shared_prompts for name in SERVED)


def test_a_model_that_keeps_our_options_from_its_attention_is_read_row_by_row(caplog, monkeypatch):
    policy, batch = tiny_policy("llama", torch.float64), grouped()
    expected = states_of_rows(policy.backbone, batch)
    forward = policy.backbone.forward

    def narrow(*args, shared_prompts=None, **options):
        return forward(*args, **options)

    monkeypatch.setattr(policy.backbone, "forward", narrow)
    own_attention = policy.lm.config._attn_implementation
    with caplog.at_level(logging.WARNING, "rlkl"):
        for _ in range(2):
            states = policy.hidden_states(policy.backbone, batch)
    assert torch.equal(states, expected)
    assert caplog.text.count("llama: each prompt is read again for each of its responses") == 1
    assert not policy.shared_prompts
    assert policy.lm.config._attn_implementation == own_attention


def test_the_models_own_attention_is_back_after_an_exception():
    policy = Policy(causal_lm("llama"))
    own_attention = policy.lm.config._attn_implementation
    batch = grouped()
    batch.response_ids[batch.mask] = 10**6  # no such id
    with pytest.raises(IndexError):
        policy(batch)
    assert policy.lm.config._attn_implementation == own_attention
