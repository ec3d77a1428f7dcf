"""Limits of time and memory for judges that are somebody else's code."""

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

from rlkl.limits import limit_memory

T = TypeVar("T")
TICK = 0.02  # seconds of CPU between two looks at the clock
ROOM = 2**28  # bytes: one operation on whole numbers of that size is past every signal, and takes seconds


class Late(BaseException):
    """Not an Exception, so that `except Exception` in the judge does not swallow it; if something does, it returns."""


def bounded(function: Callable[..., T], *args: object, otherwise: T, seconds: float = 0.3) -> T:
    """function(*args), or `otherwise` where it raises, or takes more than so many seconds of CPU or ROOM.

    The clock is that of the thread: a busy machine changes no score. A signal looks at it, and only a main thread gets
    signals (the training loop and the workers of a process pool are one each); elsewhere there is neither limit.
    """
    end = [time.thread_time() + seconds]

    def look(number: int, frame: FrameType | None) -> None:
        if time.thread_time() > end[0]:
            raise Late

    def ignored(unraisable: Any) -> None:  # a tick in a destructor is lost, and the next one comes: nothing to print
        if unraisable.exc_type is not Late:
            others(unraisable)

    ticks = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGVTALRM, look) if ticks else None
    others, sys.unraisablehook = sys.unraisablehook, ignored
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lift = limit_memory(ROOM) if ticks else None
            if ticks:
                signal.setitimer(signal.ITIMER_VIRTUAL, TICK, TICK)
            try:
                return function(*args)
            finally:
                end[0] = math.inf  # a tick that comes in the cleaning up is too late to raise
                if lift:
                    lift()
    except (Exception, Late):  # a recursion, memory, a parser: anything may come out of a text that a policy wrote
        return otherwise
    finally:
        if ticks:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
        sys.unraisablehook = others
