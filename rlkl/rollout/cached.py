"""Rollouts with a key-value cache: prompts are read once, then one token of each row at a time.

The batch goes on until its slowest row has ended.
"""

from __future__ import annotations

from einops import repeat
from torch import Tensor

from rlkl.errors import UserError
from rlkl.policy.policy import Policy
from rlkl.policy.states import positions
from rlkl.rollout.sampling import sample_responses, sampling_mode
from rlkl.types import Batch, SamplingParams


def cached(
    policy: Policy,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    uniforms: Tensor,
    params: SamplingParams,
) -> Batch:
    """Sample G = B // N responses to each of the (N, P) prompts, with (B, T) uniforms.

    The same tokens as `naive`. Raises UserError where the model has no cache that can be repeated.
    """
    group_size = len(uniforms) // len(prompt_ids)
    with sampling_mode(policy):
        prefill = policy.backbone(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            position_ids=positions(prompt_mask),
            use_cache=True,
        )
        cache = getattr(prefill, "past_key_values", None)
        if cache is None or not hasattr(cache, "batch_repeat_interleave"):
            raise UserError(
                f"{policy.lm.config.model_type} models keep no key-value cache that can be shared: "
                "set sampling.backend=naive"
            )
        cache.batch_repeat_interleave(group_size)
        prompt_logits = policy.logits(prefill.last_hidden_state[:, -1])
        first_logits = repeat(prompt_logits, "n v -> (n g) v", g=group_size)
        prompt_ids = repeat(prompt_ids, "n p -> (n g) p", g=group_size)
        prompt_mask = repeat(prompt_mask, "n p -> (n g) p", g=group_size)

        def next_logits(ids: Tensor, attended: Tensor) -> Tensor:
            if ids.shape[1] == prompt_ids.shape[1]:  # no response token yet
                return first_logits
            output = policy.backbone(
                input_ids=ids[:, -1:],
                attention_mask=attended,
                position_ids=positions(attended)[:, -1:],
                past_key_values=cache,
                use_cache=True,
            )
            return policy.logits(output.last_hidden_state[:, -1])

        return sample_responses(next_logits, prompt_ids, prompt_mask, uniforms, params)
