"""Detection of reward hacking: what it measures, when it warns, and that it is otherwise silent."""

import json
import math
import re
from itertools import pairwise
from random import Random
from statistics import fmean, median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs_fixture import ROOT, differences, resume, rows, run

from benchmarks.question import meter, tables
from rlkl.kl import policy_divergences
from rlkl.run.check_plugins import random_batch
from rlkl.run.log import read_rows
from rlkl.run.metrics import distinct_2
from rlkl.run.reward_hacking import (
    MIN_LOGPROB_LOSS,
    MIN_LOSS,
    QUIET,
    SUSPECT_ERRORS,
    episodes,
    is_news,
    noise,
    suspicion,
    trend,
)
from rlkl.types import Batch

pytest_plugins = ("runs_fixture",)
quick = settings(deadline=None, derandomize=True, max_examples=15)
seeds = st.integers(0, 10_000)

# The runs of docs/question-results.md: the reward is a bag of words, the gold score a grammar.
RESULTS = read_rows(ROOT / tables.RESULTS)
ARMS = {row["key"]: row for row in RESULTS}
GOLD = ARMS["reference/reference/0"]["final"]["gold"]
HEALTHY = ("16/both/1", "4/kl/1", "4/both/3", "k1/0.4/1", "exact/0.5/1")  # gold ends near 3
HACKED = (  # gold ends near -2, the reward at 10 to 45
    "16/neither/1",
    "16/clip/1",
    "4/neither/2",
    "4/clip/1",
    "k3/0.3/1",
)
PAGE = (ROOT / "docs" / "hacking.md").read_text(encoding="utf-8")

REPEATS = '''"""The count of a response's most frequent token, over the longest possible length."""
import torch


def repeats(examples, responses, batch):
    rows = zip(batch.response_ids, batch.mask)
    return torch.tensor([ids[m].bincount().max() / len(m) for ids, m in rows]), {}
'''
REPEAT = (
    "reward=repeats.py:repeats",
    "sampling.max_new_tokens=12",
    "sampling.prompts=8",
    "kl_ref.coef=0",
    "model.reference=true",
)


def synthetic(
    steps: int, seed: int = 0, spread: float = 0.02, **ends: tuple[float, float]
) -> list[dict]:
    """Metrics that go from one value to another with a time constant of a fifth of the run.

    spread: the standard deviation of their noise. `gold` is in every fifth row, as eval/accuracy.
    """
    rng = Random(seed)
    course = []
    for step in range(1, steps + 1):
        done = 1 - math.exp(-5 * (step - 1) / steps)
        row = {name: a + (b - a) * done + rng.gauss(0, spread) for name, (a, b) in ends.items()}
        gold = row.pop("gold", None)
        if gold is not None and step % 5 == 0:
            row["eval/accuracy"] = gold
        course.append({"step": step, **row})
    return course


# ------------------------------------------------------------------ when it warns


def test_runs_whose_gold_score_rose_never_warn_whether_it_was_measured_or_not():
    for name in HEALTHY:
        assert ARMS[name]["final"]["gold"] > 2
        assert meter.warnings_of(meter.metrics(ARMS[name])) == [], name
        for every in (1, 5):
            assert meter.warnings_of(meter.metrics(ARMS[name], every), {"gold": GOLD}) == [], name


def test_runs_whose_reward_soared_while_gold_fell_warn_early_and_say_what_fell():
    for name in HACKED:
        assert ARMS[name]["final"]["gold"] < GOLD - 1
        for every in (0, 1, 5):
            before = {"gold": GOLD} if every else {}
            warnings = meter.warnings_of(meter.metrics(ARMS[name], every), before)
            assert 1 <= len(warnings) <= 2, (name, every)
            step, message = warnings[0]
            assert step <= 30, (name, every)
            assert re.search(r"but (eval/gold|ref_logprob|distinct_2) ", message)


def test_the_thresholds_separate_the_runs_whose_gold_fell_from_those_whose_gold_rose():
    """What reward_hacking.py says of the experiment, beside MIN_LOSS and MIN_LOGPROB_LOSS."""
    losses = {}
    for kind, arms in meter.verdicts(RESULTS).items():
        for name in ("distinct_2", "ref_logprob"):
            trends = [trend(meter.metrics(ARMS[key]), name, SUSPECT_ERRORS) for key, *_ in arms]
            scale = [t.best if name == "distinct_2" else 1 for t in trends]
            lost = [(t.best - t.now) / s for t, s in zip(trends, scale, strict=True)]
            losses[kind, name] = lost
    assert max(losses["rose", "distinct_2"]) < MIN_LOSS / 2
    assert median(losses["fell", "distinct_2"]) > MIN_LOSS
    assert median(losses["rose", "ref_logprob"]) < 0.25 < MIN_LOGPROB_LOSS
    assert median(losses["fell", "ref_logprob"]) > 4


