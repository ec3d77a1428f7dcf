"""docs/commands.md: its commands run as they stand and print what the page shows, numbers aside."""

import contextlib
import io
import re
import shutil

import pytest
from runs_fixture import ROOT

from rlkl import cli
from rlkl.run import config

pytest_plugins = ("runs_fixture", "finished_runs")
PAGE = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
OUTPUTS = dict(re.findall(r"^    rlkl ([^\n]+)\n\n```\n(.*?)```", PAGE, re.M | re.S))


def words(text: str) -> list[list[str]]:
    """The words of each line, without the frames of tables, and # for each number."""
    lines = []
    for line in text.splitlines():
        without_frame = re.sub(r"[\u2500-\u257f]+", " ", line)
        lines.append(re.sub(r"\d[\d.]*", "#", without_frame).split())
    return [line for line in lines if line]


@pytest.fixture
def page_runs(workplace, tmp_path, monkeypatch):
    """A working directory with runs/grpo and runs/lora, as on the page."""
    shutil.copytree(workplace / "runs/ppo", tmp_path / "runs/grpo")
    shutil.copytree(workplace / "runs/lora", tmp_path / "runs/lora")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def printed(page_runs, capsys, monkeypatch):
    """printed(COMMAND) → the words that it prints now, and the words that the page shows."""
    from rlkl.run.terminal import console

    monkeypatch.setattr(console, "width", 300)

    def call(command: str) -> tuple[list[list[str]], list[list[str]]]:
        (line,) = [line for line in OUTPUTS if line.startswith(command)]
        assert cli.main(line.split()) == 0
        return words(capsys.readouterr().out), words(OUTPUTS[line])

    return call


def test_every_command_is_on_the_page():
    assert [line.split()[0] for line in OUTPUTS] == ["eval", "chat", "report", "export"]
    assert [name for name in cli.COMMANDS if name not in PAGE] == []


@pytest.mark.parametrize("command", ["eval", "export"])
def test_eval_and_export_print_what_the_page_shows(command, printed):
    now, shown = printed(command)
    assert [line for line in now if line[0] != "note:"] == shown  # these runs hold out few prompts


def test_chat_prints_what_the_page_shows(printed):
    """The prompt, the names of the columns, and tokens below; the responses are others."""
    now, shown = printed("chat")
    assert now[0] == shown[0]
    assert now[1][0] == shown[1][0] == "before:"
    assert now[1][-2:] == shown[1][-2:]
    assert now[-1][:2] == shown[-1][:2] == ["#", "tokens"]


def test_report_prints_what_the_page_shows(printed, page_runs):
    """The names of the runs and of the results; which options differ depends on the runs."""

    def results(lines: list[list[str]]) -> list[str]:
        names = [line[0] for line in lines]
        return names[names.index("steps") :]

    now, shown = printed("report")
    assert now[0] == shown[0] == ["runs/grpo", "runs/lora"]
    assert set(results(shown)) <= set(results(now))
    assert (page_runs / "comparison/report-compare.png").is_file()


def test_an_exported_model_is_loaded_by_the_code_of_the_page(page_runs):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(["export", "runs/grpo", "exported"]) == 0
        exec(code, {})
    assert out.getvalue().splitlines()[-1].startswith("38+19=")


def test_the_configuration_of_the_page_is_valid_and_its_options_exist():
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    tree = config.merge(config.defaults(), config.parse_yaml(text, "the page"))
    assert config.build(tree).eval.stop == ["\nQuestion:", "</answer>"]
    known = {row[0] for row in config.options()}
    named = set(re.findall(r"`((?:eval|sampling|model)\.\w+)", PAGE))
    assert len(named) > 7
    assert named - known == set()
    shown = set(re.findall(r"^│ ((?:\w+\.)+\w+)  ", PAGE, re.M))
    assert len(shown) > 3
    assert shown - known == set()


def test_the_runs_of_the_page_name_configurations_and_options_that_exist():
    runs = re.findall(r"python train\.py (\S+) (.*)", PAGE)
    assert len(runs) == 2
    for path, options in runs:
        config.load([str(ROOT / path), *options.split()])
