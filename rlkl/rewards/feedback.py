"""AI feedback: a causal LM is asked whether a response follows a principle.

Bai et al. 2022, arXiv:2212.08073. The score is the log-odds of yes against no as its next token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlkl.errors import UserError
from rlkl.policy.microbatches import pack_by_tokens
from rlkl.policy.model import context_of, load
from rlkl.policy.policy import Policy
from rlkl.rollout.sampling import encode, left_pad
from rlkl.types import Batch, Example

QUESTION = """Principle: {principle}

Prompt: {prompt}

Response: {response}

Does the response follow the principle? Answer yes or no.
Answer:"""


def principle_judge(
    examples: Sequence[Example],
    responses: Sequence[str],
    batch: Batch,
    *,
    path: str,
    principle: str,
    template: str = QUESTION,
    micro_tokens: int = 16384,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) log P(yes) - log P(no) of a causal LM, asked whether the response follows the principle.

    path: the LM, a directory or a hub name.
    template: the question, with {principle}, {prompt} and {response}. It goes through the judge's
    chat template if it has one. What is longer than the judge's context loses its beginning.
    micro_tokens: padded tokens per forward pass.
    """
    policy, tokenizer = load_judge(path, batch.mask.device)
    yes, no = answer_ids(tokenizer)
    rows = [
        encode_question(tokenizer, template, principle, example.prompt, response)
        for example, response in zip(examples, responses, strict=True)
    ]
    context = context_of(policy.lm)
    if context:
        rows = [row[1 - context :] for row in rows]  # one position is left for the answer
    logprobs = next_logprobs(policy, rows, micro_tokens)
    return logprobs[:, yes].logsumexp(1) - logprobs[:, no].logsumexp(1), {}


@functools.lru_cache(maxsize=4)
def load_judge(path: str, device: torch.device) -> tuple[Policy, Any]:
    """The judge and its tokenizer, loaded once per process; bfloat16 on CUDA."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        policy, tokenizer = load(path, device=device, dtype=dtype)
    except UserError as error:
        raise UserError(str(error).replace("model.name=", "reward.path=", 1)) from error
    return policy.requires_grad_(False), tokenizer


def encode_question(
    tokenizer: Any, template: str, principle: str, prompt: str | list[dict], response: str
) -> list[int]:
    """The question as the judge's token ids.

    Raises UserError where the template has a field that is not known, or no {response}.
    """
    if isinstance(prompt, list):
        prompt = "\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in prompt)
    try:
        text = template.format(principle=principle, prompt=prompt, response=response)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"reward.template: only {{principle}}, {{prompt}} and {{response}} are known: {error}"
        ) from error
    if "{response}" not in template:
        raise UserError("reward.template must contain {response}, which the judge is to score")
    if tokenizer.chat_template:
        return encode(tokenizer, [{"role": "user", "content": text}])
    return encode(tokenizer, text)


def answer_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The token ids that begin a yes, and those that begin a no.

    An id that begins both is in neither. Raises UserError where one of the lists is empty.
    """
    begins_yes = set(word_ids(tokenizer, "yes"))
    begins_no = set(word_ids(tokenizer, "no"))
    yes, no = sorted(begins_yes - begins_no), sorted(begins_no - begins_yes)
    if not yes or not no:
        raise UserError(
            "reward.path: the judge's tokenizer has no tokens that tell yes and no apart"
        )
    return yes, no


def word_ids(tokenizer: Any, word: str) -> list[int]:
    """The ids of yes, Yes, YES, with and without a space before, that are one token.

    If none is, the first id of each.
    """
    cases = word, word.capitalize(), word.upper()
    spellings = [space + case for case in cases for space in ("", " ")]
    encoded = [tokenizer(s, add_special_tokens=False).input_ids for s in spellings]
    known = [ids for ids in encoded if ids and ids[0] != tokenizer.unk_token_id]
    single = [ids[0] for ids in known if len(ids) == 1]
    return single or [ids[0] for ids in known]


@torch.no_grad()
def next_logprobs(policy: Policy, rows: Sequence[list[int]], max_tokens: int) -> Tensor:
    """(B, V) log-probs of the token after each row, in nats.

    In micro-batches of at most `max_tokens` padded tokens.
    """
    logprobs: dict[int, Tensor] = {}
    for indices in pack_by_tokens([len(row) for row in rows], max_tokens):
        ids, mask = left_pad([rows[i] for i in indices], 0, policy.lm.device)
        # A response of one token, whose id is never read: only the state before it is needed.
        one_token = torch.ones_like(mask[:, :1])
        no_logprobs = one_token.float()
        batch = Batch(ids, mask, ids[:, :1], one_token, no_logprobs, truncated=one_token[:, 0])
        logits = policy.logits(policy.states(batch)[:, 0])
        logprobs |= zip(indices, logits.log_softmax(-1), strict=True)
    return torch.stack([logprobs[i] for i in range(len(rows))])
