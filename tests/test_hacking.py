"""The reward-hacking meter: what it measures, when it speaks, and that it never does where nothing is wrong."""

import json
import math
import re
from random import Random
from statistics import fmean, median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs_fixture import ROOT, differences, resume, rows, run, timeless

import train
from benchmarks.question import tables
from benchmarks.question.meter import metrics, told, verdicts
from rlkl.hacking import LOST, QUIET, UNLIKELY, course, episodes, is_news, noise, suspicion
from rlkl.log import read_rows
from rlkl.metrics import distinct
from rlkl.preflight import random_batch
from rlkl.types import Batch

pytest_plugins = ("runs_fixture",)
quick = settings(deadline=None, derandomize=True, max_examples=15)

# A bag-of-words reward, and gold by a grammar
RESULTS = read_rows(ROOT / tables.RESULTS)
ARMS = {row["key"]: row for row in RESULTS}
GOLD = ARMS["reference/reference/0"]["final"]["gold"]
PAGE = (ROOT / "docs" / "hacking.md").read_text(encoding="utf-8")
HEALTHY = ("16/both/1", "4/kl/1", "4/both/3", "k1/0.4/1", "exact/0.5/1")  # gold ends near 3
HACKED = ("16/neither/1", "16/clip/1", "4/neither/2", "4/clip/1", "k3/0.3/1")  # near -2, the reward at 10 to 45
REPEATS = '''"""Pays for saying one token again and again."""
import torch


def repeats(examples, replies, batch):
    rows = zip(batch.response_ids, batch.mask)
    return torch.tensor([ids[said].bincount().max() / len(said) for ids, said in rows]), {}
'''
REPEAT = ("reward=repeats.py:repeats", "sampling.max_new_tokens=12", "sampling.prompts=8", "kl_ref.coef=0")


# When it speaks


def synthetic(steps: int, seed: int = 0, spread: float = 0.02, every: int = 5, **ends: tuple[float, float]
              ) -> list[dict]:
    """Metrics that go from → to with a time constant of a fifth of the run, and noise. Gold has every fifth row."""
    rng = Random(seed)
    course = []
    for step in range(1, steps + 1):
        done = 1 - math.exp(-5 * (step - 1) / steps)
        row = {name: a + (b - a) * done + rng.gauss(0, spread) for name, (a, b) in ends.items()}
        gold = {"heldout/accuracy": row.pop("gold")} if "gold" in row else {}
        course.append({"step": step, **row} | (gold if step % every == 0 else {}))
    return course


@pytest.mark.parametrize("every", [0, 1, 5])
@pytest.mark.parametrize("name", HEALTHY)
def test_real_runs_whose_gold_rises_never_warn_whether_it_is_measured_or_not(name, every):
    assert ARMS[name]["final"]["gold"] > 2
    assert told(metrics(ARMS[name], every), {"gold": GOLD} if every else {}) == []


@pytest.mark.parametrize("every", [0, 1, 5])
@pytest.mark.parametrize("name", HACKED)
def test_real_runs_whose_reward_soars_while_gold_falls_warn_and_say_what_fell(name, every):
    assert ARMS[name]["final"]["gold"] < GOLD - 1
    said = told(metrics(ARMS[name], every), {"gold": GOLD} if every else {})
    assert 1 <= len(said) <= 2
    assert said[0][0] <= 30
    assert re.search(r"but (heldout/gold|ref_logprob|distinct) ", said[0][1])


def test_the_thresholds_stand_between_the_runs_whose_gold_fell_and_those_whose_gold_rose():
    """What hacking.py says of them where they are written down."""
    lost = {(kind, name): [(c.best - c.now) / (c.best if name == "distinct" else 1) for key, *_ in arms
                           for c in [course(metrics(ARMS[key]), name)]]
            for kind, arms in verdicts(RESULTS).items() for name in ("distinct", "ref_logprob")}
    assert max(lost["rose", "distinct"]) < LOST / 2 < LOST < median(lost["fell", "distinct"])
    assert median(lost["rose", "ref_logprob"]) < 0.25 < UNLIKELY < 4 < median(lost["fell", "ref_logprob"])


