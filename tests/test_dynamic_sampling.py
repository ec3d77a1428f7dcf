"""Dynamic sampling: groups that differ, the order of prompts, running success rates, resume."""

from collections.abc import Callable
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from runs_fixture import differences, resume, rows, run
from test_step import rollout, setup

import train
from rlkl.errors import UserError
from rlkl.explain.footprint import architecture, tokens
from rlkl.run import config
from rlkl.run.dynamic_sampling import (
    FLOOR,
    RATE,
    by_learnability,
    dynamic_rollout,
    learnability,
    solved_fractions,
    success_rates,
)
from rlkl.run.seeds import epoch_order
from rlkl.run.session import step_inputs
from rlkl.run.state import State
from rlkl.types import Batch, Rollout

pytest_plugins = ("runs_fixture",)
DATA = SimpleNamespace(train=range(20))
N, G = 4, 2


def configuration(zero_variance: str = "resample", rounds: int = 3, curriculum: str = "none"):
    return config.load(
        [
            f"sampling.prompts={N}",
            f"sampling.group_size={G}",
            f"sampling.zero_variance={zero_variance}",
            f"sampling.resample_rounds={rounds}",
            f"sampling.curriculum={curriculum}",
        ]
    )


def new_state(step: int = 0) -> State:
    return State(kl_ref_coef=0.0, kl_old_coef=0.0, step=step)


class FakeRollouts:
    """A generate_and_score whose groups differ in score where `differs(index)`.

    A response repeats the index of its prompt; responses of later rounds are longer. `rounds` are
    the prompt indices of each call.
    """

    def __init__(self, differs: Callable[[int], bool]) -> None:
        self.differs = differs
        self.rounds: list[list[int]] = []

    def __call__(self, cfg, models, data, state, prompts, rng) -> Rollout:
        self.rounds.append(list(prompts))
        torch.rand(1, generator=rng)
        scores = [[1.0, float(not self.differs(i))] for i in prompts]
        columns = 2 + len(self.rounds)
        ids = torch.tensor(prompts).repeat_interleave(G)[:, None].expand(-1, columns)
        mask = torch.ones(ids.shape, dtype=torch.bool)
        batch = Batch(
            ids[:, :1],
            mask[:, :1],
            ids,
            mask,
            sampler_logprobs=torch.zeros(ids.shape),
            truncated=torch.zeros(len(ids)).bool(),
            scores=torch.tensor(scores).flatten(),
        )
        return Rollout(batch, batch, score_parts={}, examples=[], texts=[], metrics={})

    def drawn(self) -> list[int]:
        return [i for prompts in self.rounds for i in prompts]


def one_rollout(cfg, state: State, generate_and_score) -> Rollout:
    prompts, rng = step_inputs(cfg, DATA, state)
    return dynamic_rollout(generate_and_score, cfg, None, DATA, state, prompts, rng)


def prompt_indices(batch: Batch) -> list[int]:
    """Of each group."""
    return batch.response_ids[::G, 0].tolist()


# ------------------------------------------------------------------ one rollout


@pytest.mark.parametrize(
    "differs", [lambda i: i % 2, lambda i: i % 3 == 0, lambda i: True], ids=["half", "third", "all"]
)
def test_a_rollout_samples_as_many_prompts_as_are_missing_until_n_groups_differ(differs):
    state, fake = new_state(), FakeRollouts(differs)
    result = one_rollout(configuration(rounds=20), state, fake)
    for prompts, more in zip(fake.rounds, fake.rounds[1:], strict=False):
        assert len(more) == sum(not differs(i) for i in prompts)
    assert all(differs(i) for i in fake.rounds[-1])
    assert prompt_indices(result.batch) == [i for i in fake.drawn() if differs(i)]
    scores = result.batch.scores.view(-1, G)
    assert len(scores) == N
    assert (scores.amax(1) > scores.amin(1)).all()
    assert state.resampled == len(fake.drawn()) - N == result.metrics["resampled_prompts"]
    sampled = sum(len(prompts) * G * (3 + r) for r, prompts in enumerate(fake.rounds))
    assert result.metrics["tokens"] == sampled
    # The metrics are those of the first round: they say what the task pays, not what was selected.
    assert prompt_indices(result.responses) == fake.rounds[0]


