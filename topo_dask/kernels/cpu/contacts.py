"""Where labels touch: the size of each contact and how well the flows on its two sides agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.kernels.cpu.labels import _doubled, _slot, compact
from topo_dask.kernels.jit import compiled
from topo_dask.kernels.tables import DOT_REST, DOT_WHOLE, LARGEST_DOT, ContactTable

STRIDE = 32
"""Voxels of a row that are compared at once."""


@compiled
def _next(ones: Any, twos: Any, x: int, end: int) -> int:
    """The first voxel from x on at which two rows have different labels, none of them 0."""
    while x < end:
        stop = min(x + STRIDE, end)
        differ = np.int32(0)
        for i in range(x, stop):  # no branch in it, so that several voxels are compared at once
            differ |= ones[i] ^ twos[i]
        if differ != 0:
            for i in range(x, stop):
                if ones[i] != twos[i] and ones[i] != 0 and twos[i] != 0:
                    return i
        x = stop
    return end


@compiled
def _add(row: Any, f: Any, g: Any, axis: int, step: Any) -> None:
    """Add a pair of voxels with flows f and g, the second after the first, to its contact."""
    dot = np.float64(f[0]) * np.float64(g[0])
    dot += np.float64(f[1]) * np.float64(g[1])
    dot += np.float64(f[2]) * np.float64(g[2])
    scaled = min(max(dot, -LARGEST_DOT), LARGEST_DOT) * DOT_WHOLE
    whole = np.floor(scaled)
    half = np.float32(0.5)
    row[0] += 1
    row[1] += np.int64(whole)
    row[2] += np.int64(np.rint((scaled - whole) * DOT_REST))
    row[3] += (step * f[axis] >= half) + (step * g[axis] <= -half)


@compiled
def _count(local: Any, flow4: Any, core: Any, step: Any, most: int) -> Any:
    """Rows (area, whole, rest, crossing) of the pairs of labels, and the pairs as they appear."""
    keys = np.zeros(1024, np.uint64)
    numbers = np.zeros(1024, np.int32)
    pairs = np.zeros(512, np.uint64)
    rows = np.zeros((512, 4), np.int64)
    count = np.int32(0)
    for axis in range(3):
        dz, dy, dx = np.int64(axis == 0), np.int64(axis == 1), np.int64(axis == 2)
        for z in range(min(core[0], local.shape[0] - dz)):
            for y in range(min(core[1], local.shape[1] - dy)):
                previous, row = np.uint64(0), 0
                ones, twos = local[z, y], local[z + dz, y + dy, dx:]
                end = min(core[2], twos.size)
                x = _next(ones, twos, 0, end)
                while x < end:
                    one, two = ones[x], twos[x]
                    key = np.uint64(min(one, two)) * np.uint64(most) + np.uint64(max(one, two))
                    if key != previous:
                        previous = key
                        at = _slot(keys, numbers, key)
                        if numbers[at] == 0:
                            if count == pairs.size:
                                keys, numbers = _doubled(keys, numbers)
                                pairs = np.concatenate((pairs, np.zeros_like(pairs)))
                                rows = np.concatenate((rows, np.zeros_like(rows)))
                                at = _slot(keys, numbers, key)
                            pairs[count] = key
                            count += np.int32(1)
                            keys[at] = key
                            numbers[at] = count
                        row = numbers[at] - 1
                    _add(rows[row], flow4[z, y, x], flow4[z + dz, y + dy, x + dx], axis, step)
                    x = _next(ones, twos, x + 1, end)
    return pairs[:count], rows[:count]


def contacts(
    labels: npt.NDArray[np.integer[Any]],
    flow4: npt.NDArray[np.float32],
    *,
    core: tuple[int, ...],
    step_size: float = 1.0,
) -> ContactTable:
    """Pairs of labels that touch by a face.

    A face between two voxels belongs to the block in which the first of them lies, so tables of
    blocks add up to that of the volume.

    Parameters
    ----------
    labels
        ``[Z,Y,X]``, any integer type, 0 is background: a block, and beyond its last voxels one
        more along each axis, where the volume has them.
    flow4
        float32 ``[Z,Y,X,4]`` of the same voxels, see `interleave`.
    core
        Shape of the block itself.
    step_size
        Length of a particle's step where the flow has length 1.

    Returns
    -------
    ContactTable

    Examples
    --------
    >>> labels = np.array([[[7, 7, 3, 3]]])
    >>> flow4 = np.zeros((1, 1, 4, 4), np.float32)
    >>> flow4[..., 2] = [1, 1, 0.25, 1]
    >>> table = contacts(labels, flow4, core=(1, 1, 4))
    >>> table.a, table.b, table.area, table.mean_dot, table.crossing
    (array([3], dtype=uint64), array([7], dtype=uint64), array([1]), array([0.25]), array([1]))
    """
    local, ids = compact(labels)
    most = ids.size + 1
    flow4 = np.ascontiguousarray(flow4)
    sides = np.asarray(core, dtype=np.int64)
    pairs, rows = _count(local, flow4, sides, np.float32(step_size), most)
    order = np.argsort(pairs)
    pairs, rows = pairs[order].astype(np.int64), rows[order]
    names = np.concatenate([np.zeros(1, np.uint64), ids])
    return ContactTable(names[pairs // most], names[pairs % most], *rows.T.copy())
