"""Rollouts without a cache: the whole sequence is read again for every token.

Slow and obviously right. It is the specification that the other backends are tested against.
"""

from __future__ import annotations

from einops import repeat
from torch import Tensor

from rlkl.policy.policy import Policy
from rlkl.policy.states import positions
from rlkl.rollout.sampling import sample_responses, sampling_mode
from rlkl.types import Batch, SamplingParams


def naive(
    policy: Policy,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    uniforms: Tensor,
    params: SamplingParams,
) -> Batch:
    """Sample G = B // N responses to each of the (N, P) prompts, with (B, T) uniforms."""
    group_size = len(uniforms) // len(prompt_ids)
    prompt_ids = repeat(prompt_ids, "n p -> (n g) p", g=group_size)
    prompt_mask = repeat(prompt_mask, "n p -> (n g) p", g=group_size)

    def next_logits(ids: Tensor, attended: Tensor) -> Tensor:
        output = policy.backbone(
            input_ids=ids,
            attention_mask=attended,
            position_ids=positions(attended),
            use_cache=False,
        )
        return policy.logits(output.last_hidden_state[:, -1])

    with sampling_mode(policy):
        return sample_responses(next_logits, prompt_ids, prompt_mask, uniforms, params)
