"""The policy: what it says of sampled tokens is what the model says of each row alone, and nothing else gets in."""

import json
from pathlib import Path

import pytest
import torch
from models import COMMON, CONFIGS, VOCAB, causal_lm, forced, ragged, tiny_policy
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from rlkl.errors import UserError
from rlkl.model import Policy, check_reproduced, decode, encode, left_pad, load, reference_of, sampling_rule
from rlkl.tiny import character_tokenizer
from rlkl.types import Batch, Evaluation

EVERY = list(CONFIGS)
DOUBLE = [name for name in EVERY if name != "gemma2"]  # transformers' eager attention is nan there with left padding
ROWS = ragged()


def alone(policy: Policy, prompt: list[int], reply: list[int], temperature: float = 1.0) -> Tensor:
    """(T, V) log-probs before each reply token by the model's own forward pass: one row, no padding, no mask."""
    with torch.no_grad():
        logits = policy.lm(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1, : policy.vocab_size]
    return (logits / temperature).log_softmax(-1)


def padded(rows: list[Tensor], width: int) -> Tensor:
    return torch.stack([torch.nn.functional.pad(x, (0, width - len(x))) for x in rows])


def assert_close(a: Evaluation, b: Evaluation, atol: float = 1e-12) -> None:
    for name, x, y in zip(Evaluation._fields, a, b, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            torch.testing.assert_close(x, y, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


# ---------------------------------------------------------------- evaluate = the model's own logits of the row alone


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", EVERY)
def test_evaluate_is_what_the_model_says_of_each_row_without_padding(name, temperature):
    policy = tiny_policy(name)
    batch = forced(ROWS, temperature, extra=(3, 2))
    got = policy.evaluate(batch)
    for i, (prompt, reply) in enumerate(ROWS):
        logp = alone(policy, prompt, reply, temperature)
        want = logp.gather(-1, torch.tensor(reply)[:, None]).squeeze(-1)
        torch.testing.assert_close(got.logprobs[i, : len(reply)], want, rtol=0, atol=2e-5)
        torch.testing.assert_close(got.entropy[i, : len(reply)], -(logp.exp() * logp).sum(-1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "cohere"])
def test_states_are_indexed_by_the_reply_token_that_they_predict(name):
    policy = tiny_policy(name, torch.float64)
    batch = forced(ROWS, extra=(2, 1))
    states = policy.states(batch)
    assert states.shape == (*batch.mask.shape, 48)
    for i, (prompt, reply) in enumerate(ROWS):
        logits = policy.logits(states[i, : len(reply)])[:, :VOCAB]
        torch.testing.assert_close(logits.log_softmax(-1), alone(policy, prompt, reply), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "least"), [("gemma2", 0.1), ("granite", 0.1), ("cohere", 0.1), ("phi", 0.05)])
def test_plain_matrix_products_would_be_wrong_on_these_models(name, least):
    """So that the tests above cannot pass on a head that forgets scale, bias or soft-cap."""
    policy, batch = tiny_policy(name), forced(ROWS)
    hidden = policy.states(batch)[batch.mask]
    plain = (hidden @ policy.head.weight.T)[:, :VOCAB].log_softmax(-1)
    assert (plain - policy.logits(hidden)[:, :VOCAB].log_softmax(-1)).abs().max() > least


def test_probabilities_over_the_tokenizers_vocabulary_add_up_to_one():
    """97 rows of embedding, 90 tokens: the padding rows take no mass, in log-probs, entropy or KL."""
    policy, reference = tiny_policy("llama", torch.float64), tiny_policy("llama", torch.float64, seed=1)
    batch = forced([([5, 6], [v]) for v in range(VOCAB)])
    new = policy.evaluate(batch, reference)
    assert new.logprobs.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    whole = Policy(policy.lm).evaluate(batch)
    assert whole.logprobs.exp().sum() < 0.99, "without vocab_size the padding rows do take mass"
    assert all(x.isfinite().all() for x in new if x is not None)


# ---------------------------------------------------------------- invariances


@pytest.mark.parametrize("critic", ["head", "network"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "qwen3", "gemma"])
def test_evaluate_sees_neither_padding_nor_its_content_nor_other_rows(name, critic):
    policy = tiny_policy(name, torch.float64, critic=critic)
    reference = tiny_policy(name, torch.float64, seed=1)
    want = policy.evaluate(forced(ROWS), reference)
    width = want.logprobs.shape[1]
    assert all(x.any() for x in want)

    def cut(e: Evaluation) -> Evaluation:
        return Evaluation(*(x if x.dim() == 1 else x[:, :width] for x in e))

    assert_close(cut(policy.evaluate(forced(ROWS, extra=(4, 9)), reference)), want)
    for garbage in (41, -100, 10**6):
        assert_close(cut(policy.evaluate(forced(ROWS, pad=garbage, extra=(1, 2)), reference)), want)
    order = [2, 0, 3, 1]
    permuted = policy.evaluate(forced([ROWS[i] for i in order]), reference)
    assert_close(permuted, Evaluation(*(x[order] for x in want)))
    for i, row in enumerate(ROWS):
        one, n = policy.evaluate(forced([row]), reference), len(row[1])
        assert_close(one, Evaluation(*(x[[i]] if x.dim() == 1 else x[[i], :n] for x in want)))


@pytest.mark.parametrize("name", EVERY)
def test_every_output_is_zero_outside_the_mask(name):
    policy, reference = tiny_policy(name, critic="head"), tiny_policy(name, seed=1)
    batch = forced(ROWS, extra=(0, 3))
    for key, x in policy.evaluate(batch, reference)._asdict().items():
        if key != "last_values":
            assert not x[~batch.mask].any(), key
            assert x[batch.mask].all(), key


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_a_window_that_holds_only_padding_poisons_no_value_and_no_gradient(name):
    """Behind a short reply beside a long one, a sliding window sees only masked columns."""
    policy = tiny_policy(name, critic="head")
    new = policy.evaluate(forced([([5, 6], [7]), ([5], list(range(6, 36)))], extra=(9, 9)))
    assert all(x.isfinite().all() for x in new if x is not None)
    sum(x.sum() for x in new if x is not None).backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_observation_tokens_are_context_but_are_not_scored(name):
    """A hole in the mask: what stands there moves what comes after it, and nothing before."""
    policy = tiny_policy(name, torch.float64, critic="head")
    prompt, reply = ROWS[2]
    scored = [True, True, False, False, True, False, True, False, False]  # the last two columns are padding

    def run(tokens: list[int], mask: list[bool]) -> Evaluation:
        ids, zeros = torch.tensor([tokens]), torch.zeros(1, len(tokens))
        ones = torch.ones(1, len(prompt), dtype=torch.bool)
        prompts = torch.tensor([prompt])
        return policy.evaluate(Batch(prompts, ones, ids, torch.tensor([mask]), zeros, torch.zeros(1, dtype=torch.bool)))

    whole, holes = run(reply[:7], [True] * 7), run([*reply[:7], 1, 1], scored)
    for key in ("logprobs", "entropy", "values"):
        x, y = getattr(holes, key), getattr(whole, key)
        torch.testing.assert_close(x[:, :7], y * torch.tensor(scored[:7]), rtol=0, atol=1e-12)
        assert not x[:, 7:].any()
    torch.testing.assert_close(holes.last_values, whole.last_values, rtol=0, atol=1e-12)
    other = run([*reply[:2], 33, *reply[3:7], 1, 1], scored)
    moved = (other.logprobs - holes.logprobs).abs() > 1e-9
    assert moved.tolist() == [[False, False, False, False, True, False, True, False, False]]


def test_evaluate_writes_to_nothing_it_is_given():
    policy, batch = tiny_policy("llama", critic="head"), forced(ROWS, pad=-100)
    before = {k: v.clone() for k, v in vars(batch).items() if isinstance(v, Tensor)}
    weights = [p.clone() for p in policy.parameters()]
    policy.evaluate(batch, reference_of(policy))
    assert all(torch.equal(getattr(batch, k), v) for k, v in before.items())
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), weights, strict=True))


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "gemma"])
def test_the_gradient_of_logprobs_is_the_models_own(name):
    policy = tiny_policy(name, torch.float64, vocab_size=None)
    batch = forced(ROWS, extra=(2, 2), pad=41)
    new = policy.evaluate(batch).logprobs
    got = torch.autograd.grad(new.sum(), list(policy.parameters()))
    total = 0
    for prompt, reply in ROWS:
        logp = policy.lm(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total = total + logp.gather(-1, torch.tensor(reply)[:, None]).sum()
    want = torch.autograd.grad(total, list(policy.parameters()))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)  # transformers' norms are float32 inside


