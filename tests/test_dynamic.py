"""Dynamic sampling: a step that refills has N groups that differ, each prompt comes in its turn, the running success is
an average over every reply, and a run that is resumed draws what it would have drawn."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs_fixture import differences, resume, rows, run
from test_step import rollout, setup

import train
from rlkl import config
from rlkl.dynamic import FLOOR, RATE, Rollout, by_success, dynamic, learnability, solved, success
from rlkl.errors import UserError
from rlkl.seeds import draw
from rlkl.types import Batch, Example

pytest_plugins = ("runs_fixture",)
TRAIN = [Example(str(i)) for i in range(20)]
N, G = 4, 2


@dataclass
class Kept:
    step: int = 0
    refilled: int = 0
    success: dict[str, float] = field(default_factory=dict)


def config_of(*, unanimous="refill", refills=3, curriculum="none", seed=0):
    how = SimpleNamespace(prompts=N, group_size=G, unanimous=unanimous, refills=refills, curriculum=curriculum)
    return SimpleNamespace(sampling=how, seed=seed)


def judged(teaches):
    """An act_and_judge whose replies to a prompt differ in score if `teaches(index)`; and what it was asked, by round.

    Rounds have replies of different lengths, as real ones do.
    """
    asked = []

    def act_and_judge(examples, rng):
        asked.append([int(e.prompt) for e in examples])
        torch.rand(1, generator=rng)
        groups = [[1.0, float(not teaches(i))] for i in asked[-1]]
        scores, width = torch.tensor(groups).flatten(), 2 + len(asked)
        ids = torch.tensor(asked[-1]).repeat_interleave(G)[:, None].expand(-1, width)
        ones = torch.ones(ids.shape, dtype=torch.bool)
        batch = Batch(ids[:, :1], ones[:, :1], ids, ones, torch.zeros(ids.shape), torch.zeros(len(ids)).bool())
        agree = sum(not teaches(i) for i in asked[-1]) / len(examples)
        return Rollout(batch, scores, {"unanimous": agree, "tokens": ids.numel(), "reward": len(asked)}, {})

    return act_and_judge, asked


def step(cfg, state, teaches):
    act, asked = judged(teaches)
    return dynamic(cfg, TRAIN, state, act, torch.Generator()), asked


@pytest.mark.parametrize(
    "teaches", [lambda i: i % 2, lambda i: i % 3 == 0, lambda i: True], ids=["half", "third", "all"])
def test_a_step_samples_as_many_prompts_as_are_missing_until_n_groups_differ(teaches):
    state = Kept()
    found, asked = step(config_of(refills=20), state, teaches)
    assert [len(a) for a in asked[1:]] == [sum(not teaches(i) for i in a) for a in asked[:-1]]
    assert all(teaches(i) for i in asked[-1])
    groups = found.scores.view(-1, G)
    differ = groups.amax(1) > groups.amin(1)
    assert int(differ.sum()) == N
    drawn = [i for a in asked for i in a]
    assert found.batch.response_ids[::G, 0].tolist() == drawn, "rows are those of the prompts, in their order"
    assert state.refilled == len(drawn) - N == found.row["refilled"]
    assert found.row["tokens"] == sum(len(a) * G * (3 + r) for r, a in enumerate(asked))
    assert found.row["reward"] == 1, "of the first round: what the task gives, not what was chosen of it"


def test_no_prompt_comes_again_before_all_have_come_whatever_is_refilled():
    state, drawn = Kept(), []
    for number in range(6):
        state.step = number
        drawn += sum(step(config_of(), state, lambda i: i % 3)[1], [])  # noqa: RUF017
    assert drawn == sum((draw(range(20), 1, 0, i) for i in range(len(drawn))), [])  # noqa: RUF017
    assert len(drawn) > 6 * N


def test_after_so_many_rounds_a_step_goes_on_with_what_it_has():
    found, asked = step(config_of(refills=2), Kept(), lambda i: i == 0)
    assert len(asked) == 3
    state = Kept()
    found, asked = step(config_of(refills=2), state, lambda i: False)
    assert [len(a) for a in asked] == [N, N, N]
    assert len(found.scores) == len(found.batch) == N * G, "nothing to choose from: N groups cost enough"
    assert state.refilled == 2 * N


def test_randomness_is_that_of_seed_step_and_round():
    """The first round draws from the step's own stream, so that keep, drop and refill sample the same first replies."""
    drawn = []

    def act(examples, rng):
        drawn.append(torch.rand(1, generator=rng).item())
        return judged(lambda i: False)[0](examples, torch.Generator())

    for number in (0, 0, 1):
        dynamic(config_of(refills=2), TRAIN, Kept(step=number), act, torch.Generator().manual_seed(5))
    one, again, other = drawn[:3], drawn[3:6], drawn[6:]
    assert one == again
    assert one[0] == other[0] == torch.rand(1, generator=torch.Generator().manual_seed(5)).item()
    assert len({*one, *other[1:]}) == 5


def test_a_judge_that_fails_in_a_later_round_leaves_nothing_behind():
    act, asked = judged(lambda i: i % 2)

    def fails(examples, rng):
        if asked:
            raise UserError("no")
        return act(examples, rng)

    state = Kept()
    with pytest.raises(UserError):
        dynamic(config_of(curriculum="success"), TRAIN, state, fails, torch.Generator())
    assert state == Kept()


