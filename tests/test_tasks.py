"""Tasks: nothing is trained on what is held out, a score is exact, and every character survives the tokenizer."""

import json
import os
import string
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs_fixture import ROOT

from rlkl.errors import UserError
from rlkl.model import decode, encode
from rlkl.scratch import ALPHABET, character_tokenizer
from rlkl.tasks import TASKS
from rlkl.tasks.addition import Addition
from rlkl.tasks.jsonl import Jsonl
from rlkl.types import Batch

pytest_plugins = ("runs_fixture",)
TOKENIZER = character_tokenizer()


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def key(example) -> str:
    return json.dumps(example.prompt, sort_keys=True)


def prompts(task) -> set[str]:
    return {key(task[i]) for i in range(len(task))}


def texts(count: int) -> list[dict]:
    return [{"prompt": f"question {i}?", "answer": str(i)} for i in range(count)]


def chats(count: int) -> list[dict]:
    return [
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": f"{i}"}], "answer": i}
        for i in range(count)
    ]


@pytest.mark.parametrize("digits", [1, 2])
def test_addition_trains_on_no_sum_that_is_held_out_not_even_mirrored(digits):
    train, heldout = Addition("train", digits=digits), Addition("heldout", digits=digits)
    assert len(train) + len(heldout) == 100**digits
    assert len(prompts(train) | prompts(heldout)) == 100**digits
    assert not prompts(train) & prompts(heldout)
    assert 0.05 < len(heldout) / 100**digits < 0.2
    mirrored = {f'"{b}+{a}="' for a, b in (p.strip('"=').split("+") for p in prompts(heldout))}
    assert not mirrored & prompts(train)


def test_the_answer_of_addition_is_the_sum_written_in_one_direction():
    task = Addition("train", digits=2)
    sums = [sum(map(int, task[i].prompt.removesuffix("=").split("+"))) for i in range(len(task))]
    answers = [task[i].answer for i in range(len(task))]
    assert answers in ([str(s) for s in sums], [str(s)[::-1] for s in sums])


def test_addition_pays_for_the_answer_and_for_nothing_else():
    task = Addition("train", digits=2)
    for i in range(0, len(task), 97):
        example = task[i]
        assert task.score(example, example.answer) == 1.0
        wrong = [str(n) for n in range(200)] + [example.answer + c for c in " 0=\n"] + [" " + example.answer, "", "0"]
        wrong += [example.answer[:-1], example.prompt + example.answer]
        assert all(task.score(example, w) == 0.0 for w in wrong if w != example.answer)


@pytest.mark.parametrize("rows", [texts, chats], ids=["text", "chat"])
def test_jsonl_sides_are_disjoint_complete_and_of_the_size_asked_for(tmp_path, rows):
    path = write(tmp_path / "d.jsonl", rows(2000))
    for share in (0.1, 0.5):
        train, heldout = Jsonl("train", path=path, heldout=share), Jsonl("heldout", path=path, heldout=share)
        assert len(train) + len(heldout) == 2000
        assert not prompts(train) & prompts(heldout)
        assert abs(len(heldout) / 2000 - share) < 0.04


@pytest.mark.parametrize("rows", [texts, chats], ids=["text", "chat"])
def test_a_prompt_that_stands_twice_stands_on_one_side(tmp_path, rows):
    twice = [*rows(200), *(row | {"answer": "another", "source": 2} for row in rows(200))]
    train, heldout = (Jsonl(s, path=write(tmp_path / "d.jsonl", twice)) for s in ("train", "heldout"))
    assert len(train) + len(heldout) == 400
    assert not prompts(train) & prompts(heldout)
    assert len(prompts(heldout)) * 2 == len(heldout)


def test_the_order_of_keys_in_a_chat_message_does_not_move_it_to_the_other_side(tmp_path):
    swapped = [row | {"prompt": [dict(reversed(m.items())) for m in row["prompt"]]} for row in chats(300)]
    one = Jsonl("heldout", path=write(tmp_path / "one.jsonl", chats(300)))
    other = Jsonl("heldout", path=write(tmp_path / "other.jsonl", swapped))
    assert prompts(one) == prompts(other)


