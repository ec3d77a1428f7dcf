"""The judges of gsm8k, math, countdown and reasoning_gym: what is right, wrong, and never run."""

import ast
import contextlib
import random
import re
import resource
import signal
import threading
import time
from fractions import Fraction

import pytest
import reasoning_gym.factory

from rlkl.errors import UserError
from rlkl.tasks import limits
from rlkl.tasks.arithmetic import evaluate
from rlkl.tasks.bounded import bounded
from rlkl.tasks.countdown import Countdown
from rlkl.tasks.extract import boxed, tagged
from rlkl.tasks.gsm8k import PROMPT, flexible, strict
from rlkl.tasks.gym import ReasoningGym, evaluates, harmless
from rlkl.tasks.mathematics import Mathematics
from rlkl.types import Example

# ------------------------------------------------------------------ gsm8k


def test_strict_reads_behind_the_last_mark_and_flexible_reads_the_last_number():
    cases = {  # response → strict, flexible
        "so 3 + 4 = 7\n#### 7": (7, 7),
        "#### 7 apples": (7, 7),
        "####7": (7, 7),
        "#### $7": (7, 7),
        "#### 7.": (7, 7),
        "#### 7.0": (7, 7),
        "#### -7": (-7, -7),
        "#### 1,234": (1234, 1234),
        "#### 7\n#### 8": (8, 8),
        "#### 7, not 8": (7, 8),
        "it is 7": (None, 7),
        "7 ####": (None, 7),
        "#### seven, 7": (None, 7),
        "#### 7 ####": (None, 7),
        "": (None, None),
        "#### ٣": (None, None),
        "it is 3.50.": (None, Fraction("3.5")),
        "#### " + "9" * 50: (None, None),
        "7 of 10%": (None, 10),
    }
    assert {response: (strict(response), flexible(response)) for response in cases} == cases


# The patterns of verl/utils/reward_score/gsm8k.py; what they match is compared as text.
VERL_STRICT = r"#### (\-?[0-9\.\,]+)"
VERL_FLEXIBLE = r"(\-?[0-9\.\,]+)"


def verl_verdict(response: str, answer: str) -> tuple[bool, bool]:
    """strict, flexible"""
    marked = re.findall(VERL_STRICT, response)
    numbers = [x for x in re.findall(VERL_FLEXIBLE, response) if x not in ("", ".")]
    is_strict = bool(marked) and marked[-1].replace(",", "") == answer
    return is_strict, bool(numbers) and numbers[-1] == answer


@pytest.mark.parametrize(
    ("response", "verl", "ours"),
    [
        ("#### 42", (1, 1), (1, 1)),
        ("#### 42 eggs", (1, 1), (1, 1)),
        ("the answer is 42", (0, 1), (0, 1)),
        ("#### 42.", (0, 0), (1, 1)),
        ("#### 42.0", (0, 0), (1, 1)),
        ("####42", (0, 1), (1, 1)),
        ("#### $42", (0, 1), (1, 1)),
        ("the answer is 42.", (0, 0), (0, 1)),
        ("#### 41", (0, 0), (0, 0)),
    ],
)
def test_what_verl_accepts_is_right_and_what_is_right_besides_is_listed(response, verl, ours):
    """docs/tasks.md has the same table in words."""
    assert verl_verdict(response, "42") == verl
    assert (strict(response) == 42, flexible(response) == 42) == ours
    assert all(a <= b for a, b in zip(verl, ours, strict=True))


def test_the_prompt_of_gsm8k_ends_in_the_words_of_verls_recipe():
    """Its numbers are compared with that recipe's."""
    recipe = 'Let\'s think step by step and output the final answer after "####".'
    assert "{question} " + recipe == PROMPT


# ------------------------------------------------------------------ math


