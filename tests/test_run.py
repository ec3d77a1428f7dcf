"""A whole run: what it leaves behind, how it stops, and that it goes on as if it had not stopped."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs_fixture import PPO, ROOT, arguments, differences, furnish, resume, rows, run
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from rlkl import checkpoint, cli
from rlkl.log import RunLog

pytest_plugins = ("runs_fixture",)

SAPO = '''"""SAPO (Gao et al. 2025, arXiv:2511.20347): a sigmoid gate instead of a clip."""
import torch


def sapo(new, batch, *, tau_pos: float = 1.0, tau_neg: float = 1.05):
    ratio = (new.logprobs - batch.old_logprobs).exp()
    tau = torch.where(batch.advantages > 0, tau_pos, tau_neg)
    gate = torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    return -gate * batch.advantages, dict(ratio=ratio, gate=gate)
'''
STOPS = '''"""Sends a signal to its own process in the step that the file `when` asks for."""
import os
import pathlib

import torch

calls = 0


def digits(examples, replies, batch):
    global calls
    calls += 1
    when = pathlib.Path("when")
    if when.exists() and when.read_text() == f"{calls}":
        os.kill(os.getpid(), int(pathlib.Path("signal").read_text()))
    return torch.tensor([sum(c.isdigit() for c in reply) / 6 for reply in replies]), {}
'''


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """Six steps without interruption."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        furnish(Path.cwd())
        return run(base, "run=out", "checkpoint.every=2").absolute()


