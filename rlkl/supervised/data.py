"""Rows of supervised learning: text → token ids → batches of a bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from rlkl.errors import UserError
from rlkl.policy.microbatches import pack_by_tokens
from rlkl.rollout.sampling import ChatOptions, encode, left_pad, right_pad
from rlkl.run.seeds import generator
from rlkl.run.terminal import note
from rlkl.types import Batch


class Item(NamedTuple):
    """A prompt and the K responses to it that one loss reads, as token ids.

    K is 1 in SFT, and 2, chosen and rejected, where preferences are learned.
    """

    prompt: list[int]
    responses: tuple[list[int], ...]

    @property
    def width(self) -> int:
        """Tokens of the prompt and its longest response."""
        return len(self.prompt) + max(len(response) for response in self.responses)


def tokenize(
    tokenizer: Any,
    prompt: str | list[dict],
    responses: Sequence[str],
    truncated: Sequence[bool] = (),
    chat: ChatOptions | None = None,
) -> Item:
    """A prompt and its responses as token ids.

    A response ends with the EOS, a token like any other, unless it is truncated; by default none
    is. chat: see `encode`. Raises UserError where the prompt has no tokens, and where chat messages
    meet a tokenizer without a chat template.
    """
    prompt_ids = encode(tokenizer, prompt, chat)
    if not prompt_ids:
        raise UserError(f"the prompt {prompt!r} has no tokens; every row needs one at least")
    response_ids = []
    for response, cut in zip(responses, truncated or [False] * len(responses), strict=True):
        ids = tokenizer(response, add_special_tokens=False).input_ids
        response_ids.append(ids if cut else [*ids, tokenizer.eos_token_id])
    return Item(prompt_ids, tuple(response_ids))


def collate(items: Sequence[Item], pad_id: int, device: str | torch.device = "cpu") -> Batch:
    """n items of K responses → a Batch of B = n·K rows, "(n k)", as if they had been sampled."""
    prompts = [item.prompt for item in items for _ in item.responses]
    responses = [response for item in items for response in item.responses]
    prompt_ids, prompt_mask = left_pad(prompts, pad_id, device)
    response_ids, mask = right_pad(responses, pad_id, device)
    return Batch(
        prompt_ids,
        prompt_mask,
        response_ids,
        mask,
        sampler_logprobs=torch.zeros(mask.shape, device=device),
        truncated=torch.zeros(len(mask), dtype=torch.bool, device=device),
    )


def filter_by_length(items: Iterable[Item], max_tokens: int | None, kind: str) -> list[Item]:
    """The items of at most `max_tokens` tokens, all of whose responses have tokens.

    kind: "rows" or "pairs", for the note that says how many were dropped. Raises UserError where
    there is none, and where none is left.
    """
    items = list(items)
    if not items:
        raise UserError(f"there are no {kind}")
    fitting = [
        item
        for item in items
        if all(item.responses) and (max_tokens is None or item.width <= max_tokens)
    ]
    dropped = len(items) - len(fitting)
    if dropped:
        message = f"{dropped} of {len(items)} {kind} have a response without tokens"
        if max_tokens is not None:
            message += f", or more than {max_tokens} tokens"
        if not fitting:
            raise UserError(
                f"{message}; none is left: raise max_tokens, or take a model with a longer context"
            )
        note(f"dropped: {message}")
    return fitting


def minibatches(
    items: Sequence[Item], epochs: int, size: int, seed: int
) -> Iterator[tuple[list[Item], bool]]:
    """(the items of one update, are they the last of their epoch).

    Each epoch takes every item once, in a random order of its own.
    """
    for epoch in range(epochs):
        order = torch.randperm(len(items), generator=generator(seed, epoch, "order"))
        updates = order.split(size)
        for number, indices in enumerate(updates, 1):
            yield [items[i] for i in indices.tolist()], number == len(updates)


def microbatches(items: Sequence[Item], max_tokens: int) -> Iterator[list[Item]]:
    """Items, longest first, in lists of at most `max_tokens` padded tokens, or of one item."""
    lengths = [len(item.responses) * item.width for item in items]
    for indices in pack_by_tokens(lengths, max_tokens):
        yield [items[i] for i in indices]
