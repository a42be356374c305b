"""Models applied to tiles, and tiles blended into blocks: the functions that tasks run."""

from __future__ import annotations

import math
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.delayed import delayed

from topo_dask.config import BACKENDS, choice
from topo_dask.errors import InvalidArgument, InvalidType, TaskFailed
from topo_dask.graph.blocks import Source, assemble
from topo_dask.graph.fuse import unit_vectors
from topo_dask.graph.parts import made_of_halves
from topo_dask.graph.stitch import numbered
from topo_dask.graph.tiles import TileGrid, TilePlan, Touching
from topo_dask.grid import Region, as_lengths
from topo_dask.kernels.backends import DeviceKernels, Kernels, kernels_for

Array = npt.NDArray[Any]
Read = Callable[[Region], Array]
Results = Iterator[tuple[int, Array]]

TILE_BLENDS = ("cosine", "linear", "mean", "max", "nearest")
MOST_HELD = 1 << 22
"""Largest array of sums that a thread keeps for its next block: 32 MiB."""
BEYOND = ("reflect", "edge", "zero", "clip")
IDS = ("keep", "apart")


# ------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class TileSettings:
    """How tiles are computed and blended.

    Parameters
    ----------
    blend
        One of `TILE_BLENDS`.
    normalise
        Scale the blended vectors (along the channels) to length 1.
    batch
        Tiles a call of the model; ``None`` for one, without a batch axis.
    pass_origin
        Call the model with ``origin=``, the index of the array's first voxel in the image.
    beyond
        What context beyond the image holds, one of `BEYOND`; "clip" for nothing.
    channels
        Channels of the result; ``None`` for no channel axis.
    dtype
        Of the result.
    ids
        "keep" what the model returns, or keep the ids of tiles "apart", see `ids_apart`.
    backend
        What blends, see `topo_dask.kernels.backends`; the model runs where it runs. It changes no
        byte of the result, so it counts neither where settings are compared nor in fingerprints.
    """

    blend: str = "cosine"
    normalise: bool = False
    batch: int | None = None
    pass_origin: bool = False
    beyond: str = "reflect"
    channels: int | None = None
    dtype: str | None = None
    ids: str = "keep"
    backend: str = field(default="auto", compare=False)

    def __post_init__(self) -> None:
        choice("backend", self.backend, BACKENDS)
        for name, allowed in (("blend", TILE_BLENDS), ("beyond", BEYOND), ("ids", IDS)):
            if getattr(self, name) not in allowed:
                raise InvalidArgument(
                    name, repr(getattr(self, name)), f"one of: {', '.join(allowed)}"
                )
        if self.ids == "apart" and self.blend != "nearest":
            raise InvalidArgument(
                "ids",
                f"'apart' with blend={self.blend!r}",
                "'apart' only with blend='nearest'",
                "Labels can not be averaged.",
            )
        for name in ("batch", "channels"):
            value = getattr(self, name)
            if value is not None:
                as_lengths(value, argument=name, axes=1, least=1)
        if self.dtype is not None:
            self._check_dtype(self.dtype)
            if self.normalise and (self.channels or 0) < 2:
                raise InvalidArgument(
                    "normalise",
                    f"True for {self.channels or 'no'} channels",
                    "vectors: two channels or more",
                )

    def _check_dtype(self, dtype: str) -> None:
        kind = np.dtype(dtype).kind
        if kind not in "biuf":
            raise InvalidType("dtype", f"{dtype}", "booleans, whole or real numbers")
        if self.normalise and kind != "f":
            raise InvalidType("normalise", f"True for {dtype}", "a model that returns floats")

    def with_ids_apart(self, tiles: TileGrid) -> TileSettings:
        """The same with a dtype that can hold the ids of all tiles, see `ids_apart`."""
        most = len(tiles) * math.prod(tiles.largest)
        if self.dtype is None:
            return replace(self, dtype="uint32" if most < 2**32 else "uint64")
        kind = np.dtype(self.dtype)
        if kind.kind not in "iu" or np.iinfo(kind).max < most:
            raise InvalidArgument(
                "dtype",
                self.dtype,
                f"whole numbers up to {most}, for the ids of all tiles",
                "Leave it out.",
            )
        return self

    @property
    def leading(self) -> tuple[int, ...]:
        """Axes of the result before the spatial ones."""
        return () if self.channels is None else (self.channels,)


