"""Joining touching clusters on disk: contacts of each block, summed as a tree, one union."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from topo_dask.graph.contacts import (
    ROWS,
    JoinRules,
    contact_region,
    contacts_of_block,
    contacts_under,
    joined_pairs,
    label_ranges,
    names_along,
)
from topo_dask.grid import BlockGrid
from topo_dask.kernels.tables import ContactTable, merge_contacts
from topo_dask.run.chain import Chain, View
from topo_dask.run.files import load_array, save_array
from topo_dask.run.items import Each
from topo_dask.run.ledger import fingerprint
from topo_dask.run.together import TablesTask
from topo_dask.storage import AnyArray

FAN_IN = 64
"""Tables that one task adds up."""


@dataclass(frozen=True, slots=True)
class ContactTask:
    """One block whose contacts are wanted."""

    view: View
    flow: AnyArray
    step_size: float
    grid: BlockGrid
    block: int
    path: Path

    def __str__(self) -> str:
        return f"block {self.grid.region(self.block)}"


@dataclass(frozen=True)
class JoinTask:
    """One union of all instances along their contacts.

    ``stored``: whether the contacts are of the stored numbers, not of the labels.
    """

    view: View
    tables: tuple[Path, ...]
    rules: JoinRules
    path: Path
    stored: bool

    def __str__(self) -> str:
        return "all contacts"


def save_contacts(path: Path, table: ContactTable) -> None:
    """Write a table of contacts: int64 ``[6,P]``, so that some of its rows can be read."""
    columns = (getattr(table, name) for name in ContactTable.__dataclass_fields__)
    save_array(path, np.stack([column.view(np.int64) for column in columns]))


def load_contacts(path: Path, *, memory_map: bool = False) -> ContactTable:
    """Read a table of contacts."""
    a, b, *others = load_array(path, memory_map=memory_map)
    return ContactTable(a.view(np.uint64), b.view(np.uint64), *others)


def rows_between(tables: Sequence[ContactTable], low: int, end: int) -> list[ContactTable]:
    """The rows of several tables whose lower label is in a range; no others are read."""
    ends = (np.searchsorted(t.a, np.array([low, end], np.uint64)) for t in tables)
    return [t.take(slice(*both)) for t, both in zip(tables, ends, strict=True)]


def contacts_in(tables: Sequence[ContactTable], rows: int = ROWS) -> Iterator[ContactTable]:
    """The contacts of several tables added up, those of a range of labels after the other."""
    for low, end in label_ranges([t.a for t in tables], rows):
        yield merge_contacts(rows_between(tables, low, end))


def under_names(
    tables: Sequence[ContactTable], names: npt.NDArray[np.uint64], folder: Path, rows: int = ROWS
) -> list[ContactTable]:
    """The contacts of several tables between other names, see `contacts_under`, in new files."""
    pieces = (t.take(slice(n, n + rows)) for t in tables for n in range(0, len(t), rows))
    found = []
    for number, piece in enumerate(pieces):
        save_contacts(folder / f"{number}.npy", contacts_under(piece, names))
        found.append(load_contacts(folder / f"{number}.npy", memory_map=True))
    return found


def find_contacts(task: ContactTask) -> int:
    """Stage contacts: the contacts that a block owns; gives their number."""
    core = task.grid.region(task.block)
    read = contact_region(core, task.grid.shape)
    labels = task.view.read(read)
    flow = np.asarray(task.flow[(slice(None), *read.slices)])
    table = contacts_of_block(labels, flow, core, task.step_size)
    save_contacts(task.path, table)
    return len(table)


def sum_contacts(task: TablesTask) -> int:
    """Stage contacts, later rounds: one table of several; gives its length."""
    table = merge_contacts([load_contacts(path) for path in task.paths])
    save_contacts(task.path, table)
    return len(table)


def join_all(task: JoinTask) -> int:
    """Stage join: unites instances along all contacts, writes their new names; gives how many.

    It holds a few numbers of each instance, and the contacts of a range of them at a time.
    """
    tables = [load_contacts(path, memory_map=True) for path in task.tables]
    before = None if task.view.names is None else load_array(task.view.names, memory_map=True)
    if task.stored and before is not None:
        tables = under_names(tables, before, task.path.with_name("renamed"))
    pairs = (joined_pairs(table, task.rules) for table in contacts_in(tables))
    names, instances = names_along(pairs, task.view.instances)
    # As int64, or NumPy copies the indices.
    save_array(task.path, names if before is None else names[before.view(np.int64)])
    return instances


def contact_tables(
    chain: Chain, view: View, *, flow: AnyArray, step_size: float
) -> tuple[list[Path], str]:
    """Files that together hold every contact of the labels, at most `FAN_IN`, and their mark."""
    folder = chain.work / "contacts"
    mark = fingerprint(view.mark, view.names is None, "contacts", step_size)
    blocks = range(len(chain.grid))
    paths: Sequence[Path] = Each(blocks, lambda n: folder / f"{n}.npy")
    tasks = Each(blocks, lambda n: ContactTask(view, flow, step_size, chain.grid, n, paths[n]))
    chain.stage("contacts", mark, find_contacts, tasks)
    level = 1
    while len(paths) > FAN_IN:
        sums = Each(range(-(-len(paths) // FAN_IN)), partial(_sum_task, folder, paths, level))
        chain.stage(f"contacts-{level + 1}", mark, sum_contacts, sums)
        paths, level = [folder / f"{level}-{n}.npy" for n in range(len(sums))], level + 1
    return list(paths), mark


def _sum_task(folder: Path, paths: Sequence[Path], level: int, number: int) -> TablesTask:
    some = tuple(paths[number * FAN_IN : (number + 1) * FAN_IN])
    return TablesTask(some, folder / f"{level}-{number}.npy")


def join_step(
    chain: Chain, view: View, last: bool, *, flow: AnyArray, step_size: float, stored: bool = False
) -> View:
    """Step: clusters that touch and whose flows agree become one instance. Writes only names.

    ``stored``: whether the contacts are found between stored numbers, to be kept.
    """
    touching = view.bare if stored else view
    paths, found = contact_tables(chain, touching, flow=flow, step_size=step_size)
    rules = JoinRules()
    mark = fingerprint(view.mark, found, "join", rules)
    names = chain.work / "contacts" / "names.npy"
    task = JoinTask(view, tuple(paths), rules, names, stored)
    (instances,) = chain.stage("join", mark, join_all, [task])
    return View(view.array, instances, view.voxels, mark, names=names)
