"""Tiles placed by transforms into one array: where they lie, which block needs which, blending.

Inside, everything has three spatial axes; images have a first one of length 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.delayed import delayed

from topo_dask.config import BACKENDS, choice
from topo_dask.errors import InvalidArgument, InvalidData, InvalidType, may_pass
from topo_dask.graph.alive import fast_to_slow, spans
from topo_dask.graph.blocks import Source, assemble
from topo_dask.graph.parts import made_of_halves
from topo_dask.grid import BlockGrid, Region, as_lengths
from topo_dask.kernels.backends import Kernels, kernels_for
from topo_dask.kernels.cpu.blend import axis_weight
from topo_dask.kernels.resample import (
    BLENDS,
    EDGE,
    ORDERS,
    Box,
    Lengths,
    needed_part,
    part_to_read,
)

SINGULAR = 1e-12
"""A linear part is singular if its smallest singular value is below this share of its largest."""

MAX_LISTED = 20
AT_INFINITY = "which moves a part of its tile to infinity"


@dataclass(frozen=True)
class MosaicSettings:
    """How tiles become one value a voxel.

    Parameters
    ----------
    axes
        2 or 3.
    order
        Of the splines that resample a tile: 0 (nearest voxel), 1 (linear) or 3 (cubic).
    blend
        "cosine", "mean", "max" or "first" (of the tiles, in their order).
    overlap
        Width of the cosine tapers at a tile's faces in its voxels, for each axis; ``None`` for
        half the tile.
    vector
        Whether the channels are a vector (dz, dy, dx), to be turned with the tile.
    unit
        Whether vectors get length 1.
    background
        The value where no tile is.
    backend
        What computes, see `topo_dask.kernels.backends`. It changes no byte of the result, so it
        counts neither where settings are compared nor in fingerprints.

    Examples
    --------
    >>> MosaicSettings(axes=2, blend="max").order
    1
    """

    axes: int
    order: int = 1
    blend: str = "cosine"
    overlap: tuple[int, ...] | None = None
    vector: bool = False
    unit: bool = False
    background: float = 0
    backend: str = field(default="auto", compare=False)

    def __post_init__(self) -> None:
        choice("backend", self.backend, BACKENDS)
        choice("order", self.order, ORDERS)
        choice("blend", self.blend, BLENDS)
        if not isinstance(self.background, (int, float, np.integer, np.floating)):
            raise InvalidType(
                "background", repr(self.background), "a number", "Leave it out for 0."
            )
        if self.vector and self.blend == "max":
            raise InvalidArgument(
                "blend",
                "'max' with vector=True",
                "'cosine', 'mean' or 'first' for vectors",
                "Choose one of these.",
            )


# ------------------------------------------------------------------------------- transforms


def _wrong(argument: str, wrong: Sequence[str], allowed: str, do: str) -> InvalidArgument:
    more = f" and {len(wrong) - MAX_LISTED} more" if len(wrong) > MAX_LISTED else ""
    return InvalidArgument(argument, "; ".join(wrong[:MAX_LISTED]) + more, allowed, do)


def _axes_of(shape: tuple[int, ...]) -> int | None:
    """Number of spatial axes that a transform of this shape is for."""
    for n in (2, 3):
        if shape in ((n,), (n, n + 1), (n + 1, n + 1)):
            return n
    return None


def transform_matrices(transforms: Any, *, count: int) -> npt.NDArray[np.float64]:
    """Check transforms and bring them into one form, homogeneous matrices.

    Parameters
    ----------
    transforms
        For each tile a translation ``[n]``, an affine matrix ``[n, n + 1]``, or an affine or
        projective one ``[n + 1, n + 1]``, n being 2 or 3, in the order z, y, x.
    count
        How many there must be.

    Returns
    -------
    float64 ``[count, n + 1, n + 1]``, the last entry of each 1.

    Raises
    ------
    InvalidArgument
        The transforms at fault are named, all of them.

    Examples
    --------
    >>> transform_matrices([(4.0, 2.5)], count=1)[0].tolist()
    [[1.0, 0.0, 4.0], [0.0, 1.0, 2.5], [0.0, 0.0, 1.0]]
    """
    allowed = (
        "for each tile a translation [n], an affine matrix [n, n + 1] or a homogeneous one "
        "[n + 1, n + 1], n being 2 or 3 and the same for all"
    )
    if len(transforms) != count:
        raise InvalidArgument(
            "transforms", f"{len(transforms)} for {count} tiles", allowed, "Pass one for each tile."
        )
    given, wrong = [], []
    for number, transform in enumerate(transforms):
        try:
            given.append(np.asarray(transform, dtype=np.float64))
        except (TypeError, ValueError):
            given.append(np.empty(0))
            wrong.append(f"transform {number}, which is not numbers in rows of one length")
    known = [n for n in (_axes_of(g.shape) for g in given) if n is not None]
    axes = max(set(known), key=known.count) if known else 0
    made = np.zeros((count, axes + 1, axes + 1))
    for number, matrix in enumerate(given):
        if matrix.size and _axes_of(matrix.shape) == axes:
            made[number] = np.eye(axes + 1)
            if matrix.ndim == 1:
                made[number, :axes, axes] = matrix
            else:
                made[number, : len(matrix)] = matrix
        elif matrix.size or matrix.ndim > 1:
            wrong.append(f"transform {number} of shape {matrix.shape}")
    if wrong or not axes:
        raise _wrong("transforms", wrong, allowed, "Mend them, or leave out these tiles.")
    wrong = [f"transform {n} with NaN or infinity" for n in _rows(~np.isfinite(made))]
    if not wrong:
        corner = made[:, axes, axes].copy()
        wrong = [f"transform {n}, {AT_INFINITY}" for n in _rows(corner == 0)]
        made /= np.where(corner == 0, 1, corner)[:, None, None]
        # Of a projective transform, the derivative at the tile's first voxel.
        linear = made[:, :axes, :axes] - made[:, :axes, axes:] * made[:, axes:, :axes]
        sizes = np.linalg.svd(linear, compute_uv=False)
        singular = sizes[:, -1] <= SINGULAR * sizes[:, 0]
        wrong += [f"transform {n}, which is singular" for n in _rows(singular & (corner != 0))]
    if wrong:
        raise _wrong(
            "transforms",
            wrong,
            "finite transforms that can be inverted",
            "Mend them, or leave out these tiles.",
        )
    return made


def _rows(wrong: npt.NDArray[np.bool_]) -> list[int]:
    """Numbers of the rows in which anything is true."""
    return [int(n) for n in np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1))]


def _inverse(matrices: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Inverse matrices; those of affine ones are affine to the bit."""
    axes = matrices.shape[-1] - 1
    inverse: npt.NDArray[np.float64] = np.linalg.inv(matrices).astype(np.float64)
    affine = (matrices[:, axes, :axes] == 0).all(axis=1)
    linear = np.linalg.inv(matrices[affine, :axes, :axes])
    inverse[affine] = np.eye(axes + 1)
    inverse[affine, :axes, :axes] = linear
    moved = linear @ matrices[affine, :axes, axes, None]
    inverse[affine, :axes, axes] = -moved[..., 0]
    return inverse


