"""How many tiles are alive at once: planned from an order of blocks, measured by the clock.

A tile is alive from when the first block that needs it begins until the last one is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def fast_to_slow(counts: Sequence[int]) -> list[int]:
    """Axes in the order of a traversal that keeps few tiles alive: the one with most goes last.

    Examples
    --------
    >>> fast_to_slow((4, 9, 4)), fast_to_slow((5, 5))
    ([2, 0, 1], [1, 0])
    """
    return sorted(range(len(counts)), key=lambda axis: (counts[axis], -axis))


def spans(tiles: Array, began: Array, ended: Array, *, count: int) -> tuple[Array, Array]:
    """When each tile is first and last needed.

    Parameters
    ----------
    tiles
        Numbers of tiles, one for each pair of a tile and a block that needs it.
    began, ended
        Of the block of each pair: positions, or times; NaN where not known.
    count
        How many tiles there are.

    Returns
    -------
    float64 ``[count]`` each: infinite for a tile that no block needs, NaN where not known.

    Examples
    --------
    >>> first, last = spans(np.array([0, 1, 0]), np.array([5, 5, 6]), np.array([7, 7, 9]), count=2)
    >>> first.tolist(), last.tolist()
    ([5.0, 5.0], [9.0, 7.0])
    """
    first, last = np.full(count, np.inf), np.full(count, -np.inf)
    with np.errstate(invalid="ignore"):
        np.minimum.at(first, tiles, began)
        np.maximum.at(last, tiles, ended)
    return first, last


def planned_alive(first: Array, last: Array, *, ahead: int) -> int:
    """Most tiles alive at once, whatever each block takes.

    Parameters
    ----------
    first, last
        For each tile the positions, in the order of the blocks, of the first and the last that
        needs it.
    ahead
        No block is begun so many behind the first unfinished one.

    Examples
    --------
    >>> planned_alive(np.array([0, 1, 5]), np.array([2, 3, 6]), ahead=1)
    2
    """
    known = np.isfinite(first)
    begin = np.maximum(first[known].astype(np.int64) - ahead + 1, 0)
    end = last[known].astype(np.int64) + 1
    changes = np.zeros(int(end.max(initial=0)) + 1, dtype=np.int64)
    np.add.at(changes, begin, 1)
    np.add.at(changes, end, -1)
    return int(changes.cumsum().max(initial=0))


def measured_alive(first: Array, last: Array) -> int:
    """Most tiles alive at once, from the times when each was first and last needed.

    Tiles of unknown or infinite times (of blocks that were made before a run was resumed) do not
    count.

    Examples
    --------
    >>> measured_alive(np.array([0.0, 1.0, 2.5]), np.array([2.5, 2.0, 3.0]))
    2
    """
    known = np.isfinite(first) & np.isfinite(last)
    moments = np.concatenate([first[known], last[known]])
    changes = np.repeat([1, -1], int(known.sum()))
    # At the same moment what ends comes first.
    return int(changes[np.lexsort((changes, moments))].cumsum().max(initial=0))
