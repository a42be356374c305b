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
from topo_dask.graph.union import unite
from topo_dask.grid import Region
from topo_dask.kernels import cpu
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
    """New names of the labels 0..count: joined along pairs that come in pieces."""
    rows = (some.view(np.int64) - 1 for some in pairs)
    labels, instances = unite(np.ones(count, np.int64), rows)
    return np.concatenate([np.zeros(1, np.uint64), labels]), instances


def label_ranges(tables: Sequence[ContactTable], rows: int) -> list[tuple[int, int]]:
    """Ranges of labels, first and end: about so many contacts have their lower label in each.

    Examples
    --------
    >>> a = np.arange(1, 7, dtype=np.uint64)
    >>> table = ContactTable(a, a + np.uint64(1), *(np.ones(6, np.int64),) * 4)
    >>> label_ranges([table], 3)
    [(0, 4), (4, 18446744073709551615)]
    """
    step = max(1, rows // (8 * max(1, len(tables))))
    some = np.sort(np.concatenate([np.zeros(0, np.uint64), *(t.a[::step] for t in tables)]))
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


def all_joins(contacts: ContactTable, close: UInt64, voxels: Int64) -> Joins:
    """The table of contacts between parts and of pairs of parts that are close, together.

    Parameters
    ----------
    contacts
        Between parts.
    close
        uint64 ``[E,2]``, pairs of parts.
    voxels
        See `Joins`.
    """
    pairs = np.unique(np.sort(close, axis=1), axis=0).reshape(-1, 2)
    nothing = np.zeros(len(pairs), np.int64)
    far = ContactTable(pairs[:, 0], pairs[:, 1], *(nothing,) * 4)
    table = merge_contacts([contacts, far])
    return Joins(table, _rows_among(table, pairs), voxels)


def _rows_among(table: ContactTable, pairs: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which rows of a table are among some pairs (a, b), a < b."""
    wanted = np.asarray(pairs, dtype=np.uint64).reshape(-1, 2)
    both = np.concatenate([np.stack([table.a, table.b], axis=1), wanted])
    _, row = np.unique(both, axis=0, return_inverse=True)
    found: npt.NDArray[np.bool_] = np.isin(row[: len(table)], row[len(table) :])
    return found


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


CONTACT_BYTES = 0.6
"""Bytes for each voxel of the volume that a table of all contacts takes while it is made."""


def memory_of_contacts(core: int) -> int:
    """Bytes that the contacts of a block take at most: labels, flow twice, small numbers."""
    return 44 * core
