"""A limit of memory for code that is somebody else's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

STATM = Path("/proc/self/statm")  # what this process uses, in pages: Linux has it


def limit_memory(room: int) -> Callable[[], None]:
    """From now on no more than `room` bytes more: who asks for them meets a MemoryError, and does not end the machine.

    Returns what puts the limit back that was there before. Where there is no STATM there is no limit.
    """
    if not STATM.exists():
        return lambda: None
    import resource  # Windows has none

    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(STATM.read_text().split()[5]) * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_DATA, (limit if before < 0 else min(limit, before), most))
    return partial(resource.setrlimit, resource.RLIMIT_DATA, (before, most))
