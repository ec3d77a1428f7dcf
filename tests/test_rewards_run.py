"""Whole runs: functions written for TRL and verl work unchanged; None and weights take effect."""

import json

import pytest
import torch
from runs_fixture import resume, rows, run, train_error

from rlkl.losses import token_weights
from rlkl.run.metrics import rollout_metrics
from rlkl.types import Batch, Rollout, nonzero_variance

pytest_plugins = ("runs_fixture",)

TRL = '''
import asyncio
import re

def correctness(prompts, completions, answer, **kwargs):
    digits = [sum(x.isdigit() for x in c) for c in completions]
    return [1.0 if c == a else 0.1 * n for c, a, n in zip(completions, answer, digits)]

def only_small(completions, prompts, trainer_state, **kwargs):
    """Not applicable to some prompts, as in TRL's multi-task example. It reads the step."""
    assert trainer_state.global_step < trainer_state.max_steps
    step = trainer_state.global_step
    return [float(len(c)) + step if p[0] in "01234" else None for p, c in zip(prompts, completions)]

async def remote(completions, completion_ids, **kwargs):
    async def one(ids):
        await asyncio.sleep(0.001)
        return float(len(ids))
    return list(await asyncio.gather(*map(one, completion_ids)))

def not_applicable(completions, **kwargs):
    return [None] * len(completions)

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "acc": 0.0}
'''
FAST = ("scoring.processes=1", "optim.steps=3", "eval.every=0", "eval.samples=1", "run=out")


@pytest.mark.parametrize(
    "reward",
    ["[trl.py:correctness, trl.py:remote, trl.py:compute_score]", "trl.py:only_small"],
    ids=["three functions", "one that is not applicable to some prompts"],
)
def test_functions_written_for_trl_and_verl_run_unchanged(base, here, reward):
    (here / "trl.py").write_text(TRL)
    folder = run(base, *FAST, f"reward={reward}")
    metrics = rows(folder)
    assert [row["rewards/failed"] for row in metrics] == [0.0, 0.0, 0.0]
    assert all(json.loads(json.dumps(row)) == row for row in metrics)  # no NaN
    assert all(abs(row["advantage_mean"]) < 1e3 for row in metrics)
    assert (folder / "plugins" / "trl.py").read_text() == TRL


def test_a_list_with_weights_is_reported_by_part_and_resumes(base, here, capsys):
    (here / "trl.py").write_text(TRL)
    parts = "[task, {name: trl.py:remote, weight: 0.5}, {name: repetition, n: 2, coef: 0.1}]"
    folder = run(base, *FAST, "scoring.processes=0", f"reward={parts}")
    for row in rows(folder):
        total = row["rewards/task"] + 0.5 * row["rewards/remote"] + row["rewards/repetition"]
        assert row["reward"] == pytest.approx(total, abs=1e-5)
        assert row["rewards/remote"] == pytest.approx(row["response_length"])
    resume(folder, "optim.steps=4")
    assert len(rows(folder)) == 4
    (here / "trl.py").write_text(TRL + "\n")
    error = train_error(capsys, f"resume={folder}", "optim.steps=5")
    assert "trl.py differs from" in error


@pytest.mark.parametrize(
    "options",
    [(), ("sampling.zero_variance=drop",), ("advantage=gae", "loss=clip", "critic.kind=head")],
    ids=["grpo", "zero_variance=drop", "critic"],
)
def test_a_step_in_which_no_response_has_a_score_changes_nothing_and_ends_nothing(
    base, here, options
):
    (here / "trl.py").write_text(TRL)
    reward = ("scoring.processes=0", "reward=trl.py:not_applicable", "kl_ref.coef=0")
    metrics = rows(run(base, *FAST, *reward, *options))
    assert [row["skipped_updates"] for row in metrics] == [0.0, 0.0, 0.0]
    assert [row.get("grad_norm/policy", 0.0) for row in metrics] == [0.0, 0.0, 0.0]


# ------------------------------------------------------------------ rows without a score


def unscored() -> tuple[Batch, torch.Tensor]:
    """Two groups of three responses; the second and the fourth response have no score."""
    ids = torch.arange(24).view(6, 4)
    mask = torch.arange(4) < torch.tensor([4, 2, 3, 1, 4, 2])[:, None]
    scores = torch.tensor([1.0, float("nan"), 1.0, float("nan"), 0.0, 1.0])
    return Batch(ids, mask, ids, mask, -torch.ones(6, 4), torch.zeros(6, dtype=torch.bool)), scores


def test_a_row_without_a_score_loses_its_tokens_and_what_was_known_of_them():
    batch, scores = unscored()
    scored = ~scores.isnan()
    after = batch.without_rows(scores.isnan())
    assert after.mask.any(1).tolist() == scored.tolist()
    assert after.sampler_logprobs[~scored].abs().sum() == 0
    assert batch.mask.any(1).all()  # the batch it came from is unchanged
    for mode in ("token", "sequence", "constant"):
        weights = token_weights(after.mask, mode, 4)
        assert torch.equal(weights[scored], token_weights(batch.mask[scored], mode, 4))
        assert not weights[~scored].any()


def test_a_group_has_zero_variance_by_the_scores_that_exist():
    batch, scores = unscored()
    batch.fill(scores=scores)
    assert nonzero_variance(scores, 3).tolist() == [False, False, False, True, True, True]
    no_scores = torch.full((6,), float("nan"))
    assert not nonzero_variance(no_scores, 3).any()
    rollout = Rollout(batch, batch, {"a": scores, "b": no_scores}, [], [], metrics={})
    metrics = rollout_metrics(rollout, 3)
    assert metrics["reward"] == 0.75
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["rewards/a"] == 0.75
    assert "rewards/b" not in metrics


def test_dropping_groups_of_zero_variance_leaves_a_batch_even_where_no_row_has_a_score():
    batch, scores = unscored()
    batch.fill(scores=scores)
    assert torch.equal(
        batch.drop_zero_variance(3).scores.nan_to_num(-1), torch.tensor([-1.0, 0, 1])
    )
    batch.fill(scores=torch.full((6,), float("nan")))
    assert len(batch.drop_zero_variance(3)) == 6
