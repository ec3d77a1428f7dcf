"""Each prompt read once for all of its responses, when scoring and when learning.

The model reads a micro-batch as a single row of tokens, without padding:

    prompt 1 | prompt 2 | … | response 1 | response 2 | …

A response token sees its prompt and the earlier tokens of its own response, and its position counts
on from the prompt: the same as if prompt and response stood alone. All layers but the attention
work on each token by itself, so that a prompt costs them what it costs once. This is packing, with
a prefix that several sequences share. (Prefix Grouper, arXiv:2506.05433, does the same.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rlkl.types import Batch

# Short responses to a long prompt are one segment, up to this share of the prompt's length. They
# read one copy of the prompt's keys, for at most a quarter more scores, which the mask hides.
JOINED = 1 / 4
SHORT = 32  # tokens: lengths up to here are of one size


class Segment(NamedTuple):
    """Tokens that follow each other and are attended to together: a prompt, or responses to it."""

    is_prompt: bool
    rows: list[int]  # of the batch: of the responses, or the first one that has this prompt
    prefix: int  # tokens of the prompt before the responses; 0 for a prompt
    length: int  # tokens

    @property
    def size(self) -> tuple[bool, int, int]:
        """Segments of one size are padded to one another: within a factor of two."""
        prefix, length = (max(n, SHORT).bit_length() for n in (self.prefix, self.length))
        return not self.is_prompt, prefix, length


@dataclass
class PaddedSegments:
    """R segments of similar sizes as a rectangle of attention: Q queries and K keys a row.

    What is padding repeats a row's last token.
    """

    queries: Tensor  # (R, Q) places in the row of tokens
    keys: Tensor  # (R, K): the prompt of the segment, then the segment itself
    is_key: Tensor  # (R, K) bool, False on padding
    outputs: Tensor  # where in the (R · Q) queries those are that are no padding
    are_prompts: bool  # none of the segments sees a prompt before it

    def causal(self, window: int | None) -> bool:
        """Whether each query sees the keys up to itself, and no mask is needed to say so."""
        return self.are_prompts and (window is None or self.queries.shape[1] <= window)

    def to(self, device: torch.device) -> PaddedSegments:
        return PaddedSegments(
            queries=self.queries.to(device),
            keys=self.keys.to(device),
            is_key=self.is_key.to(device),
            outputs=self.outputs.to(device),
            are_prompts=self.are_prompts,
        )


class PackedSegments(NamedTuple):
    """S segments one after the other, without padding, as flash attention reads them."""

    keys: Tensor  # places in the row of tokens: of each segment its prompt, then itself
    cu_seqlens_q: Tensor  # (S+1,) int32: where each segment's queries start, and the end
    cu_seqlens_k: Tensor  # (S+1,) int32
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass
class SharedPrompts:
    """A micro-batch as one row of L tokens: each prompt once, each response once."""

    ids: Tensor  # (1, L) long
    positions: Tensor  # (1, L) long: of each token, in its prompt and response
    response: Tensor  # (L,) long: the row of the batch that a token is from, -1 in a prompt
    states: Tensor  # (B, T+1) long: where the prompt and 0, 1, …, T response tokens have been read
    parts: list[PaddedSegments]  # in the order of the tokens; none where there are `packed` ones
    packed: PackedSegments | None  # for flash attention
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def mask(self, part: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """(R, 1, Q, K) to add to a part's scores: 0 where a query sees a key, else -inf.

        All layers with the same window share it.
        """
        if (part, window) not in self.masks:
            queries, keys = self.parts[part].queries[:, :, None], self.parts[part].keys[:, None]
            same_response = self.response[queries] == self.response[keys]
            distance = self.positions[0, queries] - self.positions[0, keys]
            visible = (same_response | (self.response[keys] < 0)) & (distance >= 0)
            visible &= self.parts[part].is_key[:, None]
            if window is not None:
                visible &= distance < window
            zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            self.masks[part, window] = zeros.masked_fill(~visible, -torch.inf)[:, None]
        return self.masks[part, window]


# ------------------------------------------------------------------ the row of tokens


def share_prompts(batch: Batch, flash: bool) -> SharedPrompts:
    """Lay out a batch as one row of tokens. Rows whose prompts are equal share theirs.

    Prompts are left-padded and have at least one token. flash: for flash attention, else for
    attention in padded parts.
    """
    first_rows = first_rows_of_prompts(batch)
    prompt_lengths = batch.prompt_mask.sum(1).tolist()
    lengths = batch.attended.sum(1).tolist()
    segments = arrange(first_rows, prompt_lengths, lengths, joined=0 if flash else JOINED)
    placed = places(segments, first_rows)

    ids = torch.cat([batch.prompt_ids, batch.response_ids], 1)
    width, device = batch.prompt_ids.shape[1], ids.device
    row, column = sources(segments, prompt_lengths, lengths, width)
    place = torch.zeros(ids.shape, dtype=torch.long)  # of each token of the batch
    place[row, column] = torch.arange(len(row))
    # The state after t response tokens lies where the last of them was read, or the prompt's end.
    tokens_read = torch.arange(batch.mask.shape[1] + 1).minimum(torch.tensor(lengths)[:, None])
    own_row, prompt_row = torch.arange(len(ids))[:, None], torch.tensor(first_rows)[:, None]
    read_in = torch.where(tokens_read > 0, own_row, prompt_row)
    return SharedPrompts(
        ids=ids[row.to(device), column.to(device)][None],
        positions=(column - width + torch.tensor(prompt_lengths)[row])[None].to(device),
        response=torch.where(column < width, -1, row).to(device),
        states=place[read_in, width - 1 + tokens_read].to(device),
        parts=[] if flash else [part.to(device) for part in padded(segments, placed)],
        packed=packed(placed, device) if flash else None,
    )


def sources(
    segments: list[Segment], prompt_lengths: Sequence[int], lengths: Sequence[int], width: int
) -> tuple[Tensor, Tensor]:
    """(L,) each: of each token its row and its column in [prompt_ids | response_ids].

    width: columns of prompt_ids.
    """
    rows, columns = [], []
    for segment in segments:
        for i in segment.rows:
            first, end = width, width + lengths[i]
            if segment.is_prompt:
                first, end = width - prompt_lengths[i], width
            rows.append(torch.full((end - first,), i))
            columns.append(torch.arange(first, end))
    return torch.cat(rows), torch.cat(columns)


def first_rows_of_prompts(batch: Batch) -> list[int]:
    """(B) the first row that has the same prompt."""
    prompts = batch.prompt_ids.masked_fill(~batch.prompt_mask, -1).cpu().numpy()
    first_row: dict[bytes, int] = {}
    return [first_row.setdefault(prompt.tobytes(), row) for row, prompt in enumerate(prompts)]


def rows_by_prompt(first_rows: Sequence[int]) -> dict[int, list[int]]:
    """The rows of each prompt, by its first row."""
    rows_of: dict[int, list[int]] = {}
    for row, first in enumerate(first_rows):
        rows_of.setdefault(first, []).append(row)
    return rows_of


def arrange(
    first_rows: Sequence[int], prompt_lengths: Sequence[int], lengths: Sequence[int], joined: float
) -> list[Segment]:
    """The segments of a batch in the order of the row: prompts, then responses, each by size.

    joined: see JOINED; 0 = each response is a segment of its own.
    """
    segments = []
    for first, rows in rows_by_prompt(first_rows).items():
        prompt = prompt_lengths[first]
        segments.append(Segment(True, [first], 0, prompt))
        together: list[int] = []
        length = 0
        for row in sorted(rows, key=lambda row: -lengths[row]):
            if together and length + lengths[row] > joined * prompt:
                segments.append(Segment(False, together, prompt, length))
                together, length = [], 0
            together.append(row)
            length += lengths[row]
        segments.append(Segment(False, together, prompt, length))
    return sorted((s for s in segments if s.length), key=lambda segment: segment.size)


class Places(NamedTuple):
    """(S,) each: of each segment its start, its length, and those of the prompt before it."""

    start: Tensor
    length: Tensor
    prompt_start: Tensor
    prefix: Tensor


def places(segments: list[Segment], first_rows: Sequence[int]) -> Places:
    """Where the segments lie, one after the other."""
    ends = accumulate(segment.length for segment in segments)
    starts = [end - segment.length for end, segment in zip(ends, segments, strict=True)]
    prompt_starts = {
        segment.rows[0]: start
        for start, segment in zip(starts, segments, strict=True)
        if segment.is_prompt
    }
    return Places(
        start=torch.tensor(starts),
        length=torch.tensor([s.length for s in segments]),
        prompt_start=torch.tensor([prompt_starts.get(first_rows[s.rows[0]], 0) for s in segments]),
        prefix=torch.tensor([s.prefix for s in segments]),
    )


def padded(segments: list[Segment], placed: Places) -> Iterator[PaddedSegments]:
    """Pad the segments of each size to one another."""
    counts = [len(list(of_one_size)) for _, of_one_size in groupby(segments, lambda s: s.size)]
    for columns in zip(*(x.split(counts) for x in placed), strict=True):
        start, length, prompt_start, prefix = (x[:, None] for x in columns)
        query = torch.arange(int(length.max()))
        key = torch.arange(int((prefix + length).max()))
        own_key = start + (key - prefix).minimum(length - 1)
        yield PaddedSegments(
            queries=start + query.minimum(length - 1),
            keys=torch.where(key < prefix, prompt_start + key, own_key),
            is_key=key < prefix + length,
            outputs=(query < length).flatten().nonzero().squeeze(1),
            are_prompts=not bool(prefix.any()),
        )


def packed(placed: Places, device: torch.device) -> PackedSegments:
    """The segments without padding."""
    start, length, prompt_start, prefix = placed
    keys = prefix + length
    key_starts = F.pad(keys.cumsum(0), (1, 0))
    segment = torch.arange(len(keys)).repeat_interleave(keys)
    key = torch.arange(int(keys.sum())) - key_starts[segment]  # within its segment
    own_key = start[segment] + key - prefix[segment]
    return PackedSegments(
        keys=torch.where(key < prefix[segment], prompt_start[segment] + key, own_key).to(device),
        cu_seqlens_q=F.pad(length.cumsum(0), (1, 0)).int().to(device),
        cu_seqlens_k=key_starts.int().to(device),
        max_seqlen_q=int(length.max()),
        max_seqlen_k=int(keys.max()),
    )
