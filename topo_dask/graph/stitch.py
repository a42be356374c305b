"""Tiles of any layout stitched into one volume: blended, or, for labels, the heaviest wins.

NumPy tiles give a NumPy array, dask tiles a lazy dask array whose blocks read what they need.
Tiles are added in the order of their places, so the order in which they come does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.delayed import delayed

from topo_dask.config import BACKENDS, choice
from topo_dask.errors import InvalidArgument, InvalidType
from topo_dask.graph.blocks import Source, assemble
from topo_dask.graph.check import check_array, check_not_negative
from topo_dask.graph.fuse import Slices, Tapers, shape_of, tile_at, unit_vectors
from topo_dask.graph.parts import made_of_halves
from topo_dask.grid import BlockGrid, Region
from topo_dask.kernels.backends import Kernels, device_for, kernels_for
from topo_dask.kernels.cpu import compact
from topo_dask.kernels.cpu.blend import axis_weight

Array = npt.NDArray[Any]
Part = tuple[Region, Region, Tapers]
"""What of a tile lies in a block: that region, the tile, its tapers."""
Blend = Callable[[Kernels, Region, int | None, list[Part], list[Array]], Array]


@dataclass(frozen=True)
class _Tiles:
    """Checked tiles, in the order of their places."""

    shape: tuple[int, ...]
    regions: list[Region]
    arrays: list[Any]
    channels: int | None
    backend: str

    @property
    def lazy(self) -> bool:
        return any(isinstance(a, da.Array) for a in self.arrays)

    @property
    def leading(self) -> tuple[int, ...]:
        return () if self.channels is None else (self.channels,)

    def limits(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """First voxels and ends, ``[N, axes]`` each."""
        return (
            np.array([r.start for r in self.regions], dtype=np.int64),
            np.array([r.stop for r in self.regions], dtype=np.int64),
        )

    def tapers(self) -> list[Tapers]:
        """Width of each tile's overlap at each face: how far neighbours there reach into it."""
        starts, stops = self.limits()
        tapers = []
        for a, b in zip(starts, stops, strict=True):
            near = np.flatnonzero(((starts < b) & (stops > a)).all(axis=1))
            low = np.where(starts[near] < a, stops[near] - a, 0).max(axis=0, initial=0)
            high = np.where(stops[near] > b, b - starts[near], 0).max(axis=0, initial=0)
            widths = zip(np.minimum(low, b - a), np.minimum(high, b - a), strict=True)
            tapers.append(tuple((int(i), int(j)) for i, j in widths))
        return tapers


def _tiles(
    volume_shape: Any,
    subcrop_slices: Sequence[Any],
    arrays: Sequence[Any],
    *,
    kinds: str,
    leading: Sequence[tuple[int, ...] | None],
    backend: str,
) -> _Tiles:
    """Check tiles; ``leading`` are the allowed axes before the spatial ones, None for any one."""
    choice("backend", backend, BACKENDS)
    shape = shape_of(volume_shape, "volume_shape")
    if len(shape) > 3:
        do = "Stitch time points or classes one by one."
        raise InvalidArgument("volume_shape", f"{len(shape)} axes", "1 to 3 axes", do)
    regions = [tile_at(place, shape, argument="subcrop_slices") for place in subcrop_slices]
    if len(regions) != len(arrays) or not regions:
        allowed = f"one for each of {len(regions)} tiles, and at least one"
        do = "Pass the arrays in the order of subcrop_slices."
        raise InvalidArgument("arrays", f"{len(arrays)} arrays", allowed, do)
    expected: tuple[int, ...] | None = None
    for number, (region, array) in enumerate(zip(regions, arrays, strict=True)):
        check_array(array, argument="arrays")
        before = tuple(array.shape[: len(array.shape) - len(shape)])
        free = None in leading and len(before) == 1 and before[0] > 0
        if expected is None and (free or before in leading):
            expected = before
        if expected is None or (*expected, *region.shape) != tuple(array.shape):
            first = expected if expected is not None else (leading[0] or ("C",))
            named = ", ".join(map(str, (*first, *region.shape)))
            raise InvalidArgument(
                "arrays",
                f"tile {number} of shape {tuple(array.shape)} for {region}",
                f"({named}) there, as its slices say",
                "All tiles have the same channels.",
            )
        if array.dtype.kind not in kinds or array.dtype.itemsize > 8:
            allowed = "booleans, whole or real numbers" if "f" in kinds else "whole numbers"
            do = "Convert it, e.g. with .astype('float32')." if "f" in kinds else "Convert it."
            raise InvalidType("arrays", f"tile {number} of dtype {array.dtype}", allowed, do)
    order = sorted(range(len(regions)), key=lambda n: (regions[n].start, regions[n].stop))
    held = [a if isinstance(a, da.Array) else np.asarray(a) for a in arrays]
    tiles = _Tiles(
        shape,
        [regions[n] for n in order],
        [held[n] for n in order],
        expected[0] if expected else None,
        backend,
    )
    if not tiles.lazy:
        device_for(backend)  # before any work, if there is none
    return tiles


