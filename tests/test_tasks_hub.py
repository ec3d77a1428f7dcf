"""Rows from files, folders and the hub: sides, columns, formats, and errors of one line."""

import csv
import json
import sys

import datasets
import pytest

from rlkl.errors import UserError
from rlkl.rewards.text import columns
from rlkl.tasks import mathematics
from rlkl.tasks.countdown import Countdown
from rlkl.tasks.gsm8k import GSM8K
from rlkl.tasks.gym import ReasoningGym
from rlkl.tasks.hub import Hub
from rlkl.tasks.mathematics import Mathematics

ROWS = [{"question": f"q{i}?", "answer": str(i), "level": i % 5} for i in range(60)]
COLUMNS = "question, answer, level"
QUESTIONS = [row["question"] for row in ROWS]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    datasets.Dataset.from_list(rows).to_parquet(path)


WRITE = {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}


def contents(task) -> dict:
    return {str(e.prompt): (e.answer, e.info) for e in task.examples}


@pytest.mark.parametrize("kind", WRITE)
def test_a_file_of_any_kind_is_divided_by_a_hash_and_loses_no_row(tmp_path, kind):
    WRITE[kind](tmp_path / f"d.{kind}", ROWS)
    options = {"path": str(tmp_path / f"d.{kind}"), "prompt": "question", "heldout": 0.3}
    train = contents(Hub("train", **options))
    heldout = contents(Hub("heldout", **options))
    assert 5 < len(heldout) < 35
    assert not set(train) & set(heldout)
    expected = {row["question"]: (row["answer"], {"level": row["level"]}) for row in ROWS}
    assert train | heldout == expected


def test_a_column_of_conversations_is_prompt_and_answer(tmp_path):
    user, four = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
    path = tmp_path / "d.jsonl"
    write_jsonl(path, [{"messages": [user, four], "id": 1}])
    task = Hub("train", path=str(path), prompt="messages", answer=None, heldout=0.0)
    assert contents(task) == {str([user]): ("4", {"id": 1})}
    write_jsonl(path, [{"prompt": [user], "completion": [four]}])
    task = Hub("train", path=str(path), answer="completion", heldout=0.0)
    assert contents(task) == {str([user]): ("4", {})}


def test_a_reward_reads_the_answer_by_the_name_of_its_column(tmp_path):
    """As accuracy_reward(completions, solution) of TRL, also where no column is named."""
    path = tmp_path / "d.jsonl"
    write_jsonl(path, [{"prompt": "2+2?", "solution": 4}])
    task = Hub("train", path=str(path), answer="solution", heldout=0.0)
    assert (task[0].answer, task[0].info) == ("4", {"solution": 4})
    assert columns([task[0]]) == {"answer": ["4"], "solution": [4]}
    assert task[0].solution == "4", "what is learned is text"
    task = Hub("train", path=str(path), heldout=0.0)
    assert columns([task[0]]) == {"solution": [4]}, "and no answer that is never right"
    assert (task[0].prompt, task[0].answer, task[0].info) == ("2+2?", "", {"solution": 4})
    with pytest.raises(UserError, match=r"no answer.*reward=file.py:function.*task.answer=COLUMN"):
        task.score(task[0], "")


@pytest.mark.parametrize("kind", WRITE)
def test_a_folder_has_its_own_splits(tmp_path, kind):
    WRITE[kind](tmp_path / f"train.{kind}", ROWS[:50])
    WRITE[kind](tmp_path / f"test.{kind}", ROWS[50:])
    options = {"path": str(tmp_path), "prompt": "question", "heldout_split": "test"}
    assert list(contents(Hub("train", **options))) == QUESTIONS[:50]
    assert list(contents(Hub("heldout", **options))) == QUESTIONS[50:]


def test_a_saved_dataset_is_divided_by_a_hash_unless_it_was_saved_with_splits(tmp_path):
    """A Dataset without splits must not be both sides, although the task names two splits."""
    rows = [row | {"answer": f"#### {row['answer']}"} for row in ROWS]
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(tmp_path / "one")
    train = contents(GSM8K("train", path=str(tmp_path / "one")))
    heldout = contents(GSM8K("heldout", path=str(tmp_path / "one")))
    assert train
    assert heldout
    assert not set(train) & set(heldout)
    first, last = dataset.select(range(50)), dataset.select(range(50, 60))
    datasets.DatasetDict(train=first, test=last).save_to_disk(tmp_path / "two")
    assert len(GSM8K("train", path=str(tmp_path / "two"))) == 50
    assert len(GSM8K("heldout", path=str(tmp_path / "two"))) == 10


