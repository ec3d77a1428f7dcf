"""The policy scores each row as the model itself does without padding; loading; the reference."""

import json
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, COMMON, VOCAB, causal_lm, forced, ragged, tiny_policy
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from rlkl.errors import UserError
from rlkl.policy.model import check_reproduced, load, sampling_params
from rlkl.policy.policy import Policy, reference_of
from rlkl.rollout.sampling import decode, encode, left_pad
from rlkl.supervised.tiny import character_tokenizer
from rlkl.types import Batch, PolicyOutput

ROWS = ragged()
each_critic = pytest.mark.parametrize("critic", ["head", "network"])
each_critic_kind = pytest.mark.parametrize("critic", ["none", "head", "network"])


def own_logprobs(
    policy: Policy, prompt: list[int], response: list[int], temperature: float = 1.0
) -> Tensor:
    """(T, V) log-probs by the model's own forward pass: one row, no padding, no mask."""
    with torch.no_grad():
        logits = policy.lm(torch.tensor([prompt + response])).logits
    before_each_token = logits[0, len(prompt) - 1 : -1, : policy.vocab_size]
    return (before_each_token / temperature).log_softmax(-1)


def addresses(module: torch.nn.Module) -> set[int]:
    return {x.data_ptr() for x in [*module.parameters(), *module.buffers()]}


def assert_close(a: PolicyOutput, b: PolicyOutput, atol: float = 1e-12) -> None:
    for name, x, y in zip(PolicyOutput._fields, a, b, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            torch.testing.assert_close(x, y, rtol=0, atol=atol)


# ---------------------------------------------------------------- the model's own logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_forward_gives_the_models_own_logprobs_of_each_row_without_padding(name):
    policy = tiny_policy(name)
    for temperature in (1.0, 0.7):
        new = policy(forced(ROWS, temperature, extra=(3, 2)))
        for i, (prompt, response) in enumerate(ROWS):
            n = len(response)
            logp = own_logprobs(policy, prompt, response, temperature)
            expected = logp.gather(-1, torch.tensor(response)[:, None]).squeeze(-1)
            entropy = -(logp.exp() * logp).sum(-1)
            torch.testing.assert_close(new.logprobs[i, :n], expected, rtol=0, atol=2e-5)
            torch.testing.assert_close(new.entropy[i, :n], entropy, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "cohere"])
def test_states_are_indexed_by_the_response_token_that_they_predict(name):
    policy = tiny_policy(name, torch.float64)
    batch = forced(ROWS, extra=(2, 1))
    states = policy.states(batch)
    assert states.shape == (*batch.mask.shape, 48)
    for i, (prompt, response) in enumerate(ROWS):
        logp = policy.logits(states[i, : len(response)])[:, :VOCAB].log_softmax(-1)
        expected = own_logprobs(policy, prompt, response)
        torch.testing.assert_close(logp, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "least"), [("gemma2", 0.1), ("granite", 0.1), ("cohere", 0.1), ("phi", 0.05)]
)
def test_plain_matrix_products_would_be_wrong_on_these_models(name, least):
    """So the tests above would notice a head that forgets scale, bias or soft-cap."""
    policy, batch = tiny_policy(name), forced(ROWS)
    hidden = policy.states(batch)[batch.mask]
    plain = (hidden @ policy.head.weight.T)[:, :VOCAB].log_softmax(-1)
    assert (plain - policy.logits(hidden)[:, :VOCAB].log_softmax(-1)).abs().max() > least


def test_probabilities_over_the_tokenizers_vocabulary_add_up_to_one():
    """97 rows of embedding, 90 tokens: the padding rows have no probability anywhere."""
    policy, reference = (tiny_policy("llama", torch.float64, seed=seed) for seed in (0, 1))
    batch = forced([([5, 6], [v]) for v in range(VOCAB)])
    new = policy(batch, reference)
    assert new.logprobs.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    without_vocab_size = Policy(policy.lm)(batch)
    assert without_vocab_size.logprobs.exp().sum() < 0.99
    assert all(x.isfinite().all() for x in new if x is not None)


# ---------------------------------------------------------------- invariances


