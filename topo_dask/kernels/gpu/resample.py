"""Tiles under a transform on the device: the numbers of `topo_dask.kernels.resample`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.kernels.gpu.arrays import fetched, placed, write_back
from topo_dask.kernels.gpu.device import Device, find_device
from topo_dask.kernels.resample import Box, Lengths, inside, windows

POLE = -0.267949192431122706472553658494127633
"""Of the filter of cubic splines: sqrt(3) - 2, as scipy rounds it."""


def _filter(device: Device, values: Any) -> None:
    """Cubic spline coefficients of ``[C,z,y,x]``, mirrored at its faces, in place."""
    stride = values.size // len(values)
    for length in values.shape[1:]:  # scipy's order
        stride //= length
        if length > 1:
            lines = values.size // length
            numbers = length, stride, POLE, POLE ** (length - 1)
            device.launch("resample", "spline_lines", lines, values, *numbers)


def spline_coefficients(values: Any, *, start: Lengths, part: Box, lengths: Lengths) -> Any:
    """Cubic spline coefficients of a part of a tile; see `kernels.resample.spline_coefficients`.

    Examples
    --------
    >>> import os
    >>> os.environ["TOPO_DASK_GPU_DEVICE"] = "host"
    >>> tile = np.arange(6.0).reshape(1, 1, 1, 6)
    >>> part = ((0, 0, 2), (1, 1, 4))
    >>> spline_coefficients(tile, start=(0, 0, 0), part=part, lengths=(1, 1, 6)).round(2)
    array([[[[1.95, 3.05]]]])
    >>> del os.environ["TOPO_DASK_GPU_DEVICE"]
    """
    device = find_device()
    shape = tuple(b - a for a, b in zip(*part, strict=True))
    with device.working():
        there = placed(device, values)
        out = device.empty((len(values), *shape), np.float64)
        for window, wide in windows(part, lengths):
            common: Box = (
                tuple(map(max, window[0], part[0])),
                tuple(map(min, window[1], part[1])),
            )
            piece = device.empty((len(values), *(b - a for a, b in zip(*wide, strict=True))), "f8")
            piece[...] = there[inside(wide, start)]
            _filter(device, piece)
            out[inside(common, part[0])] = piece[inside(common, wide[0])]
        return fetched(device, out, like=values)


def accumulate(
    total: Any,
    weights: Any,
    part: Any,
    maps: npt.NDArray[np.float64],
    place: npt.NDArray[np.int64],
    tables: npt.NDArray[np.float64],
    modes: npt.NDArray[np.int64],
) -> None:
    """Blend a part of a tile into a block of the output, in place; see `kernels.resample`.

    The first three may be in memory or on the device.
    """
    device = find_device()
    low, high = place[1], place[2]
    count = math.prod(max(0, n) for n in (high - low).tolist())
    numbers = np.concatenate([place.ravel(), total.shape[1:], part.shape[1:]]).astype(np.int64)
    order, blend, vector = modes.tolist()
    with device.working():
        sums, mass, tile = (placed(device, a) for a in (total, weights, part))
        kernel = f"accumulate_{total.dtype.str[1:]}_{part.dtype.str[1:]}"
        given = device.put(maps), device.put(numbers), device.put(tables)
        options = tables.shape[1], len(total), order, blend, vector
        device.launch("resample", kernel, count, sums, mass, tile, *given, *options)
        write_back(device, sums, total)
        write_back(device, mass, weights)
