"""Supervised fine-tuning: cross-entropy on the answers of a task, of a model that exists or of a fresh one."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import Tensor

from rlkl.build import dtype_of, model_name, pick_device
from rlkl.cli.common import configure, finish, new_run, open_log
from rlkl.config import resolve
from rlkl.model import context_of, load, sampling_rule
from rlkl.schema_supervised import Sft
from rlkl.scratch import make_scratch
from rlkl.supervised import Item, collate, cross_entropy, fit, item_of, reply_tokens, that_fit
from rlkl.tasks import TASKS
from rlkl.terminal import console, say


def main(argv: list[str]) -> None:
    """teach a model the answers of a task, or of a file of prompts and answers"""
    cfg = configure(argv, Sft, "sft", __doc__ or "")
    if cfg is None:
        return
    make_task, device = resolve(cfg.task, TASKS, "task"), pick_device(cfg.device)
    tasks = [make_task(side) for side in ("train", "heldout")]
    with tempfile.TemporaryDirectory() as scratch:
        fresh = make_scratch(Path(scratch), cfg.scratch, cfg.seed) if cfg.scratch.layers else None
        name = fresh or model_name(cfg.model.name, console, tasks[0])
        policy, tokenizer = load(str(name), device=device, dtype=dtype_of(cfg, device))
    pad, limit = sampling_rule(policy, tokenizer, 1.0).pad_id, cfg.max_tokens or context_of(policy.lm)
    train, heldout = (that_fit([item_of(tokenizer, task[i].prompt, [task[i].solution]) for i in range(len(task))],
                               limit, "rows") for task in tasks)
    folder = new_run(cfg, "sft", argv)
    say(f"device: {device}   run: {folder}   {len(train)} rows, {len(heldout)} held out")

    def objective(items: list[Item]) -> tuple[Tensor, dict[str, Tensor]]:
        return cross_entropy(policy.evaluate(collate(items, pad, device)).logprobs)

    before, after = fit(cfg, policy, objective, train, heldout, open_log(cfg, folder), reply_tokens)
    finish(folder, policy.lm, tokenizer, before, after, "held out; loss in nats per token of the answers")
