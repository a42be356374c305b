"""Small tables of whole numbers that blocks hand to each other: instances and cells.

Everything in them is an exact integer, so merging gives the same table in whatever order the
blocks finish.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Float64 = npt.NDArray[np.float64]
Scalar = TypeVar("Scalar", bound=np.generic)

ROWS = 1 << 20
"""Rows of a table that are worked on at a time."""


@dataclass(frozen=True, eq=False)
class InstanceTable:
    """Facts of instances, in coordinates of the whole volume.

    Parameters
    ----------
    ids
        ``uint64[K]``, ascending, without 0.
    voxels
        ``int64[K]``, number of voxels.
    sums
        ``int64[K, 3]``, sum of the voxels' coordinates.
    lo, hi
        ``int64[K, 3]``, bounding box, half open.

    Examples
    --------
    >>> table = InstanceTable(
    ...     ids=np.array([7], np.uint64),
    ...     voxels=np.array([2]),
    ...     sums=np.array([[0, 4, 9]]),
    ...     lo=np.array([[0, 2, 4]]),
    ...     hi=np.array([[1, 3, 6]]),
    ... )
    >>> table.centres
    array([[0. , 2. , 4.5]])
    """

    ids: UInt64
    voxels: Int64
    sums: Int64
    lo: Int64
    hi: Int64

    @property
    def centres(self) -> Float64:
        """Centres of mass, ``float64[K, 3]``."""
        return np.asarray(self.sums / self.voxels[:, None], dtype=np.float64)

    def take(self, rows: slice | npt.NDArray[np.intp]) -> InstanceTable:
        """The table of some rows; of columns in files no others are read."""
        return InstanceTable(
            np.asarray(self.ids[rows]),
            np.asarray(self.voxels[rows]),
            np.asarray(self.sums[rows]),
            np.asarray(self.lo[rows]),
            np.asarray(self.hi[rows]),
        )

    def faces(self, shape: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Whether each instance touches the faces z_lo, z_hi, y_lo, y_hi, x_lo, x_hi of a volume.

        Parameters
        ----------
        shape
            Shape of the volume that the table is of.

        Returns
        -------
        bool ``[K, 6]``

        Examples
        --------
        >>> low, high = np.array([[0, 2, 4]]), np.array([[1, 3, 6]])
        >>> one = InstanceTable(np.array([7], np.uint64), np.array([2]), low, low, high)
        >>> one.faces((5, 5, 6))
        array([[ True, False, False, False, False,  True]])
        """
        touched = (self.lo == 0, self.hi == np.asarray(shape, dtype=np.int64))
        return np.stack(touched, axis=-1).reshape(len(self), 6)

    def moved(self, by: Sequence[int]) -> InstanceTable:
        """The table of the same instances, whose volume begins at ``by``."""
        shift = np.asarray(by, dtype=np.int64)
        sums = self.sums + self.voxels[:, None] * shift
        return InstanceTable(self.ids, self.voxels, sums, self.lo + shift, self.hi + shift)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class CellTable:
    """Convergence cells: how many particles ended in each, and where inside it.

    Parameters
    ----------
    cells
        ``int64[M]``, linear cell numbers, ascending.
    counts
        ``int64[M]``, number of particles.
    offsets
        ``int64[M, 3]``, sum of the particles' offsets from the cell's corner, in units of 2**-24.

    Examples
    --------
    >>> table = CellTable(np.array([3]), np.array([2]), np.array([[0, 1 << 24, 1 << 23]]))
    >>> len(table)
    1
    """

    cells: Int64
    counts: Int64
    offsets: Int64

    def __len__(self) -> int:
        return len(self.cells)


END_PARTS = 2**24
"""Parts of a voxel in which final positions are added up: 6e-8 voxels."""


@dataclass(frozen=True, eq=False)
class EndTable:
    """Where the particles of each instance end.

    Parameters
    ----------
    ids
        ``uint64[K]``, ascending, without 0.
    counts
        ``int64[K]``, number of particles.
    whole, rest
        ``int64[K, 3]``: the sum of their final positions is ``whole + rest / 2**24``, in voxels.

    Examples
    --------
    >>> one = np.array([1])
    >>> EndTable(one.view("u8"), one, np.array([[0, 0, 7]]), np.array([[0, 0, 1 << 23]])).means
    array([[0. , 0. , 7.5]])
    """

    ids: UInt64
    counts: Int64
    whole: Int64
    rest: Int64

    @property
    def means(self) -> Float64:
        """Mean final position, ``float64[K, 3]``, in voxels."""
        whole = self.whole + self.rest // END_PARTS
        total = whole + (self.rest % END_PARTS) / END_PARTS
        return np.asarray(total / self.counts[:, None], dtype=np.float64)

    def __len__(self) -> int:
        return len(self.ids)


