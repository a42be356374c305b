"""Disconnected instances: pieces of every block, one union over faces, what is large, its numbers.

A piece of a block knows its label, its size and its first voxel in the whole volume; equal labels
on the two sides of a face between blocks are one piece. Large pieces become instances of their
own; the voxels of the others are left for a search of the nearest large piece.
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

from topo_dask.config import number as check_number
from topo_dask.graph.blocks import Source, assemble, grid_of
from topo_dask.graph.check import check_labels, check_not_negative
from topo_dask.graph.nearest import Wanted, nearest_over_blocks
from topo_dask.graph.union import united
from topo_dask.grid import BlockGrid, Region
from topo_dask.kernels import cpu
from topo_dask.kernels.cpu import union
from topo_dask.kernels.cpu.pieces import blocks_of_labels, name_pieces
from topo_dask.kernels.tables import LabelRuns, join_runs

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Face = npt.NDArray[np.int32]
Table = tuple[UInt64, Int64, Int64]


@dataclass(frozen=True, eq=False)
class BlockPieces:
    """The pieces of a block.

    Parameters
    ----------
    ids
        uint64 ``[P]``: the label of each.
    voxels
        int64 ``[P]``: its size.
    first
        int64 ``[P]``: index of its first voxel, in C order of the whole volume.
    faces
        int32: the pieces in the block's first and last planes along z, y and x, numbered from 1.
    """

    ids: UInt64
    voxels: Int64
    first: Int64
    faces: tuple[Face, ...]


@dataclass(frozen=True, eq=False)
class SplitPlan:
    """What becomes of every piece.

    Parameters
    ----------
    labels
        uint64 ``[N]``: the new label of each piece of each block, 0 for small ones: they join the
        nearest large one.
    instance_of
        uint64 ``[K]``, ascending: the instance that each new label, from 1 on, is a part of.
    sought
        bool ``[N]``: large pieces of instances that have small ones.
    """

    labels: UInt64
    instance_of: UInt64
    sought: npt.NDArray[np.bool_]

    @property
    def instances(self) -> int:
        """Number of instances."""
        return len(self.instance_of)


def pieces_of_block(
    labels: npt.NDArray[Any], core: Region, shape: tuple[int, ...]
) -> tuple[Face, BlockPieces]:
    """The piece of every voxel of a block, and what others need to know of them."""
    number, ids, voxels, first = cpu.pieces(labels)
    at = np.unravel_index(first, core.shape)
    index = tuple(i + o for i, o in zip(at, core.start, strict=True))
    faces = tuple(
        np.ascontiguousarray(np.take(number, side, axis=axis))
        for axis, side in itertools.product(range(3), (0, -1))
    )
    globally = np.ravel_multi_index(index, shape).astype(np.int64)
    return number, BlockPieces(ids, voxels, globally, faces)


def next_blocks(number: int, grid: BlockGrid) -> list[int | None]:
    """The block after a block along z, y and x; ``None`` at the volume's end."""
    index = np.unravel_index(number, grid.counts)
    found: list[int | None] = []
    for axis in range(3):
        there = [int(i) + (a == axis) for a, i in enumerate(index)]
        inside = there[axis] < grid.counts[axis]
        found.append(int(np.ravel_multi_index(there, grid.counts)) if inside else None)
    return found


def edges_of_faces(own: BlockPieces, others: Sequence[BlockPieces | None]) -> list[Int64]:
    """Pairs of pieces that are one, across the faces to the next blocks along z, y and x.

    Returns
    -------
    For each axis int64 ``[E,2]``: rows of the block's own pieces and of the other block's.
    """
    edges = []
    for axis, other in enumerate(others):
        if other is None:
            edges.append(np.zeros((0, 2), np.int64))
            continue
        mine, theirs = own.faces[2 * axis + 1].ravel(), other.faces[2 * axis].ravel()
        pairs = np.stack([mine, theirs], axis=1)[(mine > 0) & (theirs > 0)].astype(np.int64) - 1
        same = own.ids[pairs[:, 0]] == other.ids[pairs[:, 1]]
        edges.append(np.unique(pairs[same], axis=0).reshape(-1, 2))
    return edges


