"""AI feedback: a causal LM is asked whether a reply follows a written principle (Bai et al. 2022, arXiv:2212.08073)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlkl.errors import UserError
from rlkl.model import Policy, context_of, encode, left_pad, load
from rlkl.types import Batch, Example

QUESTION = """Principle: {principle}

Prompt: {prompt}

Reply: {reply}

Does the reply follow the principle? Answer yes or no.
Answer:"""


@functools.lru_cache(maxsize=4)
def loaded(path: str, device: torch.device) -> tuple[Policy, Any]:
    """Once a process; bfloat16 on cuda."""
    try:
        policy, tokenizer = load(path, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    except UserError as error:
        raise UserError(str(error).replace("model.name=", "reward.path=", 1)) from error
    return policy.requires_grad_(False), tokenizer


def principle_judge(examples: Sequence[Example], replies: Sequence[str], batch: Batch, *, path: str, principle: str,
                    template: str = QUESTION, micro_tokens: int = 16384) -> tuple[Tensor, dict[str, Tensor]]:
    """log P(yes) - log P(no) of a local causal LM's next token, asked whether the reply follows the principle.

    template: with {principle}, {prompt} and {reply}; sent through the chat template of a judge that has one.
    """
    policy, tokenizer = loaded(path, batch.mask.device)
    yes, no = answers(tokenizer)
    rows = [question(tokenizer, template, principle, e.prompt, r) for e, r in zip(examples, replies, strict=True)]
    context = context_of(policy.lm)
    logprobs = next_logprobs(policy, [r[1 - context :] if context else r for r in rows], micro_tokens)
    return logprobs[:, yes].logsumexp(1) - logprobs[:, no].logsumexp(1), {}


def question(tokenizer: Any, template: str, principle: str, prompt: str | list[dict], reply: str
             ) -> list[int]:
    """The question as the judge's tokens. UserError where the template has another field, or leaves the reply out."""
    if isinstance(prompt, list):
        prompt = "\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in prompt)
    try:
        text = template.format(principle=principle, prompt=prompt, reply=reply)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"reward.template: only {{principle}}, {{prompt}} and {{reply}} are known: {error}") from error
    if "{reply}" not in template:
        raise UserError("reward.template must hold {reply}: the judge would not see what it judges")
    return encode(tokenizer, [{"role": "user", "content": text}] if tokenizer.chat_template else text)


def answers(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The token ids that begin a yes, and those that begin a no. UserError where one cannot be told from the other."""
    first = [set(starts(tokenizer, word)) for word in ("yes", "no")]
    yes, no = (sorted(mine - other) for mine, other in (first, first[::-1]))
    if not yes or not no:
        raise UserError("reward.path: the judge's tokenizer writes yes and no with the same first token")
    return yes, no


def starts(tokenizer: Any, word: str) -> list[int]:
    """yes, Yes, YES, with and without a space before: those that are one token, else the first token of each."""
    forms = [space + form for form in (word, word.capitalize(), word.upper()) for space in ("", " ")]
    ids = [tokenizer(form, add_special_tokens=False).input_ids for form in forms]
    known = [x for x in ids if x and x[0] != tokenizer.unk_token_id]
    return [x[0] for x in known if len(x) == 1] or [x[0] for x in known]


@torch.no_grad()
def next_logprobs(policy: Policy, rows: Sequence[list[int]], max_tokens: int) -> Tensor:
    """(B, V) log-probs of the token that follows each row, in micro-batches of at most `max_tokens` padded tokens."""
    found: dict[int, Tensor] = {}
    order, start = sorted(range(len(rows)), key=lambda i: -len(rows[i])), 0
    while start < len(order):
        some = order[start : start + max(max_tokens // len(rows[order[start]]), 1)]
        ids, mask = left_pad([rows[i] for i in some], 0, policy.lm.device)
        last = torch.ones_like(mask[:, :1])  # a token that is not there: only the state before it is asked for
        batch = Batch(ids, mask, ids[:, :1], last, last.float(), last[:, 0])
        found |= zip(some, policy.logits(policy.states(batch)[:, 0]).log_softmax(-1), strict=True)
        start += len(some)
    return torch.stack([found[i] for i in range(len(rows))])
