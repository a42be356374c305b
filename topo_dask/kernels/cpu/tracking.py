"""Particles along a flow: float64 positions, exact across blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.kernels.cpu.labels import native
from topo_dask.kernels.cpu.linear import track_linear
from topo_dask.kernels.cpu.stepping import LANES, place_of, track_nearest, track_whole
from topo_dask.kernels.jit import compiled
from topo_dask.kernels.parallel import Starmap, ranges, starmap

PARTS = 8
"""Parts of a volume for each thread, so that none waits long for the last one."""


@compiled
def _count(mask: Any, first: int, end: int, counts: Any) -> None:
    for line in range(first, end):
        z, y = divmod(line, mask.shape[1])
        count = 0
        for x in range(mask.shape[2]):
            count += mask[z, y, x] != 0
        counts[line] = count


@compiled
def _fill_voxels(mask: Any, first: int, end: int, starts: Any, origin: Any, out: Any) -> None:
    for line in range(first, end):
        z, y = divmod(line, mask.shape[1])
        row = starts[line]
        for x in range(mask.shape[2]):
            if mask[z, y, x] != 0:
                out[row, 0] = z + origin[0]
                out[row, 1] = y + origin[1]
                out[row, 2] = x + origin[2]
                row += 1


def foreground_voxels(
    mask: npt.NDArray[Any],
    *,
    origin: tuple[int, ...] = (0, 0, 0),
    dtype: npt.DTypeLike = np.float64,
    threads: int = 1,
    out: npt.NDArray[Any] | None = None,
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
    out
        Where the result goes, if it has a place.

    Examples
    --------
    >>> foreground_voxels(np.array([[[0, 1, 1]]]), origin=(5, 0, 0), dtype=np.int64)
    array([[5, 0, 1],
           [5, 0, 2]])
    """
    mask = _plain(mask)
    start = np.asarray(origin, dtype=np.int64)
    with starmap(threads) as run:
        starts = _first_rows(mask, run, threads)
        if out is None:
            out = np.empty((int(starts[-1]), 3), dtype=dtype)
        parts = ranges(len(starts) - 1, threads)
        run(_fill_voxels, [(mask, a, b, starts, start, out) for a, b in parts])
    return out


