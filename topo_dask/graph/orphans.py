"""Thin objects: foreground that reached no instance takes the label of the nearest one."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.delayed import delayed

from topo_dask.graph.blocks import Source, assemble, grid_of
from topo_dask.graph.nearest import Wanted, nearest_over_blocks
from topo_dask.grid import BlockGrid
from topo_dask.kernels import cpu
from topo_dask.kernels.tables import LabelRuns, join_runs


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


def _adopt_chunk(
    labels: npt.NDArray[Any], orphans: Wanted, everything: LabelRuns, origin: tuple[int, ...]
) -> npt.NDArray[Any]:
    """Task of the lazy graph: a chunk with the labels nearest to its orphans."""
    _, found = cpu.nearest_labels(orphans.points, everything)
    return adopted(labels, orphans, found, origin)


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
    NumPy, lazy for dask: the same for any chunks. The lazy graph brings all labels together in one
    task, as runs along x.

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
    grid = grid_of(labels, argument="labels")
    numbers, inside = Source.of(labels), Source.of(mask)
    chunks = [numbers.read(core) for core in grid]
    runs = [
        delayed(cpu.label_runs)(chunk, origin=core.start)
        for chunk, core in zip(chunks, grid, strict=True)
    ]
    everything = delayed(join_runs)(runs, grid.shape)
    blocks = []
    for chunk, core in zip(chunks, grid, strict=True):
        wanted = delayed(orphans_of)(inside.read(core), chunk, core.start)
        blocks.append(delayed(_adopt_chunk)(chunk, wanted, everything, core.start))
    return assemble(blocks, grid, dtype=labels.dtype)