# ---------------------------------------------------------------- the critic


@pytest.mark.parametrize("critic", ["head", "network"])
def test_values_start_at_exactly_zero_and_have_a_gradient(critic):
    policy = Policy(causal_lm("llama"), critic, VOCAB)
    batch = forced(ROWS)
    new = policy.evaluate(batch)
    assert not new.values.any()
    assert not new.last_values.any()
    assert new.values.shape == batch.mask.shape
    ((new.values - 1.0)[batch.mask] ** 2).sum().backward()
    assert policy.critic.head.weight.grad.any()
    assert policy.critic.head.bias.grad.any()


@pytest.mark.parametrize("critic", ["head", "network"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_values_are_v_before_each_token_and_last_values_v_after_the_last(name, critic):
    policy = tiny_policy(name, torch.float64, critic=critic)
    backbone = policy.critic.backbone or policy.backbone
    if critic == "network":
        with torch.no_grad():  # a network of its own may drift from the policy's
            for p in backbone.parameters():
                p.mul_(1.1)
    got = policy.evaluate(forced(ROWS, extra=(2, 3)))
    for i, (prompt, reply) in enumerate(ROWS):
        states = backbone(torch.tensor([prompt + reply])).last_hidden_state[0, len(prompt) - 1 :]
        values = states @ policy.critic.head.weight[0] + policy.critic.head.bias
        torch.testing.assert_close(got.values[i, : len(reply)], values[:-1], rtol=0, atol=1e-12)
        torch.testing.assert_close(got.last_values[i], values[-1], rtol=0, atol=1e-12)


def test_without_a_critic_there_are_no_values():
    new = tiny_policy("llama").evaluate(forced(ROWS))
    assert (new.values, new.last_values, new.kl_pi_ref, new.kl_ref_pi) == (None,) * 4


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_a_critic_network_shares_nothing_with_the_policy(name):
    policy = tiny_policy(name, critic="network")
    theirs, mine = ({p.data_ptr() for p in m.parameters()} for m in (policy.lm, policy.critic))
    assert not theirs & mine
    new = policy.evaluate(forced(ROWS))
    (new.values.sum() + new.last_values.sum()).backward()
    assert all(p.grad is None for p in policy.lm.parameters())
    assert all(p.grad is not None and p.grad.any() for p in policy.critic.parameters())
    policy.zero_grad()
    policy.evaluate(forced(ROWS)).logprobs.sum().backward()
    assert all(p.grad is None for p in policy.critic.parameters())


def test_a_critic_head_trains_the_backbone_it_shares():
    policy = tiny_policy("llama", critic="head")
    policy.evaluate(forced(ROWS)).values.sum().backward()
    assert all(p.grad.any() for name, p in policy.backbone.named_parameters() if "embed" not in name)


def test_the_critic_of_a_bf16_policy_is_float32():
    policy = Policy(causal_lm("llama", torch.bfloat16), "head", VOCAB)
    assert policy.critic.head.weight.dtype == torch.float32
    new = policy.evaluate(forced(ROWS), reference_of(policy))
    assert {x.dtype for x in new} == {torch.float32}


@pytest.mark.parametrize("critic", ["none", "head", "network"])
@pytest.mark.parametrize("name", ["llama", "tied", "gemma", "phi"])
def test_parameter_groups_hold_every_trainable_parameter_exactly_once(name, critic):
    policy = tiny_policy(name, critic=critic)
    groups = policy.parameter_groups()
    assert list(groups) == (["policy"] if critic == "none" else ["policy", "critic"])
    listed = [id(p) for params in groups.values() for p in params]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in policy.parameters()}
    assert {id(p) for p in groups["policy"]} == {id(p) for p in policy.lm.parameters()}


@pytest.mark.parametrize("critic", ["head", "network"])
def test_frozen_parameters_are_in_no_group(critic):
    policy = tiny_policy("llama", critic=critic)
    policy.lm.get_input_embeddings().weight.requires_grad_(False)
    listed = {id(p) for params in policy.parameter_groups().values() for p in params}
    assert listed == {id(p) for p in policy.parameters() if p.requires_grad}
    assert id(policy.lm.get_input_embeddings().weight) not in listed


# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["llama", "gpt2", "cohere"])
def test_kls_to_the_reference_are_exact(name, temperature):
    policy, reference = (tiny_policy(name, torch.float64, seed=s) for s in (0, 1))
    got = policy.evaluate(forced(ROWS, temperature, extra=(1, 1)), reference)
    for i, (prompt, reply) in enumerate(ROWS):
        p, q = (alone(m, prompt, reply, temperature) for m in (policy, reference))
        n = len(reply)
        torch.testing.assert_close(got.kl_pi_ref[i, :n], (p.exp() * (p - q)).sum(-1), rtol=0, atol=1e-12)
        torch.testing.assert_close(got.kl_ref_pi[i, :n], (q.exp() * (q - p)).sum(-1), rtol=0, atol=1e-12)
    assert not torch.allclose(got.kl_pi_ref, got.kl_ref_pi, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_to_a_fresh_reference_is_exactly_zero(dtype):
    policy, batch = tiny_policy("llama", dtype), forced(ROWS, 0.7)
    new = policy.evaluate(batch, reference_of(policy))
    assert not new.kl_pi_ref.any()
    assert not new.kl_ref_pi.any()


def test_kept_reference_states_stand_for_the_reference_pass():
    policy, reference = (tiny_policy("llama", torch.float64, seed=s) for s in (0, 1))
    batch, calls = forced(ROWS, 0.7, extra=(1, 1)), []
    want = policy.evaluate(batch, reference)
    batch.ref_states = reference.states(batch).detach()
    reference.backbone.register_forward_hook(lambda *_: calls.append(1))
    assert_close(policy.evaluate(batch, reference), want, atol=0)
    assert not calls, "the reference was run although its states were kept"
    trimmed = batch[[3, 1]].trim()
    n = trimmed.mask.shape[1]
    assert n < batch.mask.shape[1]
    assert_close(policy.evaluate(trimmed, reference), Evaluation(*(x if x is None else x[[3, 1], :n] for x in want)))


def test_the_gradient_of_a_kl_reaches_the_policy_and_not_the_reference():
    policy, reference = (tiny_policy("llama", seed=s) for s in (0, 1))
    policy.evaluate(forced(ROWS), reference).kl_pi_ref.sum().backward()
    assert all(p.grad is not None for p in policy.parameters())
    assert all(p.grad is None for p in reference.backbone.parameters())
    policy.zero_grad()
    frozen = reference_of(reference)
    policy.evaluate(forced(ROWS), frozen).kl_pi_ref.sum().backward()
    assert all(p.grad is None for p in frozen.parameters())


@pytest.mark.parametrize("critic", ["none", "head", "network"])
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
    mine, theirs = ({x.data_ptr() for x in [*m.parameters(), *m.buffers()]} for m in (policy, reference))
    assert not mine & theirs
    before = reference.evaluate(batch).logprobs
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1.0)
    assert torch.equal(reference.evaluate(batch).logprobs, before)


# ---------------------------------------------------------------- what is supported is measured, the rest refused


@pytest.mark.parametrize("name", EVERY)
def test_check_reproduced_accepts_what_we_support(name):
    for dtype in (torch.float32, torch.float64) if name in DOUBLE else (torch.float32,):
        check_reproduced(tiny_policy(name, dtype))
        check_reproduced(tiny_policy(name, dtype, vocab_size=None))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "alter",
    [
        lambda x: 1.01 * x,
        lambda x: 3 * torch.tanh(x / 3),
        lambda x: x + torch.linspace(0, 0.01, x.shape[-1]),
        lambda x: x.roll(1, dims=1),
        lambda x: x * torch.nan,
    ],
    ids=["scale", "softcap", "bias", "shift", "nan"],
)
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


