"""One union over everything: rows that belong together, and the numbers they get."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.kernels.cpu import union as kernels

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int32] | npt.NDArray[np.int64]


class Union:
    """Rows that are united pair by pair; the pairs are not kept.

    What comes out does not depend on the order of the pairs: the smallest row of each component
    stands for it. It takes 4 bytes a row, 8 from 2**31 rows on, however many pairs there are.

    Parameters
    ----------
    count
        Number of rows.

    Examples
    --------
    >>> rows = Union(5)
    >>> rows.add(np.array([[4, 2]]))
    >>> rows.add(np.array([[0, 3], [2, 1]]))
    >>> rows.roots()
    array([0, 1, 1, 0, 1], dtype=int32)
    """

    def __init__(self, count: int) -> None:
        kind: Any = np.int32 if count < 2**31 else np.int64
        self._parent: Rows = np.arange(count, dtype=kind)

    def add(self, pairs: npt.NDArray[np.integer]) -> None:
        """Unite the rows of each pair: ``[E,2]``, any integers."""
        rows = pairs.astype(self._parent.dtype, copy=False)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self._parent)):
            raise IndexError(f"pairs of rows from {rows.min()} to {rows.max()}")
        kernels.join_rows(self._parent, np.ascontiguousarray(rows))

    def roots(self) -> Rows:
        """The smallest row of each row's component."""
        kernels.point_at_roots(self._parent)
        return self._parent


def united(count: int, pairs: Iterable[npt.NDArray[np.integer]]) -> Rows:
    """The smallest row that each of ``count`` rows is one with, by pairs that come in pieces."""
    rows = Union(count)
    for piece in pairs:
        rows.add(piece)
    return rows.roots()


def unite(
    sizes: Int64, pairs: Iterable[npt.NDArray[np.integer]], *, min_size: int = 1
) -> tuple[UInt64, int]:
    """Join rows along pairs, drop small ones, number what is left by smallest row.

    Parameters
    ----------
    sizes
        int64 ``[K]``: voxels of each row.
    pairs
        Integers ``[E,2]``, in pieces: rows that belong together.
    min_size
        What has fewer voxels gets number 0.

    Returns
    -------
    labels
        uint64 ``[K]``, numbers from 1 on.
    count
        How many there are.

    Examples
    --------
    >>> unite(np.array([5, 1, 5, 1]), [np.array([[3, 0]])], min_size=2)
    (array([1, 0, 2, 1], dtype=uint64), 2)
    """
    root = united(len(sizes), pairs)
    total = np.zeros(len(sizes), dtype=np.int64)
    kernels.add_to_roots(root, sizes, total)
    count = kernels.number_roots(root, total, max(1, min_size), total)
    return total.view(np.uint64), int(count)
