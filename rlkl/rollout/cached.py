"""Rollouts with a key-value cache: each prompt is read once for its G samples, then one token is fed at a time."""

from __future__ import annotations

from einops import repeat
from torch import Tensor

from rlkl.errors import UserError
from rlkl.model import Policy, positions
from rlkl.rollout.naive import decode
from rlkl.rollout.sample import sampling_mode
from rlkl.types import Batch, Sampling


def cached(policy: Policy, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, rule: Sampling) -> Batch:
    """(N, P) prompts, left-padded, and (B, T) uniforms, G = B // N → B sampled replies: the same tokens as `naive`."""
    group = len(uniforms) // len(prompt_ids)
    with sampling_mode(policy):
        prefill = policy.backbone(
            input_ids=prompt_ids, attention_mask=prompt_mask, position_ids=positions(prompt_mask), use_cache=True)
        cache = getattr(prefill, "past_key_values", None)
        if not hasattr(cache, "batch_repeat_interleave"):
            kind = policy.lm.config.model_type
            raise UserError(f"{kind} models keep no key-value cache that can be shared: set sampling.backend=naive")
        cache.batch_repeat_interleave(group)
        first = repeat(policy.logits(prefill.last_hidden_state[:, -1]), "n v -> (n g) v", g=group)
        prompt_ids, prompt_mask = (repeat(x, "n p -> (n g) p", g=group) for x in (prompt_ids, prompt_mask))

        def logits(ids: Tensor, attended: Tensor) -> Tensor:
            if ids.shape[1] == prompt_ids.shape[1]:
                return first
            out = policy.backbone(input_ids=ids[:, -1:], attention_mask=attended,
                position_ids=positions(attended)[:, -1:], past_key_values=cache, use_cache=True)
            return policy.logits(out.last_hidden_state[:, -1])

        return decode(logits, prompt_ids, prompt_mask, uniforms, rule)
