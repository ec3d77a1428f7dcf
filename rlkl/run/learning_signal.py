"""Is there anything to learn from? The scores before the first step, and a run without a signal.

A policy learns from differences between scores. Where all are equal, the advantages are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlkl.rewards import compute_scores
from rlkl.rollout.sampling import decode, draw_uniforms, generate
from rlkl.run.build import Data, Models
from rlkl.run.schema import Config
from rlkl.run.seeds import generator, sample_examples
from rlkl.types import nonzero_variance

PROMPTS, SAMPLES = 16, 8  # of what is scored before the first step; never more than a rollout
PATIENCE = 5  # steps without a signal after which the run says so
ROUNDING = 1e-6  # relative: the mean of equal float32 scores is not exactly their value


def describe_scores(cfg: Config, models: Models, data: Data) -> str:
    """One line about the scores of the model before training, on a few training prompts.

    So a reward that fails is found before the held-out evaluation. The prompts are not held-out
    ones, as those may lack a column that the reward reads. Raises UserError as `compute_scores`
    does.
    """
    samples = min(SAMPLES, cfg.sampling.rows)
    prompts = min(PROMPTS, cfg.sampling.rows // samples, len(data.train))
    examples = sample_examples(data.train, prompts, cfg.seed, step=0)
    rng = generator(cfg.seed, 0, "first scores")
    rows, room = len(examples) * samples, cfg.sampling.max_new_tokens
    uniforms = draw_uniforms(rows, room, rng, models.policy.lm.device)
    batch = generate(models, examples, uniforms, models.params)
    row_examples = [example for example in examples for _ in range(samples)]
    responses = decode(models.tokenizer, batch)
    scores, _ = compute_scores(data.reward, row_examples, responses, batch)
    line = f"scores before training, {len(examples)} prompts: {summary(scores)}"
    differing = int(nonzero_variance(scores, samples).sum()) // samples
    line += f"; {differing} of {len(examples)} prompts have responses with different scores"
    if differing:
        return line
    first = shown(row_examples[0].prompt, responses[0])
    return f"{line}, so there is nothing to learn from yet: {first}"


def summary(scores: Tensor) -> str:
    """Range, mean and standard deviation of scores; NaN is none."""
    given = scores[~scores.isnan()]
    if not len(given):
        return "none, the reward applies to no response"
    if given.min() == given.max():
        return f"all {given[0]:.3g}"
    std = given.std(correction=0)
    return f"{given.min():.3g} to {given.max():.3g}, mean {given.mean():.3g}, std {std:.3g}"


def shown(prompt: Any, response: str) -> str:
    """A prompt and a response to look at, cut to a readable length."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return f"{text[-100:]!r} → {response[:100]!r}"


def has_signal(row: dict[str, Any]) -> bool:
    """Did the scores of this step teach anything? A row without scores is no reason for alarm.

    Where advantages are not 0 though all scores are equal, a KL or a critic made them; or groups
    that were sampled later did, which the scores of the row leave out.
    """
    if row.get("advantage_std") == 0 and row.get("advantage_mean") == 0:
        return False
    equal = row.get("reward_std", 1.0) <= ROUNDING * (1 + abs(row.get("reward", 0.0)))
    return not equal or bool(row.get("resampled_prompts"))


def warning(rows: Sequence[dict[str, Any]], sample_of_step: dict[str, Any]) -> str | None:
    """What to look at after PATIENCE steps without a signal. None at any other step."""
    last = rows[-PATIENCE:]
    if len(last) < PATIENCE or any(has_signal(row) for row in last):
        return None
    if len(rows) > PATIENCE and not has_signal(rows[-PATIENCE - 1]):
        return None  # it was said before
    rewards = [row["reward"] for row in last]
    low, high = f"{min(rewards):.3g}", f"{max(rewards):.3g}"
    found = (
        f"no signal in the last {PATIENCE} steps: responses that are compared have equal scores, "
        "so these teach nothing. "
    )
    found += f"The mean score was {low}" + (f" to {high}" if low != high else " in each step")
    if len(rows) > PATIENCE and rewards[-1] >= max(row["reward"] for row in rows):
        return f"{found}, as high as ever. If everything is solved, take harder prompts, or stop"
    score = sample_of_step["score"]
    response = shown(sample_of_step["prompt"], sample_of_step["response"])
    return (
        f"{found}; {last[-1]['truncated_fraction']:.0%} of the responses truncated; a sample: "
        f"{response}, score {'none' if score is None else format(score, 'g')}. Does the prompt "
        "look as the model expects it (its chat template)? Can a response be right within "
        "sampling.max_new_tokens? Does the score tell a better response from a worse one?"
    )