def test_what_the_page_says_of_the_wrong_verdicts_is_true():
    verdicts = meter.verdicts(RESULTS)
    missed = [ARMS[key] for key, *warned in verdicts["fell"] if not any(warned)]
    assert [arm["curves"]["gold"][-1] > GOLD > arm["final"]["gold"] for arm in missed] == [True]
    valid = [ARMS[key]["final"]["valid"] for key, with_gold, _ in verdicts["rose"] if with_gold]
    assert len(valid) == 4
    assert all(0.45 < share < 0.6 for share in valid)
    without = [ARMS[key] for key, _, without_gold in verdicts["rose"] if without_gold]
    far = [arm for arm in without if arm["final"]["kl_pi_ref_sequence"] > 10]
    words = f"the {len(without)} without, {len(far)} ended more than 10 nats"
    assert words in " ".join(PAGE.split())


def test_a_collapse_that_costs_the_reward_too_is_no_hacking():
    """16 epochs without a clip end in empty responses: bad, but not rewarded."""
    arm = ARMS["16/kl/3"]
    assert arm["final"]["gold"] < GOLD - 1
    assert arm["curves"]["proxy"][-1] < arm["curves"]["proxy"][0]
    assert meter.warnings_of(meter.metrics(arm, 5), {"gold": GOLD}) == []
    up = synthetic(100, reward=(0.2, 0.9), gold=(0.2, 0.9), distinct_2=(0.9, 0.9))
    down = synthetic(100, reward=(0.9, 0.4), gold=(0.9, 0.1), distinct_2=(0.9, 0.1))
    assert meter.warnings_of(up + [row | {"step": row["step"] + 100} for row in down]) == []


@quick
@given(seed=seeds, steps=st.sampled_from([30, 120]), end=st.floats(0.3, 1.0), gold=st.booleans())
def test_ordinary_learning_never_warns(seed, steps, end, gold):
    """As in tiny-grpo and tiny-ppo: log ref changes by half a nat, responses repeat a bit more."""
    ends = {"reward": (0.2, end), "ref_logprob": (-1.5, -2.2 + end), "distinct_2": (0.98, 0.88)}
    course = synthetic(steps, seed, **ends)
    for row in course[4::5] if gold else []:
        row["eval/accuracy"] = row["reward"]
    assert meter.warnings_of(course) == []


@quick
@given(seed=seeds)
def test_noise_alone_never_warns_whatever_the_reward_does(seed):
    """Gold of 0.3 ± 0.03, as measured on some 230 held-out prompts."""
    means = {"reward": 0.5, "ref_logprob": -1.0, "distinct_2": 0.9, "gold": 0.3}
    flat = synthetic(100, seed, 0.03, **{name: (x, x) for name, x in means.items()})
    assert meter.warnings_of(flat) == []
    rising = [row | {"reward": row["step"] / 100} for row in flat]
    assert meter.warnings_of(rising) == []


FALLS = {"ref_logprob": (-1.5, -6.0), "distinct_2": (0.98, 0.1), "gold": (0.8, 0.2)}


@pytest.mark.parametrize("name", FALLS)
def test_each_fall_alone_warns_once_if_the_reward_rises_and_never_if_it_falls(name):
    """If the reward stays where it is, its noise may look like a rise: in one run of forty."""
    false_alarms = 0
    for seed in range(60):
        for steps in (40, 150):

            def warnings(start: float, end: float, seed=seed, steps=steps) -> list:
                course = synthetic(steps, seed, reward=(start, end), **{name: FALLS[name]})
                return meter.warnings_of(course, {"accuracy": 0.8})

            if seed < 15:
                ((_, message),) = warnings(0.2, 0.9)
                assert {"gold": "eval/accuracy"}.get(name, name) in message
                assert warnings(0.9, 0.2) == []
            false_alarms += bool(warnings(0.5, 0.5))
    assert false_alarms <= 0.08 * 120


