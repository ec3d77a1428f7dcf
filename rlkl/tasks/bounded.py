"""Limits of time and memory for judges from other libraries, which read what a policy wrote."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from rlkl.tasks.limits import limit_memory

T = TypeVar("T")
TICK = 0.02  # seconds of CPU between two looks at the clock
# Bytes. No signal interrupts a single operation on whole numbers, and one on numbers of this size
# already takes seconds.
MEMORY = 2**28


class JudgeTimeout(BaseException):
    """A judge ran out of time.

    Not an Exception, so that `except Exception` in the judge does not swallow it. If something does
    all the same, the next tick raises it again.
    """


def bounded(function: Callable[..., T], *args: object, otherwise: T, seconds: float = 0.3) -> T:
    """function(*args); `otherwise` if it raises, or exceeds `seconds` of CPU or MEMORY bytes.

    The clock is that of the thread, so a busy machine changes no score. A signal looks at it, and
    only a main thread gets signals: the training loop and the workers of a process pool each run in
    one. In any other thread neither limit holds.
    """
    deadline = time.thread_time() + seconds

    def check_clock(number: int, frame: FrameType | None) -> None:
        if time.thread_time() > deadline:
            raise JudgeTimeout

    def skip_timeout(unraisable: Any) -> None:
        # In a destructor the timeout would only be printed. The next tick raises it again.
        if unraisable.exc_type is not JudgeTimeout:
            previous_hook(unraisable)

    has_signals = hasattr(signal, "setitimer")
    limited = has_signals and threading.current_thread() is threading.main_thread()
    previous_handler = signal.signal(signal.SIGVTALRM, check_clock) if limited else None
    previous_hook = sys.unraisablehook
    sys.unraisablehook = skip_timeout
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lift_limit = limit_memory(MEMORY) if limited else None
            if limited:
                signal.setitimer(signal.ITIMER_VIRTUAL, TICK, TICK)
            try:
                return function(*args)
            finally:
                deadline = math.inf  # no tick may interrupt the clean-up
                if lift_limit:
                    lift_limit()
    except (Exception, JudgeTimeout):  # a text that a policy wrote can make a parser raise anything
        return otherwise
    finally:
        if limited:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, previous_handler)
        sys.unraisablehook = previous_hook
