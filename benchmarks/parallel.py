"""Run many jobs in a pool of processes or threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, as_completed
from typing import TypeVar

S, T = TypeVar("S"), TypeVar("T")


def as_they_end(pool: Executor, function: Callable[[S], T], jobs: Sequence[S]) -> Iterator[T]:
    """function(job) of each job, in the order in which they end.

    Where one raises, or the caller is interrupted, those that have not begun are left out.
    """
    futures = [pool.submit(function, job) for job in jobs]
    try:
        for future in as_completed(futures):
            yield future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
