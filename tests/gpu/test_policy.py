"""The policy on CUDA: bf16 as it is trained there, float32 against the CPU, and memory that follows the tokens."""

import copy

import pytest
import torch
from models import causal_lm, forced, prompts, ragged, rule, tiny_policy, uniforms
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from rlkl.logprobs import head_logits, token_logprobs
from rlkl.model import Policy, check_reproduced, reference_of
from rlkl.optim import Optimizer
from rlkl.rollout import SAMPLERS, cached, naive, pick
from rlkl.rollout.sample import draw_uniforms
from rlkl.types import Batch, Head, Sampling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MODELS = ["llama", "qwen2", "qwen3", "gemma", "gemma2", "granite", "gpt2", "cohere", "phi", "mistral"]
ROWS = ragged()


def to(batch: Batch, device: str) -> Batch:
    tensors = {k: v.to(device) for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    return Batch(**(vars(batch) | tensors))


def on_cuda(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x.cuda() for x in tensors)


# ---------------------------------------------------------------- bf16: sampled = scored


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", MODELS)
def test_bf16_scoring_pass_gives_the_samplers_logprobs(name, temperature):
    """Kernels of other shapes round bf16 states elsewhere; a wrong temperature or shift is ten times the tolerance."""
    policy = tiny_policy(name, torch.bfloat16).cuda()
    ids, mask = on_cuda(*prompts())
    for sampler in SAMPLERS.values():
        batch = sampler(policy, ids, mask, uniforms(48, 12).cuda(), rule(temperature))
        with torch.no_grad():
            scored = policy.evaluate(batch).logprobs
        assert batch.sampler_logprobs.dtype == scored.dtype == torch.float32
        assert (scored - batch.sampler_logprobs)[batch.mask].abs().mean() < 0.02
        for reply, truncated in zip(batch.replies(), batch.truncated.tolist(), strict=True):
            assert not any(token in rule().eos_ids for token in reply[:-1])
            assert truncated == (reply[-1] not in rule().eos_ids)


def test_logits_of_bf16_states_are_not_rounded_to_bf16():
    policy = tiny_policy("llama", torch.bfloat16).cuda()
    batch = to(forced(ROWS), "cuda")
    with torch.no_grad():
        hidden = policy.states(batch)[batch.mask]
        logits = policy.logits(hidden)[:, : policy.vocab_size]
    assert hidden.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16().float()).float().mean() > 0.9
    want = hidden.double() @ policy.head.weight[: policy.vocab_size].double().T
    assert (logits - want).abs().max() <= 2e-5


def test_bf16_kl_to_a_fresh_reference_is_exactly_zero():
    policy, batch = tiny_policy("llama", torch.bfloat16).cuda(), to(forced(ROWS, 0.7), "cuda")
    new = policy.evaluate(batch, reference_of(policy))
    assert not new.kl_pi_ref.any()
    assert not new.kl_ref_pi.any()


# ---------------------------------------------------------------- float32: cuda = cpu


@pytest.mark.parametrize("name", MODELS)
def test_float32_on_cuda_is_float32_on_the_cpu(name):
    policy, reference = tiny_policy(name, critic="head"), tiny_policy(name, seed=1)
    batch = forced(ROWS, 0.7, extra=(2, 3), pad=-100)
    with torch.no_grad():
        want = policy.evaluate(batch, reference)
        got = copy.deepcopy(policy).cuda().evaluate(to(batch, "cuda"), reference.cuda())
    for key, x, y in zip(want._fields, got, want, strict=True):
        assert x.device.type == "cuda"
        assert (x.cpu() - y).abs().max() <= 1e-4, key


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral"])
def test_cached_is_naive_in_float32_at_a_pinned_draw(name):
    policy, (ids, mask) = tiny_policy(name).cuda(), on_cuda(*prompts())
    u = uniforms(12, 12).cuda()
    a, b = naive(policy, ids, mask, u, rule()), cached(policy, ids, mask, u, rule())
    assert a.replies() == b.replies()
    assert (a.sampler_logprobs - b.sampler_logprobs).abs().max() <= 1e-4


def test_check_reproduced_runs_where_the_model_is():
    check_reproduced(tiny_policy("llama").cuda())


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24, 1.0])
def test_pick_stays_in_the_support_and_agrees_with_the_cpu(u):
    logits = 3 * torch.randn(7, 50_257, generator=torch.Generator().manual_seed(0))
    logits[:, :100] = -torch.inf
    edge = torch.full((7,), u, dtype=torch.float64)
    ids, logprobs = pick(*on_cuda(logits, edge), Sampling(vocab_size=50_000))
    assert logprobs.isfinite().all()
    assert ids.tolist() == pick(logits, edge, Sampling(vocab_size=50_000))[0].tolist()
    assert all(100 <= i < 50_000 for i in ids.tolist())


def test_every_device_samples_from_the_same_uniforms():
    a, b = (draw_uniforms(5, 7, torch.Generator().manual_seed(3), device) for device in ("cpu", "cuda"))
    assert b.device.type == "cuda"
    assert torch.equal(a, b.cpu())


