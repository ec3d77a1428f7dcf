"""The contract of tests/contract.py, for every built-in entry of each kind; and that it fails for what breaks it."""

import functools
import re
import time

import pytest
import torch

from rlkl.errors import UserError
from rlkl.rewards import from_task
from rlkl.types import Example

pytest.register_assert_rewrite("contract")

import contract  # noqa: E402
from contract import *  # noqa: E402, F403
from contract import pytest_generate_tests  # noqa: E402


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


# KL as a number
def good_estimator(logprobs, ref_logprobs, *, most: float = 20.0):
    """k3, held."""
    x = (ref_logprobs - logprobs).clamp(-most, most)
    return x.exp() - 1 - x


def over_the_row(logprobs, ref_logprobs):
    """The mean of a row, padding and all."""
    return (logprobs - ref_logprobs).mean(1, keepdim=True).expand_as(logprobs)


def summed_up(logprobs, ref_logprobs):
    return (logprobs - ref_logprobs).sum(1)


def overflows(logprobs, ref_logprobs):
    return (ref_logprobs - logprobs).exp() - 1 - (ref_logprobs - logprobs)


def never_zero(logprobs, ref_logprobs):
    return (logprobs - ref_logprobs).abs() + 1e-6


def in_place(logprobs, ref_logprobs):
    return logprobs.sub_(ref_logprobs)


def positional_option(logprobs, ref_logprobs, coef=0.1):
    return coef * (logprobs - ref_logprobs)