def math_score(answer: str, response: str) -> float:
    return Mathematics.score(Mathematics.__new__(Mathematics), Example("p", answer), response)


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        (r"\frac{1}{2}", r"\boxed{\frac{1}{2}}"),
        (r"\frac{1}{2}", r"\boxed{0.5}"),
        ("1000", r"\boxed{1{,}000}"),
        (r"\frac12", r"$\boxed{\dfrac{1}{2}}$."),
        ("42", "The answer is 42."),
        ("42", "so $x = 42$"),
        ("42", r"\boxed{41} no, \boxed{42}"),
        ("42", r"\boxed 42."),
        ("x^2+2x+1", r"\boxed{(x+1)^2}"),
        ("(1,2)", r"\boxed{(1, 2)}"),
        (r"\text{Evelyn}", r"\boxed{Evelyn}"),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}"),
        (r"\{1,2\}", r"\boxed{\{2, 1\}}"),
    ],
)
@pytest.mark.usefixtures("no_time_limit")
def test_math_accepts_what_is_equal_in_a_box_or_at_the_end(answer, response):
    assert math_score(answer, response) == 1.0


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("42", r"\boxed{41}"),
        ("42", r"\boxed{42} no, \boxed{41}"),
        ("42", "42 or 41"),
        ("42", ""),
        ("42", r"\boxed{}"),
        ("x", r"\boxed{99^{98^{97}}}"),
        ("x", r"\boxed{(9999999!)!}"),
        ("x", "99**98**97"),
        ("42", r"\boxed{42"),
        ("x^2+2x+1", r"\boxed{(x+1)^3}"),
        ("(1,2)", r"\boxed{(2,1)}"),
        ("42", "I do not know"),
    ],
)
def test_math_refuses_what_is_not_equal(answer, response):
    assert math_score(answer, response) == 0.0


def test_the_last_box_is_read_to_its_own_bracket():
    nested = "{" * 50 + "}" * 50
    cases = {
        r"a \boxed{1} b \boxed{\frac{1}{2}} c": r"\frac{1}{2}",
        r"\fbox{3}": "3",
        r"\boxed 7$.": "7",
        r"\boxed 7.": "7",
        r"\boxed{1}, \boxed{2": None,
        "none": None,
        r"\boxed": None,
        r"\boxed{}": None,
        r"\boxed{" + "1" * 400 + "}": None,
        r"\boxed{" + nested + "}": nested,
    }
    assert {response: boxed(response, 300) for response in cases} == cases


@pytest.mark.usefixtures("no_time_limit")
def test_the_verdict_is_the_same_in_a_thread_where_no_signal_comes():
    """math-verify's own time limit raises there."""
    cases = [("42", r"\boxed{42.0}"), ("42", r"\boxed{43}"), (r"\frac12", r"\boxed{0.5}")]
    scores = []
    thread = threading.Thread(target=lambda: scores.extend(math_score(*case) for case in cases))
    thread.start()
    thread.join()
    assert scores == [math_score(*case) for case in cases] == [1.0, 0.0, 1.0]


# ------------------------------------------------------------------ bounded


def swallows():
    """Two seconds of a judge that catches whatever it can."""
    end = time.thread_time() + 2
    while time.thread_time() < end:
        with contextlib.suppress(Exception):
            while time.thread_time() < end:
                sum(range(1000))


def recurses(n=0):
    return recurses(n + 1)


class SlowDestructor:
    """Python ignores what is raised in a destructor, and prints it."""

    def __del__(self):
        end = time.thread_time() + 0.3
        while time.thread_time() < end:
            pass


def test_a_timeout_in_a_destructor_is_not_printed(monkeypatch):
    printed = []
    monkeypatch.setattr(
        "sys.unraisablehook", lambda unraisable: printed.append(unraisable.exc_type)
    )
    result = bounded(
        lambda: [SlowDestructor() for _ in range(3)] and 1.0, otherwise=-1.0, seconds=0.05
    )
    assert result in (1.0, -1.0)
    assert printed == []


BAD_JUDGES = {
    "loop": swallows,
    "recursion": recurses,
    "power": lambda: 99**98**97,
    "error": lambda: 1 / 0,
    "memory": lambda: len(bytes(2**29)),
    "one long operation": lambda: (1 << 2**33).bit_length(),
}


