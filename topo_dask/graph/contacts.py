"""Joining touching clusters whose flows agree: whole-number tables, one union, new names."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.delayed import delayed

from topo_dask.graph.blocks import Source, assemble, grid_of
from topo_dask.graph.union import unite, united
from topo_dask.grid import Region
from topo_dask.kernels import cpu
from topo_dask.kernels.cpu import union
from topo_dask.kernels.tables import ContactTable, merge_contacts

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class JoinRules:
    """When two clusters that touch are one instance.

    Parameters
    ----------
    min_dot
        Their flows agree: the mean dot product over the contact is above this.
    min_area
        The contact has at least so many pairs of voxels.
    """

    min_dot: float = 0.0
    min_area: int = 1


def contact_region(core: Region, shape: tuple[int, ...]) -> Region:
    """A block and the first voxels of the blocks after it: where its own faces end."""
    stop = tuple(min(n, b + 1) for b, n in zip(core.stop, shape, strict=True))
    return Region(core.start, stop)


def contacts_of_block(
    labels: npt.NDArray[Any], flow: npt.NDArray[Any], core: Region, step_size: float
) -> ContactTable:
    """The contacts that a block owns, from the labels and flow of its `contact_region`."""
    return cpu.contacts(labels, cpu.interleave(flow), core=core.shape, step_size=step_size)


def contacts_under(table: ContactTable, names: npt.NDArray[np.uint64]) -> ContactTable:
    """The same contacts between other names: those within one of them and with 0 drop out.

    Parameters
    ----------
    table
        Contacts.
    names
        uint64 ``[K + 1]``: the new name of each label.
    """
    a, b = names[table.a], names[table.b]
    kept = (a != b) & (a != 0) & (b != 0)
    some = table.take(kept)
    low, high = np.minimum(a, b)[kept], np.maximum(a, b)[kept]
    return merge_contacts(
        [ContactTable(low, high, some.area, some.whole, some.rest, some.crossing)]
    )


def joined(table: ContactTable, rules: JoinRules) -> npt.NDArray[np.bool_]:
    """Which contacts join their clusters."""
    agree: npt.NDArray[np.bool_] = table.mean_dot > rules.min_dot
    return agree & (table.area >= rules.min_area)


def join_names(table: ContactTable, count: int, rules: JoinRules) -> tuple[UInt64, int]:
    """New names of the labels 0..count: joined along contacts, numbered by smallest label.

    Examples
    --------
    >>> one = np.ones(1, np.int64)
    >>> table = ContactTable(one.view("u8"), 3 * one.view("u8"), one, one, one, one)
    >>> join_names(table, 3, JoinRules())
    (array([0, 1, 2, 1], dtype=uint64), 2)
    """
    return names_along([joined_pairs(table, rules)], count)


def joined_pairs(table: ContactTable, rules: JoinRules) -> UInt64:
    """uint64 ``[E,2]``: the labels that some contacts join."""
    which = joined(table, rules)
    return np.stack([table.a[which], table.b[which]], axis=1)


def names_along(pairs: Iterable[UInt64], count: int) -> tuple[UInt64, int]:
    """New names of the labels 0..count: joined along pairs that come in pieces.

    See `NAME_BYTES` for what it takes; pairs are not kept.
    """
    root = united(count, (some.view(np.int64) - 1 for some in pairs))
    names = np.ones(count + 1, dtype=np.int64)
    names[0], labels = 0, names[1:]
    instances = union.number_roots(root, labels, 1, labels)
    return names.view(np.uint64), int(instances)


def label_ranges(columns: Sequence[UInt64], rows: int) -> list[tuple[int, int]]:
    """Ranges of labels, first and end: about so many rows have their lower label in each.

    Parameters
    ----------
    columns
        The lower labels of some tables, ascending in each.
    rows
        How many.

    Examples
    --------
    >>> label_ranges([np.arange(1, 7, dtype=np.uint64)], 3)
    [(0, 4), (4, 18446744073709551615)]
    """
    step = max(1, rows // (8 * max(1, len(columns))))
    some = np.sort(np.concatenate([np.zeros(0, np.uint64), *(a[::step] for a in columns)]))
    cuts = np.unique(some[:: max(1, rows // step)])[1:].tolist()
    return list(itertools.pairwise([0, *cuts, 2**64 - 1]))


# -------------------------------------------------------------------------------------- evidence


@dataclass(frozen=True, eq=False)
class Joins:
    """What is known of every two parts that touch or end close together.

    A part is what one block alone joins of an instance by the convergence radius: the particles
    that end in its cells. Rows ascend by a, then by b.

    Parameters
    ----------
    contacts
        Of the parts: area (0 for parts that do not touch), dot products, crossing particles.
    close
        bool ``[P]``: whether cells of the two are closer than the convergence radius, which joins
        them.
    voxels
        int64 ``[F]``: voxels of part 1, 2, ...
    """

    contacts: ContactTable
    close: npt.NDArray[np.bool_]
    voxels: Int64


@dataclass(frozen=True)
class JoinChoice:
    """What is made of joins.

    Parameters
    ----------
    rules
        When clusters that touch are one; ``None``: they never are.
    min_size
        Clusters with fewer voxels become background.
    veto, force
        Pairs of parts whose join is undone, or made.
    """

    rules: JoinRules | None
    min_size: int
    veto: tuple[tuple[int, int], ...] = ()
    force: tuple[tuple[int, int], ...] = ()


def with_close(
    contacts: Sequence[ContactTable], close: UInt64
) -> tuple[ContactTable, npt.NDArray[np.bool_]]:
    """The table of contacts between parts and of pairs of parts that are close, together.

    Parameters
    ----------
    contacts
        Between parts.
    close
        uint64 ``[E,2]``, pairs of parts, the smaller first.

    Returns
    -------
    The table, and for each of its rows whether the two are close; see `Joins`.

    Examples
    --------
    >>> table, close = with_close([], np.array([[2, 5], [1, 2], [2, 5]], np.uint64))
    >>> table.a, table.b, table.area, close
    (array([1, 2], dtype=uint64), array([2, 5], dtype=uint64), array([0, 0]), array([ True,  True]))
    """
    nothing = np.zeros(len(close), np.int64)
    table = merge_contacts([*contacts, ContactTable(close[:, 0], close[:, 1], *(nothing,) * 4)])
    return table, _rows_among(table, close)


def _rows_among(table: ContactTable, pairs: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which rows of a table are among some pairs (a, b), a < b."""
    wanted = np.asarray(pairs, dtype=np.uint64).reshape(-1, 2)
    a, b = np.concatenate([wanted[:, 0], table.a]), np.concatenate([wanted[:, 1], table.b])
    order = np.lexsort((b, a))  # stable: a row of the table comes after pairs that are equal
    a, b = a[order], b[order]
    found = np.zeros(len(order), dtype=bool)
    found[order[1:]] = (a[1:] == a[:-1]) & (b[1:] == b[:-1])
    return found[len(wanted) :]


