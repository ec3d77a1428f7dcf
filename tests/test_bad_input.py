"""What a user gets wrong ends in one line, `error: …`, that names it and the fix; exit code 2."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs_fixture import ROOT, arguments, differences, resume, rows, run, train, train_error
from safetensors.torch import load_file, save_file

from rlkl.errors import exit_code

pytest_plugins = ("runs_fixture",)

PLUGINS = """
import pathlib
import torch

calls = 0

def raises(examples, responses, batch):
    raise KeyError("first line\\nsecond line")

def raises_later(examples, responses, batch):  # at step 3: it is tried once before the first
    global calls
    calls += 1
    if calls == 4 and pathlib.Path("broken").exists():
        raise RuntimeError("the judge is down")
    return torch.tensor([sum(c.isdigit() for c in response) / 6 for response in responses]), {}

def nan(examples, responses, batch):
    return torch.tensor([0.0] * (len(responses) - 1) + [float("nan")]), {}

def infinite(examples, responses, batch):
    return torch.full((len(responses),), float("inf")), {}

def too_few(examples, responses, batch):
    return torch.zeros(3), {}

def nothing(examples, responses, batch):
    return None

def advantage_silent(rewards, values, mask, *, group_size):
    raise ValueError

def advantage_two_lines(rewards, values, mask, *, group_size):
    raise RuntimeError("first line\\nsecond line")

def advantage_shape(rewards, values, mask, *, group_size):
    return rewards.sum(1), None

def advantage_none(rewards, values, mask, *, group_size):
    return None, None

class Nothing:
    def __init__(self, split):
        pass

    def __len__(self):
        return 0

    def score(self, example, response):
        return 0.0

def loss_reduced(new, batch):
    return new.logprobs.mean(), {}

def loss_constant(new, batch):
    return batch.advantages, {}

def loss_alone(new, batch):
    return -new.logprobs * batch.advantages

def loss_diagnostic(new, batch):
    return -new.logprobs * batch.advantages, {"mean": new.logprobs.mean()}
