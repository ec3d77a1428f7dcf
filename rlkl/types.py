"""What flows through a training step: examples, a batch of responses, and what a policy says of it.

Shape letters, in every file:

    N prompts    G samples per prompt    B = N·G rows, ordered "(n g)"
    P prompt columns (left-padded)       T response columns (right-padded)
    D hidden size                        V vocabulary size

Every per-token tensor is (B, T) and is **indexed by response token**: column t belongs to the t-th
token of the response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Example:
    """One problem: the prompt that the policy sees, and what the reward needs to know."""

    prompt: str | list[dict]  # raw text, or chat messages for the tokenizer's template
    answer: str = ""
    info: dict = field(default_factory=dict)
    has_answer: bool = True  # False: the data has only prompts

    @property
    def solution(self) -> str:
        """A complete correct response: `info["solution"]` where the bare answer is not one."""
        solution = self.info.get("solution")  # a column of this name may hold a number
        return solution if isinstance(solution, str) else self.answer


class Head(NamedTuple):
    """The unembedding: logits = softcap · tanh((h @ weight.T + bias) · scale / softcap)."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None  # ids from here on are padding rows: their logits are -inf


class SamplingParams(NamedTuple):
    """How a logits row and a uniform number become a token. Every rollout backend follows it."""

    temperature: float = 1.0  # 0 = greedy; its log-probs are those of temperature 1
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    vocab_size: int | None = None
    # For evaluation only: a truncated sampling distribution biases the importance ratio.
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: Callable[[list[int]], bool] | None = None  # do these ids contain a stop string?


UNSET: Any = None  # a field that nothing has filled yet, or that this configuration leaves out


class PolicyOutput(NamedTuple):
    """What a policy says of tokens that were already sampled. Nats; zero outside the mask.

    float32, and float64 for a float64 model.
    """

    logprobs: Tensor  # (B, T) log pi(a_t | s_t) of softmax(logits / batch.temperature)
    entropy: Tensor  # (B, T) entropy of pi(. | s_t)
    values: Tensor | None = None  # (B, T) V(s_t); None without a critic
    last_values: Tensor | None = None  # (B,) V after the last token, for truncation=bootstrap
    kl_pi_ref: Tensor = UNSET  # (B, T) exact KL(pi || ref) at s_t; None without a reference
    kl_ref_pi: Tensor = UNSET  # (B, T) exact KL(ref || pi) at s_t


