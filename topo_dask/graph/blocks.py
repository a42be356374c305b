"""Lazy dask arrays from block functions that slice their own neighbourhood.

Every block becomes one task on a slice of its input, so the slice may reach across any number of
chunks and chunks may be as thin as one voxel, which `dask.array.map_overlap` does not allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt

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


def cut(array: da.Array, region: Region) -> da.Array:
    """The part of an array (its last three axes) that lies in a region."""
    part: da.Array = array[(..., *region.slices)]
    return part


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
