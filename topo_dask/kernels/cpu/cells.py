"""Convergence cells: where particles end, and which cells are close enough to be one instance."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.kernels.cpu.labels import compact
from topo_dask.kernels.jit import compiled
from topo_dask.kernels.tables import CellTable

FRACTION = 2.0**24
"""Units of a cell's fixed-point offsets: 6e-8 voxels, exact sums of 2**32 particles a cell."""

REACH = 3
"""Cells whose centres are closer than the radius are at most this many cells apart on an axis."""


def cell_size(radius: float) -> float:
    """Edge of a cell: half the convergence radius, at least one voxel."""
    return max(1.0, radius / 2.0)


def cell_counts(shape: tuple[int, ...], radius: float) -> tuple[int, ...]:
    """Number of cells along each axis of a volume."""
    size = cell_size(radius)
    return tuple(int(n / size) + 1 for n in shape)


@compiled
def _numbers(positions: Any, size: float, counts: Any, out: Any) -> None:
    for i in range(positions.shape[0]):
        number = np.int64(0)
        for axis in range(3):
            cell = np.int64(np.rint(positions[i, axis] / size))
            number = number * counts[axis] + min(max(cell, 0), counts[axis] - 1)
        out[i] = number


def cell_numbers(
    positions: npt.NDArray[np.float64], *, shape: tuple[int, ...], radius: float
) -> npt.NDArray[np.int64]:
    """The cell in which each position lies, as a linear number in C order.

    Parameters
    ----------
    positions
        float64 ``[N,3]``, global.
    shape
        Shape of the whole volume.
    radius
        Convergence radius r; cells have edge g = max(1, r/2) and are centred on multiples of g.

    Returns
    -------
    int64 ``[N]``

    Examples
    --------
    >>> cell_numbers(np.array([[0.0, 0.0, 2.6]]), shape=(8, 8, 8), radius=4.0)
    array([1])
    """
    out = np.empty(len(positions), dtype=np.int64)
    counts = np.asarray(cell_counts(shape, radius), dtype=np.int64)
    _numbers(np.ascontiguousarray(positions), cell_size(radius), counts, out)
    return out


def cell_indices(
    cells: npt.NDArray[np.int64], *, shape: tuple[int, ...], radius: float
) -> npt.NDArray[np.int64]:
    """Linear cell numbers as int64 ``[M,3]`` indices along z, y, x."""
    index = np.unravel_index(cells, cell_counts(shape, radius))
    stacked: npt.NDArray[np.int64] = np.stack(index, axis=-1).astype(np.int64)
    return stacked.reshape(-1, 3)


def cell_corners(
    cells: npt.NDArray[np.int64], *, shape: tuple[int, ...], radius: float
) -> npt.NDArray[np.int64]:
    """The voxel from which a cell's offsets count: floor(c * g), int64 ``[M,3]``."""
    index = cell_indices(cells, shape=shape, radius=radius)
    corners: npt.NDArray[np.int64] = np.floor(index * cell_size(radius)).astype(np.int64)
    return corners


@compiled
def _sum(positions: Any, index: Any, corners: Any, counts: Any, offsets: Any) -> None:
    for i in range(positions.shape[0]):
        k = index[i]
        counts[k] += 1
        for axis in range(3):
            offset = positions[i, axis] - corners[k, axis]
            offsets[k, axis] += np.int64(np.rint(offset * FRACTION))


def cell_table(
    positions: npt.NDArray[np.float64], *, shape: tuple[int, ...], radius: float
) -> tuple[CellTable, npt.NDArray[np.int64]]:
    """Number and exact coordinate sums of the particles of each cell.

    Parameters
    ----------
    positions
        float64 ``[N,3]``, global.
    shape
        Shape of the whole volume.
    radius
        Convergence radius.

    Returns
    -------
    table
        Ascending by cell; offsets are int64 fixed point, so that sums do not depend on the order.
    index
        int64 ``[N]``: the row of each particle's cell.

    Examples
    --------
    >>> table, index = cell_table(np.array([[0, 0, 2.5], [0, 0, 1.5]]), shape=(8, 8, 8), radius=4.0)
    >>> table.counts, index
    (array([2]), array([0, 0]))
    """
    numbers = cell_numbers(positions, shape=shape, radius=radius)
    cells, index = _distinct(numbers)
    corners = cell_corners(cells, shape=shape, radius=radius)
    counts = np.zeros(cells.size, dtype=np.int64)
    offsets = np.zeros((cells.size, 3), dtype=np.int64)
    _sum(np.ascontiguousarray(positions), index, corners, counts, offsets)
    return CellTable(cells, counts, offsets), index