@dataclass(eq=False)
class Batch:
    """Everything an optimizer step may read. train.py fills it, roughly from top to bottom.

    It is a plain dataclass: what is assigned is what is stored. A field that nothing has filled is
    None. `fill` is the one place that checks shapes and sets floats to 0 outside the mask, so that
    padding cannot leak through inf · 0.
    """

    prompt_ids: Tensor  # (B, P) long
    prompt_mask: Tensor  # (B, P) bool, False on the left padding
    response_ids: Tensor  # (B, T) long
    mask: Tensor  # (B, T) bool, True on every sampled token *including the EOS*
    sampler_logprobs: Tensor  # (B, T) under the distribution that was actually sampled from
    truncated: Tensor  # (B,) bool, True where the response ran out of room before an EOS
    temperature: float = 1.0  # set by the sampler and read by every scorer, so they cannot differ
    scores: Tensor = UNSET  # (B,) what the reward gave, NaN where it gave none
    old_logprobs: Tensor = UNSET  # (B, T) under pi_old, by the training forward pass
    old_entropy: Tensor = UNSET  # (B, T) of pi_old
    ref_logprobs: Tensor = UNSET  # (B, T) under the frozen reference
    ref_states: Tensor = UNSET  # (B, T, D) the reference's final hidden states, for exact KL
    values: Tensor = UNSET  # (B, T) V of the critic before the update
    last_values: Tensor = UNSET  # (B,) V after the last token
    baseline: Tensor = UNSET  # (B, T) score of the prompt's greedy response (remax)
    rewards: Tensor = UNSET  # (B, T) what each token is paid
    advantages: Tensor = UNSET  # (B, T)
    returns: Tensor = UNSET  # (B, T) targets of the values
    weights: Tensor = UNSET  # (B, T) loss = (weights * per_token)[mask].sum()
    selected: Tensor = UNSET  # (B, T) bool, the tokens that a selector picked

    def fill(self, **tensors: Tensor | None) -> None:
        """Store tensors by field name, floats as 0 outside the mask. None leaves a field as it is.

        Raises ValueError where a shape does not fit the mask.
        """
        for name, tensor in tensors.items():
            if tensor is not None:
                setattr(self, name, self._masked(name, tensor))

    def zero_padding(self) -> None:
        """Check the shapes of all fields, and set per-token floats to 0 outside the mask."""
        self.fill(**self.tensors())

    def _masked(self, name: str, tensor: Tensor) -> Tensor:
        rows, columns = self.mask.shape
        if name.startswith("prompt"):
            columns = self.prompt_ids.shape[-1]
        per_row = name in ("truncated", "scores", "last_values")
        expected = (rows,) if per_row else (rows, columns)
        if tensor.shape[:2] != expected or (tensor.dim() > 2 and name != "ref_states"):
            raise ValueError(
                f"Batch.{name}: shape {tuple(tensor.shape)}, expected {expected}, as the mask is "
                f"{tuple(self.mask.shape)}"
            )
        if not tensor.is_floating_point() or tensor.dim() == 1:
            return tensor
        inside = self.mask if tensor.dim() == 2 else self.mask[..., None]
        return tensor.masked_fill(~inside, 0.0)

    def __len__(self) -> int:
        return len(self.mask)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that hold a tensor, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: x for name, x in values.items() if isinstance(x, Tensor)}

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> Batch:
        return replace(self, **{name: x[rows] for name, x in self.tensors().items()})

    @property
    def attended(self) -> Tensor:
        """(B, T) bool: True up to a row's last sampled token. What lies behind it is padding."""
        return self.mask.flip(1).cummax(1).values.flip(1)

    def responses(self) -> list[list[int]]:
        """The token ids of each response, without padding."""
        rows = zip(self.response_ids.cpu(), self.mask.cpu(), strict=True)
        return [ids[sampled].tolist() for ids, sampled in rows]

    def without_rows(self, rows: Tensor) -> Batch:
        """The batch with no token in these rows, (B,) bool: their group is smaller from here on."""
        batch = replace(self, mask=self.mask & ~rows[:, None])
        batch.zero_padding()
        return batch

    def drop_zero_variance(self, group_size: int) -> Batch:
        """The rows of groups whose scores differ (DAPO, arXiv:2503.14476, eq. 11), trimmed.

        A group of equal scores has no advantage, yet costs a forward and a backward pass. NaN means
        no score. If every group has zero variance, all rows are kept: a batch cannot be empty.
        """
        rows = nonzero_variance(self.scores, group_size)
        return self[rows if rows.any() else torch.ones_like(rows)].trim()

    def trim(self) -> Batch:
        """Drop the columns that no row uses: left of the prompts and right of the responses."""
        first = self.prompt_ids.shape[1] - max(int(self.prompt_mask.sum(1).max()), 1)
        last = max(int(self.attended.sum(1).max()), 1)
        trimmed = {
            name: x[:, first:] if name.startswith("prompt") else x[:, :last]
            for name, x in self.tensors().items()
            if x.dim() > 1
        }
        return replace(self, **trimmed)

    @staticmethod
    def cat(batches: Sequence[Batch], pad_id: int = 0) -> Batch:
        """Join the rows of several batches, padding prompts on the left and responses on the right.

        Raises ValueError where their temperatures differ.
        """
        if len({b.temperature for b in batches}) > 1:
            different = sorted({b.temperature for b in batches})
            raise ValueError(f"Batch.cat: temperatures differ: {different}")
        prompt_columns = max(b.prompt_ids.shape[1] for b in batches)
        response_columns = max(b.mask.shape[1] for b in batches)

        def widen(name: str, x: Tensor) -> Tensor:
            if x.dim() == 1:
                return x
            if name.startswith("prompt"):
                padding = (prompt_columns - x.shape[1], 0)
            else:
                padding = (0, response_columns - x.shape[1])
            other_axes = (0, 0) * (x.dim() - 2)
            value = pad_id if name.endswith("_ids") else 0
            return F.pad(x, other_axes + padding, value=value)

        names = batches[0].tensors()
        joined = {
            name: torch.cat([widen(name, getattr(b, name)) for b in batches]) for name in names
        }
        return replace(batches[0], **joined)


class Rollout(NamedTuple):
    """G responses to each of N prompts, scored."""

    responses: Batch  # all responses to the step's N prompts: what the metrics describe
    batch: Batch  # those that are trained on
    score_parts: dict[str, Tensor]  # (B,) each, by the name of the reward or of its part
    examples: list[Example]  # (B) what each row responds to
    texts: list[str]  # (B) the text of each response
    metrics: dict[str, float]  # beside those of `responses`


def nonzero_variance(scores: Tensor, group_size: int) -> Tensor:
    """(B,) bool: the rows of groups whose scores differ. NaN means no score."""
    groups = rearrange(scores, "(n g) -> n g", g=group_size)
    highest = groups.nan_to_num(-torch.inf).amax(1)
    lowest = groups.nan_to_num(torch.inf).amin(1)
    return repeat(highest > lowest, "n -> (n g)", g=group_size)
