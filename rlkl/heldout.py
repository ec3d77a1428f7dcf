"""Held-out accuracy: sampled, greedy, and unbiased pass@k; and what the task itself grades. The same prompts and the
same uniforms every time."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rlkl.build import Parts
from rlkl.model import decode, encode, left_pad
from rlkl.rollout.sample import draw_uniforms
from rlkl.seeds import generator
from rlkl.types import Sampling

ROWS = 1024  # replies sampled at once


def accuracy(parts: Parts, *, samples: int, temperature: float, max_new_tokens: int) -> dict[str, float]:
    """{"accuracy": sampled, "greedy": …, "pass@k": …} with k = samples, in [0, 1]; only the first where samples = 1.

    A task with grades has the mean of each beside them: NAME of the sampled replies, greedy/NAME of the greedy ones.
    """
    rule, n = parts.rule._replace(temperature=temperature), len(parts.heldout)
    correct, grades = [0] * n, []
    for i, right, named in replies(parts, rule, samples, max_new_tokens):
        correct[i] += right
        grades.append(named)
    result = {"accuracy": sum(correct) / (samples * n)} | means(grades)
    if samples > 1:
        greedy = list(replies(parts, rule._replace(temperature=0.0), 1, max_new_tokens))
        result["greedy"] = sum(right for _, right, _ in greedy) / n
        result |= {f"greedy/{name}": x for name, x in means([named for *_, named in greedy]).items()}
        result[f"pass@{samples}"] = sum(pass_at_k(samples, c, samples) for c in correct) / n
    return result


def means(grades: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(g[name] for g in grades) / len(grades) for name in grades[0]} if grades else {}


def replies(parts: Parts, rule: Sampling, samples: int, max_new_tokens: int
            ) -> Iterator[tuple[int, bool, dict[str, float]]]:
    """(index of the example, is it right, its grades) for each reply to each held-out example."""
    rng, chunk = generator(0, 0, "held out"), max(ROWS // samples, 1)
    for start in range(0, len(parts.heldout), chunk):
        some = parts.heldout[start : start + chunk]
        ids, mask = left_pad([encode(parts.tokenizer, e.prompt) for e in some], rule.pad_id, parts.policy.lm.device)
        batch = parts.sampler(
            parts.policy, ids, mask, draw_uniforms(len(some) * samples, max_new_tokens, rng, ids.device), rule)
        for row, reply in enumerate(decode(parts.tokenizer, batch)):
            example = some[row // samples]
            yield start + row // samples, parts.solved(example, reply), parts.grade(example, reply)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the chance that one of k draws is right (Chen et al. 2021, arXiv:2107.03374, eq. 1)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)
