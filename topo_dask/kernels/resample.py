"""Tiles under a transform: which part a box of the output needs, and that part blended into it.

Three spatial axes; images have a first axis of length 1. A matrix is 4 x 4 and homogeneous, in
voxels. Samples agree with `scipy.ndimage.affine_transform` on the whole tile in its mode
"constant": a tile reaches from the centre of its first voxel to that of its last one.

Cubic splines (order 3) need the spline coefficients of the tile, a recursive filter over the whole
of it. It is run in windows of fixed edges with `MARGIN` voxels around them. The filter forgets
0.268 a voxel, so what is cut off is below float64 rounding; and because the windows are the
tile's, never the block's, the answer does not depend on the blocks. Tiles shorter than two windows
are filtered whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from topo_dask.kernels.jit import compiled

Matrix = npt.NDArray[np.float64]
Lengths = tuple[int, ...]
Box = tuple[Lengths, Lengths]
"""First voxel and the one after the last, of each axis."""

ORDERS = (0, 1, 3)
BLENDS = ("cosine", "mean", "max", "first")
"""How tiles that cover the same voxel become one value; the position is the kernel's number."""

EDGE = 1e-9
"""Voxels by which a sample may lie outside the tile and still count: rounding."""

MARGIN = 32
WINDOW = {2: 1024, 3: 96}
"""Shortest window of the spline filter, by number of axes that are longer than 1."""


def box_corners(box: Box) -> npt.NDArray[np.float64]:
    """Centres of the eight corner voxels of a box, homogeneous: ``[8, 4]``.

    Examples
    --------
    >>> box_corners(((0, 0, 0), (1, 1, 3)))[:2].tolist()
    [[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 2.0, 1.0]]
    """
    ends = [(a, b - 1) for a, b in zip(*box, strict=True)]
    return np.array([(*corner, 1) for corner in itertools.product(*ends)], dtype=np.float64)


def needed_part(box: Box, inverse: Matrix, lengths: Lengths, *, order: int) -> Box | None:
    """The voxels of a tile that samples at all voxels of an output box may touch.

    Parameters
    ----------
    box
        Voxels of the output.
    inverse
        Output voxels to tile voxels.
    lengths
        Shape of the tile.
    order
        0, 1 or 3.

    Returns
    -------
    A box in the tile, or ``None`` where none is touched.

    Examples
    --------
    >>> shift = np.eye(4)
    >>> shift[2, 3] = -10
    >>> needed_part(((0, 0, 8), (1, 1, 13)), shift, (1, 1, 20), order=0)
    ((0, 0, 0), (1, 1, 4))
    """
    corners = box_corners(box) @ inverse.T
    if (corners[:, 3] <= 0).any():  # the box reaches past the horizon of a projective transform
        return (0,) * len(lengths), lengths
    positions = corners[:, :3] / corners[:, 3:]
    low, high = positions.min(axis=0), positions.max(axis=0)
    last = np.array(lengths) - 1.0
    # Twice: the corners are rounded too, differently from the samples.
    if (high < -2 * EDGE).any() or (low > last + 2 * EDGE).any():
        return None
    # At the last voxel a spline mirrors to two voxels before it.
    before, after = (2, 2) if order == 3 else (0, 1)
    first = np.floor(np.clip(low - 2 * EDGE, 0, last)).astype(np.int64) - before
    stop = np.floor(np.clip(high + 2 * EDGE, 0, last)).astype(np.int64) + after + 1
    return (
        tuple(np.maximum(first, 0).tolist()),
        tuple(np.minimum(stop, lengths).tolist()),
    )


