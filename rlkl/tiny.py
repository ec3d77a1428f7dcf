"""The embedded default model: a causal LM of about 1M parameters, supervised on the spot until it half knows its task.

It is saved as an ordinary Hugging Face directory and then loaded by name, like any other model.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rlkl.errors import UserError
from rlkl.losses import token_weights
from rlkl.model import Policy
from rlkl.scratch import TINY, architecture, character_tokenizer, write
from rlkl.supervised import collate, item_of
from rlkl.types import Batch, Example

GOAL = 0.25  # sampled accuracy at which supervision stops: enough replies earn a reward, and much is left to learn
STEPS = 2000  # of supervision, at most


def cached_base(progress: Callable[[float, float], None], examples: Sequence[Example], seed: int = 0) -> Path:
    """The directory of the base model for these examples, made if it is missing.

    `progress(accuracy, goal)` is called while it is made. UserError if it cannot be.
    """
    cache = Path(os.environ.get("RLKL_CACHE", Path.home() / ".cache" / "rlkl"))
    folder = cache / f"tiny-{recipe(examples)}-{seed}"
    if not folder.is_dir():
        refuse(examples)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(dir=cache, prefix="making-"))
        except OSError as error:
            raise UserError(
                f"the tiny base model cannot be written to {cache} ({error.strerror}): set RLKL_CACHE to another folder"
            ) from error
        make_base(scratch, progress, examples, seed)
        if not folder.is_dir():  # another process may have been faster
            scratch.rename(folder)
    return folder


def recipe(examples: Sequence[Example]) -> str:
    """Other code or other examples: another model."""
    code = b"".join(Path(inspect.getfile(x)).read_bytes() for x in (cached_base, architecture, collate))
    return hashlib.sha256(code + repr([(e.prompt, e.solution) for e in examples]).encode()).hexdigest()[:8]


def refuse(examples: Sequence[Example]) -> None:
    """UserError for what a model of single characters cannot be taught."""
    hint = "name a model with model.name"
    if not all(isinstance(e.prompt, str) for e in examples):
        raise UserError(f"model.name=tiny knows no chat, only text: set task.chat=false if the task has it, or {hint}")
    if not any(e.solution for e in examples):
        raise UserError(f"model.name=tiny is first taught some answers, and this task has none: {hint}")
    longest = max(len(e.prompt) + len(e.solution) for e in examples)
    if longest >= TINY.context:
        raise UserError(f"model.name=tiny reads at most {TINY.context} characters, and a prompt of this task with its "
                        f"answer has {longest}: {hint}")


def make_base(folder: Path, progress: Callable[[float, float], None], examples: Sequence[Example], seed: int = 0
              ) -> None:
    """Supervise a fresh model on the examples until its sampled accuracy reaches GOAL, and save it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = character_tokenizer()
        lm = AutoModelForCausalLM.from_config(architecture(tokenizer))
        supervise(Policy(lm), tokenizer, progress, examples)
    write(folder, lm, tokenizer)


def supervise(policy: Policy, tokenizer: PreTrainedTokenizerFast, progress: Callable[[float, float], None],
              examples: Sequence[Example]) -> None:
    """Cross-entropy on the solutions; every 10 steps the probability of the given solution to others is measured."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.5e-3, weight_decay=0.0, fused=True)
    items = [item_of(tokenizer, e.prompt, [e.solution]) for e in examples]

    def some(count: int) -> Batch:
        return collate([items[i] for i in torch.randint(len(items), (count,)).tolist()], tokenizer.pad_token_id)

    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1.0, (step + 1) / 50)
        batch = some(128)
        logprobs = policy.evaluate(batch).logprobs
        if step % 10 == 0:
            with torch.no_grad():
                accuracy = policy.evaluate(some(512)).logprobs.sum(1).exp().mean().item()  # expected, without sampling
            progress(accuracy, GOAL)
            if accuracy >= GOAL:
                return
        (token_weights(batch.mask, "token", 0) * -logprobs).sum().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    raise UserError(f"the tiny base model did not reach a sampled accuracy of {GOAL} in {STEPS} steps: make the task "
                    "easier, or name a model with model.name")
