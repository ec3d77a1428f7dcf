"""The judges of gsm8k, math, countdown and reasoning_gym: what is right, what is wrong, what is never run."""

import ast
import contextlib
import itertools
import random
import re
import resource
import threading
import time
from fractions import Fraction

import pytest

from rlkl import limits
from rlkl.errors import UserError
from rlkl.tasks.arithmetic import evaluate
from rlkl.tasks.bounded import bounded
from rlkl.tasks.countdown import Countdown
from rlkl.tasks.extract import boxed, tagged
from rlkl.tasks.gsm8k import PROMPT, flexible, strict
from rlkl.tasks.gym import ReasoningGym, evaluates, harmless
from rlkl.tasks.mathematics import Mathematics
from rlkl.types import Example


# gsm8k
@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("so 3 + 4 = 7\n#### 7", (7, 7)), ("#### 7 apples", (7, 7)), ("####7", (7, 7)), ("#### $7", (7, 7)),
        ("#### 7.", (7, 7)), ("#### 7.0", (7, 7)), ("#### -7", (-7, -7)), ("#### 1,234", (1234, 1234)),
        ("#### 7\n#### 8", (8, 8)), ("#### 7, not 8", (7, 8)), ("it is 7", (None, 7)), ("7 ####", (None, 7)),
        ("#### seven, 7", (None, 7)), ("#### 7 ####", (None, 7)), ("", (None, None)), ("#### ٣", (None, None)),
        ("it is 3.50.", (None, Fraction("3.5"))), ("#### " + "9" * 50, (None, None)), ("7 of 10%", (None, 10)),
    ],
)
def test_strict_reads_behind_the_last_mark_and_flexible_the_last_number(reply, found):
    assert (strict(reply), flexible(reply)) == found


VERL = {  # the patterns of verl/utils/reward_score/gsm8k.py, whose matches are compared with the answer as text
    "strict": r"#### (\-?[0-9\.\,]+)", "flexible": r"(\-?[0-9\.\,]+)"}


@pytest.mark.parametrize(
    ("reply", "verl", "ours"),
    [
        ("#### 42", (1, 1), (1, 1)), ("#### 42 eggs", (1, 1), (1, 1)), ("the answer is 42", (0, 1), (0, 1)),
        ("#### 42.", (0, 0), (1, 1)), ("#### 42.0", (0, 0), (1, 1)), ("####42", (0, 1), (1, 1)),
        ("#### $42", (0, 1), (1, 1)), ("the answer is 42.", (0, 0), (0, 1)), ("#### 41", (0, 0), (0, 0)),
    ],
)
def test_whatever_verl_takes_for_right_is_right_and_what_is_right_beside_is_listed(reply, verl, ours):
    """docs/tasks.md says the same in words."""
    found = {name: re.findall(pattern, reply) for name, pattern in VERL.items()}
    last = next((x for x in reversed(found["flexible"]) if x not in ("", ".")), None)
    assert (bool(found["strict"]) and found["strict"][-1].replace(",", "") == "42", last == "42") == verl
    assert (strict(reply) == 42, flexible(reply) == 42) == ours
    assert all(a <= b for a, b in zip(verl, ours, strict=True))


def test_the_prompt_of_gsm8k_ends_in_the_words_of_the_recipe_that_its_numbers_are_compared_with():
    assert PROMPT == '{question} Let\'s think step by step and output the final answer after "####".'


