"""Act: sampler(policy, prompt_ids, prompt_mask, uniforms, rule, **options) -> Batch, the same from every backend."""

from rlkl.rollout.cached import cached
from rlkl.rollout.engine import engine
from rlkl.rollout.naive import naive
from rlkl.rollout.sample import pick

SAMPLERS = {"naive": naive, "cached": cached, "engine": engine}

__all__ = ["SAMPLERS", "cached", "engine", "naive", "pick"]
