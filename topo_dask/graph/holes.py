"""Filling holes: background that one instance encloses, wherever block faces lie.

A block finds the 6-connected components of its background and the smallest and largest label
beside each. Components that reach a face with another block are united along the faces; what has
one label all around, and does not reach the volume's border, is a hole of that instance.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.delayed import delayed

from topo_dask.graph.blocks import Source, assemble, grid_of
from topo_dask.graph.check import check_labels, check_not_negative
from topo_dask.graph.pieces import next_blocks
from topo_dask.graph.union import united
from topo_dask.grid import BlockGrid, Region
from topo_dask.kernels import cpu
from topo_dask.kernels.cpu import union

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Table = tuple[UInt64, UInt64, npt.NDArray[np.bool_]]
Planes = Sequence[npt.NDArray[Any]]
FACES = tuple(itertools.product(range(3), (0, -1)))
"""Axis and side (first or last voxel) of the six faces of a block."""


@dataclass(frozen=True, eq=False)
class Background:
    """What is known of the background components of a block.

    Parameters
    ----------
    lowest, highest
        uint64 ``[N]``: smallest and largest label beside each component; no label between them
        and two equal ones mean a single instance.
    at_border
        bool ``[N]``: whether it has a voxel in an outer face of the volume.
    open
        int64 ``[M]``, ascending: rows of those that have a voxel in a face with another block.
    planes
        For each of `FACES` the components there, int32, 0 in instances; empty at the border.
    """

    lowest: UInt64
    highest: UInt64
    at_border: npt.NDArray[np.bool_]
    open: Int64
    planes: tuple[npt.NDArray[np.int32], ...]

    @property
    def faces(self) -> Planes:
        """The rows of the open components in each of `FACES`, -1 in instances."""
        rows = np.full(len(self.lowest) + 1, -1, dtype=np.int64)
        rows[self.open + 1] = np.arange(len(self.open))
        return [rows[plane] for plane in self.planes]

    @property
    def filled(self) -> UInt64:
        """The instance that encloses each component, as far as the block can tell; 0 for none."""
        whole = (self.lowest == self.highest) & ~self.at_border
        whole[self.open] = False
        return np.where(whole, self.lowest, np.uint64(0))


def background_of_block(
    labels: npt.NDArray[Any], core: Region, read: Region, shape: tuple[int, ...]
) -> tuple[npt.NDArray[np.int32], Background]:
    """The background components of a block, from labels with one voxel around it."""
    inner = core.relative_to(read.start).slices
    components, lowest, highest = cpu.background(labels, core=inner)
    reached = np.zeros((2, len(lowest) + 1), dtype=bool)  # by the border, by other blocks
    planes: list[npt.NDArray[np.int32]] = []
    for axis, side in FACES:
        plane = np.asarray(components.take(side, axis=axis))
        outer = core.stop[axis] == shape[axis] if side else core.start[axis] == 0
        reached[0 if outer else 1, plane] = True
        planes.append(np.zeros((0, 0), dtype=np.int32) if outer else plane)
    border, others = reached[:, 1:]
    found = Background(lowest, highest, border, np.flatnonzero(others), tuple(planes))
    return components, found


def memory_of_holes(core: int) -> int:
    """Bytes that the background of a block, and filling it, take at most."""
    return 56 * core


def meeting(own: Planes, later: Planes, axis: int) -> Int64:
    """Pairs of open components of two blocks that touch: int64 ``[E,2]``, each once.

    Parameters
    ----------
    own, later
        Of a block and of the next one along an axis: the rows of their open components in each of
        `FACES`, -1 in instances.
    axis
        Which.
    """
    here, there = own[2 * axis + 1], later[2 * axis]
    both = (here >= 0) & (there >= 0)
    pairs = np.stack([here[both], there[both]], axis=1).astype(np.int64)
    return np.unique(pairs, axis=0).reshape(-1, 2)


OPEN_BYTES = 24
"""Bytes of an open component in the one union of those of all blocks; none for its edges.

