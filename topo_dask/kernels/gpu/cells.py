"""Convergence cells on the device: the same tables as the CPU's, as whole numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.kernels.cpu.cells import FRACTION, cell_corners, cell_counts, cell_size
from topo_dask.kernels.gpu.arrays import fetched, placed
from topo_dask.kernels.gpu.device import Device, find_device
from topo_dask.kernels.tables import CellTable

EACH = 8
"""Particles that a thread adds up before it adds to a cell's sums."""


def _numbers(device: Device, positions: Any, shape: tuple[int, ...], radius: float) -> Any:
    numbers = device.empty(len(positions), np.int64)
    cells = cell_size(radius), *cell_counts(shape, radius)
    device.launch("cells", "cell_numbers", len(positions), positions, numbers, *cells)
    return numbers


def cell_numbers(
    positions: npt.NDArray[np.float64], *, shape: tuple[int, ...], radius: float
) -> npt.NDArray[np.int64]:
    """The cell in which each position lies; see `kernels.cpu.cell_numbers`."""
    device = find_device()
    with device.working():
        numbers = _numbers(device, placed(device, positions), shape, radius)
        made: npt.NDArray[np.int64] = fetched(device, numbers, like=positions)
    return made


def cell_table(
    positions: npt.NDArray[np.float64], *, shape: tuple[int, ...], radius: float
) -> tuple[CellTable, npt.NDArray[np.int64]]:
    """Number and exact coordinate sums of the particles of each cell.

    What `kernels.cpu.cell_table` gives, to the last bit; the table is in memory, the index where
    the positions were.

    Examples
    --------
    >>> import os
    >>> os.environ["TOPO_DASK_GPU_DEVICE"] = "host"
    >>> table, index = cell_table(np.array([[0, 0, 2.5], [0, 0, 1.5]]), shape=(8, 8, 8), radius=4.0)
    >>> table.counts, index
    (array([2]), array([0, 0]))
    >>> del os.environ["TOPO_DASK_GPU_DEVICE"]
    """
    device = find_device()
    with device.working():
        there = placed(device, positions)
        numbers = _numbers(device, there, shape, radius)
        found, index = device.xp.unique(numbers, return_inverse=True)
        index = index.astype(np.int64, copy=False)
        cells = device.get(found)
        corners = device.put(cell_corners(cells, shape=shape, radius=radius))
        counts = device.zeros(len(cells), np.int64)
        offsets = device.zeros((len(cells), 3), np.int64)
        sums = (index, corners, counts, offsets, FRACTION, EACH, len(there))
        device.launch("cells", "cell_sums", -(-len(there) // EACH), there, *sums)
        table = CellTable(cells, device.get(counts), device.get(offsets))
        return table, fetched(device, index, like=positions)
