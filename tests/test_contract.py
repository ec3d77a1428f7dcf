"""tests/contract.py for every built-in entry of each kind; and that it refuses what breaks it."""

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


def name_of(x):
    return getattr(x, "__name__", "")


# ------------------------------------------------------------------ policy losses


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


def with_an_entropy_bonus(new, batch):
    """train.py has a term for that."""
    return -(new.logprobs - batch.old_logprobs).exp() * batch.advantages - new.entropy, {}


def needs_a_critic(new, batch):
    value = (new.values - batch.returns).square()
    return -(new.logprobs - batch.old_logprobs).exp() * batch.advantages + value.detach(), {}


def wrong_way(new, batch):
    return (new.logprobs - batch.old_logprobs).exp() * batch.advantages, {}


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (reduced, "test_a_loss_gives_one_finite_number_a_token_and_diagnostics_alike"),
        (normalised_here, "test_a_loss_compares_no_rows"),
        (mean_over_padding, "test_padding_changes_no_loss_and_no_gradient"),
        (writes, "test_a_loss_writes_to_nothing_it_is_given"),
        (signs_only, "test_a_loss_scales_with_the_advantage"),
        (needs_a_critic, "test_a_loss_is_the_policy_term_alone"),
    ],
    ids=name_of,
)
def test_the_contract_refuses_a_broken_loss(broken, check):
    with pytest.raises((AssertionError, TypeError)):
        getattr(contract, check)(functools.partial(broken))


@pytest.mark.parametrize(
    ("odd", "check", "message"),
    [
        (detached, "test_the_gradient_of_a_loss_is_that_of_its_value", "gradient is not"),
        (wrong_way, "test_at_ratio_one_a_loss_is_reinforce", "gradient is not"),
        (with_an_entropy_bonus, "test_a_loss_is_the_policy_term_alone", "a term of its own"),
    ],
    ids=name_of,
)
def test_the_contract_reports_an_unusual_loss_and_refuses_it_among_ours(
    odd, check, message, monkeypatch
):
    with pytest.raises(pytest.xfail.Exception), pytest.warns(UserWarning, match=message):
        getattr(contract, check)(functools.partial(odd))
    monkeypatch.setitem(contract.LOSSES, odd.__name__, odd)
    with pytest.raises(AssertionError, match=message):
        getattr(contract, check)(functools.partial(odd))


# ------------------------------------------------------------------ advantages


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
    ("broken", "check"),
    [
        (leaks, "test_an_advantage_gives_one_number_a_token_and_zero_outside_the_mask"),
        (blows_up, "test_degenerate_groups_stay_finite"),
        (by_column, "test_padding_changes_no_advantage"),
    ],
    ids=name_of,
)
def test_the_contract_refuses_a_broken_advantage(broken, check):
    with pytest.raises(AssertionError):
        getattr(contract, check)(functools.partial(broken), outcome_only=False)


def test_the_broken_ones_are_broken_in_one_way_only():
    """They pass the check of shapes, so it is the missing property that refuses them."""
    for broken in (normalised_here, mean_over_padding, signs_only, detached):
        contract.test_a_loss_gives_one_finite_number_a_token_and_diagnostics_alike(
            functools.partial(broken)
        )
    for broken in (blows_up, by_column):
        given = [x.nan_to_num(0.0) for x in contract.rewards_and_values()]
        advantages, _ = broken(*given, group_size=contract.G)
        assert advantages.isfinite().all()


# ------------------------------------------------------------------ KL estimators


def good_estimator(logprobs, ref_logprobs, *, most: float = 20.0):
    """k3, clamped."""
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
    ("broken", "check"),
    [
        (summed_up, "test_an_estimator_gives_one_finite_number_a_token"),
        (overflows, "test_an_estimator_gives_one_finite_number_a_token"),
        (over_the_row, "test_an_estimator_looks_at_no_other_token"),
        (never_zero, "test_an_estimator_is_zero_where_the_policies_are_equal"),
        (in_place, "test_an_estimator_writes_to_nothing_it_is_given"),
        (positional_option, "test_the_options_of_an_estimator_are_keywords"),
    ],
    ids=name_of,
)
def test_the_contract_refuses_a_broken_estimator(broken, check):
    with pytest.raises(AssertionError):
        getattr(contract, check)(functools.partial(broken))


