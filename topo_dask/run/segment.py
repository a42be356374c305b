"""Flows on disk to instance labels on disk: track, cells, owners, edges, numbers, labels."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.config import RefineSettings, SegmentSettings, boolean, number
from topo_dask.graph.cells import cells_of_ends, keeps_positions
from topo_dask.graph.check import check_mask, check_no_nan, check_same_shape
from topo_dask.graph.scale import check_scaled_flow, scaled_store
from topo_dask.graph.segmentation import foreground_of_class
from topo_dask.graph.track import (
    Particles,
    advance,
    first_particles,
    flow_ready,
    region_needed,
    region_read,
)
from topo_dask.grid import BlockGrid, Region
from topo_dask.kernels.backends import kernels_for
from topo_dask.plan.flow_field import SegmentWork
from topo_dask.run.chain import Chain, Step, View, follow
from topo_dask.run.contacts import join_step
from topo_dask.run.evidence import FOLDER
from topo_dask.run.evidence import keep_evidence as keep_evidence_of
from topo_dask.run.files import (
    input_mark,
    load_array,
    load_table,
    open_input,
    save_array,
    scratch_array,
    stored,
)
from topo_dask.run.halo import check_halo, with_halo
from topo_dask.run.items import Each
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
from topo_dask.run.mail import Grouped, Mail, Sent, collect, message, number_of, post
from topo_dask.run.measured import TABLE, TABLES, MeasuredInstances, load_measured
from topo_dask.run.merge import Merged, MergeTask, ignored, label_block, merge, save_cells
from topo_dask.run.orphans import orphan_step
from topo_dask.run.pieces import split_step
from topo_dask.run.refine import (
    Measures,
    Target,
    check_flows,
    finish,
    measure,
    tables_place,
)
from topo_dask.storage import AnyArray, output_chunks


@dataclass(frozen=True)
class SegmentJob:
    """What every task of a run needs to know."""

    flow: AnyArray
    foreground: AnyArray | None
    threshold: float
    settings: SegmentSettings
    grid: BlockGrid
    halo: Any  # voxels, or "auto"
    work: Path
    out: AnyArray | None = None
    name: str | None = None  # the class, where the foreground is its probability

    @property
    def radius(self) -> float:
        """The convergence radius."""
        return self.settings.convergence_radius

    @property
    def flow_argument(self) -> str:
        """What the flow is called in errors."""
        return "flows" if self.name is None else f"flows of class {self.name!r}"

    def region_read(self, block: int) -> Region:
        """A block with its halo."""
        return region_read(self.grid.region(block), self.halo, self.grid.shape, self.settings)

    def part_of_flow(self, region: Region) -> npt.NDArray[Any]:
        """The flow of a region."""
        return np.asarray(self.flow[(slice(None), *region.slices)])

    def read_flow(self, block: int, read: Region) -> npt.NDArray[np.float32]:
        """The flow that is read for a block, interleaved and checked."""
        return flow_ready(
            self.part_of_flow(read),
            read=read,
            block=self.grid.region(block),
            argument=self.flow_argument,
            backend=self.settings.backend,
        )

    def read_mask(self, block: int) -> npt.NDArray[np.bool_]:
        """The foreground of a block."""
        core = self.grid.region(block)
        if self.foreground is not None:
            values = np.asarray(self.foreground[core.slices])
            if self.name is not None:
                return foreground_of_class(
                    values, core, self.name, threshold=self.threshold, argument="probabilities"
                )
            check_no_nan(values, origin=core.start, block=core, argument="foreground")
            return np.asarray(values > self.threshold)
        moving: npt.NDArray[np.bool_] = (
            np.asarray(self.flow[(slice(None), *core.slices)]) != 0
        ).any(axis=0)
        return moving

    def load_mask(self, block: int) -> npt.NDArray[np.bool_]:
        """The foreground of a block that has been tracked."""
        core = self.grid.region(block)
        packed = load_array(self.file("mask", block))
        return np.unpackbits(packed, count=core.size).astype(bool).reshape(core.shape)

    def load_cell_rows(self, block: int) -> npt.NDArray[np.uint32]:
        """The row of the cell of each particle of a block, in their order."""
        known = load_table(self.file("cells", block, "npz"), ("rows", "home_rows", "home_cells"))
        cells: npt.NDArray[np.uint32] = known["rows"][load_array(self.file("index", block))]
        cells[known["home_rows"]] = known["home_cells"]
        return cells

    def load_ends(self, block: int) -> npt.NDArray[np.float64]:
        """Where the particles of a block ended, in their order; see `keeps_positions`."""
        ends = load_array(self.file("ends", block))
        home = load_table(self.file("cells", block, "npz"), ("home_rows", "home_positions"))
        ends[home["home_rows"]] = home["home_positions"]
        return ends

    def file(self, kind: str, block: int, suffix: str = "npy") -> Path:
        """Where a block's data of some kind is."""
        return self.work / kind / f"{block}.{suffix}"


