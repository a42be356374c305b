"""Labels on disk to flows on disk: facts of whole instances, a flow per tile, fused."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.config import FlowSettings
from topo_dask.errors import InvalidArgument
from topo_dask.graph.check import check_labels
from topo_dask.graph.context import context_width
from topo_dask.graph.flows import Piece, choose_read, flow_of_block, rows_in
from topo_dask.graph.fuse import add_weighted, unit_vectors
from topo_dask.graph.instances import facts_of_block
from topo_dask.grid import BlockGrid, Region, as_lengths
from topo_dask.kernels import cpu
from topo_dask.kernels.tables import InstanceTable, merge_instances
from topo_dask.run.files import (
    input_mark,
    load_array,
    load_instances,
    open_input,
    save_array,
    save_instances,
    stored,
)
from topo_dask.run.job import (
    Run,
    RunOptions,
    RunResult,
    geometry_of,
    open_run,
    published_already,
    speed,
)
from topo_dask.run.ledger import fingerprint
from topo_dask.storage import AnyArray, load_table, output_chunks, save_table

FLOW_TYPES = ("float32", "float16")


@dataclass(frozen=True)
class FlowJob:
    """What every task of a run needs to know."""

    labels: AnyArray
    settings: FlowSettings
    grid: BlockGrid
    overlap: tuple[int, ...]
    origin: tuple[int, ...]
    work: Path
    out: AnyArray | None = None

    @property
    def volume(self) -> Region:
        """The whole volume, as a region that begins at 0."""
        return Region((0, 0, 0), self.grid.shape)

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

    def tapers(self, tile: Region) -> tuple[tuple[int, int], ...]:
        """Width of the overlap at each face of a tile."""
        return tuple(
            (o if a > 0 else 0, o if b < n else 0)
            for a, b, o, n in zip(tile.start, tile.stop, self.overlap, self.grid.shape, strict=True)
        )


@dataclass(frozen=True)
class Task:
    """One block of a stage."""

    job: FlowJob
    number: int

    def __str__(self) -> str:
        return f"block {self.job.grid.region(self.number)}"


def measure_block(task: Task) -> int:
    """Stage table: facts of the instances of a block; gives their number."""
    job, region = task.job, task.job.grid.region(task.number)
    labels = np.asarray(job.labels[region.slices])
    table = facts_of_block(labels, region.start)
    save_table(
        job.work / "table" / f"{task.number}.npz",
        ids=table.ids,
        voxels=table.voxels,
        sums=table.sums,
        lo=table.lo,
        hi=table.hi,
    )
    return len(table)


def sum_tables(job: FlowJob) -> int:
    """Stage facts: one table of the whole volume; gives the number of instances."""
    tables = [
        InstanceTable(**load_table(job.work / "table" / f"{n}.npz")) for n in range(len(job.grid))
    ]
    while len(tables) > 1:
        tables = [merge_instances(tables[i : i + 64]) for i in range(0, len(tables), 64)]
    save_instances(job.work / "instances", tables[0])
    return len(tables[0])


def _flow(job: FlowJob, core: Region) -> npt.NDArray[np.float32]:
    table = load_instances(job.work / "instances")
    labels = np.asarray(job.labels[core.slices])
    if not labels.any():
        return np.zeros((3, *core.shape), dtype=np.float32)
    read = choose_read(labels, core, table=table, settings=job.settings, volume=job.volume)
    if read != core:
        labels = np.asarray(job.labels[read.slices])
    shift = np.asarray(job.origin, dtype=np.int64)
    rows = rows_in(table, cpu.compact(labels)[1])
    moved = InstanceTable(
        rows.ids,
        rows.voxels,
        rows.sums + rows.voxels[:, None] * shift,
        rows.lo + shift,
        rows.hi + shift,
    )
    back = tuple(-o for o in job.origin)
    piece = Piece(*(r.relative_to(back) for r in (core, read, job.volume)))
    return flow_of_block(labels, piece, table=moved, settings=job.settings)


def make_block(task: Task) -> int:
    """Stage flows, without overlap: the flow of a block into the output."""
    core = task.job.grid.region(task.number)
    assert task.job.out is not None
    task.job.out[(slice(None), *core.slices)] = _flow(task.job, core)
    return core.size


def make_tile(task: Task) -> int:
    """Stage flows, with overlap: the flow of a tile into the scratch."""
    tile = task.job.tile(task.number)
    save_array(task.job.work / "tiles" / f"{task.number}.npy", _flow(task.job, tile))
    return tile.size


def fuse_block(task: Task) -> int:
    """Stage fuse: a block of the output from the tiles that reach it, in their order.

    Blended vectors get the mean length of the tiles' vectors: 1, except where diffusion has died
    out and the whole volume's field is shorter too.
    """
    job, core = task.job, task.job.grid.region(task.number)
    total = np.zeros((4, *core.shape))  # the vectors, and their lengths
    weights = np.zeros(core.shape)
    for near in job.grid.touching(core.grow(max(job.overlap), within=job.grid.shape)):
        tile = job.tile(near)
        if tile.intersect(core).size:
            tile_flow = load_array(job.work / "tiles" / f"{near}.npy")
            lengths = np.sqrt((tile_flow.astype(np.float64) ** 2).sum(axis=0))
            values = np.concatenate([tile_flow, lengths[None]])
            tapers = job.tapers(tile)
            add_weighted(total, weights, core, tile=tile, tapers=tapers, values=values)
    assert job.out is not None
    job.out[(slice(None), *core.slices)] = unit_vectors(total[:3]) * (total[3] / weights)
    return core.size


def flows(
    labels: Any,
    output: Any,
    *,
    method: str = "diffusion",
    potential: str = "coordinate",
    n_iter: int = 200,
    adaptive_iters: bool = True,
    adaptive_factor: float = 6,
    origin: tuple[int, ...] = (0, 0, 0),
    overlap: Any = 0,
    context: Any = "auto",
    tolerance: float = 1e-4,
    dtype: str = "float32",
    blocks: Any = None,
    work_dir: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    cluster: Any = None,
    progress: bool | None = None,
    zarr_format: int = 3,
) -> RunResult:
    """Make the flows of labels that need not fit in memory.

    Parameters
    ----------
    labels
        ``[Z,Y,X]``, any integer type, 0 is background: path, URL, zarr, dask or NumPy array.
    output
        Path of the zarr array ``[3,Z,Y,X]`` to make.
    method
        "diffusion" (objects of any form) or "direct" (convex objects).
    potential, n_iter, adaptive_iters, adaptive_factor
        See `generate_diffusion_flows`.
    origin
        Global index of the first voxel, where the labels are cut out of a larger volume.
    overlap
        Voxels that neighbouring tiles share and blend with cosine weights; less than a block.
    context, tolerance
        Voxels computed around each tile and thrown away; "auto" keeps every component within
        ``tolerance`` of the whole volume's field, ``context=n_iter`` is exact to the bit.
    dtype
        "float32", or "float16" for half the disk and 5e-4.
    blocks
        Shape of a block.
    work_dir, resume, overwrite, cluster, progress, zarr_format
        See `RunOptions`.

    Returns
    -------
    RunResult
        ``.array`` is the zarr array.

    Raises
    ------
    TopoError
        One of its kinds, before any work starts, that names the argument.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> volume = np.zeros((4, 5, 6), np.uint8)
    >>> volume[1:3, 1:4, 1:5] = 9
    >>> flows(volume, folder + "/flows.zarr", cluster="sync").array.shape
    (3, 4, 5, 6)
    """
    settings = FlowSettings(
        method, potential, n_iter, adaptive_iters, adaptive_factor, context, tolerance
    )
    options = RunOptions(blocks, work_dir, resume, overwrite, cluster, progress, zarr_format)
    if dtype not in FLOW_TYPES:
        names = ", ".join(map(repr, FLOW_TYPES))
        raise InvalidArgument("dtype", repr(dtype), f"one of: {names}", "Choose one of these.")
    start = as_lengths(origin, argument="origin", axes=3, least=0)
    source = open_input(labels, argument="labels", axes=3)
    check_labels(source)
    grid = options.grid(tuple(int(n) for n in source.shape))
    shared = _checked_overlap(overlap, grid)
    place = options.output(output, [source])
    mark = fingerprint("flows", input_mark(source), settings, shared, start, dtype, grid.chunks)
    final = fingerprint(mark, zarr_format)
    if published_already(place, final, options):
        return RunResult(place.open(), place.path, _title(settings, grid), 0.0, {})
    began = time.monotonic()
    with open_run(place, options) as run:
        read = stored(source, run.work, argument="labels")
        chunks = (3, *output_chunks(grid.largest, grid.shape))
        out = place.create((3, *grid.shape), chunks, dtype, zarr_format=zarr_format)  # type: ignore[arg-type]
        job = FlowJob(read, settings, grid, shared, start, run.work, out)
        instances = _run_stages(run, job, mark)
        details = _details(run, job, instances, began)
        array = place.publish(
            geometry=geometry_of(source), attributes={"fingerprint": final, **_plain(settings)}
        )
    return RunResult(array, place.path, _title(settings, grid), time.monotonic() - began, details)


def _checked_overlap(overlap: Any, grid: BlockGrid) -> tuple[int, ...]:
    shared = as_lengths(overlap, argument="overlap", axes=3, least=0)
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
    return shared


def _run_stages(run: Run, job: FlowJob, mark: str) -> int:
    tasks = [Task(job, n) for n in range(len(job.grid))]
    voxels = [region.size for region in job.grid]
    facts_mark = fingerprint("table", input_mark(job.labels), job.grid.chunks)
    run.ledger.run(run.engine, "table", facts_mark, measure_block, tasks, voxels=voxels)
    (instances,) = run.ledger.run(run.engine, "facts", facts_mark, sum_tables, [job])
    written = fingerprint(mark, run.output.identity)
    if any(job.overlap):
        run.ledger.run(run.engine, "flows", mark, make_tile, tasks, voxels=voxels)
        run.ledger.run(run.engine, "fuse", written, fuse_block, tasks, voxels=voxels)
    else:
        run.ledger.run(run.engine, "flows", written, make_block, tasks, voxels=voxels)
    return int(instances)


def _plain(settings: FlowSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


def _title(settings: FlowSettings, grid: BlockGrid) -> str:
    kind = "direct" if settings.method == "direct" else f"{settings.potential} diffusion"
    return f"Flows ({kind}) of {'x'.join(map(str, grid.shape))} voxels"


def _details(run: Run, job: FlowJob, instances: int, began: float) -> dict[str, Any]:
    seconds = time.monotonic() - began
    details: dict[str, Any] = {
        "instances": instances,
        "blocks": repr(job.grid),
        "speed": speed(job.volume.size, seconds),
        "ran on": run.engine.name,
    }
    if job.settings.method == "diffusion":
        width = job.settings.context
        reason = "as asked"
        if width == "auto":
            width = context_width(
                int(job.settings.n_iter),
                tolerance=job.settings.tolerance,
                farthest=max(o + n for o, n in zip(job.origin, job.grid.shape, strict=True)),
                floor=job.settings.potential == "coordinate",
            )
            reason = f"within {job.settings.tolerance:g} after {job.settings.n_iter} iterations"
        details["context"] = f"at most {width} voxels: {reason}"
    return details
