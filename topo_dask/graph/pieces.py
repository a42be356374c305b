"""Disconnected instances: pieces of every block, one union over faces, what is large, its numbers.

A piece of a block knows its label, its size and its first voxel in the whole volume; equal labels
on the two sides of a face between blocks are one piece. Large pieces become instances of their
own; the voxels of the others are left for a search of the nearest large piece.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
from topo_dask.graph.union import components
from topo_dask.grid import BlockGrid, Region
from topo_dask.kernels import cpu
from topo_dask.kernels.tables import LabelRuns, join_runs

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Face = npt.NDArray[np.int32]


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
        uint64 ``[N]``: the new label of each piece of each block, 0 for small ones.
    instance_of
        uint64 ``[K + 1]``: the instance that each new label is a part of.
    small
        bool ``[N]``: pieces that join the nearest large one.
    """

    labels: UInt64
    instance_of: UInt64
    small: npt.NDArray[np.bool_]

    @property
    def instances(self) -> int:
        """Number of instances."""
        return len(self.instance_of) - 1


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


def plan_split(ids: UInt64, voxels: Int64, first: Int64, edges: Int64, ratio: float) -> SplitPlan:
    """Decide what becomes of the pieces of all blocks.

    A piece is large that has at least max(1, floor(ratio * size)) of its instance's voxels; an
    instance without any large piece stays whole. New labels are numbered by instance, then by
    first voxel in C order.

    Parameters
    ----------
    ids, voxels, first
        Of the pieces of all blocks, one after the other.
    edges
        int64 ``[E,2]``: those that are one across a face.
    ratio
        What part of its instance a large piece is at least.
    """
    count = len(ids)
    united, member = components(count, [edges])
    size, begin = np.zeros(united, np.int64), np.full(united, np.iinfo(np.int64).max)
    np.add.at(size, member, voxels)
    np.minimum.at(begin, member, first)
    of_instance = np.zeros(united, dtype=np.uint64)
    of_instance[member] = ids
    order = np.lexsort((begin, of_instance))
    instances, row = np.unique(of_instance, return_inverse=True)
    total = np.zeros(len(instances), dtype=np.int64)
    np.add.at(total, row, size)
    large = size >= np.maximum(1, (total * float(ratio)).astype(np.int64))[row]
    whole = np.ones(len(instances), dtype=bool)
    whole[row[large]] = False
    # Of an instance that stays whole the first piece gives the number to all.
    leads = large.copy()
    _, first_of = np.unique(of_instance[order], return_index=True)
    leads[order[first_of][whole]] = True
    labels = np.zeros(united, dtype=np.uint64)
    led = order[leads[order]]
    labels[led] = np.arange(1, len(led) + 1, dtype=np.uint64)
    lead_label = np.zeros(len(instances), dtype=np.uint64)
    lead_label[whole] = labels[order[first_of][whole]]
    labels = np.where(whole[row], lead_label[row], labels)
    instance_of = np.concatenate([np.zeros(1, np.uint64), of_instance[led]])
    return SplitPlan(labels[member], instance_of, (labels == 0)[member])


def holders(ids: UInt64, blocks: Int64, plan: SplitPlan) -> tuple[UInt64, Int64]:
    """Which blocks hold large pieces of the instances that have small ones.

    Parameters
    ----------
    ids, blocks
        The instance and the block of each piece.
    plan
        What becomes of them.

    Returns
    -------
    instances, blocks
        Distinct pairs, ascending by instance, then by block.
    """
    sought = ~plan.small & np.isin(ids, np.unique(ids[plan.small]))
    instances, places = ids[sought], blocks[sought]
    order = np.lexsort((places, instances))
    instances, places = instances[order], places[order]
    kept = np.ones(len(order), dtype=bool)
    kept[1:] = (instances[1:] != instances[:-1]) | (places[1:] != places[:-1])
    return instances[kept], places[kept]


