"""Labels on disk to flows on disk: facts of whole instances, a flow per tile, fused."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.config import FlowSettings, counting
from topo_dask.errors import InvalidArgument
from topo_dask.graph.acceleration import explained
from topo_dask.graph.annotated import (
    boxes_around,
    deepest_voxel,
    is_annotated,
    pointed_at,
)
from topo_dask.graph.check import check_labels, check_mask, check_same_shape, checked_origin
from topo_dask.graph.context_or_rounds import (
    ContextChoice,
    choose_context,
    choose_halo,
    most_in_rounds,
)
from topo_dask.graph.flows import Piece, choose_read, fills_volume, flow_of_block, rows_in
from topo_dask.graph.fuse import tiling_of
from topo_dask.grid import BlockGrid, Region
from topo_dask.kernels import cpu
from topo_dask.kernels.tables import InstanceTable
from topo_dask.plan.labels import FlowsWork
from topo_dask.run.files import (
    input_mark,
    load_array,
    load_instances,
    load_table,
    open_input,
    save_array,
    save_instances,
    save_table,
    stored,
)
from topo_dask.run.flow_job import FlowJob, Task
from topo_dask.run.instances import measure_all, open_instances
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
from topo_dask.run.rounds import flow_of_rounds, run_rounds
from topo_dask.run.schwarz import Solved, flow_of_potential, run_schwarz
from topo_dask.storage import output_chunks

FLOW_TYPES = ("float32", "float16")


def point_block(task: Task) -> int:
    """Stage centres: the deepest voxel of the cut instances whose box begins in a block."""
    job, region = task.job, task.job.grid.region(task.number)
    table = load_instances(job.work / "instances")
    rows = cpu.rows_of(load_array(job.work / "cut.npy"), table.ids)
    low = table.lo[rows]
    rows = rows[((low >= region.start) & (low < region.stop)).all(axis=1)]
    boxes = boxes_around(table, rows, job.volume)
    near = region.grow(job.grid.largest, within=job.grid.shape)
    together = [box for box in boxes if box.intersect(near) == box]
    shared = Region((0,) * 3, (0,) * 3)
    if together:  # read once; what reaches further is read by itself
        shared = Region(
            tuple(min(starts) for starts in zip(*(b.start for b in together), strict=True)),
            tuple(max(stops) for stops in zip(*(b.stop for b in together), strict=True)),
        )
    labels, mask = job.read(shared), job.read_mask(shared)
    voxels = np.zeros((len(rows), 3), dtype=np.int64)
    for n, (row, box) in enumerate(zip(rows.tolist(), boxes, strict=True)):
        if box.intersect(shared) == box:
            local = box.relative_to(shared.start).slices
            seen, known = labels[local], None if mask is None else mask[local]
        else:
            seen, known = job.read(box), job.read_mask(box)
        assert known is not None
        inside = seen == table.ids[row].astype(seen.dtype)
        voxels[n] = deepest_voxel(inside, is_annotated(known), box)
    save_table(job.work / "centres" / f"{task.number}.npz", rows=rows, voxels=voxels)
    return len(rows)


def point_all(job: FlowJob) -> int:
    """Stage pointed: the table with those centres; gives how many."""
    table = load_instances(job.work / "instances")
    parts = [load_table(job.work / "centres" / f"{n}.npz") for n in range(len(job.grid))]
    rows, voxels = (np.concatenate([part[name] for part in parts]) for name in ("rows", "voxels"))
    save_instances(job.work / "pointed", pointed_at(table, rows, voxels))
    return len(rows)


def _flow(job: FlowJob, core: Region) -> npt.NDArray[np.float32]:
    if job.rounds is not None:
        return flow_of_potential(job, core)
    table = load_instances(job.facts)
    labels = job.read(core)
    if not labels.any():
        return np.zeros((3, *core.shape), dtype=np.float32)
    place, volume = job.placed(core), job.placed(job.volume)
    inside = rows_in(table, cpu.compact(labels)[1]).moved(job.corner)
    near = choose_read(labels, place, table=inside, settings=job.settings, volume=volume)
    read = near.relative_to(job.corner)
    if read != core:
        labels = job.read(read)
    mask = None if job.settings.method == "direct" else job.read_mask(read)
    rows = rows_in(table, cpu.compact(labels)[1]).moved(job.corner)
    piece = Piece(place, near, volume)
    return flow_of_block(labels, piece, table=rows, settings=job.settings, spatial_mask=mask)


def make_block(task: Task) -> int:
    """Stage flows, without overlap: the flow of a block into the output."""
    job, core = task.job, task.job.grid.region(task.number)
    if job.rounds is not None and job.settings.potential != "poisson":
        job.write(core, flow_of_rounds(job, task.number))
    else:
        job.write(core, _flow(job, core))
    return core.size


def make_tile(task: Task) -> int:
    """Stage flows, with overlap: the flow of a tile into the scratch."""
    tile = task.job.tiling.tile(task.number)
    save_array(task.job.work / "tiles" / f"{task.number}.npy", _flow(task.job, tile))
    return tile.size


def fuse_block(task: Task) -> int:
    """Stage fuse: a block of the output from the tiles that reach it."""
    job, core = task.job, task.job.grid.region(task.number)

    def flow_of_tile(number: int) -> npt.NDArray[np.float32]:
        return load_array(job.work / "tiles" / f"{number}.npy")

    job.write(core, job.tiling.blended(core, flow_of_tile))
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
    spatial_mask: Any = None,
    origin: tuple[int, ...] = (0, 0, 0),
    overlap: Any = 0,
    context: Any = "auto",
    tolerance: float = 1e-4,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    rounds: Any = None,
    acceleration: str = "none",
    instances: Any = None,
    dtype: str = "float32",
    blocks: Any = None,
    work_dir: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    cluster: Any = None,
    progress: bool | None = None,
    zarr_format: int = 3,
    ignore_memory: bool = False,
    backend: str = "auto",
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
    spatial_mask
        ``[Z,Y,X]``, 1 where annotated, as the labels or an array.
    origin
        Global index of the first voxel, where the labels are cut out of a larger volume.
    overlap
        Voxels that neighbouring tiles share and blend with cosine weights; less than a block.
    context, tolerance
        Voxels computed around each tile and thrown away; "auto" keeps every component within
        ``tolerance`` of the whole volume's field, ``context=n_iter`` is exact to the bit. With
        ``potential="poisson"`` the halo of the blocks, which are solved in rounds until the whole
        volume's potential is reached.
    spacing
        Distance of voxels along z, y, x, in any unit: flows are unit vectors in it.
    rounds
        Instead of a context: rounds of so many iterations, after which blocks read each other's
        fields; exact to the bit. "auto" takes the cheapest number; ``None`` takes rounds where
        they are cheaper than the automatic context. The result's details say which and why.
    acceleration
        "chebyshev" takes some sqrt(n) sweeps in the place of n iterations of the coordinate
        potential, within ``tolerance`` of them; see `generate_diffusion_flows`. It needs a context,
        and excludes rounds; "auto" takes it where it is cheaper than plain rounds.
    instances
        Path of the table that `instance_table` made of these labels, or the table: saves a pass.
    dtype
        "float32", or "float16" for half the disk and 5e-4.
    blocks
        Shape of a block.
    work_dir, resume, overwrite, cluster, progress, zarr_format, ignore_memory, backend
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
    options = RunOptions(
        blocks, work_dir, resume, overwrite, cluster, progress, zarr_format, ignore_memory, backend
    )
    settings = FlowSettings(
        method, potential, n_iter, adaptive_iters, adaptive_factor, context, tolerance,
        rounds, spacing, acceleration, options.backend,
    )  # fmt: skip
    if dtype not in FLOW_TYPES:
        names = ", ".join(map(repr, FLOW_TYPES))
        raise InvalidArgument("dtype", repr(dtype), f"one of: {names}", "Choose one of these.")
    start = checked_origin(origin)
    source = open_input(labels, argument="labels", axes=3)
    check_labels(source)
    grid = options.grid(tuple(int(n) for n in source.shape))
    mask = open_mask(spatial_mask, grid.shape)
    shared = _checked_overlap(overlap, grid, settings)
    place = options.output(output, [source, mask])
    inputs = [input_mark(source), "" if mask is None else input_mark(mask)]
    given, known_by = open_instances(instances, inputs[0], grid.shape)
    if given is not None and method == "direct" and mask is not None:
        raise InvalidArgument(
            "instances",
            "a table with method='direct' and a spatial_mask",
            "no table there: instances that the mask cuts are looked for in the labels",
            "Leave it out.",
        )
    mark = fingerprint("flows", inputs, settings, shared, start, dtype, grid.chunks, known_by)
    final = fingerprint(mark, zarr_format)
    if published_already(place, final, options):
        return RunResult(place.open(), place.path, _title(settings, grid), 0.0, {})
    began = time.monotonic()
    work = _work([source, mask], settings, grid, (shared, start), dtype, given, zarr_format)
    with open_run(place, options, settings, work) as run:
        read = stored(source, run.work, argument="labels")
        known = None if mask is None else stored(mask, run.work, argument="spatial_mask")
        chunks = (3, *output_chunks(grid.largest, grid.shape))
        out = place.create((3, *grid.shape), chunks, dtype, zarr_format=zarr_format)  # type: ignore[arg-type]
        job = FlowJob(read, settings, grid, shared, start, run.work, out, known)
        (made,) = run_stages(run, [job], inputs, mark, given)
        details = _details(run, job, made, began)
        array = place.publish(
            geometry=geometry_of(source), attributes={"fingerprint": final, **counting(settings)}
        )
    return RunResult(array, place.path, _title(settings, grid), time.monotonic() - began, details)


def _work(
    inputs: list[Any],
    settings: FlowSettings,
    grid: BlockGrid,
    place: tuple[tuple[int, ...], tuple[int, ...]],
    dtype: str,
    table: InstanceTable | None,
    zarr_format: int,
) -> FlowsWork:
    """What the run takes; ``place``: overlap and origin."""
    return FlowsWork(
        _title(settings, grid),
        grid,
        volumes(inputs),
        settings=(settings,),
        overlap=place[0],
        origin=place[1],
        itemsize=np.dtype(dtype).itemsize,
        table=table,
        zarr_format=zarr_format,
    )


def open_mask(spatial_mask: Any, shape: tuple[int, ...]) -> Any:
    """Open a spatial mask, if there is one, and check its shape."""
    if spatial_mask is None:
        return None
    mask = open_input(spatial_mask, argument="spatial_mask", axes=3)
    check_mask(mask, argument="spatial_mask")
    check_same_shape(mask.shape, shape, argument="spatial_mask", of="the labels")
    return mask


def _checked_overlap(overlap: Any, grid: BlockGrid, settings: FlowSettings) -> tuple[int, ...]:
    shared = tiling_of(grid, overlap).overlap
    if settings.rounds is not None and (any(shared) or settings.method == "direct"):
        raise InvalidArgument(
            "rounds",
            f"{settings.rounds!r} with method={settings.method!r} and overlap={overlap!r}",
            "rounds with method='diffusion' and without overlap",
            "Leave overlap out: after rounds, neighbouring blocks agree and nothing is to blend.",
        )
    if settings.rounds is not None and settings.n_iter > most_in_rounds(settings):
        raise InvalidArgument(
            "rounds",
            f"{settings.rounds!r} with potential='heat' and n_iter={settings.n_iter}",
            f"at most {most_in_rounds(settings)} iterations of heat in rounds",
            "Leave out rounds, or choose potential='poisson'.",
        )
    return shared


def run_stages(
    run: Run,
    jobs: list[FlowJob],
    inputs: list[Any],
    mark: str,
    given: InstanceTable | None = None,
) -> list[tuple[int, ContextChoice | Solved | None]]:
    """Run all stages of one volume, or of all classes of a stack.

    Gives for each the number of instances, and how blocks got what lies around them.

    Parameters
    ----------
    run
        Where.
    jobs
        One for each volume, of the same blocks.
    inputs
        What changes when labels or mask do.
    mark
        Fingerprint of all that the flows depend on.
    given
        The table of a single volume's instances, where it is known before.
    """
    grid, ledger, engine = jobs[0].grid, run.ledger, run.engine

    def tasks(which: list[FlowJob]) -> dict[str, Any]:
        """Those of every block."""
        voxels = grid.sizes * len(which)
        return {"items": [Task(j, n) for j in which for n in range(len(grid))], "voxels": voxels}

    cut = [job for job in jobs if job.may_be_cut]
    facts = fingerprint("table", inputs, grid.chunks, len(jobs), [job.row for job in cut])
    if given is None:
        counts = measure_all(run, jobs, facts)
    else:
        save_instances(jobs[0].work / "instances", given)
        counts = [len(given)]
    if cut:
        ledger.run(engine, "centres", facts, point_block, **tasks(cut))
        ledger.run(engine, "pointed", facts, point_all, cut)
    prepared = [_prepared(run, job, mark) for job in jobs]
    jobs = [job for job, _ in prepared]
    written = fingerprint(mark, run.output.identity)
    if jobs[0].tiling:
        ledger.run(engine, "flows", mark, make_tile, **tasks(jobs))
        ledger.run(engine, "fuse", written, fuse_block, **tasks(jobs))
    else:
        ledger.run(engine, "flows", written, make_block, **tasks(jobs))
    return [(count, how) for count, (_, how) in zip(counts, prepared, strict=True)]


def _prepared(run: Run, job: FlowJob, mark: str) -> tuple[FlowJob, ContextChoice | Solved | None]:
    """Make the rounds of a volume, where it goes by rounds; and how blocks see around them."""
    if job.settings.method == "direct":
        return job, None
    table = load_instances(job.facts)
    if fills_volume(table, job.settings, job.volume):
        return job, None
    if job.settings.potential == "poisson":
        if len(job.grid) == 1:
            return job, None
        width = choose_halo(job.settings, job.grid, table)
        return run_schwarz(run, job, width, mark)
    choice = choose_context(
        job.settings,
        job.grid,
        table=table,
        origin=job.origin,
        itemsize=job.labels.dtype.itemsize,
        blended=bool(job.tiling),
    )
    if choice.rounds:
        job = replace(job, settings=replace(job.settings, acceleration="none"))
    return run_rounds(run, job, choice.rounds, mark) if choice.rounds else job, choice


def _title(settings: FlowSettings, grid: BlockGrid) -> str:
    kind = "direct" if settings.method == "direct" else f"{settings.potential} diffusion"
    return f"Flows ({kind}) of {'x'.join(map(str, grid.shape))} voxels"


def _details(
    run: Run, job: FlowJob, made: tuple[int, ContextChoice | Solved | None], began: float
) -> dict[str, Any]:
    instances, choice = made
    details: dict[str, Any] = {
        "instances": instances,
        "blocks": repr(job.grid),
        "speed": speed(job.volume.size, time.monotonic() - began),
        **run.where,
    }
    if choice is not None:
        details["context"] = str(choice)
        if isinstance(choice, ContextChoice) and job.settings.acceleration != "none":
            details["acceleration"] = ": ".join(
                explained(job.settings, choice.sweeps, choice.rounds)
            )
    return details
