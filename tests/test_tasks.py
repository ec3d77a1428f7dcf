"""Tasks: held-out prompts are never trained on, scores are exact, and no character gets lost."""

import json
import string

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rlkl.errors import UserError
from rlkl.rollout.sampling import decode, encode
from rlkl.supervised.scratch import ALPHABET, character_tokenizer
from rlkl.tasks import TASKS
from rlkl.tasks.addition import Addition
from rlkl.tasks.jsonl import Jsonl
from rlkl.types import Batch, Example

pytest_plugins = ("runs_fixture",)
TOKENIZER = character_tokenizer()


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def examples_of(task) -> list[Example]:
    return [task[i] for i in range(len(task))]


def prompts(task) -> set[str]:
    return {json.dumps(e.prompt, sort_keys=True) for e in examples_of(task)}


def texts(count: int) -> list[dict]:
    return [{"prompt": f"question {i}?", "answer": str(i)} for i in range(count)]


def chats(count: int) -> list[dict]:
    system = {"role": "system", "content": "s"}
    users = [{"role": "user", "content": f"{i}"} for i in range(count)]
    return [{"prompt": [system, user], "answer": i} for i, user in enumerate(users)]


# ------------------------------------------------------------------ addition


@pytest.mark.parametrize("digits", [1, 2])
def test_addition_trains_on_no_held_out_sum_nor_on_its_mirror_image(digits):
    train = Addition("train", digits=digits)
    heldout = Addition("heldout", digits=digits)
    assert len(train) + len(heldout) == 100**digits
    assert len(prompts(train) | prompts(heldout)) == 100**digits
    assert not prompts(train) & prompts(heldout)
    assert 0.05 < len(heldout) / 100**digits < 0.2
    pairs = [e.prompt.strip("=").split("+") for e in examples_of(heldout)]
    assert not {f'"{b}+{a}="' for a, b in pairs} & prompts(train)


def test_the_answer_of_addition_is_the_sum_units_first():
    for example in examples_of(Addition("train", digits=2)):
        a, b = example.prompt.removesuffix("=").split("+")
        assert example.answer == str(int(a) + int(b))[::-1]


def test_addition_scores_the_answer_and_nothing_else():
    task = Addition("train", digits=2)
    for example in examples_of(task)[::97]:
        answer = example.answer
        assert task.score(example, answer) == 1.0
        wrong = [str(n) for n in range(200)] + [answer + c for c in " 0=\n"]
        wrong += [" " + answer, "", "0", answer[:-1], example.prompt + answer]
        assert all(task.score(example, w) == 0.0 for w in wrong if w != answer)


@pytest.mark.parametrize("digits", [1, 2])
def test_every_sum_and_its_eos_fit_the_default_length(digits):
    """A prompt has at most 2·digits + 2 tokens; sampling.max_new_tokens is 8 by default."""
    for side in ("train", "heldout"):
        for example in examples_of(Addition(side, digits=digits)):
            assert 4 <= len(encode(TOKENIZER, example.prompt)) <= 2 * digits + 2
            assert 2 <= len(encode(TOKENIZER, example.answer)) + 1 <= 8


# ------------------------------------------------------------------ the two sides


def test_the_held_out_prompts_are_always_the_same(tmp_path):
    """In every process, unlike Python's own hash of a string; and in every version of rlkl.

    A model is never evaluated on prompts that another run with the same data was trained on.
    """
    path = write(tmp_path / "d.jsonl", [*texts(60), *chats(60)])
    jsonl = TASKS["jsonl"]("heldout", path=path)
    answers = "10 11 12 13 14 15 16 17 19 20 21 22 23 24 25 26 27 28 29 4 24 43 55"
    assert [e.answer for e in examples_of(jsonl)] == answers.split()
    addition = TASKS["addition"]("heldout", digits=1)
    sums = "0+4 0+6 0+7 1+3 2+7 3+1 4+0 4+6 6+0 6+4 7+0 7+2 7+9 9+7"
    assert [e.prompt.strip("=") for e in examples_of(addition)] == sums.split()
    reviews = TASKS["reviews"]("heldout", size=200)
    pairs = {tuple(sorted(e.info["aspects"])) for e in examples_of(reviews)}
    assert pairs == {("cast", "plot"), ("humor", "music"), ("lights", "script")}
    countdown = TASKS["countdown"]("heldout", problems=60)
    targets = [int(e.answer) for e in examples_of(countdown)]
    assert targets == [14, 46, 24, 82, 22, 12, 23]