@dataclass(frozen=True)
class Task:
    """One block of a stage, with what it gets from others."""

    job: SegmentJob
    block: int
    round: int = 0
    mail: tuple[Mail, ...] = ()

    @property
    def core(self) -> Region:
        """The block's voxels."""
        return self.job.grid.region(self.block)

    def __str__(self) -> str:
        return f"block {self.core}"


# --------------------------------------------------------------------------------------- track


def start_block(task: Task) -> tuple[int, tuple[Sent, Sent]]:
    """Stage track, first round: a block's own particles; gives their number and the mail."""
    job, block, shape = task.job, task.block, task.job.grid.shape
    mask = job.read_mask(block)
    save_array(job.file("mask", block), np.packbits(mask))
    read = job.region_read(block)
    ends, under_way = first_particles(
        job.read_flow(block, read),
        mask,
        core=task.core,
        read=read,
        task=(block, shape, job.settings),
    )
    table, index = cells_of_ends(ends, under_way.row, shape=shape, settings=job.settings)
    save_array(job.file("index", block), index)
    save_cells(job.file("begun", block, "npz"), table)
    if keeps_positions(job.settings):
        save_array(job.file("ends", block), ends)
    path = message(job.work, 0, block)
    return len(ends), post(path, [under_way], len(under_way), job.grid)


def continue_block(task: Task) -> tuple[int, tuple[Sent, Sent]]:
    """Stage track, later rounds: what others handed over; done particles go to their home."""
    total = number_of(task.mail)
    path = message(task.job.work, task.round, task.block)
    return total, post(path, _advanced(task, total), total, task.job.grid)


def _advanced(task: Task, total: int) -> Iterator[Particles]:
    """The particles that came to a block, some at a time, where they stop or leave it."""
    job, read, flow = task.job, task.job.region_read(task.block), None
    for particles in collect(job.work, task.mail):
        if flow is None:  # checked in the first round
            if len(particles) == total:
                read = region_needed(particles, read, job.settings)
            flow = kernels_for(job.settings.backend).interleave(job.part_of_flow(read))
        yield advance(
            flow, particles, origin=read.start, shape=job.grid.shape, settings=job.settings
        )


class _Round:
    """Sorts what the blocks of a round hand over."""

    def __init__(self, number: int, senders: Sequence[int], came_home: Grouped) -> None:
        self.number, self.senders, self.came_home = number, senders, came_home
        self.particles, self.under_way = 0, Grouped(4)

    def __call__(self, position: int, result: tuple[int, tuple[Sent, Sent]]) -> None:
        """What one block has handed over."""
        particles, lists = result
        self.particles += particles
        sender = self.senders[position]
        for boxes, sent in zip((self.under_way, self.came_home), lists, strict=True):
            for goal, first, end in sent:
                boxes.add(goal, self.number, sender, first, end)


def _track(run: Run, job: SegmentJob, mark: str) -> tuple[int, Grouped, int]:
    """All rounds: number of particles, what came home to each block, number of rounds."""
    came_home, blocks = Grouped(4), range(len(job.grid))
    this = _Round(0, blocks, came_home)
    tasks, voxels = Each(blocks, lambda block: Task(job, block)), job.grid.sizes
    run.ledger.each(run.engine, "track", mark, start_block, tasks, use=this, voxels=voxels)
    particles = this.particles
    for rounds in itertools.count(1):
        bound = this.under_way
        if len(bound) == 0:
            return particles, came_home, rounds
        this = _Round(rounds, bound.blocks(), came_home)
        tasks = Each(this.senders, partial(_next_task, job, rounds, bound))
        stage = f"track-{rounds + 1}"
        run.ledger.each(run.engine, stage, mark, continue_block, tasks, use=this)
    raise AssertionError("unreachable: rounds go on until no particle is left")


