"""The contract of tests/contract.py, for every built-in loss and advantage; and that it fails for what breaks it."""

import functools

import pytest
import torch

pytest.register_assert_rewrite("contract")

import contract  # noqa: E402
from contract import *  # noqa: E402, F403
from contract import pytest_generate_tests  # noqa: E402, F401


def reduced(new, batch):
    per_token = -(new.logprobs - batch.old_logprobs).exp() * batch.advantages
    return per_token.mean(), {}


def normalised_here(new, batch):
    """Divides by a token count of whatever micro-batch it sees."""
    return -(new.logprobs - batch.old_logprobs).exp() * batch.advantages / batch.mask.sum(), {}


def mean_over_padding(new, batch):
    ratio = (new.logprobs - batch.old_logprobs).mean(1, keepdim=True).exp()
    return -ratio * batch.advantages, {}


def writes(new, batch):
    batch.advantages.mul_(2)
    return -(new.logprobs - batch.old_logprobs).exp() * batch.advantages, {}


def signs_only(new, batch):
    return -(new.logprobs - batch.old_logprobs).exp() * batch.advantages.sign(), {}


def detached(new, batch):
    ratio = (new.logprobs - batch.old_logprobs).exp()
    return -ratio.detach() * batch.advantages * new.logprobs, {}


def wrong_way(new, batch):
    return (new.logprobs - batch.old_logprobs).exp() * batch.advantages, {}


@pytest.mark.parametrize(
    ("broken", "check", "arguments"),
    [
        (reduced, "test_a_loss_gives_one_finite_number_a_token_and_diagnostics_alike", ()),
        (normalised_here, "test_a_loss_compares_no_rows", ([[0], [1, 2, 3, 4, 5]],)),
        (mean_over_padding, "test_what_lies_behind_the_mask_changes_no_loss_and_no_gradient", ()),
        (writes, "test_a_loss_writes_to_nothing_it_is_given", ()),
        (signs_only, "test_the_policy_term_of_a_loss_scales_with_the_advantage", ()),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_contract_refuses_a_broken_loss(broken, check, arguments):
    with pytest.raises(AssertionError):
        getattr(contract, check)(functools.partial(broken), *arguments)


@pytest.mark.parametrize(
    ("odd", "check", "arguments"),
    [
        (detached, "test_the_gradient_of_a_loss_is_that_of_its_value", (0,)),
        (wrong_way, "test_at_ratio_one_a_loss_is_reinforce", ()),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_contract_reports_an_unusual_loss_and_refuses_it_among_ours(odd, check, arguments, monkeypatch):
    with pytest.raises(pytest.xfail.Exception), pytest.warns(UserWarning, match="gradient is not"):
        getattr(contract, check)(functools.partial(odd), *arguments)
    monkeypatch.setitem(contract.LOSSES, odd.__name__, odd)
    with pytest.raises(AssertionError, match="gradient is not"):
        getattr(contract, check)(functools.partial(odd), *arguments)


def leaks(rewards, values, mask, *, group_size):
    return rewards - rewards[mask].mean(), None


def blows_up(rewards, values, mask, *, group_size):
    """No guard against a group without spread, and an eps far too small."""
    returns = rewards.masked_fill(~mask, 0.0).sum(1).view(-1, group_size)
    a = (returns - returns.mean(1, keepdim=True) + 1e-8) / (returns.var(1, keepdim=True) + 1e-12)
    return a.view(-1, 1).expand(mask.shape) * mask, None


def by_column(rewards, values, mask, *, group_size):
    """Divides by the width of the padding."""
    return rewards.masked_fill(~mask, 0.0).mean(1, keepdim=True).expand(mask.shape) * mask, None


@pytest.mark.parametrize(
    ("broken", "check", "arguments"),
    [
        (leaks, "test_an_advantage_gives_one_number_a_token_and_zero_behind_the_mask", (False,)),
        (blows_up, "test_degenerate_groups_stay_finite", (2, False)),
        (by_column, "test_what_lies_behind_the_mask_changes_no_advantage", (0.0, False)),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_contract_refuses_a_broken_advantage(broken, check, arguments):
    with pytest.raises(AssertionError):
        getattr(contract, check)(functools.partial(broken), *arguments)


def test_the_broken_ones_are_broken_in_one_way_only():
    """They pass the check of shapes, so what refuses them is the property they lack."""
    for broken in (normalised_here, mean_over_padding, signs_only, detached):
        contract.test_a_loss_gives_one_finite_number_a_token_and_diagnostics_alike(functools.partial(broken))
    for broken in (blows_up, by_column):
        out, _ = broken(*(x.nan_to_num(0.0) for x in contract.credit()), group_size=contract.G)
        assert torch.isfinite(out).all()
