"""Overlapping tiles into one array: layouts, boundary-aware cosine weights, weighted sums."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.errors import InvalidArgument, InvalidType
from topo_dask.graph.check import check_array
from topo_dask.grid import Region, as_lengths
from topo_dask.kernels import cpu

Slices = tuple[slice, ...]
Tapers = tuple[tuple[int, int], ...]


def _shape(value: Any, argument: str) -> tuple[int, ...]:
    """The lengths of any number of axes, checked."""
    if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, str):
        raise InvalidType(argument, repr(value), "a tuple of whole numbers", "Pass a shape.")
    return as_lengths(value, argument=argument, axes=max(1, len(value)), least=1)


def _tile(slices: Any, shape: tuple[int, ...], *, argument: str) -> Region:
    """Where a tile lies in a volume, checked."""
    do = "Pass tiles as compute_subcrop_slices gives them."
    allowed = f"{len(shape)} slices with start and stop within the volume {shape}"
    try:
        limits = [(operator.index(s.start), operator.index(s.stop)) for s in slices]
    except (AttributeError, TypeError):
        raise InvalidType(argument, repr(slices), allowed, do) from None
    inside = all(0 <= a < b <= n for (a, b), n in zip(limits, shape, strict=False))
    if len(limits) != len(shape) or not inside or any(s.step not in (None, 1) for s in slices):
        raise InvalidArgument(argument, repr(slices), allowed, do)
    return Region(tuple(a for a, _ in limits), tuple(b for _, b in limits))


def compute_subcrop_slices(
    volume_shape: Sequence[int], crop_size: Any, overlap: Any
) -> list[Slices]:
    """Cut a volume into overlapping tiles; the last one of an axis is moved back to fit.

    Parameters
    ----------
    volume_shape
        Shape of the volume.
    crop_size
        Shape of a tile; a tile longer than an axis covers it.
    overlap
        Voxels that neighbouring tiles share, per axis, less than the tile.

    Returns
    -------
    list of tuples of slices, in C order. Every voxel is covered.

    Raises
    ------
    InvalidArgument, InvalidType
        The argument is named.

    Examples
    --------
    >>> compute_subcrop_slices((10,), (4,), (1,))
    [(slice(0, 4, None),), (slice(3, 7, None),), (slice(6, 10, None),)]
    """
    shape = _shape(volume_shape, "volume_shape")
    axes = len(shape)
    crop = as_lengths(crop_size, argument="crop_size", axes=axes, least=1)
    shared = as_lengths(overlap, argument="overlap", axes=axes, least=0)
    if any(o >= c for o, c in zip(shared, crop, strict=True)):
        raise InvalidArgument(
            "overlap", overlap, f"less than the tile, {crop}, along every axis", "Use larger tiles."
        )
    along = []
    for n, c, o in zip(shape, crop, shared, strict=True):
        length = min(c, n)
        starts = [*range(0, n - length, c - o), n - length]
        along.append([slice(a, a + length) for a in starts])
    return list(itertools.product(*along))


def build_spatial_mask(shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Mask of a tile whose faces are cuts: 1 inside, 0 on the outer faces.

    Examples
    --------
    >>> build_spatial_mask((1, 3, 4)).sum(), build_spatial_mask((3, 3, 4)).sum()
    (np.float32(0.0), np.float32(2.0))
    """
    mask = np.zeros(_shape(shape, "shape"), np.float32)
    mask[(slice(1, -1),) * mask.ndim] = 1
    return mask


def boundary_flags(slices: Slices, volume_shape: Sequence[int]) -> list[bool]:
    """Which faces of a tile are faces of the volume: z_lo, z_hi, y_lo, y_hi, x_lo, x_hi.

    Examples
    --------
    >>> boundary_flags((slice(0, 4), slice(2, 6)), (8, 6))
    [True, False, False, True]
    """
    shape = _shape(volume_shape, "volume_shape")
    _tile(slices, shape, argument="slices")
    pairs = zip(slices, shape, strict=True)
    return [flag for s, n in pairs for flag in (s.start == 0, s.stop == n)]


