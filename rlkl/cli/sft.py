"""Supervised fine-tuning: cross-entropy on the solutions of a task."""

from __future__ import annotations

import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlkl.cli.common import configure, finish, log_start, new_run, open_log
from rlkl.errors import UserError
from rlkl.plugins import resolve
from rlkl.policy.model import context_of, load, sampling_params
from rlkl.policy.policy import Policy
from rlkl.run.build import dtype_of, model_name, pick_device
from rlkl.run.schema import Chat
from rlkl.supervised.data import Item, collate, filter_by_length, tokenize
from rlkl.supervised.fit import count_response_tokens, cross_entropy, fit
from rlkl.supervised.schema import SFTConfig
from rlkl.supervised.scratch import make_scratch
from rlkl.tasks import TASKS
from rlkl.tasks.answers import has_answers


def main(argv: list[str]) -> None:
    cfg = configure(argv, SFTConfig, "sft", __doc__ or "")
    if cfg is None:
        return
    make_task = resolve(cfg.task, TASKS, "task")
    device = pick_device(cfg.device)
    train_task, heldout_task = make_task("train"), make_task("heldout")
    if not has_answers(train_task):
        raise UserError(
            "rlkl sft learns answers, and the task's rows have none: name the column that has them "
            "(task.answer=COLUMN of task=datasets)"
        )
    policy, tokenizer = load_start(cfg, train_task, device)
    pad_id = sampling_params(policy, tokenizer, 1.0).pad_id
    max_tokens = cfg.max_tokens or context_of(policy.lm)
    train = filter_by_length(solutions(train_task, tokenizer, cfg.chat), max_tokens, "rows")
    heldout = filter_by_length(solutions(heldout_task, tokenizer, cfg.chat), max_tokens, "rows")
    folder = new_run(cfg, "sft", argv)
    log_start(device, folder, train, heldout, "rows")

    def objective(items: list[Item]) -> tuple[Tensor, dict[str, Tensor]]:
        return cross_entropy(policy(collate(items, pad_id, device)).logprobs)

    with closing(open_log(cfg, folder)) as log:
        before, after = fit(cfg, policy, objective, train, heldout, log, count_response_tokens)
    title = "held out; loss in nats per token of the solutions"
    finish(folder, policy.lm, tokenizer, before, after, title)


def load_start(
    cfg: SFTConfig, task: Any, device: torch.device
) -> tuple[Policy, PreTrainedTokenizerBase]:
    """The model that training starts from: a fresh one with `scratch.layers`, else model.name."""
    dtype = dtype_of(cfg, device)
    if not cfg.scratch.layers:
        return load(model_name(cfg.model.name, task), device=device, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        make_scratch(Path(folder), cfg.scratch, cfg.seed)
        return load(folder, device=device, dtype=dtype)


def solutions(task: Any, tokenizer: PreTrainedTokenizerBase, chat: Chat) -> list[Item]:
    """Each prompt of a task with its solution."""
    examples = [task[i] for i in range(len(task))]
    return [tokenize(tokenizer, e.prompt, [e.solution], chat=chat) for e in examples]