def detached_estimator(logprobs, ref_logprobs):
    return (logprobs - ref_logprobs.detach()) * (logprobs - ref_logprobs).detach()


# ------------------------------------------------------------------ KL loss terms


def good_term(new, batch, *, weighted: bool = True):
    ratio = (new.logprobs - batch.old_logprobs).clamp(-20, 20).exp() if weighted else 1.0
    return ratio * good_estimator(new.logprobs, batch.ref_logprobs)


def behind_the_mask(new, batch):
    """The whole response's u, padding included."""
    u = new.logprobs - batch.ref_logprobs
    return u.detach().sum(1, keepdim=True) * u


def over_the_batch(new, batch):
    """Divides by a token count of whatever micro-batch it sees."""
    return (new.logprobs - batch.ref_logprobs).square() / batch.mask.sum()


def without_gradient(new, batch):
    return (new.logprobs - batch.ref_logprobs).detach().square()


def of_another_policy(new, batch):
    """KL to the sampler and not to the reference."""
    return (new.logprobs - batch.sampler_logprobs).square()


def writes_the_reference(new, batch):
    batch.ref_logprobs.sub_(new.logprobs.detach())
    return new.logprobs * batch.ref_logprobs


def k1_term(new, batch):
    return new.logprobs - batch.ref_logprobs


def detached_term(new, batch):
    return (new.logprobs - batch.ref_logprobs) * (new.logprobs - batch.ref_logprobs).detach()


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (
            without_gradient,
            "test_a_term_gives_one_finite_number_a_token_that_depends_on_the_policy",
        ),
        (behind_the_mask, "test_padding_changes_no_term_and_no_gradient"),
        (over_the_batch, "test_a_term_compares_no_rows"),
        (of_another_policy, "test_a_term_is_zero_where_the_policies_are_equal"),
        (writes_the_reference, "test_a_term_writes_to_nothing_it_is_given"),
    ],
    ids=name_of,
)
def test_the_contract_refuses_a_broken_term(broken, check):
    with pytest.raises(AssertionError):
        getattr(contract, check)(functools.partial(broken))


@pytest.mark.parametrize(
    ("odd", "check", "table"),
    [
        (detached_estimator, "test_the_gradient_of_an_estimator_is_that_of_its_value", "KL"),
        (detached_term, "test_the_gradient_of_a_term_is_that_of_its_value", "TERMS"),
        (k1_term, "test_a_term_is_zero_where_the_policies_are_equal", "TERMS"),
    ],
    ids=name_of,
)
def test_the_contract_reports_an_unusual_kl_and_refuses_it_among_ours(
    odd, check, table, monkeypatch
):
    """k1 as a loss is noise of zero mean: allowed in a user's file, refused in the library."""
    with pytest.raises(pytest.xfail.Exception), pytest.warns(UserWarning, match="gradient is not"):
        getattr(contract, check)(functools.partial(odd))
    monkeypatch.setitem(getattr(contract, table), odd.__name__, odd)
    with pytest.raises(AssertionError, match="gradient is not"):
        getattr(contract, check)(functools.partial(odd))


def test_an_estimator_and_a_term_are_told_apart_by_their_arguments():
    assert [contract.kind_of_kl(f) for f in (good_estimator, good_term)] == ["estimator", "term"]
    assert {contract.kind_of_kl(f) for f in contract.KL.values()} == {"estimator"}
    assert {contract.kind_of_kl(f) for f in contract.TERMS.values()} == {"term"}


# ------------------------------------------------------------------ selectors


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
    ("broken", "check"),
    [
        (everywhere, "test_a_selector_picks_sampled_tokens_at_least_one"),
        (as_numbers, "test_a_selector_picks_sampled_tokens_at_least_one"),
        (by_threshold_over_padding, "test_a_selector_sees_neither_padding_nor_the_order_of_rows"),
        (the_first_row, "test_a_selector_sees_neither_padding_nor_the_order_of_rows"),
    ],
    ids=name_of,
)
def test_the_contract_refuses_a_broken_selector(broken, check):
    with pytest.raises(AssertionError):
        getattr(contract, check)(functools.partial(broken))


