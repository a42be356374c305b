"""Instances that the annotated region cuts, and the voxel that their direct flow points to.

An instance with an unannotated neighbour is not all there, so its centre of mass means little; it
points to its deepest voxel. That needs the mask of the whole instance, wherever its blocks are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from dask.delayed import delayed

from topo_dask.graph.blocks import Source
from topo_dask.grid import BlockGrid, Region
from topo_dask.kernels import cpu
from topo_dask.kernels.tables import InstanceTable

Ids = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]


def is_annotated(spatial_mask: npt.NDArray[Any]) -> Mask:
    """Where a spatial mask (1 = annotated) says so."""
    inside: Mask = spatial_mask > 0.5
    return inside


def cut_instances(labels: npt.NDArray[Any], annotated: Mask) -> Ids:
    """Instances with a 6-neighbour that is not theirs and not annotated.

    Parameters
    ----------
    labels, annotated
        ``[Z,Y,X]``. Of a part of the volume: found are those that are seen to be cut in it.

    Returns
    -------
    uint64, ascending

    Examples
    --------
    >>> cut_instances(np.array([[[3, 3, 0, 5]]]), np.array([[[True, True, False, False]]]))
    array([3, 5], dtype=uint64)
    """
    cut = np.zeros(labels.shape, dtype=bool)
    for axis in range(labels.ndim):
        front, back = np.moveaxis(labels, axis, 0)[:-1], np.moveaxis(labels, axis, 0)[1:]
        known, found = np.moveaxis(annotated, axis, 0), np.moveaxis(cut, axis, 0)
        differ = front != back
        found[:-1] |= differ & ~known[1:]
        found[1:] |= differ & ~known[:-1]
    return np.unique(labels[cut & (labels != 0)]).astype(np.uint64)


def boxes_around(table: InstanceTable, rows: npt.NDArray[np.intp], volume: Region) -> list[Region]:
    """The boxes of some instances with one voxel around them, within the volume."""
    low = np.maximum(table.lo[rows] - 1, volume.start).tolist()
    high = np.minimum(table.hi[rows] + 1, volume.stop).tolist()
    return [Region(tuple(a), tuple(b)) for a, b in zip(low, high, strict=True)]


def deepest_voxel(inside: Mask, annotated: Mask, box: Region) -> npt.NDArray[np.int64]:
    """The voxel that the direct flow of a cut instance points to: int64 ``[3]``, global.

    Parameters
    ----------
    inside, annotated
        The instance, and where is annotated, in its box as `boxes_around` gives it: only where
        that ends at a face of the volume does the instance reach the end of the array.
    box
        Where that is.
    """
    _, centres = cpu.direct_centres(inside.astype(np.uint8), spatial_mask=annotated)
    voxel: npt.NDArray[np.int64] = centres[0].astype(np.int64) + np.asarray(box.start)
    return voxel


def pointed_at(
    table: InstanceTable, rows: npt.NDArray[np.intp], voxels: npt.NDArray[np.int64]
) -> InstanceTable:
    """The table with other centres for some instances: their sums are as if all lay there."""
    sums = np.array(table.sums)
    sums[rows] = voxels * table.voxels[rows, None]
    return replace(table, sums=sums)


# -------------------------------------------------------------------------- lazy dask arrays


@dataclass(frozen=True)
class Part:
    """What one block holds of one cut instance's box, a bit a voxel."""

    row: int
    region: Region
    inside: npt.NDArray[np.uint8]
    annotated: npt.NDArray[np.uint8]


def _cut_in_block(labels: npt.NDArray[Any], spatial_mask: npt.NDArray[Any]) -> Ids:
    return cut_instances(labels, is_annotated(spatial_mask))


def _rows_of_all(found: Sequence[Ids], table: InstanceTable) -> npt.NDArray[np.intp]:
    return cpu.rows_of(np.unique(np.concatenate(found)), table.ids)


def _parts_of_block(
    labels: npt.NDArray[Any],
    spatial_mask: npt.NDArray[Any],
    where: tuple[Region, Region],
    table: InstanceTable,
    rows: npt.NDArray[np.intp],
) -> list[Part]:
    block, volume = where
    near = (table.lo[rows] <= block.stop) & (table.hi[rows] >= block.start)
    rows = rows[near.all(axis=1)]
    parts = []
    for row, box in zip(rows.tolist(), boxes_around(table, rows, volume), strict=True):
        region = box.intersect(block)
        if region.size:
            local = region.relative_to(block.start).slices
            inside = labels[local] == table.ids[row].astype(labels.dtype)
            annotated = is_annotated(spatial_mask[local])
            parts.append(Part(row, region, np.packbits(inside), np.packbits(annotated)))
    return parts


def _pointed(
    found: Sequence[list[Part]], table: InstanceTable, rows: npt.NDArray[np.intp], volume: Region
) -> InstanceTable:
    of_row: dict[int, list[Part]] = {}
    for part in (part for parts in found for part in parts):
        of_row.setdefault(part.row, []).append(part)
    voxels = np.zeros((len(rows), 3), dtype=np.int64)
    for n, box in enumerate(boxes_around(table, rows, volume)):
        inside, annotated = np.zeros((2, *box.shape), dtype=bool)
        for part in of_row[int(rows[n])]:
            local, shape = part.region.relative_to(box.start).slices, part.region.shape
            for array, bits in ((inside, part.inside), (annotated, part.annotated)):
                array[local] = np.unpackbits(bits, count=part.region.size).reshape(shape)
        voxels[n] = deepest_voxel(inside, annotated, box)
    return pointed_at(table, rows, voxels)


def lazily_pointed(labels: Source, spatial_mask: Source, table: Any, grid: BlockGrid) -> Any:
    """The delayed table of a dask array of labels, cut instances pointing to the deepest voxel.

    One task holds the masks of all cut instances, a bit for each voxel of their boxes.
    """
    volume = Region((0,) * len(grid.shape), grid.shape)
    cut_in_block, parts_of_block = delayed(_cut_in_block), delayed(_parts_of_block)
    around = [block.grow(1, within=grid.shape) for block in grid]
    cut = [cut_in_block(labels.read(r), spatial_mask.read(r)) for r in around]
    rows = delayed(_rows_of_all)(cut, table)
    parts = [
        parts_of_block(labels.read(b), spatial_mask.read(b), (b, volume), table, rows) for b in grid
    ]
    return delayed(_pointed)(parts, table, rows, volume)
