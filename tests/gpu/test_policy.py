"""The policy on CUDA: bf16 as it is trained there, float32 against the CPU, and memory."""

import copy
from dataclasses import replace

import pytest
import torch
from models import (
    ARCHITECTURES,
    causal_lm,
    forced,
    prompts,
    ragged,
    sampling_params,
    tiny_policy,
    uniforms,
)
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from rlkl.logprobs import token_logprobs
from rlkl.logprobs.reference import head_logits
from rlkl.policy.model import check_reproduced
from rlkl.policy.optimizer import Optimizer
from rlkl.policy.policy import Policy, reference_of
from rlkl.rollout import SAMPLERS, cached, naive, pick
from rlkl.rollout.sampling import draw_uniforms
from rlkl.types import Batch, Head, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROWS = ragged()


def to(batch: Batch, device: str) -> Batch:
    return replace(batch, **{name: x.to(device) for name, x in batch.tensors().items()})


def cuda(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x.cuda() for x in tensors)


# ---------------------------------------------------------------- bf16: sampled = scored


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bf16_scoring_pass_gives_the_samplers_logprobs(name, temperature):
    """Kernels of other shapes round bf16 states differently.

    A wrong temperature or shift would be ten times the tolerance.
    """
    policy = tiny_policy(name, torch.bfloat16).cuda()
    ids, mask = cuda(*prompts())
    for sampler in SAMPLERS.values():
        batch = sampler(policy, ids, mask, uniforms(48, 12).cuda(), sampling_params(temperature))
        with torch.no_grad():
            scored = policy(batch).logprobs
        assert batch.sampler_logprobs.dtype == scored.dtype == torch.float32
        assert (scored - batch.sampler_logprobs)[batch.mask].abs().mean() < 0.02
        for response, truncated in zip(batch.responses(), batch.truncated.tolist(), strict=True):
            assert not any(token in sampling_params().eos_ids for token in response[:-1])
            assert truncated == (response[-1] not in sampling_params().eos_ids)


def test_logits_of_bf16_states_are_not_rounded_to_bf16():
    policy = tiny_policy("llama", torch.bfloat16).cuda()
    batch = to(forced(ROWS), "cuda")
    with torch.no_grad():
        hidden = policy.states(batch)[batch.mask]
        logits = policy.logits(hidden)[:, : policy.vocab_size]
    assert hidden.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16().float()).float().mean() > 0.9
    exact = hidden.double() @ policy.head.weight[: policy.vocab_size].double().T
    assert (logits - exact).abs().max() <= 2e-5


def test_bf16_kl_to_a_fresh_reference_is_exactly_zero():
    policy, batch = tiny_policy("llama", torch.bfloat16).cuda(), to(forced(ROWS, 0.7), "cuda")
    new = policy(batch, reference_of(policy))
    assert not new.kl_pi_ref.any()
    assert not new.kl_ref_pi.any()


# ---------------------------------------------------------------- float32: cuda = cpu


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float32_on_cuda_is_float32_on_the_cpu(name):
    policy, reference = tiny_policy(name, critic="head"), tiny_policy(name, seed=1)
    batch = forced(ROWS, 0.7, extra=(2, 3), pad=-100)
    with torch.no_grad():
        on_cpu = policy(batch, reference)
        on_cuda = copy.deepcopy(policy).cuda()(to(batch, "cuda"), reference.cuda())
    for name, x, y in zip(on_cpu._fields, on_cuda, on_cpu, strict=True):
        assert x.device.type == "cuda"
        assert (x.cpu() - y).abs().max() <= 1e-4, name


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral"])
def test_cached_is_naive_in_float32_at_a_pinned_draw(name):
    policy, (ids, mask) = tiny_policy(name).cuda(), cuda(*prompts())
    u = uniforms(12, 12).cuda()
    a, b = (
        naive(policy, ids, mask, u, sampling_params()),
        cached(policy, ids, mask, u, sampling_params()),
    )
    assert a.responses() == b.responses()
    assert (a.sampler_logprobs - b.sampler_logprobs).abs().max() <= 1e-4


