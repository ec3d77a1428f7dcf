"""`rlkl.train`: a run from Python is one of the command line, with functions in place of names."""

import inspect
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from runs_fixture import ROOT, SMALL, differences, rows, run, train_error

import rlkl
from rlkl import plugins
from rlkl.errors import UserError
from rlkl.types import Example

pytest_plugins = ("runs_fixture",)


def clipped(new, batch, *, width: float = 0.2):
    """PPO's clip, written again."""
    ratio = (new.logprobs - batch.old_logprobs).exp()
    bounded = ratio.clamp(1 - width, 1 + width)
    return -torch.minimum(ratio * batch.advantages, bounded * batch.advantages), {"ratio": ratio}


def digits(example, response):
    return sum(c.isdigit() for c in response) / 6


class Colons:
    """Prompts that end in a colon."""

    def __init__(self, split, *, count: int = 10):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Example(f"{index}:", "1")

    def score(self, example, response):
        return float(example.answer in response)


def small(base: Path, *overrides: str) -> list[str]:
    return [*SMALL, f"model.name={base}", *overrides]


@pytest.mark.usefixtures("here")
def test_it_returns_the_run_with_its_rows_and_its_model(base):
    run_of = rlkl.train(*small(base), reward=digits, steps=2)
    assert [row["step"] for row in run_of.rows] == [1, 2]
    assert run_of.rows == [
        {k: x for k, x in r.items() if k != "sample"} for r in rows(run_of.folder)
    ]
    assert {*run_of.before} == {*run_of.after} == {"accuracy", "greedy", "pass@2"}
    assert run_of.last_checkpoint == run_of.folder / "checkpoints" / "step-000002"
    ids = run_of.tokenizer("1+1=", return_tensors="pt").input_ids
    assert run_of.model.generate(ids, max_new_tokens=2).shape[0] == 1


def test_functions_give_the_same_run_as_the_same_functions_in_a_file(here, base):
    source = "import torch\n" + inspect.getsource(clipped) + inspect.getsource(digits)
    (here / "mine.py").write_text(source)
    names = ("loss.name=mine.py:clipped", "loss.width=0.1", "reward=mine.py:digits")
    run(base, "run=file", *names)
    loss = {"name": clipped, "width": 0.1}
    rlkl.train(*small(base), loss=loss, reward=digits, run="python")
    assert differences(Path("file"), Path("python")) == []


@pytest.mark.usefixtures("here")
def test_a_run_in_another_thread_needs_no_signals(base):
    with ThreadPoolExecutor(1) as pool:
        run_of = pool.submit(rlkl.train, *small(base), reward=digits, steps=1).result()
    assert len(run_of.rows) == 1


@pytest.mark.usefixtures("here")
def test_a_task_and_an_advantage_of_ones_own_need_no_file(base):
    def centred(rewards, values, mask, *, group_size, scale: float = 1.0):
        total = rewards.sum(1, keepdim=True)
        return scale * (total - total.mean()) * mask, None

    task = {"name": Colons, "count": 6}
    run_of = rlkl.train(*small(base), task=task, advantage=centred, steps=1, **{"eval.prompts": 3})
    assert len(run_of.data.train) == 6
    assert run_of.rows[0]["updates"] == 1


@pytest.mark.usefixtures("here")
def test_two_functions_of_one_name_are_two_parts_of_the_reward(base):
    def score_of(letter):
        def score(example, response):
            return float(letter in response)

        return score

    rewards = [score_of("1"), {"name": score_of("2"), "weight": 0.5}]
    row = rlkl.train(*small(base), reward=rewards, steps=1).rows[0]
    parts = [row[f"rewards/{name}"] for name in ("score", "score_2")]
    assert row["reward"] == pytest.approx(parts[0] + 0.5 * parts[1])


@pytest.mark.usefixtures("here")
def test_a_run_is_resumed_with_the_same_functions_and_with_no_others(base, capsys):
    options = small(base, "run=whole", "optim.steps=4")
    rlkl.train(*options, reward=digits)
    rlkl.train(*small(base, "run=part", "optim.steps=4"), reward=digits, steps=2)
    plugins.FROM_PYTHON.clear()  # as in another process
    assert "give it to rlkl.train again" in train_error(capsys, "resume=part", "optim.steps=4")

    def other(example, response):
        return 0.0

    other.__name__ = "digits"
    with pytest.raises(UserError, match=r"(?<!python:)digits differs from part/plugins"):
        rlkl.train(resume="part", reward=other, steps=4)
    rlkl.train(resume="part", reward=digits, steps=4)
    # the schedule is constant: the shorter run took the same steps
    assert differences(Path("whole"), Path("part")) == []


@pytest.mark.usefixtures("here")
def test_a_mistake_is_an_error_of_one_line_without_the_ones_that_led_to_it(base):
    with pytest.raises(UserError, match=r"^clipped has no option 'widht'") as caught:
        rlkl.train(*small(base), loss={"name": clipped, "widht": 0.1})
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    with pytest.raises(UserError, match=r"^loss=lambda: must return \(loss, diagnostics\)"):
        rlkl.train(*small(base), loss=lambda new, batch: new.logprobs)
    with pytest.raises(UserError, match=r"unknown key optim\.step"):
        rlkl.train(*small(base), optim={"step": 1})
    with pytest.raises(UserError, match=r"^reward=\{'name': 'clipped', 'weight': 'a'\}: weight"):
        rlkl.train(*small(base), reward={"name": clipped, "weight": "a"})
    with pytest.raises(UserError, match=r"^resume=nope: no run folder"):
        rlkl.train(resume="nope")
    with pytest.raises(UserError, match=r"takes a hub name or a folder.*save_pretrained"):
        rlkl.train(*small(base), model=torch.nn.Linear(1, 1))


@pytest.mark.usefixtures("here")
def test_paths_are_arguments_and_other_things_are_an_error(base):
    Path("mine.yaml").write_text("optim: {steps: 1}\n")
    assert len(rlkl.train(*small(base), Path("mine.yaml"), resume=None, reward=digits).rows) == 1
    with pytest.raises(UserError, match="options by name"):
        rlkl.train({"optim": {"lr": 1.0}})


@pytest.mark.usefixtures("here")
def test_a_run_with_a_lambda_can_be_resumed(base):
    rlkl.train(*small(base, "run=out"), reward=lambda example, response: len(response), steps=1)
    more = rlkl.train(resume="out", reward=lambda example, response: len(response), steps=2)
    assert [row["step"] for row in more.rows] == [1, 2]
    assert [row for row in more.rows if "sample" in row] == []


def test_a_script_without_a_guard_is_one_error_and_starts_no_run(here, base):
    (here / "mine.py").write_text(inspect.getsource(digits))
    script = here / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import rlkl
        rlkl.train(*{small(base)!r}, "reward=mine.py:digits", "scoring.processes=2")
        """)
    )
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("rlkl.errors.UserError: the processes that score responses import")
    assert 'if __name__ == "__main__":' in last
    assert done.stdout.count("device: cpu") == 1
    assert not (here / "runs").exists()


def test_with_the_guard_the_same_script_trains(here, base):
    (here / "mine.py").write_text(inspect.getsource(digits))
    script = here / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import rlkl
        if __name__ == "__main__":
            options = ["reward=mine.py:digits", "scoring.processes=2", "run=out"]
            print("steps", len(rlkl.train(*{small(base)!r}, *options, steps=1).rows))
        """)
    )
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert "steps 1" in done.stdout, done.stderr


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}
