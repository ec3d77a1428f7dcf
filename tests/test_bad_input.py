"""What a user gets wrong ends in one line, `error: …`, that names the thing and the way out; exit code 2."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs_fixture import ROOT, arguments, differences, resume, rows, run
from safetensors.torch import load_file, save_file

import train

pytest_plugins = ("runs_fixture",)

PLUGINS = """
import pathlib
import torch

calls = 0

def raises(examples, replies, batch):
    raise KeyError("first line\\nsecond line")

def raises_later(examples, replies, batch):
    global calls
    calls += 1
    if calls == 3 and pathlib.Path("broken").exists():
        raise RuntimeError("the judge is down")
    return torch.tensor([sum(c.isdigit() for c in reply) / 6 for reply in replies]), {}

def nan(examples, replies, batch):
    return torch.tensor([0.0] * (len(replies) - 1) + [float("nan")]), {}

def infinite(examples, replies, batch):
    return torch.full((len(replies),), float("inf")), {}

def too_few(examples, replies, batch):
    return torch.zeros(3), {}

def nothing(examples, replies, batch):
    return None

def advantage_silent(rewards, values, mask, *, group_size):
    raise ValueError

def advantage_two_lines(rewards, values, mask, *, group_size):
    raise RuntimeError("first line\\nsecond line")

def advantage_shape(rewards, values, mask, *, group_size):
    return rewards.sum(1), None

class Nothing:
    def __init__(self, split):
        pass

    def __len__(self):
        return 0

    def score(self, example, reply):
        return 0.0

def loss_reduced(new, batch):
    return new.logprobs.mean(), {}

def loss_constant(new, batch):
    return batch.advantages, {}

def loss_alone(new, batch):
    return -new.logprobs * batch.advantages

def loss_stat(new, batch):
    return -new.logprobs * batch.advantages, {"mean": new.logprobs.mean()}
