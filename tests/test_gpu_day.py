"""benchmarks.gpu_day on a CPU, with shrunk shapes: what it keeps, repeats, cuts, and asks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_day import __main__ as gpu_day
from benchmarks.gpu_day.__main__ import Day, run_stage
from benchmarks.gpu_day.stages import RUN, STAGES, TRL, Part, Stage, missing

ROOT = Path(__file__).parents[1]
WITHOUT_PYDANTIC = ["tests", "attention", "logprobs", "rollouts", "rollouts-large"]
WITH_PYDANTIC = ["learning", "memory", *([] if missing(TRL) else ["trl"])]
REFUSED = "raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)"


def call(*arguments: str, first_on_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run benchmarks.gpu_day, with modules of a folder before all others."""
    paths = [str(first_on_path or ""), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_day", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """The results of all tiny stages; the first ones ran where pydantic and pebble are refused."""
    folder = tmp_path_factory.mktemp("day")
    refusing = folder / "refusing"
    refusing.mkdir()
    for name in ("pydantic", "pebble"):
        (refusing / f"{name}.py").write_text(REFUSED)
    options = ("--tiny", "--out", str(folder / "out"), "--runs", str(folder / "runs"))
    for stages, first_on_path in ((WITHOUT_PYDANTIC, refusing), (WITH_PYDANTIC, None)):
        ran = call(*stages, *options, first_on_path=first_on_path)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder / "out"


def results(out: Path, stage: str) -> dict:
    """What the parts of a stage have written, by the part's name."""
    parts = json.loads((out / f"{stage}.json").read_text())["parts"]
    return {name: part["result"] for name, part in parts.items()}


def test_each_stage_has_a_file_in_which_every_part_is_done_and_says_where_it_ran(out):
    for stage in STAGES:
        if stage.name not in WITHOUT_PYDANTIC + WITH_PYDANTIC:
            continue
        parts = json.loads((out / f"{stage.name}.json").read_text())["parts"]
        assert [*parts] == [part.name for part in stage.tiny]
        for part in parts.values():
            assert part["state"] == "done"
            assert part["device"]
            assert {"torch", "transformers", "python"} <= {*part["versions"]}
            assert "commit" in part
            assert part["minutes"] > 0


def test_what_the_stages_measured_is_in_their_files(out):
    tests = json.loads((out / "tests.json").read_text())["parts"]["test_policy"]
    assert ("passed" if torch.cuda.is_available() else "skipped") in tests["output"]
    assert results(out, "logprobs")["Q1"]["shapes"]["Q1"]["ops"]
    (rollout,) = results(out, "rollouts").values()
    assert {"engine", "cached", "generate"} == {
        *rollout["results"]["0.1M, ragged"]["ratio_to_generate"]
    }
    learning = results(out, "learning")["scratch"]
    assert learning["sft"]["last"]["loss"] > 0
    assert len(learning["countdown"]["steps"]) == 1
    memory = results(out, "memory")["all"]
    assert memory["planned"]["peak"] > memory["planned"]["resident"] > 0


def test_attention_in_bfloat16_is_within_its_rounding_of_float32(out):
    variants = results(out, "attention")["tiny"]["works"]["tiny"]["variants"]
    for name, row in variants.items():
        errors = [row[key] for key in ("out", "dq", "dk", "dv") if key in row]
        assert "failed" in row or max(errors, default=0) < 1e-2, name
    assert variants["padded parts"]["backward"] > 0


def test_a_second_call_does_nothing_again(out, capsys):
    before = {file: file.read_bytes() for file in out.glob("*.json")}
    stages = [*WITHOUT_PYDANTIC, *WITH_PYDANTIC]
    assert gpu_day.main([*stages, "--tiny", "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == ["results:", str(out)]
    assert {file: file.read_bytes() for file in out.glob("*.json")} == before


# ------------------------------------------------------------------ with parts that measure nothing

WRITE = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{\"half\": 1}')"
WAIT = "; import time; time.sleep(60)"


def stage_of(*commands: str) -> Stage:
    """A stage with a part for each Python command; {out} is the command's first argument."""
    parts = tuple(Part(str(i), ("-c", code, "{out}")) for i, code in enumerate(commands))
    return Stage("some", "", 1, parts, parts, {}, {})


@pytest.fixture
def day(tmp_path, monkeypatch) -> Day:
    monkeypatch.setattr(gpu_day, "LEAST_SECONDS", 0)
    return Day(tmp_path, tmp_path / "runs", None)


def parts_of(day: Day) -> dict[str, dict]:
    return json.loads((day.out / "some.json").read_text())["parts"]


def test_a_stage_over_its_time_is_cut_and_keeps_what_it_has(day):
    stage = stage_of(braces(WRITE), braces(WRITE) + WAIT, braces(WRITE))
    assert not run_stage(stage, stage.parts, 2.0, day)
    parts = parts_of(day)
    assert {name: part["state"] for name, part in parts.items()} == {"0": "done", "1": "cut"}
    assert parts["1"]["result"] == {"half": 1}
    assert parts["1"]["minutes"] < 0.2


def test_what_was_cut_or_failed_is_run_again_and_what_is_done_is_not(day):
    stage = stage_of(braces(WRITE), "raise SystemExit('no memory')")
    assert not run_stage(stage, stage.parts, 60.0, day)
    first = parts_of(day)
    assert first["1"]["state"] == "failed"
    assert "no memory" in first["1"]["output"]
    repaired = stage._replace(parts=(stage.parts[0], stage.parts[1]._replace(arguments=("-c", ""))))
    assert run_stage(repaired, repaired.parts, 60.0, day)
    assert parts_of(day)["0"] == first["0"]
    assert parts_of(day)["1"]["state"] == "done"


def test_a_part_that_was_cut_does_not_keep_the_others_from_their_turn(day):
    stage = stage_of(braces(WRITE) + WAIT, braces(WRITE))
    assert not run_stage(stage, stage.parts, 1.0, day)
    assert [*parts_of(day)] == ["0"]
    assert not run_stage(stage, stage.parts, 2.0, day)
    assert {name: part["state"] for name, part in parts_of(day).items()} == {
        "0": "cut",
        "1": "done",
    }


def braces(code: str) -> str:
    """Code in which a brace stands for itself, though the arguments are a format."""
    return code.replace("{", "{{").replace("}", "}}")


def test_a_dry_run_names_the_stages_their_minutes_and_what_is_missing(
    monkeypatch, capsys, tmp_path
):
    for name in ("pydantic", "trl"):
        monkeypatch.setitem(sys.modules, name, None)
    assert gpu_day.main(["--dry-run", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for stage in STAGES:
        assert (
            f"{stage.name:15} at most {stage.minutes:g} minutes, 0 of {len(stage.parts)}" in printed
        )
    assert "needs: pydantic" in printed
    assert "pip install --target wheels" in printed
    assert [*tmp_path.iterdir()] == []


def test_a_stage_whose_packages_are_missing_is_not_run_and_says_how_to_carry_them(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.setitem(sys.modules, "pebble", None)
    assert gpu_day.main(["learning", "--tiny", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "learning: not run" in printed
    assert printed.split("--python-version")[1].splitlines()[0].endswith(" pebble")
    assert [*tmp_path.iterdir()] == []


def test_without_a_gpu_only_tiny_stages_are_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_day.torch.cuda, "is_available", lambda: False)
    assert gpu_day.main(["all", "--out", str(tmp_path)]) == 1
    assert "--tiny" in capsys.readouterr().err


def test_stages_take_at_most_eight_minutes_and_name_what_they_import():
    assert all(stage.minutes <= 8 for stage in STAGES)
    needs = {stage.name: {*stage.needs} for stage in STAGES}
    for name in WITHOUT_PYDANTIC:
        assert "pydantic" not in needs[name]
    for name in ("learning", "memory", "trl"):
        assert {*RUN} <= needs[name]


def test_the_page_of_results_lists_the_stages():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    rows = [f"| `{s.name}` | {s.purpose} | {s.minutes:g} |" for s in STAGES]
    assert "\n".join(rows) in page
