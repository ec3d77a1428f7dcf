"""Tiny random causal LMs of many architectures, and ragged batches for them. A helper, not a test.

A freshly initialised model is nearly uniform and nearly blind to its context, and its biases are 0:
a forgotten scale, bias, position or attention mask would not show. Here every weight is large
enough to matter.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from rlkl.policy.critic import CriticKind
from rlkl.policy.policy import Policy
from rlkl.rollout.sampling import left_pad
from rlkl.types import Batch, SamplingParams

ROWS = 97  # of the embedding
VOCAB = 90  # of the tokenizer: later ids are padding rows, which no score and no sample may see
# Several EOS ids, as large models declare them; so many, so that short responses do end.
EOS = (3, 11, 23, 37, 50, 51, 64, 78)

COMMON = {
    "vocab_size": ROWS,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": EOS[0],
    "pad_token_id": 0,
}
SLIDING = {"head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 12}
GPT2 = {
    "vocab_size": ROWS,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": EOS[0],
}
CONFIGS = {
    "llama": (LlamaConfig, COMMON),
    "tied": (LlamaConfig, COMMON | {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, COMMON),  # biases in the attention
    "qwen3": (Qwen3Config, COMMON | {"head_dim": 16}),
    "gemma": (GemmaConfig, COMMON | {"head_dim": 12}),  # tied, embedding scaled by sqrt(D)
    # soft-capped logits, sliding window
    "gemma2": (Gemma2Config, COMMON | SLIDING | {"final_logit_softcapping": 4.0}),
    "granite": (GraniteConfig, COMMON | {"logits_scaling": 1.6}),
    "gpt2": (GPT2Config, GPT2),  # learned positions, dropout
    "cohere": (CohereConfig, COMMON | {"logit_scale": 1.7}),
    "phi": (PhiConfig, COMMON | {"num_key_value_heads": 4}),  # bias in the unembedding
    "mistral": (MistralConfig, COMMON | {"sliding_window": 6}),
    # one layer with a sliding window and one without, each with its own rotary embedding
    "gemma3": (
        Gemma3TextConfig,
        COMMON | SLIDING | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": (Phi3Config, COMMON),
    "olmo2": (Olmo2Config, COMMON),
    "smollm3": (SmolLM3Config, COMMON | {"no_rope_layers": [1, 0]}),  # a layer without positions
    "gpt_neox": (GPTNeoXConfig, COMMON),  # parallel residual, biases
}
ARCHITECTURES = list(CONFIGS)
# What the engine serves. It leaves gemma2, whose attention scores are soft-capped, to `cached`.
SERVED = [name for name in ARCHITECTURES if name != "gemma2"]
# In float64 transformers' eager attention gives nan for gemma2 with left padding.
FLOAT64 = SERVED
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [4]]


def causal_lm(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 0.2
) -> PreTrainedModel:
    """A model of its own in eval mode; the same weights for the same (name, seed) in every dtype.

    spread: standard deviation of the weights; 0.2 gives logits of about ±1.5.
    """
    kind, options = CONFIGS[name]
    with torch.random.fork_rng(devices=[]):
        lm = AutoModelForCausalLM.from_config(kind(**options))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lm.parameters():
            mean = 0 if p.dim() > 1 else p  # the weights of norms stay around 1
            p.copy_(spread * torch.randn(p.shape, generator=g) + mean)
    return lm.to(dtype).eval()


def tiny_policy(
    name: str,
    dtype: torch.dtype = torch.float32,
    *,
    critic: CriticKind = "none",
    vocab_size: int | None = VOCAB,
    seed: int = 0,
    spread: float = 0.2,
) -> Policy:
    """A policy in eval mode. A critic has a random head instead of the zero one it starts with."""
    policy = Policy(causal_lm(name, dtype, seed, spread), critic, vocab_size)
    if policy.critic is not None:
        g = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for p in policy.critic.head.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return policy.eval()


def prompts(groups: int = 1, extra: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, mask) of three ragged prompts, each repeated `groups` times, left-padded.

    extra: further columns of padding.
    """
    ids, mask = left_pad([p for p in PROMPTS for _ in range(groups)], 0)
    pad = ids.new_zeros(len(ids), extra)
    return torch.cat([pad, ids], 1), torch.cat([pad.bool(), mask], 1)


def uniforms(rows: int, columns: int, seed: int = 1) -> Tensor:
    """(rows, columns) float64 in [0, 1)."""
    g = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=g, dtype=torch.float64)


def sampling_params(temperature: float = 1.0, **changes) -> SamplingParams:
    """The sampling parameters that fit the models here."""
    defaults = {"eos_ids": EOS, "pad_id": 0, "vocab_size": VOCAB}
    return SamplingParams(temperature, **(defaults | changes))


def forced(
    rows: list[tuple[list[int], list[int]]], temperature: float = 1.0, pad: int = 0, extra=(0, 0)
) -> Batch:
    """A batch of given (prompt, response) token lists, as a sampler would return it.

    pad: the id in the padding. extra: further columns of padding, left and right.
    """
    prompt_columns = max(len(prompt) for prompt, _ in rows) + extra[0]
    response_columns = max(len(response) for _, response in rows) + extra[1]
    prompt_ids, prompt_mask, response_ids, mask = [], [], [], []
    for prompt, response in rows:
        before = prompt_columns - len(prompt)
        after = response_columns - len(response)
        prompt_ids.append([pad] * before + prompt)
        prompt_mask.append([False] * before + [True] * len(prompt))
        response_ids.append(response + [pad] * after)
        mask.append([True] * len(response) + [False] * after)
    return Batch(
        torch.tensor(prompt_ids),
        torch.tensor(prompt_mask),
        torch.tensor(response_ids),
        torch.tensor(mask),
        sampler_logprobs=torch.zeros(len(rows), response_columns),
        truncated=torch.zeros(len(rows), dtype=torch.bool),
        temperature=temperature,
    )


def ragged(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Four (prompt, response) pairs of random ids; one is longer than every sliding window here."""
    g = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(VOCAB, (count,), generator=g).tolist()

    lengths = ((3, 5), (7, 1), (1, 12), (2, 4))
    return [(ids(prompt), ids(response)) for prompt, response in lengths]


def grouped(seed: int = 0) -> Batch:
    """Responses of different lengths to a few prompts, in no order.

    Two prompts have the same length. One, and some responses, exceed every sliding window here.
    """
    g = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(VOCAB, (count,), generator=g).tolist()

    rows = [
        (prompt, ids(length))
        for prompt in (ids(3), ids(41), ids(1), ids(3))
        for length in (5, 12, 1, 8, 2)
    ]
    order = torch.randperm(len(rows), generator=g).tolist()
    return forced([rows[i] for i in order], extra=(2, 1))


def assert_same(a: Batch, b: Batch, tolerance: float) -> None:
    """The same tokens, and log-probs that are at most `tolerance` nats apart."""
    for field in ("prompt_ids", "prompt_mask", "response_ids", "mask", "truncated"):
        assert torch.equal(getattr(a, field), getattr(b, field)), field
    assert a.temperature == b.temperature
    assert (a.sampler_logprobs - b.sampler_logprobs).abs().max() <= tolerance
