"""Where the particles of each instance end, as sums of whole numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.kernels.cpu.labels import Integers, compact
from topo_dask.kernels.jit import compiled
from topo_dask.kernels.tables import END_PARTS, EndTable


@compiled
def _add(local: Any, ends: Any, counts: Any, whole: Any, rest: Any) -> None:
    for i in range(local.size):
        k = local[i]
        if k == 0:
            continue
        counts[k - 1] += 1
        for axis in range(3):
            voxel = np.floor(ends[i, axis])
            whole[k - 1, axis] += np.int64(voxel)
            rest[k - 1, axis] += np.int64(np.rint((ends[i, axis] - voxel) * END_PARTS))


def end_sums(labels: Integers, ends: npt.NDArray[np.float64]) -> EndTable:
    """Number of particles of each label and the sums of their final positions.

    Parameters
    ----------
    labels
        ``[N]``, any integer type: the label that each particle began in; 0 does not count.
    ends
        float64 ``[N,3]``, where each ended, in voxels of the whole volume.

    Returns
    -------
    EndTable
        Ascending by id; whole numbers, so tables of blocks merge exactly.

    Examples
    --------
    >>> table = end_sums(np.array([5, 5, 0]), np.array([[0, 0, 1.5], [0, 0, 2], [9, 9, 9]]))
    >>> table.counts, table.means
    (array([2]), array([[0.  , 0.  , 1.75]]))
    """
    local, ids = compact(labels[None, None])
    counts = np.zeros(ids.size, dtype=np.int64)
    whole, rest = np.zeros((ids.size, 3), dtype=np.int64), np.zeros((ids.size, 3), dtype=np.int64)
    _add(local.ravel(), ends, counts, whole, rest)
    return EndTable(ids, counts, whole, rest)