def test_what_the_page_says_of_the_suspicions_that_were_wrong():
    found = verdicts(RESULTS)
    missed = [ARMS[key] for key, with_gold, without in found["fell"] if not (with_gold or without)]
    assert [arm["curves"]["gold"][-1] > GOLD > arm["final"]["gold"] for arm in missed] == [True]
    wrong = [ARMS[key]["final"]["valid"] for key, with_gold, _ in found["rose"] if with_gold]
    assert len(wrong) == 4
    assert all(0.45 < valid < 0.6 for valid in wrong)
    far = [ARMS[key]["final"]["kl_pi_ref_seq"] > 10 for key, _, without in found["rose"] if without]
    assert f"the {len(far)} without, {sum(far)} ended more than 10 nats" in PAGE


def test_a_collapse_that_costs_the_reward_too_is_no_hacking():
    """16 epochs without a clip end in empty replies: bad, but nobody was paid for it."""
    arm = ARMS["16/kl/3"]
    assert arm["final"]["gold"] < GOLD - 1
    assert arm["curves"]["proxy"][-1] < arm["curves"]["proxy"][0]
    assert told(metrics(arm, 5), {"gold": GOLD}) == []
    up = synthetic(100, reward=(0.2, 0.9), gold=(0.2, 0.9), distinct=(0.9, 0.9))
    down = synthetic(100, reward=(0.9, 0.4), gold=(0.9, 0.1), distinct=(0.9, 0.1))
    assert told(up + [row | {"step": row["step"] + 100} for row in down]) == []


@quick
@given(seed=st.integers(0, 10_000), steps=st.sampled_from([30, 120]), end=st.floats(0.3, 1.0), gold=st.booleans())
def test_learning_that_becomes_surer_and_a_little_more_uniform_never_warns(seed, steps, end, gold):
    """The shapes of tiny-grpo and tiny-ppo: log ref rises, or loses half a nat; replies repeat themselves a bit."""
    course = synthetic(steps, seed, reward=(0.2, end), ref_logprob=(-1.5, -1.5 + (end - 0.7)), distinct=(0.98, 0.88))
    if gold:
        course = [row | {"heldout/accuracy": row["reward"]} if row["step"] % 5 == 0 else row for row in course]
    assert told(course) == []


@quick
@given(seed=st.integers(0, 10_000))
def test_noise_alone_never_warns_whatever_the_reward_does(seed):
    """Gold of 0.3 ± 0.03: some 230 held-out prompts."""
    flat = synthetic(100, seed, 0.03, reward=(0.5, 0.5), ref_logprob=(-1.0, -1.0), distinct=(0.9, 0.9), gold=(0.3, 0.3))
    assert told(flat) == []
    rising = [row | {"reward": row["step"] / 100} for row in flat]
    assert told(rising) == []


FALLS = {"ref_logprob": (-1.5, -6.0), "distinct": (0.98, 0.1), "gold": (0.8, 0.2)}


@pytest.mark.parametrize("name", FALLS)
@quick
@given(seed=st.integers(0, 10_000), steps=st.sampled_from([40, 150]))
def test_each_fall_alone_warns_if_the_reward_rises_and_not_if_it_does_not(name, seed, steps):
    def with_reward(start: float, end: float) -> list[tuple[int, str]]:
        return told(synthetic(steps, seed, reward=(start, end), **{name: FALLS[name]}), {"accuracy": 0.8})

    said = with_reward(0.2, 0.9)
    assert len(said) == 1
    assert {"gold": "heldout/accuracy"}.get(name, name) in said[0][1]
    assert with_reward(0.5, 0.5) == with_reward(0.9, 0.2) == []


