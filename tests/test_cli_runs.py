"""What the commands about a run share: finding a run and its checkpoint; one line per mistake."""

import errno
import re
import shutil
import subprocess
import sys

from runs_fixture import ROOT, rows

from rlkl import cli
from rlkl.cli.run_commands import find_checkpoint, find_run, listed

pytest_plugins = ("runs_fixture", "finished_runs")
COMMANDS = {"eval": [], "chat": ["--prompt", "1+2="], "report": [], "export": ["out"]}
OF_A_CHECKPOINT = {name: more for name, more in COMMANDS.items() if name != "report"}
USAGE = {
    "eval": "rlkl eval RUN",
    "chat": "rlkl chat RUN",
    "report": "rlkl report RUN [RUN …]",
    "export": "rlkl export RUN OUT",
}
EXISTING = (
    "there is runs/lora, runs/ppo, runs/unborn"  # and not runs/sft: none of these commands reads it
)


def test_a_run_is_found_by_its_folder_or_by_that_of_a_checkpoint(there, monkeypatch):
    run = find_run("runs/ppo")
    assert str(run.folder) == "runs/ppo"
    assert find_checkpoint(run, "last").name == "step-000006"
    assert find_checkpoint(run, "4").name == "step-000004"
    of_checkpoint = find_run("runs/ppo/checkpoints/step-000002")
    assert str(of_checkpoint.folder) == "runs/ppo"
    assert find_checkpoint(of_checkpoint, "last").name == "step-000002"
    monkeypatch.chdir("runs/ppo/checkpoints/step-000004")
    inside = find_run(".")
    assert inside.cfg.task["name"] == "reward.py:Digits"
    assert find_checkpoint(inside, "last").resolve().name == "step-000004"


def test_the_best_checkpoint_has_the_best_held_out_accuracy(there):
    metrics = rows(there / "runs/ppo")
    accuracy = {row["step"]: row["eval/accuracy"] for row in metrics if "eval/accuracy" in row}
    best = max(accuracy, key=accuracy.get)
    assert find_checkpoint(find_run("runs/ppo"), "best").name == f"step-{best:06d}"


def test_a_run_that_does_not_exist_is_answered_with_those_that_do(refused):
    for command, more in COMMANDS.items():
        assert refused(command, "runs/gone", *more) == f"runs/gone: no such run; {EXISTING}"
        assert refused(command, "no-run", *more) == (
            f"no-run: not the folder of a run, there is no no-run/config.yaml; {EXISTING}"
        )
        assert refused(command) == (
            f"usage: {USAGE[command]} [key=value …]; a run is missing; {EXISTING}"
        )


def test_a_folder_whose_config_cannot_be_read_is_not_offered_and_hides_no_other(refused, there):
    (there / "runs/torn").mkdir()
    (there / "runs/torn/config.yaml").write_text("seed: 0\n checkpoint: {")
    message = refused("report", "runs/gone")
    shutil.rmtree("runs/torn")
    assert message == f"runs/gone: no such run; {EXISTING}"


