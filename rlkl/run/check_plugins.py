"""Try advantage, loss and selector once on a small random batch, before a run starts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlkl.advantages import token_rewards
from rlkl.errors import UserError, first_line
from rlkl.losses import Loss
from rlkl.types import UNSET, Batch, PolicyOutput


def check_plugins(
    advantage: Callable[..., tuple[Tensor, Tensor | None]],
    loss: Callable[[PolicyOutput, Batch], Loss],
    names: tuple[str, str],
    *,
    group_size: int,
    critic: bool,
    dense: bool = False,
    baseline: bool = False,
    selector: Callable[..., Tensor] | None = None,
) -> None:
    """Raise UserError where one fails, returns a wrong shape, or could never teach anything.

    names: of advantage and loss, for the messages.
    dense: every token is rewarded, as with the KL in the reward, and not only the last one.
    baseline: there is a baseline beside the critic, the score of the greedy response.
    """
    advantage_name, loss_name = names
    batch, new = random_batch(2 * group_size, critic, group_size)
    if dense:
        batch.fill(rewards=batch.rewards + 0.1 * batch.old_logprobs)
    if baseline:
        batch.fill(values=torch.full(batch.mask.shape, 0.25))
    with torch.random.fork_rng(devices=[]):
        check_advantage(advantage, advantage_name, batch, group_size, critic)
        if selector is not None:
            batch.selected = try_selector(selector, batch)
        check_loss(loss, loss_name, new, batch)


def check_advantage(
    advantage: Callable[..., tuple[Tensor, Tensor | None]],
    name: str,
    batch: Batch,
    group_size: int,
    critic: bool,
) -> None:
    """Fill the advantages and returns. UserError where nothing could be learned from them."""
    try:
        given = advantage(batch.rewards, batch.values, batch.mask, group_size=group_size)
    except Exception as error:
        raise UserError(f"advantage.name={name}: {reason(error)}") from error
    if not (isinstance(given, tuple | list) and len(given) == 2):
        raise UserError(
            f"advantage.name={name}: must return (advantages, returns), (B, T) tensors, or "
            f"(advantages, None) where it trains no critic; it returned a {type(given).__name__}"
        )
    advantages, returns = given
    try:
        batch.fill(advantages=advantages, returns=returns)
        all_zero = not advantages.any()
    except Exception as error:
        raise UserError(f"advantage.name={name}: {reason(error)}") from error
    if all_zero:
        where = f"advantage.name={name} with sampling.group_size={group_size}"
        if group_size == 1:
            raise UserError(
                f"{where} is zero for every response, so nothing would be learned: choose "
                "sampling.group_size >= 2"
            )
        raise UserError(
            f"{where} is zero for every response of a random batch in which one response of each "
            "group is right, so nothing would be learned: look at its options"
        )
    if critic and batch.returns is None:
        raise UserError(
            f"advantage.name={name} does not train a critic: set critic.kind=none, or "
            "advantage.name=gae"
        )


def check_loss(
    loss: Callable[[PolicyOutput, Batch], Loss], name: str, new: PolicyOutput, batch: Batch
) -> None:
    """UserError unless the loss and its diagnostics are (B, T), and the loss has a gradient."""
    shape = batch.mask.shape
    try:
        given = loss(new, batch)
    except Exception as error:
        raise UserError(f"loss.name={name}: {reason(error)}") from error
    if wrong := not_a_loss(given):
        raise UserError(
            f"loss.name={name}: must return (loss, diagnostics), a (B, T) tensor and a dict of "
            f"(B, T) tensors, which may be empty; {wrong}"
        )
    per_token, diagnostics = given
    tensors = {"loss": per_token, **diagnostics}
    wrong = {n: tuple(x.shape) for n, x in tensors.items() if x.shape != shape}
    if wrong:
        raise UserError(
            f"loss.name={name}: must return (B, T) tensors; for a {tuple(shape)} batch it "
            f"returned {wrong}"
        )
    if not per_token.requires_grad:
        raise UserError(
            f"loss.name={name}: its loss does not depend on new.logprobs, so it has no gradient"
        )


def not_a_loss(given: object) -> str:
    """What is wrong with a value that should be a tensor and a dict of tensors; "" if nothing."""
    if not (isinstance(given, tuple | list) and len(given) == 2 and isinstance(given[1], dict)):
        return f"it returned a {type(given).__name__}"
    tensors = {"the loss": given[0], **given[1]}
    kinds = {name: type(x).__name__ for name, x in tensors.items() if not isinstance(x, Tensor)}
    return ", ".join(f"{name} is a {kind}" for name, kind in kinds.items())


def check_kl(kl: Callable[..., Tensor], option: str, *, in_reward: bool) -> None:
    """UserError where a KL estimator fails on a random batch, or returns no (B, T) tensor.

    in_reward: it takes (logprobs, ref_logprobs), and (new, batch) otherwise.
    """
    batch, new = random_batch(4, critic=False)
    try:
        arguments = (batch.old_logprobs, batch.ref_logprobs) if in_reward else (new, batch)
        shape = tuple(kl(*arguments).shape)
    except Exception as error:
        raise UserError(f"{option}: {reason(error)}") from error
    if shape != tuple(batch.mask.shape):
        raise UserError(
            f"{option}: must return a (B, T) tensor; for a {tuple(batch.mask.shape)} batch it "
            f"returned {shape}"
        )


def try_selector(selector: Callable[..., Tensor], batch: Batch) -> Tensor:
    """(B, T) bool: the tokens that it selects. UserError where it returns anything else."""
    try:
        selected = selector(batch, torch.rand(batch.mask.shape, dtype=torch.float64))
    except Exception as error:
        raise UserError(f"selector.name: {reason(error)}") from error
    if selected.shape != batch.mask.shape or selected.dtype != torch.bool:
        raise UserError(
            f"selector.name: must return a (B, T) bool tensor; for a {tuple(batch.mask.shape)} "
            f"batch it returned {selected.dtype} of shape {tuple(selected.shape)}"
        )
    return selected


def needs_exact_kl(kl_loss: Callable[[PolicyOutput, Batch], Tensor]) -> bool:
    """Does a KL loss term read `new.kl_pi_ref` or `new.kl_ref_pi`?

    It is tried without them, then with them. Raises UserError if it fails both times.
    """
    batch, without = random_batch(4, critic=False)
    exact = without._replace(kl_pi_ref=without.entropy, kl_ref_pi=without.entropy)
    problem = "it returned no (B, T) tensor"
    for new in (without, exact):
        try:
            kl = kl_loss(new, batch)
        except Exception as error:
            problem = reason(error)
            continue
        if isinstance(kl, Tensor) and kl.shape == batch.mask.shape:
            return new is exact
    raise UserError(
        f"kl_ref.estimator: as a loss term (new, batch) -> (B, T) it does not work: {problem}"
    )


def reason(error: Exception) -> str:
    """The message of an exception; with its type, unless it is a ValueError raised for the user."""
    message = first_line(error)
    if type(error) is ValueError:
        return message
    return f"failed on a random batch: {type(error).__name__}: {message}"


def random_batch(rows: int, critic: bool, group: int = 2) -> tuple[Batch, PolicyOutput]:
    """`rows` ragged responses before their advantages are known, and a policy's output on them.

    The output is near the batch's old log-probs, and requires gradients. One response of each group
    is right.
    """
    rng = torch.Generator().manual_seed(0)
    columns = 4

    def normal() -> Tensor:
        return torch.randn(rows, columns, generator=rng)

    mask = torch.arange(columns) < torch.randint(1, columns + 1, (rows, 1), generator=rng)
    ids = torch.zeros(rows, columns, dtype=torch.long)
    old_logprobs = -normal().abs()
    scores = (torch.arange(rows) % max(group, 2) == 0).float()
    batch = Batch(
        prompt_ids=ids,
        prompt_mask=torch.ones(rows, columns, dtype=torch.bool),
        response_ids=ids,
        mask=mask,
        sampler_logprobs=old_logprobs,
        truncated=torch.zeros(rows, dtype=torch.bool),
        old_logprobs=old_logprobs,
        ref_logprobs=old_logprobs - 0.1 * normal(),
        values=normal() if critic else UNSET,
        scores=scores,
        rewards=token_rewards(scores, mask),
        old_entropy=normal().abs(),
    )
    batch.zero_padding()
    new = PolicyOutput(
        logprobs=(old_logprobs + 0.1 * normal()).requires_grad_(),
        entropy=normal().abs().requires_grad_(),
        values=normal().requires_grad_() if critic else None,
        last_values=torch.zeros(rows) if critic else None,
    )
    return batch, new
