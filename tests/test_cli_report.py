"""rlkl report: what differs between runs and their results, from the files in their folders."""

import json
import re
import shutil
import sys
from statistics import fmean

import numpy as np
import pytest
from finished_runs import cells
from runs_fixture import rows

from rlkl.cli.report import summarise
from rlkl.cli.run_commands import find_run
from rlkl.run import report

pytest_plugins = ("runs_fixture", "finished_runs")


def table(text: str) -> dict[str, list[str]]:
    """{first cell: the others} of each row of the table."""
    return {row[0]: row[1:] for row in cells(text)}


def test_the_table_has_the_options_that_differ_and_no_others(rlkl):
    shown = table(rlkl("report", "runs/ppo", "runs/lora"))
    assert shown["advantage.name"] == ["gae", "grpo"]
    assert shown["critic.kind"] == ["head", "none"]
    assert shown["lora.r"] == ["0", "4"]
    assert shown["eval.prompts"] == ["20", "5"]
    assert shown["kl_old.target"] == ["0.001", "-"]
    equal = {"seed", "task.name", "loss.name", "scoring.processes"}
    without_effect = {"run", "checkpoint.every"}
    assert not (equal | without_effect) & shown.keys()


def test_the_numbers_are_those_of_the_files(rlkl, there):
    shown = table(rlkl("report", "runs/ppo", "runs/lora"))
    for column, folder in enumerate((there / "runs/ppo", there / "runs/lora")):
        run = rows(folder)
        heldout = json.loads((folder / "heldout.json").read_text())
        accuracies = [(row["eval/accuracy"], -row["step"]) for row in run if "eval/accuracy" in row]
        rewards = [row["reward"] for row in run]
        seconds = sum(row["seconds"] for row in run)
        tokens = sum(row["tokens"] for row in run)
        expected = {
            "steps": "6 of 6",
            "held out: best accuracy": "-",
            "seconds in steps": f"{seconds:.1f}",
            "tokens a second": f"{tokens / seconds:.0f}",
            "peak memory, GB": f"{max(row['peak_memory_gb'] for row in run):.2f}",
            "reward, first → last 10 steps": f"{fmean(rewards[:3]):.3f} → {fmean(rewards[3:]):.3f}",
        }
        for name, x in heldout["before"].items():
            expected[f"held out: {name}"] = f"{x:.3f} → {heldout['after'][name]:.3f}"
        if accuracies:
            accuracy, minus_step = max(accuracies)
            expected["held out: best accuracy"] = f"{accuracy:.3f} at step {-minus_step}"
        assert {name: shown[name][column] for name in expected} == expected


def test_a_run_alone_and_a_run_beside_itself_differ_in_no_option(rlkl):
    results = {
        "steps",
        "reward, first → last 10 steps",
        "seconds in steps",
        "tokens a second",
        "peak memory, GB",
    }
    for runs in (["runs/ppo"], ["runs/ppo", "runs/ppo"]):
        shown = table(rlkl("report", *runs))
        assert {name for name in shown if not name.startswith("held out: ")} == results
        assert all(len(row) == len(runs) for row in shown.values())


def page_table(text: str) -> list[list[str]]:
    """The cells of a page's table, without the line under the head."""
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [lines[0], *lines[2:]]


def test_out_writes_a_page_with_the_same_table_and_a_figure(rlkl, tmp_path):
    out = tmp_path / "new" / "folder"
    text = rlkl("report", "runs/ppo", "runs/lora", f"out={out}")
    assert f"written: {out}/report-compare.md and {out}/report-compare.png" in text
    page = (out / "report-compare.md").read_text(encoding="utf-8")
    head, *body = page_table(page)
    assert head[1:] == ["runs/ppo", "runs/lora"]
    assert {row[0]: row[1:] for row in body} == table(text)
    assert "![runs](report-compare.png)" in page
    assert (out / "report-compare.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_a_page_without_a_figure(rlkl, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = rlkl("report", "runs/ppo", "runs/lora", f"out={tmp_path}")
    assert f"written: {tmp_path}/report-compare.md\n" in text
    notes = [line for line in text.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "pip install 'rlkl[plots]'" in notes[0]
    page = (tmp_path / "report-compare.md").read_text(encoding="utf-8")
    assert {row[0]: row[1:] for row in page_table(page)[1:]} == table(text)
    assert "png" not in page
    assert [file.name for file in tmp_path.iterdir()] == ["report-compare.md"]


def test_the_figure_has_every_point_over_steps_and_over_seconds(there):
    """The held-out accuracy also has the values measured before and after training."""
    runs = [summarise(find_run(f"runs/{name}")) for name in ("ppo", "lora")]
    panels = report.draw_comparison(runs).axes
    titles = ["reward", "reward", "held-out accuracy", "held-out accuracy"]
    assert [p.get_title() for p in panels] == titles
    assert [p.get_xlabel() for p in panels] == ["step", "seconds in steps"] * 2
    counts = {"runs/ppo": {"reward": 6, "eval/accuracy": 4}}
    counts["runs/lora"] = {"reward": 6, "eval/accuracy": 2}
    for run in runs:
        seconds = np.cumsum([0.0, *(row["seconds"] for row in run.rows)])
        accuracy = {row["step"]: row["eval/accuracy"] for row in run.rows if "eval/accuracy" in row}
        points = {
            "reward": {row["step"]: row["reward"] for row in run.rows},
            "eval/accuracy": {
                0: run.before["accuracy"],
                **accuracy,
                6: run.after["accuracy"],
            },
        }
        for i, (metric, values) in enumerate(points.items()):
            assert len(values) == counts[run.name][metric]
            for panel, xs in ((panels[2 * i], range(7)), (panels[2 * i + 1], seconds)):
                lines = {line.get_label(): line for line in panel.lines}
                assert lines.keys() == {"runs/ppo", "runs/lora"}
                expected = np.array([(xs[step], y) for step, y in values.items()])
                assert lines[run.name].get_xydata() == pytest.approx(expected)


def test_a_run_in_progress_has_no_numbers_after(rlkl, there):
    shutil.copytree("runs/ppo", "runs/going")
    (there / "runs/going/heldout.json").unlink()
    metrics = there / "runs/going/metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:3]) + lines[3][:40])
    shown = table(rlkl("report", "runs/going"))
    shutil.rmtree("runs/going")
    assert shown["steps"] == ["3 of 6"]
    assert re.fullmatch(r"0\.\d{3} → -", shown["held out: accuracy"][0])


def test_a_run_without_a_step_and_a_folder_that_cannot_be_written_are_refused(refused, there):
    message = "runs/unborn: no step is done yet, there is nothing to compare"
    assert refused("report", "runs/ppo", "runs/unborn") == message
    message = refused("report", "runs/ppo", "out=reward.py/x")
    assert message.startswith("out=reward.py/x: cannot be written: ")


def test_a_bar_inside_a_cell_is_escaped():
    assert report.table(["a"], [["x|y"]]) == ["| a |", "| --- |", "| x\\|y |", ""]