def plan_split(
    count: int, edges: Iterable[Int64], tables: Iterable[Table], ratio: float
) -> SplitPlan:
    """Decide what becomes of the pieces of all blocks.

    A piece is large that has at least max(1, floor(ratio * size)) of its instance's voxels; an
    instance without any large piece stays whole. New labels are numbered by instance, then by
    first voxel in C order. Neither edges nor tables are kept, so that they may come from files;
    see `PIECE_BYTES` for what is.

    Parameters
    ----------
    count
        Number of pieces.
    edges
        int64 ``[E,2]``, in parts: rows of those that are one across a face.
    tables
        ``ids``, ``voxels`` and ``first`` of the pieces of some blocks, one after the other.
    ratio
        What part of its instance a large piece is at least.

    Examples
    --------
    >>> ids = np.array([5, 5, 4], np.uint64)
    >>> plan = plan_split(3, [], [(ids, np.array([1, 20, 3]), np.array([0, 7, 9]))], 0.1)
    >>> plan.labels, plan.instance_of, plan.sought
    (array([0, 2, 1], dtype=uint64), array([4, 5], dtype=uint64), array([False,  True, False]))
    """
    root = united(count, edges)
    ids, sizes = np.empty(count, np.uint64), np.zeros(count, np.int64)
    begin = np.full(count, np.iinfo(np.int64).max)
    stop = 0
    for some, voxels, first in tables:
        start, stop = stop, stop + len(some)
        ids[start:stop] = some
        union.add_to_roots(root[start:stop], voxels, sizes)
        union.least_at_roots(root[start:stop], first, begin)
    order = np.lexsort((begin, ids))
    labels, sought = begin, np.zeros(count, dtype=bool)  # where pieces begin is not needed again
    whose = ids.view(np.int64)
    found = name_pieces(order, root, whose, sizes, labels, sought, float(ratio))
    for values in (labels, sought):
        union.spread_from_roots(root, values)
    return SplitPlan(labels.view(np.uint64), order[:found].view(np.uint64), sought)


@dataclass(frozen=True, eq=False)
class Holders:
    """Which blocks hold large pieces of the instances that have small ones.

    Parameters
    ----------
    instance_of
        See `SplitPlan`.
    starts
        int64 ``[K + 1]``: where the blocks of each new label begin.
    blocks
        int32: those blocks, label by label; a block may stand there more than once.
    """

    instance_of: UInt64
    starts: Int64
    blocks: npt.NDArray[np.int32]

    def of(self, instances: UInt64) -> Int64:
        """Those that hold large pieces of some instances, ascending; no other rows are read."""
        ends = (np.searchsorted(self.instance_of, instances, side=side) for side in _SIDES)
        rows = [self.blocks[self.starts[a] : self.starts[b]] for a, b in zip(*ends, strict=True)]
        return np.unique(np.concatenate([np.zeros(0, np.int64), *rows]))


_SIDES: tuple[Any, Any] = ("left", "right")


def holders(plan: SplitPlan, first: Int64) -> Holders:
    """Find out which blocks hold the large pieces that are sought.

    Parameters
    ----------
    plan
        What becomes of the pieces.
    first
        int64 ``[B + 1]``: the first piece of each block, and the end.

    Examples
    --------
    >>> ids, sizes = np.array([7, 7, 7], np.uint64), np.array([30, 1, 40])
    >>> plan = plan_split(3, [], [(ids, sizes, np.array([0, 9, 12]))], 0.1)
    >>> holders(plan, np.array([0, 1, 1, 2, 3])).of(np.array([7], np.uint64))
    array([0, 3])
    """
    starts = np.zeros(plan.instances + 1, dtype=np.int64)
    blocks = np.empty(np.count_nonzero(plan.sought), dtype=np.int32)
    blocks_of_labels(plan.labels.view(np.int64), plan.sought, first, starts, blocks)
    return Holders(plan.instance_of, starts, blocks)


