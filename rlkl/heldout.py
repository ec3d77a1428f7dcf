"""Held-out accuracy: sampled, greedy, and unbiased pass@k; and what the task itself grades. The same prompts and the
same uniforms every time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rlkl.build import Parts
from rlkl.model import Policy, decode, encode, left_pad
from rlkl.rollout.sample import draw_uniforms
from rlkl.schema import Config
from rlkl.seeds import generator
from rlkl.types import Batch, Example, Sampling


@dataclass
class Exam:
    """What of `Parts` an evaluation reads, for one without training."""

    policy: Policy
    tokenizer: Any
    rule: Sampling
    sampler: Callable[..., Batch]
    heldout: list[Example]
    solved: Callable[[Example, str], bool]
    grade: Callable[[Example, str], dict[str, float]]


def accuracy(cfg: Config, parts: Parts | Exam, *, samples: int) -> dict[str, float]:
    """{"accuracy": sampled, "greedy": …, "pass@k": …} with k = samples, in [0, 1]; only the first where samples = 1.

    A task with grades has the mean of each beside them: NAME of the sampled replies, greedy/NAME of the greedy ones.
    """
    stop = stops(parts.tokenizer, cfg.eval.stop)
    rule, n = parts.rule._replace(temperature=cfg.eval.temperature, stop=stop), len(parts.heldout)
    correct, grades = [0] * n, []
    for i, right, named in replies(cfg, parts, rule, samples):
        correct[i] += right
        grades.append(named)
    result = {"accuracy": sum(correct) / (samples * n)} | means(grades)
    if samples > 1:
        greedy = list(replies(cfg, parts, rule._replace(temperature=0.0), 1))
        result["greedy"] = sum(right for _, right, _ in greedy) / n
        result |= {f"greedy/{name}": x for name, x in means([named for *_, named in greedy]).items()}
        result[f"pass@{samples}"] = sum(pass_at_k(samples, c, samples) for c in correct) / n
    return result


def means(grades: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(g[name] for g in grades) / len(grades) for name in grades[0]} if grades else {}


def replies(cfg: Config, parts: Parts | Exam, rule: Sampling, samples: int
            ) -> Iterator[tuple[int, bool, dict[str, float]]]:
    """(index of the example, is it right, its grades) for each reply to each held-out example.

    No more rows at once than a rollout has, so that they fit where it does; but the samples of a prompt are together.
    """
    chunk = max(cfg.sampling.rows // samples, 1)
    rng = generator(0, 0, "held out")
    for start in range(0, len(parts.heldout), chunk):
        some = parts.heldout[start : start + chunk]
        ids, mask = left_pad([encode(parts.tokenizer, e.prompt) for e in some], rule.pad_id, parts.policy.lm.device)
        uniforms = draw_uniforms(len(some) * samples, cfg.sampling.max_new_tokens, rng, ids.device)
        batch = parts.sampler(parts.policy, ids, mask, uniforms, rule)
        for row, reply in enumerate(decode(parts.tokenizer, batch)):
            example = some[row // samples]
            yield start + row // samples, parts.solved(example, reply), parts.grade(example, reply)


def stops(tokenizer: Any, texts: list[str]) -> Callable[[list[int]], bool] | None:
    """Does the text of these ids, special tokens included, hold one of `texts`? None where there are none."""
    if not texts:
        return None
    return lambda ids: any(text in said for said in [tokenizer.decode(ids)] for text in texts)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the chance that one of k draws is right (Chen et al. 2021, arXiv:2107.03374, eq. 1)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)