def merge_ends(tables: Sequence[EndTable]) -> EndTable:
    """One table of several: particles and positions added up.

    Examples
    --------
    >>> one = np.array([1])
    >>> table = EndTable(one.view("u8"), one, np.array([[0, 0, 7]]), np.array([[0, 0, 1 << 23]]))
    >>> merge_ends([table, table]).whole
    array([[ 0,  0, 15]])
    """
    ids, order, starts = _groups(_join([t.ids for t in tables], np.uint64))
    counts = _reduce(np.add, _join([t.counts for t in tables], np.int64), order, starts)
    rest = _reduce(np.add, _join([t.rest for t in tables], np.int64, 3), order, starts)
    whole = _reduce(np.add, _join([t.whole for t in tables], np.int64, 3), order, starts)
    return EndTable(ids, counts, whole + rest // END_PARTS, rest % END_PARTS)


LARGEST_ERROR = 2**60
"""Where sums of errors end: adding them up gives the same in any order."""


@dataclass(frozen=True, eq=False)
class ErrorTable:
    """How far the flow in each instance is from its direct flow.

    Parameters
    ----------
    ids
        ``uint64[K]``, ascending, without 0.
    sums
        ``int64[K]``, squared length of the difference, summed over voxels, in units of 2**-24; at
        most `LARGEST_ERROR`, which stands for all that is larger.

    Examples
    --------
    >>> len(ErrorTable(np.array([3], np.uint64), np.array([1 << 24])))
    1
    """

    ids: UInt64
    sums: Int64

    def __len__(self) -> int:
        return len(self.ids)


def merge_errors(tables: Sequence[ErrorTable]) -> ErrorTable:
    """One table of several: sums added up, as far as `LARGEST_ERROR`.

    Examples
    --------
    >>> one = ErrorTable(np.array([5], np.uint64), np.array([2**59]))
    >>> merge_errors([one, one, one]).sums == LARGEST_ERROR
    array([ True])
    """
    ids, order, starts = _groups(_join([t.ids for t in tables], np.uint64))
    sums = _join([t.sums for t in tables], np.int64)
    # In two halves: sums of either stay far from the largest int64.
    half = np.int64(2**30)
    low = _reduce(np.add, sums % half, order, starts)
    high = _reduce(np.add, sums // half, order, starts) + low // half
    ended = high >= LARGEST_ERROR // half
    return ErrorTable(ids, np.where(ended, LARGEST_ERROR, high * half + low % half))


FARTHEST = 2**62
"""Squared distance where nothing was found."""

DOT_WHOLE = 2.0**24
"""Units of a contact's sum of dot products: this many to 1."""

DOT_REST = 2**30
"""Parts of such a unit that are counted beside it."""

LARGEST_DOT = 1024.0
"""A dot product beyond this, or below its negative, counts as this."""


@dataclass(frozen=True, eq=False)
class ContactTable:
    """Pairs of labels that touch: how much, and how well their flows agree.

    The sum of dot products is ``(whole + rest / 2**30) / 2**24``: each face pair's product, taken
    in float64, is rounded once to a multiple of 2**-54, and multiples are added as whole numbers.
    So sums are the same in any order, and exact up to 2**29 face pairs with dot products of any
    size, 2**39 with those of unit vectors.

    Parameters
    ----------
    a, b
        ``uint64[P]``: the labels, ``a < b``, ascending by a, then b.
    area
        ``int64[P]``: voxels of a and of b that share a face, in pairs.
    whole, rest
        ``int64[P]``: sum of the dot products of the flows at the two voxels of each pair.
    crossing
        ``int64[P]``: particles that begin beside the contact and take their first step across
        it: half a voxel or more towards the voxel on the other side.

    Examples
    --------
    >>> one = np.ones(1, np.int64)
    >>> table = ContactTable(
    ...     one.view("u8"), 2 * one.view("u8"), 2 * one, 3 * one << 23, 0 * one, one
    ... )
    >>> table.mean_dot
    array([0.75])
    """

    a: UInt64
    b: UInt64
    area: Int64
    whole: Int64
    rest: Int64
    crossing: Int64

    @property
    def mean_dot(self) -> Float64:
        """Mean dot product over the face pairs; its sign is exact."""
        whole = self.whole + self.rest // DOT_REST
        total = (whole + (self.rest % DOT_REST) / DOT_REST) / DOT_WHOLE
        return np.asarray(total / np.maximum(self.area, 1), dtype=np.float64)

    def take(self, which: npt.NDArray[Any] | slice) -> ContactTable:
        """Some of the pairs, by index or mask."""
        return ContactTable(*(getattr(self, name)[which] for name in _CONTACT_COLUMNS))

    def __len__(self) -> int:
        return len(self.a)


@dataclass(frozen=True, eq=False)
class LabelRuns:
    """The labelled voxels of a box, as runs of one label along x.

    Parameters
    ----------
    first
        Global index of the box's first plane and row: z, y.
    shape
        Number of planes and of rows.
    rows
        ``int64[Z * Y + 1]``: where the runs of each row begin.
    starts, stops
        ``int64[R]``, first voxel and end of each run, global.
    ids
        ``uint64[R]``, labels.

    Examples
    --------
    >>> one = np.ones(1, np.int64)
    >>> LabelRuns((0, 0), (1, 1), np.array([0, 1]), one, 3 * one, 7 * one.view("u8")).ids
    array([7], dtype=uint64)
    """

    first: tuple[int, int]
    shape: tuple[int, ...]
    rows: Int64
    starts: Int64
    stops: Int64
    ids: UInt64

    def take(self, which: npt.NDArray[np.bool_]) -> LabelRuns:
        """Some of the runs."""
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(which, dtype=np.int64)])
        rows = before[self.rows]
        columns = (self.starts[which], self.stops[which], self.ids[which])
        return LabelRuns(self.first, self.shape, rows, *columns)


