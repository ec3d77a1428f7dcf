"""A memory limit for user code and for other libraries' code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

STATM = Path("/proc/self/statm")  # memory of this process, in pages; only Linux has it


def limit_memory(extra_bytes: int) -> Callable[[], None]:
    """Let this process take at most `extra_bytes` more than it has now.

    An allocation beyond that raises MemoryError. Returns a function that restores the limit that
    held before. Where there is no STATM there is no limit.
    """
    if not STATM.exists():
        return lambda: None
    import resource  # Windows has none

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    data_pages = int(STATM.read_text().split()[5])
    limit = data_pages * resource.getpagesize() + extra_bytes
    if soft >= 0:  # a negative number means unlimited
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    return partial(resource.setrlimit, resource.RLIMIT_DATA, (soft, hard))