def _place(region: Region) -> str:
    return f"the tile {region}"


def model_input(
    tiles: TileGrid, tile: Region, block: Array, region: Region, beyond: str
) -> tuple[Array, tuple[int, ...], tuple[int, ...]]:
    """What a model sees of a tile.

    Parameters
    ----------
    tiles, tile
        The tile, and all of them.
    block, region
        Part of the image ``[..., *axes]`` that holds it and its context, and where that lies.
    beyond
        One of `BEYOND`.

    Returns
    -------
    A copy (a model may work in place), the index of its first voxel in the image, and the width
    of the context before the tile along each axis.
    """
    read = tile.grow(tiles.context, within=tiles.shape) if any(tiles.context) else tile
    inside: tuple[Any, ...] = (..., *read.relative_to(region.start).slices)
    origin, before = read.start, tuple(a - b for a, b in zip(tile.start, read.start, strict=True))
    if beyond == "clip" or not any(tiles.context):
        return block[inside].copy(), origin, before
    missing = [
        (c - (a - r), c - (s - b))
        for c, a, b, r, s in zip(
            tiles.context, tile.start, tile.stop, read.start, read.stop, strict=True
        )
    ]
    origin = tuple(a - c for a, c in zip(tile.start, tiles.context, strict=True))
    if not any(map(any, missing)):
        return block[inside].copy(), origin, tiles.context
    widths = [(0, 0)] * (block.ndim - len(missing)) + missing
    mode: Any = "constant" if beyond == "zero" else beyond
    return np.pad(block[inside], widths, mode=mode), origin, tiles.context


def _checked(values: Any, seen: Array, tile: Region, settings: TileSettings, axes: int) -> Array:
    """A model's result as an array, if it is what it must be."""
    result = np.asarray(values)
    spatial = result.shape[result.ndim - axes :] if result.ndim >= axes else ()
    allowed = {tile.shape, seen.shape[seen.ndim - axes :]}
    if settings.dtype is None:
        fits = spatial in allowed and result.ndim in (axes, axes + 1)
        leading = "no or one axis of channels"
    else:
        fits = spatial in allowed and result.shape[: result.ndim - axes] == settings.leading
        leading = (
            "no channel axis" if settings.channels is None else f"{settings.channels} channels"
        )
    if not fits or 0 in result.shape:
        shapes = " or ".join(str(shape) for shape in sorted(allowed))
        raise InvalidArgument(
            "model",
            f"a result of shape {result.shape} for {_place(tile)}",
            f"the shape {shapes}, with {leading} before it",
            "Declare channels= and dtype=, or mend the model.",
        )
    if settings.dtype is None:
        TileSettings(dtype=None)._check_dtype(str(result.dtype))
    elif settings.ids == "apart":
        if result.dtype.kind not in "biu":
            raise InvalidType(
                "model",
                f"a result of dtype {result.dtype} for {_place(tile)}",
                "whole numbers: labels",
                "Pass ids='keep' if these are none.",
            )
    elif result.dtype != np.dtype(settings.dtype):
        raise InvalidType(
            "model",
            f"a result of dtype {result.dtype} for {_place(tile)}",
            f"{settings.dtype}, as declared or as another tile gave",
            "Let the model return one dtype, or declare it with dtype=.",
        )
    return result


