"""The table of instances of labels that were made of evidence.

Sizes, boxes, centroids and borders are those of the labels. Where an instance ends follows from
what is known of the parts: of a part that several instances share (pieces of group 2, orphans of
group 3) each voxel counts with the mean of the part.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from topo_dask.graph.instances import facts_of_block
from topo_dask.grid import BlockGrid, Region
from topo_dask.kernels import cpu
from topo_dask.run.chain import Chain, View
from topo_dask.run.evidence import Evidence
from topo_dask.run.files import load_array, save_array
from topo_dask.run.ledger import fingerprint
from topo_dask.run.measured import measured, save_measured
from topo_dask.run.refine import (
    Measures,
    TableTask,
    compared,
    gathered,
    load_sums,
    save_sums,
    write_table,
)
from topo_dask.run.segment import SegmentJob
from topo_dask.storage import AnyArray


@dataclass(frozen=True)
class PartsTask:
    """One block of the labels, and the parts that they were made of."""

    view: View
    parts: AnyArray
    means: Path
    grid: BlockGrid
    block: int
    path: Path

    @property
    def core(self) -> Region:
        """The block's voxels."""
        return self.grid.region(self.block)

    def __str__(self) -> str:
        return f"block {self.core}"


def measure_parts(task: PartsTask) -> int:
    """Stage measure: facts of a block's labels and where their parts end."""
    labels = task.view.read(task.core)
    inside = labels > 0
    parts = np.asarray(task.parts[task.core.slices])[inside]
    ends = load_array(task.means, memory_map=True)[parts]
    table = cpu.end_sums(labels[inside], np.asarray(ends))
    save_sums(task.path, facts=facts_of_block(labels, task.core.start), ends=table)
    return 0


def write_bare_table(task: TableTask) -> int:
    """Stage table, without any flow: its error is NaN; gives how many instances."""
    facts, ends = task.measures.load("facts"), task.measures.load("ends")
    unknown = np.full(len(facts), np.nan)
    save_measured(task.path, measured(facts, ends, unknown, task.shape))
    return len(facts)


def measure_all(chain: Chain, view: View, evidence: Evidence, *, cut: bool) -> Measures:
    """Sums over the instances of the labels; of parts that were only joined no voxel is read."""
    mark = fingerprint(view.mark, "measure", evidence.fingerprint)
    if not cut:
        return gathered(chain, view, mark, [evidence.sizes], chain.base.names)
    known = load_sums(evidence.sizes)["ends"]
    means = chain.work / "means.npy"
    save_array(means, np.concatenate([np.zeros((1, 3)), known.means]))
    tasks = [
        PartsTask(view, evidence.parts, means, chain.grid, n, chain.work / "again" / f"{n}.npz")
        for n in range(len(chain.grid))
    ]
    chain.stage("measure", mark, measure_parts, tasks)
    return gathered(chain, view, mark, [task.path for task in tasks], None)


def table_of(
    chain: Chain,
    view: View,
    evidence: Evidence,
    path: Path,
    *,
    cut: bool,
    flows: tuple[SegmentJob, str] | None,
) -> None:
    """Write the table of instances.

    Parameters
    ----------
    chain, view
        The steps, and the labels in the end.
    evidence
        What they were made of.
    path
        Of the table, without its ending.
    cut
        Whether a step gave voxels of one part to several instances.
    flows
        A job that reads the flow, and a text that changes when the flow does; ``None``: the error
        of the flow is not known.
    """
    measures = measure_all(chain, view, evidence, cut=cut)
    mark = fingerprint(measures.mark, "table", chain.run.output.identity)
    sums: tuple[Path, ...] = ()
    if flows is not None:
        job, flow_mark = flows
        mark = fingerprint(mark, flow_mark)
        sums = compared(chain, view, job, measures, mark)
    write = write_bare_table if flows is None else write_table
    chain.stage("table", mark, write, [TableTask(measures, sums, chain.grid.shape, path)])
