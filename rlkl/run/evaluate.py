"""Held-out evaluation: sampled and greedy accuracy, unbiased pass@k, and the task's own grades.

The prompts and the uniforms are the same every time, so two evaluations differ by the policy alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from rlkl.rewards import compute_scores
from rlkl.rollout.sampling import decode, draw_uniforms, generate
from rlkl.run.build import Heldout, Models
from rlkl.run.schema import Config
from rlkl.run.seeds import generator
from rlkl.run.terminal import progress
from rlkl.types import SamplingParams


def evaluate(cfg: Config, models: Models, heldout: Heldout, *, samples: int) -> dict[str, float]:
    """{"accuracy": sampled, "greedy": …, "pass@k": …} in [0, 1]; only the first with one sample.

    samples: responses per prompt, the k of pass@k. A task with grades has the mean of each beside
    them: NAME over the sampled responses, greedy/NAME over the greedy ones.
    """
    params = models.params._replace(
        temperature=cfg.eval.temperature, stop=stop_function(models.tokenizer, cfg.eval.stop)
    )
    count = len(heldout.examples)
    correct, grades = [0] * count, []
    for i, is_correct, graded in graded_responses(cfg, models, heldout, params, samples):
        correct[i] += is_correct
        grades.append(graded)
    metrics = {"accuracy": sum(correct) / (samples * count)} | mean_grades(grades)
    if samples > 1:
        params = params._replace(temperature=0.0)
        greedy = list(graded_responses(cfg, models, heldout, params, samples=1))
        greedy_grades = mean_grades([graded for _, _, graded in greedy])
        metrics["greedy"] = sum(is_correct for _, is_correct, _ in greedy) / count
        metrics |= {f"greedy/{name}": x for name, x in greedy_grades.items()}
        metrics[f"pass@{samples}"] = sum(pass_at_k(samples, c, samples) for c in correct) / count
    return metrics


def graded_responses(
    cfg: Config, models: Models, heldout: Heldout, params: SamplingParams, samples: int
) -> Iterator[tuple[int, bool, dict[str, float]]]:
    """(index of the example, is it correct, its grades) of each response to each held-out example.

    No more rows at once than a rollout has, so that they fit where it does; but all samples of a
    prompt are together. A bar shows how many prompts are done.
    """
    chunk = max(cfg.sampling.rows // samples, 1)
    rng = generator(0, 0, "held out")
    kind = "sampled" if params.temperature else "greedy"
    with progress(f"held out, {kind}", len(heldout.examples)) as show_done:
        for start in range(0, len(heldout.examples), chunk):
            examples = heldout.examples[start : start + chunk]
            rows = len(examples) * samples
            device = models.policy.lm.device
            uniforms = draw_uniforms(rows, cfg.sampling.max_new_tokens, rng, device)
            batch = generate(models, examples, uniforms, params)
            row_examples = [example for example in examples for _ in range(samples)]
            responses = decode(models.tokenizer, batch)
            scores, _ = compute_scores(heldout.reward, row_examples, responses, batch)
            for row, (score, response) in enumerate(zip(scores.tolist(), responses, strict=True)):
                grades = heldout.grade(row_examples[row], response)
                yield start + row // samples, score >= 1, grades
            show_done(start + len(examples))


def mean_grades(grades: list[dict[str, float]]) -> dict[str, float]:
    if not grades:
        return {}
    return {name: sum(g[name] for g in grades) / len(grades) for name in grades[0]}


def stop_function(tokenizer: Any, stops: list[str]) -> Callable[[list[int]], bool] | None:
    """A function: does the text of these ids contain a stop string? None without stop strings."""
    if not stops:
        return None

    def contains_stop(ids: list[int]) -> bool:
        text = tokenizer.decode(ids)
        return any(stop in text for stop in stops)

    return contains_stop


def pass_at_k(n: int, correct: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): one of k draws is correct (arXiv:2107.03374, eq. 1)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)
