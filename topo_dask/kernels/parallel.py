"""Threads inside one kernel call; numba's own parallel loops may not start from two threads."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

Starmap = Callable[[Callable[..., Any], list[tuple[Any, ...]]], None]


def serial(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> None:
    """Run ``function(*call)`` for every call, one after the other."""
    for call in calls:
        function(*call)


@contextmanager
def starmap(threads: int) -> Iterator[Starmap]:
    """Give a function that runs ``function(*call)`` for every call, on ``threads`` threads.

    The calling thread is one of them: short calls would be over before another has begun.
    """
    if threads <= 1:
        yield serial
        return
    with ThreadPoolExecutor(threads - 1) as pool:

        def parallel(function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> None:
            left = iter(calls)  # from which each thread takes the next
            others = [pool.submit(serial, function, left) for _ in calls[1:threads]]
            serial(function, left)
            for other in others:
                other.result()

        yield parallel


def ranges(count: int, parts: int) -> list[tuple[int, int]]:
    """Cut ``range(count)`` into at most ``parts`` runs of almost equal length.

    Examples
    --------
    >>> ranges(5, 2)
    [(0, 3), (3, 5)]
    """
    parts = max(1, min(parts, count))
    cuts = [-(-count * i // parts) for i in range(parts + 1)]
    return list(itertools.pairwise(cuts))


def available_cores() -> int:
    """Cores that this process may use (an affinity mask or a batch job may leave fewer)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