def test_the_cause_is_named_where_the_library_only_says_that_an_error_occurred(tmp_path, capfd):
    (tmp_path / "d.jsonl").write_text('{"prompt": "p", "answer": "a"}\n{"prompt"')
    with pytest.raises(UserError, match="JSON parse error"):
        Hub("train", path=str(tmp_path / "d.jsonl"))
    assert capfd.readouterr().err == "", "one line, not two"


def test_a_prompt_is_text_or_a_user_message_or_chat_messages_as_they_are(tmp_path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = tmp_path / "d.jsonl"
    for prompt, as_chat, expected in (
        ("p", False, "p"),
        ("p", True, [{"role": "user", "content": "p"}]),
        (chat, False, chat),
        (chat, True, chat),
    ):
        write_jsonl(path, [{"prompt": prompt, "answer": 1}])
        task = Hub("train", path=str(path), chat=as_chat, heldout=0.0)
        assert (task[0].prompt, task[0].answer) == (expected, "1")
    assert task.score(task[0], " 1\n") == 1.0
    assert task.score(task[0], "1.") == 0.0


def test_gsm8k_reads_the_published_format(tmp_path):
    rows = [{"question": "How many?", "answer": "48/2 = <<48/2=24>>24\n#### 1,072"}]
    for name in ("train", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    for chat in (True, False):
        task = GSM8K("heldout", path=str(tmp_path), chat=chat)
        prompt = task[0].prompt[0]["content"] if chat else task[0].prompt
        assert prompt.startswith("How many? ")
        assert prompt.endswith('after "####".')
        assert (task[0].answer, task[0].info["solution"]) == ("1072", rows[0]["answer"])
        assert task.score(task[0], rows[0]["answer"]) == 1.0
    flexible = GSM8K("heldout", path=str(tmp_path), method="flexible")
    assert task.score(task[0], "it is 1072") == 0.0
    assert flexible.score(task[0], "it is 1072") == 1.0
    for paid_by in (task, flexible):
        assert paid_by.grade(task[0], "it is 1072") == {"strict": 0.0, "flexible": 1.0}


def test_math_reads_both_published_formats_and_selects_levels(tmp_path):
    def train_row(problem: str, level: str, solution: str) -> dict:
        return {"problem": problem, "level": level, "type": "Algebra", "solution": solution}

    def test_row(n: int) -> dict:
        row = {"problem": f"{n}!", "level": n, "subject": "Algebra", "solution": "…"}
        return row | {"answer": f"{n}", "unique_id": "x"}

    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    train_rows = [
        train_row(f"{n}?", f"Level {n}", f"so $\\boxed{{\\frac{{{n}}}{{2}}}}$") for n in range(1, 6)
    ]
    without_answer = train_row("?", "Level ?", "no box")
    write_jsonl(tmp_path / "train" / "train.jsonl", [*train_rows, without_answer])
    write_jsonl(tmp_path / "test" / "test.jsonl", [test_row(n) for n in range(1, 6)])
    paths = {"path": str(tmp_path / "train"), "heldout_path": str(tmp_path / "test")}
    train = Mathematics("train", **paths, chat=False)
    heldout = Mathematics("heldout", **paths, chat=False)
    assert [e.answer for e in train.examples] == [f"\\frac{{{n}}}{{2}}" for n in range(1, 6)]
    assert [e.answer for e in heldout.examples] == list("12345")
    assert train[0].prompt.startswith("1?\n")
    file = str(tmp_path / "train" / "train.jsonl")
    whole = Mathematics("train", path=file, heldout_path=paths["heldout_path"], heldout=0.9)
    assert len(whole) == 5, "what is held out is another set: nothing of this one is"
    for split in ("train", "heldout"):
        task = Mathematics(split, levels=[2, 5], **paths, chat=False)
        assert [e.prompt[0] for e in task.examples] == ["2", "5"]


def test_a_local_folder_is_all_that_math_needs_and_its_test_split_is_held_out(tmp_path):
    rows = [{"problem": f"{n}?", "answer": str(n)} for n in range(30)]
    write_jsonl(tmp_path / "train.jsonl", rows[:20])
    write_jsonl(tmp_path / "test.jsonl", rows[20:])
    train = Mathematics("train", path=str(tmp_path), chat=False)
    heldout = Mathematics("heldout", path=str(tmp_path), chat=False)
    assert [e.answer for e in train.examples] == [str(n) for n in range(20)]
    assert [e.answer for e in heldout.examples] == [str(n) for n in range(20, 30)]


def test_a_single_file_of_math_is_divided_also_where_both_paths_name_it(tmp_path):
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, [{"problem": f"question {n}?", "answer": str(n)} for n in range(60)])
    for options in ({}, {"heldout_path": str(file)}):
        options |= {"path": str(file), "heldout": 0.3}
        train = contents(Mathematics("train", **options))
        heldout = contents(Mathematics("heldout", **options))
        assert train
        assert heldout
        assert len(train | heldout) == len(train) + len(heldout) == 60


def test_countdown_reads_the_published_rows(tmp_path):
    rows = [{"target": 98, "nums": [44, 19, 35]}, {"target": 64, "nums": [63, 95, 96]}]
    path = tmp_path / "train.jsonl"
    write_jsonl(path, rows)
    prompt = "{numbers} → {target}"
    task = Countdown("train", path=str(path), heldout=0.0, prompt=prompt, chat=False)
    assert [task[i].prompt for i in range(2)] == ["44, 19, 35 → 98", "63, 95, 96 → 64"]
    assert task.score(task[0], "<answer>44+19+35</answer>")["correct"] == 1.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: Hub("train", path=str(p / "gone.jsonl")), ["gone.jsonl", "no such file"]),
        (lambda p: Hub("train", path="./gone"), ["./gone", "no such file or folder"]),
        (
            lambda p: Hub("train", path="no-such/name-on-the-hub"),
            ["no-such/name-on-the-hub", "'train'", "cannot be read"],
        ),
        (lambda p: Hub("train", path=str(p / "d.jsonl")), ["'prompt'", COLUMNS]),
        (
            lambda p: Hub("train", path=str(p / "d.jsonl"), prompt="question", answer="x"),
            ["'x'", COLUMNS],
        ),
        (
            lambda p: Hub("train", path=str(p / "d.jsonl"), prompt="level"),
            ["level must be text", "answer text or a number", "'0'"],
        ),
        (lambda p: Hub("train", path=str(p / "d.txt")), ["d.txt", ".parquet, .jsonl"]),
        (lambda p: Hub("train", path=str(p / "torn.parquet")), ["torn.parquet", "cannot be read"]),
        (lambda p: Hub("train", path=str(p / "torn.jsonl")), ["torn.jsonl", "cannot be read"]),
        (
            lambda p: Hub("heldout", path=str(p / "d"), prompt="question", heldout_split="dev"),
            ["'dev'", "train"],
        ),
        (
            lambda p: Hub("heldout", path=str(p / "d.jsonl"), prompt="question", heldout=0.0),
            ["heldout side", "heldout=0"],
        ),
        (lambda p: GSM8K("train", path=str(p / "d.jsonl")), ["d.jsonl", "no number after ####"]),
        (lambda p: GSM8K("train"), ["openai/gsm8k", "main", "cannot be read"]),
        (lambda p: Mathematics("train", path=str(p / "d.jsonl")), ["'problem'", COLUMNS]),
        (
            lambda p: Mathematics("heldout", path="a/b"),
            ["task.heldout_path='HuggingFaceH4/MATH-500'", "cannot be read"],
        ),
        (
            lambda p: Mathematics("heldout", path="a/b", heldout_path=str(p / "gone")),
            ["task.heldout_path=", "gone", "no such file or folder"],
        ),
        (
            lambda p: Mathematics("heldout", path="a/b", heldout_path=str(p / "d.jsonl")),
            ["task.heldout_path=", "'problem'", COLUMNS],
        ),
        (lambda p: Countdown("train", path=str(p / "d.jsonl")), ["'target'", COLUMNS]),
    ],
)
def test_what_is_missing_is_one_line_that_names_what_is_there(tmp_path, make, words):
    write_jsonl(tmp_path / "d.jsonl", ROWS)
    (tmp_path / "d").mkdir()
    write_jsonl(tmp_path / "d" / "train.jsonl", ROWS)
    (tmp_path / "d.txt").write_text("text")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    (tmp_path / "torn.jsonl").write_text('{"prompt": \n')
    with pytest.raises(UserError) as error:
        make(tmp_path)
    assert [word for word in words if word not in str(error.value)] == [], error.value
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("library", "make"),
    [
        ("datasets", lambda: Hub("train", path="a/b")),
        ("math_verify", lambda: Mathematics("train")),
        ("reasoning_gym.factory", lambda: ReasoningGym("train", dataset="x")),
    ],
)
def test_a_library_that_is_not_installed_is_named_with_its_extra(monkeypatch, library, make):
    mathematics.math_verify.cache_clear()
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=r"pip install 'rlkl\[tasks\]'"):
        make()


def test_rows_of_one_conversation_with_different_answers_are_on_one_side(tmp_path):
    """The hash is that of the prompt, without the assistant's last message."""
    lines = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": a}]}
        for i in range(40)
        for a in ("yes", "no", "perhaps")
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"path": str(path), "prompt": "messages", "answer": None, "heldout": 0.3}
    sides = [Hub(split, **options) for split in ("train", "heldout")]
    train, heldout = ({str(task[i].prompt) for i in range(len(task))} for task in sides)
    assert heldout
    assert train.isdisjoint(heldout)