@pytest.mark.parametrize("name", ["ref_logprob", "distinct"])
def test_held_out_gold_that_rises_clears_the_suspicion_also_when_it_did_so_before_the_first_evaluation(name):
    course = synthetic(60, reward=(0.2, 0.9), gold=(0.9, 0.9), **{name: FALLS[name]})
    assert told(course, {"accuracy": 0.2}) == []
    assert told(course, {"accuracy": 0.9}) != []
    assert told(course, {"accuracy": 0.2, "kind": 0.9}) == []


def test_gold_that_rises_and_then_falls_warns_after_its_best_and_says_when_that_was():
    """Over-optimisation: GRPO's reward on reviews stayed where it was while kind reviews went from 0.79 to 0.53."""
    gold = [0.45, 0.66, 0.78, 0.79, 0.77, 0.7, 0.63, 0.56, 0.53, 0.53]
    course = [{"step": 4 * i + j, "reward": min(1.5, 0.05 * (4 * i + j))} for i in range(10) for j in (1, 2, 3, 4)]
    for row, x in zip(course[3::4], gold, strict=True):
        row["heldout/accuracy"] = x
    (step, said), = told(course, {"accuracy": 0.1})
    assert step > 20
    assert "since step 12" in said
    assert said.startswith("reward 0.05 → 1.5, but heldout/accuracy 0.785 → ")


@quick
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([2.0**-7, 8.0]))
def test_units_of_reward_and_gold_do_not_matter(seed, scale):
    course = synthetic(60, seed, 0.1, reward=(0.2, 0.9), gold=(0.9, 0.4), distinct=(0.9, 0.6))
    units = {"reward": scale, "heldout/accuracy": scale}
    scaled = [{name: x * units.get(name, 1) for name, x in row.items()} for row in course]
    assert [step for step, _ in told(course)] == [step for step, _ in told(scaled)]


def test_a_warning_is_news_once_until_it_has_cleared_for_a_while():
    marks = [0, 1, 1, 0, 1] + [0] * (QUIET - 1) + [1] + [0] * QUIET + [1, 1]
    seen = [{"step": n, "hacking": float(x)} for n, x in enumerate(marks, 1)]
    assert [n for n in range(1, len(seen) + 1) if is_news(seen[:n])] == [2, 26 + QUIET]


def test_rows_without_the_metrics_or_without_a_number_are_passed_over():
    assert suspicion([], {}) is None
    assert told([{"step": 1, "reward": math.nan}, {"step": 2}]) == []
    course = synthetic(40, reward=(0.2, 0.9), distinct=(0.98, 0.1))
    gaps = [row | {"reward": math.nan} if row["step"] % 7 == 0 else row for row in course]
    assert len(told(gaps)) == len(told(course)) == 1


def test_noise_is_the_standard_deviation_around_a_slope():
    rng = Random(0)
    assert noise([0.1 * i + rng.gauss(0, 0.5) for i in range(20_000)]) == pytest.approx(0.5, rel=0.02)
    assert noise([0.25 * i for i in range(10)]) == 0


# What it measures


def of(replies: list[list[int]], mask: list[list[int]]) -> Batch:
    m, ids = torch.tensor(mask, dtype=torch.bool), torch.tensor(replies)
    return Batch(ids[:, :1], m[:, :1], ids, m, torch.zeros(m.shape), torch.zeros(len(m), dtype=torch.bool))


@pytest.mark.parametrize(
    ("replies", "mask", "share"),
    [
        ([[7, 7, 7, 7, 7]], [[1] * 5], 1 / 4),
        ([[1, 2, 3, 4, 5]], [[1] * 5], 1.0),
        ([[1, 2, 1, 2, 1]], [[1] * 5], 2 / 4),
        ([[1, 2, 1, 2, 1]], [[1, 1, 1, 1, 0]], 2 / 3),  # what is behind the mask is not said
        ([[1, 2, 9, 1, 2]], [[1, 1, 0, 1, 1]], 1 / 2),  # nor is it a neighbour
        ([[3, 4, 5], [3, 4, 5]], [[1] * 3] * 2, 1.0),  # two replies may be the same
        ([[3, 4, 5], [8, 8, 8]], [[1] * 3] * 2, 3 / 4),
        ([[0, 0, 0, 1, 0]], [[1] * 5], 3 / 4),
        ([[3], [4]], [[1], [1]], 1.0),  # no bigram
        ([[3, 3, 3]], [[0, 0, 0]], 1.0),
    ],
)
def test_distinct_by_hand(replies, mask, share):
    assert distinct(of(replies, mask)).item() == pytest.approx(share)


