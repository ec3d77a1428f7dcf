"""The benchmarks at tiny shapes: every op runs or says why not, and the numbers can be trusted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import learning, learning_worker, logprobs, ops, peers, rollout, trl_step
from benchmarks.logprobs import QUICK, SHAPES, Live, first, inputs
from rlkl.rollout import cached, engine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


# ------------------------------------------------------------------ log-probs


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """What `python -m benchmarks.logprobs --quick` writes."""
    out = tmp_path_factory.mktemp("bench") / "logprobs.json"
    threads = torch.get_num_threads()
    logprobs.main(["--quick", "--out", str(out)])
    torch.set_num_threads(threads)
    return json.loads(out.read_text())


def test_every_op_is_measured_or_says_why_not(results):
    for name in QUICK:
        for row in results["shapes"][name]["ops"]:
            assert row.get("failed") or (row["both"] > 0 and row["to_naive"] > 0), row
    measured = {row["op"] for row in results["shapes"]["Q1"]["ops"] if "failed" not in row}
    expected = {
        "naive",
        "rlkl reference",
        "rlkl tiled",
        "rlkl tiled, kept logits",
        "rlkl tiled, head chunks",
        "rlkl tiled, frozen head",
    }
    assert expected - measured == set()
    assert results["not_measured"] == ([] if torch.cuda.is_available() else logprobs.GPU)


def test_the_errors_of_our_ops_are_those_of_float32_and_of_bfloat16_operands(results):
    for name, max_gradient_error in (("Q1", 1e-5), ("Q2", 2e-2)):
        for row in results["shapes"][name]["ops"]:
            if not row["op"].startswith("rlkl") or "failed" in row:
                continue
            nats = [row[f"{key}_max"] for key in logprobs.ERRORS if f"{key}_max" in row]
            gradients = [row[key] for key in ("dh", "dw") if key in row]
            assert max(nats) < 1e-5, row
            assert max(gradients) < max_gradient_error, row


def test_the_errors_of_a_wrong_op_are_its_errors():
    x = inputs(SHAPES["Q1"], "cpu", 0)
    naive = ops.naive(2)

    def wrong(x: ops.Inputs) -> ops.Outputs:
        logprob, entropy = naive(x)
        return logprob + 0.5, entropy * 2

    truth = logprobs.naive_truth(2, first(x, 99, torch.float64))
    row = logprobs.errors(ops.Op("", 2, (), wrong), x, truth)
    assert row["logprob_mean"] == pytest.approx(0.5, abs=1e-4)
    assert row["entropy_max"] > 0.1
    assert row["dw"] > 0.1


def test_live_counts_the_bytes_that_are_held_at_once():
    x = torch.zeros(1000)
    with Live((x,)) as live:
        a = x + 1
        b = a.view(10, 100).T * 2
        del a
        c = b + 1
    assert live.peak == 8000
    assert c.sum() == 3000


def test_a_peer_that_is_not_installed_is_a_row_that_says_so(monkeypatch):
    def missing():
        raise ImportError("No module named 'elsewhere'")

    monkeypatch.setattr(peers, "PEERS", (peers.Peer("elsewhere", 1, ops.PLAIN, missing),))
    assert peers.peers(False, "cpu", False)[0].failed == "No module named 'elsewhere'"


def test_the_table_of_the_page_about_logprobs_is_the_measured_one():
    measured = json.loads((RESULTS / "logprobs-cpu.json").read_text(encoding="utf-8"))
    by_op = {
        shape: {row["op"]: row for row in measured["shapes"][shape]["ops"] if row["outputs"] == 2}
        for shape in ("C1", "C2")
    }
    table = page("logprobs.md").split("| float32: time")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) == 7
    for line in table:
        op, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        expected = []
        for shape in ("C1", "C2"):
            row = by_op[shape][op]
            expected += [f"{row['to_naive']:.2f}", f"{row['extra_bytes'] / 1e6:.0f}"]
            expected.append(f"{row['logprob_max']:.0e}")
        assert cells == expected, op


# ------------------------------------------------------------------ rollouts, and a step beside TRL


def test_the_tables_of_the_page_about_rollouts_are_the_measured_ones():
    section = page("rollout.md").split("<!-- measured -->\n")[1].split("<!-- /measured -->")[0]
    for module, name in ((rollout, "rollout-cpu"), (trl_step, "trl-step-cpu")):
        measured = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        assert module.markdown(measured) in section, name


def test_every_backend_of_the_rollout_benchmark_does_the_same_work():
    """Full responses use all of their room, ragged ones about 30 % of it."""
    work = rollout.QUICK[0]
    full = rollout.Setting(work, ragged=False)
    ragged = rollout.Setting(work, ragged=True)
    room = work.prompts * work.group * work.tokens
    assert full.ours(engine, 0) == full.ours(cached, 0) == full.generate(0) == room
    assert ragged.ours(engine, 0) == ragged.ours(cached, 0)
    assert 0.1 < ragged.ours(engine, 0) / room < 0.6
    assert 0.1 < ragged.generate(0) / room < 0.6
    assert ragged.slot_use() > 0.5
    assert full.matmuls(8) > 0


def test_our_side_of_the_benchmark_against_trl_trains_on_responses_of_full_length(tmp_path):
    work = trl_step.Work(vocabulary=64, dtype="bfloat16", prompt=8, response=3, prompts=2, group=2)
    trl_step.save_model(tmp_path / "model", work, "fixed")
    ours = trl_step.Ours(tmp_path, work, "fixed")
    assert ours.models.policy.lm.dtype == torch.bfloat16
    with ours.data.scoring:
        seconds, tokens = ours.step()
    assert (tokens, ours.state.step) == (2 * 2 * 3, 1)
    assert seconds > 0


def test_ragged_responses_of_that_benchmark_end_by_chance_after_about_43_percent(tmp_path):
    work = trl_step.Work(vocabulary=512, prompt=8, response=32, prompts=16, group=8)
    trl_step.save_model(tmp_path / "model", work, "ragged")
    ours = trl_step.Ours(tmp_path, work, "ragged")
    with ours.data.scoring:
        _, tokens = ours.step()
    assert 0.3 < tokens / (work.rows * work.response) < 0.6


def test_each_work_of_the_rollout_benchmark_is_written_once_it_is_measured(tmp_path, monkeypatch):
    out = tmp_path / "rollout.json"
    written = []

    def measured(work, ragged, pairs, without):
        written.append([*json.loads(out.read_text())["results"]] if out.exists() else [])
        return {"tokens_per_second": {}, "failed": {}}

    monkeypatch.setattr(rollout, "measure", measured)
    rollout.main(["--works", "0.1M", "5.6M", "--kinds", "fixed", "--out", str(out)])
    assert written == [[], ["0.1M, fixed"]]
    assert [*json.loads(out.read_text())["results"]] == ["0.1M, fixed", "5.6M, fixed"]


def test_the_ratio_to_trl_is_the_median_of_seconds_per_token_of_neighbours():
    ours = [(1.0, 10), (2.0, 10), (1.0, 10)]  # seconds, tokens
    trl = [(2.0, 10), (6.0, 10), (8.0, 20)]
    row = trl_step.summary(ours, trl)
    assert row["ratio_per_token"] == pytest.approx(3)  # the median of 2, 3 and 4
    assert row["seconds"] == {"rlkl": 1.0, "trl": 6.0}
    assert row["steps"] == 3


# ------------------------------------------------------------------ learning


class Side:
    """A worker of the learning benchmark that answers at once."""

    def __init__(self, seconds: list[float], gradient_norm: float = 1.0) -> None:
        self.answers = [
            {"seconds": s, "loss": 2.0, "gradient_norm": gradient_norm} for s in seconds
        ]

    def learn(self, lengths: dict[str, list]) -> dict[str, float]:
        return self.answers.pop(0)


def test_the_gain_in_learning_is_the_median_of_neighbours_without_the_first():
    row = learning.measure(learning.WORKS[0], Side([9, 1, 2, 1]), Side([1, 2, 6, 4]), rounds=3)
    assert row["ratio"] == pytest.approx(3)  # the median of 2, 3 and 4
    assert (row["seconds"], row["seconds_before"]) == (1, 4)


def test_two_checkouts_that_do_not_learn_the_same_are_not_compared():
    with pytest.raises(ValueError, match="gradient_norm"):
        learning.measure(learning.WORKS[0], Side([1]), Side([1], gradient_norm=1.1), rounds=0)


def test_a_worker_learns_from_groups_of_the_given_lengths():
    batch = learning_worker.random_batch([5, 3], [[2, 4], [1, 3]])
    assert batch.prompt_mask.sum(1).tolist() == [5, 5, 3, 3]
    assert batch.mask.sum(1).tolist() == [2, 4, 1, 3]
    assert torch.equal(batch.prompt_ids[0], batch.prompt_ids[1])
    row = learning_worker.learn(learning_worker.random_policy(), batch)
    assert row["gradient_norm"] > 0


def test_the_table_of_learning_is_the_measured_one():
    measured = json.loads((RESULTS / "learning-cpu.json").read_text(encoding="utf-8"))
    table = page("results.md").split("<!-- learning -->\n")[1].split("\n<!-- /learning -->")[0]
    assert table == learning.markdown(measured)
