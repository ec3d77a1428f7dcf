"""Whole runs: three functions written for TRL and one for verl go in as they are, None and a weight take effect."""

import json

import pytest
import torch
from runs_fixture import base, here, rows, run  # noqa: F401
from runs_fixture import resume as resumed

import train
from rlkl.losses import token_weights
from rlkl.metrics import describe
from rlkl.rewards import informative, without_rows
from rlkl.types import Batch

TRL = '''
import asyncio
import re

def correctness(prompts, completions, answer, **kwargs):
    return [1.0 if c == a else 0.1 * sum(x.isdigit() for x in c) for c, a in zip(completions, answer)]

def only_small(completions, prompts, trainer_state, **kwargs):
    """Not applicable to some prompts, as in TRL's multi-task example; and it knows where training is."""
    assert trainer_state.global_step < trainer_state.max_steps
    at = trainer_state.global_step
    return [float(len(c)) + at if p[0] in "01234" else None for p, c in zip(prompts, completions)]

async def remote(completions, completion_ids, **kwargs):
    async def one(ids):
        await asyncio.sleep(0.001)
        return float(len(ids))
    return list(await asyncio.gather(*map(one, completion_ids)))

def nobody(completions, **kwargs):
    return [None] * len(completions)

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "acc": 0.0}
'''
FAST = ("scoring.processes=1", "optim.steps=3", "eval.every=0", "eval.samples=1")


@pytest.mark.parametrize("name", ["correctness", "only_small", "remote", "compute_score"])
def test_a_function_written_for_trl_or_verl_runs_as_it_is(base, here, name):  # noqa: F811
    (here / "trl.py").write_text(TRL)
    folder = run(base, *FAST, f"reward.name=trl.py:{name}", "run=out")
    found = rows(folder)
    assert [row["reward/failed"] for row in found] == [0.0, 0.0, 0.0]
    assert all(json.loads(json.dumps(row)) == row for row in found)  # no NaN
    assert all(abs(row["advantage"]) < 1e3 for row in found)
    assert (folder / "plugins" / "trl.py").read_text() == TRL


def test_a_list_with_weights_is_reported_by_part_and_resumes(base, here):  # noqa: F811
    (here / "trl.py").write_text(TRL)
    parts = "[task, {name: trl.py:remote, weight: 0.5}, {name: repetition, n: 2, coef: 0.1}]"
    folder = run(base, *FAST, "scoring.processes=0", f"reward={parts}", "run=out")
    for row in rows(folder):
        total = row["reward/task"] + 0.5 * row["reward/remote"] + row["reward/repetition"]
        assert row["reward"] == pytest.approx(total, abs=1e-5)
        assert row["reward/remote"] == pytest.approx(row["length"])
    resumed(folder, "optim.steps=4")
    assert len(rows(folder)) == 4
    (here / "trl.py").write_text(TRL + "\n")
    with pytest.raises(train.UserError, match=r"trl\.py differs from"):
        train.train(train.runs.configure([f"resume={folder}", "optim.steps=5"]), [])


@pytest.mark.parametrize(
    "extra", [(), ("sampling.unanimous=drop",), ("advantage=gae", "loss=ppo", "model.critic=head")])
def test_a_step_in_which_no_reply_has_a_score_changes_nothing_and_ends_nothing(base, here, extra):  # noqa: F811
    (here / "trl.py").write_text(TRL)
    folder = run(base, *FAST, "scoring.processes=0", "reward=trl.py:nobody", "kl_ref.coef=0", *extra, "run=out")
    assert [row["skipped"] for row in rows(folder)] == [0.0, 0.0, 0.0]
    assert [row["grad_norm/policy"] for row in rows(folder)] == [0.0, 0.0, 0.0]


# Rows without a score, after judging
def unscored() -> tuple[Batch, torch.Tensor]:
    ids, mask = torch.arange(24).view(6, 4), torch.arange(4) < torch.tensor([4, 2, 3, 1, 4, 2])[:, None]
    scores = torch.tensor([1.0, float("nan"), 1.0, float("nan"), 0.0, 1.0])
    return Batch(ids, mask, ids, mask, -torch.ones(6, 4), torch.zeros(6, dtype=torch.bool)), scores


def test_a_row_without_a_score_loses_its_tokens_and_everything_that_was_known_of_them():
    batch, scores = unscored()
    after = without_rows(batch, scores.isnan())
    assert after.mask.any(1).tolist() == [True, False, True, False, True, True]
    assert after.sampler_logprobs[[1, 3]].abs().sum() == 0
    assert batch.mask.any(1).all()  # the batch it came from is as it was
    for how in ("token", "sequence", "constant"):
        weights, rest = token_weights(after.mask, how, 4), token_weights(batch.mask[~scores.isnan()], how, 4)
        assert torch.equal(weights[~scores.isnan()], rest)
        assert not weights[scores.isnan()].any()


def test_a_group_is_unanimous_by_the_scores_that_exist():
    batch, scores = unscored()
    assert informative(scores, 3).tolist() == [False, False, False, True, True, True]
    nothing = torch.full((6,), float("nan"))
    assert informative(nothing, 3).all()
    row = describe(batch, scores, {"a": scores, "b": nothing}, 3)
    assert row["reward"] == 0.75
    assert row["unanimous"] == 0.5
    assert row["reward/a"] == 0.75
    assert "reward/b" not in row
