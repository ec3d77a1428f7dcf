"""A run in which nothing can be learned says so: before the first step, and after a few."""

import re
from pathlib import Path

import pytest
import torch
from runs_fixture import SMALL, arguments, rows, run

import train
from rlkl.errors import UserError
from rlkl.run import learning_signal
from rlkl.run.algorithm import resolve_algorithm
from rlkl.run.config import load

pytest_plugins = ("runs_fixture",)

FLAT = """
def zero(example, response):
    return 0.0

def same(example, response):
    return 0.7

def length(example, response):
    return len(response) / 6

def late(examples, responses, batch):
    import torch
    global calls
    calls += 1
    scores = torch.arange(len(responses)) % 2 if calls == 9 else torch.zeros(len(responses))
    return scores.float(), {}

calls = 0
"""


@pytest.fixture
def flat(here):
    (here / "flat.py").write_text(FLAT)


def output(capsys, base, *options: str) -> str:
    capsys.readouterr()
    options = ("run=out", "scoring.processes=0", "kl_ref.coef=0", "eval.every=0", *options)
    run(base, *options)
    return capsys.readouterr().out


@pytest.mark.usefixtures("flat")
@pytest.mark.parametrize("reward", ["zero", "same"])
def test_after_five_steps_without_a_signal_there_is_one_warning_with_a_sample(base, capsys, reward):
    out = output(capsys, base, f"reward=flat.py:{reward}", "optim.steps=12")
    assert out.count("no signal in the last 5 steps") == 1
    score = {"zero": "0", "same": "0.7"}[reward]
    assert f"The mean score was {score} in each step" in out
    assert repr(rows(Path("out"))[4]["sample"]["response"]) in out


@pytest.mark.usefixtures("flat")
def test_where_scores_differ_there_is_no_warning(base, capsys):
    out = output(capsys, base, "reward=flat.py:length", "optim.steps=7")
    assert "no signal in" not in out


@pytest.mark.usefixtures("flat")
def test_the_warning_comes_again_only_after_a_signal(base, capsys):
    out = output(capsys, base, "reward=flat.py:late", "optim.steps=16")
    assert [row["updates"] for row in rows(Path("out"))].count(1) == 1
    assert out.count("no signal in the last 5 steps") == 2


@pytest.mark.usefixtures("flat")
def test_a_step_without_a_signal_has_no_update_and_moves_no_weight(base):
    options = ("reward=flat.py:zero", "kl_ref.coef=0", "optim.weight_decay=0.1")
    run(base, "run=out", *options, "optim.steps=2")
    assert [row["updates"] for row in rows(Path("out"))] == [0, 0]
    before, after = (
        (folder / "model.safetensors").read_bytes()
        for folder in (base, Path("out/checkpoints/step-000002"))
    )
    assert before == after


def test_the_update_is_left_out_only_where_its_gradient_is_exactly_0(here):
    """The advantages must be all that the objective has, and the loss must be one of ours."""
    (here / "mine.py").write_text("def loss(new, batch):\n    return -new.logprobs, {}\n")

    def left_out(*options: str) -> bool:
        advantage = "advantage=gae" if "critic={kind: head}" in options else "advantage=grpo"
        cfg = load([*SMALL, "kl_ref.coef=0", advantage, *options])
        return resolve_algorithm(cfg).only_advantages

    assert left_out()
    assert left_out("kl_ref.coef=0.1", "kl_ref.place=reward")  # it is in the advantages
    for other in (
        "loss=mine.py:loss",
        "entropy.coef=0.01",
        "kl_old.coef=0.1",
        "kl_ref={coef: 0.1, place: loss, estimator: k2}",
        "critic={kind: head}",
        "selector=kl_cov",
    ):
        assert not left_out(other), other


@pytest.mark.usefixtures("flat")
def test_scores_before_training_are_described_before_the_first_step(base, capsys):
    out = output(capsys, base, "reward=flat.py:length", "optim.steps=1")
    assert out.index("scores before training, 2 prompts: ") < out.index("run: out")
    assert re.search("[12] of 2 prompts have responses with different scores", out)


@pytest.mark.usefixtures("flat")
def test_equal_scores_before_training_are_said_to_teach_nothing(base, capsys):
    out = output(capsys, base, "reward=flat.py:same", "optim.steps=1")
    assert "all 0.7; 0 of 2 prompts have responses with different scores" in out
    assert "nothing to learn from yet" in out


def test_a_reward_that_fails_is_found_before_the_held_out_evaluation(here, base, monkeypatch):
    evaluated = []
    monkeypatch.setattr(
        "rlkl.run.session.evaluate", lambda *_, **__: evaluated.append(1) or {"accuracy": 0.0}
    )
    (here / "verl.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, difficulty):\n    return 0.0\n"
    )
    with pytest.raises(UserError, match="needs 'difficulty'"):
        train.main(arguments(base, "reward=verl.py:compute_score", "run=out"))
    assert evaluated == []
    assert not Path("out").exists()


def test_prompts_that_were_resampled_are_a_signal_that_the_scores_of_the_row_leave_out():
    row = {"reward": 0.0, "reward_std": 0.0, "advantage_std": 1.0, "advantage_mean": 0.0}
    assert learning_signal.has_signal(row | {"resampled_prompts": 3})
    assert not learning_signal.has_signal(row | {"resampled_prompts": 0})
    assert not learning_signal.has_signal(row | {"advantage_std": 0.0, "resampled_prompts": 3})


@pytest.mark.usefixtures("flat")
def test_no_more_responses_are_scored_before_training_than_a_rollout_has(base, capsys):
    small = ("sampling.prompts=1", "sampling.group_size=4", "optim.steps=1")
    assert "scores before training, 1 prompts" in output(
        capsys, base, "reward=flat.py:zero", *small
    )


def test_where_all_is_solved_the_warning_says_that_and_asks_no_questions():
    learning = [{"reward": 0.1 * i, "reward_std": 0.3, "truncated_fraction": 0.0} for i in range(9)]
    solved = [{"reward": 1.0, "reward_std": 0.0, "truncated_fraction": 0.0}] * 5
    sample = {"prompt": "1+1=", "response": "2", "score": 1.0}
    said = learning_signal.warning([*learning, *solved], sample)
    assert "If everything is solved" in said
    assert "chat template" not in said
    lost = [row | {"reward": 0.0} for row in solved]
    assert "chat template" in learning_signal.warning([*learning, *lost], sample)


def test_the_range_of_scores_leaves_out_responses_without_a_score():
    scores = torch.tensor([0.0, float("nan"), 2.0, 1.0])
    assert learning_signal.summary(scores).startswith("0 to 2, mean 1,")
    assert learning_signal.summary(scores[1:2]).startswith("none")


def test_a_long_or_chat_prompt_is_cut_to_what_one_can_read():
    chat = [{"role": "user", "content": "x" * 500}]
    assert len(learning_signal.shown(chat, "y" * 500)) < 250
