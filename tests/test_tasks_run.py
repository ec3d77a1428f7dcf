"""Every task through train.py for two steps, on a random model with a chat template.

And the page and the configs that name a task.
"""

import json
import re
from pathlib import Path

import contract
import pytest
import torch
import yaml
from contract import make_task
from runs_fixture import ROOT, rows, train_error
from transformers import AutoModelForCausalLM, LlamaConfig

import train
from rlkl import cli
from rlkl.plugins import resolve
from rlkl.run import config
from rlkl.run.evaluate import mean_grades
from rlkl.run.tables import TABLES
from rlkl.supervised.scratch import character_tokenizer
from rlkl.tasks import TASKS

pytest_plugins = ("runs_fixture",)

PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
CONFIGS = {path: path.read_text(encoding="utf-8") for path in (ROOT / "configs").glob("*.yaml")}
CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
SMALL = (
    *("sampling.prompts=2", "sampling.group_size=2", "sampling.max_new_tokens=6"),
    *("eval.every=1", "eval.prompts=3", "eval.samples=2"),
    *("optim.steps=2", "log.every=1", "run=out"),
)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
    """A model of random weights, one token a character, with a chat template and a long context."""
    folder = tmp_path_factory.mktemp("model") / "chat"
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CHAT
    architecture = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(architecture)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def train_on(chat_model, tmp_path, monkeypatch):
    """Two steps in an empty working directory, with a held-out evaluation after each."""
    monkeypatch.chdir(tmp_path)

    def run(*options: str) -> Path:
        train.main([*SMALL, f"model.name={chat_model}", *options])
        return Path("out")

    return run


@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_by_its_own_score(train_on, tmp_path, capsys, name):
    make = make_task(name, tmp_path)
    options = [f"task.{key}={json.dumps(value)}" for key, value in make.keywords.items()]
    folder = train_on(f"task={name}", *options)
    metrics = rows(folder)
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(-1 <= row["reward"] <= 1.1 for row in metrics)
    assert all(0 <= row["eval/accuracy"] <= 1 for row in metrics)
    task = make("train")
    grades = getattr(task, "grade", lambda *_: {})(task[0], "")
    printed = capsys.readouterr().out.replace("┃", "│")
    report = (folder / "report.md").read_text()
    for grade in grades:
        assert all(f"eval/{grade}" in row for row in metrics)
        lines = re.findall(rf"^held out, after step \d: .*\b{grade} -?[01]\.", printed, re.M)
        assert len(lines) == 2
        for text in (grade, f"greedy/{grade}"):
            assert f"│ {text} " in printed
            assert re.search(rf"\| {text} \| (0.000|-1.000) \| \1 \|", report)


def test_the_grades_of_a_task_are_averaged_over_responses_beside_accuracy(train_on):
    """Of the sampled responses and of the greedy ones, before and after training."""
    Path("mine.py").write_text(
        "from rlkl.tasks import Addition\n\nclass Mine(Addition):\n"
        "    def score(self, example, response):\n        return 1.0\n"
        "    def grade(self, example, response):\n"
        "        return {'one': 1.0, 'a': float('a' in response), 'length': float(len(response))}\n"
    )
    folder = train_on("task=mine.py:Mine", "task.digits=1")
    for row in rows(folder):
        assert (row["eval/accuracy"], row["eval/one"]) == (1.0, 1.0)
        assert 0 < row["eval/length"] <= 6
    table = (folder / "report.md").read_text().split("![metrics]")[0]
    names = ["accuracy", "one", "a", "length"]
    greedy = ["greedy", "greedy/one", "greedy/a", "greedy/length"]
    assert re.findall(r"^\| ([\w/@]+) \|", table, re.M) == [*names, *greedy, "pass@2"]


def test_the_mean_of_grades_is_by_name_and_there_may_be_none():
    assert mean_grades([{"x": 1.0}, {"x": 0.0}]) == {"x": 0.5}
    assert mean_grades([{}, {}]) == mean_grades([]) == {}


def test_where_rows_have_no_answers_the_reward_grades_held_out_responses_too(
    train_on, chat_model, capsys
):
    """A reward function of TRL with a dataset of prompts; `rlkl eval` finds the same."""
    Path("rows.jsonl").write_text("".join(f'{{"prompt": "{i}:"}}\n' for i in range(40)))
    data = ("task=jsonl", "task.path=rows.jsonl", "task.heldout=0.3")
    error = train_error(capsys, f"model.name={chat_model}", *data, *SMALL)
    assert "the task's rows have no answer" in error
    assert not Path("out").exists()
    Path("mine.py").write_text(
        "def odd(completions, **kwargs):\n"
        "    return [float(sum(map(ord, text)) % 2) for text in completions]\n"
    )
    folder = train_on(*data, "reward=mine.py:odd", "scoring.processes=0")
    assert 0 < rows(folder)[0]["eval/accuracy"] < 1, "a number that could be another"
    before_after = json.loads(Path("out/heldout.json").read_text())
    Path("mine.py").rename("moved.py")  # the run folder has a copy
    assert cli.main(["eval", "out"]) == 0
    evaluated = json.loads(Path("out/eval-1.json").read_text())
    assert {name: evaluated[name] for name in before_after} == before_after
    with Path("moved.py").open("a") as file:
        file.write("def right(example, response, *, by: float = 0.5):\n    return by\n")
    for options, accuracy in (
        (["reward=moved.py:right"], 0),
        (["reward.name=moved.py:right", "reward.by=1"], 1),
    ):
        assert cli.main(["eval", "out", *options]) == 0
        evaluated = json.loads(max(Path("out").glob("eval-*.json")).read_text())
        assert evaluated["after"]["accuracy"] == accuracy
    capsys.readouterr()
    assert cli.main(["sft", *data, f"model.name={chat_model}"]) == 2
    assert "rlkl sft learns answers" in capsys.readouterr().err