def test_no_prompt_comes_again_before_all_have_come():
    state, drawn = new_state(), []
    for step in range(6):
        state.step = step
        fake = FakeRollouts(lambda i: i % 3 != 0)
        one_rollout(configuration(), state, fake)
        drawn += fake.drawn()
    assert drawn == list(islice(epoch_order(20, 0, 0), len(drawn)))
    assert len(drawn) > 6 * N


def test_after_the_last_round_a_step_goes_on_with_what_it_has():
    fake = FakeRollouts(lambda i: i == 0)
    one_rollout(configuration(rounds=2), new_state(), fake)
    assert len(fake.rounds) == 3

    state, fake = new_state(), FakeRollouts(lambda i: False)
    result = one_rollout(configuration(rounds=2), state, fake)
    assert [len(prompts) for prompts in fake.rounds] == [N, N, N]
    assert prompt_indices(result.batch) == fake.rounds[0], "no group differs: N of them are enough"
    assert state.resampled == 2 * N


def test_the_random_numbers_depend_on_seed_step_and_round():
    """The first round draws from the step's own generator, as it does without resampling."""

    def draws(step: int) -> list[float]:
        numbers = []

        def generate_and_score(*args) -> Rollout:
            numbers.append(torch.rand(1, generator=args[-1]).item())
            return FakeRollouts(lambda i: False)(*args[:-1], torch.Generator())

        one_rollout(configuration(rounds=2), new_state(step), generate_and_score)
        return numbers

    first, other = draws(step=0), draws(step=1)
    assert first == draws(step=0)
    assert len({*first, *other}) == 6
    _, rng = step_inputs(configuration(), DATA, new_state())
    assert first[0] == torch.rand(1, generator=rng).item()


def test_an_error_in_a_later_round_leaves_the_state_as_it_was():
    fake = FakeRollouts(lambda i: i % 2)

    def fails_later(*args) -> Rollout:
        if fake.rounds:
            raise UserError("no")
        return fake(*args)

    state = new_state()
    with pytest.raises(UserError):
        one_rollout(configuration(curriculum="success"), state, fails_later)
    assert state == new_state()


# ------------------------------------------------------------------ success rates, curriculum


def test_success_is_an_exponential_average_of_the_share_of_correct_responses():
    nan = float("nan")
    scores = torch.tensor([1.0, 1.1, 0.0, 0.9, 1.0, 0.0, nan, nan])
    first = success_rates({}, [3, 7], scores)
    assert first == {"3": 0.5, "7": 0.5}
    second = success_rates(first, [7, 9], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert second == {"3": 0.5, "7": 0.5 + RATE * 0.5, "9": 0.0}
    assert first == {"3": 0.5, "7": 0.5}, "an argument was changed"
    assert success_rates(second, [9], torch.tensor([nan, nan])) == second


def test_always_and_never_solved_are_exact_after_any_number_of_steps():
    success = {}
    for _ in range(50):
        success = success_rates(success, [0, 1, 2], torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0]))
    assert solved_fractions(success) == {"solved_always": 1 / 3, "solved_never": 1 / 3}
    assert solved_fractions({}) == {"solved_always": 0, "solved_never": 0}
    success = success_rates(success, [0], torch.tensor([1.0, 0.0]))
    assert solved_fractions(success)["solved_always"] == 0


def test_learnability_is_the_variance_of_a_score_and_highest_at_one_half():
    weights = learnability({"0": 0.0, "1": 1.0, "2": 0.25}, 5)
    variance = torch.tensor([1.0, 0.0, 0.0, 0.0]).var(correction=0).item()
    expected = torch.tensor([0, 0, variance, 0.25, 0.25], dtype=torch.float64)
    assert torch.allclose(weights - FLOOR, expected)


def test_prompts_are_drawn_in_proportion_to_learnability():
    success = {str(i): (0.0, 0.5)[i % 2] for i in range(10)}
    first = torch.tensor([next(by_learnability(success, 10, 0, step)) for step in range(3000)])
    odd = (first % 2).double().mean().item()
    assert odd == pytest.approx((0.25 + FLOOR) / (0.25 + 2 * FLOOR), abs=0.03)


def test_each_prompt_is_drawn_once_before_any_comes_again():
    success = {str(i): (0.0, 0.5)[i % 2] for i in range(10)}
    order = list(islice(by_learnability(success, 10, seed=1, step=2), 20))
    assert sorted(order[:10]) == list(range(10))
    assert order[10:] == order[:10]
    assert list(islice(by_learnability(success, 10, seed=1, step=2), 20)) == order
    assert list(islice(by_learnability(success, 10, seed=1, step=3), 20)) != order


