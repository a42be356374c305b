"""Direct flows: unit vectors from every voxel to the centre of its whole instance.

And how far a given flow is from them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from topo_dask.kernels.cpu.labels import Integers, compact, instance_facts, rows_of
from topo_dask.kernels.jit import compiled
from topo_dask.kernels.tables import ErrorTable

ERROR_UNIT = 2.0**-24
"""Unit of the squared differences that are added up as whole numbers."""

MOST_ERROR = 2.0**36
"""Squared difference of a voxel beyond which it counts no more; sums end there too."""


@compiled
def _vector(cz: float, cy: float, cx: float, gz: int, gy: int, gx: int, apart: Any) -> Any:
    """From a voxel to a centre, of length 1; 0 at the voxel nearest to it."""
    if np.rint(cz) == gz and np.rint(cy) == gy and np.rint(cx) == gx:
        return np.float32(0), np.float32(0), np.float32(0)
    a, b, c = (cz - gz) * apart[0], (cy - gy) * apart[1], (cx - gx) * apart[2]
    norm = max(np.sqrt(a * a + b * b + c * c), 1e-8)
    return np.float32(a / norm), np.float32(b / norm), np.float32(c / norm)


@compiled
def _point(local: Any, centres: Any, origin: Any, spacing: Any, flow: Any) -> None:
    for z in range(local.shape[0]):
        for y in range(local.shape[1]):
            for x in range(local.shape[2]):
                k = local[z, y, x]
                if k == 0:
                    continue
                gz, gy, gx = z + origin[0], y + origin[1], x + origin[2]
                cz, cy, cx = centres[k - 1, 0], centres[k - 1, 1], centres[k - 1, 2]
                a, b, c = _vector(cz, cy, cx, gz, gy, gx, spacing)
                flow[0, z, y, x] = a
                flow[1, z, y, x] = b
                flow[2, z, y, x] = c


@compiled
def _differ(local: Any, flow: Any, centres: Any, origin: Any, sums: Any) -> None:
    most = np.int64(MOST_ERROR / ERROR_UNIT)
    for z in range(local.shape[0]):
        for y in range(local.shape[1]):
            for x in range(local.shape[2]):
                k = local[z, y, x]
                if k == 0:
                    continue
                gz, gy, gx = z + origin[0], y + origin[1], x + origin[2]
                cz, cy, cx = centres[k - 1, 0], centres[k - 1, 1], centres[k - 1, 2]
                a, b, c = _vector(cz, cy, cx, gz, gy, gx, (1.0, 1.0, 1.0))
                da = np.float64(a) - np.float64(flow[z, y, x, 0])
                db = np.float64(b) - np.float64(flow[z, y, x, 1])
                dc = np.float64(c) - np.float64(flow[z, y, x, 2])
                square = min(da * da + db * db + dc * dc, MOST_ERROR)
                sums[k - 1] = min(sums[k - 1] + np.int64(np.rint(square / ERROR_UNIT)), most)


def direct_flow(
    labels: Integers,
    *,
    ids: npt.NDArray[np.uint64],
    centres: npt.NDArray[np.float64],
    origin: tuple[int, ...] = (0, 0, 0),
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
) -> npt.NDArray[np.float32]:
    """Unit vectors to the instance's centre: f(v) = (c - v) / |c - v|, and 0 at the sink.

    Parameters
    ----------
    labels
        ``[Z,Y,X]``, any integer type; 0 is background.
    ids, centres
        Of all instances of the array, ascending by id: uint64 ``[K]``, float64 ``[K,3]`` global.
    origin
        Global index of ``labels[0,0,0]``.
    spacing
        Distance of voxels along z, y, x, in any unit: vectors are unit vectors in it.

    Returns
    -------
    float32 ``[3,Z,Y,X]``. The voxel nearest the centre (half to even), if inside, gets 0.

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
    local, present = compact(labels)
    rows = rows_of(present, ids)
    flow = np.zeros((3, *labels.shape), dtype=np.float32)
    apart = tuple(s / min(spacing) for s in spacing)
    where = np.ascontiguousarray(centres[rows])
    _point(local, where, np.asarray(origin, dtype=np.int64), apart, flow)
    return flow


