"""Rollout backends. Every one samples the same tokens from the same uniforms.

    sampler(policy, prompt_ids, prompt_mask, uniforms, params, **options) -> Batch

prompt_ids, prompt_mask: (N, P) left-padded prompts. uniforms: (B, T) numbers in [0, 1), a row for
each response; each prompt gets G = B // N of them, and rows are ordered "(n g)". A response has at
most T tokens. `params` (SamplingParams) says how a uniform becomes a token.
"""

from rlkl.rollout.cached import cached
from rlkl.rollout.engine import engine
from rlkl.rollout.naive import naive
from rlkl.rollout.sampling import pick

SAMPLERS = {"naive": naive, "cached": cached, "engine": engine}

__all__ = ["SAMPLERS", "cached", "engine", "naive", "pick"]
