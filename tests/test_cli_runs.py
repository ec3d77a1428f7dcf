"""What the commands about a run share: the run and its checkpoint are found, and mistakes end in one line."""

import errno
import json
import shutil

import pytest

from rlkl import cli
from rlkl.cli.finished import checkpoint_of, find, listed

pytest_plugins = ("runs_fixture", "finished_runs")
COMMANDS = {"eval": [], "chat": ["--prompt", "1+2="], "report": [], "export": ["out"]}
of_a_checkpoint = pytest.mark.parametrize(("command", "more"), [x for x in COMMANDS.items() if x[0] != "report"])
every_command = pytest.mark.parametrize(("command", "more"), COMMANDS.items())


def test_a_run_is_found_by_its_folder_and_by_that_of_a_checkpoint(there):
    run, inside = find("runs/ppo"), find("runs/ppo/checkpoints/step-000002")
    assert (str(run.folder), str(inside.folder)) == ("runs/ppo", "runs/ppo")
    assert checkpoint_of(run, "last").name == "step-000006"
    assert checkpoint_of(run, "4").name == "step-000004"
    assert checkpoint_of(inside, "last").name == "step-000002"


def test_a_checkpoint_is_found_from_inside_its_folder(there, monkeypatch):
    monkeypatch.chdir("runs/ppo/checkpoints/step-000004")
    run = find(".")
    assert run.cfg.task["name"] == "reward.py:Digits"
    assert checkpoint_of(run, "last").resolve().name == "step-000004"


def test_the_best_checkpoint_is_that_of_the_best_held_out_accuracy(there):
    run = find("runs/ppo")
    rows = [json.loads(line) for line in (there / "runs/ppo/metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row["heldout/accuracy"] for row in rows if "heldout/accuracy" in row}
    assert checkpoint_of(run, "best").name == f"step-{max(found, key=found.get):06d}"


@every_command
def test_a_run_that_is_not_there_is_told_with_those_that_are(refused, command, more):
    said = refused(command, "runs/gone", *more)
    assert said == "runs/gone: no such run; there is runs/lora, runs/ppo, runs/sft, runs/unborn"
    said = refused(command, "no-run", *more)
    assert said.startswith("no-run: not the folder of a run, there is no no-run/config.yaml; there is runs/lora")


@every_command
def test_where_there_is_no_run_at_all_that_is_said(refused, command, more, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(command, "gone", *more) == "gone: no such run; there is no run under runs/"


def test_of_many_runs_the_first_few_are_listed():
    assert listed([str(i) for i in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


@of_a_checkpoint
def test_a_run_without_a_checkpoint_says_when_there_will_be_one(refused, command, more):
    assert refused(command, "runs/unborn", *more) == (
        "runs/unborn: no checkpoint yet; one is written at the end, and every checkpoint.every=2 steps")


@of_a_checkpoint
def test_a_step_that_was_not_kept_is_told_with_those_that_were(refused, command, more):
    assert refused(command, "runs/ppo", "step=3", *more) == (
        "step=3: runs/ppo has no such checkpoint; there is 2, 4, 6, last, best")
    for wrong in ("soon", "-1", "[2]"):
        assert ": choose last, best, or a number" in refused(command, "runs/ppo", f"step={wrong}", *more)
    assert refused(command, "runs/lora", "step=best", *more) == (
        "step=best: runs/lora has no such checkpoint, no held-out evaluation came yet (eval.every=0); there is 6, last")
    assert "is one checkpoint already" in refused(command, "runs/ppo/checkpoints/step-000002", "step=4", *more)


@every_command
def test_the_run_of_another_command_is_told_by_where_its_model_is(refused, command, more):
    assert refused(command, "runs/sft", *more) == (
        "runs/sft: not a run of train.py; its model is an ordinary Hugging Face directory, runs/sft/model")


@every_command
def test_a_config_of_another_format_is_told_by_its_first_unknown_key(refused, there, command, more):
    shutil.copytree("runs/unborn", "runs/old", dirs_exist_ok=True)
    config = there / "runs/old/config.yaml"
    config.write_text("ppo_epochs: 4\n" + config.read_text())
    said = refused(command, "runs/old", *more)
    shutil.rmtree("runs/old")
    assert said.startswith("runs/old: its config.yaml is not one of this version: unknown key ppo_epochs; there is s")


@every_command
def test_a_missing_run_an_unknown_option_and_one_path_too_many_are_told(refused, command, more):
    names = "RUN [RUN …]" if command == "report" else "RUN OUT" if command == "export" else "RUN"
    assert refused(command) == (f"usage: rlkl {command} {names} [key=value …]; a run is missing; "
                                "there is runs/lora, runs/ppo, runs/sft, runs/unborn")
    fast = refused(command, "runs/ppo", "--fast", *more)
    assert fast == f"rlkl {command} has no option '--fast': usage: rlkl {command} {names} [key=value …]"
    if command != "report":
        assert "; it was given runs/ppo, a, b" in refused(command, "runs/ppo", "a", "b")
    unknown = refused(command, "runs/ppo", "speed=1", *more)
    assert unknown.startswith("unknown key speed; there is ")


@every_command
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_option_with_its_default(rlkl, command, more, flag):
    said = rlkl(command, flag)
    assert f"usage: rlkl {command} RUN" in said
    named = {"eval": ["step", "eval.prompts", "eval.stop", "sampling.max_new_tokens"], "report": ["out"],
             "chat": ["step", "temperature", "max_new_tokens", "--prompt TEXT"], "export": ["step", "dtype"]}[command]
    assert all(name in said for name in named)
    assert "optim.lr" not in said


def test_help_of_rlkl_has_one_line_for_each_command(rlkl):
    lines = rlkl("--help").splitlines()
    for name in cli.COMMANDS:
        (line,) = [x for x in lines if x.startswith(f"  rlkl {name} ")]
        assert len(line.split(maxsplit=2)[2]) > 20


def test_what_the_disk_refuses_is_one_line(monkeypatch, capsys):
    def full(argv):
        raise OSError(errno.ENOSPC, "No space left on device", "out/metrics.tmp")

    monkeypatch.setitem(cli.COMMANDS, "report", full)
    assert cli.main(["report"]) == 2
    assert capsys.readouterr().err == "error: out/metrics.tmp: No space left on device\n"
