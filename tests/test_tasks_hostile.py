"""Whatever a policy writes, every judge gives finite numbers, ends by its limit, and runs nothing."""

import math
import pickle
import time

import pytest
from contract import make_task, total

from rlkl.tasks import TASKS

LATE = 3.0  # seconds of CPU, ten limits: a slow or loaded machine is no bug, and what hangs takes longer
CODE = "open('ran', 'w').write('x')"
BARE = {
    "100 kB of digits": "9" * 100_000, "100 kB of numbers": "1, " * 33_000, "nested powers": "99**98**97",
    "towers": "9^{9^{9^{9}}}", "factorials": "((99999!)!)!", "50 000 brackets": "(" * 50_000, "lists": "[" * 50_000,
    "signs": "-" * 100_000, "boxes": "\\boxed{" * 14_000, "tags": "<answer>" * 12_000, "dollars": "$" * 100_000,
    "marks": "#### " * 20_000, "words": "the answer is " * 7_000, "spaces": " " * 100_000, "one letter": "a" * 100_000,
    "format strings": "%s%n%1000000d {0.__class__.__mro__} {:>1000000}", "code": CODE,
    "import": f"__import__('os').{CODE}",
    "expression": "(lambda: " + CODE + ")()", "f-string": "f'{" + CODE + "}'", "lines": "\n" * 100_000,
    "control characters": "\x00\x01\x1b[2J\x7f\u202e\u2028\x85", "surrogates": "\ud800\udfff\udc80", "empty": "",
    "invalid UTF-8": b"\xff\xfe42\x80".decode("utf-8", "surrogateescape"), "other digits": "٤٢ ४२ ４２ ²",
    "integral": "\\int_0^1 x^{99} \\sin^{50}(x) dx", "sum": "\\sum_{i=1}^{10^9} i^{i}",
    "matrix": "\\begin{matrix}" * 999,
    "binomial": "\\binom{10000000}{5000000}", "expansion": "(x + y + z)^{9999}", "root": "\\sqrt[99999]{" * 99}
FORMS = {"bare": "{}", "tagged": "<think>\n</think><answer>{}</answer>", "boxed": "so \\boxed{{{}}}.",
"marked": "#### {}",
         "dollars": "it is ${}$", "twice": "{} {}"}


@pytest.fixture(scope="module", params=TASKS)
def made(request, tmp_path_factory):
    return make_task(request.param, tmp_path_factory.mktemp("tasks"))("train")


def judges(made):
    """Of parts that are summed, and of numbers that are only reported."""
    return [f for f in (made.score, getattr(made, "grade", None)) if f]


@pytest.mark.parametrize("form", FORMS)
def test_no_reply_hangs_raises_or_runs(made, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, bare in BARE.items():
        reply = FORMS[form].format(bare, bare)
        for judge in judges(made):
            start = time.process_time()
            found = judge(made[0], reply)
            seconds = time.process_time() - start
            assert seconds < LATE, f"{name}: {seconds:.2f} s"
            numbers = found.values() if isinstance(found, dict) else [found]
            assert all(isinstance(x, float) and math.isfinite(x) for x in numbers), f"{name}: {found}"
            assert total(found) < 1 or judge.__name__ == "grade", f"{name} is right?"
    assert list(tmp_path.iterdir()) == []


def test_a_judge_can_be_sent_to_another_process(made):
    """Where rewards are judged by a pool."""
    sent = pickle.loads(pickle.dumps(made.score))
    for reply in (made[0].info.get("solution", made[0].answer), "", "7"):
        assert sent(made[0], reply) == made.score(made[0], reply)


def test_a_right_reply_stays_right_behind_100_kb_of_noise(made):
    """Where an answer is read from a place of its own; a task whose whole reply is the answer has none."""
    solution = made[0].info.get("solution")
    if solution is not None:
        assert total(made.score(made[0], "9 ( \\boxed{ <answer> " * 5_000 + "\n" + solution)) >= 1
