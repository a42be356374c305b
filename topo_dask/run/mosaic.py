"""Placed tiles on disk to one array on disk, block by block."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from topo_dask.errors import (
    InputNotFound,
    InvalidArgument,
    InvalidData,
    InvalidType,
    TopoError,
    may_pass,
)
from topo_dask.graph.alive import measured_alive, planned_alive
from topo_dask.graph.mosaic import (
    MosaicBlocks,
    MosaicSettings,
    PlacedTile,
    Placement,
    check_tiles,
    fuse_block,
    mosaic_array,
    mosaic_blocks,
    place_tiles,
    transform_matrices,
)
from topo_dask.grid import BlockGrid, Region, as_lengths
from topo_dask.plan.tiles import MosaicWork
from topo_dask.run.execute import WINDOW, Order
from topo_dask.run.files import BLOCK, input_mark, save_array, stored
from topo_dask.run.job import (
    Run,
    RunOptions,
    RunResult,
    open_run,
    published_already,
    speed,
    volumes,
)
from topo_dask.run.ledger import fingerprint
from topo_dask.run.tile_table import NpyTile, TiffTile, TileTable, open_tile
from topo_dask.storage import MAX_CHUNK, AnyArray, Geometry, Output, output_chunks

IMAGE_BLOCK = 1024
"""Edge of a block of an image, where none is given, in pixels; and the longest chunk."""

MAX_LISTED = 100
PIECE = 2**25
"""Bytes of a tile that are read at once when it is checked."""

CHECKED_TOGETHER = 16
"""Tiles that one task checks."""


@dataclass(frozen=True)
class MosaicJob:
    """What every task of a run needs to know."""

    settings: MosaicSettings
    grid: BlockGrid
    channels: int
    common: np.dtype[Any]
    out: AnyArray


@dataclass(frozen=True, eq=False)
class BlockTask:
    """One block of the output and the tiles that may reach it, in their order."""

    job: MosaicJob
    number: int
    tiles: Sequence[PlacedTile]
    sources: Sequence[Any]

    def __str__(self) -> str:
        return f"block {self.job.grid.region(self.number)}"


@dataclass(frozen=True, eq=False)
class CheckTask:
    """Some tiles to read once, to see whether they can be read."""

    numbers: Sequence[int]
    sources: Sequence[Any]

    def __str__(self) -> str:
        return f"tiles {self.numbers[0]} to {self.numbers[-1]}"


def _pieces(source: AnyArray) -> Iterator[Region]:
    """Boxes of whole chunks, each of about `PIECE` bytes or of one chunk."""
    box = list(source.shards or source.chunks)
    for axis in reversed(range(source.ndim)):
        room = PIECE // (math.prod(box) * source.dtype.itemsize)
        if room > 1:
            box[axis] = min(source.shape[axis], box[axis] * room)
    return iter(BlockGrid(tuple(source.shape), tuple(box)))


def check_files(task: CheckTask) -> list[str]:
    """Stage check: read tiles once; gives those that cannot be read, and why."""
    wrong = []
    for number, source in zip(task.numbers, task.sources, strict=True):
        try:
            for piece in _pieces(source):
                np.asarray(source[piece.slices])
        except Exception as error:  # whatever a codec may raise
            if may_pass(error):
                error.add_note(f"tile {number} ({_called(source)})")
                raise
            wrong.append(f"tile {number} ({_called(source)}): {type(error).__name__}: {error}")
    return wrong


def fuse_one(task: BlockTask) -> tuple[float, float]:
    """Stage fuse: one block from the parts of the tiles that reach it; when it began and ended."""
    began = time.time()
    job, region = task.job, task.job.grid.region(task.number)
    block = fuse_block(
        region,
        task.tiles,
        task.sources,
        settings=job.settings,
        channels=job.channels,
        common=job.common,
        dtype=job.out.dtype,
    )
    before = (slice(None),) if job.channels else ()
    job.out[(*before, *region.slices)] = block
    return began, time.time()


def fuse_mosaic(
    tiles: Any,
    transforms: Any = None,
    shape: Any = None,
    *,
    output: Any = None,
    order: int = 1,
    blend: str = "cosine",
    overlap: Any = None,
    vector: bool = False,
    unit: bool | None = None,
    spacing: Any = None,
    tile_spacing: Any = None,
    origin: Any = None,
    background: float = 0,
    dtype: Any = None,
    check: bool = True,
    blocks: Any = None,
    work_dir: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    cluster: Any = None,
    progress: bool | None = None,
    zarr_format: int = 3,
    ignore_memory: bool = False,
    backend: str = "auto",
) -> Any:
    """Fuse tiles that lie anywhere, turned, stretched or tilted, into one image or volume.

    Parameters
    ----------
    tiles
        One array for each tile: path (zarr, .npy, TIFF), URL, zarr, dask or NumPy array, of any
        size and number type, ``[Y,X]`` or ``[Z,Y,X]``, with or without channels as first axis.
        Or a table from `read_tile_table`, which says all else.
    transforms
        For each tile a translation ``[n]``, an affine matrix ``[n, n + 1]``, or an affine or
        projective one ``[n + 1, n + 1]``, n being 2 or 3: from a position in the tile, its voxel
        numbers times ``tile_spacing``, to the position in the output, in physical units.
    shape
        Of the output, without channels; ``None`` for all that the tiles cover.
    output
        Path of the zarr array to make; ``None`` for a lazy dask array instead.
    order
        Of the splines that resample: 0 (nearest voxel: for labels), 1 (linear) or 3 (cubic). A
        tile reaches from the centre of its first to that of its last voxel, as in
        `scipy.ndimage.affine_transform`.
    blend
        "cosine" (weights that fall off towards the tile's faces), "mean", "max", or "first" (of
        the tiles, in their order).
    overlap
        Width of the cosine tapers in voxels of the tile; ``None`` for half the tile.
    vector
        The channels are a vector (dz, dy, dx) in voxels of its tile: turn it by the linear part
        of the transform.
    unit
        Give vectors the length 1 where they are not 0; ``None`` for what ``vector`` says.
    spacing, tile_spacing
        Size of a voxel, of the output and of the tiles (one, or one for each tile), one number
        or one for each axis. ``None``: the output's is the smallest of the tiles', the tiles' is
        the output's, 1 where neither is given.
    origin
        Position of the output's first voxel; ``None`` for the lowest that a tile covers.
    background
        The value where no tile is.
    dtype
        Of the output; ``None`` for the type that holds the values of all tiles (float32 at least
        for vectors). Values are rounded and clipped to a type of whole numbers.
    check
        Read every zarr tile once before work starts, so that damaged ones are all found then.
    blocks
        Shape of a block; ``None`` for 128 voxels a side, 1024 of an image.
    work_dir, resume, overwrite, cluster, progress, zarr_format, ignore_memory, backend
        See `RunOptions`.

    Returns
    -------
    RunResult or dask array
        ``.array`` of the result is the zarr array. Its bytes do not depend on blocks or workers.

    Warns
    -----
    UserWarning
        Tiles that touch no voxel of the output, by number.

    Raises
    ------
    TopoError
        One of its kinds, before any work starts, that names the argument.

    Examples
    --------
    >>> left, right = np.full((4, 6), 3.0), np.full((4, 6), 3.0)
    >>> fuse_mosaic([left, right], [(0, 0), (0, 4.5)]).compute()[1]
    array([3., 3., 3., 3., 3., 3., 3., 3., 3., 3.])
    """
    layout = {
        "shape": shape,
        "origin": origin,
        "spacing": spacing,
        "tile_spacing": tile_spacing,
    }
    if isinstance(tiles, TileTable):
        said = {**tiles.options, "tile_spacing": tiles.tile_spacing}
        layout = {k: said.get(k) if v is None else v for k, v in layout.items()}
        transforms = tiles.transforms if transforms is None else transforms
        tiles = tiles.tiles
    options = RunOptions(
        None, work_dir, resume, overwrite, cluster, progress, zarr_format, ignore_memory, backend
    )
    matrices = transform_matrices(_listed(transforms, "transforms"), count=len(_listed(tiles)))
    settings = MosaicSettings(
        axes := matrices.shape[-1] - 1,
        order,
        blend,
        None if overlap is None else as_lengths(overlap, argument="overlap", axes=axes, least=0),
        vector,
        vector if unit is None else unit,
        background,
        options.backend,
    )
    sources = open_tiles(tiles)
    channels, common = check_tiles(
        [tuple(s.shape) for s in sources], [s.dtype for s in sources], axes=axes, vector=vector
    )
    out_type = _out_dtype(dtype, common, settings, channels)
    shapes = [s.shape[-axes:] for s in sources]
    placement = place_tiles(matrices, shapes, **layout)
    _warn_outside(placement, sources)
    grid = _grid(blocks, placement.shape)
    if output is None:
        return mosaic_array(
            sources,
            placement,
            grid,
            settings=settings,
            channels=channels,
            common=common,
            dtype=out_type,
        )
    plan = _Plan(sources, placement, grid, settings, channels, common, out_type)
    return _on_disk(plan, options.output(output, sources), options, check=check)


@dataclass(frozen=True, eq=False)
class _Plan:
    """A mosaic that is checked and ready to be made."""

    sources: list[Any]
    placement: Placement
    grid: BlockGrid
    settings: MosaicSettings
    channels: int
    common: np.dtype[Any]
    dtype: np.dtype[Any]

    @property
    def title(self) -> str:
        shape = "x".join(map(str, self.placement.shape))
        return f"Mosaic of {len(self.sources)} tiles in {shape} voxels"

    def blocks(self) -> MosaicBlocks:
        """The blocks to write; those without a tile are the zeros that a new array holds."""
        return mosaic_blocks(self.placement, self.grid, every=bool(self.settings.background))

    def work(self, options: RunOptions, *, check: bool) -> MosaicWork:
        """What the run takes."""
        files = sum(isinstance(source, zarr.Array) for source in self.sources)
        return MosaicWork(
            self.title,
            self.grid,
            volumes(self.sources),
            len(self.blocks().numbers),
            self.channels,
            self.dtype.itemsize,
            _chunks(self.grid, self.channels),
            self.settings.order,
            checked=(files if check else 0, CHECKED_TOGETHER),
            zarr_format=options.zarr_format,
            backend=options.backend,
        )

    @property
    def mark(self) -> str:
        """Fingerprint of all that the result depends on."""
        placement = self.placement
        return fingerprint(
            "mosaic",
            [_mark(s) for s in self.sources],
            placement.forward.tobytes().hex(),
            [placement.shape, placement.origin, placement.spacing],
            self.settings,
            str(self.dtype),
            self.grid.chunks,
        )


def _on_disk(plan: _Plan, place: Output, options: RunOptions, *, check: bool) -> RunResult:
    mark = plan.mark
    if published_already(place, mark, options):
        return RunResult(place.open(), place.path, plan.title, 0.0, {})
    began = time.monotonic()
    try:
        with open_run(place, options, plan.settings, plan.work(options, check=check)) as run:
            if check:
                _check_files(run, plan.sources, mark)
            sources = [_stored(s, run.work) for s in plan.sources]
            out = place.create(
                ((plan.channels,) if plan.channels else ()) + plan.grid.shape,
                _chunks(plan.grid, plan.channels),
                plan.dtype,
                zarr_format=options.zarr_format,  # type: ignore[arg-type]
            )
            job = MosaicJob(plan.settings, plan.grid, plan.channels, plan.common, out)
            details = _fuse(run, job, replace(plan, sources=sources), mark)
            details["speed"] = speed(int(np.prod(plan.grid.shape)), time.monotonic() - began)
            array = place.publish(
                geometry=_geometry(plan.placement),
                attributes={
                    "fingerprint": mark,
                    "order": plan.settings.order,
                    "blend": plan.settings.blend,
                    "tiles": len(sources),
                },
            )
    except _BrokenTiles as broken:
        if not options.resume:
            place.discard()
        raise broken.error from None
    return RunResult(array, place.path, plan.title, time.monotonic() - began, details)


class _BrokenTiles(Exception):
    """Carries the error out of the run, whose work directory can go."""

    def __init__(self, error: InvalidData) -> None:
        super().__init__(str(error))
        self.error = error


def _check_files(run: Run, sources: Sequence[Any], mark: str) -> None:
    """Read every zarr tile once; what TIFF and .npy files lack was seen when they were opened."""
    numbers = [n for n, s in enumerate(sources) if isinstance(s, zarr.Array)]
    groups = [numbers[i : i + CHECKED_TOGETHER] for i in range(0, len(numbers), CHECKED_TOGETHER)]
    tasks = [CheckTask(group, [sources[n] for n in group]) for group in groups]
    found = run.ledger.run(run.engine, "check", mark, check_files, tasks)
    wrong = [line for lines in found for line in lines]
    if wrong:
        raise _BrokenTiles(
            InvalidData(
                "tiles",
                _list(f"{len(wrong)} of {len(sources)} that cannot be read", wrong),
                "tiles that can be read",
                "Nothing was begun. Mend or leave out these tiles.",
            )
        )


def _fuse(run: Run, job: MosaicJob, plan: _Plan, mark: str) -> dict[str, Any]:
    blocks = plan.blocks()
    placed = [plan.placement.tile(n) for n in range(len(plan.sources))]
    tasks = []
    for number, reach in zip(blocks.numbers.tolist(), blocks.tiles, strict=True):
        sources = [plan.sources[n] for n in reach]
        tasks.append(BlockTask(job, number, [placed[n] for n in reach], sources))
    times = np.full((len(tasks), 2), np.nan)

    def note(position: int, result: Any) -> None:
        times[position] = result

    ahead = WINDOW * run.engine.slots
    run.ledger.run(
        run.engine,
        "fuse",
        mark,
        fuse_one,
        tasks,
        voxels=[job.grid.region(task.number).size for task in tasks],
        order=Order([()] * len(tasks), ahead),
        recorded=note,
    )
    positions = np.arange(len(tasks))
    return {
        "tiles": f"{len(plan.sources)}, at most {max(map(len, blocks.tiles))} in a block",
        "alive, planned": planned_alive(*blocks.lives(positions, positions), ahead=ahead),
        "alive, measured": measured_alive(*blocks.lives(times[:, 0], times[:, 1])),
        "blocks": f"{job.grid!r}, {len(tasks)} of them written",
        **run.where,
    }


# ----------------------------------------------------------------------------------- checks


def _listed(value: Any, argument: str = "tiles") -> Any:
    """A sequence of one entry a tile; refuses none at all."""
    if isinstance(value, (str, bytes, os.PathLike)) or not hasattr(value, "__len__"):
        raise InvalidType(
            argument,
            type(value).__name__,
            "a list with one entry for each tile",
            "Read a table with read_tile_table.",
        )
    if argument == "tiles" and len(value) == 0:
        raise InvalidArgument("tiles", "no tile at all", "one tile or more", "Check the list.")
    return value


def _list(what: str, lines: Sequence[str]) -> str:
    more = f"; and {len(lines) - MAX_LISTED} more" if len(lines) > MAX_LISTED else ""
    return f"{what}: {'; '.join(lines[:MAX_LISTED])}{more}"


def open_tiles(tiles: Any) -> list[Any]:
    """Open all tiles; no voxel is read.

    Raises
    ------
    InputNotFound
        Tiles that are missing or damaged, all of them.
    InvalidArgument, InvalidType
        No tile at all, or something that is no tile.
    """
    opened: list[Any] = []
    wrong: list[tuple[str, TopoError]] = []
    for number, tile in enumerate(_listed(tiles)):
        try:
            opened.append(open_tile(tile))
        except TopoError as error:
            wrong.append((f"tile {number}: {error.came}", error))
    if wrong:
        kinds = {type(error) for _, error in wrong}
        kind = kinds.pop() if len(kinds) == 1 else InputNotFound
        raise kind(
            "tiles",
            _list(f"{len(wrong)} of {len(tiles)} that cannot be used", [w for w, _ in wrong]),
            "tiles that can be read: zarr, TIFF, .npy, dask or NumPy arrays",
            wrong[0][1].do,
        )
    return opened


def _called(source: Any) -> str:
    if isinstance(source, zarr.Array):
        return str(source.store_path)
    return getattr(source, "path", type(source).__name__)


def _warn_outside(placement: Placement, sources: Sequence[Any]) -> None:
    outside = placement.outside
    if outside:
        lines = [f"tile {n} ({_called(sources[n])})" for n in outside]
        warnings.warn(
            _list(f"{len(outside)} of {len(sources)} tiles touch nothing of the output", lines),
            UserWarning,
            stacklevel=3,
        )


def _out_dtype(
    dtype: Any, common: np.dtype[Any], settings: MosaicSettings, channels: int
) -> np.dtype[Any]:
    if settings.unit and not channels:
        raise InvalidArgument(
            "unit", "True for tiles without channels", "tiles of vectors", "Leave it out."
        )
    found: np.dtype[Any] = common
    if settings.unit and common != np.float64:
        found = np.dtype(np.float32)
    if dtype is not None:
        allowed, do = "a NumPy type of whole or real numbers", "Pass e.g. dtype='float32'."
        try:
            found = np.dtype(dtype).newbyteorder("=")
        except TypeError:
            raise InvalidType("dtype", repr(dtype), allowed, do) from None
        if found.kind not in "iuf":
            raise InvalidType("dtype", repr(dtype), allowed, do)
    if found.kind in "iu":
        info, value = np.iinfo(found), settings.background
        if value % 1 or not info.min <= value <= info.max:
            raise InvalidArgument(
                "background",
                repr(value),
                f"a value that {found} can hold",
                "Choose another, or dtype='float32'.",
            )
    return found


def _grid(blocks: Any, shape: tuple[int, ...]) -> BlockGrid:
    edge = BLOCK if len(shape) == 3 else IMAGE_BLOCK
    lengths = as_lengths(
        edge if blocks is None else blocks, argument="blocks", axes=len(shape), least=1
    )
    return BlockGrid(shape, lengths)


def _chunks(grid: BlockGrid, channels: int) -> tuple[int, ...]:
    before = (channels,) if channels else ()
    longest = MAX_CHUNK if len(grid.shape) == 3 else IMAGE_BLOCK
    return before + output_chunks(grid.largest, grid.shape, longest=longest)


def _geometry(placement: Placement) -> Geometry:
    missing = 3 - placement.axes
    scale = (1.0,) * missing + placement.spacing
    origin = (0.0,) * missing + placement.origin
    return Geometry((scale[0], scale[1], scale[2]), (origin[0], origin[1], origin[2]))


# ------------------------------------------------------------------------------------ tiles


def _mark(source: Any) -> str:
    """A text that changes when a tile does."""
    if isinstance(source, (NpyTile, TiffTile)):
        found = os.stat(source.path)
        series = getattr(source, "series", 0)
        return f"{source.path} {series} {found.st_size} {found.st_mtime_ns}"
    return input_mark(source)


def _stored(source: Any, work: Path) -> Any:
    """The same tile where every worker can read it."""
    if isinstance(source, (NpyTile, TiffTile)):
        return source
    if isinstance(source, np.ndarray):
        path = work / "inputs" / f"tile-{input_mark(source)}.npy"
        if not path.exists():
            save_array(path, source)
        return NpyTile(str(path), source.shape, source.dtype)
    return stored(source, work, argument="tile")
