"""Any model over overlapping tiles of an image, blended without seams, in bounded memory."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import dask.array as da
import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import LocalStore

from topo_dask.errors import InvalidArgument, InvalidData, InvalidType
from topo_dask.graph.alive import measured_alive
from topo_dask.graph.area import check_mask, touching_boxes, touching_mask, touching_polygon
from topo_dask.graph.blend import (
    BlockParts,
    TileJob,
    TileSettings,
    apply_model,
    map_array,
    map_lazily,
    probed,
)
from topo_dask.graph.tiles import CHUNK, TileGrid, TilePlan, tile_blocks, tile_chunks, tile_grid
from topo_dask.grid import BlockGrid, Region, as_lengths
from topo_dask.kernels.backends import device_for
from topo_dask.kernels.parallel import available_cores
from topo_dask.plan.tiles import TilesWork
from topo_dask.run.execute import WINDOW, Engine, Order
from topo_dask.run.files import input_mark, load_array, save_array, stored
from topo_dask.run.job import (
    Run,
    RunOptions,
    RunResult,
    geometry_of,
    open_run,
    published_already,
    speed,
    volumes,
)
from topo_dask.run.ledger import fingerprint
from topo_dask.run.models import load_model, model_mark, model_name
from topo_dask.storage import MAX_CHUNK, AnyArray, open_array, output_chunks

Array = npt.NDArray[Any]

KEEP_EVERY_S = 10.0
"""So often the finished tiles of an unfinished block are kept, should its process be killed."""


class Shared:
    """A value that every task needs: pickled once into a file, opened once by each process.

    Parameters
    ----------
    value
        Anything that cloudpickle can pickle, if tasks run in other processes.
    path
        Of the file, written when the first task is sent away.
    digest
        SHA-256 of its content, which travels in the tasks: nothing else is ever unpickled.
    """

    def __init__(self, value: StoredJob, path: Path, digest: str = "") -> None:
        self.value, self.path, self.digest = value, path, digest

    def __reduce__(self) -> tuple[Callable[[str, str], Shared], tuple[str, str]]:
        if not self.digest:
            try:
                content = cloudpickle.dumps(self.value)
            except Exception as error:
                raise InvalidArgument(
                    "model",
                    f"one that cannot be sent to other processes ({error})",
                    "a model that can be pickled",
                    "Pass cluster='threads', or a function that makes its model when first called.",
                ) from error
            partial_file = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
            partial_file.write_bytes(content)
            os.replace(partial_file, self.path)
            self.digest = hashlib.sha256(content).hexdigest()
        return _open_shared, (str(self.path), self.digest)


@lru_cache(maxsize=2)
def _open_shared(path: str, digest: str) -> Shared:
    content = Path(path).read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise InvalidData(
            "work_dir",
            f"{path!r}, which is not what the run wrote there",
            "files as the run left them",
            "Nothing of it was used: find out who writes there, then pass resume=True.",
        )
    return Shared(cloudpickle.loads(content), Path(path), digest)


@dataclass(frozen=True, eq=False)
class StoredJob:
    """What every task of a run needs to know."""

    job: TileJob
    image: Any
    work: Path
    mark: str
    out: AnyArray | None = None

    def read(self, region: Region) -> Array:
        """A region of the image, with all channels."""
        inside = (slice(None),) * (self.image.ndim - len(region.start)) + region.slices
        return np.asarray(self.image[inside])

    def kept(self, tile: int) -> Path:
        """Where a tile's result is kept, if another tile of its block failed."""
        return self.work / f"kept-{self.mark}" / f"{tile}.npy"

    def message(self, owner: int, block: int) -> Path:
        """Where the parts are that one block computed for another."""
        return self.work / "parts" / f"{owner}-{block}.npy"


@dataclass(frozen=True)
class Task:
    """One block."""

    shared: Shared
    position: int

    def __str__(self) -> str:
        plan = self.shared.value.job.plan
        return f"block {plan.blocks.region(int(plan.order[self.position]))}"