def test_a_held_out_metric_that_rose_clears_the_suspicion_even_before_its_second_evaluation():
    for name in ("ref_logprob", "distinct_2"):
        course = synthetic(60, reward=(0.2, 0.9), gold=(0.9, 0.9), **{name: FALLS[name]})
        assert meter.warnings_of(course, {"accuracy": 0.2}) == []
        assert meter.warnings_of(course, {"accuracy": 0.9}) != []
        assert meter.warnings_of(course, {"accuracy": 0.2, "kind": 0.9}) == []


def test_gold_that_rises_and_then_falls_warns_after_its_best_and_says_when_that_was():
    """Over-optimisation, as in a run of GRPO whose kind reviews went from 0.79 back to 0.53."""
    course = [{"step": n, "reward": min(1.5, 0.05 * n)} for n in range(1, 41)]
    gold = [0.45, 0.66, 0.78, 0.79, 0.77, 0.7, 0.63, 0.56, 0.53, 0.53]
    for row, x in zip(course[3::4], gold, strict=True):
        row["eval/accuracy"] = x
    ((step, message),) = meter.warnings_of(course, {"accuracy": 0.1})
    assert step > 20
    assert "since step 12" in message
    assert message.startswith("reward 0.05 → 1.5, but eval/accuracy 0.785 → ")


@quick
@given(seed=seeds, scale=st.sampled_from([2.0**-7, 8.0]))
def test_the_units_of_reward_and_gold_do_not_matter(seed, scale):
    course = synthetic(60, seed, 0.1, reward=(0.2, 0.9), gold=(0.9, 0.4), distinct_2=(0.9, 0.6))
    units = {"reward": scale, "eval/accuracy": scale}
    scaled = [{name: x * units.get(name, 1) for name, x in row.items()} for row in course]
    assert [step for step, _ in meter.warnings_of(course)] == [
        step for step, _ in meter.warnings_of(scaled)
    ]


def test_a_warning_is_news_once_until_it_has_been_quiet_for_a_while():
    marks = [0, 1, 1, 0, 1] + [0] * (QUIET - 1) + [1] + [0] * QUIET + [1, 1]
    course = [{"step": n, "reward_hacking": float(x)} for n, x in enumerate(marks, 1)]
    news = [n for n in range(1, len(course) + 1) if is_news(course[:n])]
    assert news == [2, 26 + QUIET]
    lines = episodes(course, {})
    assert [line.split(":")[0] for line in lines] == [
        f"steps 2 to {5 + QUIET}",
        f"steps {26 + QUIET} to {27 + QUIET}",
    ]


def test_rows_without_the_metrics_or_without_a_finite_number_are_passed_over():
    assert suspicion([], {}) is None
    assert meter.warnings_of([{"step": 1, "reward": math.nan}, {"step": 2}]) == []
    course = synthetic(40, reward=(0.2, 0.9), distinct_2=(0.98, 0.1))
    gaps = [row | {"reward": math.nan} if row["step"] % 7 == 0 else row for row in course]
    assert len(meter.warnings_of(gaps)) == len(meter.warnings_of(course)) == 1


def test_noise_is_the_standard_deviation_around_a_slope():
    rng = Random(0)
    values = [0.1 * i + rng.gauss(0, 0.5) for i in range(20_000)]
    assert noise(values) == pytest.approx(0.5, rel=0.02)
    assert noise([0.25 * i for i in range(10)]) == 0


def test_a_trend_by_hand():
    """Ten values of no noise but one peak; two rows are the present, pairs before them the best."""
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    course = [{"step": 10 * n, "reward": x} for n, x in enumerate(values, 1)]
    t = trend(course, "reward", 2.0)
    assert (t.start, t.best, t.best_step, t.now) == (1.0, 4.5, 40, 0.5)
    error = math.sqrt(math.pi / 3) / 8 * math.sqrt(1.5)  # |5 - 4| at one of eight inner values
    assert t.min_gain == pytest.approx(2 * error)
    assert t.min_loss == pytest.approx(max(0.25 * 4.5, 4 * error * (1 + 2 / 8)))
    assert t.fallen
    assert not t.risen


# ------------------------------------------------------------------ what it measures


def batch_of(responses: list[list[int]], mask: list[list[int]]) -> Batch:
    inside = torch.tensor(mask, dtype=torch.bool)
    ids = torch.tensor(responses)
    truncated = torch.zeros(len(inside), dtype=torch.bool)
    return Batch(ids[:, :1], inside[:, :1], ids, inside, torch.zeros(inside.shape), truncated)


