"""The default model, `tiny`: a causal LM of about 1M parameters, made when it is first used.

It imitates a teacher who knows the task but is right only one time in three, and otherwise makes
its typical mistake. So it can do every prompt and mostly does not: what is left to learn is which
of its two habits pays, and the score tells. It is trained for a fixed number of steps, long enough
for every seed and every CPU to end at the same accuracy. It is saved in a cache as an ordinary
Hugging Face directory, and loaded by name like any other model.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM

from rlkl.errors import UserError
from rlkl.policy.optimizer import lr_scale
from rlkl.policy.policy import Policy
from rlkl.supervised.data import collate, tokenize
from rlkl.supervised.muon import Muon
from rlkl.supervised.scratch import TINY, architecture, character_tokenizer, write
from rlkl.types import Batch, Example

RIGHT = 1 / 3  # the probability that the teacher is right
STEPS = 300  # of training
BATCH = 64  # examples a step
WARMUP = 20  # steps
MUON_LR = 8e-3
ADAM_LR = 1e-2

Progress = Callable[[int, int], None]  # (step, STEPS), called before each step


def cached_base(progress: Progress, examples: Sequence[Example], seed: int = 0) -> Path:
    """The directory of the base model for these examples. It is made if it is not in the cache.

    seed: of the fresh weights and of the order of the examples. Raises UserError where it cannot
    be made.
    """
    cache = Path(os.environ.get("RLKL_CACHE", Path.home() / ".cache" / "rlkl"))
    folder = cache / f"tiny-{fingerprint(examples)}-{seed}"
    if folder.is_dir():
        return folder
    check_teachable(examples)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=cache, prefix="making-"))
    except OSError as error:
        raise UserError(
            f"the tiny base model cannot be written to {cache} ({error.strerror}): set RLKL_CACHE "
            "to another folder"
        ) from error
    make_base(unfinished, progress, examples, seed)
    if not folder.is_dir():  # another process may have been faster
        unfinished.rename(folder)
    return folder


def fingerprint(examples: Sequence[Example]) -> str:
    """A hash of the code that makes the model and of the examples it is trained on."""
    files = [Path(inspect.getfile(f)) for f in (cached_base, architecture, collate, Muon)]
    code = b"".join(file.read_bytes() for file in files)
    texts = repr([(e.prompt, e.solution, e.info.get("mistake")) for e in examples]).encode()
    return hashlib.sha256(code + texts).hexdigest()[:8]


def check_teachable(examples: Sequence[Example]) -> None:
    """UserError where a character-level model cannot learn these examples."""
    hint = "name a model with model.name"
    if not all(isinstance(e.prompt, str) for e in examples):
        raise UserError(
            "model.name=tiny knows no chat, only text: set task.chat=false if the task has it, or "
            f"{hint}"
        )
    if not any(e.solution for e in examples):
        raise UserError(
            f"model.name=tiny is first taught some answers, and this task has none: {hint}"
        )
    longest = max(len(e.prompt) + max(len(e.solution), len(mistake_of(e, e))) for e in examples)
    if longest >= TINY.context:
        raise UserError(
            f"model.name=tiny reads at most {TINY.context} characters, and a prompt of this task "
            f"with its answer has {longest}: {hint}"
        )


def make_base(folder: Path, progress: Progress, examples: Sequence[Example], seed: int = 0) -> None:
    """Train a fresh model to imitate the teacher of these examples, and save it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = character_tokenizer()
        lm = AutoModelForCausalLM.from_config(architecture(tokenizer))
        train(lm, tokenizer, progress, examples)
    write(folder, lm, tokenizer)


def train(lm: Any, tokenizer: Any, progress: Progress, examples: Sequence[Example]) -> None:
    """Minimise the cross-entropy to the teacher's answers, for STEPS steps."""
    policy = Policy(lm)
    optimizers = optimizers_of(lm)
    schedules = [
        LambdaLR(optimizer, lambda step: lr_scale(step, STEPS, WARMUP, "linear"))
        for optimizer in optimizers
    ]
    for step in range(STEPS):
        progress(step, STEPS)
        batch, probabilities = lesson(tokenizer, examples)
        logprobs = policy(batch).logprobs.sum(1)
        (-(probabilities * logprobs).sum() / BATCH).backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def optimizers_of(lm: Any) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest.

    AdamW alone has not begun to add after STEPS steps.
    """
    layers = [p for p in lm.base_model.layers.parameters() if p.dim() == 2]
    rest = [p for p in lm.parameters() if not any(p is matrix for matrix in layers)]
    return [
        Muon(layers, MUON_LR),
        torch.optim.AdamW(rest, ADAM_LR, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
    ]


def lesson(tokenizer: Any, examples: Sequence[Example]) -> tuple[Batch, Tensor]:
    """All answers of the teacher to BATCH random examples, and the probability of each, (B,)."""
    items, probabilities = [], []
    for i, j in torch.randint(len(examples), (BATCH, 2)).tolist():
        answers = teacher(examples[i], examples[j])
        items.append(tokenize(tokenizer, examples[i].prompt, list(answers)))
        probabilities += answers.values()
    return collate(items, tokenizer.pad_token_id), torch.tensor(probabilities)


def teacher(example: Example, other: Example) -> dict[str, float]:
    """The teacher's answers to an example, each with its probability."""
    mistake = mistake_of(example, other)
    if mistake == example.solution:
        return {mistake: 1.0}
    return {example.solution: RIGHT, mistake: 1 - RIGHT}


def mistake_of(example: Example, other: Example) -> str:
    """The mistake that the task names, info["mistake"], or else the solution of another example."""
    named = example.info.get("mistake")
    return named if named and isinstance(named, str) else other.solution