def blocks_with_small(plan: SplitPlan, first: Int64) -> list[int]:
    """The blocks that hold small pieces, ascending; ``first`` as for `holders`."""
    held = np.flatnonzero(np.diff(first))
    some: list[int] = held[np.logical_or.reduceat(plan.labels == 0, first[held])].tolist()
    return some


def small_voxels(
    labels: npt.NDArray[Any], split: npt.NDArray[Any], origin: tuple[int, ...]
) -> Wanted:
    """The voxels of a block that have no new label yet, with their instances as groups."""
    left = (labels != 0) & (split == 0)
    points = np.argwhere(left).astype(np.int64) + np.asarray(origin, dtype=np.int64)
    return Wanted(points, labels[left].astype(np.uint64).view(np.int64))


# ------------------------------------------------------------------------- in memory, and lazily


def _group_of(plan: SplitPlan, labels: UInt64) -> Int64:
    return np.asarray(plan.instance_of[labels - 1]).view(np.int64)


def _split_whole(labels: npt.NDArray[Any], ratio: float) -> npt.NDArray[np.int32]:
    whole = Region((0, 0, 0), labels.shape)
    number, found = pieces_of_block(labels, whole, labels.shape)
    plan = plan_split(len(found.ids), [], [_table_of(found)], ratio)
    out = _names_of(plan.labels)[number]
    wanted = small_voxels(labels, out, whole.start)
    nearest = nearest_over_blocks(
        wanted,
        BlockGrid(labels.shape, labels.shape),
        lambda region: out[region.slices],
        group_of=lambda ids: _group_of(plan, ids),
    )
    out[tuple(wanted.points.T)] = nearest.astype(np.int32)
    return out


def _table_of(found: BlockPieces) -> Table:
    return found.ids, found.voxels, found.first


def _names_of(labels: UInt64) -> npt.NDArray[np.int32]:
    return np.append(np.uint64(0), labels).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Planned:
    """What becomes of the pieces of all chunks.

    Parameters
    ----------
    plan
        Of all pieces, one chunk after the other.
    offsets
        How many pieces lie before those of each chunk.
    """

    plan: SplitPlan
    offsets: Int64

    def rows(self, block: int) -> slice:
        """The pieces of a chunk."""
        return slice(self.offsets[block], self.offsets[block + 1])


def _chunk_pieces(labels: npt.NDArray[Any], core: Region, shape: tuple[int, ...]) -> BlockPieces:
    check_not_negative(labels, argument="instances", where=f" in the block at {core.start}")
    return pieces_of_block(labels, core, shape)[1]


def _plan_chunks(
    parts: Sequence[BlockPieces], edges: Sequence[list[Int64]], grid: BlockGrid, ratio: float
) -> Planned:
    offsets = np.cumsum([0, *(len(p.ids) for p in parts)])
    whole = (
        pairs + offsets[[number, other]]
        for number, along in enumerate(edges)
        for other, pairs in zip(next_blocks(number, grid), along, strict=True)
        if other is not None
    )
    plan = plan_split(int(offsets[-1]), whole, map(_table_of, parts), ratio)
    return Planned(plan, offsets)


def _painted(labels: npt.NDArray[Any], planned: Planned, block: int) -> npt.NDArray[np.int32]:
    """A chunk with the labels of its large pieces, 0 for small ones."""
    number, *_ = cpu.pieces(labels)
    return _names_of(planned.plan.labels[planned.rows(block)])[number]


def _sought_runs(labels: npt.NDArray[Any], core: Region, planned: Planned, block: int) -> LabelRuns:
    """The runs of a chunk's large pieces of instances that have small ones."""
    sought = planned.plan.sought[planned.rows(block)]
    if not sought.any():
        return cpu.label_runs(np.zeros(core.shape, np.uint8), origin=core.start)
    number, *_ = cpu.pieces(labels)
    names = _names_of(planned.plan.labels[planned.rows(block)] * sought)
    return cpu.label_runs(names[number], origin=core.start)