def cosine_blend_weight(
    shape: Sequence[int], at_volume_boundary: Sequence[bool] | None = None, overlap: Any = None
) -> npt.NDArray[np.float32]:
    """Weight of a tile: sin^2 tapers inwards from the faces it shares with neighbours.

    Parameters
    ----------
    shape
        Shape of the tile.
    at_volume_boundary
        A flag for each face (`boundary_flags`): True for no taper. ``None``: every face tapers.
    overlap
        Width of the tapers: a number, or one for each axis. ``None``: half the tile on each
        side, the whole tile where only one side tapers.

    Returns
    -------
    float32 of that shape, in (0, 1]. With the true overlap the weights of a regular grid of
    tiles sum to 1.

    Raises
    ------
    InvalidArgument, InvalidType
        The argument is named.

    Examples
    --------
    >>> cosine_blend_weight((4,), [True, False], overlap=2).round(3)
    array([1.   , 1.   , 0.854, 0.146], dtype=float32)
    """
    lengths = _shape(shape, "shape")
    axes = len(lengths)
    flags = [False] * (2 * axes) if at_volume_boundary is None else list(at_volume_boundary)
    if len(flags) != 2 * axes:
        allowed = f"{2 * axes} flags, two for each axis"
        do = "Pass what boundary_flags gives."
        raise InvalidArgument("at_volume_boundary", flags, allowed, do)
    widths = None
    if overlap is not None:
        widths = as_lengths(overlap, argument="overlap", axes=axes, least=0)
    tapers = []
    for axis, n in enumerate(lengths):
        low, high = (not flag for flag in flags[2 * axis : 2 * axis + 2])
        width = widths[axis] if widths is not None else (n // 2 if low and high else n)
        tapers.append((width if low else 0, width if high else 0))
    return cpu.blend_weight(lengths, tapers=tuple(tapers))


def tapers_of(tile: Region, others: Iterable[Region]) -> Tapers:
    """Width of a tile's overlap at each face: how far its neighbours there reach into it."""
    touching = [o for o in others if o != tile and o.intersect(tile).size]
    tapers = []
    for axis, (a, b) in enumerate(zip(tile.start, tile.stop, strict=True)):
        low = [o.stop[axis] - a for o in touching if o.start[axis] < a]
        high = [b - o.start[axis] for o in touching if o.stop[axis] > b]
        tapers.append((min(max(low, default=0), b - a), min(max(high, default=0), b - a)))
    return tuple(tapers)


def add_weighted(
    total: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
    target: Region,
    *,
    tile: Region,
    tapers: Tapers,
    values: npt.NDArray[Any],
) -> None:
    """Add the part of a tile that lies in a target region, times its weight.

    Parameters
    ----------
    total, weights
        ``[C, *target shape]`` and ``[*target shape]``, float64; added to in place.
    target, tile
        Regions of the volume.
    tapers
        Of the tile, see `tapers_of`.
    values
        ``[C, *tile shape]``.
    """
    common = tile.intersect(target)
    if common.size == 0:
        return
    inside, there = common.relative_to(tile.start).slices, common.relative_to(target.start).slices
    weight = cpu.blend_weight(tile.shape, tapers=tapers)[inside].astype(np.float64)
    total[(slice(None), *there)] += values[(slice(None), *inside)] * weight
    weights[there] += weight


def unit_vectors(flow: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Flow ``[3, ...]`` scaled to length 1 where it is not 0."""
    norm = np.sqrt((flow * flow).sum(axis=0))
    scaled: npt.NDArray[np.float32] = np.divide(
        flow, norm, out=np.zeros_like(flow), where=norm > 0
    ).astype(np.float32)
    return scaled


def _stitch(
    volume_shape: Any,
    subcrop_slices: Sequence[Slices],
    arrays: Sequence[Any],
    channels: int | None = None,
) -> npt.NDArray[np.float64]:
    shape = _shape(volume_shape, "volume_shape")
    tiles = [_tile(s, shape, argument="subcrop_slices") for s in subcrop_slices]
    if len(tiles) != len(arrays) or not tiles:
        allowed = f"one for each of {len(tiles)} tiles, and at least one"
        do = "Pass the arrays in the order of subcrop_slices."
        raise InvalidArgument("arrays", f"{len(arrays)} arrays", allowed, do)
    for number, (tile, array) in enumerate(zip(tiles, arrays, strict=True)):
        check_array(array, argument="arrays")
        first = arrays[0].shape[:1] if channels is None else (channels,)
        wanted = (*first, *tile.shape)
        if tuple(array.shape) != wanted:
            came = f"shape {tuple(array.shape)} for tile {number}, {tile}"
            do = "Pass the tiles as [C, ...], in the order of subcrop_slices."
            raise InvalidArgument("arrays", came, f"shape {wanted}", do)
        if array.dtype.kind not in "biuf":
            do = "Convert it, e.g. with .astype('float32')."
            raise InvalidType("arrays", f"dtype {array.dtype}", "real numbers", do)
    whole = Region((0,) * len(shape), shape)
    total = np.zeros((arrays[0].shape[0], *shape))
    weights = np.zeros(shape)
    for tile, array in zip(tiles, arrays, strict=True):
        tapers = tapers_of(tile, tiles)
        add_weighted(total, weights, whole, tile=tile, tapers=tapers, values=np.asarray(array))
    return np.divide(total, weights, out=total, where=weights > 0)


def stitch_volumes(
    volume_shape: Sequence[int], subcrop_slices: Sequence[Slices], arrays: Sequence[Any]
) -> npt.NDArray[np.float32]:
    """Blend overlapping tiles into one volume with cosine weights.

    Parameters
    ----------
    volume_shape
        Shape of the volume.
    subcrop_slices
        Where each tile lies, e.g. from `compute_subcrop_slices`; any layout.
    arrays
        The tiles ``[C, ...]``.

    Returns
    -------
    float32 ``[C, *volume_shape]``: the weighted mean, 0 where no tile lies. A constant comes
    back constant.

    Raises
    ------
    InvalidArgument
        Tiles and slices that do not fit.

    Examples
    --------
    >>> tiles = compute_subcrop_slices((6,), (4,), (2,))
    >>> stitch_volumes((6,), tiles, [np.ones((1, 4)), np.ones((1, 4))])
    array([[1., 1., 1., 1., 1., 1.]], dtype=float32)
    """
    return _stitch(volume_shape, subcrop_slices, arrays).astype(np.float32)


def stitch_flows(
    volume_shape: Sequence[int], subcrop_slices: Sequence[Slices], arrays: Sequence[Any]
) -> npt.NDArray[np.float32]:
    """Blend overlapping tiles of flow, then scale to length 1 where the sum is not 0.

    Parameters
    ----------
    volume_shape, subcrop_slices
        See `stitch_volumes`.
    arrays
        The tiles ``[3,Z,Y,X]``.

    Returns
    -------
    float32 ``[3, *volume_shape]``

    Raises
    ------
    InvalidArgument
        Tiles and slices that do not fit.

    Examples
    --------
    >>> tiles = compute_subcrop_slices((6,), (4,), (2,))
    >>> stitch_flows((6,), tiles, [np.full((3, 4), 0.5)] * 2)[0, 0].round(3)
    np.float32(0.577)
    """
    return unit_vectors(_stitch(volume_shape, subcrop_slices, arrays, channels=3))