@each_critic
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "qwen3", "gemma"])
def test_no_output_depends_on_padding_or_its_content_or_other_rows(name, critic):
    policy = tiny_policy(name, torch.float64, critic=critic)
    reference = tiny_policy(name, torch.float64, seed=1)
    expected = policy(forced(ROWS), reference)
    width = expected.logprobs.shape[1]
    assert all(x.any() for x in expected)

    def cut(new: PolicyOutput, width: int) -> PolicyOutput:
        return PolicyOutput(*(x if x.dim() == 1 else x[:, :width] for x in new))

    wider = policy(forced(ROWS, extra=(4, 9)), reference)
    assert_close(cut(wider, width), expected)
    for garbage in (41, -100, 10**6):
        other_padding = policy(forced(ROWS, pad=garbage, extra=(1, 2)), reference)
        assert_close(cut(other_padding, width), expected)
    order = [2, 0, 3, 1]
    permuted = policy(forced([ROWS[i] for i in order]), reference)
    assert_close(permuted, PolicyOutput(*(x[order] for x in expected)))
    for i, row in enumerate(ROWS):
        alone = policy(forced([row]), reference)
        assert_close(alone, cut(PolicyOutput(*(x[[i]] for x in expected)), len(row[1])))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_output_is_zero_outside_the_mask(name):
    policy, reference = tiny_policy(name, critic="head"), tiny_policy(name, seed=1)
    batch = forced(ROWS, extra=(0, 3))
    for key, x in policy(batch, reference)._asdict().items():
        if key != "last_values":
            assert not x[~batch.mask].any(), key
            assert x[batch.mask].all(), key


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_a_sliding_window_that_holds_only_padding_gives_no_nan(name):
    """Behind a short response, beside a long one, a window sees only masked columns."""
    policy = tiny_policy(name, critic="head")
    new = policy(forced([([5, 6], [7]), ([5], list(range(6, 36)))], extra=(9, 9)))
    assert all(x.isfinite().all() for x in new if x is not None)
    sum(x.sum() for x in new if x is not None).backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_observation_tokens_are_context_but_are_not_scored(name):
    """False inside a response: such a token affects those after it, and none before."""
    policy = tiny_policy(name, torch.float64, critic="head")
    prompt, response = ROWS[2]
    tokens = response[:7]
    observed = {2, 3, 5}
    scored = torch.tensor([[i not in observed for i in range(7)]])

    def run(tokens: list[int], mask: Tensor) -> PolicyOutput:
        return policy(
            Batch(
                torch.tensor([prompt]),
                torch.ones(1, len(prompt), dtype=torch.bool),
                torch.tensor([tokens]),
                mask,
                sampler_logprobs=torch.zeros(1, len(tokens)),
                truncated=torch.zeros(1, dtype=torch.bool),
            )
        )

    all_scored = run(tokens, torch.ones_like(scored))
    padded_mask = torch.nn.functional.pad(scored, (0, 2))
    some_scored = run([*tokens, 1, 1], padded_mask)
    for key in ("logprobs", "entropy", "values"):
        x, y = getattr(some_scored, key), getattr(all_scored, key)
        torch.testing.assert_close(x[:, :7], y * scored, rtol=0, atol=1e-12)
        assert not x[:, 7:].any()
    torch.testing.assert_close(some_scored.last_values, all_scored.last_values, rtol=0, atol=1e-12)
    other = run([*tokens[:2], 33, *tokens[3:], 1, 1], padded_mask)
    changed = (other.logprobs - some_scored.logprobs).abs() > 1e-9
    assert changed.nonzero()[:, 1].tolist() == [4, 6]