# ------------------------------------------------------------------ tasks


class Squares:
    """A sound one: n² of n = 1 … 20, every fifth held out."""

    def __init__(self, split, *, most: int = 20):
        self.numbers = [n for n in range(1, most + 1) if (n % 5 == 0) == (split == "heldout")]

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        return Example(f"{self.numbers[index]}² = ", str(self.numbers[index] ** 2))

    def score(self, example, response):
        return {
            "right": float(response.strip() == example.answer),
            "short": -0.1 * (len(response) > 100),
        }


class RaisesOnNothing(Squares):
    def score(self, example, response):
        return float(response.split()[0] == example.answer)


class ReadsNumbers(Squares):
    """float("nan") is a number to Python, and 1e999 is infinite."""

    def score(self, example, response):
        try:
            return 1 - abs(float(response) - float(example.answer))
        except ValueError:
            return 0.0


class ReadsIntegers(Squares):
    """int() of more than 4300 digits raises."""

    def score(self, example, response):
        return float(
            response.isascii() and response.isdigit() and int(response) == int(example.answer)
        )


class RunsAway(Squares):
    """A nested quantifier: exponential in the length of a response that does not match."""

    def score(self, example, response):
        return float(bool(re.fullmatch(r"(a+)+", response)) or response == example.answer)


class Sleeps(Squares):
    def score(self, example, response):
        time.sleep(60 * (len(response) > 9000))
        return float(response == example.answer)


class Remembers(Squares):
    """Pays for an answer once."""

    def score(self, example, response):
        self.paid = {*getattr(self, "paid", ()), (example.prompt, response)}
        return float(response == example.answer) / len(self.paid)


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
    def score(self, example, response):
        return float(example.answer.startswith(response))


class WantsAFormat(Squares):
    def score(self, example, response):
        return float(response == f"#### {example.answer}")


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (Empty, "test_a_task_is_a_list_of_examples"),
        (Silent, "test_a_task_is_a_list_of_examples"),
        (Leaks, "test_no_prompt_is_both_trained_on_and_held_out"),
        (RaisesOnNothing, "test_a_score_is_a_finite_number_whatever_the_response"),
        (ReadsNumbers, "test_a_score_is_a_finite_number_whatever_the_response"),
        (ReadsIntegers, "test_a_score_takes_no_time_however_long_the_response"),
        (RunsAway, "test_a_score_takes_no_time_however_long_the_response"),
        (Sleeps, "test_a_score_takes_no_time_however_long_the_response"),
        (Remembers, "test_a_score_depends_on_nothing_but_the_example_and_the_response"),
        (PaysForNothing, "test_the_right_answer_scores_one_and_an_empty_response_less"),
    ],
    ids=name_of,
)
def test_the_contract_refuses_a_broken_task(broken, check, monkeypatch):
    monkeypatch.setattr(contract, "SLOW", 0.3)  # seconds
    with pytest.raises((AssertionError, IndexError, ValueError)):
        getattr(contract, check)(functools.partial(broken))


def test_the_contract_reports_a_task_whose_bare_answer_is_not_enough(monkeypatch):
    check = contract.test_the_right_answer_scores_one_and_an_empty_response_less
    with (
        pytest.raises(pytest.xfail.Exception),
        pytest.warns(UserWarning, match="the bare answer '1' scores 0"),
    ):
        check(functools.partial(WantsAFormat))
    monkeypatch.setitem(contract.TASKS, "format", WantsAFormat)
    with pytest.raises(AssertionError, match="the bare answer"):
        check(functools.partial(WantsAFormat))


# ------------------------------------------------------------------ rewards

PROBLEMS = [Example("1+1=", "2"), Example("3+4=", "7")]


def good_reward(examples, responses, batch, *, bonus: float = 0.5):
    """Right, with a bonus for less than the longest of its prompt: groups may be compared."""
    right = torch.tensor([float(e.answer == r) for e, r in zip(examples, responses, strict=True)])
    lengths = batch.mask.sum(1).view(-1, contract.G)
    short = bonus * (lengths < lengths.amax(1, keepdim=True)).flatten()
    return right + short, {"right": right, "short": short}


