"""What computed a task: noted by the kernels' callers, asked for by those who report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

from topo_dask.errors import DeviceMemoryError

Made = TypeVar("Made")

PROCESSOR = "processor"
"""What the processor is called where people read what computed."""


@dataclass
class Computed:
    """What computed in a task, and how often a GPU's memory was too small for a block."""

    where: set[str] = field(default_factory=set)
    in_parts: int = 0


_COMPUTED: ContextVar[Computed | None] = ContextVar("computed", default=None)


@contextmanager
def noting() -> Iterator[Computed]:
    """Note what computes in this thread meanwhile.

    Examples
    --------
    >>> with noting() as computed:
    ...     note(PROCESSOR)
    >>> computed.where
    {'processor'}
    """
    found = Computed()
    token = _COMPUTED.set(found)
    try:
        yield found
    finally:
        _COMPUTED.reset(token)


def note(where: str) -> None:
    """Something computes here; nothing is noted where nobody asks."""
    computed = _COMPUTED.get()
    if computed is not None:
        computed.where.add(where)


def note_in_parts() -> None:
    """A GPU's memory was too small, and what did not fit is computed in parts."""
    computed = _COMPUTED.get()
    if computed is not None:
        computed.in_parts += 1


def whole_or(parts: Callable[[], Made], whole: Callable[[], Made]) -> Made:
    """What ``whole()`` gives, or ``parts()`` where the device's memory is too small for it.

    Examples
    --------
    >>> def too_large() -> int:
    ...     raise DeviceMemoryError("device memory", "2 bytes", "1 byte")
    >>> whole_or(lambda: 2, too_large)
    2
    """
    try:
        return whole()
    except DeviceMemoryError:
        note_in_parts()
    # Outside of the handler: the error keeps the arrays of the attempt alive.
    return parts()