@pytest.fixture(scope="module")
def whole_ppo(base, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole_ppo"))
        furnish(Path.cwd())
        return run(base, "run=out", *PPO).absolute()


def refused(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert train.main(list(argv)) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    return said[0]


def test_a_run_leaves_metrics_config_provenance_a_curve_a_report_and_a_model_that_loads(whole, base):
    folder = whole
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5, 6]
    assert all(
        {"reward", "entropy", "grad_norm/policy", "kl_pi_ref_seq", "sample"} <= row.keys() for row in rows(folder)
    )
    assert [row["step"] for row in rows(folder) if "heldout/accuracy" in row] == [2, 4, 6]
    provenance = json.loads((folder / "provenance.json").read_text())
    assert "run=out" in provenance["command"]
    assert provenance["torch"] == version("torch")
    assert (folder / "metrics.png").read_bytes().startswith(b"\x89PNG")
    report = (folder / "report.md").read_text()
    assert "| accuracy |" in report
    assert "| reward |" in report
    last = folder / "checkpoints" / "step-000006"
    lm = AutoModelForCausalLM.from_pretrained(last)
    started = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.equal(lm.lm_head.weight, started.lm_head.weight), "six steps moved nothing"
    assert (
        AutoTokenizer.from_pretrained(last)("1+2=").input_ids == AutoTokenizer.from_pretrained(base)("1+2=").input_ids
    )


def test_config_yaml_alone_repeats_the_run(here, whole_ppo):
    """The effective config is enough: the same file under another name of the run gives the same numbers."""
    assert train.main([str(whole_ppo / "config.yaml"), "run=again"]) == 0
    assert differences(whole_ppo, here / "again") == []


def go_on_for_three_steps(here, base, *options):
    run(base, "run=halves", *options, "optim.steps=3")
    assert len(rows(here / "halves")) == 3
    resume(here / "halves", "optim.steps=6")


def test_three_steps_of_grpo_and_a_resume_are_six_steps_bit_for_bit(here, base, whole):
    go_on_for_three_steps(here, base)
    assert differences(whole, here / "halves") == []
    assert rows(whole)[0]["reward"] != rows(whole)[-1]["reward"]


def test_three_steps_of_ppo_and_a_resume_are_six_steps_bit_for_bit(here, base, whole_ppo):
    """With a critic, two epochs, minibatches and both coefficients adaptive."""
    go_on_for_three_steps(here, base, *PPO)
    assert differences(whole_ppo, here / "halves") == []
    first, last = rows(whole_ppo)[0], rows(whole_ppo)[-1]
    assert first["updates"] == 4
    assert all(first[name] != last[name] for name in ("reward", "kl_ref_coef", "kl_old_coef"))
    assert held_out(whole_ppo) == held_out(here / "halves")
    before, after = held_out(whole_ppo)[2].split("|")[2:4]
    assert before != after, "an accuracy that never changes hides what was measured when"


def held_out(folder: Path) -> list[str]:
    """The lines `| accuracy | before | after |` and their like of the report."""
    page = (folder / "report.md").read_text()
    return page.split("| held out |")[1].split("\n\n")[0].splitlines()


def test_the_comparison_of_runs_sees_one_bit(here, base, whole_ppo):
    run(base, "run=other", *PPO, "optim.critic_lr=1.0001e-3")
    names = {found.split(" ")[0].split(":")[0] for found in differences(whole_ppo, here / "other")}
    assert {"critic.safetensors", "model.safetensors", "optimizer.pt", "step"} <= names


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_finishes_the_step_saves_and_the_resumed_run_is_the_uninterrupted_one(here, base, capsys, number):
    """The schedule is linear: it must go on where it was, and not start anew."""
    (here / "stops.py").write_text(STOPS)
    (here / "signal").write_text(str(int(number)))
    options = ("reward=stops.py:digits", "optim.schedule=linear", "optim.warmup=1", *PPO)
    run(base, "run=whole", *options)
    (here / "when").write_text("3")
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    capsys.readouterr()
    run(base, "run=stopped", *options)
    assert "resume=stopped" in capsys.readouterr().out
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [row["step"] for row in rows(here / "stopped")] == [1, 2, 3]
    (here / "when").unlink()
    resume(here / "stopped")
    assert differences(here / "whole", here / "stopped") == []


def test_sigterm_from_outside_ends_a_process_with_code_0_and_a_line_that_says_how_to_resume(here, base):
    command = [sys.executable, ROOT / "train.py", *arguments(base, "run=out", "optim.steps=100000")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        deadline = time.monotonic() + 300
        metrics = here / "out" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") > 2) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "python train.py resume=out continues" in out
    steps = [row["step"] for row in rows(here / "out")]
    assert steps == list(range(1, len(steps) + 1))
    assert checkpoint.newest(here / "out").name == f"step-{steps[-1]:06d}"


def test_resume_refuses_a_changed_key_by_name_and_accepts_steps_and_logging(here, base, capsys):
    folder = run(base, "run=out", "optim.steps=2")
    for override in (
        "optim.lr=0.5",
        "sampling.prompts=8",
        "loss.clip=0.3",
        "seed=1",
        "task.digits=2",
        "loss=surrogate",
    ):
        key, _, value = override.partition("=")
        message = refused(capsys, f"resume={folder}", override)
        assert message.startswith("error: ")
        assert key in message
        assert value in message
    resume(folder, "optim.steps=3", "log.every=1", "checkpoint.every=1", "checkpoint.keep=5", "eval.every=0")
    assert [row["step"] for row in rows(folder)] == [1, 2, 3]


def test_resume_of_a_folder_that_is_no_run_says_so(here, capsys):
    assert "nowhere" in refused(capsys, "resume=nowhere")


def test_a_plugin_file_is_kept_with_the_run_and_a_changed_one_is_refused(here, base, capsys):
    (here / "my_loss.py").write_text(SAPO)
    folder = run(base, "run=out", "loss.name=my_loss.py:sapo", "loss.tau_pos=1.5", "optim.steps=2")
    assert (folder / "plugins" / "my_loss.py").read_text() == SAPO
    assert (folder / "plugins" / "reward.py").read_text() == (here / "reward.py").read_text()
    (here / "my_loss.py").write_text(SAPO.replace("* 4 / tau", "* 4.0 / tau"))
    message = refused(capsys, f"resume={folder}", "optim.steps=3")
    assert "my_loss.py" in message
    (here / "my_loss.py").write_text(SAPO)
    resume(folder, "optim.steps=3")


def test_plugins_of_one_name_are_kept_apart_and_an_estimators_file_is_kept_too(here, base, capsys):
    mine = "def mine(logprobs, ref_logprobs):\n    return logprobs - ref_logprobs\n"
    for folder, source in (("a", SAPO), ("b", mine)):
        (here / folder).mkdir()
        (here / folder / "my.py").write_text(source)
    folder = run(base, "run=out", "loss.name=a/my.py:sapo", "kl_ref.estimator=b/my.py:mine", "kl_ref.coef=0.1",
                 "optim.steps=1")
    assert (folder / "plugins" / "a_my.py").read_text() == SAPO
    assert "mine" in (folder / "plugins" / "b_my.py").read_text()
    (here / "b" / "my.py").write_text("def mine(logprobs, ref_logprobs):\n    return 2 * (logprobs - ref_logprobs)\n")
    assert "b/my.py differs from" in refused(capsys, f"resume={folder}", "optim.steps=2")


def test_a_loss_of_nine_lines_in_a_file_of_ones_own_runs_and_its_option_counts(here, base):
    assert len(SAPO.splitlines()) == 9
    (here / "my_loss.py").write_text(SAPO)
    one = run(base, "run=one", "loss.name=my_loss.py:sapo", "loss.tau_pos=1.5", "optim.epochs=2")
    other = run(base, "run=other", "loss.name=my_loss.py:sapo", "loss.tau_pos=3.0", "optim.epochs=2")
    assert {"ratio", "gate"} <= rows(one)[0].keys()
    assert rows(one)[0]["gate"] != rows(other)[0]["gate"]


def test_checkpoints_are_pruned_to_the_newest_and_the_best(here, base):
    """Random weights never get better, so the first evaluation stays the best one."""
    folder = run(base, "run=out", "checkpoint.every=1", "checkpoint.keep=2", "eval.every=1", "optim.lr=0")
    state = json.loads((folder / "checkpoints" / "step-000006" / "state.json").read_text())
    assert state["best_step"] == 1
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-000001", "step-000005", "step-000006"]


def test_a_half_written_checkpoint_is_ignored_and_swept_away(here, base, whole):
    folder = run(base, "run=out", "optim.steps=3")
    (folder / "checkpoints" / ".step-000009").mkdir()
    (folder / "checkpoints" / ".step-000009" / "state.json").write_text('{"st')
    assert checkpoint.newest(folder).name == "step-000003"
    resume(folder, "optim.steps=6")
    assert differences(whole, folder) == []
    assert not list((folder / "checkpoints").glob(".step-*"))


def test_a_torn_last_line_of_the_metrics_is_dropped_and_the_step_is_run_again(here, base, whole):
    folder = run(base, "run=out", "optim.steps=3", "checkpoint.every=2")
    torn = folder / "metrics.jsonl"
    torn.write_text(torn.read_text()[:-40])
    (folder / "checkpoints" / "step-000003").rename(here / "lost")
    resume(folder, "optim.steps=6")
    assert differences(whole, folder) == []


def test_a_run_without_a_checkpoint_is_resumed_from_its_start(here, base, whole):
    folder = run(base, "run=out", "optim.steps=2")
    (folder / "checkpoints" / "step-000002").rename(here / "lost")
    resume(folder, "optim.steps=6")
    assert differences(whole, folder) == []


def test_a_folder_whose_name_looks_like_markup_is_shown_as_it_is(here, base, capsys):
    run(base, "run=out[/x]", "optim.steps=1", "eval.every=0")
    assert "run: out[/x]" in capsys.readouterr().out


def test_wandb_goes_on_with_the_run_of_a_resumed_folder_and_with_no_other(tmp_path, monkeypatch):
    """W&B takes an id that it knows for the run to continue, and run folders are called alike everywhere."""
    made = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: made.append(options)))
    for place in ("one", "two", "one"):
        (tmp_path / place / "addition-grpo-1").mkdir(parents=True, exist_ok=True)
        RunLog(tmp_path / place / "addition-grpo-1", {}, wandb_mode="offline", project="rlkl", start=0).close()
    one, two, again = (options["id"] for options in made)
    assert one == again != two
    assert {options["name"] for options in made} == {"addition-grpo-1"}


