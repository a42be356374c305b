"""What computed a task: noted by the kernels' callers, asked for by those who report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

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
