"""What flows through a training step.

Shape letters, in every file:  N prompts, G samples per prompt, B = N·G rows ordered "(n g)",
P prompt columns (left-padded), T reply columns (right-padded), D hidden size, V vocabulary.
Every per-token tensor is (B, T) and **indexed by reply token**: column t is about the t-th token of the reply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Example:
    """One problem: what the policy sees, and what its judge needs."""

    prompt: str | list[dict]  # raw text, or chat messages for the tokenizer's template
    answer: str = ""
    info: dict = field(default_factory=dict)

    @property
    def solution(self) -> str:
        """A whole right reply: the answer, or info["solution"] where the bare answer is not one."""
        return self.info.get("solution", self.answer)


class Head(NamedTuple):
    """The unembedding: logits = softcap · tanh((h @ weight.T + bias) · scale / softcap), minus the padding ids."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None  # ids from here on are padding rows of the embedding: their logits are -inf


class Sampling(NamedTuple):
    """The uniform → token rule that every rollout backend shares."""

    temperature: float = 1.0  # 0 = greedy, for evaluation and baselines; its log-probs are those of temperature 1
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    vocab_size: int | None = None
    top_k: int = 0  # evaluation only: a truncated sampling distribution biases the ratio
    top_p: float = 1.0
    min_p: float = 0.0
    stop: Callable[[list[int]], bool] | None = None  # evaluation only: do these ids of a reply hold a stop string?


class Evaluation(NamedTuple):
    """What a policy thinks of tokens that were already sampled; zero outside the mask. Log-probs in nats."""

    logprobs: Tensor  # (B, T) log pi(a_t | s_t), float32, of softmax(logits / batch.temperature)
    entropy: Tensor  # (B, T) H[pi(. | s_t)]
    values: Tensor | None = None  # (B, T) V(s_t); None without a critic
    last_values: Tensor | None = None  # (B,) V after the last sampled token, for truncation = bootstrap
    kl_pi_ref: Tensor | None = None  # (B, T) exact KL(pi || ref) at s_t; None unless a reference is given
    kl_ref_pi: Tensor | None = None  # (B, T) exact KL(ref || pi) at s_t


