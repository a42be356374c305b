"""Voxels that take the label of the nearest labelled voxel, on disk: found first, then filled in.

Nothing is filled in before everything is found, so that what is found never depends on what else
was filled in already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from topo_dask.graph.nearest import Wanted, nearest_over_blocks
from topo_dask.grid import BlockGrid
from topo_dask.run.chain import View
from topo_dask.run.files import load_table, save_table
from topo_dask.storage import AnyArray

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class FillTask:
    """One block of labels to write, with what was found for its voxels."""

    view: View
    grid: BlockGrid
    block: int
    out: AnyArray
    found: Path | None

    def __str__(self) -> str:
        return f"block {self.grid.region(self.block)}"


def find_nearest(
    path: Path,
    wanted: Wanted,
    view: View,
    grid: BlockGrid,
    block: int,
    *,
    holding: Int64 | None = None,
    group_of: Callable[[UInt64], Int64] | None = None,
) -> int:
    """Find the nearest labels for voxels of a block and keep them in a file; gives how many.

    Parameters
    ----------
    path
        The file, for `FillTask`.
    wanted
        Voxels of the block.
    view
        The labels to look in.
    grid, block
        The blocks of the volume, and the number of this one.
    holding, group_of
        See `nearest_over_blocks`.
    """
    labels = nearest_over_blocks(wanted, grid, view.read, holding=holding, group_of=group_of)
    core = grid.region(block)
    at = tuple((wanted.points - np.asarray(core.start, dtype=np.int64)).T)
    index = np.ravel_multi_index(at, core.shape).astype(np.int64)
    save_table(path, index=index, labels=labels)
    return len(labels)


def fill_block(task: FillTask) -> None:
    """Stage of its own: a block's labels, with what was found for it, into their array."""
    core = task.grid.region(task.block)
    labels = task.view.read(core).astype(task.out.dtype)
    if task.found is not None:
        found = load_table(task.found)
        labels.ravel()[found["index"]] = found["labels"]
    task.out[core.slices] = labels
