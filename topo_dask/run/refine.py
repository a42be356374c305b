"""The end of a segmentation on disk: measure, check flows, write, table of instances.

Sizes, boxes, coordinates, endpoints and errors of blocks are tables of whole numbers, summed as a
tree; so no decision depends on the blocks. The pass that writes the labels also fills holes and,
where no check has done so before, sums the errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import zarr

from topo_dask.graph.cleanup import mean_errors, numbers_of
from topo_dask.graph.flows import rows_in
from topo_dask.graph.instances import facts_of_block
from topo_dask.grid import BlockGrid, Region
from topo_dask.kernels import cpu
from topo_dask.kernels.backends import kernels_for
from topo_dask.kernels.tables import (
    EndTable,
    ErrorTable,
    InstanceTable,
    merge_ends,
    merge_errors,
    merge_instances,
    rename_ends,
    rename_instances,
)
from topo_dask.run.chain import Chain, View
from topo_dask.run.files import load_array, load_table, save_array, save_table
from topo_dask.run.holes import Decided, find_holes
from topo_dask.run.items import Each
from topo_dask.run.job import Run
from topo_dask.run.ledger import fingerprint
from topo_dask.run.measured import TABLES, measured, save_measured
from topo_dask.run.together import TablesTask
from topo_dask.storage import AnyArray

if TYPE_CHECKING:
    from topo_dask.run.segment import SegmentJob

FAN_IN = 64
"""Tables that one task adds up."""

KINDS: dict[str, Any] = {
    "facts": (InstanceTable, merge_instances),
    "ends": (EndTable, merge_ends),
    "errors": (ErrorTable, merge_errors),
}
"""What blocks find out about instances, and how that is added up."""


@dataclass(frozen=True)
class Measures:
    """Sums over whole instances, on disk.

    Parameters
    ----------
    folder
        Where their columns are.
    mark
        Fingerprint of all that they depend on.
    checked
        Whether the errors of the flow are among them.
    """

    folder: Path
    mark: str
    checked: bool = False

    def load(self, name: str) -> Any:
        """One of `KINDS`; only rows that are used are read."""
        kind, _ = KINDS[name]
        paths = (self.folder / f"{name}-{f.name}.npy" for f in fields(kind))
        return kind(*(load_array(path, memory_map=True) for path in paths))


def save_columns(folder: Path, **tables: Any) -> None:
    """Write tables, one file a column, so that tasks can read the rows they need."""
    for name, table in tables.items():
        for field in fields(table):
            save_array(folder / f"{name}-{field.name}.npy", getattr(table, field.name))


def columns_of(**tables: Any) -> dict[str, npt.NDArray[Any]]:
    """The columns of some of `KINDS`, as they stand in a file."""
    return {
        f"{name}-{field.name}": getattr(table, field.name)
        for name, table in tables.items()
        for field in fields(table)
    }


def save_sums(path: Path, **tables: Any) -> None:
    """Write some of `KINDS` of a block."""
    save_table(path, **columns_of(**tables))


def load_sums(path: Path) -> dict[str, Any]:
    """Read what `save_sums` wrote."""
    columns = load_table(path)
    return {
        name: kind(*(columns[f"{name}-{f.name}"] for f in fields(kind)))
        for name, (kind, _) in KINDS.items()
        if f"{name}-{fields(kind)[0].name}" in columns
    }


def added_up(paths: Sequence[Path]) -> dict[str, Any]:
    """The sums of several files."""
    parts = [load_sums(path) for path in paths]
    return {name: KINDS[name][1]([part[name] for part in parts]) for name in parts[0]}


def sum_tables(task: TablesTask) -> int:
    """Later stages of a sum: one table of several; gives how many."""
    save_sums(task.path, **added_up(task.paths))
    return len(task.paths)


def few(chain: Chain, stage: str, mark: str, paths: Sequence[Path]) -> tuple[Path, ...]:
    """Files that together hold the same sums, at most `FAN_IN`."""
    level = 1
    while len(paths) > FAN_IN:
        level += 1
        folder = chain.work / f"{stage}-{level}"
        tasks = Each(range(-(-len(paths) // FAN_IN)), partial(_sum_task, folder, paths))
        chain.stage(f"{stage}-{level}", mark, sum_tables, tasks)
        paths = [folder / f"{n}.npz" for n in range(len(tasks))]
    return tuple(paths)


def _sum_task(folder: Path, paths: Sequence[Path], number: int) -> TablesTask:
    some = tuple(paths[number * FAN_IN : (number + 1) * FAN_IN])
    return TablesTask(some, folder / f"{number}.npz")


@dataclass(frozen=True)
class BlockTask:
    """One block of the labels so far."""

    job: SegmentJob
    view: View
    block: int
    path: Path
    measures: Measures | None = None

    @property
    def grid(self) -> BlockGrid:
        """The blocks of the run."""
        return self.job.grid

    @property
    def core(self) -> Region:
        """The block's voxels."""
        return self.grid.region(self.block)

    def flow(self) -> npt.NDArray[np.float32]:
        """The flow of the block, interleaved and checked."""
        return self.job.read_flow(self.block, self.core)

    def __str__(self) -> str:
        return f"block {self.core}"


