"""One union over everything: rows that belong together, and the numbers they get."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int32] | npt.NDArray[np.int64]


def components(count: int, pairs: Rows) -> tuple[int, npt.NDArray[np.integer]]:
    """Number of connected components of ``count`` rows, and the component of each row.

    Parameters
    ----------
    count
        Number of rows.
    pairs
        int32 or int64 ``[E,2]``: rows that belong together.
    """
    graph = coo_array((np.ones(len(pairs), dtype=bool), tuple(pairs.T)), shape=(count, count))
    united, member = connected_components(graph, directed=False)
    return int(united), member


def unite(sizes: Int64, pairs: Rows, *, min_size: int = 1) -> tuple[UInt64, int]:
    """Join rows along pairs, drop small ones, number what is left by smallest row.

    Parameters
    ----------
    sizes
        int64 ``[K]``: voxels of each row.
    pairs
        int32 or int64 ``[E,2]``: rows that belong together.
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
    >>> unite(np.array([5, 1, 5, 1]), np.array([[3, 0]]), min_size=2)
    (array([1, 0, 2, 1], dtype=uint64), 2)
    """
    count = len(sizes)
    united, member = components(count, pairs)
    total = np.zeros(united, dtype=np.int64)
    np.add.at(total, member, sizes)
    _, first = np.unique(member, return_index=True)
    kept = total >= max(1, min_size)
    ranked = np.argsort(np.where(kept, first, count), kind="stable")
    number = np.zeros(united, dtype=np.uint64)
    number[ranked[: kept.sum()]] = np.arange(1, kept.sum() + 1, dtype=np.uint64)
    return number[member], int(kept.sum())
