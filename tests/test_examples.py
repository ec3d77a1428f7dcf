"""`make examples`: no config for a CPU is left out, each is run by its own command, and the table that a run prints is
read as it was meant."""

import math
import re

import pytest
from runs_fixture import ROOT
from test_supervised import SCHEMAS

from benchmarks import examples
from benchmarks.examples import EXAMPLES, Example, command, measured, verdict
from rlkl import config, terminal
from rlkl.cli import COMMANDS
from rlkl.schema import Config

pytest_plugins = ("runs_fixture",)
PAGE = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.yaml"))
every_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.config)


def test_every_config_for_a_cpu_is_an_example():
    assert {name for name in CONFIGS if name.startswith(("tiny-", "scratch-"))} == {e.config for e in EXAMPLES}
    assert len({e.config for e in EXAMPLES}) == len(EXAMPLES)


@every_example
def test_an_example_is_run_by_the_command_of_its_first_line_with_options_that_exist(example):
    _, *program, path = command(example._replace(overrides=()))
    named = program[-1] if program[0] == "-m" else None
    assert program == (["-m", "rlkl", named] if named else [str(ROOT / "train.py")])
    assert named is None or named in COMMANDS
    cfg = config.load([path, *example.overrides], schema=SCHEMAS.get(named, Config))
    assert example.config == "tiny-label" or cfg.optim is not None


def test_what_a_config_reads_an_earlier_one_writes():
    """The parts of a pipeline share a folder, and are listed in their order."""
    written = set()
    for example in EXAMPLES:
        text = (ROOT / "configs" / f"{example.config}.yaml").read_text(encoding="utf-8")
        own = set(re.findall(r"^(?:run|out): (\S+)", text, re.M))
        for path in set(re.findall(r"\bruns/[\w/.-]+", text)) - own:
            assert any(path == w or path.startswith(f"{w}/") for w in written), f"{example.config} reads {path}"
        written |= own
    assert len(written) >= 5


def test_before_and_after_are_read_from_the_table_that_a_run_prints(capsys):
    with terminal.console.capture() as caught:
        terminal.before_and_after({"accuracy": 0.25, "pass@4": 0.5, "loss": 3.0, "gold": -1.0},
                                  {"accuracy": 0.75, "pass@4": 1.0, "loss": 0.125, "gold": 0.5}, "held out")
    said = caught.get()
    assert [measured(said, n) for n in ("accuracy", "pass@4", "loss", "gold")] == [
        [0.25, 0.75], [0.5, 1.0], [3.0, 0.125], [-1.0, 0.5]]
    assert measured("pairs.jsonl: 2345 pairs; 12 prompts left out", "pairs") == [0, 2345]
    assert measured(said, "greedy") is None


def test_a_run_that_learns_too_little_or_takes_too_long_is_no_example():
    rises, falls = Example("x", "accuracy", 0.2), Example("x", "loss", -1.0)
    assert verdict(rises, 10, 0.3, 0.51) == verdict(falls, 10, 3.0, 1.9) == ""
    for example, before, after in ((rises, 0.3, 0.45), (rises, 0.5, 0.2), (falls, 3.0, 2.5), (falls, 1.0, 3.0),
                                   (rises, 0.3, math.nan)):
        assert "less than" in verdict(example, 10, before, after)
    assert verdict(rises, 130, 0.3, 0.6) == "more than 120 s"


def test_a_failed_run_is_one_row_with_its_reason_and_the_exit_code_says_so(base, tmp_path, monkeypatch, capsys):
    small = ("task.digits=1", "sampling.prompts=2", "sampling.group_size=2", "sampling.max_new_tokens=3",
             "optim.steps=1", "eval.prompts=2", "eval.samples=2", "optim.minibatch=4", f"model.name={base}")
    good, bad = (Example("tiny-grpo", "accuracy", change, (*small, *more)) for change, more in (
        (0.0, ()), (0.1, ("optim.nope=1",))))
    done = examples.run(good, tmp_path)
    assert (done.failed, done.before) == ("", 0.0)
    assert 0 < done.seconds < 60
    monkeypatch.setattr(examples, "EXAMPLES", (bad,))
    assert examples.main([]) == 1
    assert "unknown key optim.nope" in capsys.readouterr().out


# docs/examples.md
def test_every_config_is_on_the_page_and_those_for_a_gpu_are_expected_to_and_not_measured():
    assert {*re.findall(r"\]\(\.\./configs/([\w.-]+)\.yaml\)", PAGE)} == {*CONFIGS}
    told = dict(re.findall(r"^\| \[([\w.-]+)\]\(\S+\) \| (.* GB GPU .*) \|$", PAGE, re.M))
    first = {name: (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0] for name in CONFIGS}
    assert {*told} == {name for name in CONFIGS if "GB GPU" in first[name]}
    for name, row in told.items():
        assert len(row.split(" | ")) == 5, name
        assert row.endswith("| expected"), name
        assert "Expected, not measured" in first[name]
