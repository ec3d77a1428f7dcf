"""What a run prints: bars and rows that fit into the terminal, and plain lines in a file."""

import io
import re
import subprocess
import sys
from itertools import pairwise

import pytest
from rich.console import Console
from runs_fixture import ROOT, run

from rlkl.run import terminal
from rlkl.run.terminal import LEGEND, ROWS_PER_HEAD, StepTable, cell, log_heldout, log_sample

pytest_plugins = ("runs_fixture",)

GRPO = {
    "reward": 0.25,
    "frac_reward_zero_std": 0.5,
    "response_length": 1234.5,
    "entropy": 0.625,
    "clip_fraction": 0.00569,
    "grad_norm/policy": 32.75,
    "kl_old_pi": 1.234e-4,
    "kl_pi_ref_sequence": -1.5e-5,
    "seconds": 104.2,
}
PPO = {**GRPO, "explained_variance": -0.123}
BARS = """
from rlkl.run.terminal import bars, log_line, progress

with progress("training", 10_000) as show_done:
    show_done(9_000)
    show_done(9_001)
    bars.refresh()
    with progress("held out, sampled", 1319) as show_prompts:
        show_prompts(64)
        show_prompts(128)
        log_line("a line")
        bars.refresh()
log_line("the end")
"""


@pytest.fixture
def screen(monkeypatch):
    """screen(WIDTH) → the console of a terminal of this width, from now on; None is a file."""

    def of(width: int | None) -> Console:
        console = Console(
            file=io.StringIO(),
            force_terminal=width is not None,
            width=width,
            color_system=None,
            highlight=False,
            soft_wrap=True,
        )
        monkeypatch.setattr(terminal, "console", console)
        return console

    return of


def lines(console: Console) -> list[str]:
    """What was printed on this console."""
    return console.file.getvalue().splitlines()


def printed_bars(**environment: str) -> list[str]:
    """What BARS prints in a process of its own: lines and frames, without escape sequences."""
    done = subprocess.run(
        [sys.executable, "-c", BARS],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.stdout)
    return [line for line in re.split(r"[\r\n]+", plain) if line]


# ------------------------------------------------------------------ bars


@pytest.mark.parametrize("width", [80, 60])
def test_a_bar_shows_what_is_done_of_all_and_the_time_left_at_any_width(width):
    """Also an evaluation during training, whose bar is a line below that of the training."""
    frames = printed_bars(COLUMNS=str(width), FORCE_COLOR="1", TERM="xterm")
    shown = [line for line in frames if re.search(r" left \d:\d\d:\d\d$", line)]
    assert any(re.search(r"^training .* 9001/10000 0:00:0\d left ", line) for line in shown)
    assert any(re.search(r"^held out, sampled .* 128/1319 .* left ", line) for line in shown)
    assert {len(line) for line in shown} == {width}
    assert frames[-1] == "the end"


def test_in_a_file_there_are_lines_and_no_bars():
    assert printed_bars(COLUMNS="80") == ["a line", "the end"]


# ------------------------------------------------------------------ rows of steps


@pytest.mark.parametrize("metrics", [GRPO, PPO], ids=["GRPO", "PPO"])
def test_all_columns_fit_into_80_characters_and_stand_under_their_titles(screen, metrics):
    console = screen(80)
    StepTable().print(99_999, metrics)
    head, row = lines(console)[-2:]
    assert len(head) == len(row) <= 80
    assert [m.end() for m in re.finditer(r"\S+", head)] == [
        m.end() for m in re.finditer(r"\S+", row)
    ]
    assert {"reward", "grad", "kl_old", "kl_ref", "sec"} <= set(head.split())
    assert row.split()[:2] == ["99999", "0.250"]


def test_a_narrow_terminal_gets_the_first_columns_and_a_file_gets_all(screen):
    heads = {}
    for width in (40, 60, None):
        console = screen(width)
        StepTable().print(1, GRPO)
        heads[width] = lines(console)[-2].split()
        if width:
            assert max(map(len, lines(console))) <= width
    assert heads[40] == heads[None][: len(heads[40])]
    assert heads[60] == heads[None][: len(heads[60])]
    assert 4 <= len(heads[40]) < len(heads[60]) < len(heads[None]) == 1 + len(GRPO)


def test_with_a_critic_its_explained_variance_stands_in_for_groups_of_equal_scores(screen):
    for metrics, title, text in ((GRPO, "zero_std", "50.0%"), (PPO, "expl_var", "-12.3%")):
        console = screen(80)
        StepTable().print(1, metrics)
        head, row = lines(console)[-2:]
        assert row.split()[head.split().index(title)] == text
        assert len({"zero_std", "expl_var"} & set(head.split())) == 1


def test_the_head_comes_again_every_few_rows_and_the_legend_does_not(screen):
    console = screen(80)
    table = StepTable()
    for step in range(2 * ROWS_PER_HEAD + 1):
        table.print(step, GRPO)
    heads = [i for i, line in enumerate(lines(console)) if line.startswith(" step")]
    assert [b - a for a, b in pairwise(heads)] == [ROWS_PER_HEAD + 1] * 2
    first_words = [line.split()[0] for line in lines(console)]
    assert {title: first_words.count(title) for title in LEGEND} == {
        "zero_std": 1,
        "kl_old": 1,
        "kl_ref": 1,
        "expl_var": 0,
    }


def test_the_legend_explains_only_what_the_run_computes(screen):
    console = screen(80)
    StepTable().print(1, {"reward": 1.0, "kl_old_pi": 0.1})
    assert [line.split()[0] for line in lines(console)] == ["kl_old", "step", "1"]


def test_a_metric_that_comes_later_gets_a_column_under_a_new_head(screen):
    """Such as the gradient norm of the policy, when the critic's warm-up is over."""
    console = screen(80)
    table = StepTable()
    for metrics in ({"reward": 1.0}, {"reward": 1.0, "grad_norm/policy": 2.0}):
        table.print(1, metrics)
    assert [line.split() for line in lines(console)] == [
        ["step", "reward"],
        ["1", "1.00"],
        ["step", "reward", "grad"],
        ["1", "1.00", "2.00"],
    ]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_has_at_most_seven_characters_and_is_right_to_a_digit(sign):
    for exponent in range(-12, 13):
        for digits in (1.0, 1.2345, 9.9999):
            x = sign * digits * 10**exponent
            text = cell(x)
            assert len(text) <= 7, text
            assert float(text) == pytest.approx(x, rel=0.5)
    assert [cell(x) for x in (0.0, 0.4, 3.456, 1234.5, 1.234e-4)] == [
        "0.00",
        "0.400",
        "3.46",
        "1234",
        "0.00012",
    ]
    assert cell(float("nan")) == "nan"
    assert cell(0.00569, percent=True) == "0.6%"


# ------------------------------------------------------------------ samples and held-out numbers


def test_a_sample_is_one_line_with_both_ends_of_prompt_and_response(screen):
    prompt = "first words " + "x" * 300 + " last words"
    for width in (80, 60):
        console = screen(width)
        log_sample({"prompt": prompt, "response": prompt.upper(), "score": -0.25})
        log_sample({"prompt": [{"role": "user", "content": prompt}], "response": "7", "score": 1})
        log_sample({"prompt": "1+2=", "response": prompt, "score": None})
        log_sample({"prompt": "1+2=", "response": "[/]\n", "score": 0})
        long, chat, short, markup = lines(console)
        assert max(map(len, lines(console))) <= width
        assert re.search(r"'first .*… .*words' → 'FIRST .* … .*WORDS'  score -0.25$", long)
        assert chat.endswith(" → '7'  score 1")
        assert "'1+2=' → 'first words" in short
        assert short.endswith("last words'  score none")
        assert markup.strip() == r"'1+2=' → '[/]\n'  score 0"


def test_held_out_numbers_break_between_words_on_a_terminal_and_not_in_a_file(screen):
    numbers = {"accuracy": 0.27345, "strict": 0.1, "flexible": 0.2, "greedy": 0.558, "pass@8": 0.8}
    text = "held out, before training: accuracy 0.273, strict 0.100, flexible 0.200, greedy 0.558, "
    text += "pass@8 0.800"
    console = screen(None)
    log_heldout("before training", numbers)
    assert lines(console) == [text]
    console = screen(60)
    log_heldout("before training", numbers)
    assert len(lines(console)) == 2
    assert " ".join(line.strip() for line in lines(console)) == text


# ------------------------------------------------------------------ a whole run


def test_a_run_says_what_it_evaluates_and_what_came_of_it(here, base, capsys):
    """Each evaluation is one line, whether the step has a row or not; no dictionary is printed."""
    run(base, "run=out", "log.every=5", "eval.every=2")
    out = capsys.readouterr().out
    printed = out.splitlines()
    number = r"[01]\.\d{3}"
    start = printed.index("evaluating before training: 5 held-out prompts, 2 responses each")
    numbers = rf"accuracy {number}, greedy {number}, pass@2 {number}"
    assert re.fullmatch(rf"held out, before training: {numbers}", printed[start + 1])
    assert "evaluating after training: 5 held-out prompts, 2 responses each" in printed
    assert re.findall(rf"^held out, after step (\d): accuracy {number}$", out, re.M) == list("246")
    assert re.findall(r"^ +(\d) +\d", out, re.M) == ["1", "5"]
    assert "{" not in out
    assert "━ " not in out
