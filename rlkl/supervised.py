"""Supervised learning in one loop: what to say (sft), or which of two replies is better (reward-model, dpo).

An objective gives one loss an item, unreduced; the denominator is that of the whole update, before it is cut.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlkl.errors import UserError
from rlkl.log import RunLog
from rlkl.model import encode, left_pad
from rlkl.optim import Optimizer, lr_scale
from rlkl.schema_supervised import Fit, Supervised
from rlkl.seeds import generator
from rlkl.terminal import Interrupt, console, progress, say
from rlkl.types import Batch

MAX_SKIPS = 5  # updates in a row that were not finite


class Item(NamedTuple):
    """A prompt and the K replies to it that one loss is about: one, or a chosen and a rejected one. Token ids."""

    prompt: list[int]
    replies: tuple[list[int], ...]

    @property
    def width(self) -> int:
        return len(self.prompt) + max(map(len, self.replies))


Objective = Callable[[list[Item]], tuple[Tensor, dict[str, Tensor]]]  # n items → (n,) losses, {name: (n,)} measures


def item_of(tokenizer: Any, prompt: str | list[dict], replies: Sequence[str],
            truncated: Sequence[bool] = ()) -> Item:
    """Text → token ids. A reply that was finished ends with the EOS, an action like any other.

    UserError where chat messages meet a tokenizer without a chat template.
    """
    asked = encode(tokenizer, prompt)
    if not asked:
        raise UserError(f"the prompt {prompt!r} has no tokens: there is nothing to reply to")
    said = [tokenizer(r, add_special_tokens=False).input_ids for r in replies]
    cut = truncated or [False] * len(said)
    return Item(asked, tuple(r + [tokenizer.eos_token_id] * (not c) for r, c in zip(said, cut, strict=True)))


def collate(items: Sequence[Item], pad_id: int, device: str | torch.device = "cpu") -> Batch:
    """n items of K replies → a Batch of n·K rows ordered "(n k)", as if a sampler had given these tokens."""
    prompt_ids, prompt_mask = left_pad([item.prompt for item in items for _ in item.replies], pad_id, device)
    replies = [reply for item in items for reply in item.replies]
    lengths = torch.tensor([len(r) for r in replies], device=device)
    ids = nn.utils.rnn.pad_sequence([torch.tensor(r, device=device, dtype=torch.long) for r in replies],
                                    batch_first=True, padding_value=pad_id)
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    zeros = torch.zeros(ids.shape, device=device)
    return Batch(prompt_ids, prompt_mask, ids, mask, zeros, torch.zeros_like(lengths, dtype=torch.bool))


def microbatches(items: Sequence[Item], max_tokens: int) -> Iterator[list[Item]]:
    """Longest first, at most `max_tokens` padded tokens each, one item at least."""
    some: list[Item] = []
    for item in sorted(items, key=lambda item: -item.width):
        if some and (len(some) + 1) * len(item.replies) * some[0].width > max_tokens:
            yield some
            some = []
        some.append(item)
    if some:
        yield some


def that_fit(items: Iterable[Item], limit: int | None, what: str) -> list[Item]:
    """The items of at most `limit` tokens; the others are counted. UserError if none is left."""
    items = list(items)
    kept = [i for i in items if all(i.replies) and (limit is None or i.width <= limit)]
    if len(kept) < len(items):
        said = f"{len(items) - len(kept)} of {len(items)} {what} have no tokens, or more than {limit}"
        if not kept:
            raise UserError(f"{said}; none is left: raise max_tokens, or take a model with a longer context")
        console.print(f"[yellow]note:[/] dropped: {said}")
    return kept


def one(item: Item) -> int:
    return 1


def reply_tokens(item: Item) -> int:
    return sum(map(len, item.replies))


def cross_entropy(logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(n, T) log-probs, 0 outside the mask → (n,) nats. Over Σ `reply_tokens`, every token counts alike."""
    return -logprobs.sum(1), {}


def accumulate(items: Sequence[Item], objective: Objective, max_tokens: int, units: Callable[[Item], int] = one
               ) -> dict[str, float]:
    """Means over `items`, however they are cut: the loss over Σ units, what else is measured over their number.

    Their gradient is added to the parameters', if gradients are on.
    """
    total, sums = sum(map(units, items)), defaultdict(float)
    for micro in microbatches(items, max_tokens):
        losses, measures = objective(micro)
        loss = losses.sum() / total
        if torch.is_grad_enabled():
            loss.backward()
        sums["loss"] += loss.item()
        for name, x in measures.items():
            sums[name] += x.detach().sum().item() / len(items)
    return dict(sums)


def updates(rows: Sequence[Item], how: Fit, seed: int) -> Iterator[tuple[list[Item], bool]]:
    """(rows of an update, is it the last of its epoch): every epoch sees each row once, in an order of its own."""
    for epoch in range(how.epochs):
        order = torch.randperm(len(rows), generator=generator(seed, epoch, "order")).split(how.batch)
        for i, chosen in enumerate(order):
            yield [rows[j] for j in chosen.tolist()], i + 1 == len(order)


def fit(cfg: Supervised, module: nn.Module, objective: Objective, train: Sequence[Item], heldout: Sequence[Item],
        log: RunLog, units: Callable[[Item], int] = one) -> tuple[dict[str, float], dict[str, float]]:
    """Train for the epochs of cfg.optim, a row of metrics an update; returns what is held out, before and after.

    UserError once MAX_SKIPS updates in a row are not finite. Ctrl-C ends it after the update it is in.
    """
    how, skips = cfg.optim, 0
    optimizer = Optimizer({"model": [p for p in module.parameters() if p.requires_grad]}, {"model": how.lr},
                          betas=how.betas, weight_decay=how.weight_decay, max_grad_norm=how.max_grad_norm)
    steps = how.epochs * ceil(len(train) / how.batch)

    def measure() -> dict[str, float]:
        with torch.no_grad():
            return accumulate(heldout, objective, how.micro_tokens, units)

    before = after = measure()
    with Interrupt() as interrupt, progress(0, steps) as advance:
        for step, (rows, last) in enumerate(updates(train, how, cfg.seed)):
            clock, scale = time.perf_counter(), lr_scale(step, steps, how.warmup, how.schedule)
            found = accumulate(rows, objective, how.micro_tokens, units)
            norms = optimizer.step(scale, found["loss"])
            skips = 0 if norms else skips + 1
            if skips == MAX_SKIPS:
                raise UserError(f"{skips} updates in a row had a loss or a gradient that is not finite: try a smaller "
                                "optim.lr, a longer optim.warmup, or model.dtype=float32")
            row = {"step": step + 1, **found, **{f"grad_norm/{name}": x for name, x in norms.items()},
                   "lr": how.lr * scale, "rows": len(rows), "seconds": time.perf_counter() - clock}
            if last or interrupt.asked:
                after = measure()
                row |= {f"heldout/{name}": x for name, x in after.items()}
            log.write(row, None)
            advance(step + 1)
            if (step + 1) % cfg.log.every == 0 or last:
                say(f"step {step + 1:5d}  " + "  ".join(
                    f"{name} {x:.4g}" for name, x in row.items() if name not in ("step", "lr", "rows")))
            if interrupt.asked:
                break
    return before, after