@pytest.mark.parametrize("judge", BAD_JUDGES.values(), ids=BAD_JUDGES)
def test_a_judge_that_hangs_or_raises_gives_the_other_answer_in_time(judge):
    start = time.thread_time()
    assert bounded(judge, otherwise=-1.0, seconds=0.1) == -1.0
    assert time.thread_time() - start < 1, "ten limits: a loaded machine is no bug"


def test_a_judge_that_ends_is_left_alone_and_signals_are_as_before():
    before = signal.getsignal(signal.SIGVTALRM)
    assert bounded(lambda a, b: a + b, 1, 2, otherwise=0) == 3
    assert bounded(swallows, otherwise=0, seconds=0.05) == 0
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_the_memory_limit_ends_with_the_judge():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    assert bounded(lambda: len(bytes(2**29)), otherwise=0) == 0
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert len(bytes(2**29)) == 2**29


@pytest.mark.usefixtures("no_time_limit")
def test_without_proc_there_is_no_memory_limit_and_judges_work(monkeypatch, tmp_path):
    """A container may have no /proc: every score would be `otherwise`."""
    monkeypatch.setattr(limits, "STATM", tmp_path / "statm")
    assert bounded(lambda: len(bytes(2**29)), otherwise=0) == 2**29


def test_a_double_factorial_neither_hangs_math_nor_fills_the_memory():
    """To compare numbers, mpmath wants 2 to the half of it: 4 GB, 10 seconds in one operation."""
    start = time.thread_time()
    assert math_score("x^2+1", r"\boxed{(10^{9})!!}") == 0.0
    assert time.thread_time() - start < 3, "ten limits"


# ------------------------------------------------------------------ countdown


def test_evaluate_agrees_with_python_on_random_arithmetic():
    """Python's own eval of fractions is the oracle."""
    rng = random.Random(0)
    for _ in range(300):
        text = str(rng.randint(0, 99))
        for _ in range(rng.randint(1, 6)):
            shape = rng.choice(["({} {} {})", "{} {} {}", "-{}{}({})"])
            text = shape.format(text, rng.choice("+-*/"), rng.randint(0, 99))
        parsed = evaluate(text)
        try:
            expected = eval(re.sub("[0-9]+", lambda match: f"Fraction({match[0]})", text))
        except ZeroDivisionError:
            assert parsed is None
        else:
            value, numbers = parsed
            assert value == expected
            assert sorted(numbers) == sorted(map(int, re.findall("[0-9]+", text)))


NOT_ARITHMETIC = [
    *("", " ", "1 +", "2 ** 3", "2 // 3", "7 % 4", "1 / 0", "1 / (2 - 2)", "abs(3)", "3(4)"),
    *("(3)(4)", "1, 2", "1 < 2", "1.5", "1e3", "0x10", "1_000", "007", "٣", "³", "1 = 1"),
    *("1\n+ 2", "True", "x", "'a'", "1j", "1 if 1 else 2", "~1", "1 & 2", "()"),
    *("1 +" * 80 + "1", "9" * 10, "(" * 100 + "1" + ")" * 100, "-" * 150 + "1;"),
]


def test_evaluate_knows_four_operators_brackets_and_whole_numbers():
    assert [text for text in NOT_ARITHMETIC if evaluate(text) is not None] == []


def test_nothing_but_the_characters_of_arithmetic_is_ever_parsed(monkeypatch):
    parse = ast.parse
    parsed = []

    def record(text, **options):
        parsed.append(text)
        return parse(text, **options)

    monkeypatch.setattr(ast, "parse", record)
    for character in map(chr, [*range(256), 0x663, 0x2212, 0xFF11, 0xD800]):
        evaluate(f"1 + {character}")
        evaluate(f"f{character}1)")
    assert set("".join(parsed)) <= set("0123456789+-*/() ")


