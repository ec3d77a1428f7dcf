"""Label preferences: a judge, a reward model or the task's score picks the better response."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from rlkl.cli.common import configure
from rlkl.errors import UserError
from rlkl.plugins import resolve
from rlkl.policy.model import load, sampling_params
from rlkl.policy.policy import Policy
from rlkl.rewards import Reward, compute_scores
from rlkl.rewards.scoring import assemble
from rlkl.rollout.sampling import decode, draw_uniforms, generate
from rlkl.run.build import (
    Models,
    build_sampler,
    build_scoring,
    dtype_of,
    filter_by_length,
    model_name,
    pick_device,
    require_answers,
    sections_of,
    task_functions,
)
from rlkl.run.schema import Chat
from rlkl.run.seeds import generator, sample_examples
from rlkl.run.terminal import log_line
from rlkl.supervised.data import collate, tokenize
from rlkl.supervised.preferences import Pair
from rlkl.supervised.schema import LabelConfig, LabelSampling
from rlkl.tasks import TASKS
from rlkl.tasks.read_jsonl import is_prompt, json_rows
from rlkl.types import Batch, Example

ROWS = 512  # responses sampled at once
# B rows: the example of each, the text of its response, and both as tokens
Responses = tuple[list[Example], list[str], Batch]


def main(argv: list[str]) -> None:
    cfg = configure(argv, LabelConfig, "label", __doc__ or "")
    if cfg is None:
        return
    out = Path(cfg.out)
    if out.exists():
        raise UserError(
            f"out={cfg.out}: the file exists and is never overwritten: choose another, or delete it"
        )
    device = pick_device(cfg.device)
    task = resolve(cfg.task, TASKS, "task")("train")
    require_answers(task, sections_of(cfg.reward))
    with build_scoring(cfg, steps=1) as scoring:
        reward, _ = task_functions(cfg, task, scoring)
        if cfg.reward:
            reward = assemble([cfg.reward], reward, scoring)
        name = model_name(cfg.model.name, task)
        policy, tokenizer = load(name, device=device, dtype=dtype_of(cfg, device))
        if cfg.responses is not None:
            responses = read_responses(cfg.responses, tokenizer, policy, cfg.chat)
        else:
            prompts = min(cfg.sampling.prompts, len(task))
            chosen = sample_examples(range(len(task)), prompts, cfg.seed, step=0)
            examples = [task[i] for i in chosen]
            examples = filter_by_length(cfg, policy, tokenizer, examples, "train")
            responses = generate_responses(
                policy, tokenizer, examples, cfg.sampling, cfg.seed, cfg.chat
            )
        pairs, ties = label_pairs(responses, reward, cfg.noise, cfg.seed)
    if not pairs:
        raise UserError(f"no pairs: for each of the {ties} prompts all responses scored the same")
    write_pairs(out, pairs)
    first = pairs[0]
    log_line(f"{out}: {len(pairs)} pairs; {ties} prompts left out: all responses scored the same")
    prompt = str(first.prompt)[:60]
    log_line(f"  {prompt!r}: chosen {first.chosen[:80]!r}, rejected {first.rejected[:80]!r}")


def generate_responses(
    policy: Policy,
    tokenizer: Any,
    examples: Sequence[Example],
    sampling: LabelSampling,
    seed: int,
    chat: Chat | None = None,
) -> Iterator[Responses]:
    """`sampling.samples` responses to each example, rows "(n g)", about ROWS of them at once."""
    params = sampling_params(policy, tokenizer, sampling.temperature)
    models = Models(policy, tokenizer, build_sampler(sampling.backend), params, chat=chat)
    rng = generator(seed, 0, "samples")
    prompts_at_once = max(ROWS // sampling.samples, 1)
    for start in range(0, len(examples), prompts_at_once):
        chunk = examples[start : start + prompts_at_once]
        rows = len(chunk) * sampling.samples
        uniforms = draw_uniforms(rows, sampling.max_new_tokens, rng, policy.lm.device)
        batch = generate(models, chunk, uniforms, params)
        yield [e for e in chunk for _ in range(sampling.samples)], decode(tokenizer, batch), batch


def read_responses(path: str, tokenizer: Any, policy: Policy, chat: Chat) -> Iterator[Responses]:
    """The rows {"prompt": …, "responses": [… , …], "answer": …} of a file, one prompt at a time.

    Other keys go into the example's info. Raises UserError on a bad row.
    """
    for where, row in json_rows(path, "responses"):
        prompt = row.pop("prompt", None)
        responses = row.pop("responses", None)
        if not is_prompt(prompt) or not are_responses(responses):
            raise UserError(
                f"{where}: a row needs a prompt, and responses: a list of two texts or more"
            )
        batch = collate([tokenize(tokenizer, prompt, responses, chat=chat)], 0, policy.lm.device)
        example = Example(prompt, str(row.pop("answer", "")), row)
        yield [example] * len(responses), responses, batch


def are_responses(value: object) -> bool:
    """Is this a list of two texts or more?"""
    return isinstance(value, list) and len(value) > 1 and all(isinstance(x, str) for x in value)


def label_pairs(
    batches: Iterable[Responses], reward: Reward, noise: float, seed: int
) -> tuple[list[Pair], int]:
    """The best and the worst response to each prompt, and the number of prompts without any.

    A prompt has no pair where all its responses score the same. A response without a score is left
    out. noise: see `best_wins`.
    """
    rng = generator(seed, 0, "labels")
    pairs: list[Pair] = []
    ties = 0
    for examples, responses, batch in batches:
        scores = compute_scores(reward, examples, responses, batch)[0].cpu()
        for _, group in groupby(range(len(examples)), key=lambda row: id(examples[row])):
            rows = [row for row in group if not scores[row].isnan()]
            best = max(rows, key=lambda row: scores[row], default=None)
            worst = min(rows, key=lambda row: scores[row], default=None)
            if best is None or worst is None or not scores[best] > scores[worst]:
                ties += 1
                continue
            if best_wins(scores[best] - scores[worst], noise, rng):
                chosen, rejected = best, worst
            else:
                chosen, rejected = worst, best
            truncated = bool(batch.truncated[chosen]), bool(batch.truncated[rejected])
            prompt = examples[chosen].prompt
            pairs.append(Pair(prompt, responses[chosen], responses[rejected], truncated))
    return pairs, ties


def best_wins(difference: Tensor, noise: float, rng: Generator) -> bool:
    """Is the response with the higher score chosen? Always, or by Bradley-Terry where noise > 0.

    difference: of the two scores, () > 0. Its probability is then sigmoid(difference / noise).
    """
    if noise == 0:
        return True
    return bool(torch.rand((), generator=rng) < torch.sigmoid(difference / noise))


def write_pairs(out: Path, pairs: Sequence[Pair]) -> None:
    """Write one JSON object a line. Raises UserError where the file cannot be written."""
    lines = [json.dumps(pair.row, ensure_ascii=False) + "\n" for pair in pairs]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"out={out}: cannot be written: {error.strerror}") from error