def _stitch(tiles: _Tiles, blend: Blend, dtype: npt.DTypeLike) -> Any:
    """Blend the volume at once, or lazily block by block."""
    tapers = tiles.tapers()
    if not tiles.lazy:
        whole = Region((0,) * len(tiles.shape), tiles.shape)
        parts = [(r, r, t) for r, t in zip(tiles.regions, tapers, strict=True)]
        return _block(blend, whole, tiles.channels, parts, tiles.arrays, tiles.backend)
    starts, stops = tiles.limits()
    grid = BlockGrid(tiles.shape, tuple(int(n) for n in (stops - starts).max(axis=0)))
    sources = [Source.of(a) if isinstance(a, da.Array) else a for a in tiles.arrays]
    blocks = []
    for region in grid:
        touching = (starts < region.stop) & (stops > region.start)
        near = np.flatnonzero(touching.all(axis=1)).tolist()
        common = [tiles.regions[n].intersect(region) for n in near]
        parts = [(c, tiles.regions[n], tapers[n]) for c, n in zip(common, near, strict=True)]
        pieces = []
        for n, c in zip(near, common, strict=True):
            inside, source = c.relative_to(tiles.regions[n].start), sources[n]
            index: tuple[Any, ...] = (..., *inside.slices)
            pieces.append(source.read(inside) if isinstance(source, Source) else source[index])
        held = delayed(parts, traverse=False)
        block = delayed(_block)(blend, region, tiles.channels, held, pieces, tiles.backend)
        blocks.append(block)
    return assemble(blocks, grid, dtype=dtype, leading=tiles.leading)


def _block(
    blend: Blend,
    block: Region,
    channels: int | None,
    parts: list[Part],
    arrays: list[Array],
    backend: str,
) -> Array:
    """A block of tiles' parts, or halves of it where a GPU's memory does not hold it."""

    def made(window: Region, backend: str) -> Array:
        inside, values = [], []
        for (part, tile, tapers), array in zip(parts, arrays, strict=True):
            common = part.intersect(window)
            if common.size:
                inside.append((common, tile, tapers))
                there: tuple[Any, ...] = (..., *common.relative_to(part.start).slices)
                values.append(np.asarray(array)[there])
        return blend(kernels_for(backend), window, channels, inside, values)

    return made_of_halves(block, made, backend)


def _three(values: tuple[int, ...], one: int) -> tuple[int, ...]:
    return (one,) * (3 - len(values)) + values


def _along(part: Part) -> tuple[Array, Array, Array]:
    """A tile's weights along z, y and x, in a part of it."""
    region, tile, tapers = part
    vectors = [np.ones(1)] * (3 - len(tapers))
    for axis, taper in enumerate(tapers):
        o = tile.start[axis]
        weight = axis_weight(tile.stop[axis] - o, taper)
        vectors.append(weight[region.start[axis] - o : region.stop[axis] - o])
    return vectors[0], vectors[1], vectors[2]


def _place(part: Part, block: Region) -> tuple[slice, ...]:
    axes = len(block.shape)
    return (slice(None),) * (3 - axes) + part[0].relative_to(block.start).slices


def _mean(
    kernels: Kernels,
    block: Region,
    channels: int | None,
    parts: list[Part],
    arrays: list[Array],
) -> npt.NDArray[np.float64]:
    shape = (channels or 1, *_three(block.shape, 1))
    mean, weights = kernels.zeros(shape), kernels.zeros(shape[1:])
    for part, array in zip(parts, arrays, strict=True):
        there = _place(part, block)
        size = _three(part[0].shape, 1)
        values = array.reshape(channels or 1, *size)
        if values.dtype.char in "e?":  # which numba does not know
            values = values.astype(np.float32)
        view = mean[(slice(None), *there)]
        native = values.astype(values.dtype.newbyteorder("="), copy=False)
        kernels.add_tile(view, weights[there], kernels.there(native), _along(part))
    made: npt.NDArray[np.float64] = kernels.in_memory(mean)
    return made.reshape(*(() if channels is None else (channels,)), *block.shape)


