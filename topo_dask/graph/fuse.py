"""Overlapping tiles: layouts, boundary-aware cosine weights, weighted sums."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.errors import InvalidArgument, InvalidType
from topo_dask.grid import BlockGrid, Region, as_lengths
from topo_dask.kernels import cpu

Slices = tuple[slice, ...]
Tapers = tuple[tuple[int, int], ...]

LASTS = ("move", "shrink")


def shape_of(value: Any, argument: str) -> tuple[int, ...]:
    """The lengths of any number of axes, checked."""
    if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, str):
        raise InvalidType(argument, repr(value), "a tuple of whole numbers", "Pass a shape.")
    return as_lengths(value, argument=argument, axes=max(1, len(value)), least=1)


def tile_at(slices: Any, shape: tuple[int, ...], *, argument: str) -> Region:
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


def axis_tiles(
    length: int, tile: int, overlap: int, last: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First voxels and ends of the tiles along one axis.

    Parameters
    ----------
    length
        Of the axis.
    tile, overlap
        Of the tiles; a tile longer than the axis covers it.
    last
        "move": the last tile is moved back to end with the axis. "shrink": it is cut off there.

    Examples
    --------
    >>> axis_tiles(9, 4, 1, "move"), axis_tiles(9, 4, 1, "shrink")
    ((array([0, 3, 5]), array([4, 7, 9])), (array([0, 3, 6]), array([4, 7, 9])))
    """
    side = min(tile, length)
    if side == length:
        return np.zeros(1, dtype=np.int64), np.full(1, length, dtype=np.int64)
    if last == "move":
        starts = np.append(np.arange(0, length - side, tile - overlap), length - side)
    else:
        starts = np.arange(0, length - overlap, tile - overlap)
    starts = starts.astype(np.int64)
    return starts, np.minimum(starts + side, length)


def compute_subcrop_slices(
    volume_shape: Sequence[int], crop_size: Any, overlap: Any, *, last: str = "move"
) -> list[Slices]:
    """Cut a volume into overlapping tiles.

    Parameters
    ----------
    volume_shape
        Shape of the volume.
    crop_size
        Shape of a tile; a tile longer than an axis covers it.
    overlap
        Voxels that neighbouring tiles share, per axis, less than the tile.
    last
        "move": the last tile of an axis is moved back to end with it. "shrink": it is cut off.

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
    shape = shape_of(volume_shape, "volume_shape")
    axes = len(shape)
    crop = as_lengths(crop_size, argument="crop_size", axes=axes, least=1)
    shared = as_lengths(overlap, argument="overlap", axes=axes, least=0)
    if any(o >= c for o, c in zip(shared, crop, strict=True)):
        raise InvalidArgument(
            "overlap", overlap, f"less than the tile, {crop}, along every axis", "Use larger tiles."
        )
    if last not in LASTS:
        raise InvalidArgument("last", repr(last), f"one of: {', '.join(LASTS)}")
    along = []
    for each in zip(shape, crop, shared, strict=True):
        starts, stops = axis_tiles(*each, last)
        limits = zip(starts.tolist(), stops.tolist(), strict=True)
        along.append([slice(a, b) for a, b in limits])
    return list(itertools.product(*along))


def build_spatial_mask(shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Mask of a tile whose faces are cuts: 1 inside, 0 on the outer faces.

    Parameters
    ----------
    shape
        Of the tile, any number of axes.

    Returns
    -------
    float32 of that shape, for ``spatial_mask``: objects may go on behind the faces.

    Raises
    ------
    InvalidArgument, InvalidType
        The argument is named.

    Examples
    --------
    >>> build_spatial_mask((1, 3, 4)).sum(), build_spatial_mask((3, 3, 4)).sum()
    (np.float32(0.0), np.float32(2.0))
    """
    mask = np.zeros(shape_of(shape, "shape"), np.float32)
    mask[(slice(1, -1),) * mask.ndim] = 1
    return mask


