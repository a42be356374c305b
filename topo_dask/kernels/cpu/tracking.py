"""Particles along a flow: float64 positions, many particles in lock-step, exact across blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.kernels.cpu.labels import native
from topo_dask.kernels.cpu.linear import track_linear
from topo_dask.kernels.jit import compiled
from topo_dask.kernels.parallel import ranges, starmap

LANES = 64
"""Particles advanced together: one alone would wait for its own last load at every step."""


@compiled
def _count(mask: Any, first: int, end: int, counts: Any) -> None:
    for z in range(first, end):
        count = 0
        for y in range(mask.shape[1]):
            for x in range(mask.shape[2]):
                count += mask[z, y, x] != 0
        counts[z] = count


@compiled
def _fill_voxels(mask: Any, first: int, end: int, starts: Any, origin: Any, out: Any) -> None:
    for z in range(first, end):
        row = starts[z]
        for y in range(mask.shape[1]):
            for x in range(mask.shape[2]):
                if mask[z, y, x] != 0:
                    out[row, 0], out[row, 1], out[row, 2] = (
                        z + origin[0],
                        y + origin[1],
                        x + origin[2],
                    )
                    row += 1


def foreground_voxels(
    mask: npt.NDArray[Any],
    *,
    origin: tuple[int, ...] = (0, 0, 0),
    dtype: npt.DTypeLike = np.float64,
    threads: int = 1,
) -> npt.NDArray[Any]:
    """Global indices of the voxels that are not 0, in C order: ``[N,3]``.

    Parameters
    ----------
    mask
        ``[Z,Y,X]``, any numbers.
    origin
        Global index of ``mask[0,0,0]``.
    dtype
        Of the result: float64 for the positions of particles, int64 for indices.
    threads
        Threads to use.

    Examples
    --------
    >>> foreground_voxels(np.array([[[0, 1, 1]]]), origin=(5, 0, 0), dtype=np.int64)
    array([[5, 0, 1],
           [5, 0, 2]])
    """
    mask = native(mask.view(np.uint8) if mask.dtype == np.bool_ else mask)
    counts = np.zeros(mask.shape[0], dtype=np.int64)
    parts = ranges(mask.shape[0], threads)
    with starmap(threads) as run:
        run(_count, [(mask, a, b, counts) for a, b in parts])
        starts = np.cumsum(counts) - counts
        out = np.empty((int(counts.sum()), 3), dtype=dtype)
        start = np.asarray(origin, dtype=np.int64)
        run(_fill_voxels, [(mask, a, b, starts, start, out) for a, b in parts])
    return out


@compiled
def _fill4(flow: Any, first: int, end: int, out: Any) -> None:
    for z in range(first, end):
        for y in range(flow.shape[2]):
            for x in range(flow.shape[3]):
                a = np.float32(flow[0, z, y, x])
                b = np.float32(flow[1, z, y, x])
                c = np.float32(flow[2, z, y, x])
                out[z, y, x, 0] = a
                out[z, y, x, 1] = b
                out[z, y, x, 2] = c
                out[z, y, x, 3] = 0


def interleave(flow: npt.NDArray[Any], *, threads: int = 1) -> npt.NDArray[np.float32]:
    """Put a flow's components side by side, ``[3,Z,Y,X]`` to float32 ``[Z,Y,X,4]``, last one 0.

    A particle then needs one cache line a step instead of three.

    Examples
    --------
    >>> interleave(np.ones((3, 1, 1, 1), np.float16))[0, 0, 0]
    array([1., 1., 1., 0.], dtype=float32)
    """
    out = np.empty((*flow.shape[1:], 4), dtype=np.float32)
    single = flow.astype(np.float32) if flow.dtype == np.float16 else native(flow)
    contiguous = np.ascontiguousarray(single)
    with starmap(threads) as run:
        run(_fill4, [(contiguous, a, b, out) for a, b in ranges(flow.shape[1], threads)])
    return out


@compiled
def _track(
    flow: Any, positions: Any, left: Any, origin: Any, size: Any, top: Any, step: Any, span: Any
) -> None:
    """Advance the particles of a range. Three short loops a step, each of which vectorises."""
    z = np.empty(LANES)
    y = np.empty(LANES)
    x = np.empty(LANES)
    budget = np.empty(LANES, np.int32)
    made = np.empty(LANES, np.int32)
    at = np.empty(LANES, np.int64)
    fz = np.empty(LANES, np.float32)
    fy = np.empty(LANES, np.float32)
    fx = np.empty(LANES, np.float32)
    oz, oy, ox = np.int64(origin[0]), np.int64(origin[1]), np.int64(origin[2])
    nz, ny, nx = np.int64(size[0]), np.int64(size[1]), np.int64(size[2])
    tz, ty, tx = top[0], top[1], top[2]
    for first in range(span[0], span[1], LANES):
        count = min(LANES, span[1] - first)
        most = np.int32(0)
        for j in range(LANES):
            i = first + min(j, count - 1)
            z[j], y[j], x[j] = positions[i, 0], positions[i, 1], positions[i, 2]
            budget[j] = left[i]
            made[j] = 0
            most = max(most, left[i])
        for step_number in range(most):
            moving = 0
            for j in range(LANES):
                iz = np.int32(z[j]) - oz
                iy = np.int32(y[j]) - oy
                ix = np.int32(x[j]) - ox
                inside = (iz >= 0) & (iz < nz) & (iy >= 0) & (iy < ny) & (ix >= 0) & (ix < nx)
                go = inside & (step_number < budget[j])
                at[j] = ((iz * ny + iy) * nx + ix) * 4 if go else np.int64(-1)
                moving += go
            if moving == 0:
                break
            for j in range(LANES):
                k = max(at[j], 0)
                fz[j], fy[j], fx[j] = flow[k], flow[k + 1], flow[k + 2]
            for j in range(LANES):
                go = at[j] >= 0
                a = min(max(z[j] + np.float64(step * fz[j]), 0.0), tz)
                b = min(max(y[j] + np.float64(step * fy[j]), 0.0), ty)
                c = min(max(x[j] + np.float64(step * fx[j]), 0.0), tx)
                z[j] = a if go else z[j]
                y[j] = b if go else y[j]
                x[j] = c if go else x[j]
                made[j] += np.int32(go)
        for j in range(count):
            i = first + j
            positions[i, 0], positions[i, 1], positions[i, 2] = z[j], y[j], x[j]
            left[i] -= made[j]


def track(
    flow: npt.NDArray[np.float32],
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

    One step: voxel = truncation of the position; position += float32(step_size * flow[voxel]) in
    all axes at once; clip to [0, N-1]. What a particle does never depends on the block it is in.

    Parameters
    ----------
    flow
        Interleaved float32 ``[Z,Y,X,4]`` of a part of the volume, see `interleave`.
    positions
        float64 ``[N,3]``, C order, global; changed in place.
    steps_left
        int32 ``[N]``, changed in place; what remains of a particle that left the array is > 0.
    origin
        Global index of ``flow[0,0,0]``.
    shape
        Shape of the whole volume.
    step_size
        Length of a step where the flow has length 1.
    interpolation
        "nearest": the flow of the voxel, as above. "linear": trilinear between the voxel and the
        next one along each axis (the last one of the volume stands for what comes after it),
        computed in float64 and rounded to float32. A particle then leaves the array where any of
        these voxels does.
    threads
        Threads to use.

    Examples
    --------
    >>> flow = np.zeros((1, 1, 4, 4), np.float32)
    >>> flow[..., 2] = 1
    >>> positions, left = np.zeros((1, 3)), np.array([9], np.int32)
    >>> track(flow, positions, left, origin=(0, 0, 0), shape=(1, 1, 99), step_size=1.0)
    >>> positions[0], left
    (array([0., 0., 4.]), array([5], dtype=int32))
    """
    top = np.asarray(shape, dtype=np.float64) - 1
    flat = flow.reshape(-1)
    size = np.asarray(flow.shape[:3], dtype=np.int64)
    start = np.asarray(origin, dtype=np.int64)
    step = np.float32(step_size)
    blocks = ranges(-(-len(positions) // LANES), threads)
    kernel = _track if interpolation == "nearest" else track_linear
    with starmap(threads) as run:
        run(
            kernel,
            [
                (
                    flat,
                    positions,
                    steps_left,
                    start,
                    size,
                    top,
                    step,
                    np.array([a * LANES, min(b * LANES, len(positions))]),
                )
                for a, b in blocks
            ],
        )


def track_voxels(
    flow: npt.NDArray[np.float32],
    mask: npt.NDArray[Any],
    *,
    start: tuple[int, ...],
    n_steps: int,
    origin: tuple[int, ...],
    shape: tuple[int, ...],
    step_size: float,
    interpolation: str = "nearest",
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    """Track a particle from every voxel of a mask.

    Parameters
    ----------
    flow, origin, shape, step_size, interpolation
        See `track`.
    mask
        ``[Z,Y,X]``, foreground where not 0.
    start
        Global index of ``mask[0,0,0]``.
    n_steps
        Steps of each particle.

    Returns
    -------
    ends
        float64 ``[N,3]``: where each ended or left the array, in C order of the voxels.
    steps_left
        int32 ``[N]``: the steps that those that left still have.

    Examples
    --------
    >>> flow = np.zeros((1, 1, 4, 4), np.float32)
    >>> flow[..., 2] = 1
    >>> place = {"start": (0, 0, 2), "origin": (0, 0, 0), "shape": (1, 1, 99)}
    >>> track_voxels(flow, np.ones((1, 1, 1)), n_steps=9, step_size=1.0, **place)
    (array([[0., 0., 4.]]), array([7], dtype=int32))
    """
    ends = foreground_voxels(mask, origin=start)
    steps_left = np.full(len(ends), n_steps, dtype=np.int32)
    track(
        flow,
        ends,
        steps_left,
        origin=origin,
        shape=shape,
        step_size=step_size,
        interpolation=interpolation,
    )
    return ends, steps_left