# math
def score(answer: str, reply: str) -> float:
    return Mathematics.score(Mathematics.__new__(Mathematics), Example("p", answer), reply)


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        (r"\frac{1}{2}", r"\boxed{\frac{1}{2}}"), (r"\frac{1}{2}", r"\boxed{0.5}"), ("1000", r"\boxed{1{,}000}"),
        (r"\frac12", r"$\boxed{\dfrac{1}{2}}$."), ("42", "The answer is 42."), ("42", "so $x = 42$"), ("42",
        r"\boxed{41} no, \boxed{42}"), ("42", r"\boxed 42."),
        ("x^2+2x+1", r"\boxed{(x+1)^2}"), ("(1,2)", r"\boxed{(1, 2)}"), (r"\text{Evelyn}", r"\boxed{Evelyn}"),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}"), (r"\{1,2\}", r"\boxed{\{2, 1\}}"),
    ],
)
def test_math_takes_what_is_equal_in_a_box_or_at_the_end(answer, reply):
    assert score(answer, reply) == 1.0


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        ("42", r"\boxed{41}"), ("42", r"\boxed{42} no, \boxed{41}"), ("42", "42 or 41"),
        ("42", ""),         ("42", r"\boxed{}"), ("x", r"\boxed{99^{98^{97}}}"), ("x", r"\boxed{(9999999!)!}"), ("x",
        "99**98**97"),
        ("42", r"\boxed{42"), ("x^2+2x+1", r"\boxed{(x+1)^3}"), ("(1,2)", r"\boxed{(2,1)}"), ("42", "I do not know"),
    ],
)
def test_math_refuses_what_is_not(answer, reply):
    assert score(answer, reply) == 0.0


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        (r"a \boxed{1} b \boxed{\frac{1}{2}} c", r"\frac{1}{2}"), (r"\fbox{3}", "3"), (r"\boxed 7$.", "7"),
        (r"\boxed 7.", "7"),
        (r"\boxed{1}, \boxed{2", None), ("none", None), (r"\boxed", None), (r"\boxed{}", None),
        (r"\boxed{" + "1" * 400 + "}", None), (r"\boxed{" + "{" * 50 + "}" * 50 + "}", "{" * 50 + "}" * 50),
    ],
)
def test_the_last_box_is_read_to_its_own_bracket(reply, found):
    assert boxed(reply, 300) == found


def test_the_verdict_is_the_same_in_a_thread_where_no_signal_comes():
    """math-verify's own time limit raises there."""
    said = []
    cases = [("42", r"\boxed{42.0}"), ("42", r"\boxed{43}"), (r"\frac12", r"\boxed{0.5}")]
    thread = threading.Thread(target=lambda: said.extend(score(*case) for case in cases))
    thread.start()
    thread.join()
    assert said == [score(*case) for case in cases] == [1.0, 0.0, 1.0]


# bounded
def swallows():
    """Two seconds of a judge that catches whatever it can."""
    end = time.thread_time() + 2
    while time.thread_time() < end:
        with contextlib.suppress(Exception):
            while time.thread_time() < end:
                sum(range(1000))


class Buries:
    """A destructor that takes its time: what is raised in it is ignored by Python, and printed."""

    def __del__(self):
        end = time.thread_time() + 0.3
        while time.thread_time() < end:
            pass


def test_a_tick_in_a_destructor_is_lost_without_a_word(monkeypatch):
    printed = []
    monkeypatch.setattr("sys.unraisablehook", lambda unraisable: printed.append(unraisable.exc_type))
    assert bounded(lambda: [Buries() for _ in range(3)] and 1.0, otherwise=-1.0, seconds=0.05) in (1.0, -1.0)
    assert printed == []


def deep(n=0):
    return deep(n + 1)


HANG = {"loop": swallows, "deep": deep, "power": lambda: 99 ** 98 ** 97, "raise": lambda: 1 / 0,
        "memory": lambda: len(bytes(2**29)), "one long operation": lambda: (1 << 2**33).bit_length()}


@pytest.mark.parametrize("function", HANG.values(), ids=HANG)
def test_a_judge_that_hangs_or_raises_has_the_other_answer_in_time(function):
    start = time.thread_time()
    assert bounded(function, otherwise=-1.0, seconds=0.1) == -1.0
    assert time.thread_time() - start < 1, "ten limits: a loaded machine is no bug"


