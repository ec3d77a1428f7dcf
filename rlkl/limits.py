"""A limit of memory for code that is somebody else's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial


def limit_memory(room: int) -> Callable[[], None]:
    """From now on no more than `room` bytes more: who asks for them meets a MemoryError, and does not end the machine.

    Returns what puts the limit back that was there before. Linux only: elsewhere there is none.
    """
    if sys.platform != "linux":
        return lambda: None
    import resource  # Windows has none

    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    with open("/proc/self/statm") as file:
        limit = int(file.read().split()[5]) * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_DATA, (limit if before < 0 else min(limit, before), most))
    return partial(resource.setrlimit, resource.RLIMIT_DATA, (before, most))
