"""Dynamic sampling (DAPO, arXiv:2503.14476, sec. 3.2): no group without signal, and a curriculum.

A group whose scores are all equal has no advantage. `sampling.zero_variance=resample` replaces such
groups by groups of other prompts; `sampling.curriculum` prefers prompts that are solved sometimes.
Both wrap train.py's `generate_and_score` when a run is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import torch
from einops import rearrange
from torch import Generator, Tensor

from rlkl.run.schema import Config
from rlkl.run.seeds import epoch_order, generator
from rlkl.run.state import State
from rlkl.types import Batch, Rollout, nonzero_variance

RATE = 0.5  # of the running success rate: a prompt is seen rarely, and the policy changes meanwhile
FLOOR = 0.05  # added to p(1 - p), which is at most 0.25: no prompt is given up

GenerateAndScore = Callable[..., Rollout]  # (cfg, models, data, state, prompts, rng)


def with_dynamic_sampling(cfg: Config, generate_and_score: GenerateAndScore) -> GenerateAndScore:
    """`generate_and_score`, wrapped if the configuration resamples or keeps success rates."""
    if cfg.sampling.zero_variance != "resample" and cfg.sampling.curriculum == "none":
        return generate_and_score
    return partial(dynamic_rollout, generate_and_score)


def dynamic_rollout(
    generate_and_score: GenerateAndScore,
    cfg: Config,
    models: Any,
    data: Any,
    state: State,
    prompts: list[int],
    rng: Generator,
) -> Rollout:
    """A rollout of N prompts, and of others that replace groups without signal.

    prompts: indices of training prompts, N and then the spare ones. `state` changes only once
    everything is scored.
    """
    sampling = cfg.sampling
    resample = sampling.zero_variance == "resample"
    keep_all = replace(cfg, sampling=replace(sampling, zero_variance="keep"))

    def roll_out(indices: list[int], rng: Generator) -> Rollout:
        return generate_and_score(keep_all, models, data, state, indices, rng)

    drawn, spare = prompts[: sampling.prompts], prompts[sampling.prompts :]
    rounds = [roll_out(drawn, rng)]
    for number in range(sampling.resample_rounds if resample else 0):
        count = zero_variance_groups(rounds[-1], sampling.group_size)
        more, spare = spare[:count], spare[count:]
        if more:
            # The word seeds the generator: renaming it would change the samples.
            rng = generator(cfg.seed, state.step, f"refill {number}")
            rounds.append(roll_out(more, rng))
            drawn = drawn + more

    metrics = {}
    if resample:
        resampled = len(drawn) - sampling.prompts
        state.resampled += resampled
        metrics["resampled_prompts"] = resampled
        metrics["tokens"] = sum(int(r.responses.mask.sum()) for r in rounds)
    if sampling.curriculum != "none":
        scores = torch.cat([r.responses.scores for r in rounds])
        state.success = success_rates(state.success, drawn, scores)
        metrics |= solved_fractions(state.success)
    batch = join([r.batch for r in rounds], sampling.group_size)
    if sampling.zero_variance != "keep":
        batch = batch.drop_zero_variance(sampling.group_size)
    return rounds[0]._replace(batch=batch, metrics=metrics)


def join(batches: list[Batch], group_size: int) -> Batch:
    """All rows; those of the first batch alone where no group of any batch has signal."""
    if len(batches) == 1:
        return batches[0]
    joined = Batch.cat(batches)
    return joined if nonzero_variance(joined.scores, group_size).any() else batches[0]


def prompt_order(cfg: Config, count: int, state: State) -> Iterator[int]:
    """Indices of the `count` training prompts, from the first one of this step on."""
    if cfg.sampling.curriculum == "success":
        return by_learnability(state.success, count, cfg.seed, state.step)
    start = state.step * cfg.sampling.prompts + state.resampled
    return epoch_order(count, cfg.seed, start)


def zero_variance_groups(rollout: Rollout, group_size: int) -> int:
    """How many groups of a rollout have equal scores. As many prompts are sampled next.

    So only those of the last round are still missing.
    """
    rows = ~nonzero_variance(rollout.responses.scores, group_size)
    return int(rows.sum()) // group_size


def success_rates(
    before: Mapping[str, float], indices: Sequence[int], scores: Tensor
) -> dict[str, float]:
    """Running share of correct responses (score >= 1) of each prompt that was ever drawn.

    scores: of the responses to the prompts of these indices, "(n g)"; NaN is no score. The keys are
    indices as text, as JSON has them.
    """
    after = dict(before)
    groups = rearrange(scores, "(n g) -> n g", n=len(indices))
    for index, group in zip(map(str, indices), groups, strict=True):
        scored = group[~group.isnan()]
        if len(scored):
            share = (scored >= 1).float().mean().item()
            if index in after:
                after[index] += RATE * (share - after[index])
            else:
                after[index] = share
    return after


def solved_fractions(success: Mapping[str, float]) -> dict[str, float]:
    """Of the prompts drawn so far: the shares that were always, and never, solved."""
    shares = [*success.values()]
    count = max(len(shares), 1)
    return {"solved_always": shares.count(1.0) / count, "solved_never": shares.count(0.0) / count}


def learnability(success: Mapping[str, float], count: int) -> Tensor:
    """(count,) p(1 - p) + FLOOR of each prompt; p is 1/2 where it was never drawn.

    p(1 - p) is the variance of a score of 0 or 1 (Foster & Foerster, arXiv:2502.12272).
    """
    shares = torch.full((count,), 0.5, dtype=torch.float64)
    for index, share in success.items():
        shares[int(index)] = share
    return shares * (1 - shares) + FLOOR


def by_learnability(
    success: Mapping[str, float], count: int, seed: int, step: int
) -> Iterator[int]:
    """Indices drawn in proportion to learnability, each once before any comes again."""
    rng = generator(seed, step, "curriculum")
    order = torch.multinomial(learnability(success, count), count, generator=rng)
    return cycle(order.tolist())