def _next_task(job: SegmentJob, rounds: int, bound: Grouped, block: int) -> Task:
    return Task(job, block, round=rounds, mail=bound.of(block))


@dataclass(frozen=True, repr=False)
class SegmentResult(RunResult):
    """What `segment` made: ``array`` are the labels."""

    @property
    def instances(self) -> MeasuredInstances:
        """The table of instances, read from ``output/instances/table.npz``."""
        return load_measured(self.path / TABLES / TABLE)


def segment(
    flows: Any,
    output: Any,
    *,
    foreground: Any = None,
    threshold: float = 0.0,
    n_steps: int = 100,
    step_size: float = 1.0,
    convergence_radius: float = 4.0,
    min_size: int = 50,
    group: int = 1,
    flow_error_threshold: float = 0.0,
    fill_holes: bool = False,
    keep_evidence: bool = False,
    interpolation: str = "nearest",
    scale: float | None = None,
    halo: Any = "auto",
    blocks: Any = None,
    work_dir: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    cluster: Any = None,
    progress: bool | None = None,
    zarr_format: int = 3,
    ignore_memory: bool = False,
    backend: str = "auto",
) -> SegmentResult:
    """Make instance labels of a flow field that need not fit in memory.

    Parameters
    ----------
    flows
        ``[3,Z,Y,X]`` float, ``(dz,dy,dx)``, or whole numbers with a ``scale``: path, URL, zarr,
        dask or NumPy array.
    output
        Path of the OME-Zarr labels to make.
    foreground
        ``[Z,Y,X]``: labels, a mask or a probability; ``None`` takes the voxels whose flow is not
        0 (without the sinks of direct flows, which are 0).
    threshold
        Foreground is where ``foreground`` is above this.
    n_steps, step_size
        See `track_flows`.
    convergence_radius, min_size
        See `cluster_convergence`.
    group
        1, convex objects; 2, elongated ones; 3, thin ones: see `postprocess_single`.
    flow_error_threshold
        Above 0: instances whose flow is farther than this from the direct flow are dropped, see
        `remove_bad_flow_masks`.
    fill_holes
        Give background that one instance encloses to it, see `topo_dask.fill_holes`.
    keep_evidence
        Keep in ``output/evidence`` what `relabel` needs to make other labels in seconds: the part
        of every voxel in ``parts`` (about twice the labels on disk) and in ``joins.npz`` what is
        known of each two parts ``a, b`` that touch or end close together (57 bytes):
        ``area``, ``mean_dot`` and ``crossing`` of their contact, and whether they are ``close``,
        nearer than the convergence radius; in ``parts.npz`` what is known of each part (160
        bytes). A part is what one block alone joins of an instance.
    interpolation, scale
        See `track_flows`.
    halo
        Voxels around a block that its particles may cross without being handed over. It saves
        rounds and changes nothing else. "auto": a few blocks are tried to see how far particles
        go; then that with which the fewest voxels are read, and the result says why.
    blocks, work_dir, resume, overwrite, cluster, progress, zarr_format, ignore_memory, backend
        See `RunOptions`.

    Returns
    -------
    SegmentResult
        ``.array`` is the zarr array of labels, ``output/s0``: 0 background, 1..K by smallest
        convergence cell, the same for any blocks, halo and cluster. ``.instances`` is the table
        of instances (size, box, centroid, faces of the volume that it touches, convergence point,
        flow error), also for spreadsheets: ``output/instances/table.csv``.

    Raises
    ------
    TopoError
        One of its kinds that names the argument: before any work starts, or, for NaN and
        infinity in the flow and NaN in the foreground, while running; then nothing is published.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> flow = np.zeros((3, 1, 1, 8), np.float32)
    >>> flow[2, 0, 0] = [1, 1, -1, -1, 1, 1, -1, -1]
    >>> made = segment(
    ...     flow, folder + "/a.zarr", convergence_radius=2.0, min_size=1, cluster="sync"
    ... )
    >>> made.array[0, 0]
    array([1, 1, 1, 1, 2, 2, 2, 2], dtype=uint32)
    >>> made.instances.centroid[:, 2], made.instances.convergence[:, 2]
    (array([1.5, 5.5]), array([1.5, 5.5]))
    """
    options = RunOptions(
        blocks, work_dir, resume, overwrite, cluster, progress, zarr_format, ignore_memory, backend
    )
    settings = SegmentSettings(
        n_steps,
        step_size,
        convergence_radius,
        min_size,
        group,
        interpolation,
        options.backend,
    )
    refine = RefineSettings(flow_error_threshold, fill_holes)
    check_halo(halo)
    boolean("keep_evidence", keep_evidence)
    field, mask, scale = _open_inputs(flows, foreground, threshold, scale)
    grid = options.grid(tuple(int(n) for n in field.shape[1:]))
    place = options.output(output, [field, mask])
    inputs = [input_mark(field), None if mask is None else input_mark(mask), threshold, scale]
    marks = marks_of(inputs, settings, grid, halo)
    title = f"Instances of {'x'.join(map(str, grid.shape))} voxels"
    final = fingerprint(marks[2], refine, bool(keep_evidence), zarr_format)
    if published_already(place, final, options):
        return SegmentResult(place.open(), place.path, title, 0.0, {})
    began = time.monotonic()
    work = SegmentWork(
        title,
        grid,
        volumes([field, mask]),
        settings,
        bool(keep_evidence),
        zarr_format,
        halo=halo,
        refine=refine,
    )
    with open_run(place, options, [settings, refine], work) as run:
        job = SegmentJob(
            scaled_store(stored(field, run.work, argument="flows"), scale),
            None if mask is None else stored(mask, run.work, argument="foreground"),
            threshold,
            settings,
            grid,
            halo,
            run.work,
        )
        kept = final if keep_evidence else None
        prepared = prepare(run, job, marks, refine, zarr_format=zarr_format, evidence=kept)
        details = _write_all(prepared, refine)
        geometry = geometry_of(field if mask is None else mask)
        array = place.publish_labels(geometry=geometry, attributes={"fingerprint": final})
    seconds = time.monotonic() - began
    details |= {"speed": speed(grid_voxels(grid), seconds), **run.where}
    return SegmentResult(array, place.path, title, seconds, details)


