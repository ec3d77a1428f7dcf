"""The pool: a function that hangs, exits, takes all memory or breaks loses its own response.

It costs no more than its time limit, and no process is left.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlkl.rewards import Reward, compute_scores
from rlkl.rewards.scoring import Scoring
from rlkl.types import Batch, Example

ROOT = Path(__file__).parents[1]
LIMIT = 1.0  # seconds of a call
HOSTILE = """
import os, sys, threading

class Odd(BaseException):
    def __init__(self, one, two):
        super().__init__(one)

class Mute(Exception):
    def __str__(self):
        raise Mute

def f(example, response):
    if response == "hangs":
        while True:
            try:
                while True:
                    pass
            except BaseException:
                pass
    if response == "exits":
        raise SystemExit
    if response == "ends":
        os._exit(1)
    if response == "ends well":
        os._exit(0)
    if response == "takes memory":
        return len(bytearray(2**32))
    if response == "recurses":
        return f(example, response)
    if response == "returns long text":
        return "x" * 10**8
    if response == "cannot be told":
        raise Mute
    if response == "cannot be pickled":
        return threading.Lock()
    if response == "cannot be unpickled":
        raise Odd(1, 2)
    return float(len(response))
"""
FAILURES = {  # response → a part of the line that is printed
    "hangs": "took longer than scoring.seconds=1",
    "exits": "raised SystemExit",
    "ends": "ended its process",
    "ends well": "",
    "takes memory": "raised MemoryError",
    "recurses": "raised RecursionError",
    "returns long text": "gave no number but a str",
    "cannot be told": "raised Mute",
    "cannot be pickled": "gave no number but a lock",
    "cannot be unpickled": "raised Odd",
}


def scoring(processes: int, say=print, **options) -> Scoring:
    defaults = {"seconds": 20.0, "failed": 0.0, "memory_gb": 4.0, "steps": 1}
    return Scoring(processes, say=say, **(defaults | options))


def scores_of(reward: Reward, responses: list[str]):
    n = len(responses)
    mask = torch.ones(n, 1, dtype=torch.bool)
    ids = mask.long()
    batch = Batch(ids, mask, ids, mask, torch.zeros(n, 1), torch.zeros(n, dtype=torch.bool))
    return compute_scores(reward, [Example("1+1=")] * n, responses, batch)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Iterator[tuple[Reward, list[str]]]:
    """The hostile function as a reward, and the lines that its scoring prints."""
    path = tmp_path_factory.mktemp("hostile") / "hostile.py"
    path.write_text(HOSTILE)
    printed: list[str] = []
    options = {"seconds": LIMIT, "failed": -1.0, "memory_gb": 1.0}
    with scoring(2, printed.append, **options) as pool:
        reward = pool.reward({"name": f"{path}:f"})
        scores_of(reward, ["start the workers"])
        yield reward, printed


def test_text_that_looks_like_code_is_only_text(hostile):
    reward, printed = hostile
    responses = [
        "9" * 100_000,
        "9**9**9**9",
        "{0.__class__.__mro__}%s%n",
        "__import__('os').system('exit')",
        "\x00\x1b[2J\r",
        "\ud800\udfff",
        "",
    ]
    assert scores_of(reward, responses)[0].tolist() == [float(len(r)) for r in responses]
    assert not printed


def test_every_bad_response_fails_alone_and_in_time_and_the_pool_goes_on(hostile):
    reward, printed = hostile
    start = time.monotonic()
    responses = ["good", *(x for bad in FAILURES for x in (bad, "fine!")), *["good"] * 21]
    scores, parts = scores_of(reward, responses)
    # Three kinds have to be ended, twice each: in their chunk and alone. The margin is for load.
    assert time.monotonic() - start < 120
    assert scores.tolist() == [-1.0 if r in FAILURES else len(r) for r in responses]
    assert parts["failed"].tolist() == [float(r in FAILURES) for r in responses]
    for response, reason in FAILURES.items():
        assert any(reason in line for line in printed), (response, printed)
    assert all(line.isprintable() and len(line) < 600 for line in printed)
    assert scores_of(reward, ["good"] * 40)[0].tolist() == [4.0] * 40


def test_a_trl_function_that_hangs_fails_all_responses_of_its_call_and_none_of_the_next(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import time\ndef f(completions, **kwargs):\n"
        "    time.sleep(60 * ('hangs' in completions))\n"
        "    return [1.0] * len(completions)\n"
    )
    with scoring(1, seconds=LIMIT) as pool:
        reward = pool.reward({"name": f"{tmp_path}/mine.py:f"})
        assert scores_of(reward, ["a", "hangs", "b"])[0].tolist() == [0.0, 0.0, 0.0]
        assert scores_of(reward, ["a", "c", "b"])[0].tolist() == [1.0, 1.0, 1.0]


def test_the_number_of_processes_changes_no_score(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import random\ndef f(example, response):\n    return random.random() + len(response)\n"
    )
    results = []
    for processes in (0, 1, 3):
        with scoring(processes) as pool:
            reward = pool.reward({"name": f"{tmp_path}/mine.py:f"})
            results.append(scores_of(reward, [str(i) for i in range(50)])[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_task_from_a_file_is_scored_in_the_pool_by_the_workers_own_instance(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\nclass Task:\n    def __init__(self, split, *, bonus=1.0):\n"
        "        self.bonus, self.process = bonus, os.getpid()\n"
        "    def score(self, example, response):\n"
        "        return self.bonus * (self.process == os.getpid())\n"
        "def process(example, response):\n    return os.getpid()\n"
    )
    spec = {"name": f"{tmp_path}/mine.py:Task", "bonus": 0.5}
    with scoring(1) as pool:
        reward = pool.task(spec, lambda example, response: 99.0)
        process = pool.reward({"name": f"{tmp_path}/mine.py:process"})
        assert scores_of(reward, ["a", "b"])[0].tolist() == [0.5, 0.5]
        assert scores_of(process, ["a"])[0].item() != os.getpid()


# ------------------------------------------------------------------ no process is left

RUN = """
import signal
from pathlib import Path
from rlkl.rewards.scoring import Scoring
from rlkl.rewards.text import Row
from rlkl.types import Example

def score(text):
    with Scoring(2, 30.0, failed=0.0, memory_gb=4.0, steps=1, say=print) as scoring:
        scoring.reward({"name": "mine.py:f"})
        scoring.values(0, [Row(Example("p"), f"{text} {i}") for i in range(8)])
        raise ValueError

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        score("fine")
    except ValueError:
        workers = " ".join(file.name for file in Path().glob("pid-*"))  # before others start
        Path("unfinished").write_text(workers)
        Path("unfinished").rename("raised")
    score("hangs")
"""


def live_workers(folder: Path) -> list[int]:
    """The processes that left a file with their number, and still run."""
    live = []
    for file in folder.glob("pid-*"):
        number = file.name.removeprefix("pid-")
        stat = Path(f"/proc/{number}/stat")
        if stat.exists() and stat.read_text().rpartition(") ")[2][0] != "Z":
            live.append(int(number))
    return live


def wait_until(condition, run: subprocess.Popen) -> None:
    while not condition():
        assert run.poll() is None
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes in /proc")
def test_no_process_is_left_after_an_exception_or_an_interrupt(tmp_path):
    """An exception in the run, which goes on; then Ctrl-C while the workers hang."""
    (tmp_path / "mine.py").write_text(
        "import os\nfrom pathlib import Path\ndef f(example, response):\n"
        "    Path(f'pid-{os.getpid()}').touch()\n"
        "    if 'hangs' in response:\n"
        "        Path('hangs').touch()\n"
        "        while True:\n            pass\n"
        "    return 1.0\n"
    )
    (tmp_path / "main.py").write_text(RUN)
    run = subprocess.Popen(
        [sys.executable, "main.py"],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    wait_until((tmp_path / "raised").exists, run)
    first = {*(tmp_path / "raised").read_text().split()}
    assert first
    wait_until((tmp_path / "hangs").exists, run)
    hanging = live_workers(tmp_path)
    assert hanging
    assert not first & {f"pid-{number}" for number in hanging}, "the exception left a worker"
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    assert run.wait(timeout=300) != 0
    for _ in range(300):
        if not live_workers(tmp_path):
            break
        time.sleep(0.1)
    assert not live_workers(tmp_path)