def ids_apart(labels: Array, number: int, tiles: TileGrid, settings: TileSettings) -> Array:
    """A tile's labels with ids that no other tile has.

    Parameters
    ----------
    labels
        ``[*channels, *tile shape]`` of whole numbers; 0 is background.
    number, tiles
        Which tile: its ids come after number times the voxels of the largest tile.
    settings
        With a known dtype.

    Raises
    ------
    InvalidData
        Negative labels.

    Examples
    --------
    >>> from topo_dask.graph.tiles import tile_grid
    >>> settings = TileSettings("nearest", dtype="uint32", ids="apart")
    >>> ids_apart(np.array([0, 7, 5, 7]), 2, tile_grid((9,), 4, 1), settings)
    array([ 0, 10,  9, 10], dtype=uint32)
    """
    where = f" for {_place(tiles.region(number))}"
    local, _ = numbered(labels, settings.channels, argument="model", where=where)
    ids = local.astype(settings.dtype)
    ids[local > 0] += number * math.prod(tiles.largest)
    return ids


class _Window:
    """Reads what tiles need of the image: once for a full box of tiles, else tile by tile."""

    def __init__(self, tiles: TileGrid, numbers: Sequence[int], read: Read) -> None:
        self.tiles, self.read = tiles, read
        self.whole: tuple[Array, Region] | None = None
        index = np.unravel_index(np.asarray(numbers, dtype=np.int64), tiles.counts)
        if numbers and math.prod(int(i.max() - i.min()) + 1 for i in index) == len(numbers):
            first, last = tiles.region(numbers[0]), tiles.region(numbers[-1])
            union = Region(first.start, last.stop).grow(tiles.context, within=tiles.shape)
            self.whole = read(union), union

    def part(self, number: int) -> tuple[Array, Region]:
        """An array that holds a tile and its context, and where it lies."""
        if self.whole is not None:
            return self.whole
        region = self.tiles.region(number).grow(self.tiles.context, within=self.tiles.shape)
        return self.read(region), region


def apply_model(
    model: Callable[..., Any],
    tiles: TileGrid,
    numbers: Sequence[int],
    read: Read,
    settings: TileSettings,
) -> Results:
    """Compute tiles: gives (number, ``[*channels, *tile shape]``) without context, in order.

    Parameters
    ----------
    model
        NumPy array to NumPy array.
    tiles, numbers
        Which tiles, ascending.
    read
        Gives a region of the image ``[..., *axes]``.
    settings
        See `TileSettings`.

    Raises
    ------
    InvalidArgument, InvalidType
        A result of another shape or dtype; the tile is named.
    TaskFailed
        The model raised; the tiles are named, its exception is the cause.

    Examples
    --------
    >>> from topo_dask.graph.tiles import tile_grid
    >>> tiles, image = tile_grid((5,), 3, 1), np.arange(5)
    >>> read = lambda region: image[region.slices]
    >>> [(n, v.tolist()) for n, v in apply_model(np.negative, tiles, [0, 1], read, TileSettings())]
    [(0, [0, -1, -2]), (1, [-2, -3, -4])]
    """
    axes, window = len(tiles.shape), _Window(tiles, numbers, read)
    size = settings.batch or 1
    waiting: list[tuple[int, Array, tuple[int, ...], tuple[int, ...]]] = []
    places: list[Region] = []

    def computed() -> Results:
        results = _call(model, [w[1] for w in waiting], [w[2] for w in waiting], places, settings)
        for (number, given, _, before), tile, values in zip(waiting, places, results, strict=True):
            result = _checked(values, given, tile, settings, axes)
            if result.shape[result.ndim - axes :] != tile.shape:
                pairs = zip(before, tile.shape, strict=True)
                cut: tuple[Any, ...] = (..., *(slice(a, a + n) for a, n in pairs))
                result = result[cut]
            if settings.ids == "apart":
                result = ids_apart(result, number, tiles, settings)
            yield number, result

    for number in numbers:
        tile = tiles.region(number)
        given, origin, before = model_input(tiles, tile, *window.part(number), settings.beyond)
        if waiting and (len(waiting) == size or waiting[0][1].shape != given.shape):
            yield from computed()
            waiting.clear()
            places.clear()
        waiting.append((number, given, origin, before))
        places.append(tile)
    if waiting:
        yield from computed()


