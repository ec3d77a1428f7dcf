"""Every task through train.py for two steps, on a random model with a chat template, saved and loaded as any other; and
the page and the configs that name a task."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from contract import make_task
from runs_fixture import ROOT, rows
from transformers import AutoModelForCausalLM, LlamaConfig

import train
from rlkl import config
from rlkl.build import TABLES
from rlkl.heldout import means
from rlkl.tasks import TASKS
from rlkl.tiny import character_tokenizer

pytest_plugins = ("runs_fixture",)
PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
CHAT = ("{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}")


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> Path:
    """A language model of random weights, one token a character, that knows what a chat is and has room for one."""
    folder, tokenizer = tmp_path_factory.mktemp("model") / "talker", character_tokenizer()
    tokenizer.chat_template = CHAT
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id))
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train_on(talker, *options: str) -> Path:
    """Two steps in the working directory, with a held-out evaluation after each."""
    small = ("sampling.prompts=2", "sampling.group_size=2", "sampling.max_new_tokens=6", "optim.steps=2",
             "eval.every=1", "eval.prompts=3", "eval.samples=2", "log.every=1", "run=out", f"model.name={talker}")
    assert train.main([*small, *options]) == 0
    return Path("out")


@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_by_its_own_score(talker, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    made = make_task(name, tmp_path)
    folder = train_on(talker, f"task={name}", *(f"task.{k}={json.dumps(v)}" for k, v in made.keywords.items()))
    written = rows(folder)
    assert [row["step"] for row in written] == [1, 2]
    assert all(-1 <= row["reward"] <= 1.1 and 0 <= row["heldout/accuracy"] <= 1 for row in written)
    named = getattr(made("train"), "grade", lambda *_: {})(made("train")[0], "")
    out, report = capsys.readouterr().out, (folder / "report.md").read_text()
    for grade in named:
        assert all(f"heldout/{grade}" in row for row in written)
        assert len(re.findall(rf"heldout/{grade} -?[01]", out)) == 2  # a line a step
        for text in (grade, f"greedy/{grade}"):
            assert f"│ {text} " in re.sub("┃", "│", out)
            assert re.search(rf"\| {text} \| (0.000|-1.000) \| \1 \|", report)


def test_the_grades_of_a_task_are_averaged_over_replies_beside_accuracy(talker, tmp_path, monkeypatch):
    """Of the sampled replies and of the greedy ones, before and after; resumed as saved."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from rlkl.tasks import Addition\n\nclass Mine(Addition):\n"
        "    def score(self, example, reply):\n        return 1.0\n"
        "    def grade(self, example, reply):\n"
        "        return {'one': 1.0, 'a': float('a' in reply), 'length': float(len(reply))}\n")
    folder = train_on(talker, "task=mine.py:Mine", "task.digits=1")
    for row in rows(folder):
        assert (row["heldout/accuracy"], row["heldout/one"]) == (1.0, 1.0)
        assert 0 < row["heldout/length"] <= 6
    held = (folder / "report.md").read_text().split("![metrics]")[0]
    assert re.findall(r"^\| ([\w/@]+) \|", held, re.M) == [
        "accuracy", "one", "a", "length", "greedy", "greedy/one", "greedy/a", "greedy/length", "pass@2"]
    assert means([{"x": 1.0}, {"x": 0.0}]) == {"x": 0.5}
    assert means([{}, {}]) == means([]) == {}


def test_a_grade_that_raises_is_one_line(talker, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from rlkl.tasks import Addition\n\nclass Mine(Addition):\n"
        "    def grade(self, example, reply):\n        return 1 / 0\n")
    assert train.main([f"model.name={talker}", "task=mine.py:Mine", "task.digits=1", "run=out", "eval.prompts=1"]) == 2
    assert "error: task.grade raised ZeroDivisionError" in capsys.readouterr().err


# docs/tasks.md
def test_the_page_has_a_section_with_a_snippet_that_resolves_for_every_task():
    sections = dict(re.findall(r"^## (\S+)[^\n]*\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M))
    assert set(TASKS) | {"Your"} == set(sections)
    for name in TASKS:
        tree = yaml.safe_load(re.search(r"```yaml\n(.*?)```", sections[name], re.S)[1])
        assert tree["task"]["name"] == name
        cfg = config.build(config.merge(config.defaults(), tree))
        config.resolve(cfg.task, TABLES["task"], "task")


def test_the_task_of_the_page_keeps_the_contract_and_trains(talker, tmp_path, monkeypatch):
    import contract

    source = re.search(r"```python\n(.*?)```", PAGE, re.S)[1]
    monkeypatch.chdir(tmp_path)
    Path("my_task.py").write_text(source, encoding="utf-8")
    task = config.resolve({"name": "my_task.py:Vowels"}, TASKS, "task")
    contract.test_a_task_is_a_list_of_examples(task, "heldout")
    contract.test_no_prompt_is_both_trained_on_and_held_out(task)
    contract.test_a_score_is_a_finite_number_whatever_the_reply(task)
    contract.test_the_right_answer_scores_one_and_an_empty_reply_less(task)
    assert "heldout/is_a_number" in rows(train_on(talker, "task=my_task.py:Vowels"))[-1]


OF_TRAIN = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if not path.read_text().startswith("# rlkl ")]


@pytest.mark.parametrize("path", OF_TRAIN, ids=lambda p: p.name)
def test_the_task_of_every_config_resolves(path):
    cfg = config.load([str(path)])
    config.resolve(cfg.task, TABLES["task"], "task")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_a_config_for_a_gpu_says_that_its_numbers_are_measured_or_expected(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert "CPU" in first or ("GB GPU" in first and ("Expected" in first or "Measured" in first))
