"""Overlapping tiles of an image, and the plan by which blocks are made of them.

A tile is computed once, by the block that owns it. Of the blocks that a tile touches along an axis
the first with an even number owns it; so blocks with odd numbers wait for their neighbours, those
with even numbers for nobody (but where tiles are longer than two blocks), and nothing waits in a
chain. The parts of a tile that lie in other blocks are handed to them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.errors import InvalidArgument
from topo_dask.graph.alive import fast_to_slow, planned_alive
from topo_dask.graph.area import range_counts
from topo_dask.graph.fuse import LASTS, axis_tiles
from topo_dask.grid import BlockGrid, Region, as_lengths
from topo_dask.kernels.cpu.blend import axis_weight

INT = npt.NDArray[np.int64]
Array = npt.NDArray[Any]


CHUNK = {1: 1 << 20, 2: 1024, 3: 128}
"""Longest side of a chunk, by the number of axes."""
BLOCK_VOXELS = 1 << 22
"""Voxels of a block of several chunks: 64 MiB of sums a channel."""
MOST_TILES = 64
"""Tiles a block, where many small ones share the cost of a task."""
ALIVE_SHARE = 0.01
"""Tiles alive at once, as a share of all, that blocks are chosen for."""


@dataclass(frozen=True, eq=False)
class TileGrid:
    """Overlapping tiles of an image, and which of them count. Made by `tile_grid`.

    Parameters
    ----------
    shape
        Of the image, without channels.
    starts, stops
        Of the tiles along each axis, ascending.
    context
        Voxels around a tile that the model sees and whose results are thrown away.
    selected
        Which tiles are computed.
    """

    shape: tuple[int, ...]
    starts: tuple[INT, ...]
    stops: tuple[INT, ...]
    context: tuple[int, ...]
    selected: npt.NDArray[np.bool_]

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of tiles along each axis."""
        return tuple(map(len, self.starts))

    @property
    def largest(self) -> tuple[int, ...]:
        """Shape of the largest tile."""
        return tuple(int((b - a).max()) for a, b in zip(self.starts, self.stops, strict=True))

    def __len__(self) -> int:
        return math.prod(self.counts)

    @cached_property
    def computed(self) -> int:
        """Number of tiles that are computed."""
        return int(self.selected.sum())

    @cached_property
    def everything(self) -> bool:
        """Whether all tiles are computed."""
        return bool(self.selected.all())

    def region(self, number: int) -> Region:
        """The tile with this number (C order), without context."""
        start, stop = [], []
        for (first, end), count in zip(self._limits, reversed(self.counts), strict=True):
            number, i = divmod(number, count)
            start.append(first[i])
            stop.append(end[i])
        return Region(tuple(start[::-1]), tuple(stop[::-1]))

    @cached_property
    def _limits(self) -> list[tuple[list[int], list[int]]]:
        """First voxels and ends along the axes, last axis first."""
        pairs = zip(reversed(self.starts), reversed(self.stops), strict=True)
        return [(a.tolist(), b.tolist()) for a, b in pairs]

    def only(self, selected: npt.NDArray[np.bool_]) -> TileGrid:
        """The same grid with fewer tiles that count."""
        return TileGrid(self.shape, self.starts, self.stops, self.context, self.selected & selected)

    def weights(self, blend: str) -> tuple[npt.NDArray[np.float64], ...]:
        """For each axis the weight of each tile along it, divided by the sum over all tiles."""
        return tuple(
            _normalised(a, b, n, blend)
            for a, b, n in zip(self.starts, self.stops, self.shape, strict=True)
        )

    def before(self, weights: Sequence[Array]) -> tuple[npt.NDArray[np.float64], ...]:
        """For each axis and tile the sum of the weights of earlier tiles, on the tile's voxels."""
        result = []
        for along, starts, stops, n in zip(
            weights, self.starts, self.stops, self.shape, strict=True
        ):
            total, sums = np.zeros(n), np.zeros_like(along)
            for row, new, a, b in zip(sums, along, starts.tolist(), stops.tolist(), strict=True):
                row[: b - a] = total[a:b]
                total[a:b] += new[: b - a]
            result.append(sums)
        return tuple(result)

    def distances(self) -> tuple[INT, ...]:
        """For each axis and tile the squared distance of its voxels to its centre, times 4."""
        return tuple(
            (2 * (a[:, None] + np.arange(int((b - a).max()))) + 1 - (a + b)[:, None]) ** 2
            for a, b in zip(self.starts, self.stops, strict=True)
        )

    def __repr__(self) -> str:
        def cross(lengths: Sequence[int]) -> str:
            return "x".join(map(str, lengths))

        kept = "" if self.computed == len(self) else f"{self.computed} of "
        return f"{kept}{len(self)} tiles of {cross(self.largest)}"