def test_check_reproduced_runs_where_the_model_is():
    check_reproduced(tiny_policy("llama").cuda())


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24, 1.0])
def test_pick_stays_in_the_support_and_agrees_with_the_cpu(u):
    logits = 3 * torch.randn(7, 50_257, generator=torch.Generator().manual_seed(0))
    logits[:, :100] = -torch.inf
    edge = torch.full((7,), u, dtype=torch.float64)
    ids, logprobs = pick(*cuda(logits, edge), SamplingParams(vocab_size=50_000))
    assert logprobs.isfinite().all()
    assert ids.tolist() == pick(logits, edge, SamplingParams(vocab_size=50_000))[0].tolist()
    assert all(100 <= i < 50_000 for i in ids.tolist())


def test_every_device_samples_from_the_same_uniforms():
    on_cpu = draw_uniforms(5, 7, torch.Generator().manual_seed(3), "cpu")
    on_cuda = draw_uniforms(5, 7, torch.Generator().manual_seed(3), "cuda")
    assert on_cuda.device.type == "cuda"
    assert torch.equal(on_cpu, on_cuda.cpu())


# ---------------------------------------------------------------- training


def test_bf16_weights_follow_their_float32_masters_in_place():
    """300 steps of 1e-5 add up; in bf16 each of them would be rounded away."""
    p = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16, device="cuda"))
    wide = nn.Parameter(torch.ones(1000, device="cuda"))
    address = p.data_ptr()
    optimizer, twin = (
        Optimizer(
            {"policy": [x]},
            {"policy": 1e-5},
            betas=(0.9, 0.95),
            weight_decay=0.0,
            max_grad_norm=1.0,
        )
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
    assert p.data_ptr() == address
    assert (p < 1).all()


def test_a_bf16_policy_gradient_step_raises_the_logprobs_it_should():
    """20 steps on forced responses make them more likely: all parts read the same tensors."""
    policy = Policy(causal_lm("llama", torch.bfloat16).cuda(), "head", 90)
    groups, batch = policy.parameter_groups(), to(forced(ROWS), "cuda")
    optimizer = Optimizer(
        groups, dict.fromkeys(groups, 1e-3), betas=(0.9, 0.95), weight_decay=0.0, max_grad_norm=1.0
    )
    scores = []
    for _ in range(20):
        new = policy(batch)
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
    """The vocabulary of a real model on a tiny backbone: most memory of `forward` is logits."""
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


def one_long_response(rows: int, width: int, length: int) -> Batch:
    """One response of `width` tokens, the others of `length`: mostly padding."""
    g = torch.Generator().manual_seed(0)
    sizes = [width] + [length] * (rows - 1)
    texts = [torch.randint(60_000, (8 + n,), generator=g).tolist() for n in sizes]
    return to(forced([(ids[:8], ids[8:]) for ids in texts]), "cuda")


def test_memory_of_forward_grows_with_the_tokens_and_not_with_the_padding(large):
    """Of 64 × 512 columns 2 % are tokens: their logits take 0.2 GB, those of all columns 8.6 GB."""
    batch = one_long_response(64, 512, 4)
    tokens = int(batch.mask.sum())
    logits = tokens * 65_536 * 4
    with torch.no_grad():
        large(one_long_response(2, 8, 4))  # cuBLAS takes its workspace now
        used = peak(lambda: large(batch))
    assert tokens < 0.03 * batch.mask.numel()
    assert used < 12 * logits < 0.5 * batch.mask.numel() * 65_536 * 4


def test_forward_without_gradients_keeps_nothing(large):
    batch = one_long_response(8, 128, 16)
    with torch.no_grad():
        new = large(batch)
    del new
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        new = large(batch)
    assert torch.cuda.memory_allocated() - before < 64 * new.logprobs.nbytes + 2**20


def test_padding_reaches_no_row_of_token_logprobs(large):
    """The head's gradient is summed over tokens in float32: padding the batch changes nothing."""
    rows = [([5, 6, 7], [8, 9]), ([10], [11, 12, 13])]
    grads = []
    for extra in ((0, 0), (5, 40)):
        large.zero_grad()
        large(to(forced(rows, extra=extra, pad=99), "cuda")).logprobs.sum().backward()
        grads.append(large.head.weight.grad.float().clone())
    torch.testing.assert_close(*grads, rtol=0.02, atol=1e-3)
    no_states = torch.zeros(0, 64, device="cuda")
    no_ids = torch.zeros(0, dtype=torch.long, device="cuda")
    stats = token_logprobs(no_states, large.head, no_ids)
    assert stats.logprobs.shape == (0,)


def test_logits_of_sampled_states_need_no_float32_copy_of_the_unembedding():
    """Sampling computes one token of each row at a time and would make the copy for each."""
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
