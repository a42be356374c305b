"""From cells of every block to parts and instances: owners, edges, one union, labels.

Nothing here is as long as the number of voxels. What the union reads is brought together by the
workers, so that its one task opens few files; what it finds of all parts is one file, of which
each block reads its own rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from topo_dask.graph.cells import cell_owners, ends_of_cells, with_those_home
from topo_dask.graph.instances import facts_of_block
from topo_dask.graph.merge import (
    Owned,
    ascending,
    component_sizes,
    edges_across,
    near_cells,
    number_instances,
    numbers_in,
    owned_cells,
    paint,
    places_of,
    reach_of,
)
from topo_dask.grid import Region
from topo_dask.kernels.tables import CellTable
from topo_dask.run.files import load_array, load_table, save_array, save_table
from topo_dask.run.items import Each
from topo_dask.run.job import Run
from topo_dask.run.mail import Grouped, Mail, Pairs, collect
from topo_dask.run.refine import save_sums
from topo_dask.run.together import column, in_few

if TYPE_CHECKING:
    from topo_dask.run.segment import SegmentJob

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MergeTask:
    """One block of a stage, with what it gets from others."""

    job: SegmentJob
    block: int
    mail: tuple[Mail, ...] = ()
    others: tuple[int, ...] = ()

    @property
    def core(self) -> Region:
        """The block's voxels."""
        return self.job.grid.region(self.block)

    def __str__(self) -> str:
        return f"block {self.core}"


@dataclass(frozen=True)
class NumberTask:
    """One union over all owners, whose components stand in some files in their order."""

    work: Path
    blocks: int
    tables: tuple[Path, ...]
    min_size: int

    def __str__(self) -> str:
        return "all components"


@dataclass(frozen=True)
class Merged:
    """What a union found.

    Parameters
    ----------
    instances, voxels
        Their number, and how many voxels they have.
    tables
        Files with all edges.
    """

    instances: int
    voxels: int
    tables: tuple[Path, ...]


def save_cells(path: Path, table: CellTable, **more: npt.ArrayLike) -> None:
    """Write cells, and what else is known of them."""
    save_table(path, cells=table.cells, counts=table.counts, offsets=table.offsets, **more)


def load_cells(path: Path) -> CellTable:
    """Read cells that `save_cells` wrote."""
    return CellTable(**load_table(path, ("cells", "counts", "offsets")))


def cells_of_block(task: MergeTask) -> list[int]:
    """Stage cells: where all of a block's particles ended; gives the owners of their cells."""
    job = task.job
    table, rows, home = with_those_home(
        load_cells(job.file("begun", task.block, "npz")),
        collect(job.work, task.mail),
        shape=job.grid.shape,
        settings=job.settings,
    )
    save_cells(
        job.file("cells", task.block, "npz"),
        table,
        rows=rows,
        home_rows=home.rows,
        home_cells=home.cells,
        home_positions=home.positions,
    )
    owners: list[int] = np.unique(cell_owners(table.cells, job.grid, job.radius)).tolist()
    return owners


def own_block(task: MergeTask) -> int:
    """Stage own: sum an owner's cells over the blocks that have some, join them; gives how many."""
    job = task.job
    parts = []
    for sender in task.others:
        table = load_cells(job.file("cells", sender, "npz"))
        mine = cell_owners(table.cells, job.grid, job.radius) == task.block
        parts.append(CellTable(table.cells[mine], table.counts[mine], table.offsets[mine]))
    owned = owned_cells(parts, job.grid.shape, job.radius)
    save_cells(job.file("own", task.block, "npz"), owned.table, roots=owned.roots)
    return len(owned.roots)


def _load_owned(job: SegmentJob, owner: int) -> Owned:
    columns = load_table(job.file("own", owner, "npz"))
    roots = columns.pop("roots")
    return Owned(CellTable(**columns), roots)


def edges_of_block(task: MergeTask) -> int:
    """Stage edges: components of an owner, their edges to later owners; gives the edges' number.

    Edges are between numbers of components, see `topo_dask.graph.merge.OWNER_BITS`.
    """
    job, region = task.job, task.core
    shape, own = job.grid.shape, _load_owned(job, task.block)
    roots, sizes = component_sizes(own)
    owners, near = [(task.block, roots)], []
    for number in task.others:
        other = _load_owned(job, number)
        owners.append((number, np.unique(other.roots)))
        near.append(near_cells(other, region, shape, job.radius))
    edges = numbers_in(edges_across(own, near, shape, job.radius), owners)
    counts = np.array([len(roots)])
    path = job.file("components", task.block, "npz")
    save_table(path, counts=counts, roots=roots, sizes=sizes, edges=edges)
    return len(edges)


def edges_in(tables: Sequence[Path], first: Int64) -> Iterator[Int64]:
    """The edges of all files, one file after the other: pairs of places, see `places_of`."""
    for edges in column(tables, "edges"):
        yield places_of(edges, first)