def test_countdown_scores_a_solution_that_uses_each_number_once():
    cases = {  # response → correct, is it an expression
        "<answer>(3 + 5) * 2</answer>": (1, 1),
        "<think>3 * 5</think>\n<answer> 2*5+2*3 </answer>": (0, 1),
        "<answer>5 * 2 + 3 * 2</answer>": (0, 1),
        "<answer>16</answer>": (0, 1),
        "<answer>(3 + 5) * 2 = 16</answer>": (0, 0),
        "(3 + 5) * 2": (0, 0),
        "<answer>(3 + 5) * 2": (0, 0),
        "<answer>1</answer><answer>2*(3+5)</answer>": (1, 1),
        "</answer><answer>2*(3+5)": (0, 0),
        "<answer>3 + 5 + 2</answer>": (0, 1),
        "<answer>16 + 3 - 3</answer>": (0, 1),
        "<answer>six</answer>": (0, 0),
        "<answer></answer>": (0, 0),
    }
    example = Example("p", "16", {"numbers": [2, 3, 5], "target": 16})
    task = Countdown("train", problems=10)
    without_format = Countdown("train", problems=10, format_score=0.0)
    for response, (correct, is_expression) in cases.items():
        parts = {"correct": correct, "format": 0.1 * is_expression}
        assert task.score(example, response) == parts, response
        assert without_format.score(example, response) == correct, response


def test_every_puzzle_is_in_its_ranges_and_solvable_and_order_does_not_move_it_to_the_other_side():
    options = {"problems": 400, "numbers": (2, 4), "largest": 20, "target": (5, 30), "tags": False}
    sides = [Countdown(split, seed=3, **options) for split in ("train", "heldout")]
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
    assert Countdown("train", seed=4, **options).puzzles != sides[0].puzzles


def test_countdown_refuses_impossible_options():
    with pytest.raises(UserError, match=r"only \d+ puzzles"):
        Countdown("train", problems=50, numbers=(2, 2), largest=3, target=(1, 3))
    for options in ({"numbers": (4, 3)}, {"numbers": (0, 3)}, {"numbers": (3, 11)}, {"largest": 0}):
        with pytest.raises(UserError, match="from 1 to 10 numbers"):
            Countdown("train", **options)
    with pytest.raises(UserError, match="1 to 9 digits"):  # longer numbers are not evaluated
        Countdown("train", largest=10**9)
    options = {"numbers": (10, 10), "largest": 10**9 - 1, "target": (-(10**12), 10**12)}
    long = Countdown("train", problems=20, tags=False, **options)
    solutions = [long.score(e, e.info["solution"]) for e in (long[i] for i in range(len(long)))]
    assert all(score["correct"] == 1.0 for score in solutions)
    with pytest.raises(UserError, match="format_score"):
        Countdown("train", format_score=1.0)


def test_the_last_whole_tag_is_read():
    cases = {
        "<answer>a</answer>": "a",
        "<answer>a</answer> <answer> b\n</answer>x": "b",
        "<answer>a": None,
        "a</answer>": None,
        "<answer>a</answer><answer>b": "a",
        "<answer>a<answer>b</answer>": "b",
        "<answer></answer>": "",
        "": None,
    }
    assert {response: tagged(response) for response in cases} == cases


# ------------------------------------------------------------------ reasoning_gym

WRITES_A_FILE = "open('ran', 'w')"
CODE = [
    *("__import__('os').system('touch ran')", WRITES_A_FILE, "[open('ran', 'w')]"),
    *("().__class__", "(x).subs", "S('1')", "exec('1')", "(lambda: 0)()", "[x for x in y]"),
    *("f'{open}'", "(sin).func", "sqrt(open('ran'))", "3! + open('r')"),
    *("1 if open('ran', 'w') else 2", "x[0]", "9**9**9", "(9**99)**99", "9**999", "10**(10**10)"),
    *("99999!", "'a' * 9", "[1] * 9", "1 << 99", "'%999d' % 1", "sin(x=1)", "(yield)", "x := 1"),
    *("é(1)", "@x", "Symbol('x')", "sin(9**9**9)", "x**100", "x**y**9"),
]
ANSWERS = [
    *("7", "-3.5", "[1, 2]", "[['a', 'b'], [1, -2]]", '{"a": [true, null]}', "2*x**3 + C"),
    *("9" * 20, "(x + 1)**2/2 - sin(3*x)*exp(-x)", "(3 + 5) * 2", "_ Q _\n_ _ Q"),
    *("1 2 3\n4 5 6", "ABCDA", "0x1f", "-sqrt(2)/2", "log(x) + C", "2**10", "x**(1/2)"),
]


