"""Joining touching clusters on disk: contacts of each block, summed as a tree, one union."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from topo_dask.graph.contacts import (
    JoinRules,
    contact_region,
    contacts_of_block,
    contacts_under,
    join_names,
)
from topo_dask.grid import BlockGrid
from topo_dask.kernels.tables import ContactTable, merge_contacts
from topo_dask.run.chain import Chain, View
from topo_dask.run.files import load_array, load_table, save_array, save_table
from topo_dask.run.ledger import fingerprint
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
class SumTask:
    """Tables to add up."""

    paths: tuple[Path, ...]
    path: Path

    def __str__(self) -> str:
        return f"contacts in {self.path.name}"


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
    """Write a table of contacts."""
    save_table(path, **{name: getattr(table, name) for name in ContactTable.__dataclass_fields__})


def load_contacts(path: Path) -> ContactTable:
    """Read a table of contacts."""
    return ContactTable(**load_table(path))


def find_contacts(task: ContactTask) -> int:
    """Stage contacts: the contacts that a block owns; gives their number."""
    core = task.grid.region(task.block)
    read = contact_region(core, task.grid.shape)
    labels = task.view.read(read)
    flow = np.asarray(task.flow[(slice(None), *read.slices)])
    table = contacts_of_block(labels, flow, core, task.step_size)
    save_contacts(task.path, table)
    return len(table)


def sum_contacts(task: SumTask) -> int:
    """Stage contacts, later rounds: one table of several; gives its length."""
    table = merge_contacts([load_contacts(path) for path in task.paths])
    save_contacts(task.path, table)
    return len(table)


def join_all(task: JoinTask) -> int:
    """Stage join: unites instances along all contacts, writes their new names; gives how many."""
    table = merge_contacts([load_contacts(path) for path in task.tables])
    before = None if task.view.names is None else load_array(task.view.names)
    if before is not None and task.stored:
        table = contacts_under(table, before)
    names, instances = join_names(table, task.view.instances, task.rules)
    save_array(task.path, names if before is None else names[before])
    return instances


def contact_tables(
    chain: Chain, view: View, *, flow: AnyArray, step_size: float
) -> tuple[list[Path], str]:
    """Files that together hold every contact of the labels, at most `FAN_IN`, and their mark."""
    folder = chain.work / "contacts"
    mark = fingerprint(view.mark, view.names is None, "contacts", step_size)
    tasks = [
        ContactTask(view, flow, step_size, chain.grid, n, folder / f"{n}.npz")
        for n in range(len(chain.grid))
    ]
    chain.stage("contacts", mark, find_contacts, tasks)
    paths, level = [task.path for task in tasks], 1
    while len(paths) > FAN_IN:
        groups = [tuple(paths[i : i + FAN_IN]) for i in range(0, len(paths), FAN_IN)]
        sums = [SumTask(g, folder / f"{level}-{n}.npz") for n, g in enumerate(groups)]
        chain.stage(f"contacts-{level + 1}", mark, sum_contacts, sums)
        paths, level = [task.path for task in sums], level + 1
    return paths, mark


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