_CONTACT_COLUMNS = ("a", "b", "area", "whole", "rest", "crossing")


def merge_contacts(tables: Sequence[ContactTable]) -> ContactTable:
    """One table of several, whose pairs may stand in any order: numbers added up.

    Examples
    --------
    >>> one = np.ones(1, np.int64)
    >>> table = ContactTable(one.view("u8"), 2 * one.view("u8"), one, one, one, one)
    >>> merge_contacts([table, table]).area
    array([2])
    """
    a, b = (_join([getattr(t, name) for t in tables], np.uint64) for name in "ab")
    order = np.lexsort((b, a)).astype(np.int64)
    first = np.ones(len(a), dtype=bool)
    first[1:] = (np.diff(a[order]) != 0) | (np.diff(b[order]) != 0)
    starts = np.flatnonzero(first).astype(np.int64)
    return ContactTable(
        a[order][starts],
        b[order][starts],
        *(
            _reduce(np.add, _join([getattr(t, name) for t in tables], np.int64), order, starts)
            for name in _CONTACT_COLUMNS[2:]
        ),
    )


def join_runs(parts: Sequence[LabelRuns], shape: Sequence[int]) -> LabelRuns:
    """The runs of a whole volume from those of boxes that share no voxel.

    Examples
    --------
    >>> one = np.ones(1, np.int64)
    >>> part = LabelRuns((0, 1), (1, 1), np.array([0, 1]), one, 3 * one, 7 * one.view("u8"))
    >>> join_runs([part], (1, 2, 4)).rows
    array([0, 0, 1])
    """
    lines = [np.zeros(0, np.int64)]
    for part in parts:
        z, y = np.divmod(np.arange(len(part.rows) - 1, dtype=np.int64), part.shape[1])
        line = (z + part.first[0]) * shape[1] + y + part.first[1]
        lines.append(np.repeat(line, np.diff(part.rows)))
    line = np.concatenate(lines)
    starts = _join([part.starts for part in parts], np.int64)
    order = np.lexsort((starts, line))
    return LabelRuns(
        (0, 0),
        tuple(shape[:2]),
        np.searchsorted(line[order], np.arange(shape[0] * shape[1] + 1)).astype(np.int64),
        starts[order],
        _join([part.stops for part in parts], np.int64)[order],
        _join([part.ids for part in parts], np.uint64)[order],
    )


def merge_instances(tables: Sequence[InstanceTable]) -> InstanceTable:
    """One table of several: voxels and sums added up, boxes united.

    Examples
    --------
    >>> box = np.array([[0, 0, 0]]), np.array([[1, 1, 1]])
    >>> one = InstanceTable(np.array([5], np.uint64), np.array([1]), np.array([[0, 0, 0]]), *box)
    >>> merge_instances([one, one]).voxels
    array([2])
    """
    return sum_instances([t.ids for t in tables], tables)