# success
def test_success_is_an_exponential_average_of_the_share_of_right_replies():
    nan = float("nan")
    first = success({}, [3, 7], torch.tensor([1.0, 1.1, 0.0, 0.9, 1.0, 0.0, nan, nan]))
    assert first == {"3": 0.5, "7": 0.5}
    second = success(first, [7, 9], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert second == {"3": 0.5, "7": 0.5 + RATE * 0.5, "9": 0.0}
    assert first == {"3": 0.5, "7": 0.5}, "an argument was changed"
    assert success(second, [9], torch.tensor([nan, nan])) == second


def test_always_and_never_are_exact_after_any_number_of_steps():
    kept = {}
    for _ in range(50):
        kept = success(kept, [0, 1, 2], torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0]))
    assert solved(kept) == {"solved_always": 1 / 3, "solved_never": 1 / 3}
    assert solved({}) == {"solved_always": 0, "solved_never": 0}
    assert solved(success(kept, [0], torch.tensor([1.0, 0.0])))["solved_always"] == 0


def test_learnability_is_the_variance_of_a_score_and_highest_at_one_half():
    weights = learnability({"0": 0.0, "1": 1.0, "2": 0.25}, 5)
    scores = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert torch.allclose(weights - FLOOR, torch.tensor([0, 0, scores.var(correction=0), 0.25, 0.25]).double())


def test_prompts_are_drawn_in_proportion_to_learnability_and_each_once_before_any_comes_again():
    kept = {str(i): (0.0, 0.5)[i % 2] for i in range(10)}
    first = torch.tensor([next(by_success(kept, 10, 0, step)) for step in range(3000)])
    odd = (first % 2).double().mean().item()
    assert odd == pytest.approx((0.25 + FLOOR) / (0.25 + 2 * FLOOR), abs=0.03)
    order = by_success(kept, 10, 1, 2)
    one, two = ([next(order) for _ in range(10)] for _ in range(2))
    assert sorted(one) == list(range(10))
    assert two == one
    again, other = by_success(kept, 10, 1, 2), by_success(kept, 10, 1, 3)
    assert [next(again) for _ in range(10)] == one != [next(other) for _ in range(10)]


def test_a_curriculum_leaves_solved_prompts_for_those_that_teach():
    state, counts = Kept(), torch.zeros(20)
    for number in range(60):
        state.step = number
        found, asked = step(config_of(unanimous="keep", curriculum="success"), state, lambda i: i < 10)
        counts[torch.tensor(asked[0])] += 1
        assert len(asked) == 1
        assert "refilled" not in found.row
    assert counts[:10].sum() > 3 * counts[10:].sum() > 0
    assert state.success == {str(i): 0.5 if i < 10 else 1.0 for i in range(20)}
    assert state.refilled == 0


# the step and the run
@pytest.mark.usefixtures("here")
def test_what_a_step_learns_from_holds_n_groups_that_differ(base, monkeypatch):
    """The first group of each round agrees: three rounds of 4, 1 and 1 prompts, of which 4 groups are kept."""
    real, sizes = train.judge, []

    def judge(*args):
        scores, named = real(*args)
        sizes.append(len(scores))
        first = torch.arange(len(scores)) < 4
        spread = torch.arange(len(scores)) % 4 / 4
        return torch.where(first & (len(sizes) < 3), 0.7, spread), named

    monkeypatch.setattr(train, "judge", judge)
    batch = rollout(base, "sampling.unanimous=refill")[3]
    assert sizes == [16, 4, 4]
    assert len(batch) == 16
    assert (batch.advantages.view(4, 4, -1).abs().amax((1, 2)) > 0).all()


@pytest.mark.usefixtures("here")
def test_refill_without_anything_to_refill_is_drop(base):
    """The gradient of every update is the same, bit for bit, and so is the next step's."""
    found = []
    for how in ("drop", "refill"):
        cfg, parts, state = setup(base, f"sampling.unanimous={how}")
        for number in range(2):
            state.step = number
            row, _ = train.training_step(cfg, parts, state)
            assert row["unanimous"] == 0
        recorder: Any = parts.optimizer
        found.append(recorder.gradients)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(*found, strict=True) for k in a if a[k] is not None)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("options", [
    ("sampling.unanimous=refill",), ("sampling.curriculum=success", "sampling.unanimous=refill"),
    ("sampling.curriculum=watch",)], ids=lambda o: o[-1])
def test_a_resumed_run_draws_what_it_would_have_drawn(base, options):
    """Bit for bit, with groups that do agree: the task pays a digit, in a group of two."""
    options = ("task=reward.py:Digits", "reward=task", "sampling.group_size=2", "scoring.processes=0", *options)
    whole, cut = (run(base, *options, f"run={name}", *more) for name, more in (
        ("whole", ()), ("cut", ("optim.steps=3",))))
    resume(cut, "optim.steps=6")
    assert differences(whole, cut) == []
    written = rows(whole)
    if "sampling.unanimous=refill" in options:
        assert sum(row["refilled"] for row in written[:3]) > 0 < sum(row["refilled"] for row in written[3:])
    if "sampling.curriculum=watch" in options:
        assert all(0 <= row["solved_never"] + row["solved_always"] <= 1 for row in written)


def test_a_group_of_one_cannot_be_refilled():
    with pytest.raises(UserError, match=r"sampling.unanimous=refill would drop every group of 1"):
        config.load(["sampling.unanimous=refill", "sampling.group_size=1"])


def test_explain_counts_what_may_be_refilled():
    from rlkl.explain.footprint import architecture, tokens

    def sampled(*options):
        cfg = config.load(["sampling.prompts=3", "sampling.group_size=2", "sampling.max_new_tokens=5", *options])
        return tokens(cfg, architecture(cfg)[1]).sampled

    assert sampled("sampling.unanimous=drop") == 3 * 2 * 5
    assert sampled("sampling.unanimous=refill", "sampling.refills=2") == 3 * sampled()