def boundary_flags(slices: Slices, volume_shape: Sequence[int]) -> list[bool]:
    """Which faces of a tile are faces of the volume: z_lo, z_hi, y_lo, y_hi, x_lo, x_hi.

    Parameters
    ----------
    slices
        The tile, as `compute_subcrop_slices` gives it.
    volume_shape
        Shape of the volume.

    Returns
    -------
    list of bool, two for each axis, for `cosine_blend_weight`.

    Raises
    ------
    InvalidArgument, InvalidType
        The argument is named: not a shape, or not slices within the volume.

    Examples
    --------
    >>> boundary_flags((slice(0, 4), slice(2, 6)), (8, 6))
    [True, False, False, True]
    """
    shape = shape_of(volume_shape, "volume_shape")
    tile_at(slices, shape, argument="slices")
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
    lengths = shape_of(shape, "shape")
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
        Width of the tile's overlap at each face.
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


@dataclass(frozen=True)
class Tiling:
    """The blocks of a grid as tiles, each with its share of the overlap with its neighbours.

    Parameters
    ----------
    grid
        The blocks.
    overlap
        Voxels that neighbouring tiles share along each axis, at most the shortest block.

    Examples
    --------
    >>> tiling = Tiling(BlockGrid((8,), (4,)), (2,))
    >>> tiling.tile(0), tiling.tapers(tiling.tile(0))
    (Region(start=(0,), stop=(5,)), ((0, 2),))
    """

    grid: BlockGrid
    overlap: tuple[int, ...]

    def __bool__(self) -> bool:
        """Whether any tiles overlap."""
        return any(self.overlap)

    def tile(self, number: int) -> Region:
        """A block with its share of the overlap with each neighbour."""
        core = self.grid.region(number)
        return Region(
            tuple(max(0, a - o // 2) for a, o in zip(core.start, self.overlap, strict=True)),
            tuple(
                min(n, b + o - o // 2)
                for b, o, n in zip(core.stop, self.overlap, self.grid.shape, strict=True)
            ),
        )

    def tapers(self, tile: Region) -> Tapers:
        """Width of the overlap at each face of a tile."""
        return tuple(
            (o if a > 0 else 0, o if b < n else 0)
            for a, b, o, n in zip(tile.start, tile.stop, self.overlap, self.grid.shape, strict=True)
        )

    def reaching(self, core: Region) -> list[int]:
        """Numbers of the tiles that share voxels with a block, ascending."""
        near = self.grid.touching(core.grow(self.overlap, within=self.grid.shape))
        return [number for number in near if self.tile(number).intersect(core).size]

    def blended(
        self, core: Region, flow_of_tile: Callable[[int], npt.NDArray[Any]]
    ) -> npt.NDArray[np.float32]:
        """The flow of a block from those of the tiles that reach it, in their order.

        Vectors get the mean length of the tiles' vectors: 1, except where diffusion has died out
        and the whole volume's field is shorter too.
        """
        total = np.zeros((len(core.shape) + 1, *core.shape))  # the vectors, and their lengths
        weights = np.zeros(core.shape)
        for number in self.reaching(core):
            tile, flow = self.tile(number), flow_of_tile(number)
            norms = np.sqrt((flow.astype(np.float64) ** 2).sum(axis=0))
            values = np.concatenate([flow, norms[None]])
            tapers = self.tapers(tile)
            add_weighted(total, weights, core, tile=tile, tapers=tapers, values=values)
        lengths = (total[-1] / weights).astype(np.float32)
        blended: npt.NDArray[np.float32] = unit_vectors(total[:-1]) * lengths
        return blended


def tiling_of(grid: BlockGrid, overlap: Any) -> Tiling:
    """The tiles of a grid with some overlap.

    Raises
    ------
    InvalidArgument, InvalidType
        Not lengths, or longer than the shortest block.

    Examples
    --------
    >>> tiling_of(BlockGrid((8, 8, 8), (4, 4, 4)), 2).overlap
    (2, 2, 2)
    """
    shared = as_lengths(overlap, argument="overlap", axes=len(grid.shape), least=0)
    shortest = tuple(
        min(c) if len(c) > 1 else n for c, n in zip(grid.chunks, grid.shape, strict=True)
    )
    if any(o > s for o, s, c in zip(shared, shortest, grid.counts, strict=True) if c > 1):
        raise InvalidArgument(
            "overlap",
            overlap,
            f"at most the shortest block, {shortest}, along every axis",
            "Use larger blocks.",
        )
    return Tiling(grid, shared)