def _linear_weight(length: int, taper: tuple[int, int]) -> npt.NDArray[np.float64]:
    weight = np.ones(length)
    for width, toward in ((taper[0], weight), (taper[1], weight[::-1])):
        reach = min(width, length)
        toward[:reach] *= (np.arange(reach) + 0.5) / max(width, 1)
    return weight


def _normalised(starts: INT, stops: INT, length: int, blend: str) -> npt.NDArray[np.float64]:
    shapes = {"cosine": axis_weight, "linear": _linear_weight}
    weights = np.zeros((len(starts), int((stops - starts).max())))
    shared = np.maximum(stops[:-1] - starts[1:], 0).tolist()
    lengths = (stops - starts).tolist()
    for row, n, low, high in zip(weights, lengths, [0, *shared], [*shared, 0], strict=True):
        row[:n] = shapes[blend](n, (low, high)) if blend in shapes else 1
    places = np.minimum(starts[:, None] + np.arange(weights.shape[1]), length - 1)
    total = np.bincount(places.ravel(), weights=weights.ravel(), minlength=length)
    normal: npt.NDArray[np.float64] = weights / total[places]
    return normal


def tile_grid(
    shape: Sequence[int], tile: Any, overlap: Any = 0, *, context: Any = 0, last: str = "move"
) -> TileGrid:
    """Cut an image into overlapping tiles.

    Parameters
    ----------
    shape
        Of the image, without channels.
    tile, overlap
        Shape of a tile, and the voxels that neighbours share: a number or one for each axis.
    context
        Voxels around each tile that the model sees too.
    last
        "move" or "shrink": what becomes of the last tile of an axis.

    Returns
    -------
    TileGrid
        Every voxel is covered.

    Raises
    ------
    InvalidArgument, InvalidType
        The argument is named.

    Examples
    --------
    >>> tile_grid((40, 50), (16, 16), 4)
    12 tiles of 16x16
    """
    axes = len(shape)
    sides = as_lengths(shape, argument="shape", axes=axes, least=1)
    tiles = as_lengths(tile, argument="tile", axes=axes, least=1)
    shared = as_lengths(overlap, argument="overlap", axes=axes, least=0)
    around = as_lengths(context, argument="context", axes=axes, least=0)
    if any(o >= t for o, t in zip(shared, tiles, strict=True)):
        raise InvalidArgument(
            "overlap",
            overlap,
            f"less than the tile, {tiles}, along every axis",
            "Use larger tiles.",
        )
    if last not in LASTS:
        raise InvalidArgument("last", repr(last), f"one of: {', '.join(LASTS)}")
    along = [axis_tiles(*each, last) for each in zip(sides, tiles, shared, strict=True)]
    starts, stops = tuple(a for a, _ in along), tuple(b for _, b in along)
    return TileGrid(sides, starts, stops, around, np.ones(tuple(map(len, starts)), dtype=bool))


# --------------------------------------------------------------------------------------- plans


