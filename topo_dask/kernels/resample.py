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

EDGE = 1e-6
"""Voxels by which a sample may lie outside the tile and still count: rounding of transforms."""

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


def _windows(part: Box, lengths: Lengths) -> Iterator[tuple[Box, Box]]:
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
    wide = [box for _, box in _windows(part, lengths)]
    return (
        tuple(np.min([a for a, _ in wide], axis=0).tolist()),
        tuple(np.max([b for _, b in wide], axis=0).tolist()),
    )


def _inside(box: Box, start: Lengths) -> tuple[slice, ...]:
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
    for window, wide in _windows(part, lengths):
        common: Box = (
            tuple(map(max, window[0], part[0])),
            tuple(map(min, window[1], part[1])),
        )
        cut = _inside(common, wide[0])
        for channel, piece in enumerate(values[_inside(wide, start)]):
            found = ndimage.spline_filter(piece.astype(np.float64), order=3, mode="mirror")
            out[channel][_inside(common, part[0])[1:]] = found[cut[1:]]
    return out


@compiled
def _plane(part: Any, c: Any, at: Any, up: Any, f: Any) -> Any:
    z, y, x = at
    _, y1, x1 = up
    a, b = np.float64(part[c, z, y, x]), np.float64(part[c, z, y, x1])
    low = a + f[2] * (b - a)
    if f[1] == 0.0:
        return low
    a, b = np.float64(part[c, z, y1, x]), np.float64(part[c, z, y1, x1])
    return low + f[1] * (a + f[2] * (b - a) - low)


@compiled
def _linear(part: Any, c: Any, at: Any, up: Any, f: Any) -> Any:
    low = _plane(part, c, at, up, f)
    if f[0] == 0.0:
        return low
    return low + f[0] * (_plane(part, c, (up[0], at[1], at[2]), up, f) - low)


@compiled
def _mirrored(i: Any, n: Any) -> Any:
    if i < 0:
        i = -i
    if i > n - 1:
        i = 2 * (n - 1) - i
    # A tile of one or two voxels: what is still outside has the weight 0, or is voxel 0.
    return max(0, min(i, n - 1))


@compiled
def _spline(k: Any, f: Any) -> Any:
    if k == 0:
        return (1.0 - f) * (1.0 - f) * (1.0 - f) / 6.0
    if k == 1:
        return (4.0 - 6.0 * f * f + 3.0 * f * f * f) / 6.0
    if k == 2:
        g = 1.0 - f
        return (4.0 - 6.0 * g * g + 3.0 * g * g * g) / 6.0
    return f * f * f / 6.0


@compiled
def _cubic(part: Any, c: Any, i: Any, f: Any, lengths: Any, start: Any) -> Any:
    total = 0.0
    for kz in range(4 if lengths[0] > 1 else 1):
        wz = _spline(kz, f[0]) if lengths[0] > 1 else 1.0
        z = _mirrored(i[0] + kz - 1, lengths[0]) - start[0]
        for ky in range(4 if lengths[1] > 1 else 1):
            wy = _spline(ky, f[1]) if lengths[1] > 1 else 1.0
            y = _mirrored(i[1] + ky - 1, lengths[1]) - start[1]
            along = 0.0
            for kx in range(4 if lengths[2] > 1 else 1):
                wx = _spline(kx, f[2]) if lengths[2] > 1 else 1.0
                x = _mirrored(i[2] + kx - 1, lengths[2]) - start[2]
                along += wx * part[c, z, y, x]
            total += wz * wy * along
    return total


@compiled
def _turn(v: Any, forward: Any, at: Any, position: Any) -> None:
    """Turn a vector of the tile by the transform's derivative there, in place."""
    axes = len(v)
    skip = 3 - axes
    scale = forward[3, 3]
    for j in range(3):
        scale += forward[3, j] * at[j]
    old = v.copy()
    for i in range(axes):
        total = 0.0
        for j in range(axes):
            slope = forward[i + skip, j + skip] - position[i + skip] * forward[3, j + skip]
            total += slope * old[j]
        v[i] = total / scale


