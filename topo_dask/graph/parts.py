"""Blocks that do not fit on a GPU: made of their halves, flows each with its own context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.grid import Region
from topo_dask.kernels.computed import whole_or

SHORTEST = 16
"""Longest side of a core that is not halved any more: the processor's."""

FEWEST = 4096
"""Voxels of a block that a GPU's memory holds, or what a tile gives to it is too much for it."""


def halves(core: Region, *, shortest: int = SHORTEST) -> list[Region]:
    """Two halves along the longest side; none of what is too small to be halved.

    Examples
    --------
    >>> [str(half) for half in halves(Region((0, 0, 0), (4, 32, 4)))]
    ['[0:4, 0:16, 0:4]', '[0:4, 16:32, 0:4]']
    """
    axis = int(np.argmax(core.shape))
    if core.shape[axis] <= shortest:
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


def made_of_halves(
    block: Region, make: Callable[[Region, str], npt.NDArray[Any]], backend: str
) -> npt.NDArray[Any]:
    """A block at once, or of halves where a GPU's memory does not hold what it takes.

    Parameters
    ----------
    block
        A region, of whose voxels none needs another one.
    make
        Makes a region, ``[*channels, *its shape]``, with a backend.
    backend
        The one asked for; what is too small to be halved is the processor's.
    """

    def parts() -> npt.NDArray[Any]:
        found = halves(block, shortest=1) if block.size > FEWEST else []
        if not found:
            return make(block, "cpu")
        axis = int(np.argmax(block.shape)) - len(block.shape)
        return np.concatenate([made_of_halves(h, make, backend) for h in found], axis=axis)

    return whole_or(parts, lambda: make(block, backend))
