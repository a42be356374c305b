"""The nearest labelled voxel at any distance: blocks are looked through from the nearest outwards.

What is found in a block bounds how far others need to be looked through, and only the part of a
block within that bound is read. The search ends when no unread block is near enough to matter, so
its answer is that of the whole volume, whatever the blocks; memory is that of one block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.grid import BlockGrid, Region
from topo_dask.kernels import cpu
from topo_dask.kernels.tables import FARTHEST

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Wanted:
    """Voxels that take the label of the nearest labelled voxel.

    Parameters
    ----------
    points
        int64 ``[N,3]``, global.
    groups
        int64 ``[N]``: only labels of the same group count; ``None`` for any label.
    """

    points: Int64
    groups: Int64 | None = None

    def __len__(self) -> int:
        return len(self.points)

    @property
    def box(self) -> Region:
        """The smallest region around all of them."""
        low, high = self.points.min(axis=0), self.points.max(axis=0) + 1
        return Region(tuple(low.tolist()), tuple(high.tolist()))

    def take(self, which: npt.NDArray[Any]) -> Wanted:
        """Some of them."""
        groups = None if self.groups is None else self.groups[which]
        return Wanted(self.points[which], groups)


def _squared_gap(points: Int64, region: Region) -> Int64:
    """Squared distance of each point to the nearest voxel of a region."""
    low, last = np.asarray(region.start), np.asarray(region.stop) - 1
    apart = np.maximum(np.maximum(low - points, points - last), 0)
    squared: Int64 = (apart**2).sum(axis=1)
    return squared


def nearest_apart(one: Region, other: Region) -> int:
    """Squared distance of the nearest voxels of two regions.

    Examples
    --------
    >>> nearest_apart(Region((0, 0, 0), (2, 2, 2)), Region((1, 4, 5), (9, 9, 9)))
    25
    """
    pairs = zip(one.start, one.stop, other.start, other.stop, strict=True)
    return sum(max(c - b + 1, a - d + 1, 0) ** 2 for a, b, c, d in pairs)


def farthest_apart(one: Region, other: Region) -> int:
    """Squared distance of the farthest voxels of two regions.

    Examples
    --------
    >>> farthest_apart(Region((0, 0, 0), (1, 1, 2)), Region((0, 0, 0), (1, 2, 4)))
    10
    """
    pairs = zip(one.start, one.stop, other.start, other.stop, strict=True)
    return sum(max(b - 1 - c, d - 1 - a) ** 2 for a, b, c, d in pairs)


def _outwards(box: Region, grid: BlockGrid, holding: Int64 | None) -> Iterator[tuple[int, int]]:
    """Squared distance and number of the blocks in ``holding``, from the nearest to ``box`` on."""
    reach, done = min(grid.largest), -1
    while True:
        near = grid.touching(box.grow(reach, within=grid.shape))
        if holding is not None:
            near = np.intersect1d(np.asarray(near, dtype=np.int64), holding).tolist()
        found = sorted((nearest_apart(box, grid.region(n)), n) for n in near)
        # Blocks beyond the reach along a diagonal come with the next round, in their order.
        yield from (pair for pair in found if done < pair[0] <= reach * reach)
        if reach >= max(grid.shape):
            yield from (pair for pair in found if pair[0] > reach * reach)
            return
        done, reach = reach * reach, 2 * reach


def nearest_over_blocks(
    wanted: Wanted,
    grid: BlockGrid,
    read: Callable[[Region], npt.NDArray[Any]],
    *,
    holding: Int64 | None = None,
    group_of: Callable[[UInt64], Int64] | None = None,
) -> UInt64:
    """The label of the labelled voxel nearest to each wanted voxel; the smallest of a tie.

    Parameters
    ----------
    wanted
        The voxels; near each other, e.g. those of one block.
    grid
        How the volume is read.
    read
        Gives the labels of a region (inside one block), 0 where there is none.
    holding
        int64, ascending: the blocks that may hold labels that count; ``None`` for all.
    group_of
        Gives the group of each of some labels, where groups count.

    Returns
    -------
    uint64 ``[N]``, 0 where no label counts anywhere.
    """
    squared = np.full(len(wanted), FARTHEST, dtype=np.int64)
    labels = np.zeros(len(wanted), dtype=np.uint64)
    if not len(wanted):
        return labels
    box = wanted.box
    for gap, number in _outwards(box, grid, holding):
        farthest = int(squared.max())
        if gap > farthest:
            break
        region = grid.region(number)
        if farthest < FARTHEST:
            region = region.intersect(box.grow(math.isqrt(farthest), within=grid.shape))
        todo = np.flatnonzero(_squared_gap(wanted.points, region) <= squared)
        if len(todo) == 0:
            continue
        runs = cpu.label_runs(read(region), origin=region.start)
        groups = None
        if group_of is not None and wanted.groups is not None:
            ids, row = np.unique(runs.ids, return_inverse=True)
            groups = group_of(ids)[row]
            some = np.isin(groups, np.unique(wanted.groups[todo]))
            runs, groups = runs.take(some), groups[some]
        asked = wanted.take(todo)
        squared[todo], labels[todo] = cpu.nearest_labels(
            asked.points,
            runs,
            groups=asked.groups,
            group_of=groups,
            known=(squared[todo], labels[todo]),
        )
    return labels


def memory_of_nearest(core: int) -> int:
    """Bytes that the nearest labels for the voxels of a block take at most.

    Its labels, those of another block and their runs; of at most half of its voxels the position,
    the distance and the label.
    """
    return 60 * core
