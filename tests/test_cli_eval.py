"""rlkl eval: the numbers of the run's own report, and others where an option is changed."""

import json
import re
import shutil
from pathlib import Path

from finished_runs import ENDS
from runs_fixture import rows

pytest_plugins = ("runs_fixture", "finished_runs")


def result(text: str) -> dict:
    """The content of the file that the command says it has written. The file is removed."""
    path = Path(re.search(r"^written: (\S+)$", text, re.M)[1])
    content = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return content


def test_the_numbers_of_a_run_are_those_of_its_own_report(rlkl, there):
    """The same prompts, uniforms and policies: a LoRA adapter is not merged into its base."""
    for run in ("ppo", "lora"):
        report = json.loads((there / "runs" / run / "heldout.json").read_text())
        content = result(rlkl("eval", f"runs/{run}"))
        assert {name: content[name] for name in ("before", "after")} == report
        assert content["before"] != content["after"], "six steps must change something"
        assert content["checkpoint"] == "step-000006"


def test_the_table_has_before_and_after_side_by_side(rlkl, there):
    text = rlkl("eval", "runs/ppo")
    content = result(text)
    folder = "runs/ppo/checkpoints/step-000006"
    assert f"{folder}: 20 held-out prompts, 2 responses each, temperature 1" in text
    assert {"accuracy", "greedy", "pass@2"} == content["after"].keys()
    for name, after in content["after"].items():
        before = content["before"][name]
        assert re.search(rf"│ {name} +│ {before:.3f} +│ {after:.3f} +│", text)


def test_another_checkpoint_has_the_held_out_accuracy_of_its_step(rlkl, there):
    metrics = rows(there / "runs/ppo")
    accuracies = {row["step"]: row["eval/accuracy"] for row in metrics if "eval/accuracy" in row}
    assert len(set(accuracies.values())) > 1
    for step, accuracy in accuracies.items():
        by_step = ["runs/ppo", f"step={step}"]
        by_folder = [f"runs/ppo/checkpoints/step-{step:06d}"]
        for arguments in (by_step, by_folder):
            content = result(rlkl("eval", *arguments, "eval.samples=1"))
            assert content["after"] == {"accuracy": accuracy}


def test_an_override_changes_its_option_and_no_other(rlkl, there):
    plain = result(rlkl("eval", "runs/ppo"))
    overrides = {
        "eval.prompts": 7,
        "eval.samples": 3,
        "eval.temperature": 0.5,
        "eval.stop": ["1"],
        "sampling.max_new_tokens": 3,
    }
    content = result(rlkl("eval", "runs/ppo", *(f"{k}={x}" for k, x in overrides.items())))
    assert (plain["prompts"], content["prompts"]) == (20, 7)
    assert content["after"].keys() == {"accuracy", "greedy", "pass@3"}
    changed = {k: x for k, x in content["options"].items() if plain["options"][k] != x}
    assert changed == overrides


def test_stop_strings_end_the_responses(rlkl, there):
    """The task wants its only digit last: with each digit a stop string, any digit will do."""
    (there / "ends.py").write_text(ENDS)
    call = ("eval", "runs/ppo", "task=ends.py:Digits")
    any_digit = result(rlkl("eval", "runs/ppo"))["after"]
    digit_last = result(rlkl(*call))["after"]
    stopped = result(rlkl(*call, f"eval.stop={list('0123456789')}"))["after"]
    assert digit_last["accuracy"] < any_digit["accuracy"]
    assert stopped == any_digit


def test_the_number_of_rows_at_once_changes_nothing(rlkl, there):
    """Also where training could not have so few: optim.minibatch=8 does not fit in 2 rows."""
    call = ("eval", "runs/ppo", "model.dtype=float64")
    few = result(rlkl(*call, "sampling.prompts=1", "sampling.group_size=2"))
    many = result(rlkl(*call))
    assert (few["before"], few["after"]) == (many["before"], many["after"])


def test_another_task_may_be_named(rlkl, there):
    overrides = ("task=addition", "task.digits=1", "eval.prompts=5")
    content = result(rlkl("eval", "runs/ppo", *overrides))
    assert content["options"]["task.name"] == "addition"
    assert content["prompts"] == 5


def test_a_plugin_is_the_copy_in_the_run_folder(rlkl, there, tmp_path, monkeypatch):
    """Here the original file is gone, with the whole working directory."""
    shutil.copytree(there / "runs/ppo", tmp_path / "ppo")
    before = result(rlkl("eval", "runs/ppo"))
    monkeypatch.chdir(tmp_path)
    after = result(rlkl("eval", "ppo"))
    assert (before["before"], before["after"]) == (after["before"], after["after"])


def test_no_evaluation_is_overwritten(rlkl, there):
    texts = [rlkl("eval", "runs/lora", "eval.prompts=2", "eval.samples=1") for _ in range(2)]
    for number, text in enumerate(texts, 1):
        assert f"runs/lora/eval-{number}.json" in text
        result(text)


def test_options_that_are_not_read_or_do_not_exist_are_refused(refused):
    read = "step, eval.prompts, eval.samples"
    for override, message in {
        "optim.lr=1": f"rlkl eval does not read optim.lr; it reads {read}",
        "eval.every=7": "rlkl eval does not read eval.every",
        "model.name=other": "rlkl eval does not read model.name",
        "eval.promts=7": "unknown key eval.promts; there is every, prompts",
        "eval.samples=0": "eval.samples=0",
        "device=bogus": "device='bogus': choose auto",
        "task=nope": "task.name='nope': choose addition",
        "reward=repetition": "rlkl eval reads reward only where the task has no answers",
    }.items():
        assert refused("eval", "runs/ppo", override).startswith(message)