@dataclass(frozen=True)
class WholeTask:
    """Something about all instances at once."""

    view: View
    sums: tuple[Path, ...]
    measures: Measures
    threshold: float = 0.0
    names: Path | None = None

    def __str__(self) -> str:
        return "all instances"


# ------------------------------------------------------------------------------------- measure


def measure_block(task: BlockTask) -> int:
    """Stage measure: the labels of a block that a step has changed."""
    labels, job = task.view.read(task.core), task.job
    ends = cpu.end_sums(labels[job.load_mask(task.block)], job.load_ends(task.block))
    save_sums(task.path, facts=facts_of_block(labels, task.core.start), ends=ends)
    return 0


def gather(task: WholeTask) -> int:
    """Stage facts: the sums of all blocks, under the names of the view; gives how many."""
    tables = added_up(task.sums)
    if task.names is not None:
        names = load_array(task.names, memory_map=True)
        facts, ends = tables["facts"], tables["ends"]
        tables["facts"] = rename_instances(facts, np.asarray(names[facts.ids]))
        tables["ends"] = rename_ends(ends, np.asarray(names[ends.ids]))
    save_columns(task.measures.folder, **tables)
    return len(tables["facts"])


def measure(chain: Chain, view: View, job: SegmentJob) -> Measures:
    """Sums over the instances of some labels.

    What was summed while the base was written is enough where steps have only renamed it.
    """
    mark = fingerprint(view.mark, "measure")
    blocks = range(len(chain.grid))
    if view.array is chain.base.array:
        paths, names = Each(blocks, lambda n: job.file("measure", n, "npz")), view.names
    else:
        paths, names = Each(blocks, lambda n: chain.work / "again" / f"{n}.npz"), None
        tasks = Each(blocks, lambda n: BlockTask(job, view, n, paths[n]))
        chain.stage("measure", mark, measure_block, tasks)
    return gathered(chain, view, mark, paths, names)


def gathered(
    chain: Chain, view: View, mark: str, paths: Sequence[Path], names: Path | None
) -> Measures:
    """Sums of all blocks, from files of each; ``names`` are those of the instances in them."""
    of_files = mark if names is None else fingerprint(chain.base.bare.mark, "measure")
    sums = few(chain, "measure", of_files, paths)
    made = Measures(chain.work / "facts", mark)
    chain.stage("facts", mark, gather, [WholeTask(view, sums, made, names=names)])
    return made


# --------------------------------------------------------------------------------------- check


def errors_in(task: BlockTask, labels: npt.NDArray[Any]) -> ErrorTable:
    """How far the flow of a block is from the direct flow of its whole instances."""
    assert task.measures is not None
    present = cpu.compact(labels)[1]
    facts = rows_in(task.measures.load("facts"), present)
    return kernels_for(task.job.settings.backend).flow_errors(
        labels, task.flow(), ids=facts.ids, centres=facts.centres, origin=task.core.start
    )


def compare_block(task: BlockTask) -> int:
    """Stage errors: squared differences to the direct flow in a block; gives how many tables."""
    labels = task.view.read(task.core)
    save_sums(task.path, errors=errors_in(task, labels))
    return 1


def drop_all(task: WholeTask) -> tuple[int, int]:
    """Stage check: new names, 0 where the error is too large; gives instances and voxels left."""
    facts, ends = task.measures.load("facts"), task.measures.load("ends")
    errors = added_up(task.sums)["errors"]
    kept = mean_errors(facts, errors) <= task.threshold
    ids, numbers = numbers_of(facts.ids, kept)
    names = np.zeros(task.view.instances + 1, dtype=np.uint64)
    names[ids] = numbers
    before = task.view.names
    folder = task.measures.folder.with_name("checked")
    save_array(folder / "names.npy", names if before is None else names[load_array(before)])
    left = {"facts": facts, "ends": ends, "errors": errors}
    for name, table in left.items():
        _, *columns = (getattr(table, f.name) for f in fields(table))
        left[name] = KINDS[name][0](numbers[kept], *(column[kept] for column in columns))
    save_columns(folder, **left)
    return len(left["facts"]), int(left["facts"].voxels.sum())


def compared(
    chain: Chain, view: View, job: SegmentJob, measures: Measures, mark: str
) -> tuple[Path, ...]:
    """Files with the errors of the flow of all instances."""
    tasks = [
        BlockTask(job, view, n, chain.work / "errors" / f"{n}.npz", measures)
        for n in range(len(chain.grid))
    ]
    chain.stage("errors", mark, compare_block, tasks)
    return few(chain, "errors", mark, [task.path for task in tasks])