@pytest.mark.parametrize(
    ("broken", "check", "arguments"),
    [
        (summed_up, "test_an_estimator_gives_one_finite_number_a_token", ()),
        (overflows, "test_an_estimator_gives_one_finite_number_a_token", ()),
        (over_the_row, "test_an_estimator_looks_at_no_other_token", (7.0,)),
        (never_zero, "test_an_estimator_is_zero_where_the_policies_are_equal", ()),
        (in_place, "test_an_estimator_writes_to_nothing_it_is_given", ()),
        (positional_option, "test_the_options_of_an_estimator_are_keywords", ()),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_contract_refuses_a_broken_estimator(broken, check, arguments):
    with pytest.raises(AssertionError):
        getattr(contract, check)(functools.partial(broken), *arguments)


def detached_estimator(logprobs, ref_logprobs):
    return (logprobs - ref_logprobs.detach()) * (logprobs - ref_logprobs).detach()


# KL as a loss term
def good_term(new, batch, *, weighted: bool = True):
    ratio = (new.logprobs - batch.old_logprobs).clamp(-20, 20).exp() if weighted else 1.0
    return ratio * good_estimator(new.logprobs, batch.ref_logprobs)


def behind_the_mask(new, batch):
    """The whole reply's u, padding included."""
    u = new.logprobs - batch.ref_logprobs
    return u.detach().sum(1, keepdim=True) * u


def over_the_batch(new, batch):
    """Divides by a token count of whatever micro-batch it sees."""
    return (new.logprobs - batch.ref_logprobs).square() / batch.mask.sum()


def without_gradient(new, batch):
    return (new.logprobs - batch.ref_logprobs).detach().square()


def of_another_policy(new, batch):
    """KL to what the sampler said, which is not what it is called."""
    return (new.logprobs - batch.sampler_logprobs).square()


def writes_the_reference(new, batch):
    batch.ref_logprobs.sub_(new.logprobs.detach())
    return new.logprobs * batch.ref_logprobs


def k1_term(new, batch):
    return new.logprobs - batch.ref_logprobs


def detached_term(new, batch):
    return (new.logprobs - batch.ref_logprobs) * (new.logprobs - batch.ref_logprobs).detach()


@pytest.mark.parametrize(
    ("broken", "check", "arguments"),
    [
        (without_gradient, "test_a_term_gives_one_finite_number_a_token_that_depends_on_the_policy", ()),
        (behind_the_mask, "test_what_lies_behind_the_mask_changes_no_term_and_no_gradient", ()),
        (over_the_batch, "test_a_term_compares_no_rows", ([[0], [1, 2, 3, 4, 5]],)),
        (of_another_policy, "test_a_term_is_zero_where_the_policies_are_equal", ()),
        (writes_the_reference, "test_a_term_writes_to_nothing_it_is_given", ()),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_contract_refuses_a_broken_term(broken, check, arguments):
    with pytest.raises(AssertionError):
        getattr(contract, check)(functools.partial(broken), *arguments)


@pytest.mark.parametrize(
    ("odd", "check", "arguments", "table"),
    [
        (detached_estimator, "test_the_gradient_of_an_estimator_is_that_of_its_value", (0,), "KL"),
        (detached_term, "test_the_gradient_of_a_term_is_that_of_its_value", (0,), "TERMS"),
        (k1_term, "test_a_term_is_zero_where_the_policies_are_equal", (), "TERMS"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_contract_reports_an_unusual_kl_and_refuses_it_among_ours(odd, check, arguments, table, monkeypatch):
    """k1 as a loss is noise of zero mean: legal in a file of your own, refused in the library."""
    with pytest.raises(pytest.xfail.Exception), pytest.warns(UserWarning, match="gradient is not"):
        getattr(contract, check)(functools.partial(odd), *arguments)
    monkeypatch.setitem(getattr(contract, table), odd.__name__, odd)
    with pytest.raises(AssertionError, match="gradient is not"):
        getattr(contract, check)(functools.partial(odd), *arguments)


def test_an_estimator_and_a_term_are_told_apart_by_their_arguments():
    assert [contract.kind_of_kl(f) for f in (good_estimator, good_term)] == ["estimator", "term"]
    assert {contract.kind_of_kl(f) for f in contract.KL.values()} == {"estimator"}
    assert {contract.kind_of_kl(f) for f in contract.TERMS.values()} == {"term"}


# Selectors
def by_threshold_over_padding(batch, uniforms):
    """Above the mean of all columns, padding among them."""
    return batch.mask & (batch.old_entropy > batch.old_entropy.mean())


def the_first_row(batch, uniforms):
    return batch.mask & (torch.arange(len(batch)) == 0)[:, None]


def everywhere(batch, uniforms):
    return torch.ones_like(batch.mask)


def as_numbers(batch, uniforms):
    return batch.mask.float()


@pytest.mark.parametrize(
    ("broken", "check", "arguments"),
    [
        (everywhere, "test_a_selector_picks_sampled_tokens_at_least_one", (0,)),
        (as_numbers, "test_a_selector_picks_sampled_tokens_at_least_one", (0,)),
        (by_threshold_over_padding, "test_a_selector_sees_neither_padding_nor_the_order_of_rows", ()),
        (the_first_row, "test_a_selector_sees_neither_padding_nor_the_order_of_rows", ()),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_contract_refuses_a_broken_selector(broken, check, arguments):
    with pytest.raises(AssertionError):
        getattr(contract, check)(functools.partial(broken), *arguments)


# Tasks
class Squares:
    """A good one: n² of n = 1 … 20, every fifth held out."""

    def __init__(self, split, *, most: int = 20):
        self.numbers = [n for n in range(1, most + 1) if (n % 5 == 0) == (split == "heldout")]

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        return Example(f"{self.numbers[index]}² = ", str(self.numbers[index] ** 2))

    def score(self, example, reply):
        return {"right": float(reply.strip() == example.answer), "short": -0.1 * (len(reply) > 100)}


class RaisesOnNothing(Squares):
    def score(self, example, reply):
        return float(reply.split()[0] == example.answer)


class ReadsNumbers(Squares):
    """float("nan") is a number to Python, and 1e999 is infinite."""

    def score(self, example, reply):
        try:
            return 1 - abs(float(reply) - float(example.answer))
        except ValueError:
            return 0.0


class ReadsIntegers(Squares):
    """int() of more than 4300 digits raises."""

    def score(self, example, reply):
        return float(reply.isascii() and reply.isdigit() and int(reply) == int(example.answer))


class RunsAway(Squares):
    """A nested quantifier: exponential in the length of a reply that does not match."""

    def score(self, example, reply):
        return float(bool(re.fullmatch(r"(a+)+", reply)) or reply == example.answer)


class Sleeps(Squares):
    def score(self, example, reply):
        time.sleep(60 * (len(reply) > 9000))
        return float(reply == example.answer)


class Remembers(Squares):
    """Pays for an answer once."""

    def score(self, example, reply):
        self.paid = {*getattr(self, "paid", ()), (example.prompt, reply)}
        return float(reply == example.answer) / len(self.paid)


class Leaks(Squares):
    """Holds out what it trains on."""

    def __init__(self, split):
        super().__init__("train")


class Empty(Squares):
    def __init__(self, split):
        super().__init__(split, most=4)


class Silent(Squares):
    def __getitem__(self, index):
        return Example("", "1")


class PaysForNothing(Squares):
    def score(self, example, reply):
        return float(example.answer.startswith(reply))


class WantsAFormat(Squares):
    def score(self, example, reply):
        return float(reply == f"#### {example.answer}")


@pytest.mark.parametrize(
    ("broken", "check", "arguments"),
    [
        (Empty, "test_a_task_is_a_list_of_examples", ("heldout",)),
        (Silent, "test_a_task_is_a_list_of_examples", ("train",)),
        (Leaks, "test_no_prompt_is_both_trained_on_and_held_out", ()),
        (RaisesOnNothing, "test_a_score_is_a_finite_number_whatever_the_reply", ()),
        (ReadsNumbers, "test_a_score_is_a_finite_number_whatever_the_reply", ()),
        (ReadsIntegers, "test_a_score_takes_no_time_however_long_the_reply", ("9",)),
        (RunsAway, "test_a_score_takes_no_time_however_long_the_reply", ("a",)),
        (Sleeps, "test_a_score_takes_no_time_however_long_the_reply", ("a",)),
        (Remembers, "test_a_score_depends_on_nothing_but_the_example_and_the_reply", ()),
        (PaysForNothing, "test_the_right_answer_scores_one_and_an_empty_reply_less", ()),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_contract_refuses_a_broken_task(broken, check, arguments):
    with pytest.raises((AssertionError, IndexError, ValueError)):
        getattr(contract, check)(functools.partial(broken), *arguments)


def test_the_contract_reports_a_task_whose_bare_answer_is_not_enough(monkeypatch):
    check = contract.test_the_right_answer_scores_one_and_an_empty_reply_less
    with pytest.raises(pytest.xfail.Exception), pytest.warns(UserWarning, match="the bare answer '1' scores 0"):
        check(functools.partial(WantsAFormat))
    monkeypatch.setitem(contract.TASKS, "format", WantsAFormat)
    with pytest.raises(AssertionError, match="the bare answer"):
        check(functools.partial(WantsAFormat))


# Rewards
PROBLEMS = [Example("1+1=", "2"), Example("3+4=", "7")]


def good_reward(examples, replies, batch, *, bonus: float = 0.5):
    """Right, and short of the longest reply of its prompt: groups may be compared, as they stay together."""
    right = torch.tensor([float(e.answer == r) for e, r in zip(examples, replies, strict=True)])
    lengths = batch.mask.sum(1).view(-1, contract.G)
    short = bonus * (lengths < lengths.amax(1, keepdim=True)).flatten()
    return right + short, {"right": right, "short": short}


def by_position(examples, replies, batch):
    """The first reply wins."""
    return torch.arange(len(replies), 0.0, -1), {}


def same_as_before(examples, replies, batch):
    """Compares each reply with the row above it."""
    return torch.tensor([float(len(r) > len(q)) for r, q in zip(replies, ["", *replies], strict=False)]), {}


def parts_by_position(examples, replies, batch):
    return torch.zeros(len(replies)), {"rank": torch.arange(len(replies))}


def by_width(examples, replies, batch):
    """Of the padded tensor, not of the reply."""
    return torch.full((len(replies),), 1.0 / batch.mask.shape[1]), {}


def sorts(examples, replies, batch):
    replies.sort()
    return torch.zeros(len(replies)), {}


def one_for_all(examples, replies, batch):
    return torch.tensor(1.0), {}


def part_of_another_shape(examples, replies, batch):
    return torch.zeros(len(replies)), {"right": torch.zeros(2)}


def mean_length_of_words(examples, replies, batch):
    return torch.tensor([len(r) / len(r.split()) for r in replies]), {}


@pytest.mark.parametrize(
    ("broken", "check", "arguments"),
    [
        (one_for_all, "test_a_reward_gives_one_finite_score_a_reply_and_parts_alike", ()),
        (part_of_another_shape, "test_a_reward_gives_one_finite_score_a_reply_and_parts_alike", ()),
        (mean_length_of_words, "test_a_reward_gives_one_finite_score_a_reply_and_parts_alike", ()),
        (by_position, "test_the_scores_follow_their_rows", ([3, 4, 5, 0, 1, 2],)),
        (same_as_before, "test_the_scores_follow_their_rows", ([3, 4, 5, 0, 1, 2],)),
        (parts_by_position, "test_the_scores_follow_their_rows", ([2, 0, 1, 4, 5, 3],)),
        (by_width, "test_what_lies_behind_the_mask_changes_no_score", ()),
        (sorts, "test_a_reward_writes_to_nothing_it_is_given", ()),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_contract_refuses_a_broken_reward(broken, check, arguments):
    with pytest.raises((AssertionError, UserError)):
        getattr(contract, check)(functools.partial(broken), PROBLEMS, *arguments)


# What is sound passes, every check of its kind
GOOD = [
    ("estimator", functools.partial(good_estimator)), ("term", functools.partial(good_term)),
    ("task", functools.partial(Squares)), ("reward", functools.partial(good_reward)),
    ("reward", from_task(Squares("train").score))]
CASES = {
    "seed": [(0,)], "junk": [(7.0,), (float("nan"),)], "cut": [([[5, 1], [3, 0, 2], [4]],)], "split": [("heldout",)],
    "piece": [(piece,) for piece in contract.LONG], "order": [([3, 4, 5, 0, 1, 2],), ([2, 0, 1, 4, 5, 3],)]}


@pytest.mark.parametrize(("kind", "good"), GOOD, ids=lambda x: x if isinstance(x, str) else "")
def test_the_contract_passes_a_sound_one(kind, good):
    checks = {name: f for name, f in vars(contract).items() if name.startswith("test_")}
    mine = [f for f in checks.values() if kind in f.__code__.co_varnames[: f.__code__.co_argcount]]
    assert len(mine) >= 5
    for check in mine:
        names = check.__code__.co_varnames[: check.__code__.co_argcount]
        known = {kind: good, "problems": PROBLEMS}
        free = [name for name in names if name not in known]
        for values in CASES[free[0]] if free else [()]:
            check(**{name: known[name] for name in names if name in known}, **dict(zip(free, values, strict=True)))


def test_a_file_of_ones_own_is_checked_from_the_command_line(tmp_path):
    """--kl, --reward and --task take file.py:function; a KL is a number or a term by its arguments."""
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom rlkl.tasks import Addition\n"
        "def number(logprobs, ref_logprobs):\n    return logprobs - ref_logprobs\n"
        "def term(new, batch):\n    return (new.logprobs - batch.ref_logprobs).square()\n"
        "def reward(examples, replies, batch):\n    return torch.tensor([float(len(r)) for r in replies]), {}\n")
    mine = f"{tmp_path}/mine.py"
    for options, run in (
        ({"kl": f"{mine}:number"}, {"estimator"}),
        ({"kl": f"{mine}:term"}, {"term"}),
        ({"reward": f"{mine}:reward", "task": f"{mine}:Addition"}, {"reward", "task"}),
        ({"loss": "grpo"}, {"loss"}),
        ({}, set(contract.TABLES)),
    ):
        found = {kind for kind in contract.TABLES if parameters(kind, options)}
        assert found == run, options
    assert parameters("reward", {}) == [*contract.REWARDS, *(f"task {name}" for name in contract.TASKS)]


def parameters(kind, options):
    """What pytest_generate_tests makes of these options of the command line, for a test of this kind."""

    class Metafunc:
        fixturenames = (kind,)
        names = None

        class config:
            @staticmethod
            def getoption(name, default=None):
                return options.get(name.removeprefix("--"), default)

        def parametrize(self, what, names, indirect):
            assert (what, indirect) == (kind, True)
            self.names = names

    meta = Metafunc()
    pytest_generate_tests(meta)
    return meta.names