# Once check_reproduced scored one row without padding, so a model that lets left padding into its states
# (transformers' RWKV does: "attention_mask was passed, but it is unused") is accepted and mis-scored by 2 nats.
@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_check_reproduced_refuses_a_model_that_does_not_see_through_padding(ignored, monkeypatch):
    policy = tiny_policy("gpt2")
    forward = policy.backbone.forward

    def blind(*args, **options):
        given = options.get(ignored)
        instead = torch.ones_like(given) if given is not None and ignored == "attention_mask" else None
        return forward(*args, **(options | {ignored: instead}))

    monkeypatch.setattr(policy.backbone, "forward", blind)
    with pytest.raises(UserError, match="gpt2 models are not supported"):
        check_reproduced(policy)


# ---------------------------------------------------------------- load


def save(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **config) -> Path:
    """A checkpoint as users have them, with `config` changed; its embedding has more rows than the tokenizer tokens."""
    tokenizer = tokenizer or character_tokenizer()
    options = COMMON | {"vocab_size": len(tokenizer) + 9, "eos_token_id": tokenizer.eos_token_id} | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(LlamaConfig(**options))
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("critic", ["none", "head", "network"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_gives_the_saved_model_in_eval_mode_with_the_tokenizers_vocabulary(tmp_path, critic, dtype):
    policy, tokenizer = load(str(save(tmp_path)), critic=critic, dtype=dtype)
    assert policy.vocab_size == len(tokenizer) == policy.head.weight.shape[0] - 9
    assert not any(m.training for m in policy.modules())
    assert all(p.requires_grad for p in policy.parameters())
    assert {p.dtype for p in policy.lm.parameters()} == {dtype}
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).to(dtype)
    assert all(torch.equal(a, b) for a, b in zip(policy.lm.parameters(), saved.parameters(), strict=True))
    ids = encode(tokenizer, "1+2=3")
    new = policy.evaluate(forced([(ids[:4], ids[4:])], pad=tokenizer.pad_token_id))
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


# Once these left load() as tracebacks (SafetensorError, RuntimeError, IndexError), or not at all.
@pytest.mark.parametrize(
    "spoiled", ["cut weights", "no weights", "other shape", "tokenizer too large", "lm_head missing"]
)
def test_load_refuses_a_spoiled_checkpoint_in_one_line(tmp_path, spoiled):
    """Above all one whose weights do not cover the model: transformers fills the rest with random numbers."""
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


# ---------------------------------------------------------------- sampling rule, tokens


@pytest.fixture(scope="module")
def small() -> tuple[Policy, PreTrainedTokenizerFast]:
    tokenizer = character_tokenizer()
    lm = AutoModelForCausalLM.from_config(LlamaConfig(**COMMON | {"vocab_size": 120, "eos_token_id": None}))
    return Policy(lm, vocab_size=len(tokenizer)), tokenizer


@pytest.mark.parametrize(
    ("declared", "eos"),
    [(None, (1,)), (1, (1,)), (7, (1, 7)), ([9, 7], (1, 7, 9)), ([1, 0], (0, 1)), ([0, 1, 2, 3], (0, 1, 2, 3))],
    ids=str,
)
def test_every_declared_eos_ends_a_reply_and_pad_is_none_of_them(small, declared, eos):
    """Of the tokenizer (id 1) and of the generation config, one id or a list; id 0 is the tokenizer's pad."""
    policy, tokenizer = small
    policy.lm.generation_config.eos_token_id = declared
    got = sampling_rule(policy, tokenizer, 0.7)
    assert got.eos_ids == eos
    assert got.pad_id == (0 if 0 not in eos else next(i for i in range(9) if i not in eos))
    assert (got.temperature, got.vocab_size) == (0.7, len(tokenizer))
    assert (got.top_k, got.top_p, got.min_p) == (0, 1.0, 0.0), "truncation is for evaluation only"


@pytest.mark.parametrize("pad", ["<eos>", None])
def test_pad_is_never_an_eos_also_where_the_tokenizer_says_so(small, pad):
    """`tokenizer.pad_token = tokenizer.eos_token` is in half of the recipes; then no stop would ever be trained."""
    policy, tokenizer = small[0], character_tokenizer()
    tokenizer.pad_token = pad
    policy.lm.generation_config.eos_token_id = [1, 0]
    got = sampling_rule(policy, tokenizer, 1.0)
    assert got.eos_ids == (0, 1)
    assert got.pad_id == 2


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
    assert encode(tokenizer, "hi") == ids[5:7], "raw text does not pass through the template"


@pytest.mark.parametrize(("template", "messages"), [
    ("{{ raise_exception('no system role') }}", [{"role": "system", "content": "hi"}]),
    ("{% for m in messages %}{{ m['content'] + 'x' }}{% endfor %}", [{"role": "user"}]),
    ("{% for m in messages %}{{ m['content'] }}{% endfor %}", [{"role": "user", "content": "hi"}, 3])])
def test_messages_that_a_template_refuses_are_a_mistake_in_words(template, messages):
    """A template is a program: it fails in its own way, and so does the library with what are no messages."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"chat messages need .* that takes them"):
        encode(tokenizer, messages)


def test_decode_reads_the_sampled_tokens_only_and_leaves_special_ones_out():
    tokenizer = character_tokenizer()
    eos, x = tokenizer.eos_token_id, tokenizer("x").input_ids[0]
    rows = [([x], [*tokenizer("42").input_ids, eos]), ([x, x], [x] * 5), ([x], [eos])]
    assert decode(tokenizer, forced(rows, pad=x)) == ["42", "xxxxx", ""]


def test_left_pad_ends_every_prompt_at_the_same_column():
    ids, mask = left_pad([[5, 6, 0], [7], [8, 9]], 4)
    assert ids.tolist() == [[5, 6, 0], [4, 4, 7], [4, 8, 9]]
    assert mask.tolist() == [[True] * 3, [False, False, True], [False, True, True]]
