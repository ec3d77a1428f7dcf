"""The tiny base model: trained on the answers of any task, cached by its examples."""

import json

import pytest
import torch

from rlkl.errors import UserError
from rlkl.policy.model import load
from rlkl.run.build import model_name
from rlkl.supervised import tiny
from rlkl.supervised.data import collate, tokenize
from rlkl.supervised.scratch import TINY, architecture, character_tokenizer, make_scratch
from rlkl.tasks import Addition
from rlkl.types import Example

LETTERS = [Example(f"{c}:", c.upper()) for c in "abcd"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLKL_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def untrained(cache, monkeypatch):
    """The cache, where a base model is ready before its first training step."""
    monkeypatch.setattr(tiny, "GOAL", 0.0)
    return cache


def make(examples, seed=0):
    """The folder, and the accuracies that were measured while the model was trained."""
    accuracies = []
    folder = tiny.cached_base(lambda accuracy, goal: accuracies.append(accuracy), examples, seed)
    return folder, accuracies


def test_training_stops_as_soon_as_enough_responses_would_be_correct(cache):
    """And the model that is saved is the one that was measured."""
    folder, accuracies = make(LETTERS)
    assert accuracies[-1] >= tiny.GOAL > max(accuracies[:-1])
    policy, tokenizer = load(str(folder))
    items = [tokenize(tokenizer, e.prompt, [e.answer]) for e in LETTERS]
    with torch.no_grad():
        logprobs = policy(collate(items, tokenizer.pad_token_id)).logprobs
    assert abs(logprobs.sum(1).exp().mean().item() - accuracies[-1]) < 0.1


def test_a_base_is_made_once_for_its_examples_and_again_for_others(untrained):
    first, accuracies = make(LETTERS)
    assert accuracies
    assert make(LETTERS) == (first, [])
    other_prompt = [*LETTERS[:3], Example("x:", "D")]
    other_answer = [*LETTERS[:3], Example("d:", "X")]
    folders = {make(examples)[0] for examples in (other_prompt, other_answer, LETTERS[:3])}
    folders |= {first, make(LETTERS, seed=1)[0]}
    assert len(folders) == 5
    assert not list(untrained.glob("making-*")), "an unfinished folder is left"


def test_the_solution_is_taught_where_the_answer_is_not_a_correct_response(untrained, monkeypatch):
    """Countdown's answer is its target number; a correct response is an expression."""
    example = Example("2, 3=5: ", "5", {"solution": "2 + 3"})
    assert example.solution == "2 + 3"
    assert LETTERS[0].solution == "A"
    batches = []

    def record_and_collate(*args):
        batches.append(collate(*args))
        return batches[-1]

    monkeypatch.setattr(tiny, "collate", record_and_collate)
    make([example, LETTERS[0]])
    tokenizer = character_tokenizer()
    taught = {tokenizer.decode(ids) for batch in batches for ids in batch.responses()}
    assert taught == {"2 + 3<eos>", "A<eos>"}
    assert make([example])[0] != make([Example("2, 3=5: ", "5")])[0]


@pytest.mark.parametrize(
    ("examples", "words"),
    [
        (
            [Example([{"role": "user", "content": "hello"}], "world")],
            ["no chat", "task.chat=false", "model.name"],
        ),
        ([Example("hello"), Example("world")], ["taught some answers", "none", "model.name"]),
        ([Example("x" * 300, "y")], ["256 characters", "301", "model.name"]),
    ],
    ids=["chat", "no answers", "too long"],
)
def test_examples_that_cannot_be_taught_are_refused_before_anything_is_made(cache, examples, words):
    with pytest.raises(UserError) as error:
        make(examples)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)
    assert not list(cache.iterdir())


def test_a_task_that_is_too_hard_is_given_up(cache, monkeypatch):
    monkeypatch.setattr(tiny, "STEPS", 2)
    with pytest.raises(UserError, match=r"did not reach a sampled accuracy of 0\.25 in 2 steps"):
        make(LETTERS)


def test_the_default_is_the_base_of_addition(untrained):
    assert model_name("tiny") == model_name("tiny", Addition("train"))
    assert model_name("tiny") != model_name("tiny", Addition("train", digits=1))


def test_scratch_makes_the_architecture_of_tiny(tmp_path):
    folder = make_scratch(tmp_path / "fresh", TINY, seed=3)
    scratch = json.loads((folder / "config.json").read_text())
    expected = architecture(character_tokenizer()).to_dict()
    for name in ("vocab_size", "max_position_embeddings"):
        assert scratch[name] == expected[name]
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 384}
    for name, size in sizes.items():
        assert scratch[name] == expected[name] == size
