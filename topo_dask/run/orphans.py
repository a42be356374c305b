"""Group 3 on disk: foreground without an instance takes the label of the nearest labelled voxel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from topo_dask.graph.nearest import nearest_over_blocks
from topo_dask.graph.orphans import adopted, orphans_of
from topo_dask.grid import BlockGrid, Region
from topo_dask.run.chain import Chain, View
from topo_dask.run.ledger import fingerprint
from topo_dask.storage import AnyArray


@dataclass(frozen=True)
class OrphanTask:
    """One block whose foreground is to be labelled."""

    base: View
    view: View
    grid: BlockGrid
    block: int
    out: AnyArray

    @property
    def core(self) -> Region:
        """The block's voxels."""
        return self.grid.region(self.block)

    def __str__(self) -> str:
        return f"block {self.core}"


def label_orphans(task: OrphanTask) -> int:
    """Stage orphans: a block's labels and, for orphans, the nearest ones; gives labelled voxels."""
    labels = task.view.read(task.core).astype(task.out.dtype)
    # The stored number of the base is 0 exactly where there is no foreground.
    wanted = orphans_of(task.base.stored(task.core), labels, task.core.start)
    found = nearest_over_blocks(wanted, task.grid, task.view.read)
    labels = adopted(labels, wanted, found, task.core.start)
    task.out[task.core.slices] = labels
    return int(np.count_nonzero(labels))


def orphan_step(chain: Chain, view: View, last: bool) -> View:
    """Step: orphans take the nearest label, at any distance. Where there is none, nothing changes.

    Labels are read from where they are and written elsewhere, so no orphan sees another's label.
    """
    if view.instances == 0:
        return view
    out, identity = chain.target("orphans", view.instances, last=last)
    mark = fingerprint(view.mark, "orphans", identity)
    tasks = [OrphanTask(chain.base, view, chain.grid, n, out) for n in range(len(chain.grid))]
    labelled = chain.stage("orphans", mark, label_orphans, tasks)
    return View(out, view.instances, sum(labelled), mark, final=last)