def by_position(examples, responses, batch):
    """The first response wins."""
    return torch.arange(len(responses), 0.0, -1), {}


def same_as_before(examples, responses, batch):
    """Compares each response with the row above it."""
    above = ["", *responses[:-1]]
    longer = [float(len(r) > len(a)) for r, a in zip(responses, above, strict=True)]
    return torch.tensor(longer), {}


def parts_by_position(examples, responses, batch):
    return torch.zeros(len(responses)), {"rank": torch.arange(len(responses))}


def by_width(examples, responses, batch):
    """Of the padded tensor, not of the response."""
    return torch.full((len(responses),), 1.0 / batch.mask.shape[1]), {}


def sorts(examples, responses, batch):
    responses.sort()
    return torch.zeros(len(responses)), {}


def one_for_all(examples, responses, batch):
    return torch.tensor(1.0), {}


def part_of_another_shape(examples, responses, batch):
    return torch.zeros(len(responses)), {"right": torch.zeros(2)}


def mean_length_of_words(examples, responses, batch):
    return torch.tensor([len(r) / len(r.split()) for r in responses]), {}


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (one_for_all, "test_a_reward_gives_one_finite_score_a_response_and_parts_alike"),
        (part_of_another_shape, "test_a_reward_gives_one_finite_score_a_response_and_parts_alike"),
        (mean_length_of_words, "test_a_reward_gives_one_finite_score_a_response_and_parts_alike"),
        (by_position, "test_the_scores_follow_their_rows"),
        (same_as_before, "test_the_scores_follow_their_rows"),
        (parts_by_position, "test_the_scores_follow_their_rows"),
        (by_width, "test_padding_changes_no_score"),
        (sorts, "test_a_reward_writes_to_nothing_it_is_given"),
    ],
    ids=name_of,
)
def test_the_contract_refuses_a_broken_reward(broken, check):
    with pytest.raises((AssertionError, UserError)):
        getattr(contract, check)(functools.partial(broken), PROBLEMS)


# ------------------------------------------------------------------ sound ones pass every check

GOOD = [
    ("estimator", functools.partial(good_estimator)),
    ("term", functools.partial(good_term)),
    ("task", functools.partial(Squares)),
    ("reward", functools.partial(good_reward)),
    ("reward", from_task(Squares("train").score)),
]


@pytest.mark.parametrize(("kind", "good"), GOOD, ids=lambda x: x if isinstance(x, str) else "")
def test_the_contract_passes_a_sound_one(kind, good):
    given = {kind: good, "problems": PROBLEMS}
    count = 0
    for name, check in vars(contract).items():
        arguments = check_arguments(check) if name.startswith("test_") else ()
        if kind in arguments:
            check(**{argument: given[argument] for argument in arguments})
            count += 1
    assert count >= 5


def check_arguments(check):
    return check.__code__.co_varnames[: check.__code__.co_argcount]


def test_a_file_of_ones_own_is_checked_from_the_command_line(tmp_path):
    """--kl, --reward and --task take file.py:function; a KL's kind follows from its arguments."""
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom rlkl.tasks import Addition\n"
        "def number(logprobs, ref_logprobs):\n    return logprobs - ref_logprobs\n"
        "def term(new, batch):\n    return (new.logprobs - batch.ref_logprobs).square()\n"
        "def reward(examples, responses, batch):\n    return torch.ones(len(responses)), {}\n"
    )
    file = f"{tmp_path}/mine.py"
    for options, kinds in (
        ({"kl": f"{file}:number"}, {"estimator"}),
        ({"kl": f"{file}:term"}, {"term"}),
        ({"reward": f"{file}:reward", "task": f"{file}:Addition"}, {"reward", "task"}),
        ({"loss": "clip"}, {"loss"}),
        ({}, set(contract.TABLES)),
    ):
        checked = {kind: names_of(kind, options) for kind in contract.TABLES}
        assert {kind for kind, names in checked.items() if names} == kinds, options
    tasks = [f"task {name}" for name in contract.TASKS]
    assert names_of("reward", {}) == [*contract.REWARDS, *tasks]


def names_of(kind, options):
    """What pytest_generate_tests makes of these command-line options, for a check of this kind."""

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