def grid_voxels(grid: BlockGrid) -> int:
    """Voxels of the whole volume."""
    return Region((0, 0, 0), grid.shape).size


def _open_inputs(
    flows: Any, foreground: Any, threshold: float, scale: Any
) -> tuple[Any, Any, float]:
    field = open_input(flows, argument="flows", axes=4)
    known = check_scaled_flow(field, scale, argument="flows")
    number("threshold", threshold, lambda v: True, "a finite number", default=0.0)
    if foreground is None:
        return field, None, known
    mask = open_input(foreground, argument="foreground", axes=3)
    check_mask(mask, argument="foreground")
    check_same_shape(mask.shape, field.shape[1:], argument="foreground", of="flows")
    return field, mask, known


def marks_of(
    inputs: list[Any], settings: SegmentSettings, grid: BlockGrid, halo: Any
) -> tuple[str, str, str]:
    """Marks of tracking, of the cells and of the numbers: each adds what it depends on."""
    steps = [settings.n_steps, settings.step_size, settings.interpolation]
    ends = [settings.convergence_radius, keeps_positions(settings)]
    track = fingerprint("track", inputs, grid.chunks, str(halo), steps, ends)
    cells = fingerprint(track, "cells")
    return track, cells, fingerprint(cells, "number", settings.min_size, settings.group)


@dataclass(frozen=True)
class Prepared:
    """A segmentation whose instances are known and not written yet.

    Parameters
    ----------
    chain, view, job, measures
        What is written.
    particles, rounds, reason
        How many were tracked, in how many rounds, and why with this halo.
    dropped
        How many instances the flow check dropped; ``None`` without a check.
    """

    chain: Chain
    view: View
    job: SegmentJob
    measures: Measures
    particles: int
    rounds: int
    reason: str
    dropped: int | None = None