def holding_any(
    instances: UInt64, table: tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]
) -> Int64:
    """Blocks that hold large pieces of some instances, ascending, from what `holders` gave."""
    ids, blocks = table
    first, stop = (np.searchsorted(ids, instances, side=side) for side in ("left", "right"))
    rows = [np.asarray(blocks[a:b]) for a, b in zip(first, stop, strict=True)]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *rows]))


def small_voxels(
    labels: npt.NDArray[Any], split: npt.NDArray[Any], origin: tuple[int, ...]
) -> Wanted:
    """The voxels of a block that have no new label yet, with their instances as groups."""
    left = (labels != 0) & (split == 0)
    points = np.argwhere(left).astype(np.int64) + np.asarray(origin, dtype=np.int64)
    return Wanted(points, labels[left].astype(np.uint64).view(np.int64))


# ------------------------------------------------------------------------- in memory, and lazily


def _group_of(plan: SplitPlan, labels: UInt64) -> Int64:
    return np.asarray(plan.instance_of[labels]).view(np.int64)


def _split_whole(labels: npt.NDArray[Any], ratio: float) -> npt.NDArray[np.int32]:
    whole = Region((0, 0, 0), labels.shape)
    number, found = pieces_of_block(labels, whole, labels.shape)
    none = np.zeros((0, 2), np.int64)
    plan = plan_split(found.ids, found.voxels, found.first, none, ratio)
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
    sought
        uint64, ascending: the instances that have small pieces.
    """

    plan: SplitPlan
    offsets: Int64
    sought: UInt64


def _chunk_pieces(labels: npt.NDArray[Any], core: Region, shape: tuple[int, ...]) -> BlockPieces:
    check_not_negative(labels, argument="instances", where=f" in the block at {core.start}")
    return pieces_of_block(labels, core, shape)[1]


def _plan_chunks(
    parts: Sequence[BlockPieces], edges: Sequence[list[Int64]], grid: BlockGrid, ratio: float
) -> Planned:
    offsets = np.cumsum([0, *(len(p.ids) for p in parts)])
    whole = [np.zeros((0, 2), np.int64)]
    for number, along in enumerate(edges):
        for other, pairs in zip(next_blocks(number, grid), along, strict=True):
            if other is not None:
                whole.append(pairs + offsets[[number, other]])
    names = ("ids", "voxels", "first")
    ids, voxels, first = (np.concatenate([getattr(p, n) for p in parts]) for n in names)
    plan = plan_split(ids, voxels, first, np.concatenate(whole), ratio)
    return Planned(plan, offsets, np.unique(ids[plan.small]))


def _painted(labels: npt.NDArray[Any], planned: Planned, block: int) -> npt.NDArray[np.int32]:
    """A chunk with the labels of its large pieces, 0 for small ones."""
    number, *_ = cpu.pieces(labels)
    first, stop = planned.offsets[block], planned.offsets[block + 1]
    return _names_of(planned.plan.labels[first:stop])[number]


def _sought_runs(labels: npt.NDArray[Any], core: Region, planned: Planned, block: int) -> LabelRuns:
    """The runs of a chunk's large pieces of instances that have small ones."""
    if not np.isin(np.unique(labels).astype(np.uint64), planned.sought).any():
        return cpu.label_runs(np.zeros(core.shape, np.uint8), origin=core.start)
    runs = cpu.label_runs(_painted(labels, planned, block), origin=core.start)
    ids = _group_of(planned.plan, runs.ids).view(np.uint64)
    return runs.take(np.isin(ids, planned.sought))


def _split_chunk(
    labels: npt.NDArray[Any], core: Region, planned: Planned, block: int, runs: LabelRuns
) -> npt.NDArray[np.int32]:
    """A chunk with its new labels; ``runs`` are those of `_sought_runs` of all chunks."""
    out = _painted(labels, planned, block)
    first, stop = planned.offsets[block], planned.offsets[block + 1]
    if planned.plan.small[first:stop].any():
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


PIECE_BYTES = 0.1
"""Bytes for each voxel of the volume that the one union of all pieces takes."""


def memory_of_pieces(core: int) -> int:
    """Bytes that finding or painting the pieces of a block takes at most."""
    return 28 * core