def tile_chunks(tiles: TileGrid) -> tuple[int, ...]:
    """Chunk shape of the output: whole steps from tile to tile where they fit.

    Examples
    --------
    >>> tile_chunks(tile_grid((40_000, 40_000), 256, 64)), tile_chunks(tile_grid((99, 500), 99))
    ((960, 960), (99, 198))
    """
    axes = len(tiles.shape)
    longest, most = CHUNK[min(axes, 3)], round(MOST_TILES ** (1 / axes))
    chunks = []
    for starts, n in zip(tiles.starts, tiles.shape, strict=True):
        step = int(starts[1] - starts[0]) if len(starts) > 1 else n
        if len(starts) == 1:
            chunks.append(min(n, longest))
        elif step <= longest:
            # At least four along the axis, so that several workers have something to do.
            chunks.append(min(n, step * min(longest // step, most, -(-len(starts) // 4))))
        else:
            whole = next(d for d in range(longest, 0, -1) if step % d == 0)
            chunks.append(whole if 8 * whole >= longest else step)
    return tuple(chunks)


def tile_blocks(tiles: TileGrid, chunks: Sequence[int], *, ahead: int) -> tuple[int, ...]:
    """Block shape: as many chunks as make a task worth its cost, and keep few tiles alive.

    Parameters
    ----------
    tiles, chunks
        The layout.
    ahead
        How many blocks are under way at most.
    """

    def per_block(blocks: Sequence[int]) -> float:
        return math.prod(
            k * min(b, n) / n for k, b, n in zip(tiles.counts, blocks, tiles.shape, strict=True)
        )

    steps = [
        int(s[1] - s[0]) if len(s) > 1 else n
        for s, n in zip(tiles.starts, tiles.shape, strict=True)
    ]
    # A block is no smaller than the step, or blocks would wait for one another in chains.
    blocks = [c * -(-s // c) for c, s in zip(chunks, steps, strict=True)]
    front = len(tiles) // max(tiles.counts)
    share = ALIVE_SHARE * len(tiles) - 1.25 * front
    enough = min(MOST_TILES, max(1.0, share / ahead), max(1.0, len(tiles) / (2 * ahead)))
    for axis in fast_to_slow(tiles.counts):
        while blocks[axis] < tiles.shape[axis]:
            longer = [*blocks]
            longer[axis] += chunks[axis] * -(-steps[axis] // chunks[axis])
            if per_block(longer) > enough or math.prod(longer) > BLOCK_VOXELS:
                break
            blocks = longer
    return tuple(blocks)


def _owners(starts: INT, stops: INT, edges: INT) -> tuple[INT, INT, INT]:
    """Of each tile of an axis: the first and the last block it touches, and its owner."""
    first = np.searchsorted(edges, starts, side="right") - 1
    final = np.searchsorted(edges, stops, side="left") - 1
    even = first + first % 2
    return first, final, np.where(even <= final, even, first)


@dataclass(frozen=True)
class _Axis:
    """One axis of a plan.

    For each block the tiles it owns, those that touch it, and who owns these; for each tile the
    blocks it touches and its owner.
    """

    own_low: INT
    own_high: INT
    touch_low: INT
    touch_high: INT
    first: INT
    final: INT
    owner: INT
    sources: list[list[int]]

    @classmethod
    def of(cls, starts: INT, stops: INT, edges: INT) -> _Axis:
        first, final, owner = _owners(starts, stops, edges)
        blocks = np.arange(len(edges) - 1)
        low = np.searchsorted(final, blocks, side="left")
        high = np.searchsorted(first, blocks, side="right")
        return cls(
            np.searchsorted(owner, blocks, side="left"),
            np.searchsorted(owner, blocks, side="right"),
            low,
            high,
            first,
            final,
            owner,
            [np.unique(owner[a:b]).tolist() for a, b in zip(low, high, strict=True)],
        )


@dataclass(frozen=True, eq=False)
class Touching:
    """The tiles that touch a block, ascending: their parts in it, and who computes them."""

    numbers: list[int]
    index: INT
    owners: npt.NDArray[np.int64]
    start: INT
    stop: INT

    @cached_property
    def sizes(self) -> INT:
        """Voxels of each part."""
        sizes: INT = (self.stop - self.start).prod(axis=1)
        return sizes

    def rows(self, owner: int) -> INT:
        """Rows of the tiles that one block computes."""
        return np.flatnonzero(self.owners == owner)


@dataclass(frozen=True, eq=False)
class TilePlan:
    """Which block computes which tiles, what it needs of others, and in which order.

    Parameters
    ----------
    tiles
        The tiles.
    blocks
        The blocks of the output, each written by one task.

    Examples
    --------
    >>> tiles = tile_grid((64, 64), 16, 4)
    >>> plan = TilePlan(tiles, BlockGrid((64, 64), (24, 24)))
    >>> plan.order.tolist(), plan.after[:3], plan.alive(ahead=2)
    ([0, 2, 1, 6, 3, 8, 5, 7, 4], [[], [], [0, 1]], 14)
    """

    tiles: TileGrid
    blocks: BlockGrid

    @cached_property
    def axes(self) -> tuple[_Axis, ...]:
        """What one axis at a time says."""
        limits = zip(self.tiles.starts, self.tiles.stops, self.blocks.edges, strict=True)
        return tuple(_Axis.of(*each) for each in limits)

    @cached_property
    def order(self) -> INT:
        """Numbers of the blocks that tiles touch, so that parts wait as short as possible.

        A block comes as soon as those it waits for have come; even ones in C order, but for the
        axis with the most tiles, which comes last: few lie along the front then.
        """
        low, high = [x.touch_low for x in self.axes], [x.touch_high for x in self.axes]
        touched = range_counts(self.tiles.selected, low, high) > 0
        index = np.nonzero(touched)
        keys: list[Array] = [np.sum([i % 2 for i in index], axis=0)]
        for axis in fast_to_slow(self.tiles.counts):
            i, count = index[axis], self.blocks.counts[axis]
            keys.append(np.minimum(i + i % 2, (count - 1) // 2 * 2))
        by = np.lexsort((np.ravel_multi_index(index, self.blocks.counts), *keys))
        return np.ravel_multi_index(index, self.blocks.counts)[by].astype(np.int64)

    @cached_property
    def after(self) -> list[list[int]]:
        """For each block in the order the positions of those that compute tiles for it."""
        place = {number: position for position, number in enumerate(self.order.tolist())}
        strides = [math.prod(self.blocks.counts[a + 1 :]) for a in range(len(self.axes))]
        index = np.stack(np.unravel_index(self.order, self.blocks.counts), axis=1)
        result = []
        for block, number in zip(index.tolist(), self.order.tolist(), strict=True):
            needed: list[int] = []
            sources = [x.sources[i] for x, i in zip(self.axes, block, strict=True)]
            if all(len(s) == 1 and s[0] == i for s, i in zip(sources, block, strict=True)):
                result.append(needed)
                continue
            for owner in itertools.product(*sources):
                other = sum(i * s for i, s in zip(owner, strides, strict=True))
                if other != number and (self.tiles.everything or self._shared(owner, block)):
                    needed.append(place[other])
            result.append(sorted(needed))
        return result

    def _shared(self, owner: Sequence[int], block: Sequence[int]) -> bool:
        along = tuple(
            slice(max(x.own_low[i], x.touch_low[j]), min(x.own_high[i], x.touch_high[j]))
            for x, i, j in zip(self.axes, owner, block, strict=True)
        )
        return bool(self.tiles.selected[along].any())

    def lives(self, began: Array, ended: Array) -> tuple[Array, Array]:
        """When each computed tile is first and last needed: its owner begins, its last block ends.

        Parameters
        ----------
        began, ended
            Of each block in the order: positions, or times.
        """
        grids = []
        for values in (began, ended):
            grids.append(np.zeros(len(self.blocks), dtype=values.dtype))
            grids[-1][self.order] = values
        begin, end = (g.reshape(self.blocks.counts) for g in grids)
        index = np.nonzero(self.tiles.selected)
        first = [x.first[i] for x, i in zip(self.axes, index, strict=True)]
        final = [x.final[i] for x, i in zip(self.axes, index, strict=True)]
        owner = tuple(x.owner[i] for x, i in zip(self.axes, index, strict=True))
        reach = [range(int((b - a).max(initial=0)) + 1) for a, b in zip(first, final, strict=True)]
        last = end[owner]
        for step in itertools.product(*reach):
            places = zip(first, final, step, strict=True)
            last = np.maximum(last, end[tuple(np.minimum(a + s, b) for a, b, s in places)])
        return begin[owner], last

    def alive(self, *, ahead: int) -> int:
        """Most tiles alive at once: computed or under way, and not yet in every block they touch.

        Parameters
        ----------
        ahead
            No block is begun so many behind the first unfinished one.
        """
        positions = np.arange(len(self.order))
        return planned_alive(*self.lives(positions, positions), ahead=ahead)

    def along(self, blend: str) -> tuple[Array, ...]:
        """For each axis and tile what a blend needs of its voxels: weights, or distances."""
        if blend not in self._along:
            self._along[blend] = (
                self.tiles.distances() if blend == "nearest" else self.tiles.weights(blend)
            )
        return self._along[blend]

    def before(self, blend: str) -> tuple[Array, ...]:
        """For each axis and tile the weights of earlier tiles, see `TileGrid.before`."""
        name = f"before {blend}"
        if name not in self._along:
            self._along[name] = self.tiles.before(self.along(blend))
        return self._along[name]

    @cached_property
    def _along(self) -> dict[str, tuple[Array, ...]]:
        return {}

    def own(self, block: int) -> list[int]:
        """Numbers of the tiles that a block computes, ascending."""
        numbers = self._numbers([(x.own_low, x.own_high) for x in self.axes], block)[0]
        return [int(n) for n in numbers]

    def _numbers(
        self, ranges: Sequence[tuple[INT, INT]], block: int
    ) -> tuple[INT, tuple[INT, ...]]:
        at = np.unravel_index(block, self.blocks.counts)
        box = tuple(slice(low[i], high[i]) for (low, high), i in zip(ranges, at, strict=True))
        inside = np.nonzero(self.tiles.selected[box])
        index = tuple(i + s.start for i, s in zip(inside, box, strict=True))
        return np.ravel_multi_index(index, self.tiles.counts).astype(np.int64), index

    def touching(self, block: int) -> Touching:
        """The tiles that touch a block."""
        numbers, index = self._numbers([(x.touch_low, x.touch_high) for x in self.axes], block)
        region = self.blocks.region(block)
        limits = zip(self.tiles.starts, index, region.start, strict=True)
        start = [np.maximum(s[i], a) for s, i, a in limits]
        limits = zip(self.tiles.stops, index, region.stop, strict=True)
        stop = [np.minimum(s[i], b) for s, i, b in limits]
        owners = [x.owner[i] for x, i in zip(self.axes, index, strict=True)]
        return Touching(
            numbers.tolist(),
            np.stack(index, axis=1),
            np.ravel_multi_index(owners, self.blocks.counts).astype(np.int64),
            np.stack(start, axis=1),
            np.stack(stop, axis=1),
        )

    def targets(self, block: int) -> list[int]:
        """The blocks that the tiles of a block touch, itself among them, ascending."""
        at = np.unravel_index(block, self.blocks.counts)
        reach = []
        for x, i in zip(self.axes, at, strict=True):
            a, b = x.own_low[i], x.own_high[i]
            touched = np.flatnonzero((x.touch_low < b) & (x.touch_high > a))
            reach.append(touched.tolist())
        return [
            int(np.ravel_multi_index(other, self.blocks.counts))
            for other in itertools.product(*reach)
            if self._shared([int(i) for i in at], other)
        ]
