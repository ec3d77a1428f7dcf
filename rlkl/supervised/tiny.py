"""The default model, `tiny`: a causal LM of about 1M parameters that half knows its task.

It is trained on the task's solutions when it is first used, saved in a cache as an ordinary Hugging
Face directory, and loaded by name like any other model.
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
from transformers import AutoModelForCausalLM

from rlkl.errors import UserError
from rlkl.losses import token_weights
from rlkl.policy.policy import Policy
from rlkl.supervised.data import collate, tokenize
from rlkl.supervised.scratch import TINY, architecture, character_tokenizer, write
from rlkl.types import Batch, Example

# Training stops at this sampled accuracy: enough responses earn a reward, and much can be learned.
GOAL = 0.25
STEPS = 2000  # of training, at most
LR = 1.5e-3
WARMUP = 50  # steps

Progress = Callable[[float, float], None]  # (accuracy, goal), called while the model is trained


def cached_base(progress: Progress, examples: Sequence[Example], seed: int = 0) -> Path:
    """The directory of the base model for these examples. It is made if it is not in the cache.

    Raises UserError where it cannot be made.
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
    files = [Path(inspect.getfile(f)) for f in (cached_base, architecture, collate)]
    code = b"".join(file.read_bytes() for file in files)
    texts = repr([(e.prompt, e.solution) for e in examples]).encode()
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
    longest = max(len(e.prompt) + len(e.solution) for e in examples)
    if longest >= TINY.context:
        raise UserError(
            f"model.name=tiny reads at most {TINY.context} characters, and a prompt of this task "
            f"with its answer has {longest}: {hint}"
        )


def make_base(folder: Path, progress: Progress, examples: Sequence[Example], seed: int = 0) -> None:
    """Train a fresh model on the examples until its sampled accuracy reaches GOAL, and save it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = character_tokenizer()
        lm = AutoModelForCausalLM.from_config(architecture(tokenizer))
        train(Policy(lm), tokenizer, progress, examples)
    write(folder, lm, tokenizer)


def train(
    policy: Policy,
    tokenizer: Any,
    progress: Progress,
    examples: Sequence[Example],
) -> None:
    """Minimise the cross-entropy of the solutions until the sampled accuracy reaches GOAL.

    Raises UserError where it does not within STEPS steps.
    """
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0, fused=True)
    items = [tokenize(tokenizer, e.prompt, [e.solution]) for e in examples]

    def random_batch(rows: int) -> Batch:
        indices = torch.randint(len(items), (rows,)).tolist()
        return collate([items[i] for i in indices], tokenizer.pad_token_id)

    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / WARMUP)
        batch = random_batch(128)
        logprobs = policy(batch).logprobs
        if step % 10 == 0:
            accuracy = expected_accuracy(policy, random_batch(512))
            progress(accuracy, GOAL)
            if accuracy >= GOAL:
                return
        (token_weights(batch.mask, "token", 0) * -logprobs).sum().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    raise UserError(
        f"the tiny base model did not reach a sampled accuracy of {GOAL} in {STEPS} steps: make "
        "the task easier, or name a model with model.name"
    )


@torch.no_grad()
def expected_accuracy(policy: Policy, batch: Batch) -> float:
    """The mean probability of the given responses: the sampled accuracy, without sampling."""
    return policy(batch).logprobs.sum(1).exp().mean().item()