"""


@pytest.fixture
def broken(here, base):
    """A working directory full of things that are wrong."""
    (here / "bad.yaml").write_text("seed: 0\noptim:\n  lr: 1\n steps: 3\n")
    (here / "syntax.py").write_text("x = 1\ndef f(:\n")
    (here / "my.py").write_text(PLUGINS)
    (here / "empty.jsonl").write_text("\n")
    (here / "row.jsonl").write_text('{"prompt": "p", "answer": "a"}\n{"prompt": "q", \n')
    (here / "file").write_text("not a folder")
    shutil.copytree(base, here / "no_eos")
    config = json.loads((here / "no_eos" / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (here / "no_eos" / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copytree(base, here / "no_weights")
    (here / "no_weights" / "model.safetensors").unlink()
    return here


def refused(capsys, argv: list[str]) -> str:
    capsys.readouterr()
    assert train.main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error:")] == lines, lines
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("mistake", "words"),
    [  # the twelve kinds
        ("missing.yaml", ["missing.yaml", "no such config file"]),
        ("bad.yaml", ["bad.yaml", "line 4"]),
        ("optim.lrr=1", ["optim.lrr", "critic_lr"]),
        ("optim.lr=fast", ["optim.lr", "'fast'", "number"]),
        ("loss=nope", ["loss", "'nope'", "ppo, grpo, surrogate", "file.py:function"]),
        ("loss=syntax.py:f", ["syntax.py", "line 2", "SyntaxError"]),
        ("task=jsonl task.path=empty.jsonl", ["empty.jsonl", "no rows"]),
        ("model.name=no_eos", ["no_eos", "EOS", "set eos_token"]),
        ("model.name=no_weights", ["no_weights", "model.safetensors"]),
        ("run=file/out", ["run=file/out", "cannot be written"]),
        ("reward=my.py:raises", ["raises", "KeyError", "first line", "resume=runs/"]),
        ("reward=my.py:nan", ["gave nan for the reply", "resume=runs/"]),
        # and their relatives
        ("task=jsonl task.path=gone.jsonl", ["gone.jsonl", "no such file"]),
        ("task=jsonl", ["jsonl", "task.path"]),
        ("task=jsonl task.path=row.jsonl", ["row.jsonl:2", "JSON"]),
        ("task.path=row.jsonl", ["addition", "'path'", "digits"]),
        ("model.name=no/such/model", ["no/such/model", "no such folder here"]),
        ("model.name=../sft/model", ["../sft/model", "no such folder here"]),
        ("task=my.py:Nothing", ["no train prompts"]),
        ("device=bogus", ["device", "'bogus'", "cpu"]),
        ("device=cpu:x", ["device", "'cpu:x'"]),
        ("optim.betas=[0.9,2]", ["optim.betas", "2"]),
        ("reward=my.py:infinite", ["infinite", "inf", "reply"]),
        ("reward=my.py:too_few", ["too_few", "(3,)", "16 replies"]),
        ("reward=my.py:nothing", ["nothing", "TypeError"]),
        ("sampling.group_size=1", ["sampling.group_size", "1", ">= 2"]),
        ("advantage=gae", ["gae", "model.critic", "head"]),
        ("loss=ppo", ["ppo", "model.critic", "head", "gae"]),
        ("model.critic=head", ["grpo", "model.critic=none", "gae"]),
        # fail: preflight._said takes the first line of an empty message, and all lines of other exceptions
        ("advantage=my.py:advantage_silent", ["advantage", "advantage_silent"]),
        ("advantage=my.py:advantage_two_lines", ["advantage", "advantage_two_lines", "first line"]),
        ("advantage=my.py:advantage_shape", ["advantage_shape", "(8,)", "(8, 4)"]),
        ("loss=my.py:loss_reduced", ["loss_reduced", "(B, T)", "()"]),
        ("loss=my.py:loss_constant", ["loss_constant", "gradient"]),
        ("loss=my.py:loss_alone", ["loss_alone"]),
        ("loss=my.py:loss_stat", ["loss_stat", "mean", "(B, T)"]),
        ("sampling.max_new_tokens=64", ["86 of 86", "sampling.max_new_tokens", "sampling.max_prompt_tokens"]),
        ("resume=gone", ["gone"]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_mistake_is_one_line_that_names_it_and_exit_code_2(broken, base, capsys, mistake, words):
    message = refused(capsys, arguments(base, *mistake.split()))
    assert message.startswith("error: ")
    assert [w for w in words if w not in message] == [], message


def test_a_real_process_ends_the_same_way(broken):
    """Exit code, one line on stderr, nothing else: also where the mistake is found before anything is loaded."""
    argv = [sys.executable, str(ROOT / "train.py"), "optim.lrr=1"]
    ended = subprocess.run(argv, capture_output=True, text=True, check=False, env=os.environ)
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == [ended.stderr.strip()]
    assert ended.stderr.startswith("error: unknown key optim.lrr")


def test_no_run_folder_is_made_where_the_mistake_is_found_before_the_first_rollout(broken, base, capsys):
    for mistake in ("optim.lrr=1", "loss=nope", "model.name=no_eos", "loss=my.py:loss_reduced", "loss.clip=x"):
        refused(capsys, arguments(base, mistake, "run=out"))
    assert not Path("out").exists()


def test_an_existing_run_folder_is_never_overwritten(here, base, capsys):
    folder = run(base, "run=out", "optim.steps=2")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    message = refused(capsys, arguments(base, "run=out", "optim.steps=3"))
    assert "run=out" in message
    assert "resume=out" in message
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_run_without_a_name_takes_the_next_free_number(here, base):
    for number in (1, 2):
        assert train.main(arguments(base, "optim.steps=1")) == 0
        assert sorted(p.name for p in Path("runs").iterdir()) == [f"addition-grpo-{n}" for n in range(1, number + 1)]


def test_a_reward_that_raises_in_the_middle_keeps_the_steps_before_and_the_resumed_run_is_the_whole_one(
    here, base, capsys
):
    (here / "my.py").write_text(PLUGINS)
    run(base, "run=whole", "reward=my.py:raises_later")
    Path("broken").touch()
    message = refused(capsys, arguments(base, "run=out", "reward=my.py:raises_later"))
    assert [w for w in ("raises_later", "RuntimeError", "the judge is down", "resume=out") if w not in message] == []
    assert [p.name for p in Path("out/checkpoints").iterdir()] == ["step-000002"]
    assert [row["step"] for row in rows(Path("out"))] == [1, 2]
    Path("broken").unlink()
    resume(Path("out"))
    assert differences(Path("whole"), Path("out")) == []


# Prompts that do not fit


def questions(path: Path, long: str, every: int = 4) -> str:
    """Sixty prompts, every fourth one too long for a context of 64."""
    texts = [f"{i}?" if i % every else f"{i}{long}" for i in range(60)]
    path.write_text("".join(json.dumps({"prompt": t, "answer": "1"}) + "\n" for t in texts))
    return f"task.path={path}"


def dropped(out: str) -> list[str]:
    return [line for line in out.splitlines() if "dropped" in line]


@pytest.mark.parametrize(
    "long", ["x" * 70, "[/INST]" + "x" * 70, "[bold]" + "x" * 70], ids=["plain", "[/INST]", "[bold]"]
)
def test_prompts_that_are_too_long_are_dropped_counted_and_the_first_is_shown(here, base, capsys, long):
    """Also where a prompt looks like markup: chat formats have tags in square brackets."""
    path = questions(here / "d.jsonl", long)
    options = arguments(base, "task=jsonl", path, "run=out", "optim.steps=1")
    assert train.main(options) == 0
    out = capsys.readouterr().out
    notes = dropped(out)
    counts = [int(n.split(" of ")[0].split()[-1]) for n in notes]
    train_note = next(n for n in notes if " train " in n)
    assert 0 < sum(counts) <= 15
    assert long[:20] in train_note
    kept, of = (int(x) for x in (out.split(" prompts, ")[0].split()[-1], train_note.split(" of ")[1].split()[0]))
    assert kept == of - int(train_note.split(" of ")[0].split()[-1])


def test_a_limit_of_ones_own_drops_more(here, base, capsys):
    path = questions(here / "d.jsonl", "x" * 20)
    options = arguments(base, "task=jsonl", path, "optim.steps=1")
    assert train.main(options) == 0
    assert dropped(capsys.readouterr().out) == []
    assert train.main([*options, "sampling.max_prompt_tokens=10"]) == 0
    assert dropped(capsys.readouterr().out) != []


def test_it_is_an_error_only_if_no_prompt_is_left(here, base, capsys):
    path = questions(here / "d.jsonl", "x" * 70, every=1)
    options = arguments(base, "task=jsonl", path, "optim.steps=1")
    message = refused(capsys, options)
    assert "none is left" in message
    assert "sampling.max_prompt_tokens" in message


# A model folder that is damaged


def test_a_truncated_weight_file_is_named(here, base, capsys):
    shutil.copytree(base, here / "torn")
    weights = here / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "torn" in refused(capsys, arguments(base, "model.name=torn"))


def test_a_weight_that_is_missing_from_the_file_is_not_replaced_by_a_random_one(here, base, capsys):
    shutil.copytree(base, here / "holes")
    weights = load_file(here / "holes" / "model.safetensors")
    removed = {name: x for name, x in weights.items() if name != "lm_head.weight"}
    assert len(removed) == len(weights) - 1
    save_file(removed, here / "holes" / "model.safetensors", metadata={"format": "pt"})
    assert train.main(arguments(base, "model.name=holes", "optim.steps=1", "run=out")) == 2
    assert "lm_head.weight" in capsys.readouterr().err.splitlines()[-1]


def test_a_loss_that_is_never_finite_gives_up_with_a_line_that_says_what_to_try(here, base, capsys):
    (here / "nan.py").write_text("def loss(new, batch):\n    return new.logprobs * float('nan'), {}\n")
    message = refused(capsys, arguments(base, "run=out", "loss=nan.py:loss", "optim.max_skips=2"))
    assert [w for w in ("2 updates", "not finite", "optim.lr", "resume=out") if w not in message] == [], message
    saved = load_file(max(Path("out/checkpoints").iterdir()) / "model.safetensors")
    started = load_file(base / "model.safetensors")
    assert all(torch.equal(saved[name], started[name]) for name in started)
