"""Overlapping tiles into one block: mean with separable weights, or one is kept.

Kept is the largest value, that of the nearest centre, or that of the highest weight. Arrays
have the axes channel, z, y, x; every tile is added in the caller's order, so that the result does
not depend on who computes which tile when. Means are computed in the type of their array: float64,
or float32 where that holds all values (of integers of 8 or 16 bits, and of float16).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.kernels.jit import compiled

FLOAT = npt.NDArray[Any]
INT = npt.NDArray[np.int64]


@compiled
def _move(mean: FLOAT, values: npt.NDArray[Any], share: FLOAT, count: int) -> None:
    """Move the first entries of a row towards the values by their share, and set the others."""
    mean[count:] = values[count:]
    of_mean = mean.dtype.type
    for x in range(count):
        value = of_mean(values[x])
        step = (value - mean[x]) * share[x]
        # An infinite value stays infinite, whichever tile comes first.
        mean[x] += step if abs(step) < np.inf else value


@compiled
def add_tile(
    mean: FLOAT, weights: FLOAT, values: npt.NDArray[Any], along: tuple[FLOAT, FLOAT, FLOAT]
) -> None:
    """Take a tile into the weighted mean, in place; where tiles agree it is exactly their value.

    Parameters
    ----------
    mean, weights
        ``[C,Z,Y,X]``, float32 or float64, and float64 ``[Z,Y,X]``: views of the block where the
        tile lies; 0 at first.
    values
        ``[C,Z,Y,X]``, any real type but float16.
    along
        The weights along z, y and x, > 0; the tile's is their product.

    Examples
    --------
    >>> mean, weights, one = np.zeros((1, 1, 1, 2)), np.zeros((1, 1, 2)), np.ones(1)
    >>> along = one, one, np.array([1, 0.5])
    >>> add_tile(mean, weights, np.full((1, 1, 1, 2), 3.0), along)
    >>> add_tile(mean, weights, np.full((1, 1, 1, 2), 1.0), along)
    >>> mean.ravel(), weights.ravel()
    (array([2., 2.]), array([2., 1.]))
    """
    channels, depth, height, width = values.shape
    wz, wy, wx = along
    share = np.empty(width, mean.dtype)
    for z in range(depth):
        for y in range(height):
            row, sums = wz[z] * wy[y], weights[z, y]
            for x in range(width):
                weight = row * wx[x]
                sums[x] += weight
                share[x] = weight / sums[x]
            for c in range(channels):
                _move(mean[c, z, y], values[c, z, y], share, width)


@compiled
def add_next_tile(
    mean: FLOAT,
    values: npt.NDArray[Any],
    along: tuple[FLOAT, FLOAT, FLOAT],
    before: tuple[FLOAT, FLOAT, FLOAT],
) -> None:
    """The same for the next tile of a full grid, whose weights along each axis sum to 1.

    What came before needs no array of weights then, and what nothing came before is overwritten.

    Parameters
    ----------
    mean, values, along
        See `add_tile`; ``mean`` may hold anything at first.
    before
        Along each axis, the sum of the weights of earlier tiles.

    Examples
    --------
    >>> mean, one, none = np.full((1, 1, 1, 3), 9.0), np.ones(1), np.zeros(1)
    >>> first, second = np.array([1, 0.5]), np.array([0.5, 1])
    >>> values = np.full((1, 1, 1, 2), 3.0)
    >>> add_next_tile(mean[..., :2], values, (one, one, first), (none, none, np.zeros(2)))
    >>> sums = none, none, np.array([0.5, 0])
    >>> add_next_tile(mean[..., 1:], values - 2, (one, one, second), sums)
    >>> mean.ravel()
    array([3., 2., 1.])
    """
    channels, depth, height, width = values.shape
    (wz, wy, wx), (bz, by, bx) = along, before
    share, first, reached = np.empty(width, mean.dtype), np.empty(width, mean.dtype), 0
    for x in range(width):
        first[x] = wx[x] / (bx[x] + wx[x])
        if bx[x] > 0:
            reached = x + 1
    for z in range(depth):
        for y in range(height):
            row, base = wz[z] * wy[y], bz[z] + wz[z] * by[y]
            if base > 0:
                for x in range(width):
                    share[x] = row * wx[x] / (base + row * (bx[x] + wx[x]))
            for c in range(channels):
                if base > 0:
                    _move(mean[c, z, y], values[c, z, y], share, width)
                else:
                    _move(mean[c, z, y], values[c, z, y], first, reached)


@compiled
def _round(values: FLOAT, out: npt.NDArray[Any]) -> None:
    for i in range(values.size):
        out[i] = np.rint(values[i])


def rounded(values: FLOAT, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Values as whole numbers, halves to the even one.

    Examples
    --------
    >>> rounded(np.array([[0.5, 1.5, 2.2]]), np.uint8)
    array([[0, 2, 2]], dtype=uint8)
    """
    out = np.empty(values.shape, dtype=dtype)
    _round(values.reshape(-1), out.reshape(-1))
    return out