@pytest.mark.parametrize("rows", [texts, chats], ids=["text", "chat"])
def test_jsonl_sides_are_disjoint_complete_and_of_the_size_asked_for(tmp_path, rows):
    path = write(tmp_path / "d.jsonl", rows(2000))
    for share in (0.1, 0.5):
        train = Jsonl("train", path=path, heldout=share)
        heldout = Jsonl("heldout", path=path, heldout=share)
        assert len(train) + len(heldout) == 2000
        assert not prompts(train) & prompts(heldout)
        assert abs(len(heldout) / 2000 - share) < 0.04


@pytest.mark.parametrize("rows", [texts, chats], ids=["text", "chat"])
def test_both_rows_of_a_prompt_are_on_one_side(tmp_path, rows):
    others = [row | {"answer": "another", "source": 2} for row in rows(200)]
    path = write(tmp_path / "d.jsonl", [*rows(200), *others])
    train = Jsonl("train", path=path)
    heldout = Jsonl("heldout", path=path)
    assert len(train) + len(heldout) == 400
    assert not prompts(train) & prompts(heldout)
    assert len(prompts(heldout)) * 2 == len(heldout)


def test_the_order_of_keys_in_a_chat_message_does_not_move_it_to_the_other_side(tmp_path):
    swapped = []
    for row in chats(300):
        messages = [dict(reversed(message.items())) for message in row["prompt"]]
        swapped.append(row | {"prompt": messages})
    one = Jsonl("heldout", path=write(tmp_path / "one.jsonl", chats(300)))
    other = Jsonl("heldout", path=write(tmp_path / "other.jsonl", swapped))
    assert prompts(one) == prompts(other)


def test_a_side_without_a_row_is_refused_by_name(tmp_path):
    path = write(tmp_path / "d.jsonl", texts(20))
    for side, share in (("heldout", 0.0), ("train", 1.0)):
        with pytest.raises(UserError, match=f"{side} side with task.heldout={share}"):
            Jsonl(side, path=path, heldout=share)


# ------------------------------------------------------------------ jsonl


def test_jsonl_ignores_white_space_around_an_answer_and_nothing_else(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"prompt": "p", "answer": " 42\n"}])
    task = Jsonl("train", path=path, heldout=0.0)
    assert [task.score(task[0], r) for r in ("42", " 42 ", "\n42\n")] == [1.0] * 3
    wrong = ("4 2", "42.", "", "042", "the answer is 42")
    assert [task.score(task[0], r) for r in wrong] == [0.0] * 5


def test_jsonl_keeps_prompt_answer_and_further_keys(tmp_path):
    rows = [
        {"prompt": "p", "answer": 4, "level": 3},
        {"prompt": [{"role": "user", "content": "q"}], "answer": "x"},
    ]
    task = Jsonl("train", path=write(tmp_path / "d.jsonl", rows), heldout=0.0)
    assert (task[0].prompt, task[0].answer, task[0].info) == ("p", "4", {"level": 3})
    assert (task[1].prompt, task[1].answer, task[1].info) == (rows[1]["prompt"], "x", {})


def test_jsonl_reads_the_rows_of_trls_sft(tmp_path):
    """The last message of a conversation is the answer; what comes before it is the prompt."""
    user = {"role": "user", "content": "2+2?"}
    four = {"role": "assistant", "content": "4"}
    rows = [
        {"messages": [user, four], "source": "x"},
        {"messages": [user, four, user, four]},
        {"prompt": [user], "completion": [four]},
        {"prompt": "2+2?", "completion": "4"},
    ]
    task = Jsonl("train", path=write(tmp_path / "d.jsonl", rows), heldout=0.0)
    assert [task[i] for i in range(4)] == [
        Example([user], "4", {"source": "x"}),
        Example([user, four, user], "4"),
        Example([user], "4"),
        Example("2+2?", "4"),
    ]


def test_jsonl_of_prompts_alone_has_no_score_of_its_own(tmp_path):
    rows = [{"prompt": "p", "level": 3}, {"prompt": "q"}]
    task = Jsonl("train", path=write(tmp_path / "d.jsonl", rows), heldout=0.0)
    assert [task[0], task[1]] == [
        Example("p", "", {"level": 3}, has_answer=False),
        Example("q", has_answer=False),
    ]
    with pytest.raises(UserError, match=r"rows have no answer.*reward=file.py:function"):
        task.score(task[0], "")
    chat = [{"prompt": "p", "messages": [{"role": "user", "content": "p"}]}]  # as in ultrachat
    task = Jsonl("train", path=write(tmp_path / "d.jsonl", chat), heldout=0.0)
    assert not task[0].has_answer
    write(tmp_path / "d.jsonl", [*rows, {"prompt": "r", "answer": "1"}])
    with pytest.raises(UserError, match=r"d.jsonl:1: the row has no 'answer'"):
        Jsonl("train", path=str(tmp_path / "d.jsonl"))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [{"role": "user", "content": "2+2?"}]}, "messages must be a list"),
        ({"messages": [{"role": "user"}, {"role": "user"}]}, "the assistant's response"),
        ({"messages": [{"role": "user"}, {"role": "assistant"}]}, "messages must be text"),
        ({"messages": "text"}, "messages must be a list"),
        ({"prompt": "p", "completion": 4}, "completion must be text"),
    ],
)
def test_a_conversation_without_a_response_is_refused(tmp_path, row, words):
    with pytest.raises(UserError, match=rf"d.jsonl:1: .*{words}"):
        Jsonl("train", path=write(tmp_path / "d.jsonl", [row]), heldout=0.0)


