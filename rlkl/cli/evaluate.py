"""Held-out evaluation of a run's checkpoint and of the model it started from, side by side.

The task, the options and the plug-ins are those of the run. So without overrides the numbers are
those of its report: sampled and greedy accuracy, pass@k, and the grades of the task.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from rlkl.cli.run_commands import (
    Run,
    find_checkpoint,
    find_run,
    help_printed,
    load_policies,
    parse,
    saved_plugin,
)
from rlkl.cli.schema import OfCheckpoint
from rlkl.errors import UserError
from rlkl.plugins import resolve
from rlkl.policy.model import sampling_params
from rlkl.run import config
from rlkl.run import folder as run_folder
from rlkl.run.build import (
    Heldout,
    Models,
    build_reward,
    build_sampler,
    build_scoring,
    heldout_examples,
    pick_device,
)
from rlkl.run.evaluate import evaluate
from rlkl.run.help import every_option
from rlkl.run.schema import Config
from rlkl.run.terminal import log_before_after, log_line
from rlkl.tasks import TASKS
from rlkl.tasks.answers import has_answers

# The options, and sections, that an evaluation reads; `reward` where the task has no answers. It
# samples at most prompts * group_size rows at once, but all samples of a prompt together.
READ = (
    "eval.prompts",
    "eval.samples",
    "eval.temperature",
    "eval.stop",
    "sampling.max_new_tokens",
    "sampling.max_prompt_tokens",
    "sampling.backend",
    "sampling.prompts",
    "sampling.group_size",
    "task",
    "chat",
    "reward",
    "scoring",
    "model.dtype",
    "device",
)
# Training options that could refuse a smaller number of rows, or of tokens, are switched off.
OFF = {
    "optim": {"minibatch": None},
    "overlong": {"buffer": 0},
    "kl_ref": {"target": None},
    "sampling": {"zero_variance": "keep"},
}


def main(argv: list[str]) -> None:
    options = every_option([], OfCheckpoint)
    options += [row for row in every_option([]) if reads(row[0])]
    if help_printed(argv, "eval", "RUN", __doc__ or "", options):
        return
    (path,), overrides = parse(argv, "eval", "RUN")
    run = find_run(path)
    step_overrides = [x for x in overrides if x.startswith("step=")]
    step = config.load(step_overrides, schema=OfCheckpoint).step
    cfg = evaluation_config(run, [x for x in overrides if x not in step_overrides])
    folder = find_checkpoint(run, step)
    task = resolve(cfg.task, TASKS, "task")("heldout")
    if has_answers(task):
        if any(x.startswith("reward") for x in overrides):
            raise UserError("rlkl eval reads reward only where the task has no answers to score by")
        cfg = replace(cfg, reward=None)  # it is not read, and may be a model that is gone
    before, after, count = evaluate_both(cfg, task, folder, pick_device(cfg.device))
    log_before_after(
        before,
        after,
        f"{folder}: {count} held-out prompts, {cfg.eval.samples} responses each, temperature "
        f"{cfg.eval.temperature:g}",
    )
    result = {
        "checkpoint": folder.name,
        "prompts": count,
        "before": before,
        "after": after,
        "options": {key: x for key, x in run_folder.flat(asdict(cfg)).items() if reads(key)},
    }
    file = run_folder.numbered(run.folder / "eval", ".json")
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    log_line(f"written: {file}")


def reads(key: str) -> bool:
    """Does an evaluation read this option?"""
    return any(key == name or key.startswith(name + ".") for name in READ)


def evaluation_config(run: Run, overrides: list[str]) -> Config:
    """The run's configuration, its plug-ins from its own folder, with the overrides.

    Raises UserError on an override that an evaluation does not read.
    """
    reward = run.cfg.reward
    if isinstance(reward, list):
        reward = [saved_plugin(run, section) for section in reward]
    elif reward:
        reward = saved_plugin(run, reward)
    plugins = {
        "task": saved_plugin(run, run.cfg.task),
        "reward": reward,
        "sampling": {"backend": saved_plugin(run, run.cfg.sampling.backend)},
    }
    tree = config.merge(config.merge(run.tree, OFF), plugins)
    cfg = config.load(overrides, tree)
    for key in run_folder.differing(config.build(tree), cfg):
        if not reads(key):
            raise UserError(f"rlkl eval does not read {key}; it reads step, {', '.join(READ)}")
    return cfg


def evaluate_both(
    cfg: Config, task: Any, folder: Path, device: torch.device
) -> tuple[dict[str, float], dict[str, float], int]:
    """The held-out metrics before training and of the checkpoint, and the number of prompts."""
    sampler = build_sampler(cfg.sampling.backend)
    metrics = []
    with build_scoring(cfg, steps=1) as scoring:
        _, reward, grade = build_reward(cfg, task, scoring, device)
        tokenizer, before, after = load_policies(cfg, folder, device)
        examples = heldout_examples(cfg, before, tokenizer, task)
        heldout = Heldout(examples, reward, grade)
        for policy in (before, after):
            params = sampling_params(policy, tokenizer, cfg.eval.temperature)
            models = Models(policy, tokenizer, sampler, params, chat=cfg.chat)
            metrics.append(evaluate(cfg, models, heldout, samples=cfg.eval.samples))
    return metrics[0], metrics[1], len(examples)
