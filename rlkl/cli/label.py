"""Preferences: replies are sampled, or given; a judge, a reward model or the task's rule says which one is better."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rlkl.build import dtype_of, model_name, pick_device
from rlkl.cli.common import configure
from rlkl.config import resolve
from rlkl.errors import UserError
from rlkl.model import Policy, decode, encode, left_pad, load, sampling_rule
from rlkl.preferences import Pair
from rlkl.rewards import REWARDS, Reward, from_task, judge
from rlkl.rollout import SAMPLERS
from rlkl.rollout.sample import draw_uniforms
from rlkl.rows import json_rows
from rlkl.schema_supervised import Draws, Label
from rlkl.seeds import draw, generator
from rlkl.supervised import collate, item_of
from rlkl.tasks import TASKS
from rlkl.terminal import console, say
from rlkl.types import Batch, Example

ROWS = 512  # replies sampled, or judged, at once
Judged = tuple[list[Example], Batch]  # B rows: the example of each, and its reply


def main(argv: list[str]) -> None:
    """label pairs of replies as chosen and rejected: the file that reward-model and dpo learn from"""
    cfg = configure(argv, Label, "label", __doc__ or "")
    if cfg is None:
        return
    out, device = Path(cfg.out), pick_device(cfg.device)
    if out.exists():
        raise UserError(f"out={cfg.out}: the file exists, and is never overwritten: choose another, or delete it")
    task = resolve(cfg.task, TASKS, "task")("train")
    reward = resolve(cfg.reward, REWARDS, "reward") if cfg.reward else from_task(task.score)
    policy, tokenizer = load(model_name(cfg.model.name, console, task), device=device, dtype=dtype_of(cfg, device))
    if cfg.replies is not None:
        rows = given(cfg.replies, tokenizer, policy)
    else:
        examples = draw([task[i] for i in range(len(task))], min(cfg.sampling.prompts, len(task)), cfg.seed, step=0)
        rows = sampled(policy, tokenizer, examples, cfg.sampling, cfg.seed)
    pairs, ties = labelled(rows, reward, tokenizer, cfg.noise, cfg.seed)
    if not pairs:
        raise UserError(f"no pair: of each of the {ties} prompts every reply scored the same")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json.dumps(p.row, ensure_ascii=False) + "\n" for p in pairs), encoding="utf-8")
    except OSError as error:
        raise UserError(f"out={cfg.out}: cannot be written: {error.strerror}") from error
    first = pairs[0]
    say(f"{out}: {len(pairs)} pairs; {ties} prompts left out, whose replies all scored the same")
    say(f"  {str(first.prompt)[:60]!r}: {first.chosen[:80]!r} rather than {first.rejected[:80]!r}")


def sampled(policy: Policy, tokenizer: Any, examples: Sequence[Example], how: Draws, seed: int
            ) -> Iterator[Judged]:
    """`how.samples` replies of the policy to each example, rows "(n g)"."""
    rule, rng = sampling_rule(policy, tokenizer, how.temperature), generator(seed, 0, "samples")
    sampler, chunk = resolve(how.backend, SAMPLERS, "sampling.backend"), max(ROWS // how.samples, 1)
    for start in range(0, len(examples), chunk):
        some = examples[start : start + chunk]
        ids, mask = left_pad([encode(tokenizer, e.prompt) for e in some], rule.pad_id, policy.lm.device)
        uniforms = draw_uniforms(len(some) * how.samples, how.max_new_tokens, rng, ids.device)
        yield [e for e in some for _ in range(how.samples)], sampler(policy, ids, mask, uniforms, rule)


def given(path: str, tokenizer: Any, policy: Policy) -> Iterator[Judged]:
    """The rows {"prompt": …, "replies": [… , …], "answer": …} of a file, one prompt at a time; other keys are info."""
    for where, row in json_rows(path, "replies"):
        prompt, replies = row.pop("prompt", None), row.pop("replies", None)
        if not isinstance(prompt, str | list) or not prompt or not isinstance(replies, list) or len(replies) < 2 \
                or not all(isinstance(r, str) for r in replies):
            raise UserError(f"{where}: a row needs a prompt, and replies: a list of two texts or more")
        batch = collate([item_of(tokenizer, prompt, replies)], 0, policy.lm.device)
        yield [Example(prompt, str(row.pop("answer", "")), row)] * len(replies), batch


def labelled(rows: Iterable[Judged], reward: Reward, tokenizer: Any, noise: float, seed: int
             ) -> tuple[list[Pair], int]:
    """The best and the worst reply of each prompt, and how many prompts had none: Bradley-Terry, with noise > 0."""
    rng, pairs, ties = generator(seed, 0, "labels"), [], 0
    for examples, batch in rows:
        replies = decode(tokenizer, batch)
        scores = judge(reward, examples, replies, batch)[0].cpu()
        firsts = [i for i, e in enumerate(examples) if i == 0 or e is not examples[i - 1]]
        for start, end in zip(firsts, [*firsts[1:], len(examples)], strict=True):
            mine = scores[start:end]
            best, worst = start + int(mine.argmax()), start + int(mine.argmin())
            if not scores[best] > scores[worst]:
                ties += 1
                continue
            wins = torch.sigmoid((scores[best] - scores[worst]) / noise) if noise else 1.0
            if torch.rand((), generator=rng) >= wins:
                best, worst = worst, best
            cut = bool(batch.truncated[best]), bool(batch.truncated[worst])
            pairs.append(Pair(examples[start].prompt, replies[best], replies[worst], cut))
    return pairs, ties
