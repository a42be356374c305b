"""Facts of whole instances, from labels on disk to a table on disk; the table as an input.

A table a block, summed as a tree. A sum reads the ids of its parts, then one part at a time, so it
holds little more than its result.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from dask.base import tokenize
from zarr.abc.store import Store

from topo_dask import storage
from topo_dask.config import FlowSettings
from topo_dask.errors import InvalidArgument, InvalidType, OutputExists, TopoError
from topo_dask.graph.annotated import cut_instances, is_annotated
from topo_dask.graph.check import check_labels
from topo_dask.graph.instances import facts_of_block
from topo_dask.graph.instances import instance_table as table_of_array
from topo_dask.kernels.tables import InstanceTable, sum_instances
from topo_dask.plan.labels import InstancesWork
from topo_dask.run.files import (
    input_mark,
    load_instances,
    load_table,
    open_input,
    save_array,
    save_instances,
    save_table,
    stored,
)
from topo_dask.run.flow_job import FlowJob, Task
from topo_dask.run.job import Run, RunOptions, open_run, volumes
from topo_dask.run.ledger import fingerprint

COLUMNS = ("ids", "voxels", "sums", "lo", "hi")

FAN_IN = 64
"""Tables summed in one task."""


@dataclass(frozen=True)
class SumTask:
    """Some tables to sum: of blocks (level 0) or of sums of the level before."""

    job: FlowJob
    level: int
    number: int
    of: int  # tables on this level

    def path(self, level: int, number: int) -> Path:
        """Where a table is."""
        return self.job.work / ("table" if level == 0 else f"table-{level}") / f"{number}.npz"

    @property
    def parts(self) -> list[Path]:
        """Where the summands are."""
        first = self.number * FAN_IN
        return [self.path(self.level, n) for n in range(first, min(first + FAN_IN, self.of))]

    def __str__(self) -> str:
        return f"tables {self.number * FAN_IN} to {self.number * FAN_IN + len(self.parts) - 1}"


def measure_block(task: Task) -> int:
    """Stage table: facts of the instances of a block; gives their number."""
    job, region = task.job, task.job.grid.region(task.number)
    around = region.grow(1, within=job.grid.shape) if job.may_be_cut else region
    labels, mask = job.read(around), job.read_mask(around)
    table = facts_of_block(labels[region.relative_to(around.start).slices], region.start)
    cut = np.zeros(0, dtype=np.uint64)
    if job.may_be_cut and mask is not None:
        cut = cut_instances(labels, is_annotated(mask))
    save_table(job.work / "table" / f"{task.number}.npz", **_columns(table), cut=cut)
    return len(table)


def _columns(table: InstanceTable) -> dict[str, npt.NDArray[Any]]:
    return {name: getattr(table, name) for name in COLUMNS}


def _read_rows(path: Path) -> InstanceTable:
    return InstanceTable(**load_table(path, COLUMNS))


def sum_tables(task: SumTask) -> int:
    """Stage facts: one table of several; gives its number of instances."""
    job, parts = task.job, task.parts
    ids = [load_table(path, ("ids",))["ids"] for path in parts]
    table = sum_instances(ids, map(_read_rows, parts))
    cut = np.unique(np.concatenate([load_table(path, ("cut",))["cut"] for path in parts]))
    if len(parts) == task.of:
        save_array(job.work / "cut.npy", cut)
        save_instances(job.work / "instances", table)
    else:
        save_table(task.path(task.level + 1, task.number), **_columns(table), cut=cut)
    return len(table)


def measure_all(run: Run, jobs: list[FlowJob], mark: str) -> list[int]:
    """Stages table and facts of one volume or of all classes; gives the numbers of instances."""
    grid = jobs[0].grid
    tasks = [Task(job, n) for job in jobs for n in range(len(grid))]
    voxels = grid.sizes * len(jobs)
    run.ledger.run(run.engine, "table", mark, measure_block, tasks, voxels=voxels)
    counts: list[int] = []
    left, level = len(grid), 0
    while level == 0 or left > 1:
        sums = [SumTask(job, level, n, left) for job in jobs for n in range(-(-left // FAN_IN))]
        stage = "facts" if level == 0 else f"facts-{level + 1}"
        counts = run.ledger.run(run.engine, stage, mark, sum_tables, sums)
        left, level = -(-left // FAN_IN), level + 1
    return [int(count) for count in counts]


# -------------------------------------------------------------------------- the table as a file


def instance_table(
    labels: Any,
    output: Any = None,
    *,
    blocks: Any = None,
    work_dir: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    cluster: Any = None,
    progress: bool | None = None,
    ignore_memory: bool = False,
) -> Any:
    """Size, centre and extent of every instance, in one pass over the labels.

    Parameters
    ----------
    labels
        ``[Z,Y,X]``, any integer type, 0 is background: NumPy or dask array; with ``output`` also
        a path, URL or zarr array.
    output
        Path of the table to write, ``.npz``; `topo_dask.flows` takes it as ``instances``, and
        refuses it when it is of other labels.
    blocks, work_dir, resume, overwrite, cluster, progress, ignore_memory
        See `RunOptions`; with ``output``.

    Returns
    -------
    InstanceTable, ascending by id, exact; without ``output`` and of a dask array a ``Delayed`` of
    one. The file has its columns and the ``shape`` and ``mark`` of the labels.

    Raises
    ------
    TopoError
        One of its kinds, before any work starts, that names the argument.

    Examples
    --------
    >>> table = instance_table(np.array([[[0, 7, 7]]]))
    >>> table.hi
    array([[1, 1, 3]])
    >>> table.faces((1, 1, 3))[0].tolist()  # z_lo, z_hi, y_lo, y_hi, x_lo, x_hi
    [True, True, True, True, False, True]
    """
    if output is None:
        if not isinstance(labels, (str, os.PathLike, zarr.Array, zarr.Group, Store)):
            return table_of_array(labels)
        raise InvalidArgument(
            "output",
            "None with labels on disk",
            "the path of the table to write",
            "Pass e.g. output='instances.npz'; NumPy and dask arrays need none.",
        )
    options = RunOptions(
        blocks, work_dir, resume, overwrite, cluster, progress, ignore_memory=ignore_memory
    )
    source = open_input(labels, argument="labels", axes=3)
    check_labels(source)
    grid = options.grid(tuple(int(n) for n in source.shape))
    place = options.output(output, [source])
    mark = input_mark(source)
    if resume and place.exists:
        if _mark_of(place.path) == mark:
            return read_instance_table(place.path)
        if not place.unfinished:
            raise OutputExists(
                "output",
                f"{str(place.path)!r}, made of other labels",
                "with resume, an unfinished run or the table of these labels",
                "Choose another output, or pass overwrite=True (--overwrite) to replace it.",
            )
    title = f"Instance table of {'x'.join(map(str, grid.shape))} voxels"
    work = InstancesWork(title, grid, volumes([source]))
    made_of = {"labels": str(getattr(source, "store_path", type(source).__name__)), "mark": mark}
    with open_run(place, options, made_of, work) as run:
        read = stored(source, run.work, argument="labels")
        job = FlowJob(read, FlowSettings(), grid, (0, 0, 0), (0, 0, 0), run.work)
        measure_all(run, [job], fingerprint("table", mark, grid.chunks))
        table = load_instances(job.facts)
        place.publish_table(**_columns(table), shape=grid.shape, mark=mark)
    return read_instance_table(place.path)


def read_instance_table(path: str | os.PathLike[str]) -> InstanceTable:
    """Read a table that `instance_table` wrote.

    Parameters
    ----------
    path
        Of the ``.npz`` file.

    Returns
    -------
    InstanceTable, ascending by id.

    Raises
    ------
    InputNotFound, InvalidData
        No such file; a damaged one, or one without the columns of an instance table.

    Examples
    --------
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/instances.npz"
    >>> made = instance_table(np.array([[[0, 7, 7]]]), path, cluster="sync")
    >>> read_instance_table(path).voxels
    array([2])
    """
    return InstanceTable(**_load(path, COLUMNS))


def _load(path: Any, names: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    try:
        return storage.load_table(path, names)  # the user's, not one between stages
    except TopoError as error:
        raise type(error)(
            "instances",
            error.came,
            "a table as topo_dask.instance_table writes it",
            "Make it with topo_dask.instance_table(labels, output='instances.npz').",
        ) from error


def _mark_of(path: Any) -> str:
    return str(_load(path, ("mark",))["mark"])


def open_instances(
    instances: Any, mark: str, shape: tuple[int, ...]
) -> tuple[InstanceTable | None, str | None]:
    """Open the table that a run was given and check it; give it and a text that tells it.

    Parameters
    ----------
    instances
        Path, table, or ``None``.
    mark, shape
        `input_mark` and shape of the labels.

    Raises
    ------
    InvalidArgument, InvalidType, InvalidData, InputNotFound
        A table of another volume, or of labels that have changed.
    """
    if instances is None:
        return None, None
    if isinstance(instances, InstanceTable):
        _check_rows(instances, shape)
        return instances, str(tokenize(*_columns(instances).values()))
    if not isinstance(instances, (str, os.PathLike)):
        raise InvalidType(
            "instances",
            f"an object of type {type(instances).__name__}",
            "the path of a table, or an InstanceTable",
            "Make one with topo_dask.instance_table(labels, output='instances.npz').",
        )
    known = _load(instances, ("shape", "mark"))
    found = tuple(int(n) for n in known["shape"])
    if found != shape or str(known["mark"]) != mark:
        of = f"a volume of shape {found}"
        if found == shape:
            of = "labels that are not these, or have been written to or moved since"
        raise InvalidArgument(
            "instances",
            f"{os.fspath(instances)!r}, which is of {of}",
            f"a table of these labels, of shape {shape}",
            "Make it anew with topo_dask.instance_table(labels, output='instances.npz').",
        )
    return read_instance_table(instances), mark


def _check_rows(table: InstanceTable, shape: tuple[int, ...]) -> None:
    """Raise InvalidArgument where a table cannot be of a volume of this shape."""
    ascending = bool((table.ids[1:] > table.ids[:-1]).all()) and 0 not in table.ids[:1]
    inside = bool((table.lo >= 0).all() and (table.hi <= shape).all())
    if not (ascending and inside):
        raise InvalidArgument(
            "instances",
            "a table with ids that do not ascend" if inside else "a table of a larger volume",
            f"a table of these labels, of shape {shape}",
            "Make it with topo_dask.instance_table(labels) of the whole volume.",
        )
