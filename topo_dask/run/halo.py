"""Stage halo: the width that tracking reads around blocks, found by trying a few of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from topo_dask.config import number
from topo_dask.graph.halo import TRIED, HaloChoice, beyond, choose_halo, halos_for, tried_blocks
from topo_dask.graph.scale import ScaledFlow
from topo_dask.graph.track import Particles, advance, flow_ready, region_read
from topo_dask.run.job import Run
from topo_dask.run.ledger import fingerprint
from topo_dask.run.rows import Row

if TYPE_CHECKING:
    from topo_dask.run.segment import SegmentJob

CHUNK = 64
"""Edge of a chunk where an array does not say."""


@dataclass(frozen=True)
class Try:
    """One block to try."""

    job: SegmentJob
    block: int

    def __str__(self) -> str:
        return f"block {self.job.grid.region(self.block)}"


def check_halo(halo: Any) -> None:
    """Raise unless a halo is "auto" or a whole number."""
    if isinstance(halo, str) and halo == "auto":
        return
    text = "'auto' or a whole number >= 0"
    number("halo", halo, lambda v: v >= 0, text, whole=True, default="'auto'")


def try_block(task: Try) -> tuple[int, int, list[int]]:
    """Follow some particles of a block; gives all, those followed, those beyond each halo."""
    job, core = task.job, task.job.grid.region(task.block)
    shape = job.grid.shape
    # One step at a time: the flow's way to a GPU would take longer than the steps.
    settings = replace(job.settings, backend="cpu")
    halos = halos_for(settings.travel, job.grid.largest)
    voxels = np.argwhere(job.read_mask(task.block))
    some = voxels[:: -(-len(voxels) // TRIED) or 1]
    read = region_read(core, halos[-1], shape, settings)
    part = job.part_of_flow(read)
    flow = flow_ready(part, read=read, block=core, argument=job.flow_argument, backend="cpu")
    nothing = np.zeros(len(some), dtype=np.int64)
    steps = np.ones(len(some), dtype=np.int32)
    there = Particles((some + np.asarray(core.start)).astype(np.float64), steps, nothing, nothing)
    farthest = nothing
    for _ in range(int(settings.n_steps)):
        there = advance(flow, there, origin=read.start, shape=shape, settings=settings)
        farthest = np.maximum(farthest, beyond(there.positions, core))
        there = replace(there, steps=steps)
    return len(voxels), len(some), [int((farthest > halo).sum()) for halo in halos]


def with_halo(run: Run, job: SegmentJob, mark: str) -> tuple[SegmentJob, str]:
    """The job with a halo, and why it has that."""
    if job.halo != "auto":
        return job, "as given"
    tasks = [Try(job, block) for block in tried_blocks(job.grid)]
    travel = job.settings.travel
    mark = fingerprint(mark, halos_for(travel, job.grid.largest))  # what was counted
    found = run.ledger.run(run.engine, "halo", mark, try_block, tasks)
    choice: HaloChoice = choose_halo(job.grid, _chunks(job.flow), travel, found)
    return replace(job, halo=choice.halo), choice.reason


def _chunks(flow: Any) -> tuple[int, ...]:
    """What of a stored flow is decoded at once, along the spatial axes."""
    while isinstance(flow, (Row, ScaledFlow)):
        flow = flow.array
    chunks = getattr(flow, "shards", None) or getattr(flow, "chunks", None) or (CHUNK,) * 3
    return tuple(int(n) for n in chunks[-3:])
