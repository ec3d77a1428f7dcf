"""Tiny random causal LMs of many architectures, and ragged batches for them. A helper, not a test.

Freshly initialised models are nearly uniform and nearly blind to their context, and their biases are 0: a forgotten
scale, bias, position or attention mask would not show. Here every weight is drawn large enough to matter.
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

from rlkl.model import CriticKind, Policy, left_pad
from rlkl.types import Batch, Sampling

ROWS = 97  # of the embedding
VOCAB = 90  # of the tokenizer: the ids from here on are padding rows, which no score and no sample may see
EOS = (3, 11, 23, 37, 50, 51, 64, 78)  # a *set*, as large models declare it; large, so that short replies do end

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
GPT2 = {"vocab_size": ROWS, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128}
CONFIGS = {
    "llama": (LlamaConfig, COMMON),
    "tied": (LlamaConfig, COMMON | {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, COMMON),  # biases in the attention
    "qwen3": (Qwen3Config, COMMON | {"head_dim": 16}),
    "gemma": (GemmaConfig, COMMON | {"head_dim": 12}),  # tied, embedding scaled by sqrt(D)
    "gemma2": (  # soft-capped logits, sliding window
        Gemma2Config,
        COMMON | {"head_dim": 12, "sliding_window": 6, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 12},
    ),
    "granite": (GraniteConfig, COMMON | {"logits_scaling": 1.6}),
    "gpt2": (GPT2Config, GPT2 | {"bos_token_id": 1, "eos_token_id": EOS[0]}),  # learned positions, dropout
    "cohere": (CohereConfig, COMMON | {"logit_scale": 1.7}),
    "phi": (PhiConfig, COMMON | {"num_key_value_heads": 4}),  # bias in the unembedding
    "mistral": (MistralConfig, COMMON | {"sliding_window": 6}),
    "gemma3": (  # layers that slide and layers that do not, rotary embeddings of their own
        Gemma3TextConfig,
        COMMON | {"head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 12,
                  "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": (Phi3Config, COMMON),
    "olmo2": (Olmo2Config, COMMON),
    "smollm3": (SmolLM3Config, COMMON | {"no_rope_layers": [1, 0]}),  # a layer without positions
    "gpt_neox": (GPTNeoXConfig, COMMON),  # parallel residual, biases
}
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [4]]


def causal_lm(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 0.2) -> PreTrainedModel:
    """The same weights for the same (name, seed), also across dtypes; `spread` 0.2 gives logits of about ±1.5."""
    kind, options = CONFIGS[name]
    with torch.random.fork_rng(devices=[]):
        lm = AutoModelForCausalLM.from_config(kind(**options))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lm.parameters():
            p.copy_(spread * torch.randn(p.shape, generator=g) + (0 if p.dim() > 1 else p))  # norms stay around 1
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
    """A policy in eval mode; its critic, if any, has a random head instead of the zero one it starts with."""
    policy = Policy(causal_lm(name, dtype, seed, spread), critic, vocab_size)
    if policy.critic is not None:
        g = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for p in policy.critic.head.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return policy.eval()


def prompts(groups: int = 1, extra: int = 0) -> tuple[Tensor, Tensor]:
    """Three ragged prompts, left-padded, each `groups` times in a row, with `extra` more columns of padding."""
    ids, mask = left_pad([p for p in PROMPTS for _ in range(groups)], 0)
    pad = ids.new_zeros(len(ids), extra)
    return torch.cat([pad, ids], 1), torch.cat([pad.bool(), mask], 1)


def uniforms(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rule(temperature: float = 1.0, **changes) -> Sampling:
    return Sampling(temperature, **({"eos_ids": EOS, "pad_id": 0, "vocab_size": VOCAB} | changes))


def forced(rows: list[tuple[list[int], list[int]]], temperature: float = 1.0, pad: int = 0, extra=(0, 0)) -> Batch:
    """(prompt, reply) token lists → a batch as a sampler would give it, padded with `pad` and `extra` columns more."""
    left, right = (max(len(row[i]) for row in rows) + extra[i] for i in (0, 1))
    prompt = torch.tensor([[pad] * (left - len(p)) + p for p, _ in rows])
    prompt_mask = torch.tensor([[False] * (left - len(p)) + [True] * len(p) for p, _ in rows])
    reply = torch.tensor([r + [pad] * (right - len(r)) for _, r in rows])
    mask = torch.tensor([[True] * len(r) + [False] * (right - len(r)) for _, r in rows])
    zeros = torch.zeros(mask.shape)
    return Batch(prompt, prompt_mask, reply, mask, zeros, torch.zeros(len(rows), dtype=torch.bool), temperature)


def ragged(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Four (prompt, reply) pairs of random ids, from length 1 to past every sliding window in CONFIGS."""
    g = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randint(VOCAB, (n,), generator=g).tolist() for n in lengths)
        for lengths in ((3, 5), (7, 1), (1, 12), (2, 4))
    ]
