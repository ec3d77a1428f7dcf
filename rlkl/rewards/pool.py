"""Processes for somebody else's code: each call has a time limit, and none of them can take the run down."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from typing import Any

from pebble import ProcessExpired, ProcessPool

from rlkl.errors import UserError
from rlkl.limits import limit_memory

GRACE = 30  # seconds after which a worker that nobody ended ends itself: its run was killed


class Failure(str):
    """Why there is no result, in words."""


LOST = object()  # a worker ended, and it is not known in which call: the pool is no good any more


class Pool:
    """`processes` workers, started with the first call and again whenever one ends. close() ends them all.

    They are forked from a server process of their own, which has no threads and has never seen a GPU.
    """

    def __init__(self, processes: int, seconds: float, memory_gb: float, begin: Callable[[], None]) -> None:
        """`begin` is what a worker does before it takes calls."""
        self.processes, self.seconds, self.start = processes, seconds, (begin, int(memory_gb * 2**30))
        self.pool: ProcessPool | None = None

    def run(self, function: Callable[..., Any], calls: Sequence[tuple]) -> list[Any]:
        """function(*call) of each call; a Failure where it took too long or ended its process. UserError is raised."""
        results = self.attempt(function, calls)
        for i, call in enumerate(calls):
            if results[i] is LOST:
                (results[i],) = self.attempt(function, [call])
        return [Failure("ended its process") if result is LOST else result for result in results]

    def attempt(self, function: Callable[..., Any], calls: Sequence[tuple]) -> list[Any]:
        if self.pool is None:
            self.pool = ProcessPool(self.processes, initializer=started, initargs=self.start, context=fork_server())
        seconds = self.seconds
        futures = [self.pool.schedule(guarded, (seconds, function, *call), timeout=seconds) for call in calls]
        results = [self.result(future) for future in futures]
        if LOST in results:
            self.close()
        return results

    def result(self, future: Any) -> Any:
        try:
            return future.result()
        except UserError:
            raise
        except TimeoutError:
            return Failure(f"took longer than scoring.seconds={self.seconds:g}")
        except ProcessExpired as error:
            return Failure(f"ended its process: code {error.exitcode}")
        except BrokenProcessPool:
            return LOST
        except Exception as error:  # such as an example that cannot be pickled
            return Failure(f"cannot be run in a process: {type(error).__name__}: {error}"[:300])

    def close(self) -> None:
        if self.pool is not None:
            self.pool.stop()
            self.pool.join()
        self.pool = None


def fork_server() -> Any:
    """The context of a process that finds the modules this one finds, and has imported ours once for all workers."""
    context, before = multiprocessing.get_context("forkserver"), os.environ.get("PYTHONPATH")
    context.set_forkserver_preload([name for name in sys.modules if name.startswith("rlkl.")])
    os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        os.environ |= {} if before is None else {"PYTHONPATH": before}
    return context


def started(begin: Callable[[], None], memory: int) -> None:
    """In a worker: `begin`, and from then on no more than so many bytes more."""
    begin()
    limit_memory(memory)


def guarded(seconds: float, function: Callable[..., Any], *call: Any) -> Any:
    """In a worker: an alarm ends it in the end, should there be nobody left to do so."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds + GRACE)
    try:
        return function(*call)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
