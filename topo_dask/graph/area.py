"""Which tiles touch an area of interest: a mask at any scale, boxes, or a polygon.

Everything is worked out on the grid of tiles, axis by axis, never tile by tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.errors import InvalidArgument, InvalidType
from topo_dask.grid import Region

Starts = tuple[npt.NDArray[np.int64], ...]
Selected = npt.NDArray[np.bool_]


def range_counts(
    mask: npt.NDArray[Any], low: Sequence[npt.NDArray[Any]], high: Sequence[npt.NDArray[Any]]
) -> npt.NDArray[np.int64]:
    """How many entries of a mask are set in each box of a grid of boxes.

    Parameters
    ----------
    mask
        Any number of axes.
    low, high
        For each axis where the boxes begin and end (half open).

    Examples
    --------
    >>> range_counts(np.array([True, False, True]), [np.array([0, 1])], [np.array([2, 3])])
    array([1, 1])
    """
    counts = np.asarray(mask).astype(np.int64)
    for axis, (a, b) in enumerate(zip(low, high, strict=True)):
        first = np.zeros_like(counts.take([0], axis=axis))
        sums = np.concatenate([first, counts.cumsum(axis=axis)], axis=axis)
        counts = sums.take(b, axis=axis) - sums.take(a, axis=axis)
    return counts


def touching_mask(
    mask: Any, starts: Starts, stops: Starts, scale: Sequence[tuple[int, int]]
) -> Selected:
    """Tiles with a set entry of a mask in them.

    Parameters
    ----------
    mask
        NumPy or zarr array, read a slab at a time; an entry counts if it is not 0.
    starts, stops
        Of the tiles along each axis.
    scale
        For each axis (entries, voxels): voxel v lies in entry ``v * entries // voxels``.

    Examples
    --------
    >>> tiles = (np.array([0, 3]),), (np.array([4, 7]),)
    >>> touching_mask(np.array([0, 0, 0, 1]), *tiles, scale=[(4, 8)])
    array([False,  True])
    """
    low = [a * m // n for a, (m, n) in zip(starts, scale, strict=True)]
    high = [(b - 1) * m // n + 1 for b, (m, n) in zip(stops, scale, strict=True)]
    found = np.zeros(tuple(map(len, starts)), dtype=bool)
    for row, (a, b) in enumerate(zip(low[0].tolist(), high[0].tolist(), strict=True)):
        flat = (np.asarray(mask[a:b]) != 0).any(axis=0)
        if flat.ndim == 0:
            found[row] = flat
        elif flat.any():
            found[row] = range_counts(flat, low[1:], high[1:]) > 0
    return found


def check_mask(mask: Any, shape: Sequence[int]) -> list[tuple[int, int]]:
    """The scale of a mask of interest, see `touching_mask`.

    Raises
    ------
    InvalidArgument
        Wrong number of axes, an empty mask, or one finer than the image.
    """
    if len(mask.shape) != len(shape) or 0 in mask.shape:
        raise InvalidArgument(
            "mask",
            f"shape {tuple(mask.shape)}",
            f"{len(shape)} axes like the image's {tuple(shape)}, at any scale",
        )
    if any(m > n for m, n in zip(mask.shape, shape, strict=True)):
        raise InvalidArgument(
            "mask", f"shape {tuple(mask.shape)}", f"at most the image's shape {tuple(shape)}"
        )
    return [(int(m), int(n)) for m, n in zip(mask.shape, shape, strict=True)]


def _limits(box: Any, shape: Sequence[int], number: int) -> tuple[list[int], list[int]]:
    axes = len(shape)
    if isinstance(box, Region):
        return list(box.start), list(box.stop)
    entries = list(box) if isinstance(box, Sequence) else []
    if len(entries) == axes and all(isinstance(s, slice) for s in entries):
        limits = [s.indices(n)[:2] for s, n in zip(entries, shape, strict=True)]
        return [a for a, _ in limits], [b for _, b in limits]
    pair = np.asarray(box)
    if pair.shape != (2, axes) or pair.dtype.kind not in "iu":
        raise InvalidArgument(
            "boxes",
            f"{box!r} as box {number}",
            f"(first voxel, end) with {axes} whole numbers each, a Region, or a tuple of slices",
        )
    return pair[0].tolist(), pair[1].tolist()


def touching_boxes(boxes: Any, starts: Starts, stops: Starts, shape: Sequence[int]) -> Selected:
    """Tiles that share voxels with one of several boxes.

    Examples
    --------
    >>> tiles = (np.array([0, 3, 6]),), (np.array([4, 7, 10]),)
    >>> touching_boxes([((5,), (6,))], *tiles, shape=(10,))
    array([False,  True, False])
    """
    if not isinstance(boxes, (Sequence, np.ndarray)) or isinstance(boxes, str):
        raise InvalidType("boxes", type(boxes).__name__, "a list of boxes")
    found = np.zeros(tuple(map(len, starts)), dtype=bool)
    for number, box in enumerate(boxes):
        low, high = _limits(box, shape, number)
        if any(a >= b for a, b in zip(low, high, strict=True)):
            raise InvalidArgument("boxes", f"{box!r} as box {number}", "boxes that hold voxels")
        along = [
            slice(int(np.searchsorted(e, a, side="right")), int(np.searchsorted(s, b, side="left")))
            for a, b, s, e in zip(low, high, starts, stops, strict=True)
        ]
        found[tuple(along)] = True
    return found


def touching_polygon(polygon: Any, starts: Starts, stops: Starts) -> Selected:
    """Tiles that share area with a polygon in the plane of the last two axes.

    Parameters
    ----------
    polygon
        Corners ``[N,2]`` as (y, x), in voxels: voxel i reaches from i to i + 1. What is inside is
        decided by the even-odd rule.
    starts, stops
        Of the tiles along each axis; before the last two axes the polygon holds everywhere.

    Examples
    --------
    >>> tiles = (np.array([0, 4]), np.array([0, 4])), (np.array([4, 8]), np.array([4, 8]))
    >>> touching_polygon([(5, 5), (5, 7), (7, 6)], *tiles)
    array([[False, False],
           [False,  True]])
    """
    corners = np.asarray(polygon, dtype=np.float64)
    if corners.ndim != 2 or corners.shape[1] != 2 or len(corners) < 3:
        raise InvalidArgument(
            "polygon", f"shape {corners.shape}", "at least 3 corners as pairs (y, x)"
        )
    if not np.isfinite(corners).all():
        raise InvalidArgument("polygon", "corners that are not finite", "finite numbers")
    (ys, xs), (ye, xe) = (tuple(c.astype(np.float64) for c in s[-2:]) for s in (starts, stops))
    following = np.roll(corners, -1, axis=0)
    # A corner of the tile inside the polygon: the crossings of its row to the left are odd.
    found = np.zeros((len(ys), len(xs)), dtype=bool)
    inner = ys + (ye - ys) / 2
    for row, y in enumerate(inner):
        up = (corners[:, 0] <= y) != (following[:, 0] <= y)
        (y0, x0), (y1, x1) = corners[up].T, following[up].T
        crossings = np.sort(x0 + (y - y0) / (y1 - y0) * (x1 - x0))
        found[row] = np.searchsorted(crossings, (xs + xe) / 2) % 2 == 1
    for (y0, x0), (y1, x1) in zip(corners, following, strict=True):
        for row in np.flatnonzero((ye > min(y0, y1)) & (ys < max(y0, y1))).tolist():
            # The part of the edge within the row of tiles, as a range of x.
            t = np.array([0.0, 1.0])
            if y0 != y1:
                t = np.clip(np.sort((np.array([ys[row], ye[row]]) - y0) / (y1 - y0)), 0, 1)
            left, right = np.sort(x0 + t * (x1 - x0))
            found[row] |= (xe > left) & (xs < right)
    return np.broadcast_to(found, tuple(map(len, starts))).copy()