def check_flows(
    chain: Chain, view: View, job: SegmentJob, measures: Measures, threshold: float
) -> tuple[View, Measures]:
    """Drop instances whose flow is too far from the direct flow. Writes only names."""
    found = fingerprint(measures.mark, "errors")
    sums = compared(chain, view, job, measures, found)
    mark = fingerprint(found, "check", threshold)
    task = WholeTask(view, sums, measures, threshold)
    ((instances, voxels),) = chain.stage("check", mark, drop_all, [task])
    folder = measures.folder.with_name("checked")
    left = View(view.array, instances, voxels, mark, names=folder / "names.npy")
    return left, Measures(folder, mark, checked=True)


# --------------------------------------------------------------------------------------- write


@dataclass(frozen=True)
class WriteTask:
    """One block of the output."""

    block_task: BlockTask
    out: AnyArray
    holes: Decided | None

    @property
    def block(self) -> int:
        """Its number."""
        return self.block_task.block

    def __str__(self) -> str:
        return str(self.block_task)


def write_block(task: WriteTask) -> int:
    """Stage write: a block's labels into the output; gives how many voxels were holes."""
    inner = task.block_task
    core, shape = inner.core, inner.grid.shape
    read = core if task.holes is None else core.grow(1, within=shape)
    around = inner.view.read(read)
    labels = np.ascontiguousarray(around[core.relative_to(read.start).slices])
    tables: dict[str, Any] = {}
    assert inner.measures is not None
    if not inner.measures.checked:
        tables["errors"] = errors_in(inner, labels)
    filled = 0
    if task.holes is not None:
        full = task.holes.fill(around, core, shape)
        added = np.where(labels == 0, full, np.zeros(1, full.dtype))
        tables["facts"] = facts_of_block(added, core.start)
        filled, labels = int(np.count_nonzero(added)), full
    if tables:
        save_sums(inner.path, **tables)
    task.out[core.slices] = labels.astype(task.out.dtype)
    return filled


@dataclass(frozen=True)
class TableTask:
    """The table of instances to write."""

    measures: Measures
    sums: tuple[Path, ...]
    shape: tuple[int, ...]
    path: Path

    def __str__(self) -> str:
        return "the table of instances"


def write_table(task: TableTask) -> int:
    """Stage table: all that is known of the instances, beside the labels; gives how many."""
    facts, ends = task.measures.load("facts"), task.measures.load("ends")
    more = added_up(task.sums) if task.sums else {}
    errors = more["errors"] if "errors" in more else task.measures.load("errors")
    flow_error = mean_errors(facts, errors)  # of what particles began in, not of holes
    if "facts" in more:
        facts = merge_instances([facts, more["facts"]])
    save_measured(task.path, measured(facts, ends, flow_error, task.shape))
    return len(facts)


@dataclass(frozen=True)
class Target:
    """Where the results of a segmentation go; see `tables_place`.

    Parameters
    ----------
    out
        The array of labels.
    table
        Path of the table of instances, without its ending.
    identity
        A text that changes when either was made anew.
    """

    out: AnyArray
    table: Path
    identity: str


def tables_place(run: Run, names: Sequence[str], zarr_format: int) -> list[Path]:
    """Where the tables of instances are published together with the labels, by their names.

    Their folder is a group: zarr warns of what is none wherever it lists a group.
    """
    folder = run.output.beside(TABLES)
    known = {f"{name}.{ending}" for name in names for ending in ("npz", "csv")}
    if folder.is_dir():  # of a run that ended here, of other classes or another format maybe
        for path in folder.iterdir():
            if path.name not in known:
                path.unlink()
    zarr.open_group(store=str(folder), mode="a", zarr_format=zarr_format)  # type: ignore[arg-type]
    return [folder / name for name in names]


def finish(
    chain: Chain,
    view: View,
    job: SegmentJob,
    measures: Measures,
    target: Target,
    *,
    fill_holes: bool,
) -> int:
    """Write labels and table; gives the number of voxels that were holes."""
    holes = find_holes(chain, view) if fill_holes else None
    mark = fingerprint(view.mark, measures.mark, "write", fill_holes, target.identity)
    blocks = range(len(chain.grid))
    paths = Each(blocks, lambda n: chain.work / "write" / f"{n}.npz")

    def write(block: int) -> WriteTask:
        task = BlockTask(job, view, block, paths[block], measures)
        return WriteTask(task, target.out, None if holes is None else holes[block])

    tasks = Each(blocks, write)
    filled = chain.stage("write", mark, write_block, tasks)
    sums: tuple[Path, ...] = ()
    if fill_holes or not measures.checked:
        sums = few(chain, "write", mark, paths)
    table = TableTask(measures, sums, chain.grid.shape, target.table)
    chain.stage("table", mark, write_table, [table])
    return sum(filled)