def _in_three(matrices: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The same matrices for three axes; the new first one is left as it is."""
    if matrices.shape[-1] == 4:
        return matrices
    wide = np.zeros((len(matrices), 4, 4))
    wide[:, 0, 0] = 1
    wide[:, 1:, 1:] = matrices
    return wide


# -------------------------------------------------------------------------------- placement


@dataclass(frozen=True, eq=False)
class PlacedTile:
    """One tile in the output, as a task needs it.

    Parameters
    ----------
    number
        Of the tile.
    maps
        ``[2, 4, 4]``: output voxels to tile voxels, and back.
    lengths
        Shape of the tile, three axes.
    box
        Output voxels it may cover.
    """

    number: int
    maps: npt.NDArray[np.float64]
    lengths: Lengths
    box: Box


@dataclass(frozen=True, eq=False)
class Placement:
    """Where tiles lie in the output. Made by `place_tiles`.

    Parameters
    ----------
    shape, origin, spacing
        Of the output: voxels, position of the first voxel's centre, size of a voxel.
    forward, inverse
        ``[T, 4, 4]``: tile voxels to output voxels, and back.
    lengths
        int64 ``[T, 3]``, shapes of the tiles.
    low, high
        int64 ``[T, 3]``: the output voxels that a tile may cover, half open, within the output.
    """

    shape: tuple[int, ...]
    origin: tuple[float, ...]
    spacing: tuple[float, ...]
    forward: npt.NDArray[np.float64]
    inverse: npt.NDArray[np.float64]
    lengths: npt.NDArray[np.int64]
    low: npt.NDArray[np.int64]
    high: npt.NDArray[np.int64]

    @property
    def axes(self) -> int:
        """2 or 3."""
        return len(self.shape)

    @property
    def outside(self) -> list[int]:
        """Numbers of the tiles that touch no voxel of the output."""
        return [int(n) for n in np.flatnonzero((self.high <= self.low).any(axis=1))]

    def tile(self, number: int) -> PlacedTile:
        """One tile."""
        low, high = tuple(self.low[number].tolist()), tuple(self.high[number].tolist())
        maps = np.stack([self.inverse[number], self.forward[number]])
        return PlacedTile(number, maps, tuple(self.lengths[number].tolist()), (low, high))

    def index(self, grid: BlockGrid) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Which tiles may reach each block: their numbers, ascending, are ``tiles[a:b]``.

        Returns
        -------
        starts, tiles
            For block k ``a, b = starts[k], starts[k + 1]``.
        """
        skip = 3 - self.axes
        first, stop = (
            np.stack(
                [
                    np.searchsorted(e, ends[:, axis + skip], side=side) - less  # type: ignore[call-overload]
                    for axis, e in enumerate(grid.edges)
                ],
                axis=1,
            )
            for ends, side, less in ((self.low, "right", 1), (self.high, "left", 0))
        )
        counts = np.maximum(stop - first, 0)
        counts[self.outside] = 0
        pairs = counts.prod(axis=1)
        tile = np.repeat(np.arange(len(pairs)), pairs)
        rest = np.arange(pairs.sum()) - np.repeat(np.cumsum(pairs) - pairs, pairs)
        block = np.zeros(len(tile), dtype=np.int64)
        step = 1
        for axis in reversed(range(self.axes)):
            block += (first[tile, axis] + rest % counts[tile, axis]) * step
            rest //= counts[tile, axis]
            step *= grid.counts[axis]
        order = np.argsort(block, kind="stable")
        starts = np.searchsorted(block[order], np.arange(len(grid) + 1)).astype(np.int64)
        return starts, tile[order]


def _numbers(argument: str, value: Any, axes: int, *, positive: bool) -> tuple[float, ...]:
    """One finite number for each axis."""
    allowed = f"one {'positive ' if positive else ''}number or {axes} of them, z, y, x"
    do = f"Pass e.g. {argument}=({', '.join(['0.5'] * axes)})."
    try:
        numbers = np.broadcast_to(np.asarray(value, dtype=np.float64), (axes,))
    except (TypeError, ValueError):
        raise InvalidArgument(argument, repr(value), allowed, do) from None
    if not np.isfinite(numbers).all() or (positive and (numbers <= 0).any()):
        raise InvalidArgument(argument, repr(value), allowed, do)
    return tuple(numbers.tolist())


def _tile_sizes(value: Any, count: int, axes: int) -> npt.NDArray[np.float64]:
    """Size of a voxel of each tile: given as one number, for each axis, or for each tile."""
    allowed = f"one positive number, {axes} of them (z, y, x), or such a row for each tile"
    do = f"Pass e.g. tile_spacing=({', '.join(['0.5'] * axes)})."
    try:
        sizes = np.asarray(value, dtype=np.float64)
        sizes = np.broadcast_to(sizes, (count, axes))
    except (TypeError, ValueError):
        raise InvalidArgument("tile_spacing", repr(value), allowed, do) from None
    if not np.isfinite(sizes).all() or (sizes <= 0).any():
        raise InvalidArgument("tile_spacing", repr(value), allowed, do)
    return sizes


def _scaled(sizes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Homogeneous matrices that multiply by sizes ``[..., n]``."""
    ones = np.ones((*sizes.shape[:-1], 1))
    scales: npt.NDArray[np.float64] = np.concatenate([sizes, ones], axis=-1)
    return scales[..., None] * np.eye(scales.shape[-1])


def _corner_positions(
    matrices: npt.NDArray[np.float64], lengths: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Images ``[T, corners, n]`` of the tiles' corners."""
    axes = lengths.shape[1]
    bits = np.array(list(itertools.product((0, 1), repeat=axes)))
    corners = np.concatenate(
        [bits * (lengths[:, None, :] - 1), np.ones((len(lengths), len(bits), 1))], axis=2
    )
    images = np.einsum("tij,tcj->tci", matrices, corners)
    heights = images[..., axes:]
    wrong = _rows(~(heights > 0))
    if wrong:
        raise _wrong(
            "transforms",
            [f"transform {n}, {AT_INFINITY}" for n in wrong],
            "projective transforms whose horizon is outside the tile",
            "Mend them, or leave out these tiles.",
        )
    positions: npt.NDArray[np.float64] = images[..., :axes] / heights
    return positions


def place_tiles(
    matrices: npt.NDArray[np.float64],
    tile_shapes: Sequence[Sequence[int]],
    *,
    shape: Any = None,
    origin: Any = None,
    spacing: Any = None,
    tile_spacing: Any = None,
) -> Placement:
    """Lay tiles out on the voxels of the output.

    Parameters
    ----------
    matrices
        From `transform_matrices`: positions in a tile to positions in the output, in physical
        units. Voxel i of a tile is at i times its ``tile_spacing``.
    tile_shapes
        Spatial shape of each tile.
    shape
        Of the output; ``None`` for all that the tiles cover from ``origin`` on.
    origin
        Position of the output's first voxel; ``None`` for the lowest that a tile covers.
    spacing, tile_spacing
        Size of a voxel of the output and of the tiles. ``None``: the output's is the smallest of
        the tiles', the tiles' is the output's, 1 where neither is given.

    Raises
    ------
    InvalidArgument
        The argument is named; also where no tile at all reaches the output.

    Examples
    --------
    >>> two = transform_matrices([(0, 0), (0, 3)], count=2)
    >>> placement = place_tiles(two, [(4, 4), (4, 4)])
    >>> placement.shape
    (4, 7)
    >>> placement.index(BlockGrid((4, 7), (4, 4)))[1].tolist()
    [0, 1, 1]
    """
    count, axes = len(matrices), matrices.shape[-1] - 1
    lengths = np.array(tile_shapes, dtype=np.int64).reshape(count, axes)
    sizes = None if tile_spacing is None else _tile_sizes(tile_spacing, count, axes)
    if spacing is None:
        spacing = 1 if sizes is None else sizes.min(axis=0)
    voxel = np.array(_numbers("spacing", spacing, axes, positive=True))
    if sizes is None:
        sizes = _tile_sizes(voxel, count, axes)
    physical = matrices @ _scaled(sizes)
    corners = _corner_positions(physical, lengths)
    low, high = corners.min(axis=1), corners.max(axis=1)
    first = low.min(axis=0)
    if origin is not None:
        first = np.array(_numbers("origin", origin, axes, positive=False))
    if shape is None:
        found = np.floor((high.max(axis=0) - first) / voxel + EDGE) + 1
        if (found < 1).any() or (found > 2**40).any():
            raise InvalidArgument(
                "shape",
                f"None, and tiles that make it {[int(n) for n in found]}",
                "tiles that lie beyond the origin, within 2**40 voxels",
                "Check the units of the transforms, or give the shape.",
            )
        voxels = tuple(int(n) for n in found)
    else:
        voxels = as_lengths(shape, argument="shape", axes=axes, least=1)
    moved = np.eye(axes + 1)
    moved[:axes, axes] = -first / voxel
    forward = moved @ _scaled(1 / voxel) @ physical
    limits = np.array(voxels, dtype=np.float64)
    start = np.clip(np.ceil((low - first) / voxel - EDGE), 0, limits).astype(np.int64)
    stop = np.clip(np.floor((high - first) / voxel + EDGE) + 1, 0, limits).astype(np.int64)
    if (stop <= start).any(axis=1).all():
        raise InvalidArgument(
            "transforms",
            f"{count} tiles, none of which reaches a voxel of the output: it is {voxels} voxels "
            f"from {tuple(first.tolist())} on",
            "at least one tile within the output",
            "Check the units of the transforms, the origin and the shape.",
        )
    before = ((0, 0), (3 - axes, 0))
    return Placement(
        voxels,
        tuple(first.tolist()),
        tuple(voxel.tolist()),
        _in_three(forward),
        _in_three(_inverse(forward)),
        np.pad(lengths, before, constant_values=1),
        np.pad(start, before),
        np.pad(stop, before, constant_values=1),
    )


@dataclass(frozen=True, eq=False)
class MosaicBlocks:
    """The blocks to write, in an order that keeps few tiles alive. Made by `mosaic_blocks`.

    Parameters
    ----------
    numbers
        int64 ``[B]``, numbers of the blocks.
    tiles
        For each of them the tiles that may reach it, ascending.
    count
        How many tiles there are.
    """

    numbers: npt.NDArray[np.int64]
    tiles: list[list[int]]
    count: int

    def lives(
        self, began: npt.NDArray[Any], ended: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """When each tile is first and last needed, see `spans`; given for each block in order."""
        pairs = [len(reach) for reach in self.tiles]
        every = np.fromiter(itertools.chain.from_iterable(self.tiles), dtype=np.int64)
        return spans(every, np.repeat(began, pairs), np.repeat(ended, pairs), count=self.count)


def mosaic_blocks(placement: Placement, grid: BlockGrid, *, every: bool = False) -> MosaicBlocks:
    """Which blocks to write, when, and of which tiles.

    Parameters
    ----------
    placement, grid
        Tiles and blocks.
    every
        Blocks that no tile reaches too.

    Examples
    --------
    >>> placement = place_tiles(transform_matrices([(0, 0), (0, 8)], count=2), [(4, 4), (4, 4)])
    >>> blocks = mosaic_blocks(placement, BlockGrid(placement.shape, (2, 4)))
    >>> blocks.numbers.tolist(), blocks.tiles
    ([0, 3, 2, 5], [[0], [0], [1], [1]])
    """
    starts, tiles = placement.index(grid)
    wanted = np.arange(len(grid)) if every else np.flatnonzero(np.diff(starts))
    index = np.unravel_index(wanted, grid.counts)
    order = np.lexsort([index[axis] for axis in fast_to_slow(grid.counts)])
    numbers = wanted[order].astype(np.int64)
    edges = zip(starts[numbers].tolist(), starts[numbers + 1].tolist(), strict=True)
    return MosaicBlocks(numbers, [tiles[a:b].tolist() for a, b in edges], len(placement.low))


# ---------------------------------------------------------------------------------- blending


@dataclass(frozen=True, eq=False)
class Cut:
    """A piece of a tile that is in memory already; indexed like the whole tile."""

    piece: npt.NDArray[Any]
    start: Lengths

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.piece.ndim

    def __getitem__(self, key: tuple[slice, ...]) -> npt.NDArray[Any]:
        before = self.piece.ndim - len(self.start)
        moved = (
            slice(s.start - a, s.stop - a) for s, a in zip(key[before:], self.start, strict=True)
        )
        piece: npt.NDArray[Any] = self.piece[(*key[:before], *moved)]
        return piece


def working_dtype(common: np.dtype[Any], settings: MosaicSettings) -> np.dtype[Any]:
    """In what values are blended: float64, but 64-bit integers as they are where they can be."""
    kept = settings.order == 0 and settings.blend in ("max", "first") and not settings.vector
    return common if kept and common.kind in "iu" and common.itemsize == 8 else np.dtype("f8")


@lru_cache(maxsize=64)
def _tables(lengths: Lengths, overlap: tuple[int, ...] | None) -> npt.NDArray[np.float64]:
    """Weights along the axes of a tile, padded to the longest."""
    tables = np.zeros((3, max(lengths)))
    for axis, n in enumerate(lengths):
        width = n // 2 if overlap is None else ((0,) * (3 - len(overlap)) + overlap)[axis]
        tables[axis, :n] = axis_weight(n, (width, width))
    return tables


def in_three(region: Region) -> Box:
    """A region as a box of three axes."""
    missing = 3 - len(region.start)
    return (0,) * missing + region.start, (1,) * missing + region.stop


def _common(one: Box, other: Box) -> Box | None:
    low, high = tuple(map(max, one[0], other[0])), tuple(map(min, one[1], other[1]))
    return (low, high) if all(a < b for a, b in zip(low, high, strict=True)) else None


def part_of(tile: PlacedTile, target: Box, settings: MosaicSettings) -> tuple[Box, Box, Box] | None:
    """What a tile gives to a block: output box, part of the tile, voxels to read for it."""
    box = _common(target, tile.box)
    part = box and needed_part(box, tile.maps[0], tile.lengths, order=settings.order)
    if not box or not part:
        return None
    return box, part, part_to_read(part, tile.lengths, order=settings.order)


def _read(tile: PlacedTile, source: Any, read: Box, settings: MosaicSettings) -> npt.NDArray[Any]:
    """Voxels of a tile as ``[C, z, y, x]``."""
    skip = 3 - settings.axes
    inside = tuple(slice(a, b) for a, b in zip(*read, strict=True))[skip:]
    before = (slice(None),) * (source.ndim - settings.axes)
    try:
        values = np.asarray(source[(*before, *inside)])
    except Exception as error:  # whatever a store, a codec or a damaged file may raise
        if may_pass(error):
            error.add_note(f"tile {tile.number}")
            raise
        raise InvalidData(
            f"tile {tile.number}",
            f"{type(error).__name__}: {error}",
            "a tile that can be read",
            "Nothing was published. Mend or leave out this tile.",
        ) from error
    shape = tuple(b - a for a, b in zip(*read, strict=True))
    return values.reshape(-1, *shape)


def add_tile(
    total: npt.NDArray[Any],
    weights: npt.NDArray[np.float64],
    target: Box,
    *,
    tile: PlacedTile,
    source: Any,
    settings: MosaicSettings,
    kernels: Kernels,
) -> None:
    """Blend what a tile gives to a block into it, reading no more than that.

    Parameters
    ----------
    total, weights
        ``[C, z, y, x]`` and ``[z, y, x]`` of the block, where the kernels compute; changed in
        place.
    target
        The block.
    tile
        Where the tile lies.
    source
        Its voxels: anything that slices like an array.
    settings
        How to blend.
    kernels
        What computes.
    """
    found = part_of(tile, target, settings)
    if found is None:
        return
    box, part, read = found
    values = _read(tile, source, read, settings)
    if settings.order == 3:
        voxels = kernels.there(values)
        values = kernels.spline_coefficients(voxels, start=read[0], part=part, lengths=tile.lengths)
    elif total.dtype.kind != "f":
        values = values.astype(total.dtype)
    else:
        small = values.dtype.itemsize <= 2 or values.dtype == np.float32
        values = values.astype(np.float32 if small else np.float64)
    kernels.accumulate(
        total,
        weights,
        kernels.there(values),
        tile.maps,
        np.array([target[0], *box, part[0], tile.lengths], dtype=np.int64),
        _tables(tile.lengths, settings.overlap),
        np.array([settings.order, BLENDS.index(settings.blend), settings.vector], dtype=np.int64),
    )


def _as_dtype(values: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Rounded and clipped to what an integer type can hold."""
    if dtype.kind not in "iu" or values.dtype == dtype:
        return values.astype(dtype)
    info = np.iinfo(dtype)
    low, high = float(info.min), float(info.max)
    if high > info.max:  # 2**63 - 1 and 2**64 - 1 are no float64
        high = float(np.nextafter(high, 0))
    np.nan_to_num(values, copy=False, nan=0.0, posinf=high, neginf=low)
    return np.clip(np.rint(values, out=values), low, high, out=values).astype(dtype)


def fuse_block(
    region: Region,
    tiles: Iterable[PlacedTile],
    sources: Iterable[Any],
    *,
    settings: MosaicSettings,
    channels: int,
    common: np.dtype[Any],
    dtype: np.dtype[Any],
) -> npt.NDArray[Any]:
    """One block of the output from the tiles that reach it, in the order they come.

    Parameters
    ----------
    region
        The block.
    tiles, sources
        Where each lies, and its voxels.
    settings
        How to blend.
    channels
        Number of channels; 0 where there is no such axis.
    common, dtype
        The type that holds the values of all tiles, and that of the output.

    Returns
    -------
    ``[C, *block]``, or ``[*block]`` without channels. Blocks that a GPU's memory does not hold
    are made of halves.
    """
    placed, voxels = list(tiles), list(sources)
    how: dict[str, Any] = {"channels": channels, "common": common, "dtype": dtype}

    def fused(part: Region, backend: str) -> npt.NDArray[Any]:
        return _fuse_whole(part, placed, voxels, settings=replace(settings, backend=backend), **how)

    return made_of_halves(region, fused, settings.backend)


def _fuse_whole(
    region: Region,
    tiles: Sequence[PlacedTile],
    sources: Sequence[Any],
    *,
    settings: MosaicSettings,
    channels: int,
    common: np.dtype[Any],
    dtype: np.dtype[Any],
) -> npt.NDArray[Any]:
    """`fuse_block` at once."""
    target = in_three(region)
    shape = tuple(b - a for a, b in zip(*target, strict=True))
    kernels = kernels_for(settings.backend)
    sums = kernels.zeros((max(channels, 1), *shape), dtype=working_dtype(common, settings))
    masses = kernels.zeros(shape)
    for tile, source in zip(tiles, sources, strict=True):
        add_tile(sums, masses, target, tile=tile, source=source, settings=settings, kernels=kernels)
    total, weights = kernels.in_memory(sums), kernels.in_memory(masses)
    if settings.blend in ("cosine", "mean"):
        np.divide(total, weights, out=total, where=weights > 0)
    if settings.unit:
        norm = np.sqrt((total * total).sum(axis=0))
        np.divide(total, norm, out=total, where=norm > 0)
    out = _as_dtype(total, dtype)
    if settings.background:
        out[:, weights == 0] = settings.background
    return out.reshape(((channels,) if channels else ()) + region.shape)


def memory_of_mosaic(block: int, part: int, channels: int, itemsize: int, order: int) -> int:
    """Bytes that a block of a mosaic takes at most: sums and weights, rounding, a part of a tile.

    Parameters
    ----------
    block, part
        Voxels of the block, and of what one tile gives to it.
    channels, itemsize
        Of a tile.
    order
        Of the splines; the coefficients of cubic ones are float64.
    """
    read = itemsize + 8 + (16 if order == 3 else 0)
    return (24 * channels + 16) * block + channels * read * part


def device_memory_of_mosaic(block: int, part: int, channels: int, order: int) -> int:
    """The same of a GPU: sums, weights, voxels or coefficients, and what is filtered for these."""
    return 8 * (channels + 1) * block + channels * (24 if order == 3 else 8) * part


def mosaic_array(
    sources: Sequence[Any],
    placement: Placement,
    grid: BlockGrid,
    *,
    settings: MosaicSettings,
    channels: int,
    common: np.dtype[Any],
    dtype: np.dtype[Any],
) -> da.Array:
    """The output as a lazy dask array, one task a block.

    Parameters
    ----------
    sources
        Voxels of each tile: dask arrays, or anything that slices like an array.
    placement
        Where they lie.
    grid
        The blocks.
    settings, channels, common, dtype
        See `fuse_block`.
    """
    starts, tiles = placement.index(grid)
    lazy = {n: Source.of(s) for n, s in enumerate(sources) if isinstance(s, da.Array)}
    whole = {n: delayed(s, traverse=False) for n, s in enumerate(sources) if n not in lazy}
    block = partial(fuse_block, settings=settings, channels=channels, common=common, dtype=dtype)
    cut = delayed(Cut)
    blocks = []
    for number, region in enumerate(grid):
        placed, voxels = [], []
        for n in tiles[starts[number] : starts[number + 1]].tolist():
            tile = placement.tile(n)
            found = part_of(tile, in_three(region), settings)
            if found is None:
                continue
            placed.append(tile)
            if n in lazy:
                skip = 3 - placement.axes
                start, stop = (ends[skip:] for ends in found[2])
                voxels.append(cut(lazy[n].read(Region(start, stop)), start))
            else:
                voxels.append(whole[n])
        # Bound, not passed: dask would look for collections inside these.
        here = partial(block, region, placed)
        blocks.append(delayed(here, traverse=False)(voxels))
    return assemble(blocks, grid, dtype=dtype, leading=(channels,) if channels else ())


def check_tiles(
    shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype[Any]], *, axes: int, vector: bool
) -> tuple[int, np.dtype[Any]]:
    """Number of channels (0 without that axis) and common type of tiles.

    Raises
    ------
    InvalidArgument, InvalidType
        The tiles at fault are named, all of them.

    Examples
    --------
    >>> check_tiles([(2, 8, 8)], [np.dtype("u1")], axes=2, vector=True)
    (2, dtype('uint8'))
    """
    names = "z, y, x"[-3 * axes + 2 :]
    leading = [s[: len(s) - axes] if len(s) >= axes else None for s in shapes]
    known = [lead for lead in leading if lead is not None and len(lead) <= 1]
    usual: tuple[int, ...] = max(set(known), key=known.count) if known else ()
    if vector:
        usual = (axes,)
    wrong = [
        f"tile {n} of shape {s}"
        for n, (s, lead) in enumerate(zip(shapes, leading, strict=True))
        if lead != usual or 0 in s
    ]
    if wrong:
        have = f"{usual[0]} {'components' if vector else 'channels'}, {names}" if usual else names
        raise _wrong(
            "tiles",
            wrong,
            f"axes {have}, none of length 0, the same for all tiles",
            f"The transforms are for {axes} axes.",
        )
    odd = [f"tile {n} of {d}" for n, d in enumerate(dtypes) if d.kind not in "biuf"]
    if odd:
        raise InvalidType(
            "tiles",
            "; ".join(odd[:MAX_LISTED]),
            "whole or real numbers",
            "Convert them, e.g. numpy.abs(tile).",
        )
    common = np.result_type(*{np.dtype("u1") if d.kind == "b" else d for d in dtypes})
    common = common.newbyteorder("=")
    return (usual[0] if usual else 0), common