def _call(
    model: Callable[..., Any],
    seen: list[Array],
    origins: list[tuple[int, ...]],
    places: list[Region],
    settings: TileSettings,
) -> Sequence[Any]:
    """The model's results for tiles, one call."""
    given = seen[0] if settings.batch is None else np.stack(seen)
    origin = origins[0] if settings.batch is None else origins
    named = f"the tile {places[0]}" + (f" to {places[-1]}" if len(places) > 1 else "")
    try:
        result = model(given, origin=origin) if settings.pass_origin else model(given)
    except Exception as error:
        failed = TaskFailed(
            "model",
            f"{type(error).__name__}: {error} for {named}",
            "a model that returns",
            "Nothing was published. What other tiles gave is kept: pass resume=True to go on.",
        )
        # Between processes only the text of a traceback survives.
        failed.add_note("".join(traceback.format_exception(error)).rstrip())
        raise failed from error
    if settings.batch is None:
        return [result]
    batch = np.asarray(result)
    if batch.ndim == 0 or len(batch) != len(seen):
        raise InvalidArgument(
            "model",
            f"a result of shape {batch.shape} for a batch of {len(seen)} from {named}",
            "one result for each of the batch, along the first axis",
            "Leave out batch= if the model takes one tile at a time.",
        )
    return list(batch)


# ------------------------------------------------------------------------------------- blocks


Parts = dict[int, Array]
"""By block: the parts of tiles that lie in it, one after the other in one flat array."""


class _Collector:
    """Gathers the parts of one block's tiles that lie in another block, or in itself."""

    def __init__(self, touching: Touching, owner: int, settings: TileSettings) -> None:
        rows = touching.rows(owner)
        self.numbers = [touching.numbers[row] for row in rows.tolist()]
        ends = (touching.sizes[rows].cumsum() * math.prod(settings.leading)).tolist()
        self.ends = [0, *ends]
        self.start, self.stop = touching.start[rows].tolist(), touching.stop[rows].tolist()
        self.flat = np.empty(self.ends[-1], dtype=settings.dtype)

    def pair(self, place: int, tile: Region, values: Array) -> tuple[Array, Array]:
        """The part of a tile here, and the same part of the tile itself."""
        limits = zip(self.start[place], self.stop[place], tile.start, strict=True)
        inside: tuple[Any, ...] = (..., *(slice(a - o, b - o) for a, b, o in limits))
        there = values[inside]
        return self.flat[self.ends[place] : self.ends[place + 1]].reshape(there.shape), there


class BlockParts:
    """What a block's tiles give, cut into parts by the block they lie in.

    Parameters
    ----------
    plan, block
        Whose tiles.
    settings
        With a known dtype.
    """

    def __init__(self, plan: TilePlan, block: int, settings: TileSettings) -> None:
        self.tiles, self.settings = plan.tiles, settings
        self.done: list[int] = []
        self.by_block = {
            target: _Collector(plan.touching(target), block, settings)
            for target in plan.targets(block)
        }
        self.places: dict[int, list[tuple[_Collector, int]]] = {}
        for collector in self.by_block.values():
            for place, number in enumerate(collector.numbers):
                self.places.setdefault(number, []).append((collector, place))

    def add(self, number: int, values: Array) -> None:
        """Copy the parts of a tile ``[*channels, *tile shape]``."""
        tile = self.tiles.region(number)
        for collector, place in self.places[number]:
            here, there = collector.pair(place, tile, values)
            here[...] = there
        self.done.append(number)

    def tile(self, number: int) -> Array:
        """A tile put together again from its parts."""
        tile = self.tiles.region(number)
        values = np.empty((*self.settings.leading, *tile.shape), dtype=self.settings.dtype)
        for collector, place in self.places[number]:
            here, there = collector.pair(place, tile, values)
            there[...] = here
        return values

    @property
    def flat(self) -> Parts:
        """The parts by block."""
        return {target: collector.flat for target, collector in self.by_block.items()}