Its root (4, from 2**31 on 8), and the smallest and largest label beside it.
"""

FACE_VOXELS_PER_OPEN = 16
"""No denser are open components taken to be in the faces of blocks; tissue has one for each 500."""


def enclosing(
    count: int, edges: Iterable[npt.NDArray[np.integer]], tables: Iterable[Table]
) -> UInt64:
    """The instance that encloses each of the open components of all blocks, 0 for none.

    Neither edges nor tables are kept, so that they may come from files.

    Parameters
    ----------
    count
        Number of open components.
    edges
        See `meeting`; in parts, between the open components of all blocks, numbered through.
    tables
        ``lowest``, ``highest`` and ``at_border`` of those of some blocks, one after the other; see
        `Background`.

    Examples
    --------
    >>> sevens, outside = np.full(3, 7, np.uint64), np.array([False, False, True])
    >>> enclosing(3, [np.array([[0, 1]])], [(sevens, sevens, outside)])
    array([7, 7, 0], dtype=uint64)
    """
    root = united(count, edges)
    low = np.full(count, np.iinfo(np.uint64).max, dtype=np.uint64)
    high = np.zeros(count, dtype=np.uint64)
    stop = 0
    for lowest, highest, at_border in tables:
        start, stop = stop, stop + len(lowest)
        # No label is 0, so what reaches the border is enclosed by none.
        least = np.where(at_border, np.uint64(0), lowest)
        union.least_at_roots(root[start:stop], least, low)
        union.most_at_roots(root[start:stop], highest, high)
    low[low != high] = 0
    union.spread_from_roots(root, low)
    return low


def all_edges(backgrounds: Sequence[Background], grid: BlockGrid) -> list[Int64]:
    """The pairs of open components that touch across all faces between blocks."""
    firsts = np.cumsum([0, *(len(b.open) for b in backgrounds)])
    faces = [b.faces for b in backgrounds]
    return [
        meeting(own, faces[other], axis) + firsts[[number, other]]
        for number, own in enumerate(faces)
        for axis, other in enumerate(next_blocks(number, grid))
        if other is not None
    ]


def fill(
    labels: npt.NDArray[Any],
    components: npt.NDArray[np.int32],
    found: Background,
    decided: UInt64,
) -> npt.NDArray[Any]:
    """The labels of a block with its holes filled; ``decided`` is that of its open components."""
    instances = found.filled
    instances[found.open] = decided
    if not instances.any():
        return labels
    of = np.concatenate([np.zeros(1, np.uint64), instances]).astype(labels.dtype)
    # Components are background, so nothing of an instance is lost.
    full: npt.NDArray[Any] = np.where(components > 0, of[components], labels)
    return full


# ---------------------------------------------------------------------------------- lazy graph


def _background(
    labels: npt.NDArray[Any], core: Region, read: Region, shape: tuple[int, ...]
) -> Background:
    check_not_negative(labels, argument="instances", where=f" in the block {core}")
    return background_of_block(labels, core, read, shape)[1]


def _decide(backgrounds: Sequence[Background], grid: BlockGrid) -> list[UInt64]:
    """For each block the instance that encloses each of its open components."""
    stops = np.cumsum([len(b.open) for b in backgrounds])
    tables = ((b.lowest[b.open], b.highest[b.open], b.at_border[b.open]) for b in backgrounds)
    decided = enclosing(int(stops[-1]), all_edges(backgrounds, grid), tables)
    return np.split(decided, stops[:-1])


def _fill_block(
    labels: npt.NDArray[Any], place: tuple[Region, Region, tuple[int, ...]], decided: UInt64
) -> npt.NDArray[Any]:
    core, read, shape = place
    components, found = background_of_block(labels, core, read, shape)
    return fill(labels[core.relative_to(read.start).slices], components, found, decided)


def fill_holes(instances: Any) -> Any:
    """Give the holes of instances to them: background that a single instance encloses.

    A hole is a 6-connected component of the background that has no voxel in an outer face of the
    volume and touches (6-neighbours) voxels of one instance only.

    Parameters
    ----------
    instances
        ``[Z,Y,X]`` labels, any integer type, 0 is background; NumPy or dask.

    Returns
    -------
    ``[Z,Y,X]`` of the same type and ids. NumPy for NumPy, lazy for dask; the same for any chunks.

    Raises
    ------
    InvalidArgument, InvalidType, InvalidData
        The argument is named.

    Examples
    --------
    >>> ball = np.full((3, 3, 3), 7)
    >>> ball[1, 1, 1] = 0
    >>> fill_holes(ball)[1, 1]
    array([7, 7, 7])
    """
    check_labels(instances, argument="instances")
    if not isinstance(instances, da.Array):
        labels = np.array(instances)
        whole = Region((0, 0, 0), labels.shape)
        components, found = background_of_block(labels, whole, whole, labels.shape)
        return fill(labels, components, found, np.zeros(0, dtype=np.uint64))
    grid, source = grid_of(instances, argument="instances"), Source.of(instances)
    places = [(core, core.grow(1, within=grid.shape), grid.shape) for core in grid]
    reads = [source.read(read) for _, read, _ in places]
    task = delayed(_background)
    parts = [task(labels, *place) for labels, place in zip(reads, places, strict=True)]
    decided = delayed(_decide)(parts, grid)
    blocks = [
        delayed(_fill_block)(labels, place, decided[number])
        for number, (labels, place) in enumerate(zip(reads, places, strict=True))
    ]
    return assemble(blocks, grid, dtype=instances.dtype)