def test_forward_writes_to_nothing_it_is_given():
    policy, batch = tiny_policy("llama", critic="head"), forced(ROWS, pad=-100)
    before = {k: v.clone() for k, v in vars(batch).items() if isinstance(v, Tensor)}
    weights = [p.clone() for p in policy.parameters()]
    policy(batch, reference_of(policy))
    assert all(torch.equal(getattr(batch, k), v) for k, v in before.items())
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), weights, strict=True))


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "gemma"])
def test_the_gradient_of_logprobs_is_the_models_own(name):
    policy = tiny_policy(name, torch.float64, vocab_size=None)
    batch = forced(ROWS, extra=(2, 2), pad=41)
    computed = torch.autograd.grad(policy(batch).logprobs.sum(), list(policy.parameters()))
    total = 0
    for prompt, response in ROWS:
        logits = policy.lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        total = total + logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum()
    expected = torch.autograd.grad(total, list(policy.parameters()))
    for a, b in zip(computed, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # norms are float32 inside


# ---------------------------------------------------------------- the critic


@each_critic
def test_values_start_at_exactly_zero_and_have_a_gradient(critic):
    policy = Policy(causal_lm("llama"), critic, VOCAB)
    batch = forced(ROWS)
    new = policy(batch)
    assert not new.values.any()
    assert not new.last_values.any()
    assert new.values.shape == batch.mask.shape
    ((new.values - 1.0)[batch.mask] ** 2).sum().backward()
    assert policy.critic.head.weight.grad.any()
    assert policy.critic.head.bias.grad.any()


@each_critic
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_values_are_v_before_each_token_and_last_values_v_after_the_last(name, critic):
    policy = tiny_policy(name, torch.float64, critic=critic)
    backbone = policy.critic.backbone or policy.backbone
    if critic == "network":
        with torch.no_grad():  # its own backbone has other weights once it is trained
            for p in backbone.parameters():
                p.mul_(1.1)
    new = policy(forced(ROWS, extra=(2, 3)))
    for i, (prompt, response) in enumerate(ROWS):
        states = backbone(torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) - 1 :]
        values = states @ policy.critic.head.weight[0] + policy.critic.head.bias
        torch.testing.assert_close(new.values[i, : len(response)], values[:-1], rtol=0, atol=1e-12)
        torch.testing.assert_close(new.last_values[i], values[-1], rtol=0, atol=1e-12)


def test_without_a_critic_there_are_no_values():
    new = tiny_policy("llama")(forced(ROWS))
    assert (new.values, new.last_values, new.kl_pi_ref, new.kl_ref_pi) == (None,) * 4


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_a_critic_network_shares_nothing_with_the_policy(name):
    policy = tiny_policy(name, critic="network")
    assert not addresses(policy.lm) & addresses(policy.critic)
    new = policy(forced(ROWS))
    (new.values.sum() + new.last_values.sum()).backward()
    assert all(p.grad is None for p in policy.lm.parameters())
    assert all(p.grad is not None and p.grad.any() for p in policy.critic.parameters())
    policy.zero_grad()
    policy(forced(ROWS)).logprobs.sum().backward()
    assert all(p.grad is None for p in policy.critic.parameters())


def test_a_critic_head_trains_the_backbone_it_shares():
    policy = tiny_policy("llama", critic="head")
    policy(forced(ROWS)).values.sum().backward()
    for name, p in policy.backbone.named_parameters():
        assert "embed" in name or p.grad.any(), name


def test_the_critic_of_a_bf16_policy_is_float32():
    policy = Policy(causal_lm("llama", torch.bfloat16), "head", VOCAB)
    assert policy.critic.head.weight.dtype == torch.float32
    new = policy(forced(ROWS), reference_of(policy))
    assert {x.dtype for x in new} == {torch.float32}


@pytest.mark.parametrize("name", ["llama", "tied", "gemma", "phi"])
@each_critic_kind
def test_parameter_groups_hold_every_trainable_parameter_exactly_once(name, critic):
    policy = tiny_policy(name, critic=critic)
    groups = policy.parameter_groups()
    assert list(groups) == (["policy"] if critic == "none" else ["policy", "critic"])
    listed = [id(p) for params in groups.values() for p in params]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in policy.parameters()}
    assert {id(p) for p in groups["policy"]} == {id(p) for p in policy.lm.parameters()}


@each_critic
def test_frozen_parameters_are_in_no_group(critic):
    policy = tiny_policy("llama", critic=critic)
    policy.lm.get_input_embeddings().weight.requires_grad_(False)
    listed = {id(p) for params in policy.parameter_groups().values() for p in params}
    assert listed == {id(p) for p in policy.parameters() if p.requires_grad}
    assert id(policy.lm.get_input_embeddings().weight) not in listed


# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize("name", ["llama", "gpt2", "cohere"])
def test_kls_to_the_reference_are_exact(name):
    policy, reference = (tiny_policy(name, torch.float64, seed=seed) for seed in (0, 1))
    for temperature in (1.0, 0.7):
        new = policy(forced(ROWS, temperature, extra=(1, 1)), reference)
        for i, (prompt, response) in enumerate(ROWS):
            p = own_logprobs(policy, prompt, response, temperature)
            q = own_logprobs(reference, prompt, response, temperature)
            kl_pi_ref = (p.exp() * (p - q)).sum(-1)
            kl_ref_pi = (q.exp() * (q - p)).sum(-1)
            n = len(response)
            torch.testing.assert_close(new.kl_pi_ref[i, :n], kl_pi_ref, rtol=0, atol=1e-12)
            torch.testing.assert_close(new.kl_ref_pi[i, :n], kl_ref_pi, rtol=0, atol=1e-12)
        assert not torch.allclose(new.kl_pi_ref, new.kl_ref_pi, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_to_a_fresh_reference_is_exactly_zero(dtype):
    policy, batch = tiny_policy("llama", dtype), forced(ROWS, 0.7)
    new = policy(batch, reference_of(policy))
    assert not new.kl_pi_ref.any()
    assert not new.kl_ref_pi.any()


def test_kept_reference_states_replace_the_reference_pass():
    policy, reference = (tiny_policy("llama", torch.float64, seed=seed) for seed in (0, 1))
    batch = forced(ROWS, 0.7, extra=(1, 1))
    expected = policy(batch, reference)
    batch.fill(ref_states=reference.states(batch).detach())
    reference_passes = []
    reference.backbone.register_forward_hook(lambda *_: reference_passes.append(1))
    assert_close(policy(batch, reference), expected, atol=0)
    trimmed = batch[[3, 1]].trim()
    n = trimmed.mask.shape[1]
    assert n < batch.mask.shape[1]
    of_rows = PolicyOutput(*(x if x is None else x[[3, 1], :n] for x in expected))
    assert_close(policy(trimmed, reference), of_rows)
    assert not reference_passes


def test_the_gradient_of_a_kl_reaches_the_policy_and_not_the_reference():
    policy, reference = (tiny_policy("llama", seed=seed) for seed in (0, 1))
    policy(forced(ROWS), reference).kl_pi_ref.sum().backward()
    assert all(p.grad is not None for p in policy.parameters())
    assert all(p.grad is None for p in reference.backbone.parameters())
    policy.zero_grad()
    frozen = reference_of(reference)
    policy(forced(ROWS), frozen).kl_pi_ref.sum().backward()
    assert all(p.grad is None for p in frozen.parameters())


@each_critic_kind
@pytest.mark.parametrize("name", ["llama", "tied"])
def test_reference_of_is_a_frozen_copy_that_shares_nothing(name, critic):
    policy = tiny_policy(name, critic=critic).train()
    reference, batch = reference_of(policy), forced(ROWS)
    assert reference.vocab_size == VOCAB
    assert reference.critic is None
    assert not reference.training
    assert not any(m.training for m in reference.modules())
    assert policy.training
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(p.requires_grad for p in policy.parameters())
    assert not addresses(policy) & addresses(reference)
    before = reference(batch).logprobs
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1.0)
    assert torch.equal(reference(batch).logprobs, before)


# ---------------------------------------------------------------- which models are supported


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_check_reproduced_accepts_what_we_support(name):
    # In float64 transformers' eager attention gives nan for gemma2 with left padding.
    for dtype in (torch.float32, torch.float64) if name != "gemma2" else (torch.float32,):
        check_reproduced(tiny_policy(name, dtype))
        check_reproduced(tiny_policy(name, dtype, vocab_size=None))


ALTERATIONS = {
    "scale": lambda x: 1.01 * x,
    "softcap": lambda x: 3 * torch.tanh(x / 3),
    "bias": lambda x: x + torch.linspace(0, 0.01, x.shape[-1]),
    "shift": lambda x: x.roll(1, dims=1),
    "nan": lambda x: x * torch.nan,
}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("alter", ALTERATIONS.values(), ids=ALTERATIONS)
def test_check_reproduced_refuses_by_name_a_model_with_other_logits(name, alter, monkeypatch):
    policy = tiny_policy(name)
    forward = policy.lm.forward

    def altered(*args, **options):
        out = forward(*args, **options)
        out.logits = alter(out.logits)
        return out

    monkeypatch.setattr(policy.lm, "forward", altered)
    with pytest.raises(UserError, match=rf"{name} models are not supported: .*nats"):
        check_reproduced(policy)