def fuse_parts(plan: TilePlan, block: int, parts: Parts, settings: TileSettings) -> Array:
    """Blend the parts that lie in a block, in the order of the tiles.

    Parameters
    ----------
    plan, block
        Which block.
    parts
        By the block that computed them, see `BlockParts`.
    settings
        With a known dtype.

    Returns
    -------
    ``[*channels, *block shape]``; 0 where no tile lies. Blocks that a GPU's memory does not hold
    are made of halves.
    """

    def fused(window: Region, backend: str) -> Array:
        blender = _Blender(window.shape, settings, plan, kernels_for(backend))
        for values, there, inside in _pieces(plan, block, parts, window, settings.channels or 1):
            blender.add(values, there, inside)
        return blender.finish().reshape(*settings.leading, *window.shape)

    return made_of_halves(plan.blocks.region(block), fused, settings.backend)


Piece = tuple[Array, tuple[slice, ...], list[tuple[int, slice]]]
"""Values ``[C,Z,Y,X]``, where they lie in a window, and along each axis in which tile and where."""


def _pieces(
    plan: TilePlan, block: int, parts: Parts, window: Region, channels: int
) -> Iterator[Piece]:
    """What the parts that lie in a block give to a window of it, in the order of the tiles."""
    touching, missing = plan.touching(block), 3 - len(window.shape)
    starts = [s.tolist() for s in plan.tiles.starts]
    ends = dict.fromkeys(parts, 0)
    rows = zip(
        touching.owners.tolist(),
        touching.index.tolist(),
        touching.start.tolist(),
        touching.stop.tolist(),
        strict=True,
    )
    for owner, index, start, stop in rows:
        shape = [1] * missing + [b - a for a, b in zip(start, stop, strict=True)]
        begin = ends[owner]
        ends[owner] = begin + channels * math.prod(shape)
        there, cut, inside = [slice(0, 1)] * missing, [slice(None)] * (1 + missing), []
        limits = zip(index, start, stop, starts, window.start, window.stop, strict=True)
        for i, a, b, first, low, high in limits:
            one, end = max(a, low), min(b, high)
            there.append(slice(one - low, end - low))
            cut.append(slice(one - a, end - a))
            inside.append((i, slice(one - first[i], end - first[i])))
        if all(place.start < place.stop for place in there):
            values = parts[owner][begin : ends[owner]].reshape(channels, *shape)
            yield values[tuple(cut)], (slice(None), *there), inside


_held = threading.local()


def _scratch(dtype: np.dtype[Any], size: int) -> npt.NDArray[Any]:
    """Memory for sums, kept by each thread: getting it anew costs as much as adding."""
    if size > MOST_HELD:
        return np.empty(size, dtype)
    held: npt.NDArray[Any] | None = getattr(_held, dtype.name, None)
    if held is None or held.size < size:
        held = np.empty(size, dtype)
        setattr(_held, dtype.name, held)
    return held[:size]


