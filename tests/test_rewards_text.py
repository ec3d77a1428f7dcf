"""Text rewards: plain functions, TRL's and verl's are called as their libraries call them.

Whatever a function gives or raises becomes a value, and costs no other response its score.
"""

import math
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from rlkl.errors import UserError
from rlkl.rewards import compute_scores, repetition, weighted_sum, with_overlong
from rlkl.rewards.scoring import Scoring, assemble, part_name, scores_and_parts
from rlkl.rewards.text import Row, columns, load_reward, score_rows
from rlkl.types import Batch, Example

CHAT = [{"role": "user", "content": "2+2="}]
EXAMPLES = [
    Example("1+1=", "2", {"level": 1, "ground_truth": "two"}),
    Example("2+2=", "4", {"level": 2}),
]
RESPONSES = ["2", "five"]
ROWS = [Row(EXAMPLES[0], "2", [7, 1]), Row(EXAMPLES[1], "five", [8, 8, 1])]
STATE = SimpleNamespace(global_step=3, max_steps=10)


def load(source: str, tmp_path, **options):
    (tmp_path / "mine.py").write_text(source)
    return load_reward({"name": f"{tmp_path}/mine.py:f", **options})


def values(source: str, tmp_path, rows=ROWS, **options):
    return score_rows(load(source, tmp_path, **options), rows, STATE)


def numbers(source: str, tmp_path, rows=ROWS, **options):
    """The values, where each is a number or None."""
    given = values(source, tmp_path, rows, **options)
    return [value["score"] if isinstance(value, dict) else value for value in given]


@pytest.mark.parametrize("arguments", ["prompt, text", "text", "a, b, c, d", ""])
def test_arguments_that_no_reward_has_are_refused_with_those_that_one_has(tmp_path, arguments):
    message = r"mine.py:f: its arguments \(.*\) are those of no reward: name them \(example, resp"
    with pytest.raises(UserError, match=message):
        load(f"def f({arguments}):\n    return 0.0\n", tmp_path)


@pytest.mark.parametrize(
    "arguments",
    ["prompt, response", "response, example", "response", "response, solution", "a, reply"],
)
def test_a_plain_reward_is_called_by_position_so_its_names_must_be_in_order(tmp_path, arguments):
    with pytest.raises(UserError, match=r"are those of no reward: name them \(example, response\)"):
        load(f"def f({arguments}):\n    return 0.0\n", tmp_path)


def test_where_no_row_has_an_answer_a_trl_function_cannot_read_one(tmp_path):
    rows = [Row(Example("1+1=", "", {"solution": 2}, has_answer=False), "", [1])]
    message = r"^the reward f needs 'answer'; there is solution, prompts, completions"
    with pytest.raises(UserError, match=message):
        values("def f(completions, answer):\n    return [1.0]\n", tmp_path, rows)
    rows = [Row(Example("1+1=", ""), "", [1])]  # an empty answer is one
    assert numbers("def f(completions, answer):\n    return [1.0]\n", tmp_path, rows) == [1.0]


def test_the_logging_of_trl_does_nothing(tmp_path):
    source = (
        "def f(completions, log_extra, log_metric, **kwargs):\n"
        "    log_extra('text', completions)\n    log_metric(name='mean', value=1.0)\n"
        "    return [1.0 for _ in completions]\n"
    )
    assert numbers(source, tmp_path) == [1.0, 1.0]


def test_a_reward_of_three_arguments_and_options_takes_the_batch(tmp_path):
    for arguments in ("examples, responses, batch", "a, b, c, *, size", "*args"):
        assert load(f"def f({arguments}):\n    return 0.0\n", tmp_path, size=1) is None


