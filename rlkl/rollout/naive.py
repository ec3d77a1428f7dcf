"""Rollouts that are obviously right: the whole prefix anew for every token. The specification of every backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import repeat
from torch import Tensor

from rlkl.model import Policy, positions
from rlkl.rollout.sample import cut, pick, sampling_mode
from rlkl.types import Batch, Sampling


def naive(policy: Policy, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, rule: Sampling) -> Batch:
    """(N, P) prompts, left-padded, and (B, T) uniforms, G = B // N → B sampled replies of at most T tokens."""

    def logits(ids: Tensor, attended: Tensor) -> Tensor:
        hidden = policy.backbone(
            input_ids=ids, attention_mask=attended, position_ids=positions(attended), use_cache=False)
        return policy.logits(hidden.last_hidden_state[:, -1])

    group = len(uniforms) // len(prompt_ids)
    prompt_ids, prompt_mask = (repeat(x, "n p -> (n g) p", g=group) for x in (prompt_ids, prompt_mask))
    with sampling_mode(policy):
        return decode(logits, prompt_ids, prompt_mask, uniforms, rule)


def decode(logits: Callable[[Tensor, Tensor], Tensor], prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor,
        rule: Sampling) -> Batch:
    """Token by token until every row has ended. `logits(ids, attended)` → (B, V) for the next token of (B, columns)."""
    ids, attended = prompt_ids, prompt_mask
    eos = torch.tensor(rule.eos_ids, device=ids.device, dtype=ids.dtype)
    alive = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    columns = []
    for u in uniforms.unbind(1):
        token, logprob = pick(logits(ids, attended), u, rule)
        token = torch.where(alive, token, rule.pad_id)
        columns.append((token, alive, logprob))
        ids, attended = torch.cat([ids, token[:, None]], 1), torch.cat([attended, alive[:, None]], 1)
        alive = alive & ~torch.isin(token, eos)  # the EOS itself was sampled: it is an action, and stays in the mask
        if not alive.any():
            break
    sampled = Batch(prompt_ids, prompt_mask, *(torch.stack(column, 1) for column in zip(*columns, strict=True)),
                    truncated=alive, temperature=rule.temperature or 1.0)
    return sampled if rule.stop is None else cut(sampled, rule)