@compiled
def keep_largest(best: npt.NDArray[Any], seen: npt.NDArray[np.bool_], values: Any) -> None:
    """Keep the larger of what is there and a tile's values, in place; ``seen`` is set.

    Examples
    --------
    >>> best, seen = np.zeros((1, 1, 1, 2), np.int8), np.array([[[True, False]]])
    >>> keep_largest(best, seen, np.full((1, 1, 1, 2), -3, np.int8))
    >>> best.ravel()
    array([ 0, -3], dtype=int8)
    """
    channels, depth, height, width = values.shape
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                for c in range(channels):
                    v = values[c, z, y, x]
                    # Not-a-number stays, in whichever order tiles come.
                    if not seen[z, y, x] or v > best[c, z, y, x] or v != v:
                        best[c, z, y, x] = v
                seen[z, y, x] = True


@compiled
def keep_nearest(
    best: npt.NDArray[Any], distance: INT, values: Any, along: tuple[INT, INT, INT]
) -> None:
    """Take a tile's values where it is strictly nearer than what is there, in place.

    Parameters
    ----------
    best, values
        ``[C,Z,Y,X]``.
    distance
        ``[Z,Y,X]``, of what is there.
    along
        The tile's distance is the sum of these along z, y and x.

    Examples
    --------
    >>> best, zero = np.zeros((1, 1, 1, 2), np.int8), np.zeros(1, np.int64)
    >>> distance = np.full((1, 1, 2), 4)
    >>> tile = np.full((1, 1, 1, 2), 7, np.int8)
    >>> keep_nearest(best, distance, tile, (zero, zero, np.array([4, 1])))
    >>> best.ravel(), distance.ravel()
    (array([0, 7], dtype=int8), array([4, 1]))
    """
    channels, depth, height, width = values.shape
    dz, dy, dx = along
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                d = dz[z] + dy[y] + dx[x]
                if d < distance[z, y, x]:
                    distance[z, y, x] = d
                    for c in range(channels):
                        best[c, z, y, x] = values[c, z, y, x]


@compiled
def keep_heaviest(
    best: npt.NDArray[Any], heaviest: FLOAT, values: Any, along: tuple[FLOAT, FLOAT, FLOAT]
) -> None:
    """Take a tile's values where its weight is strictly higher than what is there, in place.

    Parameters
    ----------
    best, values
        ``[C,Z,Y,X]``.
    heaviest
        float64 ``[Z,Y,X]``, the weights of what is there; 0 at first.
    along
        The weights along z, y and x, > 0; the tile's is their product.

    Examples
    --------
    >>> best, one = np.zeros((1, 1, 1, 2), np.uint64), np.ones(1)
    >>> heaviest = np.full((1, 1, 2), 0.5)
    >>> keep_heaviest(best, heaviest, best + np.uint64(7), (one, one, np.array([0.5, 0.75])))
    >>> best.ravel(), heaviest.ravel()
    (array([0, 7], dtype=uint64), array([0.5 , 0.75]))
    """
    channels, depth, height, width = values.shape
    wz, wy, wx = along
    for z in range(depth):
        for y in range(height):
            row = wz[z] * wy[y]
            for x in range(width):
                weight = row * wx[x]
                if weight > heaviest[z, y, x]:
                    heaviest[z, y, x] = weight
                    for c in range(channels):
                        best[c, z, y, x] = values[c, z, y, x]