def test_a_module_in_the_working_directory_is_found(tmp_path, monkeypatch):
    """Also by the command `rlkl`, which does not put that directory on sys.path."""
    (tmp_path / "my_module_of_rewards.py").write_text("def f(example, response):\n    return 0.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [x for x in sys.path if x not in ("", str(tmp_path))])
    assert load_reward({"name": "my_module_of_rewards:f"}) is not None


# ------------------------------------------------------------------ TRL


def test_a_trl_function_is_called_once_by_keyword_with_the_columns_of_the_dataset(tmp_path):
    source = (
        "CALLS = []\n"
        "def f(prompts, completions, completion_ids, trainer_state, answer, level, **kwargs):\n"
        "    CALLS.append(1)\n"
        "    assert len(CALLS) == 1\n"
        "    assert prompts == ['1+1=', '2+2='] and completions == ['2', 'five']\n"
        "    assert completion_ids == [[7, 1], [8, 8, 1]]\n"
        "    assert kwargs.pop('log_extra') == kwargs.pop('log_metric')\n"
        "    assert kwargs == {'ground_truth': ['two', None]}\n"
        "    assert (trainer_state.global_step, trainer_state.max_steps) == (3, 10)\n"
        "    return [float(a == c) + 10 * x for a, c, x in zip(answer, completions, level)]\n"
    )
    assert numbers(source, tmp_path) == [11.0, 20.0]


def test_a_chat_prompt_gives_completions_as_messages(tmp_path):
    rows = [Row(Example(CHAT, "4"), "four")]
    source = (
        "def f(prompts, completions, **kwargs):\n"
        "    pairs = zip(completions, prompts)\n"
        "    return [len(c[0]['content']) + len(c) + len(p) for c, p in pairs]\n"
    )
    assert numbers(source, tmp_path, rows) == [6.0]
    source = (
        "def f(completions, **kwargs):\n"
        "    return [c == [{'role': 'assistant', 'content': 'four'}] for c in completions]\n"
    )
    assert numbers(source, tmp_path, rows) == [1.0]


def test_none_is_not_applicable_and_an_async_function_is_awaited(tmp_path):
    source = (
        "import asyncio\nasync def f(completions, **kwargs):\n    await asyncio.sleep(0.001)\n"
        "    return [None if c == '2' else 0.5 for c in completions]\n"
    )
    assert numbers(source, tmp_path) == [None, 0.5]


def test_a_function_of_the_token_ids_alone_is_a_trl_function(tmp_path):
    source = "def f(completion_ids, **kwargs):\n    return [len(x) for x in completion_ids]\n"
    assert numbers(source, tmp_path) == [2, 3]


def test_a_function_gets_the_arguments_it_names_and_a_keyword_with_a_default_is_an_option(
    tmp_path,
):
    source = (
        "def f(completions, *, answer, scale=2.0):\n"
        "    return [scale * (a == c) for a, c in zip(answer, completions)]\n"
    )
    assert numbers(source, tmp_path) == [2.0, 0.0]
    assert numbers(source, tmp_path, scale=3) == [3.0, 0.0]
    with pytest.raises(UserError, match="has no option 'answer'; it takes scale"):
        load(source, tmp_path, answer="x")


STYLES = {
    "TRL": "completions, level=None, bonus: float = 0",
    "verl": "data_source, solution_str, ground_truth, extra_info=None, bonus: float = 0",
    "plain": "example, response, bonus: float = 0",
}


@pytest.mark.parametrize("parameters", STYLES.values(), ids=STYLES)
def test_an_ordinary_argument_with_a_default_is_an_option(tmp_path, parameters):
    result = "[bonus] * len(completions)" if "completions" in parameters else "bonus"
    source = f"def f({parameters}):\n    return {result}\n"
    assert numbers(source, tmp_path) == [0.0, 0.0]
    assert numbers(source, tmp_path, bonus=0.25) == [0.25, 0.25]
    with pytest.raises(UserError, match=r"has no option 'bonsu'; it takes (level, )?bonus$"):
        load(source, tmp_path, bonsu=1)
    with pytest.raises(UserError, match=r"reward.bonus='x'"):
        load(source, tmp_path, bonus="x")


@pytest.mark.parametrize("argument", ["extra_info", "ground_truth", "answer", "prompts"])
def test_what_a_style_passes_is_no_option(tmp_path, argument):
    source = f"def f(solution_str, {argument}=None):\n    return 1.0\n"
    with pytest.raises(UserError, match=f"has no option '{argument}'; it takes none"):
        load(source, tmp_path, **{argument: 1})


def test_an_argument_with_a_default_is_a_column_of_the_dataset_unless_it_is_set(tmp_path):
    source = "def f(completions, level=(7, 7), **kwargs):\n    return list(level)\n"
    assert numbers(source, tmp_path) == [1.0, 2.0]
    assert numbers(source, tmp_path, level=[5, 6]) == [5.0, 6.0]
    other = [Row(Example("p", "a"), "r")] * 2
    assert numbers(source, tmp_path, other) == [7.0, 7.0]


def test_an_option_whose_annotation_cannot_be_read_takes_anything(tmp_path):
    source = (
        "from __future__ import annotations\n"
        "import threading\n"
        "def f(solution_str, limit: OnlyForTypeCheckers = None, lock: threading.Thread = None):\n"
        "    return limit or 2\n"
    )
    assert numbers(source, tmp_path) == [2.0, 2.0]
    assert numbers(source, tmp_path, limit=3) == [3.0, 3.0]


def test_a_missing_column_is_one_line_that_names_those_of_the_dataset(tmp_path):
    source = "def f(completions, solution, **kwargs):\n    return [0.0] * len(completions)\n"
    message = "needs 'solution'; there is answer, level, ground_truth, prompts"
    with pytest.raises(UserError, match=message):
        values(source, tmp_path)


def test_columns_of_a_mixed_dataset_have_a_value_for_every_response():
    assert columns(EXAMPLES) == {
        "answer": ["2", "4"],
        "level": [1, 2],
        "ground_truth": ["two", None],
    }


# ------------------------------------------------------------------ verl, and plain


def test_a_verl_function_gets_the_answer_and_the_rest_of_the_row(tmp_path):
    source = (
        "def f(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    assert data_source == '' and extra_info['level'] in (1, 2)\n"
        "    return {'score': 0.5 + (solution_str == ground_truth), 'acc': True}\n"
    )
    assert numbers(source, tmp_path) == [1.5, 0.5]
    info = {"data_source": "gsm8k", "extra_info": {"index": 5}}
    source = (
        "def f(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n"
        "    return (data_source == 'gsm8k') + extra_info['index']\n"
    )
    assert numbers(source, tmp_path, [Row(Example("p", "a", info), "a")]) == [6.0]


def test_a_plain_function_scores_an_example_and_a_response_perhaps_in_parts(tmp_path):
    source = (
        "def f(example, response, *, bonus=1.0):\n"
        "    return {'right': response == example.answer, 'short': bonus * (len(response) < 2)}\n"
    )
    given = values(source, tmp_path, bonus=0.25)
    assert given == [{"right": 1.0, "short": 0.25}, {"right": 0.0, "short": 0.0}]
    scores, parts = scores_and_parts(given, failed=0.0)
    assert scores == [1.25, 0.0]
    assert {name: x.tolist() for name, x in parts.items()} == {
        "right": [1, 0],
        "short": [0.25, 0],
        "failed": [0, 0],
    }


def test_a_plain_function_that_calls_the_response_reply_still_works(tmp_path):
    source = "def f(example, reply):\n    return float(reply == example.answer)\n"
    assert numbers(source, tmp_path) == [1.0, 0.0]


def test_a_reward_that_takes_the_batch_is_no_text_reward(tmp_path):
    assert load("def f(examples, responses, batch):\n    return [0.0], {}\n", tmp_path) is None


# ------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('level')", "raised KeyError: \"'level'\""),
        ("raise SystemExit(3)", "raised SystemExit: '3'"),
        ("return float('nan')", "gave no number but a float: nan"),
        ("return float('inf')", "gave no number but a float: inf"),
        ("return '1.0'", "gave no number but a str: '1.0'"),
        ("return [1.0]", "gave no number but a list: [1.0]"),
        ("return 10 ** 5000", "gave no number but a int: too long to show"),
        ("return 'x' * 10**7", "gave no number but a str: 'xxxxxxxxxxxx...xxxxxxxxxxxxx'"),
        ("return f(example, response)", "raised RecursionError: 'maximum recursion depth"),
        ("raise Mute", "raised Mute: 'its message cannot be read'"),
        ("raise ValueError('\\ud800\\x1b[2J')", "raised ValueError: '\\ud800\\x1b[2J'"),
    ],
)
def test_a_failure_on_one_response_is_described_in_a_line_and_hurts_no_other(
    tmp_path, body, message
):
    source = (
        "class Mute(Exception):\n    def __str__(self):\n        raise ValueError\n"
        f"def f(example, response):\n    if response == '2':\n        return 1\n    {body}\n"
    )
    good, bad = values(source, tmp_path)
    assert good == {"score": 1.0}
    assert bad.startswith(message)
    assert len(bad) < 400
    assert bad.isprintable()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "raised ValueError: 'it gave 1 scores for 2 completions'"),
        ("return 1.0", "raised TypeError: 'it gave a float, not a list'"),
        ("raise OSError('down')", "raised OSError: 'down'"),
    ],
)
def test_a_trl_function_that_fails_as_a_whole_fails_on_every_response(tmp_path, body, message):
    source = f"def f(completions, **kwargs):\n    {body}\n"
    assert values(source, tmp_path) == [message, message]