@dataclass(frozen=True)
class Probe:
    """One tile, to learn what the model returns."""

    shared: Shared
    tile: int

    def __str__(self) -> str:
        return f"the tile {self.shared.value.job.plan.tiles.region(self.tile)}"


def probe_tile(task: Probe) -> tuple[int | None, str]:
    """Stage probe: compute one tile and keep it; gives its channels and dtype."""
    stored_job = task.shared.value
    job = stored_job.job
    tiles = job.plan.tiles
    ((number, values),) = apply_model(job.model, tiles, [task.tile], stored_job.read, job.settings)
    save_array(stored_job.kept(number), np.ascontiguousarray(values))
    found = probed(job.settings, values, len(tiles.shape))
    assert found.dtype is not None
    return found.channels, found.dtype


def make_block(task: Task) -> tuple[float, float, bool]:
    """Stage tiles: compute a block's tiles, hand parts on, blend.

    Gives when it began and ended, and whether some of its tiles were kept on the way.
    """
    began = time.time()
    here = task.shared.value
    job, plan = here.job, here.job.plan
    block = int(plan.order[task.position])
    mine, kept = _compute(here, block)
    for target, flat in mine.items():
        if target != block:
            save_array(here.message(block, target), flat)
    owners = job.owners(task.position)
    parts = [mine[block] if o == block else load_array(here.message(o, block)) for o in owners]
    assert here.out is not None
    there = (slice(None),) * len(job.settings.leading) + plan.blocks.region(block).slices
    here.out[there] = job.fuse(block, owners, parts)
    return began, time.time(), kept


def _compute(here: StoredJob, block: int) -> tuple[dict[int, Array], bool]:
    """The parts of a block's tiles; if one fails, or they take long, the finished ones are kept."""
    job = here.job
    parts = BlockParts(job.plan, block, job.settings)
    own = job.plan.own(block)
    kept = [n for n in own if here.kept(n).exists()] if here.kept(0).parent.is_dir() else []
    for number in kept:
        parts.add(number, load_array(here.kept(number)))
    left = sorted(set(own) - set(kept))
    saved, since = len(kept), time.monotonic()

    def keep() -> int:
        for number in parts.done[saved:]:
            save_array(here.kept(number), parts.tile(number))
        return len(parts.done)

    try:
        for number, values in apply_model(job.model, job.plan.tiles, left, here.read, job.settings):
            parts.add(number, values)
            if time.monotonic() - since > KEEP_EVERY_S:
                saved, since = keep(), time.monotonic()
    except BaseException:
        keep()
        raise
    return parts.flat, saved > 0


# ---------------------------------------------------------------------------------- arguments


def _open_image(image: Any, tile: Any) -> tuple[Any, int]:
    """The image, and how many of its axes tiles have."""
    in_memory = isinstance(image, (np.ndarray, da.Array))
    array = image if in_memory else open_array(image, argument="image", axes=(1, 2, 3, 4))
    named = len(tile) if isinstance(tile, (Sequence, np.ndarray)) else min(array.ndim, 3)
    if named not in (1, 2, 3) or array.ndim not in (named, named + 1) or 0 in array.shape:
        raise InvalidArgument(
            "image" if named in (1, 2, 3) else "tile",
            f"an image of shape {tuple(array.shape)} for tiles of {named} axes",
            "the axes of the tile, y, x or z, y, x, with one axis of channels before them or none",
            "Pass as many lengths in tile= as the image has axes without its channels.",
        )
    if isinstance(array, da.Array) and any(np.isnan(n) for n in array.shape):
        raise InvalidArgument(
            "image",
            "a dask array with chunks of unknown length",
            "known chunks",
            "Call compute_chunk_sizes() on it first.",
        )
    return array, named