def test_a_judge_that_ends_is_left_alone_and_leaves_the_alarms_of_others_alone():
    import signal

    before = signal.getsignal(signal.SIGVTALRM)
    assert bounded(lambda a, b: a + b, 1, 2, otherwise=0) == 3
    assert bounded(swallows, otherwise=0, seconds=0.05) == 0
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_a_judge_that_ends_leaves_the_run_its_memory():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    assert bounded(lambda: len(bytes(2**29)), otherwise=0) == 0
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert len(bytes(2**29)) == 2**29


def test_without_a_proc_there_is_no_limit_of_memory_and_a_judge_judges(monkeypatch, tmp_path):
    """A container may have none: every score would be `otherwise`."""
    monkeypatch.setattr(limits, "STATM", tmp_path / "statm")
    assert bounded(lambda: len(bytes(2**29)), otherwise=0) == 2**29


def test_a_double_factorial_neither_hangs_math_nor_fills_the_memory():
    """Where numbers are compared, mpmath wants 2 to the half of it: 4 GB and 10 seconds in one operation."""
    start = time.thread_time()
    assert score("x^2+1", r"\boxed{(10^{9})!!}") == 0.0
    assert time.thread_time() - start < 3, "ten limits"


# countdown
def test_evaluate_is_python_on_random_arithmetic():
    """Python's own eval of fractions is the oracle."""
    rng = random.Random(0)
    for _ in range(300):
        text = str(rng.randint(0, 99))
        for _ in range(rng.randint(1, 6)):
            shape = rng.choice(["({} {} {})", "{} {} {}", "-{}{}({})"])
            text = shape.format(text, rng.choice("+-*/"), rng.randint(0, 99))
        found = evaluate(text)
        numbers = re.findall("[0-9]+", text)
        try:
            wanted = eval(re.sub("[0-9]+", lambda m: f"Fraction({m[0]})", text))
        except ZeroDivisionError:
            assert found is None
        else:
            assert found == (wanted, found[1])
            assert sorted(found[1]) == sorted(map(int, numbers))


@pytest.mark.parametrize(
    "text",
    ["", " ", "1 +", "2 ** 3", "2 // 3", "7 % 4", "1 / 0", "1 / (2 - 2)", "abs(3)", "3(4)", "(3)(4)", "1, 2", "1 < 2",
     "1.5", "1e3", "0x10", "1_000", "007", "٣", "³", "1 = 1", "1\n+ 2", "True", "x", "'a'", "1j", "1 if 1 else 2", "~1",
     "1 & 2", "()", "1 +" * 80 + "1", "9" * 10, "(" * 100 + "1" + ")" * 100, "-" * 150 + "1;"],
)
def test_evaluate_knows_four_operators_brackets_and_whole_numbers(text):
    assert evaluate(text) is None


def test_nothing_but_those_characters_is_ever_parsed(monkeypatch):
    """Of every printable character, alone or in a call."""
    seen = []
    parse = ast.parse
    monkeypatch.setattr(ast, "parse", lambda text, **options: seen.append(text) or parse(text, **options))
    for c in map(chr, [*range(256), 0x663, 0x2212, 0xFF11, 0xD800]):
        evaluate(f"1 + {c}")
        evaluate(f"f{c}1)")
    assert set("".join(seen)) <= set("0123456789+-*/() ")


@pytest.mark.parametrize(
    ("reply", "correct", "format_"),
    [
        ("<answer>(3 + 5) * 2</answer>", 1, 1), ("<think>3 * 5</think>\n<answer> 2*5+2*3 </answer>", 0, 1),
        ("<answer>5 * 2 + 3 * 2</answer>", 0, 1), ("<answer>16</answer>", 0, 1),
        ("<answer>(3 + 5) * 2 = 16</answer>", 0, 0),
        ("(3 + 5) * 2", 0, 0), ("<answer>(3 + 5) * 2", 0, 0), ("<answer>1</answer><answer>2*(3+5)</answer>", 1, 1),
        ("</answer><answer>2*(3+5)", 0, 0), ("<answer>3 + 5 + 2</answer>", 0, 1), ("<answer>16 + 3 - 3</answer>", 0, 1),
        ("<answer>six</answer>", 0, 0), ("<answer></answer>", 0, 0),
    ],
)
def test_countdown_pays_for_a_solution_that_uses_each_number_once(reply, correct, format_):
    example = Example("p", "16", {"numbers": [2, 3, 5], "target": 16})
    parts = Countdown("train", problems=10).score(example, reply)
    assert parts == {"correct": correct, "format": 0.1 * format_}
    assert Countdown("train", problems=10, format_score=0.0).score(example, reply) == correct


