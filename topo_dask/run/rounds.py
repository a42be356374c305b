"""Diffusion of blocks on disk in rounds: a block reads its neighbours' fields of the last round.

The fields after t iterations are a generation, in a folder of its own: a round reads one and
writes the next, so it can be cut short anywhere and done again. The one before is removed when
the round is done. Blocks in which no instance goes on are not touched any more.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.graph.context import anchors_of, context_region, iterations_of
from topo_dask.graph.flows import rows_in
from topo_dask.grid import Region
from topo_dask.kernels import cpu
from topo_dask.kernels.backends import kernels_for
from topo_dask.run.files import load_array, load_instances, load_table, save_array, save_table
from topo_dask.run.flow_job import FlowJob
from topo_dask.run.job import Run
from topo_dask.run.ledger import fingerprint


@dataclass(frozen=True)
class RoundTask:
    """One block of a round."""

    job: FlowJob
    number: int
    span: cpu.Span

    def __str__(self) -> str:
        of = "" if self.job.row is None else f"class {self.job.row}, "
        return f"{of}block {self.job.grid.region(self.number)}"


def _generation(job: FlowJob, iterations: int) -> Path:
    """Where the fields after some iterations are."""
    assert job.rounds is not None
    return job.rounds / f"after-{iterations}"


def _state(job: FlowJob, number: int, iterations: int) -> Path:
    """Where the fields of a block after some iterations are: the bytes of one after the other."""
    return _generation(job, iterations) / f"{number}.npy"


def _fragments(job: FlowJob, number: int) -> Path:
    """Where the flows of a block's instances are, by the round in which they ended."""
    assert job.rounds is not None
    return job.rounds / "flows" / str(number)


def _read_fields(job: FlowJob, region: Region, iterations: int) -> list[npt.NDArray[Any]]:
    """The fields of a region after some iterations; 0 in blocks in which nothing goes on."""
    going_on = load_array(_generation(job, iterations) / "blocks.npy")
    types = cpu.field_types(job.settings.potential)
    fields = [np.zeros(region.shape, dtype=dtype) for dtype in types]
    for number in job.grid.touching(region):
        if not going_on[number]:
            continue
        block = job.grid.region(number)
        common = block.intersect(region)
        inside, target = (common.relative_to(r.start).slices for r in (block, region))
        state = load_array(_state(job, number, iterations), memory_map=True)
        for field in fields:
            bytes_of, state = np.split(state, [block.size * field.itemsize])
            field[target] = bytes_of.view(field.dtype).reshape(block.shape)[inside]
    return fields


def advance_block(task: RoundTask) -> tuple[int, int]:
    """Stage round: some iterations of a block; gives its finished voxels, its most iterations."""
    job, span, core = task.job, task.span, task.job.grid.region(task.number)
    labels, table = job.read(core), load_instances(job.facts)
    inside = rows_in(table, cpu.compact(labels)[1])
    total = iterations_of(inside, job.settings, volume=job.volume)
    going_on = np.flatnonzero((total > span.first) | (span.first == 0))
    if going_on.size == 0:
        return 0, 0
    width = replace(job.settings, context=span.end - span.first, rounds=None)
    read = context_region(core, inside.take(going_on), total[going_on], width, job.volume)
    labels = job.read(read)
    rows = rows_in(table, cpu.compact(labels)[1]).moved(job.origin)
    fields, flow = kernels_for(job.settings.backend).diffusion_round(
        labels,
        _read_fields(job, read, span.first) if span.first else None,
        span=span,
        ids=rows.ids,
        iterations=iterations_of(rows, job.settings, volume=job.placed(job.volume)),
        anchors=anchors_of(rows),
        origin=job.placed(read).start,
        core=core.relative_to(read.start).slices,
        spatial_mask=job.read_mask(read),
        potential=job.settings.potential,
        spacing=job.settings.spacing,
    )
    at = np.flatnonzero(flow.any(axis=0))
    if at.size:
        path = _fragments(job, task.number) / f"{span.end}.npz"
        save_table(path, at=at.astype(np.uint32), flow=flow.reshape(3, -1)[:, at])
    most = int(total.max())
    if most > span.end:
        state = np.concatenate([field.ravel().view(np.uint8) for field in fields])
        save_array(_state(job, task.number, span.end), state)
    return int(at.size), most


def flow_of_rounds(job: FlowJob, number: int) -> npt.NDArray[np.float32]:
    """The flow of a block after the last round: float32 ``[3, *block shape]``."""
    core = job.grid.region(number)
    flow = np.zeros((3, core.size), dtype=np.float32)
    for path in sorted(_fragments(job, number).glob("*.npz")):
        part = load_table(path)
        flow[:, part["at"]] = part["flow"]
    return flow.reshape(3, *core.shape)


def fresh_rounds(job: FlowJob, mark: str) -> Path:
    """Where rounds of this mark are; what is there of others is removed."""
    folder = job.work / f"rounds-{mark}"
    for other in job.work.glob("rounds-*"):
        if other != folder:
            shutil.rmtree(other)
    return folder


def run_rounds(run: Run, job: FlowJob, length: int, mark: str) -> FlowJob:
    """Make all rounds of a volume; give the job that knows where their flows are.

    Parameters
    ----------
    run, job
        Where, and of what.
    length
        Iterations a round.
    mark
        Fingerprint of all that the flows depend on.
    """
    mark = fingerprint(mark, "rounds", length)
    job = replace(job, rounds=fresh_rounds(job, mark))
    prefix = "round" if job.row is None else f"class-{job.row}-round"
    most = np.full(len(job.grid), job.settings.n_iter, dtype=np.int64)  # not known yet
    blocks = np.arange(len(job.grid))
    span, number = cpu.Span(0, min(length, job.settings.n_iter)), 1
    while blocks.size:
        tasks = [RoundTask(job, n, span) for n in blocks.tolist()]
        voxels = [job.grid.sizes[n] for n in blocks.tolist()]
        stage = f"{prefix}-{number}"
        results = run.ledger.run(run.engine, stage, mark, advance_block, tasks, voxels=voxels)
        most[blocks] = [n for _, n in results]
        shutil.rmtree(_generation(job, span.first), ignore_errors=True)
        blocks = np.flatnonzero(most > span.end)
        span = cpu.Span(span.end, min(span.end + length, int(most.max(initial=0))))
        number += 1
        if blocks.size:
            save_array(_generation(job, span.first) / "blocks.npy", most > span.first)
    return job
