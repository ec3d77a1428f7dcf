"""What must hold before the first rollout: the plug-ins are tried once on a small random batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlkl.errors import UserError, first_line
from rlkl.losses import Loss
from rlkl.rewards import token_rewards
from rlkl.types import Batch, Evaluation


def check_plugins(advantage: Callable[..., tuple[Tensor, Tensor | None]], loss: Callable[[Evaluation, Batch], Loss],
                  names: tuple[str, str], *, group_size: int, critic: bool, dense: bool = False, baseline: bool = False,
                  selector: Callable[..., Tensor] | None = None) -> None:
    """Run them on two random prompts. UserError where they raise, give wrong shapes, or could never teach anything.

    `dense`: every token is paid, as with KL in the reward, and not the last one alone. `baseline`: there is one beside
    the critic, the score of the greedy reply.
    """
    batch, new = random_batch(2 * group_size, critic, group_size)
    if dense:
        batch.rewards = batch.rewards + 0.1 * batch.old_logprobs
    if baseline:
        batch.values = batch.rewards.new_full(batch.mask.shape, 0.25)
    with torch.random.fork_rng(devices=[]):
        try:
            batch.advantages, batch.returns = advantage(batch.rewards, batch.values, batch.mask, group_size=group_size)
        except Exception as error:
            raise UserError(f"advantage.name={names[0]}: {_said(error)}") from error
        if not batch.advantages.any():
            raise UserError(
                f"advantage.name={names[0]} with sampling.group_size={group_size} is zero for every reply, so nothing "
                "would be learned: choose sampling.group_size >= 2"
            )
        if critic and batch.returns is None:
            raise UserError(
                f"advantage.name={names[0]} does not train a critic: set model.critic=none, or advantage.name=gae")
        if selector is not None:
            batch.selected = _selected(selector, batch)
        try:
            per_token, stats = loss(new, batch)
        except Exception as error:
            raise UserError(f"loss.name={names[1]}: {_said(error)}") from error
    wrong = {n: tuple(x.shape) for n, x in {"loss": per_token, **stats}.items() if x.shape != batch.mask.shape}
    if wrong:
        raise UserError(
            f"loss.name={names[1]}: must give (B, T) tensors; for a {tuple(batch.mask.shape)} batch it gave {wrong}")
    if not per_token.requires_grad:
        raise UserError(f"loss.name={names[1]}: its loss does not depend on new.logprobs, so it has no gradient")
    if critic and torch.autograd.grad(per_token.sum(), new.values, allow_unused=True)[0] is None:
        raise UserError(f"loss.name={names[1]} does not train the critic: set model.critic=none, or loss.name=ppo")


def _selected(selector: Callable[..., Tensor], batch: Batch) -> Tensor:
    try:
        selected = selector(batch, torch.rand(batch.mask.shape, dtype=torch.float64))
    except Exception as error:
        raise UserError(f"selector.name: {_said(error)}") from error
    if selected.shape != batch.mask.shape or selected.dtype != torch.bool:
        raise UserError(f"selector.name: must give a (B, T) bool tensor; it gave {selected.dtype} of shape "
                        f"{tuple(selected.shape)} for a {tuple(batch.mask.shape)} batch")
    return selected


def needs_exact_kl(term: Callable[[Evaluation, Batch], Tensor]) -> bool:
    """Does a KL loss term read `new.kl_pi_ref` or `new.kl_ref_pi`? Tried without them, then with them.

    UserError if it works neither way.
    """
    batch, new = random_batch(4, critic=False)
    exact = new._replace(kl_pi_ref=new.entropy, kl_ref_pi=new.entropy)
    reason = "it gave no (B, T) tensor"
    for evaluation in (new, exact):
        try:
            found = term(evaluation, batch)
        except Exception as error:
            reason = _said(error)
            continue
        if isinstance(found, Tensor) and found.shape == batch.mask.shape:
            return evaluation is exact
    raise UserError(f"kl_ref.estimator: as a loss term (new, batch) -> (B, T) it does not work: {reason}")


def _said(error: Exception) -> str:
    said = first_line(error)
    return said if type(error) is ValueError else f"failed on a random batch: {type(error).__name__}: {said}"


def random_batch(rows: int, critic: bool, group: int = 2) -> tuple[Batch, Evaluation]:
    """`rows` ragged replies as they look before credit is given, and an evaluation near them that carries gradients."""
    g, columns = torch.Generator().manual_seed(0), 4

    def normal() -> Tensor:
        return torch.randn(rows, columns, generator=g)

    mask = torch.arange(columns) < torch.randint(1, columns + 1, (rows, 1), generator=g)
    ids, ones = torch.zeros(rows, columns, dtype=torch.long), torch.ones(rows, columns, dtype=torch.bool)
    old, scores = -normal().abs(), torch.arange(rows) % max(group, 2) == 0  # one right reply in every group
    batch = Batch(ids, ones, ids, mask, old, torch.zeros(rows, dtype=torch.bool), old_logprobs=old,
                  ref_logprobs=old - 0.1 * normal(), values=normal() if critic else None,
                  rewards=token_rewards(scores.float(), mask), old_entropy=normal().abs())
    new = Evaluation((old + 0.1 * normal()).requires_grad_(), normal().abs().requires_grad_(),
                     normal().requires_grad_() if critic else None, torch.zeros(rows) if critic else None)
    return batch, new
