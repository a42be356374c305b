"""Flows of a block that does not fit on a GPU: of its halves, each with its own context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.grid import Region

SHORTEST = 16
"""Longest side of a core that is not halved any more: the processor's."""


def halves(core: Region) -> list[Region]:
    """Two halves along the longest side; none of what is too small to be halved.

    Examples
    --------
    >>> [str(half) for half in halves(Region((0, 0, 0), (4, 32, 4)))]
    ['[0:4, 0:16, 0:4]', '[0:4, 16:32, 0:4]']
    """
    axis = int(np.argmax(core.shape))
    if core.shape[axis] <= SHORTEST:
        return []
    middle = (core.start[axis] + core.stop[axis]) // 2
    stop, start = list(core.stop), list(core.start)
    stop[axis] = start[axis] = middle
    return [Region(core.start, tuple(stop)), Region(tuple(start), core.stop)]


def joined(
    core: Region, parts: list[Region], flow_of: Callable[[Region], npt.NDArray[Any]]
) -> npt.NDArray[np.float32]:
    """The flow of a core from those of its parts."""
    flow = np.empty((3, *core.shape), dtype=np.float32)
    for part in parts:
        flow[(slice(None), *part.relative_to(core.start).slices)] = flow_of(part)
    return flow