@dataclass(eq=False)
class Batch:
    """Everything a gradient step may read, filled from top to bottom by train.py.

    Every field is checked against the mask's shape as it is set (ValueError names the field), and every float per-token
    tensor is set to 0 outside the mask, so that nothing behind the mask can leak through inf · 0.
    """

    prompt_ids: Tensor  # (B, P) long
    prompt_mask: Tensor  # (B, P) bool, False on the left padding
    response_ids: Tensor  # (B, T) long
    mask: Tensor  # (B, T) bool, True on every sampled token *including the EOS*
    sampler_logprobs: Tensor  # (B, T) under the distribution that was actually sampled from
    truncated: Tensor  # (B,) bool, ran out of room before an EOS
    temperature: float = 1.0  # set by the sampler, read by every scorer: they cannot differ
    old_logprobs: Tensor | None = None  # (B, T) pi_old, by the training forward pass
    ref_logprobs: Tensor | None = None  # (B, T) the frozen reference
    values: Tensor | None = None  # (B, T) V_old
    rewards: Tensor | None = None  # (B, T) what each token is paid
    advantages: Tensor | None = None  # (B, T)
    returns: Tensor | None = None  # (B, T) value targets
    weights: Tensor | None = None  # (B, T) loss = (weights * per_token)[mask].sum()
    old_entropy: Tensor | None = None  # (B, T)
    selected: Tensor | None = None  # (B, T) bool, the tokens a selector picked
    ref_states: Tensor | None = None  # (B, T, D) the reference's final hidden states, for exact KL

    def __post_init__(self) -> None:
        for f in fields(self):  # the fields set before the mask could not be checked then
            setattr(self, f.name, getattr(self, f.name))

    def __setattr__(self, name: str, value: object) -> None:
        mask = self.__dict__.get("mask") if name != "mask" else None
        if isinstance(value, Tensor) and mask is not None:
            value = self._fit(name, value, mask)
        object.__setattr__(self, name, value)

    def _fit(self, name: str, value: Tensor, mask: Tensor) -> Tensor:
        prompt = (len(mask), *self.prompt_ids.shape[1:2])
        want = {"truncated": mask.shape[:1], "prompt_ids": prompt, "prompt_mask": prompt}.get(name, mask.shape)
        free = value.shape[2:3] if name == "ref_states" else ()  # D
        if value.shape != (*want, *free):
            raise ValueError(f"Batch.{name}: shape {*value.shape,}, expected {*want,}; the mask is {*mask.shape,}")
        if value.is_floating_point() and value.dim() > 1:
            return value.masked_fill(~(mask if value.dim() == 2 else mask[..., None]), 0.0)
        return value

    def __len__(self) -> int:
        return len(self.mask)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are filled in, by name."""
        return {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> Batch:
        return replace(self, **{name: x[rows] for name, x in self.tensors().items()})

    @property
    def attended(self) -> Tensor:
        """(B, T) bool: every column up to a row's last sampled token is context; what lies behind is padding."""
        return self.mask.flip(1).cummax(1).values.flip(1)

    def replies(self) -> list[list[int]]:
        """The ids of each reply, without padding."""
        return [ids[said].tolist() for ids, said in zip(self.response_ids.cpu(), self.mask.cpu(), strict=True)]

    def shuffle(self, generator: torch.Generator) -> Batch:
        """The rows in a random order."""
        return self[torch.randperm(len(self), generator=generator).to(self.mask.device)]

    def split(self, size: int) -> Iterator[Batch]:
        """Consecutive batches of `size` rows, the last one perhaps smaller."""
        return (self[i : i + size] for i in range(0, len(self), size))

    def microbatches(self, max_tokens: int) -> Iterator[tuple[list[int], Batch]]:
        """Longest rows first, trimmed, at most `max_tokens` padded positions each (one row at least): (rows, batch)."""
        prompts, replies = (x.sum(1).clamp_min(1).tolist() for x in (self.prompt_mask, self.attended))
        rows, width = [], (0, 0)
        for i in sorted(range(len(self)), key=lambda i: -(prompts[i] + replies[i])):
            wider = (max(width[0], prompts[i]), max(width[1], replies[i]))
            if rows and (len(rows) + 1) * sum(wider) > max_tokens:
                yield rows, self[rows].trim()
                rows, wider = [], (prompts[i], replies[i])
            rows, width = [*rows, i], wider
        yield rows, self[rows].trim()

    def trim(self) -> Batch:
        """Drop the columns that no row uses: padding on the left of prompts and on the right of replies."""
        first = self.prompt_ids.shape[1] - max(int(self.prompt_mask.sum(1).max()), 1)
        last = max(int(self.attended.sum(1).max()), 1)
        wide = {name: x for name, x in self.tensors().items() if x.dim() > 1}
        return replace(self, **{n: x[:, first:] if n.startswith("prompt") else x[:, :last] for n, x in wide.items()})

    @staticmethod
    def cat(batches: Sequence[Batch], pad_id: int = 0) -> Batch:
        """Join rows of several batches, padding prompts on the left and replies on the right to the widest."""
        if len({b.temperature for b in batches}) > 1:
            raise ValueError(f"Batch.cat: temperatures differ: {sorted({b.temperature for b in batches})}")
        widest = {p: max(getattr(b, p).shape[1] for b in batches) for p in ("prompt_ids", "mask")}

        def pad(name: str, x: Tensor) -> Tensor:
            if x.dim() == 1:
                return x
            prompt = name.startswith("prompt")
            extra = widest["prompt_ids" if prompt else "mask"] - x.shape[1]
            shape = (0, 0) * (x.dim() - 2) + ((extra, 0) if prompt else (0, extra))
            return F.pad(x, shape, value=pad_id if name.endswith("_ids") else 0)

        joined = {name: torch.cat([pad(name, getattr(b, name)) for b in batches]) for name in batches[0].tensors()}
        return replace(batches[0], **joined)
