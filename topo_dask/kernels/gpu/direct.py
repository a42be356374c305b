"""Direct flows on the device, and how far a given flow is from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.kernels.cpu.direct import ERROR_UNIT, MOST_ERROR
from topo_dask.kernels.cpu.labels import Integers
from topo_dask.kernels.gpu.arrays import fetched, placed
from topo_dask.kernels.gpu.device import find_device
from topo_dask.kernels.gpu.layout import numbered
from topo_dask.kernels.tables import ErrorTable

RUN = 8
"""Voxels whose differences a thread adds up."""


def direct_flow(
    labels: Integers,
    *,
    ids: npt.NDArray[np.uint64],
    centres: npt.NDArray[np.float64],
    origin: tuple[int, ...] = (0, 0, 0),
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
) -> npt.NDArray[np.float32]:
    """Unit vectors to the instance's centre, as `topo_dask.kernels.cpu.direct_flow`.

    Of each voxel, 16 bytes go to and from memory: its number, and the flow.

    Examples
    --------
    >>> flow = direct_flow(
    ...     np.array([[[5, 5, 5]]]),
    ...     ids=np.array([5], np.uint64),
    ...     centres=np.array([[0.0, 0.0, 1.0]]),
    ... )
    >>> flow[2, 0, 0]
    array([ 1.,  0., -1.], dtype=float32)
    """
    device = find_device()
    apart = [s / min(spacing) for s in spacing]
    with device.working():
        local = numbered(device, labels, ids)
        flow = device.empty((3, *labels.shape), np.float32)
        to = device.put(np.asarray(centres, dtype=np.float64))
        place = (*labels.shape[1:], *origin, *apart)
        device.launch("direct", "direct_flow", local.size, local, to, *place, flow)
        made: npt.NDArray[np.float32] = fetched(device, flow, like=labels)
        return made


def flow_errors(
    labels: Integers,
    flow4: npt.NDArray[np.float32],
    *,
    ids: npt.NDArray[np.uint64],
    centres: npt.NDArray[np.float64],
    origin: tuple[int, ...] = (0, 0, 0),
) -> ErrorTable:
    """Squared differences from the direct flow, as `topo_dask.kernels.cpu.flow_errors`.

    Whole numbers, so the sums are the CPU's in every bit. Of each voxel, 20 bytes are read.

    Examples
    --------
    >>> line, flow = np.array([[[5, 5, 5]]]), np.zeros((1, 1, 3, 4), np.float32)
    >>> ids, centres = np.array([5], np.uint64), np.array([[0.0, 0.0, 1.0]])
    >>> flow_errors(line, flow, ids=ids, centres=centres).sums * ERROR_UNIT
    array([2.])
    """
    device = find_device()
    with device.working():
        local = numbered(device, labels, ids)
        present = device.zeros(len(ids) + 1, np.uint8)
        box = (*labels.shape[1:], 0, 0, 0, *labels.shape[1:])
        device.launch("diffusion", "mark_present", local.size, local, present, *box)
        low, high = (device.zeros(len(ids) + 1, np.uint64) for _ in range(2))
        given = (placed(device, flow4), device.put(np.asarray(centres, dtype=np.float64)))
        place = (local.size, RUN, *labels.shape[1:], *origin, ERROR_UNIT, MOST_ERROR)
        count = -(-local.size // RUN)
        device.launch("direct", "flow_errors", count, local, *given, *place, low, high)
        there = device.get(present)[1:].astype(np.bool_)
        sums = _limited(device.get(low)[1:][there], device.get(high)[1:][there])
    return ErrorTable(np.asarray(ids, dtype=np.uint64)[there], sums)


def _limited(low: npt.NDArray[Any], high: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Low + 2**32 * high, but at most what sums end at."""
    most = int(MOST_ERROR / ERROR_UNIT)
    high = high + (low >> np.uint64(32))
    full = high >= np.uint64(most >> 32)
    sums = (high << np.uint64(32)) | (low & np.uint64(2**32 - 1))
    return np.where(full, np.int64(most), sums.astype(np.int64))