def rename_instances(table: InstanceTable, ids: UInt64) -> InstanceTable:
    """The same voxels under other ids, several rows of which may be one; id 0 drops out.

    Examples
    --------
    >>> low = np.zeros((2, 3), np.int64)
    >>> table = InstanceTable(np.array([4, 5], "u8"), np.array([2, 3]), low, low, low + 1)
    >>> rename_instances(table, np.array([1, 1], "u8")).voxels
    array([5])
    """
    kept = ids != 0
    new, order, starts = _groups(ids[kept])
    return InstanceTable(
        new,
        _reduce(np.add, table.voxels[kept], order, starts),
        _reduce(np.add, table.sums[kept], order, starts),
        _reduce(np.minimum, table.lo[kept], order, starts),
        _reduce(np.maximum, table.hi[kept], order, starts),
    )


def rename_ends(table: EndTable, ids: UInt64) -> EndTable:
    """The same particles under other ids, several rows of which may be one; id 0 drops out."""
    kept = ids != 0
    columns = (table.counts[kept], table.whole[kept], table.rest[kept])
    return merge_ends([EndTable(ids[kept], *columns)])


def sum_instances(ids: Sequence[UInt64], tables: Iterable[InstanceTable]) -> InstanceTable:
    """One table of several that come one after the other: no two need be in memory.

    Parameters
    ----------
    ids
        Those of every table.
    tables
        The tables; ids are ascending in each.
    """
    known = np.unique(_join(ids, np.uint64))
    total = InstanceTable(
        ids=known,
        voxels=np.zeros(len(known), dtype=np.int64),
        sums=np.zeros((len(known), 3), dtype=np.int64),
        lo=np.full((len(known), 3), np.iinfo(np.int64).max),
        hi=np.full((len(known), 3), np.iinfo(np.int64).min),
    )
    for table in tables:
        for first in range(0, len(table), ROWS):
            part = table.take(slice(first, first + ROWS))
            rows = np.searchsorted(known, part.ids)
            total.voxels[rows] += part.voxels
            total.sums[rows] += part.sums
            total.lo[rows] = np.minimum(total.lo[rows], part.lo)
            total.hi[rows] = np.maximum(total.hi[rows], part.hi)
    return total


def merge_cells(tables: Sequence[CellTable]) -> CellTable:
    """One table of several: counts and offsets added up.

    Examples
    --------
    >>> one = CellTable(np.array([4]), np.array([1]), np.array([[0, 0, 9]]))
    >>> two = CellTable(np.array([1, 4]), np.array([1, 2]), np.array([[1, 2, 3], [0, 0, 1]]))
    >>> merged = merge_cells([one, two])
    >>> merged.cells, merged.counts, merged.offsets[1]
    (array([1, 4]), array([1, 3]), array([ 0,  0, 10]))
    """
    cells = _join([t.cells for t in tables], np.int64)
    cells, order, starts = _groups(cells)
    return CellTable(
        cells=cells,
        counts=_reduce(np.add, _join([t.counts for t in tables], np.int64), order, starts),
        offsets=_reduce(np.add, _join([t.offsets for t in tables], np.int64, 3), order, starts),
    )


def _join(
    parts: Sequence[npt.NDArray[Scalar]], dtype: type[Scalar], *tail: int
) -> npt.NDArray[Scalar]:
    # The empty first part fixes the rank where there is no table at all; "safe" because int64
    # beside uint64 would silently become float64.
    return np.concatenate([np.empty((0, *tail), dtype), *parts], dtype=dtype, casting="safe")


def _groups(keys: npt.NDArray[Scalar]) -> tuple[npt.NDArray[Scalar], Int64, Int64]:
    """Distinct keys ascending, the order that sorts the rows, and where each key starts in it."""
    order = np.argsort(keys, kind="stable").astype(np.int64)
    ordered = keys[order]
    first = np.ones(len(keys), dtype=bool)
    first[1:] = ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(first).astype(np.int64)
    return ordered[starts], order, starts


def _reduce(operation: np.ufunc, rows: Int64, order: Int64, starts: Int64) -> Int64:
    if len(starts) == 0:
        return rows
    return np.asarray(operation.reduceat(rows[order], starts, axis=0), dtype=np.int64)
