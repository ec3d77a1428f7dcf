"""Held-out evaluation: accuracy, greedy and pass@k; stop strings; any number of rows at once."""

from pathlib import Path

import pytest
from finished_runs import ENDS
from runs_fixture import PPO, arguments, rows, run

import train
from rlkl.errors import UserError
from rlkl.run import config
from rlkl.run.build import build
from rlkl.run.evaluate import evaluate, pass_at_k, stop_function
from rlkl.supervised.tiny import character_tokenizer
from rlkl.types import Example

pytest_plugins = ("runs_fixture",)
pytestmark = pytest.mark.usefixtures("here")


def configuration(base, *options):
    sizes = ("eval.prompts=20", "model.dtype=float64", "scoring.processes=0")
    return config.load(arguments(base, *PPO, *sizes, *options))


def evaluated(base, *options, samples=2):
    """Every response that was graded, and the metrics."""
    cfg = configuration(base, *options)
    models, _, data = build(cfg, train.generate_and_score)
    responses = []

    def reward(examples, texts, batch):
        responses.extend(texts)
        return data.heldout.reward(examples, texts, batch)

    heldout = data.heldout._replace(reward=reward)
    return responses, evaluate(cfg, models, heldout, samples=samples)


def test_the_numbers_do_not_depend_on_how_many_rows_are_sampled_at_once(base):
    results = [evaluated(base, f"sampling.prompts={n}", "optim.minibatch=4") for n in (1, 3, 40)]
    assert results[0] == results[1] == results[2]
    responses, metrics = results[0]
    assert len(responses) == 20 * 2 + 20, "two sampled and one greedy response to each prompt"
    assert 0 < metrics["accuracy"] < 1, "numbers that could differ"


def test_a_response_is_correct_if_its_score_is_at_least_1(base):
    cfg = configuration(base)
    models, _, data = build(cfg, train.generate_and_score)

    def reward(examples, texts, batch):
        return [0.9, 1.0, 1.5, None] * (len(texts) // 4), {}

    metrics = evaluate(cfg, models, data.heldout._replace(reward=reward), samples=2)
    assert metrics["accuracy"] == metrics["greedy"] == 0.5


def test_held_out_prompts_too_few_to_mean_much_are_noted(base, capsys):
    build(configuration(base, "eval.prompts=20"), train.generate_and_score)
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "held-out prompts" in line]
    assert "only 20," in note
    assert "up to 0.11;" in note  # 0.5 / sqrt(20)
    build(configuration(base, "task=addition", "eval.prompts=30"), train.generate_and_score)
    assert "held-out prompts" not in capsys.readouterr().out


def test_accuracy_greedy_and_pass_at_k_are_counted_over_the_graded_responses(base):
    """A response with a digit is correct. Sampled ones come first, the k of a prompt together."""
    responses, metrics = evaluated(base, samples=3)
    correct = [any(c.isdigit() for c in response) for response in responses]
    sampled, greedy = correct[:60], correct[60:]
    assert metrics["accuracy"] == pytest.approx(sum(sampled) / 60)
    assert metrics["greedy"] == pytest.approx(sum(greedy) / 20)
    solved = sum(any(sampled[i : i + 3]) for i in range(0, 60, 3))
    assert metrics["pass@3"] == pytest.approx(solved / 20)
    assert metrics["accuracy"] < metrics["pass@3"]


def test_pass_at_k_is_the_chance_that_one_of_k_draws_is_correct():
    assert pass_at_k(n=4, correct=1, k=2) == pytest.approx(1 / 2)
    assert pass_at_k(n=4, correct=2, k=2) == pytest.approx(5 / 6)
    assert pass_at_k(n=4, correct=0, k=2) == 0
    assert pass_at_k(n=4, correct=3, k=2) == 1


def test_two_copies_of_a_prompt_are_two_prompts_to_pass_at_k(base, monkeypatch):
    """The first copy has one correct response of two, and so has the second."""
    cfg = configuration(base)
    models, _, data = build(cfg, train.generate_and_score)
    graded = [(0, True, {}), (0, False, {}), (1, True, {}), (1, False, {})]
    monkeypatch.setattr("rlkl.run.evaluate.graded_responses", lambda *args, **options: iter(graded))
    heldout = data.heldout._replace(examples=[Example("1+1=", "2"), Example("1+1=", "2")])
    metrics = evaluate(cfg, models, heldout, samples=2)
    assert metrics["accuracy"] == 0.5
    assert metrics["pass@2"] == 1.0


@pytest.mark.parametrize("backend", ["cached", "naive", "engine"])
def test_a_response_ends_with_its_first_stop_string_and_is_otherwise_the_same(base, backend):
    stops = ("7", "3", "12", "0")
    full, _ = evaluated(base)
    stopped, _ = evaluated(base, f"eval.stop={list(stops)}", f"sampling.backend={backend}")

    def cut(text: str) -> str:
        ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
        return text[: min(ends, default=len(text))]

    assert stopped == [cut(text) for text in full]
    assert 10 < sum(a != b for a, b in zip(full, stopped, strict=True)) < len(full)


def test_stop_strings_count_in_held_out_accuracy_and_in_no_rollout(base):
    """The task of ends.py pays a response whose only digit is its last character.

    With every digit a stop string, that is every response with a digit.
    """
    Path("ends.py").write_text(ENDS)
    options = (*PPO, "optim.steps=2", "eval.every=1", "eval.prompts=20", "scoring.processes=0")
    digits = rows(run(base, *options, "run=digits"))
    ends = rows(run(base, *options, "run=ends", "task=ends.py:Digits"))
    stop = f"eval.stop={list('0123456789')}"
    stopped = rows(run(base, *options, "run=stopped", "task=ends.py:Digits", stop))
    for row, ends_row, stopped_row in zip(digits, ends, stopped, strict=True):
        assert row["eval/accuracy"] == stopped_row["eval/accuracy"] > ends_row["eval/accuracy"]
        for name in ("reward", "response_length"):
            assert row[name] == ends_row[name] == stopped_row[name]


def test_a_stop_string_may_be_a_special_token_and_may_span_several():
    tokenizer = character_tokenizer()
    stop = stop_function(tokenizer, ["ab", "<unk>"])
    expected = {"a": False, "xab": True, "a b": False, "é": True}
    assert {text: stop(tokenizer(text).input_ids) for text in expected} == expected
    assert stop_function(tokenizer, []) is None


def test_an_empty_stop_string_is_refused():
    """Every text contains it."""
    with pytest.raises(UserError, match=r"eval\.stop\.1=''"):
        config.load(["eval.stop=['a', '']"])


def test_the_samples_of_a_prompt_are_together_even_if_they_are_more_than_a_rollout(base):
    assert configuration(base).sampling.rows == 16
    _, metrics = evaluated(base, samples=30)
    assert 0 <= metrics["accuracy"] <= metrics["pass@30"] <= 1
