"""Stacks of labels on disk to training targets on disk: flows and foreground of every class."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from topo_dask.classes import ClassMethod, class_methods
from topo_dask.config import FlowSettings, choice, counting, iterations
from topo_dask.graph.check import check_labels, checked_origin
from topo_dask.graph.targets import foreground_of_block
from topo_dask.grid import BlockGrid
from topo_dask.plan.labels import FlowsWork
from topo_dask.run.files import input_mark, open_input, stored
from topo_dask.run.flow_job import FlowJob
from topo_dask.run.flows import FLOW_TYPES, open_mask, run_stages
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
from topo_dask.storage import AnyArray, Output, output_chunks

FLOWS, FOREGROUND = "flows", "class_fg"
"""Names of the two arrays."""


@dataclass(frozen=True, repr=False)
class TargetsResult(RunResult):
    """What `flow_targets` made: ``array`` are the flows.

    Parameters
    ----------
    class_fg
        The zarr array of the foreground to train on.
    """

    class_fg: AnyArray


@dataclass(frozen=True)
class ForegroundTask:
    """A block of the foreground of a class."""

    job: FlowJob
    number: int
    reach: float | None
    class_fg: AnyArray

    def __str__(self) -> str:
        return f"class {self.job.row}, block {self.job.grid.region(self.number)}"


def mark_block(task: ForegroundTask) -> int:
    """Stage foreground: where a class is trained on, in a block."""
    job, core = task.job, task.job.grid.region(task.number)
    assert job.row is not None
    halo = 0 if task.reach is None else math.floor(task.reach)
    labels = job.read(core)
    read = core
    if halo and labels.any():  # else what is around does not matter
        read = core.grow(halo, within=job.grid.shape)
        labels = job.read(read)
    mask = job.read_mask(read) if halo else None
    found = foreground_of_block(labels, core.relative_to(read.start), task.reach, mask)
    at: tuple[int | slice, ...] = (job.row, *core.slices)
    task.class_fg[at] = found
    return core.size


def flow_targets(
    labels: Any,
    output: Any,
    *,
    class_names: Any = None,
    class_config: Any = None,
    resolution_nm: float | None = None,
    diffusion_iters: int = 200,
    adaptive_iters: bool = True,
    adaptive_factor: float = 6,
    spatial_mask: Any = None,
    origin: tuple[int, ...] = (0, 0, 0),
    context: Any = "auto",
    tolerance: float = 1e-4,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    acceleration: str = "none",
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
) -> TargetsResult:
    """Make the training targets of a stack of labels that need not fit in memory.

    Parameters
    ----------
    labels
        ``[C,Z,Y,X]``, any integer type, 0 is background: path, URL, zarr, dask or NumPy array.
    output
        Path of the zarr group to make, of the arrays ``flows [3C,Z,Y,X]`` and
        ``class_fg [C,Z,Y,X]``.
    class_names, class_config, resolution_nm, diffusion_iters, adaptive_iters, adaptive_factor
        See `compute_flow_targets`.
    spatial_mask
        ``[Z,Y,X]``, 1 where annotated, for all classes, as the labels.
    origin, context, tolerance, spacing, acceleration
        See `topo_dask.flows`; for classes of coordinate diffusion.
    dtype
        Of both arrays: "float32", or "float16" for half the disk and 5e-4.
    blocks
        Shape of a block.
    work_dir, resume, overwrite, cluster, progress, zarr_format, ignore_memory, backend
        See `RunOptions`.

    Returns
    -------
    TargetsResult
        ``.array`` is the zarr array of the flows, ``.class_fg`` that of the foreground.

    Raises
    ------
    TopoError
        One of its kinds, before any work starts, that names the argument.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> folder = tempfile.mkdtemp()
    >>> stack = np.zeros((2, 4, 5, 6), np.uint8)
    >>> stack[:, 1:3, 1:4, 1:5] = 9
    >>> made = flow_targets(
    ...     stack,
    ...     folder + "/targets.zarr",
    ...     class_names=["nuc", "mito"],
    ...     resolution_nm=8,
    ...     cluster="sync",
    ... )
    >>> made.array.shape, made.class_fg.shape
    ((6, 4, 5, 6), (2, 4, 5, 6))
    """
    options = RunOptions(
        blocks, work_dir, resume, overwrite, cluster, progress, zarr_format, ignore_memory, backend
    )
    choice("dtype", dtype, FLOW_TYPES)
    iterations("diffusion_iters", diffusion_iters, default=200)
    others = FlowSettings(
        n_iter=diffusion_iters, adaptive_iters=adaptive_iters, adaptive_factor=adaptive_factor,
        context=context, tolerance=tolerance, spacing=spacing, acceleration=acceleration,
        backend=options.backend,
    )  # fmt: skip
    start = checked_origin(origin)
    source = open_input(labels, argument="labels", axes=4, first="class")
    check_labels(source, axes=4)
    count, *lengths = (int(n) for n in source.shape)
    grid = options.grid(tuple(lengths))
    methods = class_methods(class_names, count, class_config, resolution_nm, others)
    mask = open_mask(spatial_mask, grid.shape)
    place = options.output(output, [source, mask])
    inputs = [input_mark(source), None if mask is None else input_mark(mask)]
    mark = fingerprint("targets", inputs, methods, start, dtype, grid.chunks)
    final = fingerprint(mark, zarr_format)
    title = f"Targets of {count} classes of {'x'.join(map(str, lengths))} voxels"
    if published_already(place, final, options):
        return TargetsResult(
            place.open(FLOWS), place.path, title, 0.0, {}, class_fg=place.open(FOREGROUND)
        )
    began = time.monotonic()
    work = _work(title, [source, mask], methods, grid, start, dtype, zarr_format)
    with open_run(place, options, methods, work) as run:
        read = stored(source, run.work, argument="labels", together=1)
        known = None if mask is None else stored(mask, run.work, argument="spatial_mask")
        arrays = _create(place, count, grid, dtype, zarr_format)
        jobs = [
            FlowJob(
                read, m.settings, grid, (0, 0, 0), start, run.work / f"class-{c}",
                arrays[FLOWS], known, c,
            )
            for c, m in enumerate(methods)
        ]  # fmt: skip
        instances = [count for count, _ in run_stages(run, jobs, inputs, mark)]
        _mark_foreground(run, jobs, methods, arrays[FOREGROUND], mark)
        details = _details(run, methods, instances, grid, time.monotonic() - began)
        place.publish_group(
            geometry=geometry_of(source),
            attributes={"fingerprint": final, "classes": [_plain(m) for m in methods]},
        )
    seconds = time.monotonic() - began
    return TargetsResult(
        place.open(FLOWS), place.path, title, seconds, details, class_fg=place.open(FOREGROUND)
    )


def _plain(method: ClassMethod) -> dict[str, Any]:
    """What the attributes of the output say of a class."""
    return asdict(method) | {"settings": counting(method.settings)}


def _work(
    title: str,
    inputs: list[Any],
    methods: list[ClassMethod],
    grid: BlockGrid,
    start: tuple[int, ...],
    dtype: str,
    zarr_format: int,
) -> FlowsWork:
    """What the run takes."""
    return FlowsWork(
        title,
        grid,
        volumes(inputs),
        len(methods),
        tuple(m.settings for m in methods),
        origin=start,
        itemsize=np.dtype(dtype).itemsize,
        reach=tuple(m.reach for m in methods),
        zarr_format=zarr_format,
    )


def _create(
    place: Output, count: int, grid: BlockGrid, dtype: str, zarr_format: Any
) -> dict[str, AnyArray]:
    """Both arrays, in chunks of one class, each within a block: one task writes a chunk."""
    chunks = output_chunks(grid.largest, grid.shape)
    return {
        name: place.create(
            (axes * count, *grid.shape),
            (axes, *chunks),
            dtype,
            zarr_format=zarr_format,
            name=name,
        )
        for name, axes in ((FLOWS, 3), (FOREGROUND, 1))
    }


def _mark_foreground(
    run: Run, jobs: list[FlowJob], methods: list[ClassMethod], class_fg: AnyArray, mark: str
) -> None:
    tasks = [
        ForegroundTask(job, n, method.reach, class_fg)
        for job, method in zip(jobs, methods, strict=True)
        for n in range(len(job.grid))
    ]
    voxels = [task.job.grid.region(task.number).size for task in tasks]
    written = fingerprint(mark, run.output.identity)
    run.ledger.run(run.engine, "foreground", written, mark_block, tasks, voxels=voxels)


def _details(
    run: Run, methods: list[ClassMethod], instances: list[int], grid: BlockGrid, seconds: float
) -> dict[str, Any]:
    details: dict[str, Any] = {}
    for method, count in zip(methods, instances, strict=True):
        how = method.settings
        text = f"{count} instances, {how.method}"
        if how.method == "diffusion" and how.potential == "poisson":
            text += " (poisson)"
        elif how.method == "diffusion":
            text += f" ({how.potential}, at most {how.n_iter} iterations)"
        if method.reach is not None:
            text += f", trained within {method.reach:g} voxels of background"
        details[method.name] = text
    return {
        **details,
        "blocks": repr(grid),
        "speed": speed(len(methods) * math.prod(grid.shape), seconds),
        **run.where,
    }
