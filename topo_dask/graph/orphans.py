"""Thin objects: foreground that reached no instance takes the label of the nearest one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.delayed import delayed

from topo_dask.graph.blocks import Source, assemble, grid_of
from topo_dask.graph.nearest import (
    Wanted,
    farthest_apart,
    nearest_apart,
    nearest_over_blocks,
)
from topo_dask.grid import BlockGrid, Region
from topo_dask.kernels import cpu
from topo_dask.kernels.tables import FARTHEST, LabelRuns, join_runs


def orphans_of(mask: npt.NDArray[Any], labels: npt.NDArray[Any], origin: tuple[int, ...]) -> Wanted:
    """The foreground voxels of a block that have no label."""
    voxels = np.argwhere((mask != 0) & (labels == 0)).astype(np.int64)
    return Wanted(voxels + np.asarray(origin, dtype=np.int64))


def adopted(
    labels: npt.NDArray[Any], orphans: Wanted, found: npt.NDArray[Any], origin: tuple[int, ...]
) -> npt.NDArray[Any]:
    """The labels of a block with what was found for its orphans."""
    full = labels.copy()
    at = orphans.points - np.asarray(origin, dtype=np.int64)
    full[tuple(at.T)] = found.astype(labels.dtype)
    return full


@dataclass(frozen=True, eq=False)
class Looked:
    """The orphans of a chunk, and what is nearest to them in the chunks around it.

    Parameters
    ----------
    orphans
        All of them.
    squared, labels
        int64, uint64: squared distance (`FARTHEST` where there is nothing) and label.
    open
        bool: for which of them a label beyond these chunks may be as near.
    """

    orphans: Wanted
    squared: npt.NDArray[np.int64]
    labels: npt.NDArray[np.uint64]
    open: npt.NDArray[np.bool_]


def _look_around(
    orphans: Wanted, around: Sequence[LabelRuns], box: Region, shape: tuple[int, ...]
) -> Looked:
    """Task of the lazy graph: look through the chunks in a box around a chunk."""
    squared = np.full(len(orphans), FARTHEST, dtype=np.int64)
    labels = np.zeros(len(orphans), dtype=np.uint64)
    for runs in around:
        squared, labels = cpu.nearest_labels(orphans.points, runs, known=(squared, labels))
    low, high = np.asarray(box.start), np.asarray(box.stop)
    below = np.where(low > 0, orphans.points - low + 1, math.isqrt(FARTHEST))
    above = np.where(high < np.asarray(shape), high - orphans.points, math.isqrt(FARTHEST))
    beyond = np.minimum(below, above).min(axis=1, initial=math.isqrt(FARTHEST))
    return Looked(orphans, squared, labels, beyond**2 <= squared)


def _reaches(
    looked: Sequence[Looked], filled: Sequence[bool], grid: BlockGrid
) -> list[tuple[Region, int]]:
    """Task of the lazy graph: around what, and how far (squared), labels are still looked for.

    Where nothing was found yet there is something no farther than the far side of a chunk that
    holds labels.
    """
    found = []
    holding = [grid.region(n) for n, some in enumerate(filled) if some]
    for look in looked:
        if not look.open.any() or not holding:
            continue
        box, reach = look.orphans.take(look.open).box, int(look.squared[look.open].max())
        if reach == FARTHEST:
            reach = min(farthest_apart(box, other) for other in holding)
        found.append((box, reach))
    return found


def _runs_within(runs: LabelRuns, core: Region, reaches: list[tuple[Region, int]]) -> LabelRuns:
    """Task of the lazy graph: the runs of a chunk, none where nothing looks that far."""
    if any(nearest_apart(box, core) <= reach for box, reach in reaches):
        return runs
    return runs.take(np.zeros(len(runs.ids), dtype=bool))


def _adopt_chunk(
    labels: npt.NDArray[Any], looked: Looked, more: LabelRuns, origin: tuple[int, ...]
) -> npt.NDArray[Any]:
    """Task of the lazy graph: a chunk with the labels nearest to its orphans."""
    some, found = looked.open, looked.labels.copy()
    known = (looked.squared[some], looked.labels[some])
    _, found[some] = cpu.nearest_labels(looked.orphans.points[some], more, known=known)
    return adopted(labels, looked.orphans, found, origin)


def _recover_lazily(mask: Any, labels: da.Array) -> da.Array:
    grid = grid_of(labels, argument="labels")
    numbers, inside = Source.of(labels), Source.of(mask)
    chunks = [numbers.read(core) for core in grid]
    runs = [
        delayed(cpu.label_runs)(chunk, origin=core.start)
        for chunk, core in zip(chunks, grid, strict=True)
    ]
    looked = []
    for core, chunk in zip(grid, chunks, strict=True):
        orphans = delayed(orphans_of)(inside.read(core), chunk, core.start)
        near = grid.touching(core.grow(1, within=grid.shape))
        ends = [grid.region(near[0]).start, grid.region(near[-1]).stop]
        around = [runs[n] for n in near]
        looked.append(delayed(_look_around)(orphans, around, Region(*ends), grid.shape))
    filled = [delayed(_any)(some) for some in runs]
    reaches = delayed(_reaches)(looked, filled, grid)
    far = [
        delayed(_runs_within)(some, core, reaches) for some, core in zip(runs, grid, strict=True)
    ]
    more = delayed(join_runs)(far, grid.shape)
    blocks = [
        delayed(_adopt_chunk)(chunk, look, more, core.start)
        for chunk, look, core in zip(chunks, looked, grid, strict=True)
    ]
    return assemble(blocks, grid, dtype=labels.dtype)


def _any(runs: LabelRuns) -> bool:
    return len(runs.ids) > 0


def recover_orphans(mask: Any, labels: Any) -> Any:
    """Labels in which foreground without any takes that of the nearest labelled voxel.

    Parameters
    ----------
    mask
        ``[Z,Y,X]``, foreground where not 0; NumPy or dask.
    labels
        ``[Z,Y,X]``, 0 outside the foreground; in chunks like the mask's.

    Returns
    -------
    ``[Z,Y,X]`` of the same type. Distances are Euclidean, in voxels, as large as need be; of
    several nearest voxels the smallest label counts. Without any label nothing changes. NumPy for
    NumPy, lazy for dask: the same for any chunks. The lazy graph looks for the labels of a chunk's
    orphans in the chunks around it, as runs along x; only chunks that orphans farther from any
    label may need are brought together in one task.

    Examples
    --------
    >>> recover_orphans(np.array([[[1, 1, 1, 1, 0, 1]]]), np.array([[[0, 4, 0, 9, 0, 0]]]))
    array([[[4, 4, 4, 9, 0, 9]]])
    """
    if not isinstance(labels, da.Array):
        first = (0, 0, 0)
        orphans = orphans_of(mask, labels, first)
        grid = BlockGrid(labels.shape, labels.shape)
        found = nearest_over_blocks(orphans, grid, lambda region: labels[region.slices])
        return adopted(labels, orphans, found, first)
    return _recover_lazily(mask, labels)