def test_a_trl_function_that_gives_one_bad_value_fails_on_that_response_alone(tmp_path):
    source = (
        "import torch\ndef f(completions, **kwargs):\n"
        "    return torch.tensor([1.0, float('nan')])\n"
    )
    good, bad = values(source, tmp_path)
    assert good == {"score": 1.0}
    assert bad.startswith("gave no number")


def test_a_function_that_draws_at_random_draws_the_same_again_in_any_order(tmp_path):
    source = "import random\ndef f(example, response):\n    return random.random()\n"
    first = values(source, tmp_path)
    assert first == values(source, tmp_path)
    assert first == values(source, tmp_path, ROWS[::-1])[::-1]


# ------------------------------------------------------------------ weights and parts


def make_batch() -> Batch:
    ids = torch.tensor([[7, 1, 0], [8, 8, 1]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    return Batch(ids, mask, ids, mask, torch.zeros(2, 3), torch.zeros(2, dtype=torch.bool))


def scores_of(reward):
    return compute_scores(reward, EXAMPLES, RESPONSES, make_batch())


def constant(*scores):
    return lambda examples, responses, batch: (list(scores), {})


def test_the_total_is_the_weighted_sum_and_each_part_is_named_unweighted():
    rewards = [("a", 0.5, constant(1.0, 2.0)), ("b", -1.0, constant(3.0, 0.0))]
    scores, parts = scores_of(weighted_sum(rewards))
    assert scores.tolist() == [-2.5, 1.0]
    assert {name: x.tolist() for name, x in parts.items()} == {"a": [1, 2], "b": [3, 0]}


def test_a_part_that_is_none_is_left_out_and_a_row_without_any_part_has_no_score():
    rewards = [("a", 0.5, constant(None, 2.0)), ("b", 2.0, constant(None, None))]
    scores, parts = scores_of(weighted_sum(rewards))
    assert math.isnan(scores[0])
    assert scores[1] == 1.0
    assert parts["b"].isnan().all()


def test_overlong_does_not_make_a_score_where_there_is_none():
    scores, parts = scores_of(with_overlong(constant(None, 2.0), 3, 2, 1.0))
    assert math.isnan(scores[0])
    assert scores[1] == 1.0
    assert parts["overlong"].tolist() == [-0.5, -1.0]


def test_a_nan_that_is_not_a_none_is_an_error_within_a_sum_too():
    def broken(examples, responses, batch):
        return torch.tensor([0.0, float("nan")]), {}

    rewards = [("a", 1.0, constant(1.0, 1.0)), ("b", 1.0, broken)]
    message = r"^the reward broken gave nan for the response 'five' to '2"
    with pytest.raises(UserError, match=message):
        scores_of(weighted_sum(rewards))


def test_repetition_is_the_share_of_n_grams_that_came_before():
    ids = torch.tensor(
        [[5, 6, 5, 6, 5, 6], [1, 2, 3, 4, 5, 6], [9, 9, 9, 9, 0, 0], [9, 0, 0, 0, 0, 0]]
    )
    mask = torch.arange(6) < torch.tensor([6, 6, 4, 1])[:, None]
    batch = Batch(ids, mask, ids, mask, torch.zeros(4, 6), torch.zeros(4, dtype=torch.bool))
    # Repeated bigrams: 3 of 5; none of 5; 2 of 3; the last response is too short.
    scores, _ = repetition([], [], batch, n=2)
    torch.testing.assert_close(scores, -torch.tensor([3 / 5, 0.0, 2 / 3, 0.0]))
    scores, _ = repetition([], [], batch, n=1, coef=2.0)
    torch.testing.assert_close(scores, -2 * torch.tensor([4 / 6, 0.0, 3 / 4, 0.0]))


# ------------------------------------------------------------------ the `reward:` section


def scoring(say=print) -> Scoring:
    return Scoring(0, seconds=5.0, failed=-1.0, memory_gb=4.0, steps=10, say=say)


def test_sections_are_summed_by_weight_and_a_kind_of_failure_is_counted_and_shown_once(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def f(example, response):\n    return 1 / (len(response) - 1)\n"
        "def g(completions, **kwargs):\n    return [None, 4.0]\n"
    )
    sections = [
        {"name": "task"},
        {"name": f"{tmp_path}/mine.py:f", "weight": 3},
        {"name": f"{tmp_path}/mine.py:f"},
        {"name": f"{tmp_path}/mine.py:g", "weight": 0.5},
    ]
    printed = []
    reward = assemble(sections, constant(0.0, 0.25), scoring(printed.append))
    for _ in range(2):
        scores, parts = scores_of(reward)
    torch.testing.assert_close(scores, torch.tensor([-4.0, 0.25 + 4 / 3 + 2.0]))
    assert list(parts) == ["task", "f", "f/failed", "f-2", "f-2/failed", "g", "g/failed", "failed"]
    assert parts["failed"].tolist() == [1, 0]
    (line,) = printed
    failure = "f raised ZeroDivisionError: 'division by zero', for the response '2' to '1+1='"
    assert f"{failure}: it scores -1; rewards/failed counts" in line


def test_parts_of_one_name_are_numbered_whatever_others_begin_with_it():
    assert [part_name("a.py:f", taken) for taken in ([], ["f"], ["f", "f-2"])] == [
        "f",
        "f-2",
        "f-3",
    ]
    assert part_name("a.py:f", ["foo", "f"]) == "f-2"


def test_one_section_without_a_weight_is_the_reward_itself():
    task = constant(1.0, 2.0)
    assert assemble([{"name": "task"}], task, scoring()).func is task
    scores, parts = scores_of(assemble([{"name": "task", "weight": 0.5}], task, scoring()))
    assert scores.tolist() == [0.5, 1.0]
    assert parts["task"].tolist() == [1.0, 2.0]


def test_an_unknown_name_names_the_choices():
    choices = r"reward.name='nope': choose repetition, judge, reward_model, task, file.py:function"
    with pytest.raises(UserError, match=choices):
        assemble([{"name": "nope"}], constant(), scoring())


def test_an_option_goes_to_its_own_part():
    reward = assemble([{"name": "repetition", "n": 1, "coef": 3.0}], constant(), scoring())
    assert isinstance(reward, partial)
    assert scores_of(reward)[0].tolist() == [0.0, -1.0]


def test_with_overlong_the_score_before_it_is_a_part_also_where_failures_are_counted(tmp_path):
    (tmp_path / "mine.py").write_text("def f(example, response):\n    return 3.0\n")
    reward = assemble([{"name": f"{tmp_path}/mine.py:f"}], constant(0.0, 0.0), scoring())
    scores, parts = scores_of(with_overlong(reward, 1, 1, 0.5))
    assert parts["score"].tolist() == [3.0, 3.0]
    torch.testing.assert_close(scores, parts["score"] + parts["overlong"])
    assert parts["overlong"].any()
