"""benchmarks/logprobs.py at tiny shapes: every op runs or says why not, every number that can be checked is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import logprobs, ops, peers, rollout, trl_step
from benchmarks.logprobs import QUICK, SHAPES, Live, first, inputs
from rlkl.rollout import cached, engine

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    out, threads = tmp_path_factory.mktemp("bench") / "found.json", torch.get_num_threads()
    logprobs.main(["--quick", "--out", str(out)])
    torch.set_num_threads(threads)
    return json.loads(out.read_text())


def test_every_op_is_measured_or_says_why_not(results):
    for name in QUICK:
        for row in results["shapes"][name]["ops"]:
            assert row.get("failed") or (row["both"] > 0 and row["to_naive"] > 0), row
    measured = {row["op"] for row in results["shapes"]["Q1"]["ops"] if "failed" not in row}
    assert {"naive", "rlkl reference", "rlkl tiled", "rlkl tiled, kept logits", "rlkl tiled, head chunks",
            "rlkl tiled, frozen head"} <= measured
    assert results["not_measured"] == ([] if torch.cuda.is_available() else logprobs.GPU)


def test_errors_are_those_of_float32_and_of_bf16_operands(results):
    for name, gradients in (("Q1", 1e-5), ("Q2", 2e-2)):
        for row in results["shapes"][name]["ops"]:
            if row["op"].startswith("rlkl") and "failed" not in row:
                assert max(row.get(f"{key}_max", 0) for key in ("logprob", "entropy", "kl")) < 1e-5, row
                assert max(row.get(key, 0) for key in ("dh", "dw")) < gradients, row


def test_a_wrong_op_is_seen_to_be_wrong():
    x = inputs(SHAPES["Q1"], "cpu", 0)
    right = ops.naive(2)
    truth = logprobs.step(ops.Op("", 2, (), right), first(x, 99, torch.float64), lambda: None)
    wrong = ops.Op("", 2, (), lambda x: (right(x)[0] + 0.5, right(x)[1] * 2))
    found = logprobs.errors(wrong, x, truth)
    assert found["logprob_mean"] == pytest.approx(0.5, abs=1e-4)
    assert found["entropy_max"] > 0.1
    assert found["dw"] > 0.1


def test_live_counts_what_is_held_at_once():
    x = torch.zeros(1000)
    with Live((x,)) as live:
        a = x + 1
        b = a.view(10, 100).T * 2
        del a
        c = b + 1
    assert live.peak == 8000
    assert c.sum() == 3000


def test_a_peer_that_is_not_there_is_a_row_that_says_so(monkeypatch):
    def missing():
        raise ImportError("No module named 'elsewhere'")

    monkeypatch.setattr(peers, "PEERS", (peers.Peer("elsewhere", 1, peers.PLAIN, missing),))
    assert peers.peers(False, "cpu", False)[0].failed == "No module named 'elsewhere'"


def test_the_table_of_the_docs_is_the_measured_one():
    page, found = ((ROOT / name).read_text(encoding="utf-8") for name in (
        "docs/logprobs.md", "benchmarks/results/logprobs-cpu.json"))
    shapes = {name: {row["op"]: row for row in shape["ops"] if row["outputs"] == 2 and "failed" not in row}
              for name, shape in json.loads(found)["shapes"].items()}
    table = page.split("| float32: time")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) == 7
    for line in table:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows = [shapes[shape][name] for shape in ("C1", "C2")]
        assert cells == [text for row in rows for text in (
            f"{row['to_naive']:.2f}", f"{row['extra_bytes'] / 1e6:.0f}", f"{row['logprob_max']:.0e}")]


# ---------------------------------------------------------------- rollouts, and a step against TRL's


def test_the_page_about_rollouts_says_what_the_results_files_say():
    page = (ROOT / "docs" / "rollout.md").read_text(encoding="utf-8")
    told = page.split("<!-- measured -->\n")[1].split("<!-- /measured -->")[0]
    found = [json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text()) for name in (
        "rollout-cpu", "trl-step-cpu")]
    assert rollout.markdown(found[0]) in told
    assert trl_step.markdown(found[1]) in told


def test_identical_work_is_counted_alike():
    """Every backend of the benchmark on a tiny model: full replies are all of the room, ragged ones about 30 %."""
    work, threads = rollout.QUICK[0], torch.get_num_threads()
    full, ragged = rollout.Setting(work, ragged=False), rollout.Setting(work, ragged=True)
    room = work.prompts * work.group * work.tokens
    assert full.ours(engine, 0) == full.ours(cached, 0) == full.generate(0) == room
    assert ragged.ours(engine, 0) == ragged.ours(cached, 0)
    assert 0.1 < ragged.ours(engine, 0) / room < 0.6
    assert 0.1 < ragged.generate(0) / room < 0.6
    assert ragged.slot_use() > 0.5
    assert full.matmuls(8) > 0
    assert torch.get_num_threads() == threads