def test_a_task_of_ones_own_may_have_only_prompts(train_on, chat_model, capsys):
    Path("mine.py").write_text(
        "from rlkl.types import Example\n\n"
        "class Prompts:\n"
        "    def __init__(self, split):\n        self.first = 40 if split == 'heldout' else 0\n"
        "    def __len__(self):\n        return 30\n"
        "    def __getitem__(self, i):\n"
        "        return Example(f'{self.first + i}:', has_answer=False)\n"
        "def odd(example, response):\n    return float(sum(map(ord, response)) % 2)\n"
    )
    for options in ([], ["reward=[mine.py:odd, task]"]):
        arguments = (f"model.name={chat_model}", "task=mine.py:Prompts", *SMALL, *options)
        assert "the task's rows have no answer" in train_error(capsys, *arguments)
    assert cli.main(["label", "task=mine.py:Prompts", f"model.name={chat_model}"]) == 2
    assert "the task's rows have no answer" in capsys.readouterr().err
    folder = train_on("task=mine.py:Prompts", "reward=mine.py:odd")
    assert 0 <= rows(folder)[0]["eval/accuracy"] <= 1


def test_a_grade_that_raises_is_one_line(train_on, chat_model, capsys):
    Path("mine.py").write_text(
        "from rlkl.tasks import Addition\n\nclass Mine(Addition):\n"
        "    def grade(self, example, response):\n        return 1 / 0\n"
    )
    options = ("task=mine.py:Mine", "task.digits=1", "run=out", "eval.prompts=1")
    error = train_error(capsys, f"model.name={chat_model}", *options)
    assert "task.grade raised ZeroDivisionError" in error


def test_a_step_whose_evaluation_fails_is_in_the_log_as_it_is_in_the_checkpoint(
    train_on, chat_model, capsys
):
    Path("mine.py").write_text(
        "from rlkl.tasks import Addition\n\nclass Mine(Addition):\n"
        "    def grade(self, example, response):\n"
        "        Mine.graded = getattr(Mine, 'graded', 0) + 1\n"
        "        return {'x': 1 / (Mine.graded <= 9)}\n"  # 9 before training, then step 1
    )
    options = ("task=mine.py:Mine", "task.digits=1", *SMALL)
    error = train_error(capsys, f"model.name={chat_model}", *options)
    assert "step 1 is kept: resume=out continues" in error
    assert [row["step"] for row in rows(Path("out"))] == [1]
    assert [p.name for p in Path("out/checkpoints").iterdir()] == ["step-000001"]


# ------------------------------------------------------------------ docs/tasks.md and configs


def test_the_page_has_a_section_with_a_snippet_that_resolves_for_every_task():
    sections = dict(re.findall(r"^## (\S+)[^\n]*\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M))
    assert set(sections) == {*TASKS, "Chat", "Your"}
    for name in TASKS:
        tree = yaml.safe_load(re.search(r"```yaml\n(.*?)```", sections[name], re.S)[1])
        assert tree["task"]["name"] == name
        cfg = config.build(config.merge(config.defaults(), tree))
        resolve(cfg.task, TABLES["task"], "task")


def test_the_task_of_the_page_keeps_the_contract_and_trains(train_on):
    source = re.search(r"```python\n(.*?)```", PAGE, re.S)[1]
    Path("my_task.py").write_text(source, encoding="utf-8")
    task = resolve({"name": "my_task.py:Vowels"}, TASKS, "task")
    contract.test_a_task_is_a_list_of_examples(task)
    contract.test_no_prompt_is_both_trained_on_and_held_out(task)
    contract.test_a_score_is_a_finite_number_whatever_the_response(task)
    contract.test_the_right_answer_scores_one_and_an_empty_response_less(task)
    assert "eval/is_a_number" in rows(train_on("task=my_task.py:Vowels"))[-1]


def test_the_task_of_every_training_config_resolves():
    """A config of another command starts with its name, as in `# rlkl sft`."""
    for path, text in CONFIGS.items():
        if not text.startswith("# rlkl "):
            resolve(config.load([str(path)]).task, TABLES["task"], "task")


def test_a_config_for_a_gpu_says_whether_its_numbers_are_measured_or_expected():
    for path, text in CONFIGS.items():
        first = text.splitlines()[0]
        origin = "Expected" in first or "Measured" in first
        assert "CPU" in first or ("GB GPU" in first and origin), path.name