def test_a_folder_that_is_there_is_refused_before_a_model_is_looked_for(here, base, capsys):
    (here / "out").mkdir()
    assert train.main(["run=out", "model.name=not-there"]) == 2
    assert "run=out: the folder exists" in capsys.readouterr().err
    assert cli.main(["sft", "run=out", "model.name=not-there", "task=addition"]) == 2
    assert "run=out: the folder exists" in capsys.readouterr().err


def test_a_log_that_finds_no_room_is_one_line_and_the_checkpoint_stays(here, base, capsys, monkeypatch):
    folder = run(base, "run=out", "optim.steps=1", "checkpoint.every=1")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "out/metrics.jsonl")

    monkeypatch.setattr(RunLog, "write", full)
    assert train.main([f"resume={folder}", "optim.steps=2"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: out/metrics.jsonl: No space left on device"
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000001"]


def test_a_checkpoint_that_finds_no_room_is_one_line_and_the_last_one_stays(here, base, capsys):
    """A limit on the size of a file stands for a full disk: a write comes back short, whoever does it."""
    folder = run(base, "run=out", "optim.steps=1", "checkpoint.every=1")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        assert train.main([f"resume={folder}", "optim.steps=2"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error:", "Traceback"))]
    assert len(lines) == 1, lines
    assert "step-000002 cannot be written" in lines[0]
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000001"]
    resume(folder, "optim.steps=2")
