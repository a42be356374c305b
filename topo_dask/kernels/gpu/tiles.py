"""Overlapping tiles into one block on the device, with the answers of `kernels.cpu.tiles`.

Arrays may be in memory, or on the device: then a block stays there while its tiles are added, and
parts of it are views, as on the CPU.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.kernels.gpu.arrays import fetched, placed, write_back
from topo_dask.kernels.gpu.device import find_device

Along = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]

TYPES = ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")
"""Types of values, by the numbers that kernels know them by."""


def _type(array: Any) -> int:
    code = array.dtype.str[1:]
    return TYPES.index("u1" if code == "b1" else code)


def _start(view: Any) -> Any:
    """The bytes of a view's first voxel, by which kernels find the others."""
    first = view[(0,) * (view.ndim - 1)][:1]
    if view.shape[-1] > 1 and view.strides[-1] != view.itemsize:
        raise ValueError("voxels along x must be next to each other")
    return first.view(np.uint8)


def _between(view: Any) -> tuple[int, ...]:
    """Elements between the channels, planes and rows of a view; without channels of a 3-D one."""
    return tuple(step // view.itemsize for step in view.strides[:-1])


def _joined(*along: Along) -> npt.NDArray[Any]:
    return np.concatenate([vector for three in along for vector in three])


def add_tile(mean: Any, weights: Any, values: Any, along: Along) -> None:
    """Take a tile into the weighted mean, in place; see `kernels.cpu.tiles.add_tile`.

    Examples
    --------
    >>> import os
    >>> os.environ["TOPO_DASK_GPU_DEVICE"] = "host"
    >>> mean, weights, one = np.zeros((1, 1, 1, 2)), np.zeros((1, 1, 2)), np.ones(1)
    >>> along = one, one, np.array([1, 0.5])
    >>> add_tile(mean, weights, np.full((1, 1, 1, 2), 3.0), along)
    >>> add_tile(mean, weights, np.full((1, 1, 1, 2), 1.0), along)
    >>> mean.ravel(), weights.ravel()
    (array([2., 2.]), array([2., 1.]))
    >>> del os.environ["TOPO_DASK_GPU_DEVICE"]
    """
    device = find_device()
    channels, *size = values.shape
    if not values.size:
        return
    with device.working():
        total, sums, tile = (placed(device, a) for a in (mean, weights, values))
        device.launch(
            "tiles",
            "add_tile",
            math.prod(size),
            *(_start(total), _type(total), *_between(total)),
            *(sums[0, 0, :1], *_between(sums)),
            *(_start(tile), _type(tile), device.put(_joined(along)), channels, *size[1:]),
        )
        write_back(device, total, mean)
        write_back(device, sums, weights)


def add_next_tile(mean: Any, values: Any, along: Along, before: Along) -> None:
    """The same for the next tile of a full grid; see `kernels.cpu.tiles.add_next_tile`."""
    device = find_device()
    channels, *size = values.shape
    if not values.size:
        return
    reached = int(np.max(np.flatnonzero(before[2] > 0) + 1, initial=0))
    with device.working():
        total, tile = placed(device, mean), placed(device, values)
        device.launch(
            "tiles",
            "add_next_tile",
            math.prod(size),
            *(_start(total), _type(total), *_between(total)),
            *(_start(tile), _type(tile), device.put(_joined(along, before)), channels),
            *(*size[1:], reached),
        )
        write_back(device, total, mean)


def keep_largest(best: Any, seen: Any, values: Any) -> None:
    """Keep the larger of what is there and a tile's values, in place; ``seen`` is set."""
    device = find_device()
    channels, *size = values.shape
    if not values.size:
        return
    with device.working():
        largest, flags, tile = (placed(device, a) for a in (best, seen, values))
        device.launch(
            "tiles",
            "keep_largest",
            math.prod(size),
            *(_start(largest), *_between(largest), _start(flags), *_between(flags)),
            *(_start(tile), _type(tile), tile.itemsize, channels, *size[1:]),
        )
        write_back(device, largest, best)
        write_back(device, flags, seen)


def _keep(kernel: str, best: Any, state: Any, values: Any, along: Along) -> None:
    """Take a tile's values where its distance or weight is better than what is there."""
    device = find_device()
    channels, *size = values.shape
    if not values.size:
        return
    with device.working():
        kept, there, tile = (placed(device, a) for a in (best, state, values))
        device.launch(
            "tiles",
            kernel,
            math.prod(size),
            *(_start(kept), *_between(kept), there[0, 0, :1], *_between(there)),
            *(_start(tile), tile.itemsize, device.put(_joined(along)), channels, *size[1:]),
        )
        write_back(device, kept, best)
        write_back(device, there, state)


def keep_nearest(best: Any, distance: Any, values: Any, along: Along) -> None:
    """Take a tile's values where it is strictly nearer than what is there, in place."""
    _keep("keep_nearest", best, distance, values, along)


def keep_heaviest(best: Any, heaviest: Any, values: Any, along: Along) -> None:
    """Take a tile's values where its weight is strictly higher than what is there, in place."""
    _keep("keep_heaviest", best, heaviest, values, along)


def rounded(values: Any, dtype: npt.DTypeLike) -> Any:
    """Values as whole numbers, halves to the even one."""
    device = find_device()
    with device.working():
        there = placed(device, values)
        out = device.empty(there.shape, np.dtype(dtype))
        if values.size:
            given = _start(there), _type(there), _start(out), _type(out)
            device.launch("tiles", "rounded", there.size, *given)
        return fetched(device, out, like=values)