def flow_errors(
    labels: Integers,
    flow4: npt.NDArray[np.float32],
    *,
    ids: npt.NDArray[np.uint64],
    centres: npt.NDArray[np.float64],
    origin: tuple[int, ...] = (0, 0, 0),
) -> ErrorTable:
    """Squared differences between the direct flow and a given one, added up by instance.

    Parameters
    ----------
    labels
        ``[Z,Y,X]`` of a block, any integer type; 0 is background.
    flow4
        float32 ``[Z,Y,X,4]``, the given flow, interleaved and finite (see `interleave`).
    ids, centres
        Of all instances of the array, ascending by id: uint64 ``[K]``, float64 ``[K,3]`` global.
    origin
        Global index of the block's first voxel.

    Returns
    -------
    ErrorTable
        Of the instances of the block; whole numbers, so tables of blocks merge exactly.

    Examples
    --------
    >>> line, flow = np.array([[[5, 5, 5]]]), np.zeros((1, 1, 3, 4), np.float32)
    >>> ids, centres = np.array([5], np.uint64), np.array([[0.0, 0.0, 1.0]])
    >>> flow_errors(line, flow, ids=ids, centres=centres).sums * ERROR_UNIT
    array([2.])
    """
    local, present = compact(labels)
    rows = rows_of(present, ids)
    sums = np.zeros(present.size, dtype=np.int64)
    start = np.asarray(origin, dtype=np.int64)
    _differ(local, flow4, np.ascontiguousarray(centres[rows]), start, sums)
    return ErrorTable(present, sums)


def direct_centres(
    labels: Integers, *, spatial_mask: npt.NDArray[Any] | None = None
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float64]]:
    """Where the direct flow of each instance of a whole volume points to.

    The centre of mass; but an instance that touches unannotated voxels takes the first maximum
    (C order) of the distance transform of its mask, as if it went on behind the outer faces of the
    volume where those are unannotated.

    Parameters
    ----------
    labels
        ``[Z,Y,X]`` of the whole volume.
    spatial_mask
        ``[Z,Y,X]``, 1 where annotated.

    Returns
    -------
    ids
        uint64 ``[K]``, ascending.
    centres
        float64 ``[K,3]``.

    Examples
    --------
    >>> direct_centres(np.array([[[4, 4, 0, 0]]]))
    (array([4], dtype=uint64), array([[0. , 0. , 0.5]]))
    """
    table = instance_facts(labels)
    centres = table.centres
    if spatial_mask is None:
        return table.ids, centres
    annotated = spatial_mask > 0.5
    for k in range(len(table)):
        box = tuple(
            slice(max(0, a - 1), min(n, b + 1))
            for a, b, n in zip(table.lo[k], table.hi[k], labels.shape, strict=True)
        )
        mask = labels[box] == table.ids[k].astype(labels.dtype)
        around = ndimage.binary_dilation(mask) & ~mask
        if (around & ~annotated[box]).any():
            peak = _deepest(mask, annotated[box], box, labels.shape)
            centres[k] = [s.start + p for s, p in zip(box, peak, strict=True)]
    return table.ids, centres


def _deepest(
    mask: npt.NDArray[np.bool_],
    annotated: npt.NDArray[np.bool_],
    box: tuple[slice, ...],
    shape: tuple[int, ...],
) -> tuple[int, ...]:
    """First voxel farthest from the outside, within the box; unannotated outer faces are open."""
    padded = np.pad(mask, 1)
    inner = slice(1, -1)
    for axis in range(3):
        for side, at_face in ((0, box[axis].start == 0), (-1, box[axis].stop == shape[axis])):
            if at_face:
                open_here = np.take(mask & ~annotated, side, axis=axis)
                face = tuple(side if a == axis else inner for a in range(3))
                padded[face] |= open_here
    depth = ndimage.distance_transform_edt(padded)[inner, inner, inner]
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(depth)), mask.shape))
