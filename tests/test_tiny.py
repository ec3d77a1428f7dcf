"""The base model that is made on the spot: for the answers of any task, kept by what it was taught, refused in one line
where it cannot be taught anything."""

import json

import pytest
import torch

from rlkl import tiny
from rlkl.build import model_name
from rlkl.errors import UserError
from rlkl.model import load
from rlkl.scratch import TINY, architecture, character_tokenizer, make_scratch
from rlkl.supervised import collate, item_of
from rlkl.terminal import console
from rlkl.types import Example

LETTERS = [Example(f"{c}:", c.upper()) for c in "abcd"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLKL_CACHE", str(tmp_path))
    return tmp_path


def made(examples, seed=0):
    told = []
    return tiny.cached_base(lambda accuracy, goal: told.append(accuracy), examples, seed), told


def test_supervision_stops_as_soon_as_enough_replies_would_be_right(cache):
    folder, told = made(LETTERS)
    assert told[-1] >= tiny.GOAL > max(told[:-1])
    policy, tokenizer = load(str(folder))
    with torch.no_grad():
        items = [item_of(tokenizer, e.prompt, [e.answer]) for e in LETTERS]
        chance = policy.evaluate(collate(items, tokenizer.pad_token_id)).logprobs.sum(1).exp().mean()
    assert abs(chance.item() - told[-1]) < 0.1, "the model that is saved is the one that was measured"


def test_a_base_is_made_once_for_its_examples_and_anew_for_others(cache, monkeypatch):
    monkeypatch.setattr(tiny, "GOAL", 0.0)
    first, told = made(LETTERS)
    assert told
    assert made(LETTERS) == (first, [])
    other_prompt, other_answer = [*LETTERS[:3], Example("x:", "D")], [*LETTERS[:3], Example("d:", "X")]
    folders = {first, *(made(x)[0] for x in (other_prompt, other_answer, LETTERS[:3])), made(LETTERS, seed=1)[0]}
    assert len(folders) == 5
    assert not list(cache.glob("making-*")), "nothing half made is left"


def test_the_solution_is_taught_where_the_bare_answer_is_not_a_right_reply(cache, monkeypatch):
    """Countdown's answer is its target: what is to be written is an expression."""
    example = Example("2, 3=5: ", "5", {"solution": "2 + 3"})
    assert (example.solution, LETTERS[0].solution) == ("2 + 3", "A")
    tokenizer, batches = character_tokenizer(), []
    monkeypatch.setattr(tiny, "collate", lambda *given: batches.append(collate(*given)) or batches[-1])
    monkeypatch.setattr(tiny, "GOAL", 0.0)
    made([example, LETTERS[0]])
    said = [tokenizer.decode(ids[m]) for b in batches for ids, m in zip(b.response_ids, b.mask, strict=True)]
    assert set(said) == {"2 + 3<eos>", "A<eos>"}
    assert made([example])[0] != made([Example("2, 3=5: ", "5")])[0]


@pytest.mark.parametrize(("examples", "words"), [
    ([Example([{"role": "user", "content": "hello"}], "world")], ["no chat", "task.chat=false", "model.name"]),
    ([Example("hello"), Example("world")], ["taught some answers", "none", "model.name"]),
    ([Example("x" * 300, "y")], ["256 characters", "301", "model.name"]),
])
def test_what_characters_cannot_be_taught_is_one_line_before_anything_is_made(cache, examples, words):
    with pytest.raises(UserError) as error:
        made(examples)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)
    assert not list(cache.iterdir())


def test_a_task_that_is_too_hard_is_given_up_in_one_line(cache, monkeypatch):
    monkeypatch.setattr(tiny, "STEPS", 2)
    with pytest.raises(UserError, match=r"did not reach a sampled accuracy of 0\.25 in 2 steps"):
        made(LETTERS)


def test_the_default_is_the_base_of_addition(cache, monkeypatch):
    monkeypatch.setattr(tiny, "GOAL", 0.0)
    from rlkl.tasks import Addition

    assert model_name("tiny", console) == model_name("tiny", console, Addition("train"))
    assert model_name("tiny", console) != model_name("tiny", console, Addition("train", digits=1))


def test_tiny_and_scratch_are_one_way_to_make_a_model(tmp_path):
    """The same architecture, tokenizer and random stream: only the supervision is tiny's own."""
    settings = json.loads((make_scratch(tmp_path / "fresh", TINY, seed=3) / "config.json").read_text())
    ours = architecture(character_tokenizer()).to_dict()
    sizes = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "max_position_embeddings")
    assert {k: settings[k] for k in sizes} == {k: ours[k] for k in sizes}
    assert (ours["hidden_size"], ours["num_hidden_layers"], ours["intermediate_size"]) == (128, 4, 384)
