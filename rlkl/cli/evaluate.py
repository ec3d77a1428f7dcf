"""Held-out evaluation of a run's checkpoint beside the model it started from: sampled, greedy, pass@k, grades.

With the options of the run, and its own plug-ins: unless something is changed here, the numbers of its report.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from rlkl import config, runs
from rlkl.build import TABLES, heldout_of, judges, pick_device, scoring_of
from rlkl.cli.finished import Run, asked_for_help, both, checkpoint_of, find, kept, parse
from rlkl.config import resolve
from rlkl.errors import UserError
from rlkl.heldout import Exam, accuracy
from rlkl.model import sampling_rule
from rlkl.rollout import SAMPLERS
from rlkl.schema import Config
from rlkl.schema_runs import Chosen
from rlkl.tasks import TASKS
from rlkl.terminal import before_and_after, console, say

READ = ("eval.prompts", "eval.samples", "eval.temperature", "eval.stop", "sampling.max_new_tokens",
        "sampling.max_prompt_tokens", "sampling.backend", "sampling.prompts", "sampling.group_size", "task", "scoring",
        "model.dtype", "device")  # what an evaluation reads of a config: prompts * group_size is its rows at once
OFF = {"optim": {"minibatch": None}, "overlong": {"buffer": 0}, "kl_ref": {"target": None},
       "sampling": {"unanimous": "keep"}}  # what of training would refuse other rows, or less room


def main(argv: list[str]) -> None:
    """held-out accuracy of a run before and after: sampled, greedy, pass@k; options of the run may be changed"""
    options = config.options(TABLES, Chosen) + [row for row in config.options(TABLES) if reads(row[0])]
    if asked_for_help(argv, "eval", "RUN", __doc__ or "", options):
        return
    (path,), changes = parse(argv, "eval", "RUN")
    run = find(path)
    chosen = config.load([c for c in changes if c.startswith("step=")], schema=Chosen)
    cfg = changed(run, [c for c in changes if not c.startswith("step=")])
    folder = checkpoint_of(run, chosen.step)
    device = pick_device(cfg.device)
    before, after, count = measured(cfg, folder, device)
    title = f"{folder}: {count} held-out prompts, {cfg.eval.samples} replies each, temperature {cfg.eval.temperature:g}"
    before_and_after(before, after, title)
    result = {"checkpoint": folder.name, "prompts": count, "before": before, "after": after,
              "options": {key: x for key, x in runs.flat(asdict(cfg)).items() if reads(key)}}
    path = runs.numbered(run.folder / "eval", ".json")
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    say(f"written: {path}")


def reads(key: str) -> bool:
    return any(key == name or key.startswith(name + ".") for name in READ)


def changed(run: Run, changes: list[str]) -> Config:
    """The run's config with its own copies of plug-ins, and what is changed here. UserError on what is not read."""
    own = {"task": kept(run, run.cfg.task), "sampling": {"backend": kept(run, run.cfg.sampling.backend)}}
    tree = config.merge(config.merge(run.tree, OFF), own)
    cfg, start = config.load(changes, tree), config.build(tree)
    if other := [key for key in runs.differing(start, cfg) if not reads(key)]:
        raise UserError(f"rlkl eval does not read {other[0]}; it reads step, {', '.join(READ)}")
    return cfg


def measured(cfg: Config, folder: Path, device: torch.device) -> tuple[dict[str, float], dict[str, float], int]:
    """Held-out numbers before and after, and of how many prompts."""
    sampler = resolve(cfg.sampling.backend, SAMPLERS, "sampling.backend")
    task = resolve(cfg.task, TASKS, "task")("heldout")
    tokenizer, *policies = both(cfg, folder, device)
    examples, results = heldout_of(cfg, policies[0], tokenizer, task, console), []
    with scoring_of(cfg, console) as scoring, console.status("") as status:
        _, solved, grade = judges(cfg, task, scoring)
        for when, policy in zip(("before", "after"), policies, strict=True):
            status.update(f"{len(examples)} held-out prompts, {when}")
            rule = sampling_rule(policy, tokenizer, cfg.eval.temperature)
            exam = Exam(policy, tokenizer, rule, sampler, examples, solved, grade)
            results.append(accuracy(cfg, exam, samples=cfg.eval.samples))
    return results[0], results[1], len(examples)
