"""Hidden states of the tokens of a batch, with each prompt read once, or row by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlkl.policy.attention import SHARED_PROMPTS, exchanged_attention, flash_serves
from rlkl.policy.shared_prompts import share_prompts
from rlkl.types import Batch


def hidden_states(backbone: Any, batch: Batch, shared_prompts: bool) -> Tensor:
    """(B, T+1, D) final hidden states after 0, 1, …, T response tokens.

    The only shift of the project is here: the state at index t has read t tokens of the response,
    so it predicts token t. What lies behind the last token of a response has no meaning.
    shared_prompts: read each prompt once; the states are the same. Raises Unsupported where the
    model's attention cannot be exchanged for one that does it.
    """
    if shared_prompts:
        return states_of_shared_prompts(backbone, batch)
    return states_of_rows(backbone, batch)


def states_of_shared_prompts(backbone: Any, batch: Batch) -> Tensor:
    """`hidden_states` from one row of tokens, in which each prompt is read once."""
    row = share_prompts(batch, flash=flash_serves(backbone, batch.prompt_ids.device))
    with exchanged_attention(backbone, SHARED_PROMPTS):
        output = backbone(
            input_ids=row.ids, position_ids=row.positions, use_cache=False, shared_prompts=row
        )
    return output.last_hidden_state[0, row.states]


def states_of_rows(backbone: Any, batch: Batch) -> Tensor:
    """`hidden_states` from B rows of prompt and response.

    The padding is moved behind the response. So no token sees it, and the model needs no mask
    beside its own causal one: its fast attention kernels apply.
    """
    attended = torch.cat([batch.prompt_mask, batch.attended], 1)
    width = max(int(attended.sum(1).max()), 1)
    order = (~attended).int().argsort(dim=1, stable=True)[:, :width]
    ids = torch.cat([batch.prompt_ids, batch.response_ids], 1).masked_fill(~attended, 0)
    output = backbone(
        input_ids=ids.gather(1, order),
        position_ids=torch.arange(width, device=ids.device).expand(len(ids), -1),
        use_cache=False,
    )
    tokens_read = torch.arange(batch.mask.shape[1] + 1, device=ids.device)
    place = batch.prompt_mask.sum(1, keepdim=True) - 1 + tokens_read
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    return output.last_hidden_state[rows, place.clamp(0, width - 1)]


def positions(attended: Tensor) -> Tensor:
    """(B, columns) bool → position ids that padding does not shift.

    Models with learned positions need them; rotary positions hide a mistake here.
    """
    return (attended.long().cumsum(1) - 1).clamp_min(0)
