"""`make first-result`: which runs it makes, how it judges them, and that the README quotes them."""

import itertools

import pytest

from benchmarks import first_result
from benchmarks.first_result import Row, Run, passed, plan, results_table
from benchmarks.pages import filled
from rlkl.run import config

WHERE, ROWS = first_result.read()
README = first_result.README.read_text(encoding="utf-8")


def row(run, before, after, seconds=60.0):
    found = {name: [before, after] for name in first_result.METRICS}
    return Row(*run, found, seconds, 45.0, "")


# ------------------------------------------------------------------ the file of results


def test_every_run_of_the_plan_is_in_the_file_and_none_failed():
    assert [r.run for r in ROWS] == plan()
    assert [r.run.name for r in ROWS if not passed(r)] == []


def test_the_table_of_the_readme_is_that_of_the_file():
    table = results_table(ROWS)
    assert filled(README, {"first-result": table}) == README
    assert f"<!-- first-result -->\n{table}" in README


# ------------------------------------------------------------------ the runs


def test_no_two_runs_in_succession_need_the_same_base():
    """Else two processes would make it at once."""
    bases = [(run.seed, run.capability) for run in plan()]
    assert all(a != b for a, b in itertools.pairwise(bases))
    assert len(set(plan())) == len(plan()) == 30 + 15 + 6


def test_a_control_differs_from_its_run_in_the_shuffling_alone():
    for name in ("tiny-grpo", "tiny-ppo"):
        path = str(first_result.ROOT / "configs" / f"{name}.yaml")
        options = first_result.shuffled_advantages(path)
        control, real = config.load([path, *options]), config.load([path])
        file, function = control.advantage.pop("name").split(":")
        assert file.endswith("tests/shuffled.py")
        assert function == real.advantage.pop("name")
        assert vars(control) == vars(real)


def test_a_row_that_is_there_is_not_run_again(monkeypatch, tmp_path):
    asked = []

    def fake(run):
        asked.append(run)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return row(run, 0.5, 0.99)

    monkeypatch.setattr(first_result, "RESULTS", tmp_path / "first-result.json")
    monkeypatch.setattr(first_result, "measure", fake)
    with pytest.raises(KeyboardInterrupt):
        first_result.measure_all("tiny-ppo", processes=1)
    rows = first_result.measure_all("tiny-ppo seed=[01] .*2$", processes=1)
    expected = [run for run in plan() if run.config == "tiny-ppo" and run.seed < 2]
    expected = [run for run in expected if run.capability != "default" or run.seed == 0]
    assert [r.run for r in rows] == [run for run in expected if not run.control]
    assert len(asked) == 1 + len(rows)


def test_a_process_that_fails_ends_everything_with_its_last_line(tmp_path):
    script = "import sys; print(1); sys.exit('error: broken')"
    with pytest.raises(SystemExit, match=r"error: .*broken"):
        first_result.succeed(["-c", script], tmp_path, {})
    script = "import os; print(os.environ['ATEN_CPU_CAPABILITY'], os.environ['OMP_NUM_THREADS'])"
    capability = {"ATEN_CPU_CAPABILITY": "default"}
    assert first_result.succeed(["-c", script], tmp_path, capability)[0].split() == ["default", "1"]


def test_a_base_is_not_made_on_a_kind_of_cpu_that_is_not_there(monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx1024")
    with pytest.raises(SystemExit, match="not avx1024"):
        first_result.main(["--base", "0"])


# ------------------------------------------------------------------ the table


def test_a_run_must_reach_its_goal_and_a_control_must_not_gain():
    run = Run("tiny-grpo", 0, "avx2")
    assert passed(row(run, 0.5, 0.98))
    assert not passed(row(run, 0.5, 0.979))
    control = run._replace(control=True)
    assert passed(row(control, 0.5, 0.3))
    assert not passed(row(control, 0.5, 0.61))
    assert not passed(row(control, 0.5, float("nan")))


def test_the_table_has_the_worst_and_the_best_of_each_configuration():
    runs = [Run("tiny-grpo", seed, "avx2") for seed in range(3)]
    rows = [
        row(run, 0.5, after, seconds=40) for run, after in zip(runs, (0.99, 0.981, 1), strict=True)
    ]
    rows.append(row(Run("tiny-ppo", 0, "avx2", control=True), 0.5, 0.25, seconds=80))
    assert results_table(rows).splitlines()[2:] == [
        "| `configs/tiny-grpo.yaml` | 3 " + "| 0.500 → 0.981–1.000 " * 3 + "| 40 s |",
        "| `configs/tiny-ppo.yaml`, advantages shuffled | 1 " + "| 0.500 → 0.250 " * 3 + "| 80 s |",
    ]