def test_jsonl_rows_end_at_a_newline_and_nowhere_else(tmp_path):
    """U+2028 and U+0085 may stand in a JSON string; str.splitlines() would cut the row there."""
    row = {"prompt": "one\u2028two\x85three", "answer": "a"}
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    task = Jsonl("train", path=str(path), heldout=0.0)
    assert [e.prompt for e in examples_of(task)] == [row["prompt"]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "p", "answer": "a"}\n{"prompt": "q"\n', [":2", "JSON"]),
        ('\n{"prompt": "p", "answer": "a"}\n\n{"prompt": "q"}\n', [":4", "answer"]),
        ('{"answer": "a"}\n', [":1", "prompt"]),
        ('["p", "a"]\n', [":1", "JSON object"]),
        ('"p"\n', [":1", "JSON object"]),
        ('{"prompt": "", "answer": "a"}\n', [":1", "prompt"]),
        ('{"prompt": 3, "answer": "a"}\n', [":1", "prompt"]),
        ('{"prompt": "p", "answer": null}\n', [":1", "answer"]),
        ('{"prompt": "p", "answer": ' + "9" * 5000 + "}", [":1", "digits"]),
        ("[" * 100_000, [":1", "JSON"]),
        ('{"prompt": "half a pair \\ud800", "answer": "a"}', [":1", "surrogates"]),
        ("", ["no rows"]),
        ("\n\n", ["no rows"]),
    ],
)
def test_a_malformed_row_names_its_file_and_line(tmp_path, text, words):
    (tmp_path / "d.jsonl").write_text(text)
    with pytest.raises(UserError) as error:
        Jsonl("train", path=str(tmp_path / "d.jsonl"))
    missing = [word for word in ["d.jsonl", *words] if word not in str(error.value)]
    assert not missing, error.value


def test_a_file_that_is_not_utf_8_is_refused_and_a_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes('{"prompt": "caf\xe9", "answer": "a"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"d\.jsonl.*UTF-8"):
        Jsonl("train", path=str(path))
    path.write_text('{"prompt": "café", "answer": "a"}', encoding="utf-8-sig")
    assert Jsonl("train", path=str(path), heldout=0.0)[0].prompt == "café"


# ------------------------------------------------------------------ the character tokenizer


@given(st.text(alphabet=ALPHABET, max_size=40))
@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
def test_every_text_of_printable_characters_survives_encode_and_decode(text):
    """One token a character, spaces too, and no special token is added."""
    ids = encode(TOKENIZER, text)
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text
    assert not set(ids) & {TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id}


def test_the_alphabet_holds_every_printable_ascii_character():
    assert set(string.printable) - set(ALPHABET) == set("\t\r\x0b\x0c")
    assert len(set(ALPHABET)) == len(ALPHABET) == len(TOKENIZER) - 3
    assert len({TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id}) == 3


def test_an_unknown_character_is_one_unknown_token():
    a, b = encode(TOKENIZER, "ab")
    assert encode(TOKENIZER, "aéb") == [a, TOKENIZER.unk_token_id, b]


def test_the_tokenizer_is_the_same_after_saving_and_loading(base):
    loaded = AutoTokenizer.from_pretrained(base)
    text = " a  b\n!? " + ALPHABET
    assert encode(loaded, text) == encode(TOKENIZER, text)
    assert loaded.decode(encode(loaded, text), skip_special_tokens=True) == text


def test_a_sampled_answer_is_read_back_without_its_eos_and_padding():
    """The reward sees the text before the EOS; what is behind it is padding, whatever the ids."""
    answers = [e.answer for e in examples_of(Addition("train", digits=2))[::1234]]
    rows = [[*encode(TOKENIZER, answer), TOKENIZER.eos_token_id] for answer in answers]
    ids = torch.tensor([row + encode(TOKENIZER, "7" * (8 - len(row))) for row in rows])
    mask = torch.arange(8) < torch.tensor([len(row) for row in rows])[:, None]
    prompt = torch.zeros(len(rows), 1, dtype=torch.long)
    truncated = torch.zeros(len(rows), dtype=torch.bool)
    batch = Batch(prompt, prompt == 0, ids, mask, torch.zeros(mask.shape), truncated)
    assert decode(TOKENIZER, batch) == answers