def _components_in(tables: Sequence[Path], ends: Int64) -> tuple[Int64, Int64]:
    """Roots and sizes of all files, one after the other."""
    roots, sizes = np.empty(ends[-1], np.int64), np.empty(ends[-1], np.int64)
    for path, first, end in zip(tables, ends[:-1], ends[1:], strict=True):
        table = load_table(path, ("roots", "sizes"))
        roots[first:end], sizes[first:end] = table["roots"], table["sizes"]
    return roots, sizes


def number_all(task: NumberTask) -> tuple[int, int]:
    """Stage number: one union over all owners; gives the number of instances, their voxels."""
    folder = task.work / "parts"
    known = list(column(task.tables, "counts"))
    counts = np.zeros(task.blocks + 1, dtype=np.int64)
    counts[load_array(folder / "owners.npy") + 1] = np.concatenate([*known, counts[:0]])
    first = np.cumsum(counts)
    ends = np.cumsum([0, *(some.sum() for some in known)], dtype=np.int64)
    roots, sizes, rows = ascending(*_components_in(task.tables, ends))
    pairs = (rows[places] for places in edges_in(task.tables, first))
    found = number_instances(roots, sizes, pairs, min_size=task.min_size)
    save_array(folder / "first.npy", first)
    rows += 1
    save_array(folder / "of-owner.npy", rows.view(np.uint64))
    for name in ("names", "voxels"):
        save_array(folder / f"{name}.npy", getattr(found, name))
    return found.instances, int(found.voxels[found.labels > 0].sum())


def parts_of_cells(job: SegmentJob, cells: Int64) -> npt.NDArray[np.uint64]:
    """The part of each of some cells."""
    parts, first = (
        load_array(job.work / "parts" / f"{name}.npy", memory_map=True)
        for name in ("of-owner", "first")
    )
    found = np.zeros(len(cells), dtype=np.uint64)
    owners = cell_owners(cells, job.grid, job.radius)
    for owner in np.unique(owners).tolist():
        known = load_table(job.file("own", owner, "npz"), ("cells", "roots"))
        roots, row = np.unique(known["roots"], return_inverse=True)
        own = np.asarray(parts[first[owner] : first[owner] + len(roots)])
        mine = owners == owner
        found[mine] = own[row[np.searchsorted(known["cells"], cells[mine])]]
    return found


def label_block(task: MergeTask) -> None:
    """Stage labels: a block's parts of instances into their array, and what there is of each."""
    job, core = task.job, task.core
    cells = load_cells(job.file("cells", task.block, "npz"))
    parts = parts_of_cells(job, cells.cells)
    assert job.out is not None
    index = job.load_cell_rows(task.block)
    out = paint(job.load_mask(task.block), index, parts, job.out.dtype)
    job.out[core.slices] = out
    ends = ends_of_cells(cells, parts, shape=job.grid.shape, radius=job.radius)
    facts = facts_of_block(out, core.start)
    save_sums(job.file("measure", task.block, "npz"), facts=facts, ends=ends)


def ignored(number: int, result: Any) -> None:
    """Results that only the ledger keeps."""


def merge(run: Run, job: SegmentJob, came_home: Grouped, marks: tuple[str, str, str]) -> Merged:
    """All stages between tracking and labels; what came home is forgotten when it is used."""
    grid, (_, cell_mark, number_mark) = job.grid, marks

    def stage(name: str, function: Any, items: Sequence[Any], use: Any = ignored) -> None:
        run.ledger.each(run.engine, name, cell_mark, function, items, use=use)

    def cell_task(block: int) -> MergeTask:
        return MergeTask(job, block, mail=came_home.of(block))

    def keep_senders(block: int, owners: list[int]) -> None:
        for owner in owners:
            senders.add(owner, block)

    senders = Pairs()
    stage("cells", cells_of_block, Each(range(len(grid)), cell_task), keep_senders)
    came_home.clear()
    having = senders.blocks()
    present = bytearray(len(grid))
    for owner in having:
        present[owner] = 1

    def own_task(owner: int) -> MergeTask:
        return MergeTask(job, owner, others=tuple(senders.of(owner)))

    def edges_task(owner: int) -> MergeTask:
        near = reach_of(grid.region(owner), grid, job.radius)
        return MergeTask(job, owner, others=tuple(n for n in near if n > owner and present[n]))

    stage("own", own_block, Each(having, own_task))
    stage("edges", edges_of_block, Each(having, edges_task))
    tables = Each(having, lambda owner: job.file("components", owner, "npz"))
    few = in_few(tables, job.work / "together", partial(stage, "together"))
    save_array(job.work / "parts" / "owners.npy", np.asarray(having, dtype=np.int64))
    task = NumberTask(job.work, len(grid), few, job.settings.min_size)
    ((instances, voxels),) = run.ledger.run(run.engine, "number", number_mark, number_all, [task])
    return Merged(int(instances), int(voxels), task.tables)