def _ordered(pairs: Sequence[tuple[int, int]]) -> npt.NDArray[np.uint64]:
    return np.sort(np.asarray(pairs, dtype=np.uint64).reshape(-1, 2), axis=1)


def names_of_parts(joins: Joins, choice: JoinChoice) -> tuple[UInt64, int]:
    """The instance of each part, with a first row for background, and the number of instances.

    First the clusters: parts that are close (but for vetoed pairs) and forced pairs are one, small
    ones are dropped, the rest numbered by first part. Then those of them that touch are joined by
    the rules, all contacts between two of them taken together.
    """
    veto, force = _ordered(choice.veto), _ordered(choice.force)
    table = joins.contacts
    kept = joins.close & ~_rows_among(table, veto)
    pairs = np.concatenate([np.stack([table.a, table.b], axis=1)[kept], force]).astype(np.int64)
    labels, instances = unite(joins.voxels, [pairs - 1], min_size=choice.min_size)
    names = np.concatenate([np.zeros(1, np.uint64), labels])
    if choice.rules is None:
        return names, instances
    touching = contacts_under(table, names)
    apart = np.sort(names[veto.astype(np.int64)], axis=1)
    touching = touching.take(~_rows_among(touching, apart))
    joined_to, instances = join_names(touching, instances, choice.rules)
    return joined_to[names], instances


# ------------------------------------------------------------------------- in memory, and lazily


def _join_chunks(tables: Sequence[ContactTable], largest: Sequence[int]) -> UInt64:
    names, _ = join_names(merge_contacts(tables), max(largest), JoinRules())
    return names


def _largest(labels: npt.NDArray[Any]) -> int:
    return int(labels.max(initial=0))


def _rename(labels: npt.NDArray[Any], names: UInt64) -> npt.NDArray[np.int32]:
    return cpu.renamed(labels, names).astype(np.int32)


def join_touching(labels: Any, flow: Any) -> Any:
    """Join labels 1..K that touch by a face where their flows agree; number by smallest label.

    Flows agree where the mean dot product over the voxels on either side of the contact is above
    0; contacts are of the labels as they come, not of what is joined already.

    Parameters
    ----------
    labels
        ``[Z,Y,X]``, NumPy or dask.
    flow
        ``[3,Z,Y,X]``, ``(dz,dy,dx)``.

    Returns
    -------
    int32 ``[Z,Y,X]``, NumPy or lazy as the labels are.

    Examples
    --------
    >>> join_touching(np.array([[[2, 1, 1]]]), np.ones((3, 1, 1, 3), np.float32))
    array([[[1, 1, 1]]], dtype=int32)
    """
    if not isinstance(labels, da.Array):
        whole = Region((0, 0, 0), labels.shape)
        table = contacts_of_block(labels, np.asarray(flow), whole, 1.0)
        return _rename(labels, _join_chunks([table], [_largest(labels)]))
    grid = grid_of(labels, argument="labels")
    numbers, field = Source.of(labels), Source.of(da.asarray(flow))
    reads = [contact_region(core, grid.shape) for core in grid]
    tables = [
        delayed(contacts_of_block)(numbers.read(read), field.read(read), core, 1.0)
        for read, core in zip(reads, grid, strict=True)
    ]
    chunks = [numbers.read(core) for core in grid]
    names = delayed(_join_chunks)(tables, [delayed(_largest)(chunk) for chunk in chunks])
    return assemble([delayed(_rename)(c, names) for c in chunks], grid, dtype=np.int32)


CONTACT_BYTES = 48
"""Bytes of a contact in a table."""

VOXELS_PER_CONTACT = 320
"""No denser are contacts taken to be; tissue has one for each 1,100 in blocks of 32³ voxels, one
for each 2,700 in blocks of 128³."""

ROWS = 2**22
"""Contacts that one task looks at together, about, where all of them may not fit in memory."""

ROW_BYTES = 200
"""Bytes that each of these takes meanwhile."""

NAME_BYTES = 12
"""Bytes of a label in the one union along contacts: its root (4, from 2**31 on 8), its name."""


def memory_of_ranges(contacts: int) -> int:
    """Bytes that it takes at most to add up contacts by ranges of labels."""
    return ROW_BYTES * min(contacts, ROWS + ROWS // 4)  # ranges are cut by samples


def memory_of_contacts(core: int) -> int:
    """Bytes that the contacts of a block take at most: labels, flow twice, small numbers."""
    return 44 * core
