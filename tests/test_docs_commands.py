"""docs/commands.md: its commands are run as they stand, and print what the page shows, numbers aside."""

import contextlib
import io
import re
import shutil

import pytest
from runs_fixture import ROOT

from rlkl import cli, config

pytest_plugins = ("runs_fixture", "finished_runs")
PAGE = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    rlkl ([^\n]+)\n\n```\n(.*?)```", PAGE, re.M | re.S)


def shapes(text: str) -> list[list[str]]:
    """The words of each line, without its frame; numbers are #."""
    lines = (re.sub(r"\d[\d.]*", "#", re.sub(r"[\u2500-\u257f]+", " ", line)).split() for line in text.splitlines())
    return [line for line in lines if line]


@pytest.fixture
def page(workplace, tmp_path, monkeypatch):
    """runs/grpo and runs/lora, as on the page."""
    shutil.copytree(workplace / "runs/ppo", tmp_path / "runs/grpo")
    shutil.copytree(workplace / "runs/lora", tmp_path / "runs/lora")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_about_a_run_is_on_the_page():
    assert [line.split()[0] for line, _ in COMMANDS] == ["eval", "chat", "report", "export"]
    assert all(name in PAGE for name in cli.COMMANDS)


@pytest.mark.parametrize(("line", "told"), COMMANDS, ids=[line.split()[0] for line, _ in COMMANDS])
def test_a_command_prints_what_the_page_shows(line, told, page, capsys, monkeypatch):
    from rlkl.terminal import console

    monkeypatch.setattr(console, "width", 300)
    assert cli.main(line.split()) == 0
    found, told = shapes(capsys.readouterr().out), shapes(told)
    if line.startswith("chat"):  # what is said, and where it was cut
        assert (found[0], found[1][0], found[1][-2:]) == (told[0], told[1][0], told[1][-2:])
        assert found[-1][:2] == told[-1][:2] == ["#", "tokens"]
    elif line.startswith("report"):  # which options differ depends on the runs
        names = [[row[0] for row in rows[next(i for i, row in enumerate(rows) if row[0] == "steps"):]]
                 for rows in (found, told)]
        assert set(names[1]) <= set(names[0])
        assert found[0] == told[0]
        assert (page / "comparison/report-compare.png").is_file()
    else:
        assert found == told


def test_what_was_exported_is_loaded_by_the_lines_of_the_page(page):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert cli.main(["export", "runs/grpo", "exported"]) == 0
        exec(code, {})
    assert said.getvalue().splitlines()[-1].startswith("38+19=")


def test_the_snippets_are_valid_and_the_options_exist():
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    cfg = config.build(config.merge(config.defaults(), config.parse_yaml(text, "the page")))
    assert cfg.eval.stop == ["\nQuestion:", "</answer>"]
    known = {row[0] for row in config.options({})} | {"step", "task"}
    named = re.findall(r"`((?:eval|sampling|model)\.[\w.]+)", PAGE)
    assert len(set(named)) > 7
    assert set(named) <= known


def test_the_runs_of_the_page_name_configs():
    found = re.findall(r"python train\.py (\S+) (.*)", PAGE)
    assert len(found) == 2
    for path, options in found:
        config.load([str(ROOT / path), *options.split()])
