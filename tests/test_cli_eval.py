"""rlkl eval: the numbers of the run's own report, and others where an option is changed."""

import json
import re
import shutil

import pytest
from finished_runs import ENDS
from runs_fixture import rows

pytest_plugins = ("runs_fixture", "finished_runs")


def result(said: str, there) -> dict:
    """The file that the command says it has written; removed again."""
    path = there / re.search(r"^written: (\S+)$", said, re.M)[1]
    found = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return found


@pytest.mark.parametrize("run", ["ppo", "lora"])
def test_a_run_is_evaluated_as_it_evaluated_itself_to_the_last_reply(rlkl, there, run):
    """The same prompts, uniforms and policies: an adapter is put beside its base, not merged."""
    told = json.loads((there / "runs" / run / "heldout.json").read_text())
    found = result(rlkl("eval", f"runs/{run}"), there)
    assert {name: found[name] for name in ("before", "after")} == told
    assert found["before"] != found["after"], "six steps that move nothing could not tell the two apart"
    assert found["checkpoint"] == "step-000006"


def test_the_table_has_before_and_after_side_by_side(rlkl, there):
    said = rlkl("eval", "runs/ppo")
    found = result(said, there)
    assert "runs/ppo/checkpoints/step-000006: 20 held-out prompts, 2 replies each, temperature 1" in said
    assert {"accuracy", "greedy", "pass@2"} == found["after"].keys()
    for name, x in found["after"].items():
        assert re.search(rf"│ {name} +│ {found['before'][name]:.3f} +│ {x:.3f} +│", said)


def test_another_checkpoint_has_the_held_out_accuracy_of_its_step(rlkl, there):
    measured = {row["step"]: row["heldout/accuracy"] for row in rows(there / "runs/ppo") if "heldout/accuracy" in row}
    assert len(set(measured.values())) > 1
    for step, accuracy in measured.items():
        for named in (["runs/ppo", f"step={step}"], [f"runs/ppo/checkpoints/step-{step:06d}"]):
            found = result(rlkl("eval", *named, "eval.samples=1"), there)
            assert found["after"] == {"accuracy": accuracy}


def test_options_of_the_evaluation_are_the_runs_own_unless_they_are_changed_here(rlkl, there):
    plain = result(rlkl("eval", "runs/ppo"), there)
    options = ("eval.prompts=7", "eval.samples=3", "eval.temperature=0.5", "eval.stop=['1']",
               "sampling.max_new_tokens=3")
    found = result(rlkl("eval", "runs/ppo", *options), there)
    assert (plain["prompts"], found["prompts"]) == (20, 7)
    assert found["after"].keys() == {"accuracy", "greedy", "pass@3"}
    changed = {k: x for k, x in found["options"].items() if plain["options"][k] != x}
    assert changed == {"eval.prompts": 7, "eval.samples": 3, "eval.temperature": 0.5, "eval.stop": ["1"],
                       "sampling.max_new_tokens": 3}


def test_a_stop_string_counts(rlkl, there):
    """Right is a reply whose only digit ends it: with every digit a stop string, each that has one."""
    (there / "ends.py").write_text(ENDS)
    call = ("eval", "runs/ppo", "task=ends.py:Digits")
    digits = result(rlkl("eval", "runs/ppo"), there)["after"]
    without = result(rlkl(*call), there)["after"]
    stopped = result(rlkl(*call, f"eval.stop={list('0123456789')}"), there)["after"]
    assert without["accuracy"] < digits["accuracy"]
    assert stopped == digits


def test_fewer_rows_at_once_are_the_same_numbers_whatever_training_needs_of_its_rows(rlkl, there):
    """optim.minibatch=8 would not fit into a rollout of 2 rows."""
    few, many = (result(rlkl("eval", "runs/ppo", "model.dtype=float64", *more), there)
                 for more in (["sampling.prompts=1", "sampling.group_size=2"], []))
    assert (few["before"], few["after"]) == (many["before"], many["after"])


def test_another_task_may_be_named(rlkl, there):
    found = result(rlkl("eval", "runs/ppo", "task=addition", "task.digits=1", "eval.prompts=5"), there)
    assert found["options"]["task.name"] == "addition"
    assert found["prompts"] == 5


def test_a_plug_in_is_the_one_that_the_run_has_kept(rlkl, there, tmp_path, monkeypatch):
    """Whatever became of the file: here it is gone, with the whole working directory."""
    shutil.copytree(there / "runs/ppo", tmp_path / "ppo")
    before = result(rlkl("eval", "runs/ppo"), there)
    monkeypatch.chdir(tmp_path)
    after = result(rlkl("eval", "ppo"), tmp_path)
    assert (before["before"], before["after"]) == (after["before"], after["after"])


def test_no_evaluation_is_overwritten(rlkl, there):
    said = [rlkl("eval", "runs/lora", "eval.prompts=2", "eval.samples=1") for _ in range(2)]
    assert ["runs/lora/eval-1.json" in said[0], "runs/lora/eval-2.json" in said[1]] == [True, True]
    for each in said:
        result(each, there)


@pytest.mark.parametrize(("argument", "words"), [
    ("optim.lr=1", "rlkl eval does not read optim.lr; it reads step, eval.prompts, eval.samples"),
    ("eval.every=7", "rlkl eval does not read eval.every"),
    ("eval.promts=7", "unknown key eval.promts; there is every, prompts"),
    ("eval.samples=0", "eval.samples=0"),
    ("device=bogus", "device='bogus': choose auto"),
    ("task=nope", "task.name='nope': choose addition"),
    ("model.name=other", "rlkl eval does not read model.name"),
])
def test_what_makes_no_difference_and_what_is_not_there_is_refused(refused, argument, words):
    assert refused("eval", "runs/ppo", argument).startswith(words)
