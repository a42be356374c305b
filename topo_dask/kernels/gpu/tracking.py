"""Particles along a flow on the device: positions are those of the CPU bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.kernels.gpu.arrays import fetched, placed, write_back
from topo_dask.kernels.gpu.device import Device, find_device


def _voxels(device: Device, mask: Any, origin: tuple[int, ...]) -> Any:
    """Positions of the voxels that are not 0, in C order, on the device."""
    numbers = device.xp.flatnonzero(mask)
    positions = device.empty((len(numbers), 3), np.float64)
    _, ny, nx = mask.shape
    device.launch("tracking", "voxel_positions", len(numbers), numbers, positions, ny, nx, *origin)
    return positions


def foreground_voxels(
    mask: npt.NDArray[Any],
    *,
    origin: tuple[int, ...] = (0, 0, 0),
    dtype: npt.DTypeLike = np.float64,
    threads: int = 1,
) -> npt.NDArray[Any]:
    """Global indices of the voxels that are not 0; see `kernels.cpu.foreground_voxels`."""
    device = find_device()
    with device.working():
        positions = _voxels(device, placed(device, mask), origin)
        made: npt.NDArray[Any] = fetched(device, positions.astype(dtype, copy=False), like=mask)
    return made


def interleave(flow: npt.NDArray[Any], *, threads: int = 1) -> Any:
    """Put a flow's components side by side, ``[3,Z,Y,X]`` to float32 ``[Z,Y,X,4]``, last one 0.

    The result stays on the device, where `track` wants it.

    Examples
    --------
    >>> import os
    >>> os.environ["TOPO_DASK_GPU_DEVICE"] = "host"
    >>> interleave(np.ones((3, 1, 1, 1), np.float16))[0, 0, 0].tolist()
    [1.0, 1.0, 1.0, 0.0]
    >>> del os.environ["TOPO_DASK_GPU_DEVICE"]
    """
    device = find_device()
    with device.working():
        single = placed(device, flow).astype(np.float32, copy=False)
        shape = single.shape[1:]
        out = device.empty((*shape, 4), np.float32)
        device.launch("tracking", "interleave", int(np.prod(shape)), single, out)
    return out


def _track(
    device: Device,
    flow: Any,
    positions: Any,
    left: Any,
    *,
    origin: tuple[int, ...],
    shape: tuple[int, ...],
    step_size: float,
    interpolation: str,
) -> None:
    """`track` of arrays on the device."""
    kernel = "track_nearest" if interpolation == "nearest" else "track_linear"
    top = [float(n - 1) for n in shape]
    place = (*origin, *flow.shape[:3], *top)
    device.launch("tracking", kernel, len(left), flow, positions, left, *place, step_size)


def track(
    flow: Any,
    positions: npt.NDArray[np.float64],
    steps_left: npt.NDArray[np.int32],
    *,
    origin: tuple[int, ...],
    shape: tuple[int, ...],
    step_size: float,
    interpolation: str = "nearest",
    threads: int = 1,
) -> None:
    """Advance particles in place until their steps are used up or they leave the array.

    What `kernels.cpu.track` does, bit for bit. The flow is what `interleave` gave, or the same in
    memory; positions and steps may be in memory or on the device.

    Examples
    --------
    >>> import os
    >>> os.environ["TOPO_DASK_GPU_DEVICE"] = "host"
    >>> flow = np.zeros((1, 1, 4, 4), np.float32)
    >>> flow[..., 2] = 1
    >>> positions, left = np.zeros((1, 3)), np.array([9], np.int32)
    >>> track(flow, positions, left, origin=(0, 0, 0), shape=(1, 1, 99), step_size=1.0)
    >>> positions[0], left
    (array([0., 0., 4.]), array([5], dtype=int32))
    >>> del os.environ["TOPO_DASK_GPU_DEVICE"]
    """
    device = find_device()
    with device.working():
        there, budget = placed(device, positions), placed(device, steps_left)
        _track(
            device,
            placed(device, flow),
            there,
            budget,
            origin=origin,
            shape=shape,
            step_size=step_size,
            interpolation=interpolation,
        )
        write_back(device, there, positions)
        write_back(device, budget, steps_left)


def track_voxels(
    flow: Any,
    mask: npt.NDArray[Any],
    *,
    start: tuple[int, ...],
    n_steps: int,
    origin: tuple[int, ...],
    shape: tuple[int, ...],
    step_size: float,
    interpolation: str = "nearest",
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    """Track a particle from every voxel of a mask; see `kernels.cpu.track_voxels`.

    They are made on the device: the mask goes there, and where they end comes back.
    """
    device = find_device()
    with device.working():
        positions = _voxels(device, placed(device, mask), start)
        left = device.empty(len(positions), np.int32)
        left[...] = n_steps
        _track(
            device,
            placed(device, flow),
            positions,
            left,
            origin=origin,
            shape=shape,
            step_size=step_size,
            interpolation=interpolation,
        )
        return fetched(device, positions, like=mask), fetched(device, left, like=mask)
