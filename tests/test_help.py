"""--help: every option whole at any width, those of the chosen functions too, and one by name."""

import inspect
import re

import pytest
from runs_fixture import ROOT

import train
from rlkl import cli
from rlkl.errors import UserError
from rlkl.run import terminal
from rlkl.run.help import cells, description_in, every_option, function_options
from rlkl.run.tables import TABLES

PPO = str(ROOT / "configs" / "tiny-ppo.yaml")
OWN = '''
def loss(new, batch, *, strength: float = 0.5):
    """A loss. With `strength` it is stronger."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0.5):
    return bonus
'''


@pytest.fixture
def shown(capsys, monkeypatch):
    """What `train.py ARGUMENTS` prints on a terminal of so many columns."""

    def run(*arguments: str, width: int = 80) -> str:
        monkeypatch.setattr(terminal.console, "width", width)
        train.main(list(arguments))
        return capsys.readouterr().out

    return run


def row_of(text: str, name: str) -> str:
    """The text beside a name, on one line: its row and the indented ones below."""
    (row,) = re.findall(rf"^{re.escape(name)}  +(.*(?:\n  +.*)*)", text, re.M)
    return " ".join(row.split())


@pytest.mark.parametrize("width", [60, 80])
def test_nothing_is_cut_on_a_narrow_terminal(shown, width):
    out = shown(PPO, "--help", width=width)
    assert "…" not in out.partition("later arguments win")[2]
    for row in every_option([PPO]):
        name, text = cells(row)
        assert row_of(out, name).replace(" ", "") == text.replace(" ", "").replace("\n", "")
    table = out.partition("later arguments win\n")[2].partition("\n--help NAME")[0]
    assert max(len(line) for line in table.splitlines()) <= width


def test_the_options_of_the_functions_that_a_configuration_names_are_listed(shown):
    out = shown(PPO, "--help")
    assert row_of(out, "advantage").endswith("[plug-in, default grpo, here gae]")
    assert row_of(out, "advantage.lam").endswith("[float, default 0.95]")
    assert row_of(out, "advantage.gamma") == "the discount γ [float, default 1.0]"
    assert row_of(out, "loss.epsilon").startswith("lower side of the clip")
    assert row_of(out, "task.digits") == "of each number [int, default 2]"
    assert "advantage.gamma" not in shown("--help"), "grpo has no such option"


def test_the_options_of_ones_own_functions_are_listed(shown, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    out = shown("loss=own.py:loss", "reward=[own.py:compute_score, repetition]", "--help")
    assert row_of(out, "loss.strength") == "With `strength` it is stronger [float, default 0.5]"
    assert row_of(out, "reward.bonus") == "[float, default 0.5]"
    assert row_of(out, "reward.n") == "[int, default 20]"
    assert row_of(out, "reward").endswith("here own.py:compute_score + repetition]")
    assert "loss.epsilon" not in out


def test_one_section_is_shown_by_its_name(shown):
    out = shown("--help", "optim")
    names = [line.split()[0] for line in out.splitlines() if not line.startswith(" ")]
    assert names == [key for key, *_ in every_option([]) if key.startswith("optim.")]
    assert row_of(shown("--help", "loss.epsilon"), "loss.epsilon")


@pytest.mark.parametrize("key", TABLES)
def test_the_names_that_an_option_may_have_are_listed_with_a_line_each(shown, key):
    out = shown("--help", key, width=60)
    assert row_of(out, key)
    for name, function in TABLES[key].items():
        first = inspect.getdoc(function).splitlines()[0]
        assert row_of(out, name) == " ".join(first.split())


def test_one_function_is_shown_with_its_docstring_and_its_options(shown):
    out = shown("--help", "advantage.gae")
    assert inspect.getdoc(TABLES["advantage"]["gae"]) in out
    assert row_of(out, "advantage.lam") == "[float, default 0.95]"
    assert "advantage.scale" not in out, "an option of grpo, which the default names"
    assert row_of(shown("--help", "task.datasets"), "task.path") == "[str, required]"


@pytest.mark.parametrize(
    ("topic", "words"),
    [
        ("epsilon", "did you mean loss.epsilon?"),
        ("gae", "did you mean advantage.gae?"),
        ("optm", "did you mean optim?"),
        ("nonsense", "there is seed, device, "),
    ],
)
def test_an_unknown_name_is_answered_with_those_that_may_be_meant(topic, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        train.main(["--help", topic])
    assert str(error.value).startswith(f"--help {topic}: no such section, option or function; ")


def test_a_name_before_help_is_a_configuration_and_one_behind_it_too(shown):
    assert "advantage.lam " in shown("tiny-ppo", "--help")
    assert "advantage.lam " in shown("--help", "tiny-ppo")
    assert "advantage.lam " in shown("--help", "advantage", "advantage=gae")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_in_which_nothing_is_cut(command, capsys, monkeypatch):
    monkeypatch.setattr(terminal.console, "width", 60)
    assert cli.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: " in out
    assert not re.search(r"\w…", out)
    if re.search("^task ", out, re.M):
        assert row_of(out, "task.digits") == "of each number [int, default 2]"


def test_every_option_of_every_function_has_a_type_and_a_default_or_is_required():
    for key, table in TABLES.items():
        for function in table.values():
            for name, kind, default, line in function_options(key, function):
                assert name.startswith(f"{key}.")
                assert kind not in ("", "Any"), name
                assert default != "", name
                assert "\n" not in line


def test_what_a_docstring_says_of_an_option_is_its_entry_or_the_sentence_that_names_it():
    doc = """The first line, eq. 7. See Ng et al. 2000.

    Some words. Where `tail` is set (eq. 3) it
    ends. More words.

    head: where it begins, of A.
    Even two lines.
    other: else.
    Raises ValueError without.
    """
    doc = inspect.cleandoc(doc)
    assert description_in(doc, "head") == "where it begins, of A. Even two lines"
    assert description_in(doc, "other") == "else"
    assert description_in(doc, "tail") == "Where `tail` is set (eq. 3) it ends"
    assert description_in(doc, "line") == ""
