"""What the device holds of a rollout, and the step that decodes one more token in each slot."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlkl.policy.policy import Policy
from rlkl.rollout.one_pass import one_pass
from rlkl.rollout.slots import SlotCache
from rlkl.types import SamplingParams

# Kernels compiled by torch.compile, of one step: one for each batch size (256 … 8), doubled where
# prompts cross a bucket of the capacity, doubled again as evaluation samples in another way.
MOST_COMPILED = 64


class Sizes(NamedTuple):
    """What a `DecodeState` has room for."""

    slots: int
    capacity: int  # tokens of a slot: the prompt, and the response without its last token
    rows: int
    max_tokens: int  # of a response

    def hold(self, other: Sizes) -> bool:
        """Whether everything that fits `other` fits here, with responses of the same length."""
        pairs = zip(self, other, strict=True)
        return all(mine >= its for mine, its in pairs) and self.max_tokens == other.max_tokens


class DecodeState:
    """The tensors that a decoding step reads and writes in place.

    A *row* is a response; the last row is the idle row. A *slot* is a place in the cache.
    """

    def __init__(
        self,
        sizes: Sizes,
        params: SamplingParams,
        layers: int,
        logprob_dtype: torch.dtype,
        uniforms: Tensor,
    ) -> None:
        """Room for rows of `uniforms`' dtype and device. `reset` makes it ready."""
        slots, capacity, rows, max_tokens = sizes
        device = uniforms.device
        self.sizes = sizes
        self.params = params
        self.idle_row = rows
        self.eos_ids = torch.tensor(params.eos_ids, device=device, dtype=torch.long)

        # Per row.
        self.uniforms = uniforms.new_zeros(rows + 1, max_tokens)
        self.tokens = torch.zeros(rows + 1, max_tokens, device=device, dtype=torch.long)
        self.logprobs = torch.zeros(rows + 1, max_tokens, device=device, dtype=logprob_dtype)
        self.lengths = torch.zeros(rows + 1, device=device, dtype=torch.long)

        # Per slot: its row, the token it feeds next, the tokens sampled so far.
        self.cache = SlotCache(layers, slots, capacity, device)
        self.slot_row = torch.zeros(slots, device=device, dtype=torch.long)
        self.slot_token = torch.zeros_like(self.slot_row)
        self.slot_length = torch.zeros_like(self.slot_row)

    def reset(self, uniforms: Tensor) -> None:
        """Forget all rows and free all slots. uniforms: (B, T) of the rows to come."""
        self.uniforms[: len(uniforms)] = uniforms
        self.tokens.fill_(self.params.pad_id)
        self.logprobs.zero_()
        self.lengths.zero_()
        self.slot_row.fill_(self.idle_row)
        self.slot_token.zero_()
        self.slot_length.zero_()
        self.cache.reset()


def decode_step(state: DecodeState, policy: Policy, slots: int, max_length: int) -> None:
    """Sample one more token for each of the first `slots` slots, without the host.

    max_length: no slot reads more keys than this.
    """
    cache, params = state.cache, state.params
    row, column = state.slot_row[:slots], state.slot_length[:slots]
    cache.begin_step(slots, max_length)
    hidden = policy.backbone(
        input_ids=state.slot_token[:slots, None],
        position_ids=cache.positions[:slots, None],
        past_key_values=cache,
        use_cache=True,
        slots=cache,
    ).last_hidden_state
    # `one_pass` reads no padding ids, so no pass over the vocabulary is spent on masking them.
    logits = policy.logits(hidden[:, -1], mask_padding=False)
    token, logprob = one_pass(logits, state.uniforms[row, column], params)

    length = column + 1
    state.tokens[row, column] = token
    state.logprobs[row, column] = logprob
    state.lengths[row] = length

    not_eos = (token[:, None] != state.eos_ids).all(1)
    continues = not_eos & (length < state.sizes.max_tokens) & (row != state.idle_row)
    state.slot_row[:slots] = torch.where(continues, row, state.idle_row)
    state.slot_token[:slots] = token
    state.slot_length[:slots] = torch.where(continues, length, 0)
    cache.positions[:slots] = torch.where(continues, cache.positions[:slots] + 1, 0)


@functools.cache
def compiled_step() -> Callable[[DecodeState, Policy, int, int], None]:
    """`decode_step` under torch.compile. It is made once, so that rollouts share its kernels."""
    compiled = torch.compile(decode_step, fullgraph=True, dynamic=False)

    def step(state: DecodeState, policy: Policy, slots: int, max_length: int) -> None:
        with torch._dynamo.config.patch(recompile_limit=MOST_COMPILED):
            compiled(state, policy, slots, max_length)

    return step
