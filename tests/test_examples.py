"""`make examples`: which configurations it runs, by which command, and how it judges a run."""

import math
import re

from runs_fixture import ROOT
from test_supervised import SCHEMAS

from benchmarks import examples
from benchmarks.examples import EXAMPLES, Example, command, measured, verdict
from rlkl.cli import COMMANDS
from rlkl.run import config, terminal
from rlkl.run.schema import Config

pytest_plugins = ("runs_fixture",)
PAGE = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.yaml"))


def text_of(name: str) -> str:
    """The text of a configuration."""
    return (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")


def test_every_config_for_a_cpu_is_an_example():
    names = [e.config for e in EXAMPLES]
    assert sorted(names) == [n for n in CONFIGS if n.startswith(("tiny-", "scratch-"))]


def test_an_example_is_run_by_the_command_of_its_first_line_with_options_that_exist():
    for example in EXAMPLES:
        _, *program, path = command(example._replace(overrides=()))
        named = program[-1] if program[0] == "-m" else None
        assert program == (["-m", "rlkl", named] if named else [str(ROOT / "train.py")])
        assert named is None or named in COMMANDS
        config.load([path, *example.overrides], schema=SCHEMAS.get(named, Config))


def test_the_files_that_an_example_reads_are_written_by_an_earlier_one():
    """The parts of a pipeline share a folder, and are listed in their order."""
    written = set()
    for example in EXAMPLES:
        text = text_of(example.config)
        own = set(re.findall(r"^(?:run|out): (\S+)", text, re.M))
        for path in set(re.findall(r"\bruns/[\w/.-]+", text)) - own:
            sources = [w for w in written if path == w or path.startswith(f"{w}/")]
            assert sources, f"{example.config} reads {path}"
        written |= own
    assert len(written) >= 5


def test_before_and_after_are_read_from_the_table_that_a_run_prints():
    before = {"accuracy": 0.25, "pass@4": 0.5, "loss": 3.0, "gold": -1.0}
    after = {"accuracy": 0.75, "pass@4": 1.0, "loss": 0.125, "gold": 0.5}
    with terminal.console.capture() as printed:
        terminal.log_before_after(before, after, "held out")
    for name in before:
        assert measured(printed.get(), name) == [before[name], after[name]]
    assert measured("pairs.jsonl: 2345 pairs; 12 prompts left out", "pairs") == [0, 2345]
    assert measured(printed.get(), "greedy") is None


def test_a_run_that_learns_too_little_or_takes_too_long_fails():
    rises = Example("x", "accuracy", 0.2)
    falls = Example("x", "loss", -1.0)
    assert verdict(rises, 10, 0.3, 0.51) == verdict(falls, 10, 3.0, 1.9) == ""
    for example, before, after in (
        (rises, 0.3, 0.45),
        (rises, 0.5, 0.2),
        (falls, 3.0, 2.5),
        (falls, 1.0, 3.0),
        (rises, 0.3, math.nan),
    ):
        assert "less than" in verdict(example, 10, before, after)
    assert verdict(rises, 130, 0.3, 0.6) == "more than 120 s"


def test_a_failed_run_is_one_row_with_its_reason_and_the_exit_code_is_1(
    base, tmp_path, monkeypatch, capsys
):
    small = (
        "task.digits=1",
        "sampling.prompts=2",
        "sampling.group_size=2",
        "sampling.max_new_tokens=3",
        "optim.steps=1",
        "eval.prompts=2",
        "eval.samples=2",
        "optim.minibatch=4",
        f"model.name={base}",
    )
    good = Example("tiny-grpo", "accuracy", 0.0, small)
    result = examples.run(good, tmp_path)
    assert (result.failed, result.before) == ("", 0.0)
    assert 0 < result.seconds < 60
    bad = Example("tiny-grpo", "accuracy", 0.1, ("optim.nope=1",))
    monkeypatch.setattr(examples, "EXAMPLES", (bad,))
    assert examples.main([]) == 1
    assert "unknown key optim.nope" in capsys.readouterr().out


# ------------------------------------------------------------------ docs/examples.md


def test_every_config_is_on_the_page_and_those_for_a_gpu_are_marked_as_expected():
    assert {*re.findall(r"\]\(\.\./configs/([\w.-]+)\.yaml\)", PAGE)} == {*CONFIGS}
    rows = dict(re.findall(r"^\| \[([\w.-]+)\]\(\S+\) \| (.* GB GPU .*) \|$", PAGE, re.M))
    assert {*rows} == {name for name in CONFIGS if "GB GPU" in text_of(name).splitlines()[0]}
    for name, row in rows.items():
        assert len(row.split(" | ")) == 5, name
        assert row.endswith("| expected"), name
        assert "Expected, not measured" in text_of(name).splitlines()[0]
