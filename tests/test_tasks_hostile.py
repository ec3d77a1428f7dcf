"""Whatever a policy writes: a judge gives finite numbers, ends by its limit, and runs nothing."""

import math
import pickle
import time

import pytest
from contract import make_task, total

from rlkl.tasks import TASKS
from rlkl.tasks.bounded import bounded

LIMIT = 0.1  # seconds of CPU of a bounded judge here, a third of the default, to save time
LATE = 3.0  # seconds of CPU: many limits, so that a slow or loaded machine does not fail
CODE = "open('ran', 'w').write('x')"
TEXTS = {
    "100 kB of digits": "9" * 100_000,
    "100 kB of numbers": "1, " * 33_000,
    "nested powers": "99**98**97",
    "towers": "9^{9^{9^{9}}}",
    "factorials": "((99999!)!)!",
    "50 000 brackets": "(" * 50_000,
    "lists": "[" * 50_000,
    "signs": "-" * 100_000,
    "boxes": "\\boxed{" * 14_000,
    "tags": "<answer>" * 12_000,
    "dollars": "$" * 100_000,
    "marks": "#### " * 20_000,
    "words": "the answer is " * 7_000,
    "spaces": " " * 100_000,
    "one letter": "a" * 100_000,
    "format strings": "%s%n%1000000d {0.__class__.__mro__} {:>1000000}",
    "code": CODE,
    "import": f"__import__('os').{CODE}",
    "expression": "(lambda: " + CODE + ")()",
    "f-string": "f'{" + CODE + "}'",
    "lines": "\n" * 100_000,
    "control characters": "\x00\x01\x1b[2J\x7f\u202e\u2028\x85",
    "surrogates": "\ud800\udfff\udc80",
    "empty": "",
    "invalid UTF-8": b"\xff\xfe42\x80".decode("utf-8", "surrogateescape"),
    "other digits": "٤٢ ४२ ４２ ²",
    "integral": "\\int_0^1 x^{99} \\sin^{50}(x) dx",
    "sum": "\\sum_{i=1}^{10^9} i^{i}",
    "matrix": "\\begin{matrix}" * 999,
    "binomial": "\\binom{10000000}{5000000}",
    "expansion": "(x + y + z)^{9999}",
    "root": "\\sqrt[99999]{" * 99,
}
FORMS = {
    "bare": "{}",
    "tagged": "<think>\n</think><answer>{}</answer>",
    "boxed": "so \\boxed{{{}}}.",
    "marked": "#### {}",
    "dollars": "it is ${}$",
    "twice": "{} {}",
}


@pytest.fixture(scope="module", params=TASKS)
def task(request, tmp_path_factory):
    return make_task(request.param, tmp_path_factory.mktemp("tasks"))("train")


def judges(task):
    """What scores a response, and what only reports on it."""
    return [f for f in (task.score, getattr(task, "grade", None)) if f]


def test_no_response_hangs_raises_or_runs(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(bounded.__kwdefaults__, "seconds", LIMIT)
    for form, template in FORMS.items():
        for name, text in TEXTS.items():
            response = template.format(text, text)
            for judge in judges(task):
                start = time.process_time()
                score = judge(task[0], response)
                seconds = time.process_time() - start
                case = f"{name}, {form}: {score} after {seconds:.2f} s of CPU"
                assert seconds < LATE, case
                numbers = score.values() if isinstance(score, dict) else [score]
                assert all(isinstance(x, float) and math.isfinite(x) for x in numbers), case
                assert total(score) < 1 or judge.__name__ == "grade", case
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_time_limit")
def test_a_judge_can_be_sent_to_another_process(task):
    """As for a pool of processes that scores responses."""
    score = pickle.loads(pickle.dumps(task.score))
    for response in (task[0].solution, "", "7"):
        assert score(task[0], response) == task.score(task[0], response)


@pytest.mark.usefixtures("no_time_limit")
def test_a_right_response_stays_right_behind_100_kb_of_noise(task):
    """Where the answer has a place of its own. In other tasks the whole response is the answer."""
    if "solution" in task[0].info:
        noise = "9 ( \\boxed{ <answer> " * 5_000
        assert total(task.score(task[0], f"{noise}\n{task[0].solution}")) >= 1