def _plain(mask: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same voxels in a type that compiled code knows."""
    if mask.dtype.kind == "f":
        mask = mask != 0
    return native(mask.view(np.uint8) if mask.dtype == np.bool_ else mask)


def _first_rows(mask: npt.NDArray[Any], run: Starmap, threads: int) -> npt.NDArray[np.int64]:
    """How many foreground voxels come before each line along x, and how many there are."""
    counts = np.zeros(mask.shape[0] * mask.shape[1] + 1, dtype=np.int64)
    run(_count, [(mask, a, b, counts[1:]) for a, b in ranges(len(counts) - 1, threads)])
    return np.cumsum(counts)


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
    interleave_into(out, flow, threads=threads)
    return out


def interleave_into(
    out: npt.NDArray[np.float32], flow: npt.NDArray[Any], *, threads: int = 1
) -> None:
    """`interleave` into memory that is there.

    Examples
    --------
    >>> out = np.empty((1, 1, 2, 4), np.float32)
    >>> interleave_into(out[:, :, 1:], np.ones((3, 1, 1, 1)))
    >>> out[0, 0, 1]
    array([1., 1., 1., 0.], dtype=float32)
    """
    single = flow.astype(np.float32) if flow.dtype == np.float16 else native(flow)
    contiguous = np.ascontiguousarray(single)
    with starmap(threads) as run:
        run(_fill4, [(contiguous, a, b, out) for a, b in ranges(flow.shape[1], threads)])


@compiled
def _all_finite(bits: Any) -> Any:
    exponent = np.int32(0x7F800000)
    bad = np.int32(0)
    for i in range(bits.size):
        bad |= np.int32((bits[i] & exponent) == exponent)
    return bad == 0


def all_finite(flow: npt.NDArray[np.float32]) -> bool:
    """Whether an interleaved flow has no NaN and no infinity: read once, at memory's speed.

    Examples
    --------
    >>> all_finite(np.array([1e38, 1e38], np.float32)), all_finite(np.array([np.nan], np.float32))
    (True, False)
    """
    return bool(_all_finite(flow.reshape(-1).view(np.int32)))


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
    kernel, common = _kernel(flow, origin, shape, step_size, interpolation)
    groups = ranges(-(-len(positions) // LANES), threads)
    spans = [np.array([a * LANES, min(b * LANES, len(positions))]) for a, b in groups]
    with starmap(threads) as run:
        run(kernel, [(flow.reshape(-1), positions, steps_left, *common, span) for span in spans])


def _kernel(
    flow: npt.NDArray[np.float32],
    origin: tuple[int, ...],
    shape: tuple[int, ...],
    step_size: float,
    interpolation: str,
) -> tuple[Any, tuple[Any, ...]]:
    """The compiled function, and what it gets between the particles and their range."""
    if interpolation == "nearest":
        place = place_of(origin, flow.shape[:3], shape)
        return track_nearest, (place, np.float32(step_size), np.zeros(0, place.low[0].dtype))
    top = np.asarray(shape, dtype=np.float64) - 1
    start, size = (np.asarray(n, dtype=np.int64) for n in (origin, flow.shape[:3]))
    return track_linear, (start, size, top, np.float32(step_size))


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
    flat, steps_left = flow.reshape(-1), np.zeros(np.count_nonzero(mask), dtype=np.int32)
    kernel, common = _kernel(flow, origin, shape, step_size, interpolation)

    def follow(ends: npt.NDArray[np.float64], span: npt.NDArray[np.int64]) -> None:
        steps_left[...] = n_steps
        kernel(flat, ends, steps_left, *common, span)

    return _from_voxels(mask, follow, start=start), steps_left


def track_volume(
    flow: npt.NDArray[np.float32],
    mask: npt.NDArray[Any],
    *,
    n_steps: int,
    step_size: float,
    interpolation: str = "nearest",
    threads: int = 1,
) -> npt.NDArray[np.float64]:
    """Track a particle from every voxel of a mask through the whole volume, which none leaves.

    Parameters
    ----------
    flow, step_size, interpolation, threads
        See `track`.
    mask, n_steps
        See `track_voxels`.

    Returns
    -------
    float64 ``[N,3]``: where each ended, in C order of the voxels.

    Examples
    --------
    >>> flow = np.zeros((1, 1, 4, 4), np.float32)
    >>> flow[..., 2] = 1
    >>> track_volume(flow, np.array([[[1, 0, 0, 0]]]), n_steps=2, step_size=1.0)
    array([[0., 0., 2.]])
    """
    flat, origin, shape = flow.reshape(-1), (0, 0, 0), flow.shape[:3]
    kernel, common = _kernel(flow, origin, shape, step_size, interpolation)
    run_whole: Any = track_whole

    def follow(ends: npt.NDArray[np.float64], span: npt.NDArray[np.int64]) -> None:
        if interpolation == "nearest":
            run_whole(flat, ends, n_steps, *common, span)
        else:
            mine = ends[span[0] : span[1]]
            left = np.full(len(mine), n_steps, dtype=np.int32)
            kernel(flat, mine, left, *common, np.array([0, len(mine)]))

    return _from_voxels(mask, follow, start=origin, threads=threads)


def _from_voxels(
    mask: npt.NDArray[Any],
    follow: Callable[[npt.NDArray[np.float64], npt.NDArray[np.int64]], None],
    *,
    start: tuple[int, ...],
    threads: int = 1,
) -> npt.NDArray[np.float64]:
    """Positions of the voxels of a mask, of which ``follow`` moves a range at a time."""
    mask, corner = _plain(mask), np.asarray(start, dtype=np.int64)
    with starmap(threads) as run:
        rows = _first_rows(mask, run, threads)
        ends = np.empty((int(rows[-1]), 3), dtype=np.float64)

        def part(first: int, end: int) -> None:
            _fill_voxels(mask, first, end, rows, corner, ends)
            follow(ends, rows[[first, end]])

        run(part, ranges(len(rows) - 1, 1 if threads == 1 else PARTS * threads))
    return ends
