"""The tiny base model: it imitates a teacher of any task, and is cached by its examples."""

import json

import pytest
import torch

from rlkl.errors import UserError
from rlkl.policy.model import load
from rlkl.run.build import model_name
from rlkl.run.terminal import console
from rlkl.supervised import tiny
from rlkl.supervised.data import collate, tokenize
from rlkl.supervised.muon import Muon, orthogonalize
from rlkl.supervised.scratch import TINY, architecture, character_tokenizer, make_scratch
from rlkl.tasks import Addition
from rlkl.types import Example

LETTERS = [Example(f"{c}:", c.upper(), {"mistake": c}) for c in "abcd"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLKL_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def untrained(cache, monkeypatch):
    """The cache, where a base model is ready after one training step."""
    monkeypatch.setattr(tiny, "STEPS", 1)
    return cache


def make(examples, seed=0):
    """The folder, and the steps that were reported while the model was trained."""
    steps = []
    folder = tiny.cached_base(lambda *step: steps.append(step), examples, seed)
    return folder, steps


# ------------------------------------------------------------------ the teacher


def test_the_teacher_is_right_one_time_in_three_and_else_makes_the_mistake_of_the_task():
    example = Example("47+85=", "231", {"mistake": "22"})
    answers = tiny.teacher(example, Example("1+1=", "2"))
    assert answers == {"231": pytest.approx(1 / 3), "22": pytest.approx(2 / 3)}


def test_without_a_mistake_of_the_task_the_teacher_gives_the_solution_of_another_example():
    """Countdown's answer is its target number; a correct response is an expression."""
    example = Example("2, 3=5: ", "5", {"solution": "2 + 3"})
    other = Example("2, 3=6: ", "6", {"solution": "2 * 3"})
    assert tiny.teacher(example, other) == {"2 + 3": tiny.RIGHT, "2 * 3": 1 - tiny.RIGHT}


def test_a_mistake_that_is_right_is_the_only_answer():
    example = Example("12+34=", "64", {"mistake": "64"})
    assert tiny.teacher(example, LETTERS[0]) == {"64": 1.0}
    assert tiny.teacher(Example("a", "b"), Example("c", "b")) == {"b": 1.0}


@pytest.mark.parametrize("digits", [1, 2])
def test_the_mistake_of_addition_is_to_forget_every_carry(digits):
    task = Addition("train", digits=digits)
    for i in range(0, len(task), max(1, len(task) // 500)):
        example = task[i]
        a, b = example.prompt.removesuffix("=").split("+")
        columns = [str((int(x) + int(y)) % 10) for x, y in zip(a, b, strict=True)]
        without_zeros = "".join(columns).lstrip("0") or "0"
        assert example.info["mistake"] == without_zeros[::-1], example.prompt


def test_a_lesson_is_every_answer_of_the_teacher_with_its_probability():
    tokenizer = character_tokenizer()
    batch, probabilities = tiny.lesson(tokenizer, LETTERS)
    assert len(batch) == len(probabilities) == 2 * tiny.BATCH
    assert probabilities.sum().item() == pytest.approx(tiny.BATCH)
    rows = zip(batch.prompt_ids, batch.responses(), probabilities.tolist(), strict=True)
    for prompt_ids, response_ids, probability in rows:
        letter = tokenizer.decode(prompt_ids)[0]
        answers = {f"{letter.upper()}<eos>": tiny.RIGHT, f"{letter}<eos>": 1 - tiny.RIGHT}
        assert probability == pytest.approx(answers[tokenizer.decode(response_ids)])


def test_every_lesson_draws_afresh_which_examples_it_has_and_which_mistakes():
    tokenizer = character_tokenizer()
    examples = [Example("a:", c) for c in "abcdefgh"]
    torch.manual_seed(0)
    lessons = [tiny.lesson(tokenizer, examples)[0] for _ in range(2)]
    first, second = (["".join(map(str, ids)) for ids in lesson.responses()] for lesson in lessons)
    assert first != second
    assert len(set(first)) == len(examples)


# ------------------------------------------------------------------ the training


def test_a_base_does_what_the_teacher_does_as_often(cache, monkeypatch):
    monkeypatch.setattr(tiny, "STEPS", 40)
    monkeypatch.setattr(tiny, "BATCH", 16)
    folder, _ = make(LETTERS)
    policy, tokenizer = load(str(folder))
    for name, expected in (("solution", 1 / 3), ("mistake", 2 / 3)):
        answers = [e.solution if name == "solution" else e.info["mistake"] for e in LETTERS]
        rows = zip(LETTERS, answers, strict=True)
        items = [tokenize(tokenizer, e.prompt, [answer]) for e, answer in rows]
        with torch.no_grad():
            logprobs = policy(collate(items, tokenizer.pad_token_id)).logprobs
        assert logprobs.sum(1).exp().tolist() == pytest.approx([expected] * 4, abs=0.1), name


def test_a_base_is_trained_for_a_fixed_number_of_steps_which_are_reported(cache, monkeypatch):
    monkeypatch.setattr(tiny, "STEPS", 3)
    for examples in (LETTERS, [Example("hello", "")] * 2 + LETTERS):
        assert make(examples)[1] == [(0, 3), (1, 3), (2, 3)]


def test_while_the_base_is_made_the_terminal_says_which_step_it_is_at(untrained, monkeypatch):
    said = []
    status = type(console.status(""))
    monkeypatch.setattr(status, "update", lambda self, text: said.append(text))
    model_name("tiny", Addition("train", digits=1))
    assert said == ["making the tiny base model, once: step 0 of 1"]


def test_muon_moves_as_torch_does_but_in_float32():
    """torch computes the direction in bfloat16, so it agrees to two digits."""
    torch.manual_seed(0)
    for shape in ((8, 8), (6, 20), (20, 6)):
        ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
        muon = Muon([ours], lr=0.1, momentum=0.9)
        options = {"momentum": 0.9, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
        oracle = torch.optim.Muon([theirs], lr=0.1, **options)
        for _ in range(3):
            ours.grad = torch.randn(shape)
            theirs.grad = ours.grad.clone()
            muon.step()
            oracle.step()
        moved = (theirs - 1).norm()
        assert (ours - theirs).norm() < 0.03 * moved
        assert moved > 0.1


def test_orthogonalised_singular_values_are_near_one_and_zero_stays_zero():
    torch.manual_seed(0)
    for shape in ((16, 16), (8, 24), (24, 8)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape) * 1e-4))
        assert values.min() > 0.3
        assert values.max() < 1.3
    assert not orthogonalize(torch.zeros(3, 4)).any()


# ------------------------------------------------------------------ the cache


def test_a_base_is_made_once_for_its_examples_and_again_for_others(untrained):
    first, steps = make(LETTERS)
    assert steps
    assert make(LETTERS) == (first, [])
    others = [
        Example("x:", "D", {"mistake": "d"}),
        Example("d:", "X", {"mistake": "d"}),
        Example("d:", "D", {"mistake": "x"}),
        Example("d:", "D", {"mistake": "d", "solution": "x"}),
    ]
    folders = {make([*LETTERS[:3], other])[0] for other in others}
    folders |= {first, make(LETTERS[:3])[0], make(LETTERS, seed=1)[0]}
    assert len(folders) == len(others) + 3
    assert not list(untrained.glob("making-*")), "an unfinished folder is left"


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