def test_a_judge_that_evaluates_never_sees_code_or_an_endless_number():
    assert [text for text in CODE if harmless(text)] == []


def test_a_judge_that_evaluates_sees_answers():
    assert [text for text in ANSWERS if not harmless(text)] == []


@pytest.mark.parametrize(
    "name",
    ["simple_integration", "countdown", "n_queens", "spiral_matrix", "puzzle24", "chain_sum"],
)
def test_the_guard_changes_no_verdict_on_a_right_answer_and_runs_no_code(
    name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    task = ReasoningGym("train", dataset=name, problems=5, heldout=0.0)
    assert task.evaluates == (name != "chain_sum")
    with monkeypatch.context() as patch:  # a right answer must not depend on the machine's speed
        patch.setitem(bounded.__kwdefaults__, "seconds", 60.0)
        for example in task.examples:
            entry = example.info["entry"]
            own_score = task.dataset.score_answer(entry["answer"], entry)
            assert task.score(example, example.info["solution"]) == own_score > 0.99
    for code in CODE:
        assert 0.0 <= task.score(task[0], f"<answer>{code}</answer>") < 1, code
        assert list(tmp_path.iterdir()) == [], code


def test_code_would_run_without_the_guard(tmp_path, monkeypatch):
    """Otherwise the test above could not fail."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlkl.tasks.gym.harmless", lambda text: True)
    task = ReasoningGym("train", dataset="simple_integration", problems=2, heldout=0.0)
    task.score(task[0], f"<answer>{WRITES_A_FILE}</answer>")
    assert (tmp_path / "ran").exists()


def test_a_judge_whose_source_evaluates_is_recognised():
    """By the words of its source. A judge that reads plain numbers is not guarded."""
    expected = {
        "simple_integration": True,
        "polynomial_multiplication": True,
        "n_queens": True,
        "propositional_logic": False,
        "chain_sum": False,
        "word_sorting": False,
    }
    create = reasoning_gym.factory.create_dataset
    assert {name: evaluates(create(name, size=1)) for name in expected} == expected


def test_a_mistake_in_the_options_of_reasoning_gym_names_the_choices():
    for options, words in (
        ({"dataset": "chain_sums"}, ["chain_sums", "chain_sum", "10"]),
        ({"dataset": "chain_sum", "options": {"terms": 2}}, ["'terms'", "min_terms"]),
        (
            {"dataset": "chain_sum", "options": {"min_terms": 5, "max_terms": 2}},
            ["chain_sum refuses"],
        ),
        ({"dataset": "chain_sum", "problems": 3, "heldout": 1.0}, ["train side"]),
    ):
        with pytest.raises(UserError) as error:
            ReasoningGym("train", **options)
        assert [word for word in words if word not in str(error.value)] == [], error.value
        assert len(str(error.value).splitlines()) == 1


def test_the_sides_of_reasoning_gym_share_no_question_and_another_seed_is_another_set():
    """Of 300 sums of two digits, some come twice: both times on their own side."""
    options = {"min_terms": 2, "max_terms": 2, "max_digits": 1}

    def questions(split: str, seed: int) -> set[str]:
        task = ReasoningGym(split, dataset="chain_sum", problems=300, seed=seed, options=options)
        return {str(e.prompt) for e in task.examples}

    train, heldout = questions("train", 0), questions("heldout", 0)
    assert not train & heldout
    assert len(train | heldout) < 300
    assert train != questions("train", 900)


@pytest.mark.usefixtures("no_time_limit")
def test_nan_is_no_answer_to_a_judge_that_measures_a_distance():
    """min(1, exp(-nan)) is 1."""
    gym = ReasoningGym("train", dataset="complex_arithmetic", problems=3, tags=False, heldout=0.0)
    assert gym.score(gym[0], gym[0].answer) == 1.0
    for response in ("nan", "NaN", "nan + 1i", "1 + nani"):
        assert gym.score(gym[0], response) == 0.0, response