class _Blender:
    """Adds the parts of tiles into one block, which stays where the kernels compute."""

    def __init__(
        self, size: tuple[int, ...], settings: TileSettings, plan: TilePlan, kernels: Kernels
    ) -> None:
        assert settings.dtype is not None
        self.kernels = kernels
        shape = (settings.channels or 1, *(1,) * (3 - len(size)), *size)
        self.settings, self.dtype = settings, np.dtype(settings.dtype)
        self.blend, self.kept = settings.blend, settings.blend in ("max", "nearest")
        self.everything, axes = plan.tiles.everything, len(plan.tiles.shape)
        nearest = self.blend == "nearest"
        # Axes that the image lacks have length 1: nothing before them, no distance, all weight.
        none: list[Array] = [np.zeros(1, dtype=np.int64 if nearest else float)] * (3 - axes)
        self.missing = (none if nearest else [np.ones(1)] * (3 - axes), none)
        self.along = plan.along(self.blend)
        # numba knows no float16.
        self.working = np.dtype({"e": "float32", "?": "uint8"}.get(self.dtype.char, self.dtype))
        if self.kept:
            self.total: Any = kernels.zeros(shape, dtype=self.working)
            self.state: Any = kernels.zeros(shape[1:], dtype=np.int64 if nearest else bool)
            if nearest:
                self.state[...] = np.iinfo(np.int64).max
            return
        # float32 holds all values of small types, and their means to half a unit.
        small = self.dtype.itemsize <= 2
        sums = np.dtype(np.float32 if small else np.float64)
        if isinstance(kernels, DeviceKernels):
            self.total = kernels.zeros(shape, dtype=sums)
        else:
            self.total = _scratch(sums, math.prod(shape)).reshape(shape)
        if self.everything:
            self.before = plan.before(self.blend)
        else:
            self.total[...] = 0
            self.state = kernels.zeros(shape[1:])

    def add(self, values: Array, there: tuple[slice, ...], inside: list[tuple[int, slice]]) -> None:
        """Add a part, which lies ``there`` in the block and ``inside`` its tile (number, part)."""
        kernels, total = self.kernels, self.total[there]
        values = kernels.there(values.astype(self.working, copy=False))
        if self.blend == "max":
            kernels.keep_largest(total, self.state[there[1:]], values)
            return
        along = self._three(self.along, self.missing[0], inside)
        if self.blend == "nearest":
            kernels.keep_nearest(total, self.state[there[1:]], values, along)
        elif self.everything:
            before = self._three(self.before, self.missing[1], inside)
            kernels.add_next_tile(total, values, along, before)
        else:
            kernels.add_tile(total, self.state[there[1:]], values, along)

    @staticmethod
    def _three(
        vectors: tuple[Array, ...], missing: list[Array], inside: list[tuple[int, slice]]
    ) -> tuple[Array, Array, Array]:
        three = [*missing, *(v[place] for v, place in zip(vectors, inside, strict=True))]
        return three[0], three[1], three[2]

    def finish(self) -> Array:
        """The block in the result's dtype, in memory."""
        whole = not self.kept and self.dtype.kind in "iub"
        made = self.kernels.rounded(self.total, self.working) if whole else self.total
        total: Array = self.kernels.in_memory(made)
        if self.settings.normalise:
            vectors = total.astype(np.float64, copy=False)
            return unit_vectors(vectors).astype(self.dtype, copy=False)
        return total.view(self.dtype) if whole else total.astype(self.dtype)


def memory_of_tiles(voxels: Sequence[int], channels: int, itemsize: int) -> int:
    """Bytes that a block and its tiles take at most, without what is read and the model itself.

    Parameters
    ----------
    voxels
        Of the tiles that the block computes, of one tile, of the parts of tiles that lie in the
        block, and of the block.
    channels, itemsize
        Of the result.
    """
    own, tile, parts, block = voxels
    kept = itemsize * (own + parts + 2 * block)
    return channels * (kept + 3 * max(itemsize, 4) * tile + 8 * block) + 16 * block


def device_memory_of_tiles(block: int, part: int, channels: int, itemsize: int) -> int:
    """The same of a GPU: sums, weights, the result, and what one tile gives to the block."""
    return channels * ((8 + itemsize) * block + max(itemsize, 4) * part) + 8 * block


def probed(settings: TileSettings, values: Array, axes: int) -> TileSettings:
    """Settings with the channels and dtype that one tile gave."""
    channels = values.shape[0] if values.ndim > axes else None
    return replace(settings, channels=channels, dtype=str(values.dtype))