def _window_edges(length: int, window: int) -> npt.NDArray[np.int64]:
    count = max(1, length // window)
    return np.arange(count + 1) * length // count


def windows(part: Box, lengths: Lengths) -> Iterator[tuple[Box, Box]]:
    """Windows of a tile that a part of it touches, without and with their margins."""
    size = WINDOW[3 if min(lengths) > 1 else 2]
    along = []
    for a, b, n in zip(*part, lengths, strict=True):
        edges = _window_edges(n, size)
        first = int(np.searchsorted(edges, a, side="right")) - 1
        stop = int(np.searchsorted(edges, b, side="left"))
        along.append([(int(edges[k]), int(edges[k + 1])) for k in range(first, stop)])
    for pairs in itertools.product(*along):
        wide = [
            (max(0, a - MARGIN), min(n, b + MARGIN))
            for (a, b), n in zip(pairs, lengths, strict=True)
        ]
        yield (
            (tuple(a for a, _ in pairs), tuple(b for _, b in pairs)),
            (tuple(a for a, _ in wide), tuple(b for _, b in wide)),
        )


def part_to_read(part: Box, lengths: Lengths, *, order: int) -> Box:
    """The voxels of a tile that must be read for a part of it: more for cubic splines only.

    Examples
    --------
    >>> part_to_read(((0, 0, 10), (1, 5, 20)), (1, 64, 64), order=1)
    ((0, 0, 10), (1, 5, 20))
    >>> part_to_read(((0, 0, 10), (1, 5, 20)), (1, 64, 64), order=3)
    ((0, 0, 0), (1, 64, 64))
    """
    if order != 3:
        return part
    wide = [box for _, box in windows(part, lengths)]
    return (
        tuple(np.min([a for a, _ in wide], axis=0).tolist()),
        tuple(np.max([b for _, b in wide], axis=0).tolist()),
    )


def inside(box: Box, start: Lengths) -> tuple[slice, ...]:
    """Where a box lies in an array ``[C, z, y, x]`` whose first voxel is ``start``."""
    pairs = zip(*box, start, strict=True)
    return (slice(None), *(slice(a - s, b - s) for a, b, s in pairs))


def spline_coefficients(
    values: npt.NDArray[Any], *, start: Lengths, part: Box, lengths: Lengths
) -> npt.NDArray[np.float64]:
    """Cubic spline coefficients of a part of a tile, from what `part_to_read` says.

    Parameters
    ----------
    values
        ``[C, z, y, x]``, what was read.
    start
        The first voxel that was read.
    part
        What is wanted.
    lengths
        Shape of the tile.

    Returns
    -------
    float64 ``[C, *part]``: to 1e-15 of the values those of the whole tile, mirrored at its faces.

    Examples
    --------
    >>> tile = np.arange(6.0).reshape(1, 1, 1, 6)
    >>> part = ((0, 0, 2), (1, 1, 4))
    >>> spline_coefficients(tile, start=(0, 0, 0), part=part, lengths=(1, 1, 6)).round(2)
    array([[[[1.95, 3.05]]]])
    """
    shape = tuple(b - a for a, b in zip(*part, strict=True))
    out = np.empty((len(values), *shape))
    for window, wide in windows(part, lengths):
        common: Box = (
            tuple(map(max, window[0], part[0])),
            tuple(map(min, window[1], part[1])),
        )
        cut = inside(common, wide[0])
        for channel, piece in enumerate(values[inside(wide, start)]):
            found = ndimage.spline_filter(piece.astype(np.float64), order=3, mode="mirror")
            out[channel][inside(common, part[0])[1:]] = found[cut[1:]]
    return out


@compiled
def _positions(c: Any, m: Any, row: Any, lengths: Any) -> None:
    """Where a row of the output lies in the tile, ``c[axis, k]``; -1 outside."""
    z, y, x0 = row
    b0 = m[0, 0] * z + m[0, 1] * y + m[0, 3]
    b1 = m[1, 0] * z + m[1, 1] * y + m[1, 3]
    b2 = m[2, 0] * z + m[2, 1] * y + m[2, 3]
    b3 = m[3, 0] * z + m[3, 1] * y + m[3, 3]
    s0, s1, s2, s3 = m[0, 2], m[1, 2], m[2, 2], m[3, 2]
    last0, last1, last2 = lengths[0] - 1.0, lengths[1] - 1.0, lengths[2] - 1.0
    for k in range(c.shape[1]):
        x = np.float64(x0 + k)
        w = b3 + s3 * x  # 1 for affine transforms
        c0, c1, c2 = (b0 + s0 * x) / w, (b1 + s1 * x) / w, (b2 + s2 * x) / w
        inside = (
            (w > 0.0)
            & (c0 >= -EDGE)
            & (c0 <= last0 + EDGE)
            & (c1 >= -EDGE)
            & (c1 <= last1 + EDGE)
            & (c2 >= -EDGE)
            & (c2 <= last2 + EDGE)
        )
        c[0, k] = min(max(c0, 0.0), last0) if inside else -1.0
        c[1, k] = min(max(c1, 0.0), last1)
        c[2, k] = min(max(c2, 0.0), last2)


@compiled
def _nearest(v: Any, part: Any, c: Any, start: Any) -> None:
    for k in range(c.shape[1]):
        if c[0, k] >= 0.0:
            z = int(c[0, k] + 0.5) - start[0]
            y = int(c[1, k] + 0.5) - start[1]
            x = int(c[2, k] + 0.5) - start[2]
            for channel in range(len(v)):
                v[channel, k] = part[channel, z, y, x]


@compiled
def _linear(v: Any, part: Any, c: Any, start: Any) -> None:
    channels, nz, ny, nx = part.shape
    flat = part.ravel()
    deep = nz > 1
    for k in range(c.shape[1]):
        if c[0, k] < 0.0:
            continue
        iz, iy, ix = int(c[0, k]), int(c[1, k]), int(c[2, k])
        fz, fy, fx = c[0, k] - iz, c[1, k] - iy, c[2, k] - ix
        iz, iy, ix = iz - start[0], iy - start[1], ix - start[2]
        # The last voxel has no next one, and needs none.
        right = np.int64(ix + 1 < nx)
        down = nx * np.int64(iy + 1 < ny)
        at = (iz * ny + iy) * nx + ix
        for channel in range(channels):
            a, b = np.float64(flat[at]), np.float64(flat[at + right])
            low = a + fx * (b - a)
            a, b = np.float64(flat[at + down]), np.float64(flat[at + down + right])
            value = low + fy * (a + fx * (b - a) - low)
            if deep and fz > 0.0:
                under = at + ny * nx
                a, b = np.float64(flat[under]), np.float64(flat[under + right])
                low = a + fx * (b - a)
                a, b = np.float64(flat[under + down]), np.float64(flat[under + down + right])
                value += fz * (low + fy * (a + fx * (b - a) - low) - value)
            v[channel, k] = value
            at += nz * ny * nx


@compiled
def _splines(w: Any, index: Any, position: Any, length: Any, start: Any) -> Any:
    """Weights and places of the (up to) four voxels around a position; gives how many."""
    i = int(position)
    f = position - i
    if length == 1:
        w[0], index[0] = 1.0, -start
        return 1
    g = 1.0 - f
    w[0] = g * g * g / 6.0
    w[1] = (4.0 - 6.0 * f * f + 3.0 * f * f * f) / 6.0
    w[2] = (4.0 - 6.0 * g * g + 3.0 * g * g * g) / 6.0
    w[3] = f * f * f / 6.0
    for k in range(4):
        # Mirrored at the faces; what is still outside then has the weight 0.
        j = abs(i + k - 1)
        j = 2 * (length - 1) - j if j > length - 1 else j
        index[k] = max(0, j) - start
    return 4


@compiled
def _cubic(v: Any, part: Any, c: Any, start: Any, lengths: Any) -> None:
    w = np.zeros((3, 4))
    index = np.zeros((3, 4), dtype=np.int64)
    for k in range(c.shape[1]):
        if c[0, k] < 0.0:
            continue
        nz = _splines(w[0], index[0], c[0, k], lengths[0], start[0])
        ny = _splines(w[1], index[1], c[1, k], lengths[1], start[1])
        nx = _splines(w[2], index[2], c[2, k], lengths[2], start[2])
        for channel in range(len(v)):
            total = 0.0
            for z in range(nz):
                for y in range(ny):
                    along = 0.0
                    for x in range(nx):
                        along += w[2, x] * part[channel, index[0, z], index[1, y], index[2, x]]
                    total += w[0, z] * w[1, y] * along
            v[channel, k] = total


@compiled
def _turn(v: Any, forward: Any, c: Any, row: Any) -> None:
    """Turn vectors of the tile by the transform's derivative where each is, in place."""
    axes = len(v)
    skip = 3 - axes
    old = np.zeros(axes, dtype=v.dtype)
    here = np.zeros(3)
    for k in range(c.shape[1]):
        here[0], here[1], here[2] = row[0], row[1], row[2] + k
        scale = forward[3, 3]
        for j in range(3):
            scale += forward[3, j] * c[j, k]
        for j in range(axes):
            old[j] = v[j, k]
        for i in range(axes):
            total = 0.0
            for j in range(axes):
                slope = forward[i + skip, j + skip] - here[i + skip] * forward[3, j + skip]
                total += slope * old[j]
            v[i, k] = total / scale


@compiled
def _weigh(row: Any, c: Any, tables: Any, lengths: Any) -> None:
    """Weight of each position: along each axis linear between the voxels, multiplied."""
    for k in range(c.shape[1]):
        row[k] = 0.0
        if c[0, k] >= 0.0:
            weight = 1.0
            for axis in range(3):
                i = int(c[axis, k])
                a = tables[axis, i]
                weight *= a + (c[axis, k] - i) * (tables[axis, min(i + 1, lengths[axis] - 1)] - a)
            row[k] = weight


@compiled
def _blend(total: Any, mass: Any, v: Any, weight: Any, blend: Any) -> None:
    """Blend a row of values into a row of the block."""
    for k in range(len(weight)):
        if weight[k] <= 0.0:
            continue
        if blend < 2:
            for channel in range(len(v)):
                total[channel, k] += weight[k] * v[channel, k]
            mass[k] += weight[k]
        else:
            for channel in range(len(v)):
                if mass[k] == 0.0 or (blend == 2 and v[channel, k] > total[channel, k]):
                    total[channel, k] = v[channel, k]
            mass[k] = 1.0


@compiled
def accumulate(
    total: Any, weights: Any, part: Any, maps: Any, place: Any, tables: Any, modes: Any
) -> None:
    """Blend a part of a tile into a block of the output, in place.

    Parameters
    ----------
    total
        ``[C, z, y, x]``, the block: sums of values times weights, or the values.
    weights
        ``[z, y, x]``: sums of weights, 0 where no tile was yet.
    part
        ``[C, z, y, x]``: voxels of the tile, their spline coefficients for order 3.
    maps
        float64 ``[2, 4, 4]``: output voxels to tile voxels, and back.
    place
        int64 ``[5, 3]``: first voxel of the block; first voxel, and the one after the last, of
        the output box to fill; first voxel of the part; shape of the tile.
    tables
        float64 ``[3, longest]``: the tile's weight along each axis.
    modes
        int64 ``[3]``: order; position of the blend in `BLENDS`; 1 to turn vectors.
    """
    order, blend, vector = modes
    low, high, start, lengths = place[1], place[2], place[3], place[4]
    width = high[2] - low[2]
    a = low[2] - place[0, 2]
    c = np.zeros((3, width))
    v = np.zeros((len(total), width), dtype=total.dtype)
    row_weight = np.zeros(width)
    for z in range(low[0], high[0]):
        for y in range(low[1], high[1]):
            row = (z, y, low[2])
            _positions(c, maps[0], row, lengths)
            if order == 0:
                _nearest(v, part, c, start)
            elif order == 1:
                _linear(v, part, c, start)
            else:
                _cubic(v, part, c, start, lengths)
            if vector == 1:
                _turn(v, maps[1], c, row)
            if blend == 0:
                _weigh(row_weight, c, tables, lengths)
            else:
                for k in range(width):
                    row_weight[k] = 1.0 if c[0, k] >= 0.0 else 0.0
            oz, oy = z - place[0, 0], y - place[0, 1]
            _blend(
                total[:, oz, oy, a : a + width],
                weights[oz, oy, a : a + width],
                v,
                row_weight,
                blend,
            )
