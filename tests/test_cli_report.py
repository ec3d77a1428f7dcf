"""rlkl report: what differs between runs and what came of it, from the files in their folders."""

import json
import re
import shutil

import numpy as np
import pytest
from runs_fixture import rows

from rlkl import report
from rlkl.cli.finished import find
from rlkl.cli.report import told_by

pytest_plugins = ("runs_fixture", "finished_runs")


def table(said: str) -> dict[str, list[str]]:
    """{first cell: the others} of each line of the table."""
    lines = [[cell.strip() for cell in line[1:-1].split("│")] for line in said.splitlines() if line.startswith("│")]
    return {line[0]: line[1:] for line in lines}


def test_the_table_has_the_options_that_differ_and_no_others(rlkl):
    found = table(rlkl("report", "runs/ppo", "runs/lora"))
    assert found["loss.name"] == ["ppo", "grpo"]
    assert found["lora.r"] == ["0", "4"]
    assert found["eval.prompts"] == ["20", "5"]
    assert found["kl_old.target"] == ["0.001", "-"]
    assert not {"seed", "task.name", "scoring.processes", "run", "checkpoint.every"} & found.keys()


def test_the_numbers_are_those_of_the_files(rlkl, there):
    found = table(rlkl("report", "runs/ppo", "runs/lora"))
    for column, folder in enumerate((there / "runs/ppo", there / "runs/lora")):
        of, told = rows(folder), json.loads((folder / "heldout.json").read_text())
        assert found["steps"][column] == "6 of 6"
        for name, x in told["before"].items():
            assert found[f"held out: {name}"][column] == f"{x:.3f} → {told['after'][name]:.3f}"
        measured = [(row["heldout/accuracy"], -row["step"]) for row in of if "heldout/accuracy" in row]
        best = f"{max(measured)[0]:.3f} at step {-max(measured)[1]}" if measured else "-"
        assert found["held out: best accuracy"][column] == best
        seconds, tokens = (sum(row[key] for row in of) for key in ("seconds", "tokens"))
        assert found["seconds in steps"][column] == f"{seconds:.1f}"
        assert found["tokens a second"][column] == f"{tokens / seconds:.0f}"
        assert found["peak memory, GB"][column] == f"{max(row['peak_memory_gb'] for row in of):.2f}"
        assert found["reward, first → last step"][column] == f"{of[0]['reward']:.3f} → {of[-1]['reward']:.3f}"


def test_a_run_beside_itself_differs_in_nothing_and_one_alone_is_a_table_too(rlkl):
    outcome = {"steps", "reward, first → last step", "seconds in steps", "tokens a second", "peak memory, GB"}
    for runs in (["runs/ppo"], ["runs/ppo", "runs/ppo"]):
        found = table(rlkl("report", *runs))
        assert {name for name in found if not name.startswith("held out: ")} == outcome
        assert all(len(cells) == len(runs) for cells in found.values())


def test_with_out_there_is_a_page_with_the_same_table_and_its_figure(rlkl, tmp_path):
    out = tmp_path / "new" / "folder"
    said = rlkl("report", "runs/ppo", "runs/lora", f"out={out}")
    assert f"written: {out}/report-compare.md and {out}/report-compare.png" in said
    page = (out / "report-compare.md").read_text(encoding="utf-8")
    lines = [line[2:-2].split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert {line[0]: line[1:] for line in lines[2:]} == table(said)
    assert lines[0][1:] == ["runs/ppo", "runs/lora"]
    assert "![runs](report-compare.png)" in page
    assert (out / "report-compare.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_has_every_point_over_steps_and_over_seconds(there):
    """Held out: what was measured before and after too."""
    told = [told_by(find(f"runs/{name}")) for name in ("ppo", "lora")]
    panels = report.draw_together(told).axes
    assert [p.get_xlabel() for p in panels] == ["step", "seconds in steps"] * 2
    assert [p.get_title() for p in panels] == ["reward", "reward", "held-out accuracy", "held-out accuracy"]
    for column, place in enumerate(("step", "seconds")):
        for row, metric in enumerate(("reward", "heldout/accuracy")):
            lines = {line.get_label(): line for line in panels[2 * row + column].lines}
            assert lines.keys() == {run.name for run in told}
            for run in told:
                spent, expected = 0.0, [(0, run.before["accuracy"])] * (row == 1)
                for r in run.rows:
                    spent += r["seconds"]
                    if metric in r or (row == 1 and r["step"] == 6):
                        value = run.after["accuracy"] if row == 1 and r["step"] == 6 else r[metric]
                        expected.append((r["step"] if place == "step" else spent, value))
                assert lines[run.name].get_xydata() == pytest.approx(np.array(expected))
                assert len(expected) == {"runs/ppo": [6, 4], "runs/lora": [6, 2]}[run.name][row]


def test_a_run_that_is_still_going_has_no_after(rlkl, there):
    shutil.copytree("runs/ppo", "runs/going", dirs_exist_ok=True)
    (there / "runs/going/heldout.json").unlink()
    lines = (there / "runs/going/metrics.jsonl").read_text().splitlines(keepends=True)
    (there / "runs/going/metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:40])
    found = table(rlkl("report", "runs/going"))
    shutil.rmtree("runs/going")
    assert found["steps"] == ["3 of 6"]
    assert re.fullmatch(r"0\.\d{3} → -", found["held out: accuracy"][0])


def test_a_run_without_a_step_and_a_folder_that_cannot_be_written_are_refused(refused, there):
    assert refused("report", "runs/ppo", "runs/unborn") == (
        "runs/unborn: no step is done yet, there is nothing to compare")
    assert refused("report", "runs/ppo", "out=reward.py/x").startswith("out=reward.py/x: cannot be written: ")


def test_a_cell_with_a_bar_in_it_is_one_cell():
    assert report.table(["a"], [["x|y"]]) == ["| a |", "| --- |", "| x\\|y |", ""]