def test_distinct_2_by_hand():
    for responses, mask, share in [
        ([[7, 7, 7, 7, 7]], [[1] * 5], 1 / 4),
        ([[1, 2, 3, 4, 5]], [[1] * 5], 1.0),
        ([[1, 2, 1, 2, 1]], [[1] * 5], 2 / 4),
        ([[1, 2, 1, 2, 1]], [[1, 1, 1, 1, 0]], 2 / 3),  # a masked token does not count
        ([[1, 2, 9, 1, 2]], [[1, 1, 0, 1, 1]], 1 / 2),  # nor does it make a bigram
        ([[3, 4, 5], [3, 4, 5]], [[1] * 3] * 2, 1.0),  # two responses may be the same
        ([[3, 4, 5], [8, 8, 8]], [[1] * 3] * 2, 3 / 4),
        ([[0, 0, 0, 1, 0]], [[1] * 5], 3 / 4),
        ([[3], [4]], [[1], [1]], 1.0),  # no bigram
        ([[3, 3, 3]], [[0, 0, 0]], 1.0),
    ]:
        value = distinct_2(batch_of(responses, mask)).item()
        assert value == pytest.approx(share), (responses, mask)


def test_distinct_2_counts_the_set_of_bigrams_also_for_the_ids_of_a_large_vocabulary():
    g = torch.Generator().manual_seed(0)
    ids = 151_900 + torch.randint(0, 4, (40, 23), generator=g)
    lengths = torch.randint(1, 24, (40, 1), generator=g)
    mask = torch.arange(23) < lengths
    total, distinct = 0, 0
    for row, length in zip(ids.tolist(), lengths[:, 0].tolist(), strict=True):
        bigrams = list(pairwise(row[:length]))
        total += len(bigrams)
        distinct += len(set(bigrams))
    value = distinct_2(batch_of(ids.tolist(), mask.tolist())).item()
    assert value == pytest.approx(distinct / total)
    assert 0.2 < value < 0.9


def test_ref_logprob_is_the_log_prob_under_the_reference_and_absent_without_one():
    batch, _ = random_batch(6, critic=False)
    logprobs = policy_divergences(batch.old_logprobs, batch)["ref_logprob"]
    assert torch.equal(logprobs[batch.mask], batch.ref_logprobs[batch.mask])
    batch.ref_logprobs = None
    assert "ref_logprob" not in policy_divergences(batch.old_logprobs, batch)


# ------------------------------------------------------------------ in a run


def test_a_reward_for_repetition_is_found_within_12_steps_once_and_the_report_says_so(
    base, here, capsys
):
    (here / "repeats.py").write_text(REPEATS)
    folder = run(base, "run=out", "optim.steps=16", *REPEAT)
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("reward hacking?")]
    course = rows(folder)
    marked = [row["step"] for row in course if row["reward_hacking"]]
    assert f"step {marked[0]}: " in line
    assert marked[0] <= 12
    assert marked == list(range(marked[0], 17))
    assert course[-1]["distinct_2"] < 0.3 < 0.9 < course[0]["distinct_2"]
    assert course[-1]["reward"] > course[0]["reward"] + 0.3
    page = (folder / "report.md").read_text()
    start = f"**Reward hacking?** steps {marked[0]} to 16: reward {course[0]['reward']:.3g} → "
    best = fmean(row["distinct_2"] for row in course[:2])
    assert start in page
    assert f"distinct_2 {best:.3g} → " in page


def test_a_resumed_run_suspects_the_same_and_does_not_repeat_the_line(base, here, capsys):
    (here / "repeats.py").write_text(REPEATS)
    run(base, "run=whole", "optim.steps=14", *REPEAT)
    run(base, "run=halves", "optim.steps=8", *REPEAT)
    assert capsys.readouterr().out.count("reward hacking?") == 2
    resume(here / "halves", "optim.steps=14")
    assert capsys.readouterr().out.count("reward hacking?") == 0
    assert differences(here / "whole", here / "halves") == []
    state = json.loads((here / "halves" / "checkpoints" / "step-000014" / "state.json").read_text())
    lines = [episodes(rows(here / name), state["before"]) for name in ("whole", "halves")]
    assert lines[0] == lines[1] != []


def test_an_ordinary_run_says_nothing_and_its_report_has_no_mark(base, here, capsys):
    folder = run(base, "run=out", "optim.lr=0")
    assert {row["reward_hacking"] for row in rows(folder)} == {0.0}
    assert "hacking" not in capsys.readouterr().out
    assert "hacking" not in (folder / "report.md").read_text()