def _blend_volume(kernels: Kernels, block: Region, *given: Any) -> npt.NDArray[np.float32]:
    return _mean(kernels, block, *given).astype(np.float32)


def _blend_flow(kernels: Kernels, block: Region, *given: Any) -> npt.NDArray[np.float32]:
    return unit_vectors(_mean(kernels, block, *given))


def _heaviest(
    kernels: Kernels,
    block: Region,
    channels: int | None,
    parts: list[Part],
    arrays: list[Array],
) -> npt.NDArray[np.uint64]:
    shape = (channels or 1, *_three(block.shape, 1))
    labels, heaviest = kernels.zeros(shape, dtype=np.uint64), kernels.zeros(shape[1:])
    for part, array in zip(parts, arrays, strict=True):
        there = _place(part, block)
        values = kernels.there(array.reshape(channels or 1, *_three(part[0].shape, 1)))
        kernels.keep_heaviest(labels[(slice(None), *there)], heaviest[there], values, _along(part))
    made: npt.NDArray[np.uint64] = kernels.in_memory(labels)
    return made.reshape(*(() if channels is None else (channels,)), *block.shape)


def stitch_volumes(
    volume_shape: Sequence[int],
    subcrop_slices: Sequence[Slices],
    arrays: Sequence[Any],
    *,
    backend: str = "auto",
) -> Any:
    """Blend overlapping tiles into one volume with cosine weights.

    Parameters
    ----------
    volume_shape
        Shape of the volume.
    subcrop_slices
        Where each tile lies, e.g. from `compute_subcrop_slices`; any layout, in any order.
    arrays
        The tiles ``[C, ...]`` or ``[...]``, NumPy or dask.
    backend
        What blends: "cpu", "gpu", or "auto", a GPU where there is one. The result is the same, to
        the bit.

    Returns
    -------
    float32 ``[C, *volume_shape]`` or ``[*volume_shape]``, a lazy dask array if a tile is one: the
    weighted mean, 0 where no tile lies. Where tiles agree it is exactly their value.

    Raises
    ------
    InvalidArgument, InvalidType
        Tiles and slices that do not fit.
    BackendUnavailable
        There is no GPU, with ``backend="gpu"``; for dask arrays while computing.

    Examples
    --------
    >>> from topo_dask.graph.fuse import compute_subcrop_slices
    >>> tiles = compute_subcrop_slices((6,), (4,), (2,))
    >>> stitch_volumes((6,), tiles, [np.ones((1, 4)), np.ones((1, 4))])
    array([[1., 1., 1., 1., 1., 1.]], dtype=float32)
    """
    tiles = _tiles(
        volume_shape, subcrop_slices, arrays, kinds="biuf", leading=(None, ()), backend=backend
    )
    return _stitch(tiles, _blend_volume, np.float32)


def stitch_flows(
    volume_shape: Sequence[int],
    subcrop_slices: Sequence[Slices],
    arrays: Sequence[Any],
    *,
    backend: str = "auto",
) -> Any:
    """Blend overlapping tiles of flow, then scale to length 1 where the sum is not 0.

    Parameters
    ----------
    volume_shape, subcrop_slices, backend
        See `stitch_volumes`.
    arrays
        The tiles ``[3, ...]``, NumPy or dask.

    Returns
    -------
    float32 ``[3, *volume_shape]``, a lazy dask array if a tile is one

    Raises
    ------
    InvalidArgument, InvalidType
        Tiles and slices that do not fit.
    BackendUnavailable
        There is no GPU, with ``backend="gpu"``; for dask arrays while computing.

    Examples
    --------
    >>> from topo_dask.graph.fuse import compute_subcrop_slices
    >>> tiles = compute_subcrop_slices((6,), (4,), (2,))
    >>> stitch_flows((6,), tiles, [np.full((3, 4), 0.5)] * 2)[0, 0].round(3)
    np.float32(0.577)
    """
    tiles = _tiles(
        volume_shape, subcrop_slices, arrays, kinds="biuf", leading=((3,),), backend=backend
    )
    return _stitch(tiles, _blend_flow, np.float32)


