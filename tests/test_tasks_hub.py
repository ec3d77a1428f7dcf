"""Rows from files, folders and the hub: the sides, the columns, the formats, and one line for whatever is missing."""

import csv
import json

import pytest

from rlkl.errors import UserError
from rlkl.tasks.countdown import Countdown
from rlkl.tasks.gsm8k import GSM8K
from rlkl.tasks.hub import Hub
from rlkl.tasks.mathematics import Mathematics

ROWS = [{"question": f"q{i}?", "answer": str(i), "level": i % 5} for i in range(60)]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def comma_separated(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def parquet(path, rows):
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(path)


COLUMNS = "question, answer, level"
WRITE = {"jsonl": jsonl, "csv": comma_separated, "parquet": parquet}


def contents(task) -> dict:
    return {str(task[i].prompt): (task[i].answer, task[i].info) for i in range(len(task))}


@pytest.mark.parametrize("kind", WRITE)
def test_a_file_of_any_kind_is_cut_in_two_by_a_hash_and_loses_nothing(tmp_path, kind):
    WRITE[kind](tmp_path / f"d.{kind}", ROWS)
    options = {"path": str(tmp_path / f"d.{kind}"), "prompt": "question", "heldout": 0.3}
    train, heldout = contents(Hub("train", **options)), contents(Hub("heldout", **options))
    assert 5 < len(heldout) < 35
    assert not set(train) & set(heldout)
    assert train | heldout == {row["question"]: (row["answer"], {"level": row["level"]}) for row in ROWS}


@pytest.mark.parametrize("kind", WRITE)
def test_a_folder_has_its_splits(tmp_path, kind):
    for name, rows in (("train", ROWS[:50]), ("test", ROWS[50:])):
        WRITE[kind](tmp_path / f"{name}.{kind}", rows)
    options = {"path": str(tmp_path), "prompt": "question", "heldout_split": "test"}
    assert list(contents(Hub("train", **options))) == [row["question"] for row in ROWS[:50]]
    assert list(contents(Hub("heldout", **options))) == [row["question"] for row in ROWS[50:]]


def test_what_save_to_disk_left_is_cut_in_two_and_has_its_splits_if_it_was_saved_with_them(tmp_path):
    """A Dataset without splits must not be both sides, although the task names two."""
    import datasets

    rows = datasets.Dataset.from_list([row | {"answer": f"#### {row['answer']}"} for row in ROWS])
    rows.save_to_disk(tmp_path / "one")
    train, heldout = (contents(GSM8K(side, path=str(tmp_path / "one"))) for side in ("train", "heldout"))
    assert train
    assert heldout
    assert not set(train) & set(heldout)
    datasets.DatasetDict(train=rows.select(range(50)), test=rows.select(range(50, 60))).save_to_disk(tmp_path / "two")
    assert [len(GSM8K(side, path=str(tmp_path / "two"))) for side in ("train", "heldout")] == [50, 10]


def test_the_cause_is_said_where_the_library_only_says_that_an_error_occurred(tmp_path, capfd):
    (tmp_path / "d.jsonl").write_text('{"prompt": "p", "answer": "a"}\n{"prompt"')
    with pytest.raises(UserError, match="JSON parse error"):
        Hub("train", path=str(tmp_path / "d.jsonl"))
    assert capfd.readouterr().err == "", "one line, not two"


def test_a_prompt_is_text_or_what_a_user_says_or_chat_messages_as_they_are(tmp_path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    for rows, said, wanted in (
        ([{"prompt": "p", "answer": 1}], False, "p"), ([{"prompt": "p", "answer": 1}], True, [{"role": "user",
         "content": "p"}]),
        ([{"prompt": chat, "answer": 1}], False, chat), ([{"prompt": chat, "answer": 1}], True, chat),
    ):
        jsonl(tmp_path / "d.jsonl", rows)
        task = Hub("train", path=str(tmp_path / "d.jsonl"), chat=said, heldout=0.0)
        assert (task[0].prompt, task[0].answer) == (wanted, "1")
    assert task.score(task[0], " 1\n") == 1.0
    assert task.score(task[0], "1.") == 0.0


def test_gsm8k_reads_the_published_format(tmp_path):
    rows = [{"question": "How many?", "answer": "48/2 = <<48/2=24>>24\n#### 1,072"}]
    for name in ("train", "test"):
        jsonl(tmp_path / f"{name}.jsonl", rows)
    for chat in (True, False):
        task = GSM8K("heldout", path=str(tmp_path), chat=chat)
        prompt = task[0].prompt[0]["content"] if chat else task[0].prompt
        assert prompt.startswith("How many? ")
        assert prompt.endswith('after "####".')
        assert (task[0].answer, task[0].info["solution"]) == ("1072", rows[0]["answer"])
        assert task.score(task[0], rows[0]["answer"]) == 1.0
    flexible = GSM8K("heldout", path=str(tmp_path), paid="flexible")
    assert [t.score(t[0], "it is 1072") for t in (task, flexible)] == [0.0, 1.0]
    assert [t.grade(t[0], "it is 1072") for t in (task, flexible)] == [{"strict": 0.0, "flexible": 1.0}] * 2


def test_math_reads_both_published_formats_and_keeps_the_levels_that_are_asked_for(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    jsonl(tmp_path / "train" / "train.jsonl", [
        {"problem": f"{n}?", "level": f"Level {n}", "type": "Algebra",
        "solution": f"so $\\boxed{{\\frac{{{n}}}{{2}}}}$"}
        for n in range(1, 6)] + [{"problem": "?", "level": "Level ?", "type": "Algebra", "solution": "no box"}])
    jsonl(tmp_path / "test" / "test.jsonl", [
        {"problem": f"{n}!", "level": n, "subject": "Algebra", "solution": "…", "answer": f"{n}", "unique_id": "x"}
        for n in range(1, 6)])
    options = {"path": str(tmp_path / "train"), "heldout_path": str(tmp_path / "test"), "chat": False}
    train, heldout = Mathematics("train", **options), Mathematics("heldout", **options)
    assert [train[i].answer for i in range(len(train))] == [f"\\frac{{{n}}}{{2}}" for n in range(1, 6)]
    assert [heldout[i].answer for i in range(len(heldout))] == list("12345")
    assert train[0].prompt.startswith("1?\n")
    some = [Mathematics(split, levels=[2, 5], **options) for split in ("train", "heldout")]
    assert [[t[i].prompt[0] for i in range(len(t))] for t in some] == [["2", "5"], ["2", "5"]]


def test_countdown_reads_the_published_rows(tmp_path):
    jsonl(tmp_path / "train.jsonl", [{"target": 98, "nums": [44, 19, 35]}, {"target": 64, "nums": [63, 95, 96]}])
    task = Countdown("train", path=str(tmp_path / "train.jsonl"), heldout=0.0, prompt="{numbers} → {target}",
    chat=False)
    assert [task[i].prompt for i in range(2)] == ["44, 19, 35 → 98", "63, 95, 96 → 64"]
    assert task.score(task[0], "<answer>44+19+35</answer>")["correct"] == 1.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: Hub("train", path=str(p / "gone.jsonl")), ["gone.jsonl", "no such file"]),
        (lambda p: Hub("train", path="./gone"), ["./gone", "no such file or folder"]),
        (lambda p: Hub("train", path="no-such/name-on-the-hub"), ["no-such/name-on-the-hub", "'train'",
         "cannot be read"]),
        (lambda p: Hub("train", path=str(p / "d.jsonl")), ["'prompt'", COLUMNS]),
        (lambda p: Hub("train", path=str(p / "d.jsonl"), prompt="question", answer="x"), ["'x'", COLUMNS]),
        (lambda p: Hub("train", path=str(p / "d.jsonl"), prompt="level"), ["level must be text",
         "answer text or a number", "'0'"]),
        (lambda p: Hub("train", path=str(p / "d.txt")), ["d.txt", ".parquet, .jsonl"]),
        (lambda p: Hub("train", path=str(p / "torn.parquet")), ["torn.parquet", "cannot be read"]),
        (lambda p: Hub("train", path=str(p / "torn.jsonl")), ["torn.jsonl", "cannot be read"]),
        (lambda p: Hub("heldout", path=str(p / "d"), prompt="question", heldout_split="dev"), ["'dev'", "train"]),
        (lambda p: Hub("heldout", path=str(p / "d.jsonl"), prompt="question", heldout=0.0), ["heldout side",
         "heldout=0"]),
        (lambda p: GSM8K("train", path=str(p / "d.jsonl")), ["d.jsonl", "no number after ####"]),
        (lambda p: GSM8K("train"), ["openai/gsm8k", "main", "cannot be read"]),
        (lambda p: Mathematics("train", path=str(p / "d.jsonl")), ["'problem'", COLUMNS]),
        (lambda p: Countdown("train", path=str(p / "d.jsonl")), ["'target'", COLUMNS]),
    ],
)
def test_whatever_is_missing_is_one_line_that_says_what_was_found(tmp_path, make, words):
    jsonl(tmp_path / "d.jsonl", ROWS)
    (tmp_path / "d").mkdir()
    jsonl(tmp_path / "d" / "train.jsonl", ROWS)
    (tmp_path / "d.txt").write_text("text")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    (tmp_path / "torn.jsonl").write_text('{"prompt": \n')
    with pytest.raises(UserError) as error:
        make(tmp_path)
    assert [w for w in words if w not in str(error.value)] == [], error.value
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("library", "make"),
    [("datasets", lambda: Hub("train", path="a/b")), ("math_verify", lambda: Mathematics("train")),
     ("reasoning_gym.factory", lambda: __import__("rlkl.tasks.gym").tasks.gym.ReasoningGym("train", dataset="x"))])
def test_a_library_that_is_not_installed_is_named_with_its_extra(monkeypatch, library, make):
    import sys

    from rlkl.tasks import mathematics

    mathematics.judge.cache_clear()
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=r"pip install 'rlkl\[tasks\]'"):
        make()