def test_check_reproduced_refuses_a_backbone_that_takes_no_position_ids(monkeypatch):
    policy = tiny_policy("llama")
    forward = policy.backbone.forward

    def narrow(input_ids=None, attention_mask=None, use_cache=None):
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(policy.backbone, "forward", narrow)
    with pytest.raises(UserError, match=r"llama models are not supported: .*position_ids"):
        check_reproduced(policy)


# An earlier check_reproduced scored one row without padding. A model whose states depend on left
# padding was accepted then, and its scores were wrong by 2 nats. Transformers' RWKV is one:
# "attention_mask was passed, but it is unused".
@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_check_reproduced_refuses_a_model_whose_states_depend_on_padding(ignored, monkeypatch):
    policy = tiny_policy("gpt2")
    forward = policy.backbone.forward

    def ignoring(*args, **options):
        value = options.get(ignored)
        if ignored == "attention_mask" and value is not None:
            options[ignored] = torch.ones_like(value)
        else:
            options[ignored] = None
        return forward(*args, **options)

    monkeypatch.setattr(policy.backbone, "forward", ignoring)
    with pytest.raises(UserError, match="gpt2 models are not supported"):
        check_reproduced(policy)


# ---------------------------------------------------------------- load


def save(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **config) -> Path:
    """A checkpoint folder; its embedding has 9 more rows than the tokenizer has tokens.

    config: changes of the model's config.
    """
    tokenizer = tokenizer or character_tokenizer()
    vocabulary = {
        "vocab_size": len(tokenizer) + 9,
        "eos_token_id": tokenizer.eos_token_id,
    }
    options = COMMON | vocabulary | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(LlamaConfig(**options))
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@each_critic_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_gives_the_saved_model_in_eval_mode_with_the_tokenizers_vocabulary(
    tmp_path, critic, dtype
):
    policy, tokenizer = load(str(save(tmp_path)), critic=critic, dtype=dtype)
    assert policy.vocab_size == len(tokenizer) == policy.head.weight.shape[0] - 9
    assert not any(m.training for m in policy.modules())
    assert all(p.requires_grad for p in policy.parameters())
    assert {p.dtype for p in policy.lm.parameters()} == {dtype}
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).to(dtype)
    for a, b in zip(policy.lm.parameters(), saved.parameters(), strict=True):
        assert torch.equal(a, b)
    ids = encode(tokenizer, "1+2=3")
    new = policy(forced([(ids[:4], ids[4:])], pad=tokenizer.pad_token_id))
    assert (new.values is None) == (critic == "none")
    assert new.logprobs.dtype == torch.float32


def test_load_refuses_a_directory_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match=r"model.name=.*absent"):
        load(str(tmp_path / "absent"))


def test_load_refuses_an_empty_directory(tmp_path):
    with pytest.raises(UserError, match=r"model.name="):
        load(str(tmp_path))


def test_load_refuses_a_directory_without_weights(tmp_path):
    (save(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.name=.*model.safetensors"):
        load(str(tmp_path))


def test_load_refuses_a_directory_without_a_tokenizer(tmp_path):
    for file in save(tmp_path).glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match=r"model.name=.*tokenizer"):
        load(str(tmp_path))


def test_load_refuses_a_tokenizer_without_an_eos_token(tmp_path):
    tokenizer = character_tokenizer()
    tokenizer.eos_token = None
    save(tmp_path, tokenizer)
    with pytest.raises(UserError, match=r"model.name=.*no EOS token.*eos_token"):
        load(str(tmp_path))


# Each of these once left load() as a traceback (SafetensorError, RuntimeError, IndexError), or
# was not noticed at all.
@pytest.mark.parametrize(
    "spoiled",
    ["cut weights", "no weights", "other shape", "tokenizer too large", "lm_head missing"],
)
def test_load_refuses_a_spoiled_checkpoint_in_one_line(tmp_path, spoiled):
    """Above all missing weights, which transformers would fill with random numbers."""
    save(tmp_path, **({"vocab_size": 50} if spoiled == "tokenizer too large" else {}))
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if spoiled == "cut weights":
        file.write_bytes(file.read_bytes()[:1000])
    elif spoiled == "no weights":
        file.write_bytes(b"")
    elif spoiled == "other shape":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 64}))
    elif spoiled == "lm_head missing":
        lm = AutoModelForCausalLM.from_pretrained(tmp_path)
        lm.base_model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model.name="):
        load(str(tmp_path))


# ---------------------------------------------------------------- sampling parameters, tokens


