"""6-connected pieces of instances, by runs along x."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.kernels.cpu.cells import _find
from topo_dask.kernels.cpu.labels import native
from topo_dask.kernels.jit import compiled


@compiled
def _unite(parent: Any, a: Any, b: Any) -> None:
    """Join two runs; the earlier one stays the root."""
    a, b = _find(parent, a), _find(parent, b)
    if a != b:
        parent[max(a, b)] = min(a, b)


@compiled
def _join_runs(labels: Any, number: Any) -> Any:
    """Number the runs from 1 on, join those that touch; give parents, lengths, first voxels."""
    nz, ny, nx = labels.shape
    parent = np.zeros(1024, np.int32)
    lengths = np.zeros(1024, np.int64)
    first = np.zeros(1024, np.int64)
    count = 0
    for z in range(nz):
        for y in range(ny):
            x = 0
            while x < nx:
                value = labels[z, y, x]
                begin = x
                while x < nx and labels[z, y, x] == value:
                    x += 1
                if value == 0:
                    continue
                count += 1
                if count == parent.size:
                    parent = np.concatenate((parent, np.zeros_like(parent)))
                    lengths = np.concatenate((lengths, np.zeros_like(lengths)))
                    first = np.concatenate((first, np.zeros_like(first)))
                parent[count] = count
                lengths[count] = x - begin
                first[count] = (z * ny + y) * nx + begin
                above, beside = 0, 0
                for i in range(begin, x):
                    number[z, y, i] = count
                    if z > 0 and labels[z - 1, y, i] == value and number[z - 1, y, i] != above:
                        above = number[z - 1, y, i]
                        _unite(parent, above, count)
                    if y > 0 and labels[z, y - 1, i] == value and number[z, y - 1, i] != beside:
                        beside = number[z, y - 1, i]
                        _unite(parent, beside, count)
    return parent[: count + 1], lengths[: count + 1], first[: count + 1]


@compiled
def _number(parent: Any, lengths: Any, first: Any, number: Any) -> Any:
    """Number the roots as they appear; write the numbers, add up the lengths of their runs."""
    new = np.zeros(parent.size, np.int32)
    sizes = np.zeros(parent.size, np.int64)
    begins = np.zeros(parent.size, np.int64)
    count = 0
    for run in range(1, parent.size):
        root = _find(parent, run)
        if root == run:
            begins[count] = first[run]
            count += 1
            new[run] = count
        new[run] = new[root]
        sizes[new[root] - 1] += lengths[run]
    flat = number.ravel()
    for i in range(flat.size):
        flat[i] = new[flat[i]]
    return sizes[:count], begins[:count]


def pieces(
    labels: npt.NDArray[np.integer[Any]],
) -> tuple[
    npt.NDArray[np.int32], npt.NDArray[np.uint64], npt.NDArray[np.int64], npt.NDArray[np.int64]
]:
    """6-connected pieces of equal labels, numbered from 1 on by first voxel in C order.

    Parameters
    ----------
    labels
        ``[Z,Y,X]``, any integer type, no negative values; 0 is background.

    Returns
    -------
    number
        int32 ``[Z,Y,X]``, the piece of each voxel, 0 for background.
    ids
        uint64 ``[P]``, the label of each piece.
    voxels
        int64 ``[P]``, its size.
    first
        int64 ``[P]``, its first voxel in C order, as an index into the flattened array.

    Examples
    --------
    >>> pieces(np.array([[[4, 4, 0, 4, 9]]]))
    (array([[[1, 1, 0, 2, 3]]], dtype=int32), array([4, 4, 9], dtype=uint64), array([2, 1, 1]), \
array([0, 3, 4]))
    """
    labels = np.ascontiguousarray(native(labels))
    number = np.zeros(labels.shape, dtype=np.int32)
    parent, lengths, begins = _join_runs(labels, number)
    voxels, first = _number(parent, lengths, begins, number)
    return number, labels.ravel()[first].astype(np.uint64), voxels, first


@compiled
def name_pieces(
    order: Any, parent: Any, ids: Any, sizes: Any, labels: Any, sought: Any, ratio: Any
) -> Any:
    """Number the large pieces of each instance at their roots; give how many numbers there are.

    Parameters
    ----------
    order
        int64: all rows, ascending by instance, then by first voxel. Its beginning is overwritten:
        with the instance of each number, which are never more than the rows read before.
    parent
        Root of each row. Rows of one piece have one root; only roots count.
    ids
        int64, the bits of each row's instance.
    sizes
        Voxels of each root.
    labels
        Filled at the roots: the number, 0 of small pieces.
    sought
        Filled at the roots: whether it is a large piece of an instance that has small ones.
    ratio
        What part of its instance a large piece is at least.
    """
    count, first = 0, 0
    while first < order.size:
        instance = ids[order[first]]
        stop, total = first, 0
        while stop < order.size and ids[order[stop]] == instance:
            if parent[order[stop]] == order[stop]:
                total += sizes[order[stop]]
            stop += 1
        least = max(1, np.int64(total * ratio))
        large, small = False, False
        for n in range(first, stop):
            if parent[order[n]] == order[n]:
                large |= sizes[order[n]] >= least
                small |= sizes[order[n]] < least
        before = count
        for n in range(first, stop):
            row = order[n]
            if parent[row] != row:
                continue
            own = sizes[row] >= least
            if own or (not large and count == before):  # the first leads what stays whole
                order[count] = instance
                count += 1
            labels[row] = count if own or not large else 0
            sought[row] = own and small
        first = stop
    return count


@compiled
def blocks_of_labels(labels: Any, sought: Any, first: Any, starts: Any, blocks: Any) -> None:
    """List the blocks in which some pieces of each label lie, by counting.

    Parameters
    ----------
    labels, sought
        The label of each row, from 1 on, and whether it is listed.
    first
        The first row of each block, and the end.
    starts
        Zeros, one more than there are labels. Filled: where the blocks of each label begin, and
        the end.
    blocks
        Filled: ascending for each label; one that holds several pieces stands there as often.
    """
    for row in range(labels.size):
        if sought[row]:
            starts[labels[row] - 1] += 1
    for n in range(1, starts.size):
        starts[n] += starts[n - 1]
    for block in range(first.size - 2, -1, -1):
        for row in range(first[block + 1] - 1, first[block] - 1, -1):
            if sought[row]:
                place = starts[labels[row] - 1] - 1
                starts[labels[row] - 1] = place
                blocks[place] = block