def stitch_labels(
    volume_shape: Sequence[int],
    subcrop_slices: Sequence[Slices],
    arrays: Sequence[Any],
    *,
    backend: str = "auto",
) -> Any:
    """Put overlapping tiles of labels together: the tile with the highest weight wins.

    The ids of different tiles are kept apart: those of the first tile (by place) become 1..K,
    those of the next K+1.., in their order; some are missing where another tile wins everywhere.

    Parameters
    ----------
    volume_shape, subcrop_slices, backend
        See `stitch_volumes`.
    arrays
        The tiles ``[...]``, or ``[C, ...]`` with labels of their own in each channel; any integer
        type, 0 is background; NumPy or dask.

    Returns
    -------
    uint64, a lazy dask array if a tile is one

    Raises
    ------
    InvalidArgument, InvalidType, InvalidData
        Tiles and slices that do not fit, negative labels.
    BackendUnavailable
        There is no GPU, with ``backend="gpu"``; for dask arrays while computing.

    Examples
    --------
    >>> from topo_dask.graph.fuse import compute_subcrop_slices
    >>> tiles = compute_subcrop_slices((6,), (4,), (2,))
    >>> stitch_labels((6,), tiles, [np.array([0, 5, 5, 5]), np.array([5, 5, 5, 9])])
    array([0, 1, 1, 2, 2, 3], dtype=uint64)
    """
    tiles = _tiles(
        volume_shape, subcrop_slices, arrays, kinds="iub", leading=((), None), backend=backend
    )
    if not tiles.lazy:
        local = [numbered(a, tiles.channels) for a in tiles.arrays]
        firsts = _firsts([counts for _, counts in local])
        named = [_named(found, firsts, row) for row, found in enumerate(local)]
        return _stitch(replace(tiles, arrays=named), _heaviest, "u8")
    tasks = []
    for array in tiles.arrays:
        whole = Region((0,) * array.ndim, tuple(int(n) for n in array.shape))
        held = Source.of(array).read(whole) if isinstance(array, da.Array) else array
        tasks.append(delayed(numbered, nout=2)(held, tiles.channels))
    firsts = delayed(_firsts)([task[1] for task in tasks])
    lazy = [
        da.from_delayed(delayed(_named)(task, firsts, row), a.shape, dtype="u8")
        for row, (task, a) in enumerate(zip(tasks, tiles.arrays, strict=True))
    ]
    return _stitch(replace(tiles, arrays=lazy), _heaviest, "u8")


def numbered(
    labels: Array, channels: int | None, *, argument: str = "arrays", where: str = ""
) -> tuple[Array, list[int]]:
    """The instances of each channel numbered 1..K in the order of their ids, and their numbers K.

    Parameters
    ----------
    labels
        ``[*channels, ...]`` with 1 to 3 axes after the channels, whole numbers; 0 is background.
    channels
        How many; ``None`` for no such axis.
    argument, where
        What an error calls the labels.
    """
    check_not_negative(labels, argument=argument, where=where)
    stack = labels[None] if channels is None else labels
    local, counts = np.empty(stack.shape, dtype=np.int32), []
    for channel, one in enumerate(stack.astype("u1" if labels.dtype == bool else labels.dtype)):
        index, ids = compact(one.reshape(_three(one.shape, 1)))
        local[channel] = index.reshape(one.shape)
        counts.append(len(ids))
    return local.reshape(labels.shape), counts


def _firsts(counts: list[list[int]]) -> npt.NDArray[np.uint64]:
    """``[tiles, channels]``: how many ids come before those of each tile."""
    table = np.array(counts, dtype=np.uint64)
    before: npt.NDArray[np.uint64] = table.cumsum(axis=0) - table
    return before


def _named(
    found: tuple[Array, list[int]], firsts: npt.NDArray[np.uint64], row: int
) -> npt.NDArray[np.uint64]:
    local, counts = found
    # One number for each channel along the first axis; a single one holds everywhere.
    axes = local.ndim - 1 if len(counts) > 1 else 0
    ids: npt.NDArray[np.uint64] = local.astype(np.uint64) + firsts[row].reshape(-1, *(1,) * axes)
    ids[local == 0] = 0
    return ids
