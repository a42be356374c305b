"""The job that compares labels with the truth, block by block."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store

from topo_dask.config import boolean
from topo_dask.errors import InvalidArgument, InvalidData, InvalidType
from topo_dask.graph.check import check_array
from topo_dask.graph.measure import (
    Comparison,
    Contingency,
    block_contingency,
    lazy_contingency,
    scores,
    sum_contingency,
)
from topo_dask.grid import BlockGrid, Region, as_lengths
from topo_dask.plan.compare import CompareWork
from topo_dask.run.dry import DryRun
from topo_dask.run.execute import DaskEngine, Engine, open_engine
from topo_dask.run.job import volumes as given_volumes
from topo_dask.run.progress import Display, progress_display
from topo_dask.storage import open_array

Volume = npt.NDArray[Any] | da.Array | zarr.Array[Any]

# Voxels of a block: enough to make a task worth its while, more of them for volumes that would
# otherwise need very many tasks.
_LEAST_VOXELS, _MOST_VOXELS, _TASKS = 1 << 22, 1 << 25, 10_000


def compare(
    truth: Any,
    labels: Any,
    *,
    blocks: int | Sequence[int] | None = None,
    cluster: Any = None,
    ignore_background: bool = True,
    thresholds: Sequence[float] = (0.5, 0.75),
    largest: int = 10,
    progress: bool | None = None,
) -> Comparison:
    """Compare labels with the truth: exact, and in memory that does not grow with the volume.

    Parameters
    ----------
    truth, labels
        Two volumes ``[Z, Y, X]`` of one shape and any integer types, 0 is background: a path or
        URL of a zarr array, a zarr, NumPy or dask array, in any combination.
    blocks
        Shape of the blocks that are read at a time, one number or z, y, x; by default whole chunks
        of about 4 million voxels. The result does not depend on it.
    cluster
        Where to run: ``"sync"``, ``"threads"``, ``"processes"``, ``"local"``, the address of a
        scheduler, a Dask client or an open engine; by default the active client, or else a local
        cluster (dask arrays: whatever dask itself would use). Two NumPy arrays are compared right
        here.
    ignore_background
        Leave the voxels where the truth is 0 out of the variation of information and the adapted
        Rand error.
    thresholds
        IoU thresholds from 0.5 to 1 of precision, recall and F1.
    largest
        How many splits and merges to list.
    progress
        Show how far the work is; by default that on stores, where a terminal or notebook looks on.

    Returns
    -------
    Comparison
        The numbers; `Comparison` says what each of them counts and where it comes from. Prints as
        a summary; ``to_json()`` gives all of it.

    Raises
    ------
    InvalidArgument, InvalidType
        Shapes that differ, a wrong number of axes, no voxels, ids that are not whole numbers.
    InvalidData
        A negative id.

    Examples
    --------
    >>> truth = np.zeros((2, 4, 8), int)
    >>> truth[:, :, :4], truth[:, :, 4:] = 1, 2
    >>> compare(truth, np.ones((2, 4, 8), int))
    Comparison of labels with the truth
      voxels                    64
      foreground                truth 64, labels 64
      instances                 truth 2, labels 1
      equal                     no
      scored voxels             64 (truth > 0)
      variation of information  1.0000 bits = split 0.0000 + merge 1.0000
      adapted Rand error        0.3404 (precision 0.4921, recall 1.0000)
      IoU >= 0.5                F1 0.6667 (precision 1.0000, recall 0.5000, 1 matched)
      IoU >= 0.75               F1 0.0000 (precision 0.0000, recall 0.0000, 0 matched)
      largest merges            label 1 (64 voxels) in truth 1 (32), 2 (32)
    """
    boolean("ignore_background", ignore_background)
    settings: dict[str, Any] = {
        "ignore_background": ignore_background,
        "thresholds": thresholds,
        "largest": largest,
    }
    scores(sum_contingency([]), **settings)  # refuses bad settings before the work, not after it
    if blocks is not None:
        blocks = as_lengths(blocks, argument="blocks", axes=3, least=1)
    volumes = _volume(truth, "truth"), _volume(labels, "labels")
    if volumes[0].shape != volumes[1].shape:
        raise InvalidArgument(
            "labels",
            f"shape {volumes[1].shape}",
            f"the shape of truth, {volumes[0].shape}",
            "Cut or pad one of them so that both cover the same voxels.",
        )
    if isinstance(cluster, DryRun):
        cluster.end(_work(*volumes, blocks))
    in_memory = all(isinstance(volume, np.ndarray) for volume in volumes)
    display = None if in_memory and progress is None else progress_display(progress)
    table = _contingency(*volumes, blocks, cluster, display)
    return scores(table, **settings)


def _volume(source: Any, argument: str) -> Volume:
    """The array behind a source, checked as far as that goes without reading voxels."""
    if isinstance(source, (np.ndarray, da.Array)):
        check_array(source, argument=argument)
        array: Volume = source
    elif isinstance(source, (str, os.PathLike, zarr.Array, zarr.Group, Store)):
        array = open_array(source, argument=argument, axes=(3,))
    else:
        raise InvalidType(
            argument,
            f"an object of type {type(source).__name__}",
            "a path or URL of a zarr array, or a zarr, NumPy or dask array",
            f"Pass e.g. {argument}=numpy.asarray(...).",
        )
    if array.dtype.kind not in "iu":
        raise InvalidType(
            argument,
            f"dtype {array.dtype}",
            "an integer dtype up to uint64, one id per object and 0 for background",
            "Convert it first, e.g. with .astype('uint64'), if it holds whole numbers.",
        )
    if len(array.shape) != 3:
        do = "Select the volume to compare, e.g. array[0]."
        raise InvalidArgument(argument, f"shape {array.shape}", "3 axes: z, y, x", do)
    if any(np.isnan(n) for n in array.shape):
        do = "Call compute_chunk_sizes() on the dask array."
        raise InvalidArgument(argument, f"shape {array.shape}", "axes of known length", do)
    if 0 in array.shape:
        do = "Pass a volume that has voxels."
        raise InvalidArgument(argument, f"shape {array.shape}", "axes of at least one voxel", do)
    return array


def _work(truth: Volume, labels: Volume, blocks: Any) -> CompareWork:
    """What it takes."""
    lazy = [volume.chunks for volume in (truth, labels) if isinstance(volume, da.Array)]
    grid = BlockGrid(truth.shape, blocks or (lazy or [_block_shape(truth, labels)])[0])
    shape = "x".join(map(str, truth.shape))
    return CompareWork(f"Comparison of {shape} voxels", grid, given_volumes([truth, labels]))


def _contingency(
    truth: Volume, labels: Volume, blocks: Any, cluster: Any, display: Display | None
) -> Contingency:
    if isinstance(truth, da.Array) or isinstance(labels, da.Array):
        return _of_dask(truth, labels, blocks, cluster)
    grid = BlockGrid(truth.shape, blocks or _block_shape(truth, labels))
    items = _Blocks(truth, labels, grid)
    in_memory = isinstance(truth, np.ndarray) and isinstance(labels, np.ndarray)
    if in_memory and not isinstance(cluster, Engine):
        return sum_contingency(map(_of_block, items))
    voxels = grid.sizes
    with open_engine(cluster, display=display) as engine:
        tables = engine.run("compare", _of_block, items, voxels=voxels)
        return sum_contingency(table for _, table in tables)


@dataclass(frozen=True, eq=False)
class _Block:
    """What a task gets: stores travel as such, of a NumPy array only the block's own part."""

    truth: Volume
    labels: Volume
    region: Region

    def __str__(self) -> str:
        return f"block {self.region}"


