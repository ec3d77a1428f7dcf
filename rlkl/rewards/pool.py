"""A pool of processes for user code, each call with a time limit and a memory limit.

Code that hangs, exits or takes all memory loses its own call; the run goes on.
"""

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
from rlkl.tasks.limits import limit_memory

# Seconds beyond the time limit after which a worker ends itself. It is needed only where the run
# was killed, and nobody else ends its workers.
GRACE = 30


class Failure(str):
    """Why a call has no result, in words."""


# A worker died, and it is not known which call killed it. The whole pool is broken.
LOST = object()

# The exit code of a process that was about to start a run of its own; see end_if_imported.
UNGUARDED = 77


class Pool:
    """`processes` workers, started by the first call, and again when one dies. close() ends them.

    They are forked from a server process of their own, which has no threads and never saw a GPU.
    """

    def __init__(
        self,
        processes: int,
        seconds: float,
        memory_gb: float,
        initialize: Callable[[], None],
    ) -> None:
        """initialize: what a worker runs before it takes calls. seconds: the limit of one call."""
        self.processes = processes
        self.seconds = seconds
        self.memory_bytes = int(memory_gb * 2**30)
        self.initialize = initialize
        self.pool: ProcessPool | None = None

    def run(self, function: Callable[..., Any], calls: Sequence[tuple]) -> list[Any]:
        """function(*call) of each call, a Failure where it took too long or killed its process.

        Raises UserError where a call does.
        """
        results = self.attempt(function, calls)
        for i, call in enumerate(calls):
            if results[i] is LOST:  # alone, so that a failure is its own
                (results[i],) = self.attempt(function, [call])
        return [Failure("ended its process") if result is LOST else result for result in results]

    def attempt(self, function: Callable[..., Any], calls: Sequence[tuple]) -> list[Any]:
        """As `run`, but LOST where another call may be to blame."""
        if self.pool is None:
            context = fork_server()
            try_process(context)
            self.pool = ProcessPool(
                self.processes,
                initializer=start_worker,
                initargs=(self.initialize, self.memory_bytes),
                context=context,
            )
        futures = [
            self.pool.schedule(with_alarm, (self.seconds, function, *call), timeout=self.seconds)
            for call in calls
        ]
        results = [self.result(future) for future in futures]
        if LOST in results:
            self.close()
        return results

    def result(self, future: Any) -> Any:
        """The result of one call, a Failure or LOST. Raises UserError where the call did."""
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
        except Exception as error:  # for example, an example that cannot be pickled
            return Failure(f"cannot be run in a process: {type(error).__name__}: {error}"[:300])

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        if self.pool is not None:
            self.pool.stop()
            self.pool.join()
        self.pool = None


def fork_server() -> Any:
    """The multiprocessing context of a server that has imported our modules once for all workers.

    The server searches for modules where this process does.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in sys.modules if name.startswith("rlkl.")])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def try_process(context: Any) -> None:
    """Start a process that does nothing. UserError if it cannot start.

    A new process first imports the script that was started. Without a guard the script would train
    there once more.
    """
    process = context.Process(target=int)
    process.start()
    process.join()
    if process.exitcode:
        script = getattr(sys.modules["__main__"], "__file__", "the script")
        reason = f"it ended with code {process.exitcode} there"
        if process.exitcode == UNGUARDED:
            reason = "it would start its run again there"
        raise UserError(
            f"the processes that score responses import {script}, and {reason}: put what it does "
            'under `if __name__ == "__main__":`, or set scoring.processes=0'
        )


def end_if_imported() -> None:
    """End this process if it is one of a pool that is importing the script that was started."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(UNGUARDED)


def start_worker(initialize: Callable[[], None], memory_bytes: int) -> None:
    """In a worker: initialize, then limit what it may allocate beyond that."""
    initialize()
    limit_memory(memory_bytes)


def with_alarm(seconds: float, function: Callable[..., Any], *call: Any) -> Any:
    """In a worker: function(*call), with an alarm that ends the worker if nobody else does."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds + GRACE)
    try:
        return function(*call)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