def _distinct(
    numbers: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Distinct values, ascending, and the position of each among them; by hashing, not sorting."""
    local, ids = compact((numbers + 1)[None, None])
    return ids.astype(np.int64) - 1, local.ravel().astype(np.int64) - 1


@compiled
def _find(parent: Any, i: Any) -> Any:
    root = i
    while parent[root] != root:
        root = parent[root]
    while parent[i] != root:
        parent[i], i = root, parent[i]
    return root


@compiled
def _close(corner_a: Any, part_a: Any, corner_b: Any, part_b: Any, radius: float) -> Any:
    """Whether two centres are closer than the radius. Differences of corners are exact."""
    total = 0.0
    for axis in range(3):
        d = np.float64(corner_a[axis] - corner_b[axis]) + (part_a[axis] - part_b[axis])
        total += d * d
    return np.sqrt(total) < radius


@compiled
def _join(
    cells: Any, index: Any, corners: Any, parts: Any, counts: Any, radius: float, groups: Any
) -> Any:
    """Join close cells of the same group; list the close pairs of different groups.

    ``cells`` ascend in C order, so the cells within reach on one row of the cell grid are a run.
    """
    total = cells.size
    parent = np.arange(total)
    pairs = np.empty((16, 2), np.int64)
    found = 0
    for i in range(total):
        cz, cy, cx = index[i, 0], index[i, 1], index[i, 2]
        for dz in range(REACH + 1):
            for dy in range(-REACH if dz else 0, REACH + 1):
                z, y = cz + dz, cy + dy
                if z >= counts[0] or y < 0 or y >= counts[1]:
                    continue
                row = (z * counts[1] + y) * counts[2]
                low = row + max(cx - REACH, 0)
                high = row + min(cx + REACH, counts[2] - 1)
                j = max(np.searchsorted(cells, low), i + 1)
                while j < total and cells[j] <= high:
                    if groups[i] == groups[j]:
                        a, b = _find(parent, i), _find(parent, j)
                        if a != b and _close(corners[i], parts[i], corners[j], parts[j], radius):
                            parent[max(a, b)] = min(a, b)
                    elif _close(corners[i], parts[i], corners[j], parts[j], radius):
                        if found == len(pairs):
                            pairs = np.concatenate((pairs, np.empty_like(pairs)))
                        pairs[found, 0], pairs[found, 1] = i, j
                        found += 1
                    j += 1
    for i in range(total):
        parent[i] = _find(parent, i)
    return parent, pairs[:found]


def join_cells(
    table: CellTable,
    *,
    shape: tuple[int, ...],
    radius: float,
    groups: npt.NDArray[np.int64] | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Join the cells whose centres are closer than the radius (strictly).

    Parameters
    ----------
    table
        Cells with their particle counts and offsets.
    shape
        Shape of the whole volume.
    radius
        Convergence radius.
    groups
        int64 ``[M]``: cells of different groups (blocks) are not joined; their pairs are listed.

    Returns
    -------
    roots
        int64 ``[M]``: row of the smallest cell of the component, within the group.
    pairs
        int64 ``[P,2]``: rows of close cells of different groups, the smaller first.

    Examples
    --------
    >>> positions = np.array([[0, 0, 2.0], [0, 0, 5.0], [0, 0, 30.0]])
    >>> table, _ = cell_table(positions, shape=(8, 8, 40), radius=4.0)
    >>> join_cells(table, shape=(8, 8, 40), radius=4.0)[0]
    array([0, 0, 2])
    """
    counts = np.asarray(cell_counts(shape, radius), dtype=np.int64)
    index = cell_indices(table.cells, shape=shape, radius=radius)
    corners = cell_corners(table.cells, shape=shape, radius=radius)
    parts = table.offsets / (table.counts[:, None] * FRACTION)
    if groups is None:
        groups = np.zeros(table.cells.size, dtype=np.int64)
    roots, pairs = _join(table.cells, index, corners, parts, counts, float(radius), groups)
    return roots, pairs