# ---------------------------------------------------------------- training


def test_bf16_weights_follow_their_float32_masters_in_place():
    """300 steps of 1e-5 arrive; in bf16 each of them rounds to nothing."""
    p = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16, device="cuda"))
    wide = nn.Parameter(torch.ones(1000, device="cuda"))
    where = p.data_ptr()
    optimizer, twin = (
        Optimizer({"policy": [x]}, {"policy": 1e-5}, betas=(0.9, 0.95), weight_decay=0.0, max_grad_norm=1.0)
        for x in (p, wide)
    )
    for _ in range(300):
        for x in (p, wide):
            x.grad = torch.full_like(x, 2**-6)
        optimizer.step(1.0)
        twin.step(1.0)
    (master,) = optimizer.masters["policy"]
    assert (master.dtype, master.device) == (torch.float32, p.device)
    assert torch.equal(master, wide)
    assert torch.equal(p, wide.bfloat16())
    assert p.data_ptr() == where
    assert (p < 1).all()


def test_a_bf16_policy_gradient_step_raises_the_logprobs_it_should():
    """Forward, backward, masters and sampler read the same tensors: 20 steps on forced replies make them likelier."""
    policy = Policy(causal_lm("llama", torch.bfloat16).cuda(), "head", 90)
    groups, batch = policy.parameter_groups(), to(forced(ROWS), "cuda")
    optimizer = Optimizer(groups, dict.fromkeys(groups, 1e-3), betas=(0.9, 0.95), weight_decay=0.0, max_grad_norm=1.0)
    scores = []
    for _ in range(20):
        new = policy.evaluate(batch)
        scores.append(new.logprobs.sum().item())
        (((new.values - 1.0)[batch.mask] ** 2).sum() - new.logprobs.sum()).backward()
        assert optimizer.step(1.0).keys() == groups.keys()
    assert scores[-1] > scores[0] + 1.0
    assert {p.dtype for p in policy.lm.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------- memory


def peak(run) -> int:
    """Bytes allocated at the highest point of run(), above what was held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.fixture
def large() -> Policy:
    """A vocabulary of a real model on a tiny backbone: what evaluate() holds is logits."""
    config = LlamaConfig(
        vocab_size=65_536,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    return Policy(AutoModelForCausalLM.from_config(config).bfloat16().cuda().eval())


def one_long_reply(rows: int, width: int, length: int) -> Batch:
    """One reply of `width` tokens, the others of `length`: mostly padding."""
    g = torch.Generator().manual_seed(0)
    sizes = [width, *[length] * (rows - 1)]
    draw = [torch.randint(60_000, (8 + n,), generator=g).tolist() for n in sizes]
    return to(forced([(x[:8], x[8:]) for x in draw]), "cuda")


def test_memory_of_evaluate_follows_the_tokens_and_not_the_padding(large):
    """Of 64 × 512 columns 2 % are tokens: a copy of their logits takes 0.2 GB, one of all columns 8.6 GB."""
    batch = one_long_reply(64, 512, 4)
    tokens = int(batch.mask.sum())
    logits = tokens * 65_536 * 4
    with torch.no_grad():
        large.evaluate(one_long_reply(2, 8, 4))  # cuBLAS takes its workspace now
        used = peak(lambda: large.evaluate(batch))
    assert tokens < 0.03 * batch.mask.numel()
    assert used < 12 * logits < 0.5 * batch.mask.numel() * 65_536 * 4


def test_evaluate_without_gradients_keeps_nothing(large):
    batch = one_long_reply(8, 128, 16)
    with torch.no_grad():
        new = large.evaluate(batch)
    del new
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        kept = large.evaluate(batch)
    assert torch.cuda.memory_allocated() - before < 64 * kept.logprobs.nbytes + 2**20


def test_padding_reaches_no_row_of_token_logprobs(large):
    """The head's gradient is float32 sums over tokens: the same whether the batch is padded or not."""
    rows = [([5, 6, 7], [8, 9]), ([10], [11, 12, 13])]
    grads = []
    for extra in ((0, 0), (5, 40)):
        large.zero_grad()
        large.evaluate(to(forced(rows, extra=extra, pad=99), "cuda")).logprobs.sum().backward()
        grads.append(large.head.weight.grad.float().clone())
    torch.testing.assert_close(*grads, rtol=0.02, atol=1e-3)
    stats = token_logprobs(torch.zeros(0, 64, device="cuda"), large.head, torch.zeros(0, dtype=torch.long).cuda())
    assert stats.logprobs.shape == (0,)


def test_logits_of_sampled_states_need_no_float32_copy_of_the_unembedding():
    """One token of each row at a time: the copy would be read and written for every one of them."""
    head = Head(torch.randn(50_000, 1024, device="cuda", dtype=torch.bfloat16))
    hidden = torch.randn(4, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        head_logits(hidden, head)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logits = head_logits(hidden, head)
    assert logits.dtype == torch.float32
    assert torch.cuda.max_memory_allocated() - before < head.weight.numel()
    assert torch.allclose(logits, hidden.float() @ head.weight.float().T, rtol=1e-3, atol=1e-2)
