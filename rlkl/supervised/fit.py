"""The loop of supervised learning, for rlkl sft, reward-model and dpo.

An objective gives one unreduced loss per item. The denominator is that of the whole update and is
fixed before the update is cut into micro-batches, so the cut cannot change the gradient.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from math import ceil

import torch
from torch import Tensor, nn

from rlkl.errors import UserError
from rlkl.policy.optimizer import Optimizer, lr_scale
from rlkl.run.log import RunLog
from rlkl.run.terminal import Interrupt, log_line, progress
from rlkl.supervised.data import Item, microbatches, minibatches
from rlkl.supervised.schema import SupervisedConfig

MAX_SKIPS = 5  # updates in a row with a loss or a gradient that is not finite

# n items → (n,) losses in nats, and (n,) metrics by name
Objective = Callable[[list[Item]], tuple[Tensor, dict[str, Tensor]]]
Count = Callable[[Item], int]  # what the loss is averaged over: items, or response tokens


def count_items(item: Item) -> int:
    """Every item counts the same."""
    return 1


def count_response_tokens(item: Item) -> int:
    """Every response token counts the same."""
    return sum(len(response) for response in item.responses)


def cross_entropy(logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(n, T) log-probs, 0 outside the mask → (n,) -Σ_t log pi(a_t | s_t), the loss of SFT.

    With `count_response_tokens` it is averaged over the response tokens of the update.
    """
    return -logprobs.sum(1), {}


def fit(
    cfg: SupervisedConfig,
    model: nn.Module,
    objective: Objective,
    train: Sequence[Item],
    heldout: Sequence[Item],
    log: RunLog,
    count: Count = count_items,
) -> tuple[dict[str, float], dict[str, float]]:
    """Train for `optim.epochs`, and return the held-out metrics before and after.

    The log gets one row per update; the held-out metrics are in the last row of each epoch. Ctrl-C
    ends the training after the current update. Raises UserError once MAX_SKIPS updates in a row
    were not finite.
    """
    optim = cfg.optim
    optimizer = Optimizer(
        {"model": [p for p in model.parameters() if p.requires_grad]},
        {"model": optim.lr},
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
    )
    steps = optim.epochs * ceil(len(train) / optim.batch)
    before = after = evaluate(heldout, objective, optim.micro_tokens, count)
    updates = minibatches(train, optim.epochs, optim.batch, cfg.seed)
    skips = 0
    with Interrupt() as interrupt, progress("training", steps) as show_done:
        for step, (items, ends_epoch) in enumerate(updates, 1):
            start = time.perf_counter()
            metrics = accumulate_gradient(items, objective, optim.micro_tokens, count)
            scale = lr_scale(step - 1, steps, optim.warmup, optim.schedule)
            norms = optimizer.step(scale, metrics["loss"])
            skips = 0 if norms else skips + 1
            if skips == MAX_SKIPS:
                raise UserError(
                    f"{skips} updates in a row had a loss or a gradient that is not finite: try a "
                    "smaller optim.lr, a longer optim.warmup, or model.dtype=float32"
                )
            row = {"step": step, **metrics}
            row |= {f"grad_norm/{name}": norm for name, norm in norms.items()}
            row |= {"lr": optim.lr * scale, "rows": len(items)}
            row["seconds"] = time.perf_counter() - start
            if ends_epoch or interrupt.asked:
                after = evaluate(heldout, objective, optim.micro_tokens, count)
                row |= {f"eval/{name}": x for name, x in after.items()}
            log.write(row, None)
            show_done(step)
            if ends_epoch or step % cfg.log.every == 0:
                print_row(row)
            if interrupt.asked:
                break
    return before, after


@torch.no_grad()
def evaluate(
    items: Sequence[Item], objective: Objective, max_tokens: int, count: Count
) -> dict[str, float]:
    """The means of the loss and of the objective's metrics over `items`."""
    return run_microbatches(items, objective, max_tokens, count, backward=False)


def accumulate_gradient(
    items: Sequence[Item], objective: Objective, max_tokens: int, count: Count = count_items
) -> dict[str, float]:
    """Backward through one update, a micro-batch at a time. Returns the means of `evaluate`."""
    return run_microbatches(items, objective, max_tokens, count, backward=True)


def run_microbatches(
    items: Sequence[Item], objective: Objective, max_tokens: int, count: Count, *, backward: bool
) -> dict[str, float]:
    """Means over all items: the loss over Σ count(item), the metrics over the number of items."""
    denominator = sum(count(item) for item in items)
    means: dict[str, float] = defaultdict(float)
    for microbatch in microbatches(items, max_tokens):
        losses, metrics = objective(microbatch)
        loss = losses.sum() / denominator
        if backward:
            loss.backward()
        means["loss"] += loss.item()
        for name, x in metrics.items():
            means[name] += x.detach().sum().item() / len(items)
    return dict(means)


def print_row(row: dict[str, float]) -> None:
    """Print the metrics of one update in one line."""
    shown = {name: x for name, x in row.items() if name not in ("step", "lr", "rows")}
    numbers = "  ".join(f"{name} {x:.4g}" for name, x in shown.items())
    log_line(f"step {row['step']:5d}  {numbers}")
