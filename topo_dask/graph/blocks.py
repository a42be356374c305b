"""Lazy dask arrays from block functions that slice their own neighbourhood.

Every block becomes one task on a slice of its input, so the slice may reach across any number of
chunks and chunks may be as thin as one voxel, which `dask.array.map_overlap` does not allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.delayed import delayed

from topo_dask.errors import InvalidArgument
from topo_dask.grid import BlockGrid, Region


def grid_of(array: da.Array, *, argument: str) -> BlockGrid:
    """The chunks of a dask array's last three axes as a grid.

    Raises
    ------
    InvalidArgument
        Chunks of unknown length.
    """
    chunks = array.chunks[-3:]
    if any(np.isnan(length) for axis in chunks for length in axis):
        raise InvalidArgument(
            argument,
            "a dask array with chunks of unknown length",
            "known chunks",
            "Call compute_chunk_sizes() on it first.",
        )
    return BlockGrid(tuple(int(n) for n in array.shape[-3:]), chunks)


@dataclass(frozen=True, eq=False)
class Source:
    """A dask array as delayed chunks, from which any region can be read.

    Slicing the array itself for every task would make dask optimise the whole graph each time.
    """

    grid: BlockGrid
    chunks: npt.NDArray[Any]

    @classmethod
    def of(cls, array: da.Array) -> Source:
        """All axes of an array."""
        chunks = np.asarray(array.to_delayed(optimize_graph=False), dtype=object)
        return cls(BlockGrid(tuple(int(n) for n in array.shape), array.chunks), chunks.ravel())

    def read(self, region: Region) -> Any:
        """Delayed array of a region of the last axes; of the axes before them all is read."""
        before = self.grid.shape[: len(self.grid.shape) - len(region.start)]
        whole = Region((0,) * len(before) + region.start, before + region.stop)
        numbers = self.grid.touching(whole)
        places = [self.grid.region(n).intersect(whole) for n in numbers]
        pieces = [
            (
                place.relative_to(self.grid.region(n).start).slices,
                place.relative_to(whole.start).slices,
            )
            for n, place in zip(numbers, places, strict=True)
        ]
        task = delayed(_paste)
        return task(
            [self.chunks[n] for n in numbers], delayed((whole.shape, pieces), traverse=False)
        )


def _paste(
    chunks: Sequence[npt.NDArray[Any]],
    layout: tuple[tuple[int, ...], list[tuple[tuple[slice, ...], tuple[slice, ...]]]],
) -> npt.NDArray[Any]:
    shape, pieces = layout
    out = np.empty(shape, dtype=chunks[0].dtype)
    for chunk, (inside, target) in zip(chunks, pieces, strict=True):
        out[target] = chunk[inside]
    return out


def assemble(
    blocks: Sequence[Any], grid: BlockGrid, *, dtype: npt.DTypeLike, leading: tuple[int, ...] = ()
) -> da.Array:
    """One dask array of one delayed block for each block of a grid, in its order.

    Parameters
    ----------
    blocks
        Delayed arrays of shape ``(*leading, *block shape)``.
    grid
        Where they lie.
    dtype
        Their dtype.
    leading
        Length of the axes before the spatial ones.
    """
    meta = np.empty((0,) * (len(leading) + len(grid.shape)), dtype=dtype)
    parts = np.empty(grid.counts, dtype=object)
    for number, (block, region) in enumerate(zip(blocks, grid, strict=True)):
        shape = (*leading, *region.shape)
        part = da.from_delayed(block, shape, dtype=meta.dtype, meta=meta)
        parts[np.unravel_index(number, grid.counts)] = part
    whole: da.Array = da.block(parts.tolist())
    return whole
