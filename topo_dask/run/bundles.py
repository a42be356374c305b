"""Several short tasks as one, and what they used: for tasks that take less than to submit one."""

from __future__ import annotations

import os
import pickle
import socket
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from distributed.protocol.pickle import loads

from topo_dask.errors import TopoError
from topo_dask.kernels.backends import give_back
from topo_dask.kernels.computed import noting
from topo_dask.run.progress import Usage, bytes_moved, peak_memory

Outcome = tuple[Any, BaseException | None]
"""Result and error of an item."""

LARGEST = 512
"""So many short tasks go to a worker together, at most."""

MOST_BYTES = 16384
"""They take about so many bytes together, at most: dask's scheduler keeps the last 1000 messages to
each worker."""


@dataclass(frozen=True)
class Bundle:
    """A function of one item, made one of several.

    Parameters
    ----------
    stage
        Its name.
    function
        Module-level; called with one item.
    enough_s
        Who has worked so long on a bundle begins none of its other tasks.

    Examples
    --------
    >>> outcomes, usage = Bundle("abs", abs, 1.0)([-1, 2])
    >>> outcomes, usage.seconds < 1
    ([(1, None), (2, None)], True)
    """

    stage: str
    function: Callable[[Any], Any]
    enough_s: float

    def __call__(self, items: Iterable[Any]) -> tuple[list[Outcome], Usage]:
        """What becomes of the first items, as many as are begun in time; what that used."""
        began, before, spent = time.perf_counter(), bytes_moved(), 0.0
        found: list[Outcome] = []
        where: Counter[str] = Counter()
        in_parts = 0
        for item in items:
            if found and spent > self.enough_s:
                break
            with noting() as computed:
                try:
                    found.append((self.function(item), None))
                except Exception as error:
                    found.append((None, error))
                finally:
                    give_back(computed)
            for place in computed.where:
                where[place] += 1
            in_parts += computed.in_parts > 0
            spent = time.perf_counter() - began
        process = f"{socket.gethostname()}:{os.getpid()}"
        moved = before, bytes_moved()
        return found, Usage(process, spent, *moved, peak_memory(), dict(where), in_parts)


@dataclass(frozen=True)
class Packed:
    """A bundle for another process: items come as bytes, errors leave so that they can travel.

    What a scheduler keeps of messages takes a tenth of the memory as bytes.
    """

    bundle: Bundle

    @property
    def stage(self) -> str:
        """Its name."""
        return self.bundle.stage

    def __call__(self, items: bytes) -> tuple[list[Outcome], Usage]:
        """As the bundle's."""
        found, usage = self.bundle(loads(items))
        return [(result, error and portable(error)) for result, error in found], usage


def portable(error: BaseException) -> BaseException:
    """An error as it can travel: itself, or one that says the same; where it arose is a note.

    Examples
    --------
    >>> portable(ValueError("3")), portable(ValueError(lambda: 3)).args[0][:10]
    (ValueError('3'), 'ValueError')
    """
    if not isinstance(error, TopoError):
        error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # what it holds may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class Sizes:
    """How many tasks go together: twice as many as last time, while they are short and small.

    Examples
    --------
    >>> sizes = Sizes(enough_s=0.1)
    >>> sizes.learn(1, 1, 0.01)
    >>> sizes.learn(2, 2, 0.01)
    >>> sizes.now
    4
    >>> sizes.learn(4, 1, 0.2)
    >>> sizes.now
    1
    """

    def __init__(self, enough_s: float) -> None:
        self.enough_s, self.now, self.most = enough_s, 1, LARGEST

    def learn(self, sent: int, done: int, seconds: float) -> None:
        """What became of a bundle."""
        fast = seconds < self.enough_s / 2 and done == sent
        self.now = min(self.most, 2 * sent) if fast else max(1, done)

    def weigh(self, items: bytes, count: int) -> bytes:
        """The bytes of so many items, from which follows how many the next bundle may have."""
        self.most = max(1, min(LARGEST, MOST_BYTES * count // len(items)))
        self.now = min(self.now, self.most)
        return items