def test_where_there_is_no_run_at_all_the_message_says_so(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command, more in COMMANDS.items():
        assert refused(command, "gone", *more) == "gone: no such run; there is no run under runs/"


def test_of_many_runs_the_first_few_are_listed():
    assert listed([str(i) for i in range(8)]) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert listed([str(i) for i in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


def test_a_run_without_a_checkpoint_says_when_there_will_be_one(refused):
    for command, more in OF_A_CHECKPOINT.items():
        assert refused(command, "runs/unborn", *more) == (
            "runs/unborn: no checkpoint yet; one is written at the end, and every "
            "checkpoint.every=2 steps"
        )


def test_a_run_that_saves_only_at_its_end_says_no_more(refused, there):
    shutil.copytree("runs/unborn", "runs/at-end")
    config = there / "runs/at-end/config.yaml"
    config.write_text(re.sub(r"(checkpoint:\n  every: )\d+", r"\g<1>0", config.read_text()))
    message = refused("export", "runs/at-end", "exported")
    shutil.rmtree("runs/at-end")
    assert message == "runs/at-end: no checkpoint yet; one is written at the end"


def test_a_step_without_a_checkpoint_is_answered_with_those_that_have_one(refused):
    for command, more in OF_A_CHECKPOINT.items():
        assert refused(command, "runs/ppo", "step=3", *more) == (
            "step=3: runs/ppo has no such checkpoint; there is 2, 4, 6, last, best"
        )
        for wrong in ("soon", "-1", "[2]"):
            message = refused(command, "runs/ppo", f"step={wrong}", *more)
            assert ": choose last, best, or a number" in message
        assert refused(command, "runs/lora", "step=best", *more) == (
            "step=best: runs/lora has no such checkpoint, no held-out evaluation came yet "
            "(eval.every=0); there is 6, last"
        )
        message = refused(command, "runs/ppo/checkpoints/step-000002", "step=4", *more)
        assert "is one checkpoint already" in message


def test_for_the_run_of_another_command_the_message_says_where_its_model_is(refused):
    for command, more in COMMANDS.items():
        assert refused(command, "runs/sft", *more) == (
            "runs/sft: not a run of train.py; its model is an ordinary Hugging Face directory, "
            "runs/sft/model"
        )


def test_a_config_of_another_version_is_refused_by_its_first_old_or_unknown_key(refused, there):
    shutil.copytree("runs/unborn", "runs/old")
    config = there / "runs/old/config.yaml"
    text = config.read_text()
    old = "runs/old: its config.yaml is not of this version: "
    try:
        config.write_text("ppo_epochs: 4\n" + text)
        for command, more in COMMANDS.items():
            message = refused(command, "runs/old", *more)
            assert message.startswith(f"{old}unknown key ppo_epochs; verl's ")
        config.write_text(text.replace("name: clip", "name: ppo"))
        for command, more in COMMANDS.items():
            message = refused(command, "runs/old", *more)
            assert message.startswith(f"{old}loss=ppo has a new name: write loss=clip")
    finally:
        shutil.rmtree("runs/old")


def test_unknown_options_and_too_many_paths_are_refused_with_the_usage(refused):
    for command, more in COMMANDS.items():
        usage = f"usage: {USAGE[command]} [key=value …]"
        message = refused(command, "runs/ppo", "--fast", *more)
        assert message == f"rlkl {command} has no option '--fast': {usage}"
        message = refused(command, "runs/ppo", "speed=1", *more)
        assert message.startswith("unknown key speed; there is ")
        if command != "report":
            message = refused(command, "runs/ppo", "a", "b")
            assert message == f"{usage}; it was given runs/ppo, a, b"


def test_help_lists_the_options_of_a_command(rlkl):
    options = {
        "eval": ["step", "eval.prompts", "eval.stop", "sampling.max_new_tokens"],
        "report": ["out"],
        "chat": ["step", "temperature", "max_new_tokens", "--prompt TEXT"],
        "export": ["step", "dtype"],
    }
    for command, names in options.items():
        for flag in ("--help", "-h"):
            text = rlkl(command, flag)
            assert f"usage: rlkl {command} RUN" in text
            assert [name for name in names if name not in text] == []
            assert "optim.lr" not in text


def test_help_of_rlkl_has_one_line_for_each_command(rlkl):
    lines = rlkl("--help").splitlines()
    for name in cli.COMMANDS:
        (line,) = [x for x in lines if x.startswith(f"  rlkl {name} ")]
        assert len(line.split(maxsplit=2)[2]) > 20


def test_listing_the_commands_loads_no_library():
    code = "import sys, rlkl.cli; rlkl.cli.main([]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    def full(argv):
        raise OSError(errno.ENOSPC, "No space left on device", "out/metrics.tmp")

    monkeypatch.setattr("rlkl.cli.report.main", full)
    assert cli.main(["report"]) == 2
    assert capsys.readouterr().err == "error: out/metrics.tmp: No space left on device\n"