@compiled
def _axis_weight(tables: Any, axis: Any, i: Any, up: Any, f: Any) -> Any:
    return tables[axis, i] + f * (tables[axis, up] - tables[axis, i])


@compiled
def _sample(v: Any, part: Any, i: Any, f: Any, lengths: Any, start: Any, order: Any) -> None:
    z, y, x = i[0] - start[0], i[1] - start[1], i[2] - start[2]
    if order == 0:
        z, y, x = z + int(f[0] >= 0.5), y + int(f[1] >= 0.5), x + int(f[2] >= 0.5)
        for c in range(len(v)):
            v[c] = part[c, z, y, x]
    elif order == 1:
        up = (
            min(i[0] + 1, lengths[0] - 1) - start[0],
            min(i[1] + 1, lengths[1] - 1) - start[1],
            min(i[2] + 1, lengths[2] - 1) - start[2],
        )
        for c in range(len(v)):
            v[c] = _linear(part, c, (z, y, x), up, f)
    else:
        for c in range(len(v)):
            v[c] = _cubic(part, c, i, f, lengths, start)


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
    m, forward = maps
    projective = m[3, 0] != 0.0 or m[3, 1] != 0.0 or m[3, 2] != 0.0 or m[3, 3] != 1.0
    lengths = (place[4, 0], place[4, 1], place[4, 2])
    start = (place[3, 0], place[3, 1], place[3, 2])
    v = np.zeros(len(total), dtype=total.dtype)
    for z in range(place[1, 0], place[2, 0]):
        for y in range(place[1, 1], place[2, 1]):
            b0 = m[0, 0] * z + m[0, 1] * y + m[0, 3]
            b1 = m[1, 0] * z + m[1, 1] * y + m[1, 3]
            b2 = m[2, 0] * z + m[2, 1] * y + m[2, 3]
            b3 = m[3, 0] * z + m[3, 1] * y + m[3, 3]
            for x in range(place[1, 2], place[2, 2]):
                c0, c1, c2 = b0 + m[0, 2] * x, b1 + m[1, 2] * x, b2 + m[2, 2] * x
                if projective:
                    w = b3 + m[3, 2] * x
                    if not w > 0.0:
                        continue
                    c0, c1, c2 = c0 / w, c1 / w, c2 / w
                if (
                    not (c0 >= -EDGE and c0 <= lengths[0] - 1 + EDGE)
                    or not (c1 >= -EDGE and c1 <= lengths[1] - 1 + EDGE)
                    or not (c2 >= -EDGE and c2 <= lengths[2] - 1 + EDGE)
                ):
                    continue
                oz, oy, ox = z - place[0, 0], y - place[0, 1], x - place[0, 2]
                covered = weights[oz, oy, ox] > 0.0
                if blend == 3 and covered:
                    continue
                c0 = min(max(c0, 0.0), lengths[0] - 1.0)
                c1 = min(max(c1, 0.0), lengths[1] - 1.0)
                c2 = min(max(c2, 0.0), lengths[2] - 1.0)
                i = (int(c0), int(c1), int(c2))
                f = (c0 - i[0], c1 - i[1], c2 - i[2])
                _sample(v, part, i, f, lengths, start, order)
                if vector == 1:
                    _turn(v, forward, (c0, c1, c2), (z, y, x))
                if blend >= 2:
                    for c in range(len(v)):
                        if not covered or v[c] > total[c, oz, oy, ox]:
                            total[c, oz, oy, ox] = v[c]
                    weights[oz, oy, ox] = 1.0
                    continue
                weight = 1.0
                if blend == 0:
                    weight = _axis_weight(tables, 0, i[0], min(i[0] + 1, lengths[0] - 1), f[0])
                    weight *= _axis_weight(tables, 1, i[1], min(i[1] + 1, lengths[1] - 1), f[1])
                    weight *= _axis_weight(tables, 2, i[2], min(i[2] + 1, lengths[2] - 1), f[2])
                for c in range(len(v)):
                    total[c, oz, oy, ox] += weight * v[c]
                weights[oz, oy, ox] += weight