def test_the_sides_are_the_same_in_every_process(tmp_path):
    """Python's own hash of a string is not."""
    path = write(tmp_path / "d.jsonl", [*texts(50), *chats(50)])
    code = (
        "import sys, json; from rlkl.tasks import TASKS\n"
        "tasks = [TASKS['jsonl']('heldout', path=sys.argv[1]), TASKS['addition']('heldout', digits=1)]\n"
        "print(json.dumps([[t[i].prompt for i in range(len(t))] for t in tasks]))"
    )
    said = [
        subprocess.Popen(
            [sys.executable, "-c", code, path],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    here = [TASKS["jsonl"]("heldout", path=path), TASKS["addition"]("heldout", digits=1)]
    expected = [[t[i].prompt for i in range(len(t))] for t in here]
    assert all(len(side) > 1 for side in expected)
    assert [json.loads(p.communicate()[0]) for p in said] == [expected, expected]


def test_jsonl_forgives_white_space_around_an_answer_and_nothing_else(tmp_path):
    task = Jsonl("train", path=write(tmp_path / "d.jsonl", [{"prompt": "p", "answer": " 42\n"}]), heldout=0.0)
    example = task[0]
    assert [task.score(example, r) for r in ("42", " 42 ", "\n42\n")] == [1.0, 1.0, 1.0]
    assert [task.score(example, r) for r in ("4 2", "42.", "", "042", "the answer is 42")] == [0.0] * 5


def test_jsonl_keeps_prompt_answer_and_further_keys(tmp_path):
    rows = [{"prompt": "p", "answer": 4, "level": 3}, {"prompt": [{"role": "user", "content": "q"}], "answer": "x"}]
    task = Jsonl("train", path=write(tmp_path / "d.jsonl", rows), heldout=0.0)
    assert (task[0].prompt, task[0].answer, task[0].info) == ("p", "4", {"level": 3})
    assert (task[1].prompt, task[1].answer, task[1].info) == (rows[1]["prompt"], "x", {})


def test_jsonl_rows_end_at_a_newline_and_nowhere_else(tmp_path):
    """U+2028 and U+0085 may stand in a JSON string as they are; str.splitlines() would cut the row there."""
    row = {"prompt": "one\u2028two\x85three", "answer": "a"}
    (tmp_path / "d.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    task = Jsonl("train", path=str(tmp_path / "d.jsonl"), heldout=0.0)
    assert [task[i].prompt for i in range(len(task))] == [row["prompt"]]


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
    assert [w for w in ["d.jsonl", *words] if w not in str(error.value)] == [], error.value


def test_a_file_that_is_no_utf_8_is_refused_by_name_and_a_byte_order_mark_is_no_part_of_a_row(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes('{"prompt": "caf\xe9", "answer": "a"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"d\.jsonl.*UTF-8"):
        Jsonl("train", path=str(path))
    path.write_text('{"prompt": "café", "answer": "a"}', encoding="utf-8-sig")
    assert Jsonl("train", path=str(path), heldout=0.0)[0].prompt == "café"


def test_a_side_without_a_row_is_refused_by_name(tmp_path):
    path = write(tmp_path / "d.jsonl", texts(20))
    for side, share in (("heldout", 0.0), ("train", 1.0)):
        with pytest.raises(UserError, match=side):
            Jsonl(side, path=path, heldout=share)


# The character tokenizer


@given(st.text(alphabet=ALPHABET, max_size=40))
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_every_text_of_printable_characters_survives_encode_and_decode(text):
    """One token a character, spaces and all, and no special token is added on the way."""
    ids = encode(TOKENIZER, text)
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text
    assert not set(ids) & {TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id}


def test_the_alphabet_holds_every_printable_ascii_character():
    assert set(string.printable) - set(ALPHABET) == set("\t\r\x0b\x0c")
    assert len(set(ALPHABET)) == len(ALPHABET) == len(TOKENIZER) - 3
    assert len({TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id}) == 3


def test_an_unknown_character_is_one_unknown_token():
    assert encode(TOKENIZER, "aéb") == [*encode(TOKENIZER, "a"), TOKENIZER.unk_token_id, *encode(TOKENIZER, "b")]


def test_the_tokenizer_is_the_same_after_saving_and_loading(base):
    from transformers import AutoTokenizer

    loaded, text = AutoTokenizer.from_pretrained(base), " a  b\n!? " + ALPHABET
    assert encode(loaded, text) == encode(TOKENIZER, text)
    assert loaded.decode(encode(loaded, text), skip_special_tokens=True) == text


@pytest.mark.parametrize("digits", [1, 2])
def test_every_sum_fits_the_default_room_with_its_eos(digits):
    """A prompt of at most 2·digits + 2 tokens, an answer and its EOS in the 8 tokens that a reply has by default."""
    for side in ("train", "heldout"):
        task = Addition(side, digits=digits)
        for example in (task[i] for i in range(len(task))):
            assert 4 <= len(encode(TOKENIZER, example.prompt)) <= 2 * digits + 2
            assert 2 <= len(encode(TOKENIZER, example.answer)) + 1 <= 8


def test_a_sampled_answer_with_its_eos_is_read_back_as_the_answer():
    """What the judge sees is the text before the EOS; padding behind it is not read."""
    import torch

    task = Addition("train", digits=2)
    answers = [[*encode(TOKENIZER, task[i].answer), TOKENIZER.eos_token_id] for i in (0, 1234, len(task) - 1)]
    ids = torch.tensor([a + encode(TOKENIZER, "7" * (8 - len(a))) for a in answers])
    mask = torch.tensor([[t < len(a) for t in range(8)] for a in answers])
    prompt = torch.zeros(3, 1, dtype=torch.long)
    batch = Batch(prompt, prompt == 0, ids, mask, torch.zeros(3, 8), torch.zeros(3, dtype=torch.bool))
    assert decode(TOKENIZER, batch) == [task[i].answer for i in (0, 1234, len(task) - 1)]