@pytest.fixture(scope="module")
def small() -> tuple[Policy, PreTrainedTokenizerFast]:
    tokenizer = character_tokenizer()
    config = LlamaConfig(**COMMON | {"vocab_size": 120, "eos_token_id": None})
    lm = AutoModelForCausalLM.from_config(config)
    return Policy(lm, vocab_size=len(tokenizer)), tokenizer


def declare_eos(policy: Policy, ids: int | list[int] | None, monkeypatch) -> None:
    monkeypatch.setattr(policy.lm.generation_config, "eos_token_id", ids)


@pytest.mark.parametrize(
    ("declared", "eos"),
    [
        (None, (1,)),
        (1, (1,)),
        (7, (1, 7)),
        ([9, 7], (1, 7, 9)),
        ([1, 0], (0, 1)),
        ([0, 1, 2, 3], (0, 1, 2, 3)),
    ],
    ids=str,
)
def test_every_declared_eos_ends_a_response_and_pad_is_none_of_them(
    small, declared, eos, monkeypatch
):
    """The tokenizer's EOS, id 1, and those of the generation config. Its pad is id 0."""
    policy, tokenizer = small
    declare_eos(policy, declared, monkeypatch)
    params = sampling_params(policy, tokenizer, 0.7)
    assert params.eos_ids == eos
    assert params.pad_id == (0 if 0 not in eos else next(i for i in range(9) if i not in eos))
    assert (params.temperature, params.vocab_size) == (0.7, len(tokenizer))
    # Truncated sampling distributions are for evaluation only.
    assert (params.top_k, params.top_p, params.min_p) == (0, 1.0, 0.0)


@pytest.mark.parametrize("pad", ["<eos>", None])
def test_pad_is_never_an_eos_even_where_the_tokenizer_says_so(small, pad, monkeypatch):
    """Many recipes set pad_token = eos_token; then no EOS would be trained."""
    policy, tokenizer = small[0], character_tokenizer()
    tokenizer.pad_token = pad
    declare_eos(policy, [1, 0], monkeypatch)
    params = sampling_params(policy, tokenizer, 1.0)
    assert params.eos_ids == (0, 1)
    assert params.pad_id == 2


def test_encode_takes_text_as_it_is_and_messages_through_the_template():
    tokenizer = character_tokenizer()
    assert tokenizer.decode(encode(tokenizer, "7+8=\n")) == "7+8=\n"
    with pytest.raises(ValueError, match=r"chat.template"):
        encode(tokenizer, [{"role": "user", "content": "hi"}])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}bot>{% endif %}"
    )
    ids = encode(tokenizer, [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yo"}])
    assert isinstance(ids, list)
    assert all(isinstance(i, int) for i in ids)
    assert tokenizer.decode(ids) == "user>hi\nbot>yo\nbot>"
    assert encode(tokenizer, "hi") == ids[5:7]  # raw text does not pass through the template


def test_encode_keeps_a_prompt_of_any_length():
    assert len(encode(character_tokenizer(), "12345+" * 50)) == 300


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        ("{{ raise_exception('no system role') }}", [{"role": "system", "content": "hi"}]),
        ("{% for m in messages %}{{ m['content'] + 'x' }}{% endfor %}", [{"role": "user"}]),
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}",
            [{"role": "user", "content": "hi"}, 3],
        ),
    ],
)
def test_messages_that_a_template_refuses_are_a_user_error(template, messages):
    """A template is a program and may fail in any way; so may the library."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"chat messages need .* that accepts them"):
        encode(tokenizer, messages)


def test_decode_reads_the_sampled_tokens_only_and_leaves_special_ones_out():
    tokenizer = character_tokenizer()
    eos, x = tokenizer.eos_token_id, tokenizer("x").input_ids[0]
    rows = [([x], [*tokenizer("42").input_ids, eos]), ([x, x], [x] * 5), ([x], [eos])]
    assert decode(tokenizer, forced(rows, pad=x)) == ["42", "xxxxx", ""]


def test_left_pad_ends_every_prompt_at_the_same_column():
    """A prompt may contain the pad id, which is attended there."""
    ids, mask = left_pad([[5, 4, 0], [7], [4, 9]], 4)
    assert ids.tolist() == [[5, 4, 0], [4, 4, 7], [4, 4, 9]]
    assert mask.tolist() == [[True] * 3, [False, False, True], [False, True, True]]