@dataclass(frozen=True, eq=False)
class TileJob:
    """A model, the tiles it is applied to, the blocks these are blended into.

    Parameters
    ----------
    model
        NumPy array to NumPy array.
    plan, settings
        The layout, and how tiles are computed and blended; with a known dtype.
    known
        Results that are there already, by tile.
    """

    model: Callable[..., Any]
    plan: TilePlan
    settings: TileSettings
    known: dict[int, Array]

    def parts(self, block: int, read: Read) -> Parts:
        """Compute a block's tiles and cut them into parts."""
        parts = BlockParts(self.plan, block, self.settings)
        own = self.plan.own(block)
        for number in own:
            if number in self.known:
                parts.add(number, self.known[number])
        left = [number for number in own if number not in self.known]
        for number, values in apply_model(self.model, self.plan.tiles, left, read, self.settings):
            parts.add(number, values)
        return parts.flat

    def fuse(self, block: int, owners: Sequence[int], parts: Sequence[Array]) -> Array:
        """Blend a block; see `fuse_parts`."""
        return fuse_parts(self.plan, block, dict(zip(owners, parts, strict=True)), self.settings)

    def owners(self, position: int) -> list[int]:
        """The blocks that compute tiles for a block of the order, itself too if it does."""
        block = int(self.plan.order[position])
        others = [int(self.plan.order[p]) for p in self.plan.after[position]]
        return [*others, block] if self.plan.own(block) else others


def map_array(job: TileJob, image: Array) -> Array:
    """The whole image in memory, block by block."""
    plan, settings = job.plan, job.settings
    out: Array = np.zeros((*settings.leading, *plan.blocks.shape), dtype=settings.dtype)
    waiting: dict[tuple[int, int], Array] = {}

    def read(region: Region) -> Array:
        inside: tuple[Any, ...] = (..., *region.slices)
        part: Array = image[inside]
        return part

    for position, block in enumerate(plan.order.tolist()):
        for target, flat in job.parts(block, read).items():
            waiting[block, target] = flat
        owners = job.owners(position)
        parts = [waiting.pop((owner, block)) for owner in owners]
        there: tuple[Any, ...] = (..., *plan.blocks.region(block).slices)
        out[there] = job.fuse(block, owners, parts)
    return out


def map_lazily(job: TileJob, image: da.Array) -> da.Array:
    """The same as a dask array; each block's tiles are one task, blending them another."""
    plan, source = job.plan, Source.of(image)
    shared = delayed(job, traverse=False)
    parts: dict[int, Any] = {}
    for block in plan.order.tolist():
        regions = [plan.tiles.region(n) for n in plan.own(block) if n not in job.known]
        if regions:
            union = Region(
                tuple(min(r.start[a] for r in regions) for a in range(len(plan.blocks.shape))),
                tuple(max(r.stop[a] for r in regions) for a in range(len(plan.blocks.shape))),
            ).grow(plan.tiles.context, within=plan.tiles.shape)
            parts[block] = delayed(_lazy_parts)(shared, block, source.read(union), union)
        elif plan.own(block):
            parts[block] = delayed(_lazy_parts)(shared, block, None, None)
    blocks: dict[int, Any] = {}
    for position, block in enumerate(plan.order.tolist()):
        owners = job.owners(position)
        blocks[block] = delayed(_lazy_fuse)(
            shared, block, owners, [parts[o][block] for o in owners]
        )
    settings = job.settings
    every = [
        blocks.get(n)
        if n in blocks
        else delayed(np.zeros)((*settings.leading, *region.shape), settings.dtype)
        for n, region in enumerate(plan.blocks)
    ]
    assert settings.dtype is not None
    return assemble(every, plan.blocks, dtype=settings.dtype, leading=settings.leading)


def _lazy_parts(job: TileJob, block: int, array: Array | None, held: Region | None) -> Parts:
    def read(region: Region) -> Array:
        assert array is not None
        assert held is not None
        inside: tuple[Any, ...] = (..., *region.relative_to(held.start).slices)
        part: Array = array[inside]
        return part

    return job.parts(block, read)


def _lazy_fuse(job: TileJob, block: int, owners: list[int], parts: list[Array]) -> Array:
    return job.fuse(block, owners, parts)