def test_every_puzzle_can_be_solved_lies_in_its_ranges_and_is_held_out_whatever_the_order():
    options = {"problems": 400, "numbers": (2, 4), "largest": 20, "target": (5, 30), "tags": False, "seed": 3}
    sides = [Countdown(split, **options) for split in ("train", "heldout")]
    keys = []
    for task in sides:
        examples = [task[i] for i in range(len(task))]
        for e in examples:
            value, numbers = evaluate(e.info["solution"])
            assert value == e.info["target"] == int(e.answer)
            assert 5 <= value <= 30
            assert sorted(numbers) == sorted(e.info["numbers"])
            assert 2 <= len(numbers) <= 4
            assert 1 <= min(numbers) <= max(numbers) <= 20
            assert task.score(e, e.info["solution"]) == {"correct": 1.0, "format": 0.1}
        keys.append({(tuple(sorted(e.info["numbers"])), e.answer) for e in examples})
    assert len(keys[0] | keys[1]) == len(sides[0]) + len(sides[1]) == 400
    assert Countdown("train", **options | {"seed": 4}).puzzles != sides[0].puzzles


def test_countdown_says_when_there_are_not_so_many_puzzles_and_refuses_a_format_worth_a_solution():
    with pytest.raises(UserError, match=r"only \d+ puzzles"):
        Countdown("train", problems=500, numbers=(2, 2), largest=3, target=(1, 3))
    for options in ({"numbers": (4, 3)}, {"numbers": (0, 3)}, {"numbers": (3, 11)}, {"largest": 0}):
        with pytest.raises(UserError, match="from 1 to 10 numbers"):
            Countdown("train", **options)
    with pytest.raises(UserError, match="format_score"):
        Countdown("train", format_score=1.0)


@pytest.mark.parametrize(
    ("reply", "found"),
    [("<answer>a</answer>", "a"), ("<answer>a</answer> <answer> b\n</answer>x", "b"), ("<answer>a", None),
     ("a</answer>", None), ("<answer>a</answer><answer>b", "a"), ("<answer>a<answer>b</answer>", "b"),
     ("<answer></answer>", ""), ("", None)])
def test_the_last_whole_tag_is_read(reply, found):
    assert tagged(reply) == found


# reasoning_gym
CODE = [
    "__import__('os').system('touch ran')", "open('ran', 'w')", "[open('ran', 'w')]", "().__class__", "(x).subs",
    "S('1')",
    "exec('1')", "(lambda: 0)()", "[x for x in y]", "f'{open}'", "(sin).func", "sqrt(open('ran'))", "3! + open('r')",
    "1 if open('ran', 'w') else 2", "x[0]", "9**9**9", "(9**99)**99", "9**999", "10**(10**10)", "99999!", "'a' * 9",
    "[1] * 9", "1 << 99", "'%999d' % 1",
    "sin(x=1)", "(yield)", "x := 1", "é(1)", "@x", "Symbol('x')", "sin(9**9**9)", "x**100", "x**y**9"]


@pytest.mark.parametrize("text", CODE)
def test_a_judge_that_evaluates_never_sees_code_or_a_number_without_end(text):
    assert not harmless(text)


