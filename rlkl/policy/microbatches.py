"""How a batch is cut into micro-batches that fit in memory. It never changes the gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rlkl.policy.shared_prompts import first_rows_of_prompts, rows_by_prompt
from rlkl.types import Batch

# Padded response tokens of a micro-batch, per token that it may read. Only what the model says of a
# token is padded, a few numbers beside what each layer keeps: four times as many are still cheap.
MOST_PADDED = 4
# Keys that all responses of a micro-batch see, per token that it may read. Each layer keeps a copy
# of a prompt's keys for every response: at 8 they take at most as much as all else it keeps.
MOST_KEYS = 8


class Rows(NamedTuple):
    """Some rows of a batch."""

    rows: list[int]
    tokens: int  # of their responses, and of each of their prompts once
    keys: int  # of their responses, and of their prompts once for each
    longest: int  # tokens of the longest response

    def fits(self, max_tokens: int) -> bool:
        """Whether these rows are one micro-batch."""
        padded = len(self.rows) * self.longest
        few_keys = self.keys <= MOST_KEYS * max_tokens
        return self.tokens <= max_tokens and padded <= MOST_PADDED * max_tokens and few_keys


def microbatches(
    batch: Batch, max_tokens: int, share_prompts: bool
) -> Iterator[tuple[list[int], Batch]]:
    """(row indices, trimmed batch): longest rows first, at most `max_tokens` tokens each.

    share_prompts: as the policy reads them. Then a prompt counts once, nothing is padding, and rows
    with the same prompt stay together, unless they exceed a micro-batch. Else each row counts with
    its prompt, and as long as the longest. A micro-batch holds at least one row, whatever its
    length.
    """
    prompts = batch.prompt_mask.sum(1).clamp_min(1).tolist()
    responses = batch.attended.sum(1).clamp_min(1).tolist()
    if share_prompts:
        indices = pack_groups(first_rows_of_prompts(batch), prompts, responses, max_tokens)
    else:
        lengths = [sum(pair) for pair in zip(prompts, responses, strict=True)]
        indices = pack_by_tokens(lengths, max_tokens)
    for rows in indices:
        yield rows, batch[rows].trim()


def pack_groups(
    first_rows: Sequence[int], prompts: Sequence[int], responses: Sequence[int], max_tokens: int
) -> Iterator[list[int]]:
    """Lists of rows that need at most `max_tokens` tokens, each prompt counted once in a list.

    first_rows: of each row the first one with its prompt. prompts, responses: their tokens.
    """
    groups: list[Rows] = []
    for first, rows in rows_by_prompt(first_rows).items():
        longest_first = sorted(rows, key=lambda row: -responses[row])
        single = [
            Rows([row], responses[row], prompts[first] + responses[row], responses[row])
            for row in longest_first
        ]
        groups += join(single, max_tokens, prompts[first])
    groups.sort(key=lambda group: -group.longest)
    for joined in join(groups, max_tokens):
        yield joined.rows


def join(parts: Iterable[Rows], max_tokens: int, prompt: int = 0) -> Iterator[Rows]:
    """Join neighbours as long as they fit together. prompt: tokens that each result reads once."""
    together: Rows | None = None
    for part in parts:
        if together is not None:
            joined = Rows(
                together.rows + part.rows,
                together.tokens + part.tokens,
                together.keys + part.keys,
                max(together.longest, part.longest),
            )
            if joined.fits(max_tokens):
                together = joined
                continue
            yield together
        together = part._replace(tokens=part.tokens + prompt)
    if together is not None:
        yield together


def pack_by_tokens(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices, longest first, in lists that need at most `max_tokens` tokens, padding included.

    A list holds at least one item.
    """
    together: list[int] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if together and (len(together) + 1) * longest > max_tokens:
            yield together
            together = []
        if not together:
            longest = lengths[i]
        together.append(i)
    if together:
        yield together