def _stored_chunks(image: Any, axes: int) -> tuple[npt.NDArray[np.bool_], list[tuple[int, int]]]:
    """Which chunks of a zarr array are on disk, and their scale."""
    if not isinstance(image, zarr.Array) or not isinstance(image.store, LocalStore):
        raise InvalidArgument(
            "skip",
            f"'empty' for {type(image).__name__}",
            "'empty' only for zarr arrays on a local or mounted file system",
            "Pass a mask, or a function of the tiles' positions.",
        )
    sides = image.shards or image.chunks
    counts = tuple(-(-n // c) for n, c in zip(image.shape, sides, strict=True))
    root = Path(image.store.root) / image.path
    there = {
        os.path.relpath(os.path.join(folder, name), root)
        for folder, _, names in os.walk(root)
        for name in names
    }
    found = np.zeros(counts, dtype=bool)
    for index in np.ndindex(*counts):
        found[index] = os.path.normpath(image.metadata.encode_chunk_key(index)) in there
    channels = tuple(range(len(counts) - axes))
    flat: npt.NDArray[np.bool_] = np.asarray(found.any(axis=channels))
    return flat, [(1, int(c)) for c in sides[-axes:]]


def _selected(
    tiles: TileGrid, image: Any, *, mask: Any, boxes: Any, polygon: Any, skip: Any
) -> TileGrid:
    """The tiles that touch the area of interest and are not skipped."""
    starts, stops = tiles.starts, tiles.stops
    chosen = [
        n for n, v in (("mask", mask), ("boxes", boxes), ("polygon", polygon)) if v is not None
    ]
    if len(chosen) > 1:
        raise InvalidArgument(chosen[1], f"{' and '.join(chosen)}", "one area of interest at most")
    if mask is not None:
        area = mask if hasattr(mask, "shape") else open_array(mask, argument="mask", axes=(1, 2, 3))
        scale = check_mask(area, tiles.shape)
        if isinstance(area, da.Array):
            area = area.compute()
        tiles = tiles.only(touching_mask(area, starts, stops, scale))
    if boxes is not None:
        tiles = tiles.only(touching_boxes(boxes, starts, stops, tiles.shape))
    if polygon is not None:
        if len(tiles.shape) < 2:
            raise InvalidArgument("polygon", "a polygon for one axis", "an image of 2 or 3 axes")
        tiles = tiles.only(touching_polygon(polygon, starts, stops))
    if not tiles.computed:
        raise InvalidArgument(
            chosen[0],
            "an area that no tile touches",
            f"an area inside the image, {tiles.shape}",
            "Check its axes and scale.",
        )
    if skip is None:
        return tiles
    if isinstance(skip, str) and skip == "empty":
        found, scale = _stored_chunks(image, len(tiles.shape))
        low = tuple(np.maximum(s - c, 0) for s, c in zip(starts, tiles.context, strict=True))
        limits = zip(stops, tiles.context, tiles.shape, strict=True)
        high = tuple(np.minimum(s + c, n) for s, c, n in limits)
        return tiles.only(touching_mask(found, low, high, scale))
    return tiles.only(_not_skipped(tiles, skip))


def _not_skipped(tiles: TileGrid, skip: Any) -> npt.NDArray[np.bool_]:
    allowed = "'empty', or a function of (starts, stops), each [N, axes], to N booleans"
    if not callable(skip):
        raise InvalidType("skip", repr(skip), allowed)
    index = np.nonzero(tiles.selected)
    starts = np.stack([s[i] for s, i in zip(tiles.starts, index, strict=True)], axis=1)
    stops = np.stack([s[i] for s, i in zip(tiles.stops, index, strict=True)], axis=1)
    answer = np.asarray(skip(starts, stops))
    if answer.shape != (len(starts),) or answer.dtype != bool:
        raise InvalidArgument("skip", f"{answer.dtype} of shape {answer.shape}", allowed)
    kept = np.zeros(tiles.counts, dtype=bool)
    kept[index] = ~answer
    return kept


# --------------------------------------------------------------------------------------- runs


def map_tiles(
    model: Any,
    image: Any,
    tile: Any,
    overlap: Any = 0,
    output: Any = None,
    *,
    context: Any = 0,
    last: str = "move",
    blend: str = "cosine",
    ids: str = "keep",
    normalise: bool = False,
    channels: int | None = None,
    dtype: Any = None,
    batch: int | None = None,
    pass_origin: bool = False,
    beyond: str = "reflect",
    mask: Any = None,
    boxes: Any = None,
    polygon: Any = None,
    skip: Any = None,
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
    """Apply a model to overlapping tiles of an image and blend what it gives.

    Each tile is computed once; the result is the same to the bit for any blocks and any cluster.

    Parameters
    ----------
    model
        Any function from a NumPy array ``[*image channels, *tile]`` to one of the same spatial
        shape, with or without channels before it; its name, "module:function"; a PyTorch module
        in evaluation mode; or the path of an .onnx file. (A JAX function is a function like any
        other.) With a ``context`` it may leave that away by itself.
    image
        ``[Y,X]`` or ``[Z,Y,X]``, or with one axis of channels before: path, URL, zarr, dask or
        NumPy array.
    tile, overlap
        Shape of a tile, and the voxels that neighbours share and blend. As many lengths as the
        image has axes without its channels; one number means all axes of the image.
    output
        Path of the zarr array to make. ``None``: a NumPy array for a NumPy array, a lazy dask
        array for a dask array.
    context
        Voxels around each tile that the model sees and whose results are thrown away.
    last
        What becomes of the last tile of an axis: "move" it back to end with the image, or
        "shrink" it.
    blend
        "cosine", "linear" or "mean" of overlapping tiles, the "max", or for labels the "nearest":
        the value of the tile whose centre is nearest.
    ids
        For ``blend="nearest"``. "keep" what the model returns: classes, which mean the same in
        every tile. Or keep them "apart": instance labels, of which each tile has its own. Tile n
        (in C order) of at most V voxels gets the ids from n V + 1 on, in the order of the
        model's; 0 stays 0. ``dtype`` is then that of the result, by itself uint32 or uint64, and
        ``channels`` have labels of their own.
    normalise
        Scale the blended vectors, along the channels, to length 1.
    channels, dtype
        What the model returns: channels (``None`` for no channel axis) and dtype. Without
        ``dtype`` both are taken from one tile.
    batch
        Give the model so many tiles at once, with a batch axis in front.
    pass_origin
        Call the model with ``origin=``: the index of the array's first voxel in the image (for a
        batch one for each).
    beyond
        What context beyond the image holds: "reflect", "edge", "zero", or "clip" for a smaller
        array there.
    mask, boxes, polygon
        Area of interest: compute only tiles that touch it. A mask of the image's axes at any
        scale; a list of boxes (first voxel, end); or the corners (y, x) of a polygon. Elsewhere
        the result is 0.
    skip
        "empty": leave out tiles of which no chunk is on disk. Or a function of tiles' first
        voxels and ends, ``[N, axes]`` each, that says which to leave out.
    blocks
        Shape of the blocks of the output, one task each; chosen by itself.
    work_dir, resume, overwrite, cluster, progress, zarr_format, ignore_memory
        See `RunOptions`.
    backend
        What blends, see `RunOptions`; the result is the same to the bit. The model runs where it
        runs by itself.

    Returns
    -------
    RunResult, or an array where no output is given

    Raises
    ------
    TopoError
        One of its kinds, before any work starts, that names the argument. Later: `TaskFailed` if
        the model raises, `InvalidArgument` or `InvalidType` if it returns another shape or dtype;
        the tile is named, and other tiles' results are kept for ``resume=True``.

    Examples
    --------
    >>> image = np.arange(20.0).reshape(4, 5)
    >>> bool((map_tiles(np.negative, image, (3, 3), 1) == -image).all())
    True
    """
    options = RunOptions(
        None, work_dir, resume, overwrite, cluster, progress, zarr_format, ignore_memory, backend
    )
    function = load_model(model)
    kind = None if dtype is None else str(np.dtype(dtype))
    how = normalise, batch, pass_origin, beyond, channels, kind, ids, options.backend
    settings = TileSettings(blend, *how)
    if channels is not None and dtype is None and ids == "keep":
        raise InvalidArgument(
            "dtype", "None, with channels given", "both or none", "Declare dtype= too."
        )
    array, axes = _open_image(image, tile)
    shape = tuple(int(n) for n in array.shape[-axes:])
    tiles = tile_grid(shape, tile, overlap, context=context, last=last)
    tiles = _selected(tiles, array, mask=mask, boxes=boxes, polygon=polygon, skip=skip)
    if ids == "apart":
        settings = settings.with_ids_apart(tiles)
    sides = None if blocks is None else as_lengths(blocks, argument="blocks", axes=axes, least=1)
    work = _Work(function, array, tiles, settings, sides, options)
    return work.in_memory() if output is None else work.on_disk(output)


@dataclass(frozen=True, eq=False)
class _Work:
    """A checked call of `map_tiles`."""

    model: Callable[..., Any]
    image: Any
    tiles: TileGrid
    settings: TileSettings
    blocks: tuple[int, ...] | None
    options: RunOptions

    def chunks(self) -> tuple[int, ...]:
        """Of the output."""
        if self.blocks is not None:
            longest = MAX_CHUNK if len(self.blocks) == 3 else CHUNK[len(self.blocks)]
            return output_chunks(self.blocks, self.tiles.shape, longest=longest)
        return tile_chunks(self.tiles)

    def plan(self, ahead: int, blocks: Sequence[int] | None = None) -> TilePlan:
        """The plan for so many blocks under way."""
        sides = blocks or self.blocks or tile_blocks(self.tiles, self.chunks(), ahead=ahead)
        return TilePlan(self.tiles, BlockGrid(self.tiles.shape, tuple(sides)))

    def in_memory(self) -> Any:
        """NumPy array to NumPy array, dask array to lazy dask array."""
        if not isinstance(self.image, (np.ndarray, da.Array)):
            raise InvalidArgument(
                "output",
                None,
                "a path, where the image is no NumPy or dask array",
                "Name the zarr array to make, e.g. output='result.zarr'.",
            )
        settings, known = self.settings, {}
        if isinstance(self.image, np.ndarray):
            device_for(settings.backend)  # where there is none, no tile is computed
        if settings.dtype is None and self.tiles.computed:
            first = int(np.flatnonzero(self.tiles.selected)[0])
            ((_, values),) = apply_model(self.model, self.tiles, [first], self._read, settings)
            settings, known = probed(settings, values, len(self.tiles.shape)), {first: values}
        elif settings.dtype is None:
            raise _nothing_to_probe()
        plan = self.plan(WINDOW * available_cores())
        job = TileJob(self.model, plan, settings, known)
        if isinstance(self.image, da.Array):
            return map_lazily(job, self.image)
        return map_array(job, self.image)

    def _read(self, region: Region) -> Array:
        inside = (slice(None),) * (self.image.ndim - len(region.start)) + region.slices
        part = self.image[inside]
        return np.asarray(part.compute() if isinstance(part, da.Array) else part)

    def mark(self) -> str:
        """Fingerprint of what the result depends on."""
        tiles = self.tiles
        selected = hashlib.sha256(np.packbits(tiles.selected).tobytes()).hexdigest()
        layout = [[a.tolist() for a in ends] for ends in (tiles.starts, tiles.stops)]
        return fingerprint(
            "map_tiles",
            input_mark(self.image),
            model_mark(self.model),
            self.settings,
            [tiles.shape, layout, tiles.context, selected],
            self.chunks(),
        )

    def work(self, title: str) -> TilesWork:
        """What the run takes."""
        kind = self.settings.dtype
        return TilesWork(
            title,
            self.plan(1).blocks,
            volumes([self.image]),
            self.tiles,
            self.chunks(),
            WINDOW,
            channels=self.settings.channels,
            itemsize=None if kind is None else np.dtype(kind).itemsize,
            chosen=self.blocks is not None,
            zarr_format=self.options.zarr_format,
            backend=self.options.backend,
        )

    def on_disk(self, output: Any) -> RunResult:
        """Make the zarr array."""
        place = self.options.output(output, [self.image])
        mark, title = self.mark(), f"{model_name(self.model)} on {self.tiles!r}"
        if published_already(place, mark, self.options):
            return RunResult(place.open(), place.path, title, 0.0, {})
        began = time.monotonic()
        with open_run(place, self.options, self.settings, self.work(title)) as run:
            ahead = WINDOW * run.engine.slots
            plan = self.plan(ahead, self._blocks_of_before(run, mark, ahead))
            job = TileJob(self.model, plan, self.settings, {})
            here = StoredJob(job, self._readable(run), run.work, mark)
            settings = self._probe(run, here, mark)
            assert settings.dtype is not None
            here = replace(here, job=replace(job, settings=settings))
            out = place.create(
                (*settings.leading, *self.tiles.shape),
                (*settings.leading, *self.chunks()),
                settings.dtype,
                zarr_format=self.options.zarr_format,  # type: ignore[arg-type]
            )
            here = replace(here, out=out)
            measured = _make_blocks(run, here, mark, ahead)
            seconds = time.monotonic() - began
            details = {
                "tiles": self.tiles.computed,
                "blocks": repr(plan.blocks),
                "alive, planned": plan.alive(ahead=ahead),
                "alive, measured": measured,
                "speed": speed(int(np.prod(self.tiles.shape)), seconds),
                **run.where,
            }
            array = place.publish(
                geometry=geometry_of(self.image), attributes={"fingerprint": mark}
            )
        return RunResult(array, place.path, title, time.monotonic() - began, details)

    def _readable(self, run: Run) -> Any:
        """The image where tasks can read it."""
        if _same_process(run.engine) and isinstance(self.image, np.ndarray):
            return self.image
        return stored(self.image, run.work, argument="image")

    def _blocks_of_before(self, run: Run, mark: str, ahead: int) -> tuple[int, ...]:
        """The blocks of the run that is resumed, which may have had other workers."""
        path = run.work / "blocks.json"
        if self.options.resume and path.exists():
            found = json.loads(path.read_text())
            if found["mark"] == mark:
                return tuple(found["blocks"])
        blocks = tuple(int(n) for n in self.plan(ahead).blocks.blocks)  # type: ignore[arg-type]
        path.write_text(json.dumps({"mark": mark, "blocks": blocks}))
        return blocks

    def _probe(self, run: Run, here: StoredJob, mark: str) -> TileSettings:
        """Settings with channels and dtype; the tile that tells them is kept."""
        if self.settings.dtype is not None:
            return self.settings
        if not self.tiles.computed:
            raise _nothing_to_probe()
        first = int(np.flatnonzero(self.tiles.selected)[0])
        task = Probe(_shared(here), first)
        ((channels, dtype),) = run.ledger.run(run.engine, "probe", mark, probe_tile, [task])
        return replace(self.settings, channels=channels, dtype=dtype)


def _nothing_to_probe() -> InvalidArgument:
    return InvalidArgument(
        "skip",
        "a test that leaves out every tile",
        "at least one tile, from which channels and dtype can be taken",
        "Declare dtype= (and channels=), or check the test.",
    )


def _same_process(engine: Engine) -> bool:
    return engine.name in ("sync", "threads")


def _shared(here: StoredJob) -> Shared:
    return Shared(here, here.work / f"job-{uuid.uuid4().hex}.pickle")


def _make_blocks(run: Run, here: StoredJob, mark: str, ahead: int) -> int:
    """Make all blocks; gives the most tiles that were alive at once."""
    plan = here.job.plan
    blocks = plan.order.tolist()
    shared = _shared(here)
    times = np.full((len(blocks), 2), np.nan)

    def release(position: int, result: Any) -> None:
        times[position, 0], times[position, 1] = result[0], time.time()
        if result[2]:
            for number in plan.own(blocks[position]):
                here.kept(number).unlink(missing_ok=True)
        for other in plan.after[position]:
            here.message(blocks[other], blocks[position]).unlink(missing_ok=True)

    run.ledger.run(
        run.engine,
        "tiles",
        fingerprint(mark, plan.blocks.blocks),
        make_block,
        [Task(shared, position) for position in range(len(blocks))],
        voxels=[plan.blocks.region(block).size for block in blocks],
        order=Order(plan.after, ahead),
        recorded=release,
    )
    return measured_alive(*plan.lives(times[:, 0], times[:, 1]))
