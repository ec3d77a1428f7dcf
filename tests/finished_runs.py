"""A working directory with finished runs in it, made once: for the commands about runs. A helper, not a test.

PYTEST_DONT_REWRITE (the tests import it and name it in pytest_plugins; it asserts nothing worth rewriting).
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
ENDS = REWARD.replace("any(c.isdigit() for c in reply)",  # the task in which a reply's only digit must end it
                      "reply[-1:].isdigit() and not any(c.isdigit() for c in reply[:-1])")
RUNS = {  # 6 steps each, held-out accuracy after every 2
    "ppo": (*PPO, "checkpoint.every=2", "checkpoint.keep=3", "scoring.processes=0", "eval.prompts=20"),
    "lora": ("lora.r=4", "task=reward.py:Digits", "scoring.processes=0", "eval.every=0", "sampling.temperature=0.9"),
}


@pytest.fixture(scope="session")
def workplace(base, tmp_path_factory) -> Path:
    """runs/ppo, runs/lora; runs/unborn, killed before its first checkpoint; runs/sft, of another command; no-run."""
    folder = tmp_path_factory.mktemp("workplace")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        furnish(folder)
        for name, options in RUNS.items():
            run(base, f"run=runs/{name}", *options)
        shutil.copytree("runs/ppo", "runs/unborn", ignore=lambda *_: ["metrics.jsonl", "heldout.json"])
        shutil.rmtree("runs/unborn/checkpoints")
        Path("runs/unborn/checkpoints").mkdir()
        assert cli.main(["sft", f"model.name={base}", "task=jsonl", "task.path=prompts.jsonl", "run=runs/sft"]) == 0
        Path("no-run").mkdir()
    return folder


@pytest.fixture
def there(workplace, monkeypatch) -> Path:
    monkeypatch.chdir(workplace)
    return workplace


@pytest.fixture
def rlkl(there, capsys, monkeypatch):
    """rlkl ARGUMENTS → what it printed, on a wide terminal. Fails where the command does."""
    from rlkl.terminal import console

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
    """rlkl ARGUMENTS → the one line of the error."""

    def call(*arguments: str) -> str:
        capsys.readouterr()
        assert cli.main(list(arguments)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return call


def with_template(base: Path, folder: Path) -> Path:
    """The model of `base` with a chat template."""
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder
