"""The pool: a function that hangs, exits, hogs or breaks costs its own reply and its time, and nothing is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rlkl.rewards import judge
from rlkl.rewards.scoring import Scoring
from rlkl.types import Batch, Example

ROOT = Path(__file__).parents[1]
LIMIT = 1.0
HOSTILE = '''
import os, sys, threading

class Odd(BaseException):
    def __init__(self, one, two):
        super().__init__(one)

class Mute(Exception):
    def __str__(self):
        raise Mute

def f(example, reply):
    if reply == "hangs":
        while True:
            try:
                while True:
                    pass
            except BaseException:
                pass
    if reply == "hangs in C":
        10 ** 10 ** 9
    if reply == "exits":
        raise SystemExit
    if reply == "ends":
        os._exit(1)
    if reply == "ends well":
        os._exit(0)
    if reply == "hogs":
        return len(bytearray(2**32))
    if reply == "recurses":
        return f(example, reply)
    if reply == "says much":
        return "x" * 10**8
    if reply == "cannot be told":
        raise Mute
    if reply == "cannot be pickled":
        return threading.Lock()
    if reply == "cannot be unpickled":
        raise Odd(1, 2)
    return float(len(reply))
'''
BAD = {"hangs": "took longer than scoring.seconds=1", "exits": "raised SystemExit", "ends": "ended its process",
       "ends well": "", "hogs": "raised MemoryError", "recurses": "raised RecursionError",
       "says much": "gave no number but a str", "cannot be told": "raised Mute",
       "cannot be pickled": "gave no number but a lock",
       "cannot be unpickled": "raised Odd"}


@pytest.fixture
def hostile(tmp_path):
    (tmp_path / "mine.py").write_text(HOSTILE)
    said = []
    with Scoring(2, LIMIT, failed=-1.0, memory_gb=1.0, steps=1, say=said.append) as scoring:
        scoring.said = said
        scoring.mine = scoring.reward({"name": f"{tmp_path}/mine.py:f"})
        yield scoring


def judged(reward, replies):
    n = len(replies)
    ones = torch.ones(n, 1, dtype=torch.bool)
    batch = Batch(ones.long(), ones, ones.long(), ones, torch.zeros(n, 1), torch.zeros(n, dtype=torch.bool))
    return judge(reward, [Example("1+1=")] * n, replies, batch)


def test_every_kind_of_bad_reply_fails_alone_in_time_and_the_pool_goes_on(hostile):
    judged(hostile.mine, ["warm"])
    start = time.monotonic()
    replies = ["good", *[x for bad in BAD for x in (bad, "fine!")], "good"] + ["good"] * 20
    scores, parts = judged(hostile.mine, replies)
    assert time.monotonic() - start < 120  # no hang; three that have to be ended, twice each: their chunk, and alone
    assert scores.tolist() == [-1.0 if reply in BAD else len(reply) for reply in replies]
    assert parts["failed"].tolist() == [float(reply in BAD) for reply in replies]
    for reply, words in BAD.items():
        assert any(words in line for line in hostile.said), (reply, hostile.said)
    assert all(line.isprintable() and len(line) < 600 for line in hostile.said)
    assert judged(hostile.mine, ["good"] * 40)[0].tolist() == [4.0] * 40


def test_text_that_means_harm_is_only_text(hostile):
    replies = ["9" * 100_000, "9**9**9**9", "{0.__class__.__mro__}%s%n", "__import__('os').system('exit')",
               "\x00\x1b[2J\r", "\ud800\udfff", ""]
    assert judged(hostile.mine, replies)[0].tolist() == [float(len(reply)) for reply in replies]
    assert not hostile.said


def test_a_trl_function_that_hangs_fails_every_reply_of_its_call_and_not_of_the_next(tmp_path):
    (tmp_path / "mine.py").write_text("import time\ndef f(completions, **kwargs):\n"
                                      "    time.sleep(60 * ('hangs' in completions))\n"
                                      "    return [1.0] * len(completions)\n")
    with Scoring(1, LIMIT, failed=0.0, memory_gb=4.0, steps=1, say=lambda line: None) as scoring:
        reward = scoring.reward({"name": f"{tmp_path}/mine.py:f"})
        assert judged(reward, ["a", "hangs", "b"])[0].tolist() == [0.0, 0.0, 0.0]
        assert judged(reward, ["a", "c", "b"])[0].tolist() == [1.0, 1.0, 1.0]


def test_the_number_of_processes_changes_no_score(tmp_path):
    (tmp_path / "mine.py").write_text("import random\ndef f(example, reply):\n"
                                      "    return random.random() + len(reply)\n")
    found = []
    for processes in (0, 1, 3):
        with Scoring(processes, 20.0, failed=0.0, memory_gb=4.0, steps=1, say=print) as scoring:
            reward = scoring.reward({"name": f"{tmp_path}/mine.py:f"})
            found.append(judged(reward, [str(i) for i in range(50)])[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_task_from_a_file_is_judged_in_the_pool_by_the_instance_of_the_worker(tmp_path):
    (tmp_path / "mine.py").write_text("import os\nclass Task:\n    def __init__(self, split, *, bonus=1.0):\n"
                                      "        self.bonus, self.process = bonus, os.getpid()\n"
                                      "    def score(self, example, reply):\n"
                                      "        return self.bonus * (self.process == os.getpid())\n"
                                      "def process(example, reply):\n    return os.getpid()\n")
    spec = {"name": f"{tmp_path}/mine.py:Task", "bonus": 0.5}
    with Scoring(1, 20.0, failed=0.0, memory_gb=4.0, steps=1, say=print) as scoring:
        reward, one = scoring.task(spec, lambda example, reply: 99.0)
        elsewhere = scoring.reward({"name": f"{tmp_path}/mine.py:process"})
        assert judged(reward, ["a", "b"])[0].tolist() == [0.5, 0.5]
        assert one(Example("a"), "a") == 0.5
        assert judged(elsewhere, ["a"])[0].item() != os.getpid()


def workers(folder: Path) -> list[int]:
    """The processes whose file of a name still runs."""
    alive = []
    for file in folder.glob("pid-*"):
        stat = Path(f"/proc/{file.name[4:]}/stat")
        if stat.exists() and stat.read_text().rpartition(") ")[2][0] != "Z":
            alive.append(int(file.name[4:]))
    return alive


RUN = '''
import signal, sys
from rlkl.rewards.scoring import Scoring
from rlkl.rewards.text import Row
from rlkl.types import Example
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell has none
    with Scoring(2, 30.0, failed=0.0, memory_gb=4.0, steps=1, say=print) as scoring:
        scoring.reward({"name": "mine.py:f"})
        rows = [Row(Example("p"), str(i)) for i in range(8)]
        if sys.argv[1] == "raises":
            scoring.values(0, rows)
            raise ValueError
        scoring.values(0, [Row(Example("p"), "hangs")] * 2)
'''


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks processes up in /proc")
@pytest.mark.parametrize(("how", "number"), [("raises", None), ("hangs", signal.SIGINT)])
def test_no_process_is_left_after_an_exception_or_an_interrupt(tmp_path, how, number):
    (tmp_path / "mine.py").write_text("import os\nfrom pathlib import Path\ndef f(example, reply):\n"
                                      "    Path(f'pid-{os.getpid()}').touch()\n"
                                      "    while reply == 'hangs':\n        pass\n    return 1.0\n")
    (tmp_path / "main.py").write_text(RUN)
    run = subprocess.Popen([sys.executable, "main.py", how], cwd=tmp_path, stderr=subprocess.DEVNULL,
                           env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True)
    if number:
        while not list(tmp_path.glob("pid-*")):
            assert run.poll() is None
            time.sleep(0.05)
        os.killpg(run.pid, number)  # as a terminal does: the workers get it too
    assert run.wait(timeout=300) != 0
    assert list(tmp_path.glob("pid-*"))
    for _ in range(300):
        if not workers(tmp_path):
            break
        time.sleep(0.1)
    assert not workers(tmp_path)
