"""From where a block's particles end to its convergence cells, some particles at a time.

Cells hold exact whole numbers, so those of some particles add up to those of all, in any order:
particles that end in their block are sorted into cells while their positions are in memory, those
that come home later are added, and no position need be kept for what follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from topo_dask.config import SegmentSettings
from topo_dask.graph.track import AT_ONCE, Particles
from topo_dask.grid import BlockGrid
from topo_dask.kernels.backends import kernels_for
from topo_dask.kernels.cpu import cells as cell_kernels
from topo_dask.kernels.tables import (
    END_PARTS,
    CellTable,
    EndTable,
    merge_cells,
    merge_ends,
)

Int64 = npt.NDArray[np.int64]
Rows = npt.NDArray[np.uint32]


@dataclass(frozen=True, eq=False)
class CameHome:
    """The particles of a block that ended in other blocks.

    Parameters
    ----------
    rows
        int64 ``[H]``: the place of each among the block's particles.
    cells
        uint32 ``[H]``: the row of its cell.
    positions
        float64 ``[H,3]``: where it ended; empty where nobody asks.
    """

    rows: Int64
    cells: Rows
    positions: npt.NDArray[np.float64]


def cell_owners(cells: Int64, grid: BlockGrid, radius: float) -> Int64:
    """Number of the block that owns each cell: the one in which its middle, g times c, lies."""
    corners = cell_kernels.cell_corners(cells, shape=grid.shape, radius=radius)
    return grid.owner(np.minimum(corners, np.asarray(grid.shape) - 1))


def cells_of_ends(
    ends: npt.NDArray[np.float64],
    under_way: Int64,
    *,
    shape: tuple[int, ...],
    settings: SegmentSettings,
    most: int = AT_ONCE,
) -> tuple[CellTable, Rows]:
    """Cells of the particles of a block that have ended.

    Parameters
    ----------
    ends
        float64 ``[N,3]``: where each ended or left the block.
    under_way
        int64: those that left, ascending; they do not count.
    shape
        Shape of the whole volume.
    settings
        Radius and backend.
    most
        Particles that are sorted at a time; changes nothing.

    Returns
    -------
    table
        The cells.
    rows
        ``[N]``: the row of each particle's cell; of those under way, the one after the last.

    Examples
    --------
    >>> ends = np.array([[0, 0, 2.5], [0, 0, 9], [0, 0, 1.5]])
    >>> table, rows = cells_of_ends(
    ...     ends, np.array([1]), shape=(8, 8, 8), settings=SegmentSettings()
    ... )
    >>> table.counts, rows
    (array([2]), array([0, 1, 0], dtype=uint32))
    """
    cell_table = kernels_for(settings.backend).cell_table
    rows = np.empty(len(ends), dtype=np.uint32)
    pieces = []
    for first in range(0, len(ends), most):
        end = min(first + most, len(ends))
        low, high = np.searchsorted(under_way, (first, end))
        ended = np.ones(end - first, dtype=bool)
        ended[under_way[low:high] - first] = False
        some = ends[first:end] if low == high else ends[first:end][ended]
        table, index = cell_table(some, shape=shape, radius=settings.convergence_radius)
        rows[first:end] = len(table)
        rows[first:end][ended] = index
        pieces.append((slice(first, end), table))
    merged = merge_cells([table for _, table in pieces])
    for part, table in pieces:
        found = np.append(np.searchsorted(merged.cells, table.cells), len(merged))
        rows[part] = found.astype(np.uint32)[rows[part]]
    return merged, rows


def with_those_home(
    begun: CellTable,
    home: Iterable[Particles],
    *,
    shape: tuple[int, ...],
    settings: SegmentSettings,
) -> tuple[CellTable, Rows, CameHome]:
    """All cells of a block, once its last particles have ended.

    Parameters
    ----------
    begun
        The cells of those that ended in the block, see `cells_of_ends`.
    home
        The others, some at a time.
    shape, settings
        As there.

    Returns
    -------
    table
        The cells.
    rows
        ``[len(begun) + 1]``: the new row of each row, and one for those under way.
    home
        Where those under way have ended.
    """
    cell_table = kernels_for(settings.backend).cell_table
    tables, indices = [begun], []
    places, positions = [np.zeros(0, np.int64)], [np.zeros((0, 3))]
    for some in home:
        table, index = cell_table(some.positions, shape=shape, radius=settings.convergence_radius)
        tables.append(table)
        indices.append(index.astype(np.uint32))
        places.append(some.row)
        if keeps_positions(settings):
            positions.append(some.positions)
    merged = merge_cells(tables)
    first, *found = (
        np.searchsorted(merged.cells, table.cells).astype(np.uint32) for table in tables
    )
    cells = [rows[index] for rows, index in zip(found, indices, strict=True)]
    came = CameHome(
        np.concatenate(places),
        np.concatenate([np.zeros(0, np.uint32), *cells]),
        np.concatenate(positions),
    )
    return merged, np.append(first, np.uint32(0)), came


def keeps_positions(settings: SegmentSettings) -> bool:
    """Whether positions are asked for after the cells: only where steps take instances apart."""
    return settings.group != 1


def ends_of_cells(
    table: CellTable,
    ids: npt.NDArray[np.uint64],
    *,
    shape: tuple[int, ...],
    radius: float,
) -> EndTable:
    """Where particles end, by the instance that has their cell: what `end_sums` finds of them.

    Parameters
    ----------
    table
        Cells of the particles.
    ids
        The instance of each, above 0.
    shape
        Shape of the whole volume.
    radius
        Convergence radius.

    Examples
    --------
    >>> table = CellTable(np.array([1]), np.array([2]), np.array([[0, 0, 1 << 23]]))
    >>> ends_of_cells(table, np.array([7], "u8"), shape=(8, 8, 8), radius=4.0).means
    array([[0.  , 0.  , 2.25]])
    """
    corners = cell_kernels.cell_corners(table.cells, shape=shape, radius=radius)
    whole = corners * table.counts[:, None] + table.offsets // END_PARTS
    return merge_ends([EndTable(ids, table.counts, whole, table.offsets % END_PARTS)])


CELL_BYTES = 48
"""Bytes of a cell: number, particles, offsets, component."""


def memory_of_cells(away: int, cells: int, positions: bool) -> int:
    """Bytes that it takes at most to add what came home to a block's cells.

    Parameters
    ----------
    away
        Particles that come home.
    cells
        Cells of the block.
    positions
        Whether their positions are kept.
    """
    batch = min(AT_ONCE, away)
    return 2 * (12 + 24 * positions) * away + 150 * batch + 4 * CELL_BYTES * cells


def most_cells(core: int, radius: float) -> int:
    """Cells in which particles of a block end, at most."""
    return math.ceil(core / cell_kernels.cell_size(radius) ** 3)