def test_a_curriculum_prefers_prompts_that_are_solved_sometimes():
    state, counts = new_state(), torch.zeros(20)
    cfg = configuration("keep", curriculum="success")
    for step in range(60):
        state.step = step
        fake = FakeRollouts(lambda i: i < 10)
        result = one_rollout(cfg, state, fake)
        counts[torch.tensor(fake.rounds[0])] += 1
        assert len(fake.rounds) == 1
        assert len(result.batch) == N * G
        assert "resampled_prompts" not in result.metrics
    assert counts[:10].sum() > 3 * counts[10:].sum() > 0
    assert state.success == {str(i): 0.5 if i < 10 else 1.0 for i in range(20)}
    assert state.resampled == 0


# ------------------------------------------------------------------ in a step and in a run


@pytest.mark.usefixtures("here")
def test_a_step_is_trained_on_n_groups_that_differ(base, monkeypatch):
    """The first group of the first two rounds has equal scores: rounds of 4, 1 and 1 prompts."""
    compute_scores, sizes = train.compute_scores, []

    def equal_in_the_first_group(*args):
        scores, parts = compute_scores(*args)
        sizes.append(len(scores))
        row = torch.arange(len(scores))
        differing = row % 4 / 4
        if len(sizes) < 3:
            differing = torch.where(row < 4, 0.7, differing)
        return differing, parts

    monkeypatch.setattr(train, "compute_scores", equal_in_the_first_group)
    _, batch = rollout(base, "sampling.zero_variance=resample")
    assert sizes == [16, 4, 4]
    assert len(batch) == 16
    assert (batch.advantages.view(4, 4, -1).abs().amax((1, 2)) > 0).all()


@pytest.mark.usefixtures("here")
def test_resampling_where_every_group_differs_is_dropping(base):
    """The gradients of two steps are equal bit for bit."""
    gradients = {}
    for zero_variance in ("drop", "resample"):
        run_setup = setup(base, f"sampling.zero_variance={zero_variance}")
        for step in range(2):
            run_setup.state.step = step
            assert run_setup.step()["frac_reward_zero_std"] == 0
        gradients[zero_variance] = run_setup.optimizer.gradients
    for drop, resample in zip(*gradients.values(), strict=True):
        assert drop.keys() == resample.keys()
        for name, x in drop.items():
            assert x is None or torch.equal(x, resample[name]), name


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "options",
    [
        ("sampling.zero_variance=resample",),
        ("sampling.curriculum=success", "sampling.zero_variance=resample"),
        ("sampling.curriculum=watch",),
    ],
    ids=lambda options: options[0],
)
def test_a_resumed_run_draws_the_same_prompts(base, options):
    """Bit for bit. Some groups have equal scores: the task pays any digit, in groups of two."""
    options = (
        "task=reward.py:Digits",
        "reward=task",
        "sampling.group_size=2",
        "scoring.processes=0",
        *options,
    )
    whole = run(base, *options, "run=whole")
    resumed = run(base, *options, "run=resumed", "optim.steps=3")
    resume(resumed, "optim.steps=6")
    assert differences(whole, resumed) == []
    metrics = rows(whole)
    if "sampling.zero_variance=resample" in options:
        assert sum(row["resampled_prompts"] for row in metrics[:3]) > 0
        assert sum(row["resampled_prompts"] for row in metrics[3:]) > 0
    if "sampling.curriculum=watch" in options:
        assert all(0 <= row["solved_never"] + row["solved_always"] <= 1 for row in metrics)


def test_resampling_groups_of_one_is_refused():
    with pytest.raises(UserError, match=r"resample would drop all groups of 1"):
        config.load(["sampling.zero_variance=resample", "sampling.group_size=1"])


def test_explain_counts_the_responses_that_may_be_resampled():
    def sampled_tokens(*options: str) -> int:
        sizes = ("sampling.prompts=3", "sampling.group_size=2", "sampling.max_new_tokens=5")
        cfg = config.load([*sizes, *options])
        return tokens(cfg, *architecture(cfg)).sampled

    assert sampled_tokens("sampling.zero_variance=drop") == 3 * 2 * 5
    resampled = sampled_tokens("sampling.zero_variance=resample", "sampling.resample_rounds=2")
    assert resampled == 3 * sampled_tokens()