def prepare(
    run: Run,
    job: SegmentJob,
    marks: tuple[str, str, str],
    refine: RefineSettings,
    *,
    zarr_format: int,
    evidence: str | None = None,
) -> Prepared:
    """Everything up to the labels; ``evidence`` is the fingerprint that what is kept bears."""
    job, reason = with_halo(run, job, marks[0])
    particles, came_home, rounds = _track(run, job, marks[0])
    merged = merge(run, job, came_home, marks)
    out, identity = _parts_array(run, job, zarr_format, evidence is not None)
    written = replace(job, out=out)
    tasks = Each(range(len(job.grid)), lambda block: MergeTask(written, block))
    mark = fingerprint(marks[1], identity)  # parts are parts, however large and in which group
    ledger, sizes = run.ledger, job.grid.sizes
    ledger.each(run.engine, "labels", mark, label_block, tasks, use=ignored, voxels=sizes)
    names = run.work / "parts" / "names.npy"
    numbered = fingerprint(mark, marks[2])
    base = View(out, merged.instances, merged.voxels, numbered, names=names, stored_mark=mark)
    chain = Chain(run, job.grid, base, zarr_format)
    if evidence is not None:
        _keep(chain, job, merged, evidence)
    view = follow(chain, steps_of(job, evidence is not None))
    measures, dropped = measure(chain, view, job), None
    if refine.flow_error_threshold > 0:
        found = view.instances
        view, measures = check_flows(chain, view, job, measures, refine.flow_error_threshold)
        dropped = found - view.instances
    return Prepared(chain, view, job, measures, particles, rounds, reason, dropped)


def write(prepared: Prepared, target: Target, refine: RefineSettings) -> dict[str, Any]:
    """Write labels and table of a prepared segmentation; gives what is worth knowing."""
    view, job = prepared.view, prepared.job
    filled = finish(
        prepared.chain, view, job, prepared.measures, target, fill_holes=refine.fill_holes
    )
    details: dict[str, Any] = {
        "instances": view.instances,
        "foreground": f"{prepared.particles} voxels, {view.voxels} of them labelled",
        "blocks": repr(job.grid),
        "rounds": f"{prepared.rounds} with a halo of {job.halo} ({prepared.reason})",
    }
    if prepared.dropped is not None:
        details["flow check"] = f"{prepared.dropped} instances dropped"
    if refine.fill_holes:
        details["holes"] = f"{filled} voxels filled"
    return details


def _write_all(prepared: Prepared, refine: RefineSettings) -> dict[str, Any]:
    """Make the output's array and write all of it."""
    chain = prepared.chain
    out, identity = chain.target("output", prepared.view.instances, last=True)
    (table,) = tables_place(chain.run, [TABLE], chain.zarr_format)
    return write(prepared, Target(out, table, identity), refine)


def _parts_array(run: Run, job: SegmentJob, zarr_format: int, kept: bool) -> tuple[Any, str]:
    """The array of the owners' components, each of which belongs to one instance, kept or not."""
    shape = job.grid.shape
    chunks = output_chunks(job.grid.largest, shape)
    folder = run.output.beside(FOLDER)
    if not kept:  # an unfinished run may have begun to keep it
        shutil.rmtree(folder, ignore_errors=True)
    path = (folder if kept else run.work / "parts") / "parts"
    identity = run.work / "parts" / ("identity-kept" if kept else "identity")
    form = zarr_format if kept else 3
    return scratch_array(path, shape, chunks, np.uint64, identity=identity, zarr_format=form)


def _keep(chain: Chain, job: SegmentJob, merged: Merged, final: str) -> None:
    keep_evidence_of(
        chain,
        edges=merged.tables,
        flow=job.flow,
        step_size=job.settings.step_size,
        sums=[job.file("measure", n, "npz") for n in range(len(job.grid))],
        final=final,
        settings={
            "min_size": int(job.settings.min_size),
            "group": int(job.settings.group),
            "blocks": list(job.grid.largest),
        },
    )


def steps_of(job: SegmentJob, kept: bool) -> list[Step]:
    """What is done with the clusters, in this order."""
    steps: list[Step] = []
    if job.settings.group == 2:
        step_size = job.settings.step_size
        steps.append(partial(join_step, flow=job.flow, step_size=step_size, stored=kept))
        steps.append(split_step)
    if job.settings.group == 3:
        steps.append(orphan_step)
    return steps
