"""Blend weights of overlapping tiles."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Tapers = tuple[tuple[int, int], ...]


def axis_weight(length: int, taper: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Weight along one axis: 1, and sin^2(pi/2 * (i + 1/2) / o) in the o voxels next to a face.

    Two tiles that overlap by o sum to 1 there: sin^2 and cos^2. Never 0.

    Examples
    --------
    >>> axis_weight(4, (0, 2)).round(3)
    array([1.   , 1.   , 0.854, 0.146])
    """
    weight = np.ones(length)
    for width, toward in ((taper[0], weight), (taper[1], weight[::-1])):
        reach = min(width, length)
        toward[:reach] *= np.sin(0.5 * np.pi * (np.arange(reach) + 0.5) / max(width, 1)) ** 2
    return weight


def blend_weight(shape: tuple[int, ...], *, tapers: Tapers) -> npt.NDArray[np.float32]:
    """Cosine blend weight of a tile: the product over its axes of `axis_weight`.

    Parameters
    ----------
    shape
        Shape of the tile.
    tapers
        Width of the overlap at the low and the high face of each axis; 0 for no taper.

    Returns
    -------
    float32 of that shape, in (0, 1]. On a regular grid the weights of all tiles sum to 1.

    Examples
    --------
    >>> blend_weight((1, 2), tapers=((0, 0), (0, 2))).round(3)
    array([[0.854, 0.146]], dtype=float32)
    """
    weight = np.ones(shape)
    for axis, (length, taper) in enumerate(zip(shape, tapers, strict=True)):
        along = axis_weight(length, taper)
        weight *= along.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return weight.astype(np.float32)