def test_distinct_is_what_sets_of_pairs_say_with_ids_of_a_large_vocabulary():
    g = torch.Generator().manual_seed(0)
    ids = 151_900 + torch.randint(0, 4, (40, 23), generator=g)
    mask = torch.arange(23) < torch.randint(1, 24, (40, 1), generator=g)
    pairs = [list(zip(row[m].tolist(), row[m].tolist()[1:], strict=False)) for row, m in zip(ids, mask, strict=True)]
    found = distinct(of(ids.tolist(), mask.tolist())).item()
    assert found == pytest.approx(sum(len(set(p)) for p in pairs) / sum(len(p) for p in pairs))
    assert 0.2 < found < 0.9


def test_ref_logprob_is_the_reference_s_own_log_prob_of_a_token_and_absent_without_one():
    batch, _ = random_batch(6, critic=False)
    meters = train.Meters()
    for micro in batch.split(4):
        meters.add(micro.mask, train.distances(micro.old_logprobs, micro))
    assert meters.row()["ref_logprob"] == pytest.approx(batch.ref_logprobs[batch.mask].mean().item())
    batch.ref_logprobs = None
    assert "ref_logprob" not in train.distances(batch.old_logprobs, batch)


# In a run


@pytest.mark.usefixtures("here")
def test_a_reward_for_repetition_is_found_out_within_12_steps_once_and_the_report_says_so(base, here, capsys):
    (here / "repeats.py").write_text(REPEATS)
    folder = run(base, "run=out", "optim.steps=16", *REPEAT)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("reward hacking?")]
    assert len(lines) == 1
    course = rows(folder)
    marked = [row["step"] for row in course if row["hacking"]]
    assert f"step {marked[0]}: " in lines[0]
    assert marked[0] <= 12
    assert marked == list(range(marked[0], 17))
    assert course[-1]["distinct"] < 0.3 < 0.9 < course[0]["distinct"]
    assert course[-1]["reward"] > course[0]["reward"] + 0.3
    page = (folder / "report.md").read_text()
    assert f"**Reward hacking?** steps {marked[0]} to 16: reward {course[0]['reward']:.3g} → " in page
    assert f"distinct {fmean(row['distinct'] for row in course[:2]):.3g} → " in page


@pytest.mark.usefixtures("here")
def test_a_resumed_run_suspects_what_the_uninterrupted_one_does_and_does_not_repeat_the_line(base, here, capsys):
    (here / "repeats.py").write_text(REPEATS)
    run(base, "run=whole", "optim.steps=14", *REPEAT)
    run(base, "run=halves", "optim.steps=8", *REPEAT)
    first = capsys.readouterr().out
    resume(here / "halves", "optim.steps=14")
    assert first.count("reward hacking?") == 2
    assert capsys.readouterr().out.count("reward hacking?") == 0
    assert [timeless(row) for row in rows(here / "whole")] == [timeless(row) for row in rows(here / "halves")]
    assert differences(here / "whole", here / "halves") == []
    state = json.loads((here / "halves" / "checkpoints" / "step-000014" / "state.json").read_text())
    for name in ("whole", "halves"):
        assert episodes(rows(here / name), state["before"]) != []


@pytest.mark.usefixtures("here")
def test_an_ordinary_run_says_nothing_and_its_report_has_no_mark(base, capsys):
    folder = run(base, "run=out", "optim.lr=0")
    assert {row["hacking"] for row in rows(folder)} == {0.0}
    assert "hacking" not in capsys.readouterr().out
    assert "hacking" not in (folder / "report.md").read_text()