"""


MISTAKES = {  # arguments → what the message contains
    # configuration
    "missing.yaml": ["missing.yaml", "no such config file"],
    "bad.yaml": ["bad.yaml", "line 4"],
    "optim.lrr=1": ["optim.lrr", "lr, schedule", "max_grad_norm"],
    "optim.lr=fast": ["optim.lr", "'fast'", "number"],
    "optim.betas=[0.9,2]": ["optim.betas", "2"],
    "sampling.group_size=1": ["sampling.group_size", "1", ">= 2"],
    "device=bogus": ["device", "'bogus'", "cpu"],
    "device=cpu:x": ["device", "'cpu:x'"],
    "run=file/out": ["run=file/out", "cannot be written"],
    "resume=gone": ["gone"],
    # names of plug-ins, and what goes with what
    "loss=nope": ["loss", "'nope'", "clip, surrogate, reinforce", "file.py:function"],
    "loss=syntax.py:f": ["syntax.py", "line 2", "SyntaxError"],
    "advantage=gae": ["gae", "critic.kind", "head"],
    "critic.kind=head": ["grpo", "critic.kind=none", "gae"],
    # tasks
    "task=jsonl task.path=empty.jsonl": ["empty.jsonl", "no rows"],
    "task=jsonl task.path=gone.jsonl": ["gone.jsonl", "no such file"],
    "task=jsonl": ["jsonl", "task.path"],
    "task=jsonl task.path=row.jsonl": ["row.jsonl:2", "JSON"],
    "task.path=row.jsonl": ["addition", "'path'", "digits"],
    "task=my.py:Nothing": ["no held-out prompts"],
    "task=countdown task.problems=100": ["no chat template", "task.chat=false"],
    "sampling.max_new_tokens=64": [
        "sampling.max_new_tokens=64 leaves no room for a prompt",
        "context is 64 tokens",
    ],
    "sampling.max_new_tokens=63": [
        "5 of 5",
        "sampling.max_new_tokens",
        "sampling.max_prompt_tokens",
    ],
    # models
    "model.name=not-there sampling.backend=engin": ["'engin'", "engine", "cached"],
    "model.name=no_eos": ["no_eos", "EOS", "set eos_token"],
    "model.name=no_weights": ["no_weights", "model.safetensors"],
    "model.name=torn": ["torn"],
    "model.name=no/such/model": ["no/such/model", "no such folder here"],
    "model.name=../sft/model": ["../sft/model", "no such folder here"],
    # rewards: tried before the run begins
    "reward=my.py:raises": ["raises", "KeyError", "first line"],
    "reward=my.py:nan": ["gave nan for the response"],
    "reward=my.py:infinite": ["infinite", "inf", "response"],
    "reward=my.py:too_few": ["too_few", "(3,)", "16 responses"],
    "reward=my.py:nothing": ["nothing", "TypeError"],
    # advantages and losses: tried on a random batch
    "advantage=my.py:advantage_silent": ["advantage", "advantage_silent", "ValueError"],
    "advantage=my.py:advantage_two_lines": ["advantage", "advantage_two_lines", "first line"],
    "advantage=my.py:advantage_shape": ["advantage_shape", "(8,)", "(8, 4)"],
    "advantage=my.py:advantage_none": ["advantage_none", "failed on a random batch"],
    "loss=my.py:loss_reduced": ["loss_reduced", "(B, T)", "()"],
    "loss=my.py:loss_constant": ["loss_constant", "gradient"],
    "loss=my.py:loss_alone": ["loss_alone"],
    "loss=my.py:loss_diagnostic": ["loss_diagnostic", "mean", "(B, T)"],
}


@pytest.fixture
def broken(here, base):
    """A working directory full of things that are wrong."""
    (here / "bad.yaml").write_text("seed: 0\noptim:\n  lr: 1\n steps: 3\n")
    (here / "syntax.py").write_text("x = 1\ndef f(:\n")
    (here / "my.py").write_text(PLUGINS)
    (here / "empty.jsonl").write_text("\n")
    (here / "row.jsonl").write_text('{"prompt": "p", "answer": "a"}\n{"prompt": "q", \n')
    (here / "file").write_text("not a folder")
    for name in ("no_eos", "no_weights", "torn"):
        shutil.copytree(base, here / name)
    config = json.loads((here / "no_eos" / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (here / "no_eos" / "tokenizer_config.json").write_text(json.dumps(config))
    (here / "no_weights" / "model.safetensors").unlink()
    weights = here / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return here


def missing(message: str, *words: str) -> list[str]:
    """The words that a message lacks."""
    return [word for word in words if word not in message]


@pytest.mark.usefixtures("broken")
def test_a_mistake_is_one_line_that_names_it_and_exit_code_2(base, capsys):
    messages = {m: train_error(capsys, *arguments(base, *m.split())) for m in MISTAKES}
    bad = {m: text for m, text in messages.items() if missing(text, *MISTAKES[m])}
    assert bad == {}


def test_a_model_or_a_template_that_is_missing_is_said_once_and_not_by_the_memory_plan_too(
    here, base, capsys
):
    for mistake in ("model.name=no/such/model", "task=countdown task.problems=100"):
        assert exit_code(train.main, arguments(base, *mistake.split())) == 2
        captured = capsys.readouterr()
        assert "not estimated" not in captured.out
        assert len(captured.err.splitlines()) == 1


def test_a_real_process_ends_with_one_line_and_exit_code_2(here):
    command = [sys.executable, str(ROOT / "train.py"), "optim.lrr=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [done.stderr.strip()]
    assert done.stderr.startswith("error: unknown key optim.lrr")


@pytest.mark.usefixtures("broken")
def test_a_mistake_found_before_the_first_rollout_leaves_no_run_folder(base, capsys):
    for mistake in (
        "optim.lrr=1",
        "loss=nope",
        "model.name=no_eos",
        "loss=my.py:loss_reduced",
        "loss.epsilon=x",
    ):
        train_error(capsys, *arguments(base, mistake, "run=out"))
    assert not Path("out").exists()


def test_an_existing_run_folder_is_never_overwritten(here, base, capsys):
    folder = run(base, "run=out", "optim.steps=2")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    message = train_error(capsys, *arguments(base, "run=out", "optim.steps=3"))
    assert missing(message, "run=out", "resume=out") == []
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_reward_that_raises_at_step_3_keeps_two_steps_and_the_run_can_be_resumed(
    here, base, capsys
):
    (here / "my.py").write_text(PLUGINS)
    run(base, "run=whole", "reward=my.py:raises_later")
    Path("broken").touch()
    message = train_error(capsys, *arguments(base, "run=out", "reward=my.py:raises_later"))
    assert missing(message, "raises_later", "RuntimeError", "the judge is down", "resume=out") == []
    assert [p.name for p in Path("out/checkpoints").iterdir()] == ["step-000002"]
    assert [row["step"] for row in rows(Path("out"))] == [1, 2]
    Path("broken").unlink()
    resume(Path("out"))
    assert differences(Path("whole"), Path("out")) == []


def test_a_loss_that_is_never_finite_gives_up_and_says_what_to_try(here, base, capsys):
    source = "def loss(new, batch):\n    return new.logprobs * float('nan'), {}\n"
    (here / "nan.py").write_text(source)
    options = arguments(base, "run=out", "loss=nan.py:loss", "optim.max_skips=2")
    message = train_error(capsys, *options)
    assert missing(message, "2 updates", "not finite", "optim.lr", "resume=out") == []
    saved = load_file(max(Path("out/checkpoints").iterdir()) / "model.safetensors")
    started = load_file(base / "model.safetensors")
    assert [name for name in started if not torch.equal(saved[name], started[name])] == []


def test_a_weight_that_is_missing_from_the_file_is_not_drawn_at_random(here, base, capsys):
    shutil.copytree(base, here / "holes")
    weights = load_file(here / "holes" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, here / "holes" / "model.safetensors", metadata={"format": "pt"})
    options = arguments(base, "model.name=holes", "optim.steps=1", "run=out")
    assert exit_code(train.main, options) == 2
    assert "lm_head.weight" in capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------ prompts that do not fit


def write_prompts(path: Path, long: str, every: int = 4) -> tuple[str, str]:
    """Sixty prompts, every fourth one with `long` in it. Returns the options of the task."""
    texts = [f"{i}?" if i % every else f"{i}{long}" for i in range(60)]
    path.write_text("".join(json.dumps({"prompt": t, "answer": "1"}) + "\n" for t in texts))
    return "task=jsonl", f"task.path={path}"


def dropped_notes(out: str) -> list[str]:
    return [line for line in out.splitlines() if "dropped" in line]


def test_prompts_that_are_too_long_are_dropped_and_counted_and_the_first_is_shown(
    here, base, capsys
):
    """Also where a prompt looks like markup: chat formats have tags in square brackets."""
    for i, tag in enumerate(["", "[/INST]", "[bold]"]):
        long = tag + "x" * 70
        task = write_prompts(here / "d.jsonl", long)
        run(base, *task, f"run=out{i}", "optim.steps=1", "eval.every=0")
        out = capsys.readouterr().out
        dropped = {}
        for note in dropped_notes(out):
            side = "train" if " train " in note else "heldout"
            count, total = note.split(" of ")[:2]
            dropped[side] = int(count.split()[-1]), int(total.split()[0])
            if side == "train":
                assert long[:20] in note
        assert 0 < sum(count for count, _ in dropped.values()) <= 15
        remaining = int(out.split(" prompts, ")[0].split()[-1])
        assert remaining == dropped["train"][1] - dropped["train"][0]


def test_a_limit_of_ones_own_drops_more(here, base, capsys):
    task = write_prompts(here / "d.jsonl", "x" * 20)
    run(base, *task, "run=one", "optim.steps=1")
    assert dropped_notes(capsys.readouterr().out) == []
    run(base, *task, "run=two", "optim.steps=1", "sampling.max_prompt_tokens=10")
    assert dropped_notes(capsys.readouterr().out) != []


def test_it_is_an_error_only_if_no_prompt_is_left(here, base, capsys):
    task = write_prompts(here / "d.jsonl", "x" * 70, every=1)
    message = train_error(capsys, *arguments(base, *task, "optim.steps=1"))
    assert missing(message, "none is left", "sampling.max_prompt_tokens") == []
