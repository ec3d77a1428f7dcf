"""A working directory with finished runs in it, made once: for the commands about runs.

A helper, not a test. PYTEST_DONT_REWRITE: the tests import it and name it in pytest_plugins, and
it has no assertion that is worth rewriting.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

import pytest
from runs_fixture import PPO, REWARD, furnish, run
from transformers import AutoTokenizer

from rlkl import cli

CHATML = (
    "{%- for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '=' }}{% endif %}"
)
ENDS = REWARD.replace(  # the task of runs_fixture, but the only digit must be the last character
    "any(c.isdigit() for c in response)",
    "response[-1:].isdigit() and not any(c.isdigit() for c in response[:-1])",
)
RUNS = {  # 6 steps each
    "ppo": (  # held-out accuracy after every 2
        *PPO,
        "checkpoint.every=2",
        "checkpoint.keep=3",
        "scoring.processes=0",
        "eval.prompts=20",
    ),
    "lora": (
        "lora.r=4",
        "task=reward.py:Digits",
        "scoring.processes=0",
        "eval.every=0",
        "sampling.temperature=0.9",
    ),
}
SFT = ("task=jsonl", "task.path=prompts.jsonl", "run=runs/sft")


@pytest.fixture(scope="session")
def workplace(base, tmp_path_factory) -> Path:
    """The folder with runs/ppo, runs/lora, runs/unborn, runs/sft and no-run.

    unborn was killed before its first checkpoint; sft is a run of another command; no-run is an
    empty folder.
    """
    folder = tmp_path_factory.mktemp("workplace")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        furnish(folder)
        for name, options in RUNS.items():
            run(base, f"run=runs/{name}", *options)
        without = shutil.ignore_patterns("metrics.jsonl", "heldout.json", "step-*")
        shutil.copytree("runs/ppo", "runs/unborn", ignore=without)
        assert cli.main(["sft", f"model.name={base}", *SFT]) == 0
        Path("no-run").mkdir()
    return folder


@pytest.fixture
def there(workplace, monkeypatch) -> Path:
    """The folder of finished runs, as the working directory."""
    monkeypatch.chdir(workplace)
    return workplace


@pytest.fixture
def rlkl(there, capsys, monkeypatch):
    """rlkl(ARGUMENTS) → what the command printed, on a wide terminal. Fails where it fails."""
    from rlkl.run.terminal import console

    monkeypatch.setattr(console, "width", 160)

    def call(*arguments: str) -> str:
        capsys.readouterr()
        code = cli.main(list(arguments))
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return call


@pytest.fixture
def refused(there, capsys):
    """refused(ARGUMENTS) → the error of the command: the only line on stderr. Exit code 2."""

    def call(*arguments: str) -> str:
        capsys.readouterr()
        assert cli.main(list(arguments)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return call


def with_template(base: Path, folder: Path) -> Path:
    """A copy of the model in `base` with a chat template."""
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def cells(text: str) -> list[list[str]]:
    """The cells of a table that a command printed: its rows without head, feet included."""
    lines = [line[1:-1].split("│") for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line] for line in lines]