@dataclass(frozen=True, eq=False)
class _Blocks(Sequence[_Block]):
    """The blocks, each made when it is asked for."""

    truth: Volume
    labels: Volume
    grid: BlockGrid

    def __len__(self) -> int:
        return len(self.grid)

    def __getitem__(self, number: Any) -> Any:
        region = self.grid.region(range(len(self))[number])
        truth, labels = (
            volume[region.slices] if isinstance(volume, np.ndarray) else volume
            for volume in (self.truth, self.labels)
        )
        return _Block(truth, labels, region)


def _of_block(block: _Block) -> Contingency:
    """Table of one block, read where this runs."""
    truth, labels = (
        volume if isinstance(volume, np.ndarray) else np.asarray(volume[block.region.slices])
        for volume in (block.truth, block.labels)
    )
    try:
        return block_contingency(truth, labels)
    except InvalidData as error:
        came = f"{error.came} in the {block}"
        raise InvalidData(error.argument, came, error.allowed, error.do) from None


def _of_dask(truth: Volume, labels: Volume, blocks: Any, cluster: Any) -> Contingency:
    chunks = blocks or next(v.chunks for v in (truth, labels) if isinstance(v, da.Array))
    lazy = [
        volume.rechunk(chunks)
        if isinstance(volume, da.Array)
        else da.from_array(volume, chunks=chunks)
        for volume in (truth, labels)
    ]
    task = lazy_contingency(*lazy)
    if cluster is None:
        table = task.compute()
    else:
        with open_engine(cluster) as engine:
            # Engines without a client bear the names of dask's own schedulers.
            where = engine.client if isinstance(engine, DaskEngine) else engine.name
            table = task.compute(scheduler=where)
    assert isinstance(table, Contingency)
    return table


def _block_shape(truth: Volume, labels: Volume) -> tuple[int, ...]:
    """Whole chunks, doubled along the shortest axis until they hold enough voxels."""
    shape = truth.shape
    chunks = [v.chunks for v in (truth, labels) if isinstance(v, zarr.Array)]
    least = [max(c) for c in zip(*chunks, strict=True)] or [1, 1, shape[2]]
    block = [min(pair) for pair in zip(shape, least, strict=True)]
    enough = min(max(math.prod(shape) // _TASKS, _LEAST_VOXELS), _MOST_VOXELS)
    while 2 * math.prod(block) <= enough and block != list(shape):
        axis = min((a for a in range(3) if block[a] < shape[a]), key=lambda a: block[a])
        block[axis] = min(2 * block[axis], shape[axis])
    return tuple(block)