def _split_chunk(
    labels: npt.NDArray[Any], core: Region, planned: Planned, block: int, runs: LabelRuns
) -> npt.NDArray[np.int32]:
    """A chunk with its new labels; ``runs`` are those of `_sought_runs` of all chunks."""
    out = _painted(labels, planned, block)
    if (planned.plan.labels[planned.rows(block)] == 0).any():
        wanted = small_voxels(labels, out, core.start)
        groups = _group_of(planned.plan, runs.ids)
        _, nearest = cpu.nearest_labels(wanted.points, runs, groups=wanted.groups, group_of=groups)
        out[tuple((wanted.points - np.asarray(core.start)).T)] = nearest.astype(np.int32)
    return out


def _split_lazily(labels: da.Array, ratio: float) -> da.Array:
    """Pieces are found again when they are painted: until all are known only tables are kept."""
    grid, source = grid_of(labels, argument="instances"), Source.of(labels)
    chunks = [source.read(core) for core in grid]
    parts = [
        delayed(_chunk_pieces)(chunk, core, grid.shape)
        for chunk, core in zip(chunks, grid, strict=True)
    ]
    edges = [
        delayed(edges_of_faces)(
            parts[n], [None if o is None else parts[o] for o in next_blocks(n, grid)]
        )
        for n in range(len(grid))
    ]
    planned = delayed(_plan_chunks)(parts, edges, grid, ratio)
    runs = [
        delayed(_sought_runs)(chunk, core, planned, n)
        for n, (chunk, core) in enumerate(zip(chunks, grid, strict=True))
    ]
    everything = delayed(join_runs)(runs, grid.shape)
    blocks = [
        delayed(_split_chunk)(chunk, core, planned, n, everything)
        for n, (chunk, core) in enumerate(zip(chunks, grid, strict=True))
    ]
    return assemble(blocks, grid, dtype=np.int32)


def split_disconnected(instances: Any, min_fragment_ratio: float = 0.1) -> Any:
    """Make the disconnected pieces of instances instances of their own, but for small ones.

    A 6-connected piece of at least max(1, floor(ratio * size)) voxels of its instance becomes an
    instance; the voxels of smaller pieces take the label of the nearest voxel of such a piece of
    the same instance, of several nearest ones the smallest label. An instance without any large
    piece stays whole.

    Parameters
    ----------
    instances
        ``[Z,Y,X]``, any integer type, 0 is background; NumPy or dask.
    min_fragment_ratio
        What part of its instance a piece is at least that is not small, from 0 to 1.

    Returns
    -------
    int32 ``[Z,Y,X]``: 0 background, 1..K by instance, then by first voxel in C order. NumPy for
    NumPy, lazy for dask: the same labels, whatever the chunks. The lazy graph brings the runs of
    the instances that have small pieces together in one task. Of a mask, with a ratio of 0, these
    are its 6-connected components.

    Raises
    ------
    InvalidArgument, InvalidType, InvalidData
        The argument is named.

    Examples
    --------
    >>> split_disconnected(np.array([[[8, 8, 0, 8, 8, 0, 5]]]))
    array([[[2, 2, 0, 3, 3, 0, 1]]], dtype=int32)
    """
    check_labels(instances, argument="instances")
    text = "a number from 0 to 1"
    check_number("min_fragment_ratio", min_fragment_ratio, lambda v: 0 <= v <= 1, text, default=0.1)
    if isinstance(instances, da.Array):
        return _split_lazily(instances, float(min_fragment_ratio))
    return _split_whole(np.asarray(instances), float(min_fragment_ratio))


PIECE_BYTES = 40
"""Bytes of a piece in the one union of the pieces of all blocks; none for its edges.

Its root (4, from 2**31 pieces on 8), instance, size and first voxel while pieces are sorted by
instance and first voxel, which takes 8 and, within the sort, 4; what is decided takes their room.
"""

VOXELS_PER_PIECE = 400
"""No denser are pieces taken to be; tissue has one for each 2,600 in blocks of 32³ voxels, one for
each 13,000 in blocks of 128³."""


def memory_of_pieces(core: int) -> int:
    """Bytes that finding or painting the pieces of a block takes at most."""
    return 28 * core