@pytest.mark.parametrize(
    "text",
    ["7", "-3.5", "[1, 2]", "[['a', 'b'], [1, -2]]", '{"a": [true, null]}', "2*x**3 + C", "9" * 20,
     "(x + 1)**2/2 - sin(3*x)*exp(-x)", "(3 + 5) * 2", "_ Q _\n_ _ Q", "1 2 3\n4 5 6", "ABCDA", "0x1f", "-sqrt(2)/2",
     "log(x) + C", "2**10", "x**(1/2)"])
def test_a_judge_that_evaluates_sees_answers(text):
    assert harmless(text)


@pytest.mark.parametrize("name", ["simple_integration", "countdown", "n_queens", "spiral_matrix", "puzzle24",
"chain_sum"])
def test_the_guard_changes_no_verdict_of_a_right_answer_and_code_is_not_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = ReasoningGym("train", dataset=name, problems=5, heldout=0.0)
    assert task.evaluates == (name != "chain_sum")
    for example in (task[i] for i in range(5)):
        entry = example.info["entry"]
        assert task.score(example, example.info["solution"]) == task.dataset.score_answer(entry["answer"], entry) > 0.99
    for code in CODE:
        assert 0.0 <= task.score(task[0], f"<answer>{code}</answer>") < 1
    assert list(tmp_path.iterdir()) == []


def test_code_would_run_without_the_guard(tmp_path, monkeypatch):
    """Else the test above could not fail."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlkl.tasks.gym.harmless", lambda text: True)
    task = ReasoningGym("train", dataset="simple_integration", problems=2, heldout=0.0)
    task.score(task[0], f"<answer>{CODE[1]}</answer>")
    assert (tmp_path / "ran").exists()


def test_every_judge_of_the_library_whose_source_evaluates_is_found():
    """By the words of its source; what reads as a judge of numbers alone is not guarded."""
    import reasoning_gym.factory as factory

    for name, found in {"simple_integration": True, "polynomial_multiplication": True, "n_queens": True,
                        "propositional_logic": False, "chain_sum": False, "word_sorting": False}.items():
        assert evaluates(factory.create_dataset(name, size=1)) == found, name


def test_reasoning_gym_names_what_there_is():
    for options, words in (
        ({"dataset": "chain_sums"}, ["chain_sums", "chain_sum", "10"]),
        ({"dataset": "chain_sum", "options": {"terms": 2}}, ["'terms'", "min_terms"]),
        ({"dataset": "chain_sum", "options": {"min_terms": 5, "max_terms": 2}}, ["chain_sum refuses"]),
        ({"dataset": "chain_sum", "problems": 3, "heldout": 1.0}, ["train side"]),
    ):
        with pytest.raises(UserError) as error:
            ReasoningGym("train", **options)
        assert [w for w in words if w not in str(error.value)] == [], error.value
        assert len(str(error.value).splitlines()) == 1


def test_the_sides_of_reasoning_gym_share_no_question_and_another_seed_is_another_set():
    options = {"dataset": "chain_sum", "problems": 300, "options": {"min_terms": 2, "max_terms": 2, "max_digits": 1}}
    tasks = [ReasoningGym(split, seed=seed, **options) for split, seed in (("train", 0), ("heldout", 0), ("train",
        900))]
    asked = [{str(t[i].prompt) for i in range(len(t))} for t in tasks]
    assert not asked[0] & asked[1]
    assert asked[0] != asked[2]
    assert len(list(itertools.chain(*asked[:2]))) < 300  # ten digits twice: questions come again, on their own side


@pytest.mark.parametrize("reply", ["nan", "NaN", "nan + 1i", "1 + nani"])
def test_nan_is_no_answer_to_a_judge_that_measures_a_distance(reply):
    """min(1, exp(-nan)) is 1."""
    gym = ReasoningGym("train", dataset="complex_arithmetic", problems=3, tags=False, heldout=0.0)
    assert gym.score(gym[0], gym[0].answer) == 1.0
    assert gym.score(gym[0], reply) == 0.0
