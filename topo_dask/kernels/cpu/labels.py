"""Labels to small consecutive numbers, and what is known of each instance. One pass, by runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.errors import InvalidArgument
from topo_dask.kernels.jit import compiled
from topo_dask.kernels.parallel import Starmap, ranges, starmap
from topo_dask.kernels.tables import InstanceTable, merge_instances

Integers = npt.NDArray[np.integer[Any]]


@compiled
def _slot(keys: Any, numbers: Any, key: Any) -> Any:
    """Where ``key`` is, or belongs, in an open-addressing table whose size is a power of two."""
    mask = np.uint64(keys.size - 1)
    mixed = key * np.uint64(0x9E3779B97F4A7C15)
    at = (mixed ^ (mixed >> np.uint64(32))) & mask
    while numbers[at] != 0 and keys[at] != key:
        at = (at + np.uint64(1)) & mask
    return at


@compiled
def _doubled(keys: Any, numbers: Any) -> Any:
    """The same table with twice the room."""
    new_keys = np.zeros(2 * keys.size, np.uint64)
    new_numbers = np.zeros(2 * keys.size, np.int32)
    for i in range(keys.size):
        if numbers[i] != 0:
            at = _slot(new_keys, new_numbers, keys[i])
            new_keys[at] = keys[i]
            new_numbers[at] = numbers[i]
    return new_keys, new_numbers


@compiled
def _number_by_appearance(labels: Any, local: Any, pad: int) -> Any:
    """Number the ids 1, 2, ... as they appear; write the numbers into ``local``; return the ids.

    ``local`` has ``pad`` voxels more than the labels on either side along y and x. A run of one
    label along x mostly lies beside another of it: then no table need be asked.
    """
    keys = np.zeros(1024, np.uint64)
    numbers = np.zeros(1024, np.int32)
    ids = np.zeros(512, np.uint64)
    count = np.int32(0)
    nz, ny, nx = labels.shape
    for z in range(nz):
        for y in range(ny):
            row, out = labels[z, y], local[z, y + pad, pad : pad + nx]
            front, before = labels[z, max(y - 1, 0)], local[z, max(y - 1, 0) + pad]
            below, under = labels[max(z - 1, 0), y], local[max(z - 1, 0), y + pad]
            x = 0
            while x < nx:
                label = row[x]
                first = x
                while x < nx and row[x] == label:
                    x += 1
                if label == 0:
                    number = np.int32(0)
                elif y > 0 and front[first] == label:
                    number = before[first + pad]
                elif y > 0 and front[x - 1] == label:
                    number = before[x - 1 + pad]
                elif z > 0 and below[first] == label:
                    number = under[first + pad]
                else:
                    value = np.uint64(label)
                    at = _slot(keys, numbers, value)
                    if numbers[at] == 0:
                        if count == ids.size:
                            keys, numbers = _doubled(keys, numbers)
                            ids = np.concatenate((ids, np.zeros(count, np.uint64)))
                            at = _slot(keys, numbers, value)
                        ids[count] = value
                        count += np.int32(1)
                        keys[at] = value
                        numbers[at] = count
                    number = numbers[at]
                out[first:x] = number
    return ids[:count]


@compiled
def _renumber(local: Any, new: Any) -> None:
    flat = local.ravel()
    for i in range(flat.size):
        flat[i] = new[flat[i]]


def native(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array in the byte order of this machine, which is all that numba knows."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def compact(
    labels: Integers, *, pad: int = 0, threads: int = 1, run: Starmap | None = None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64]]:
    """Number the instances of an array 1..K by ascending id.

    Parameters
    ----------
    labels
        ``[Z,Y,X]``, any integer type, no negative values; 0 is background.
    pad
        Voxels of background to add on every side.
    threads
        Threads to use.
    run
        What runs on them, if they are there already; see `starmap`.

    Returns
    -------
    local
        int32, the padded shape: 0 for background, k for the k-th smallest id.
    ids
        uint64 ``[K]``, ascending.

    Examples
    --------
    >>> compact(np.array([[[0, 9, 9, 4]]]))
    (array([[[0, 2, 2, 1]]], dtype=int32), array([4, 9], dtype=uint64))
    """
    known = np.ascontiguousarray(native(labels))
    local = np.zeros([n + 2 * pad for n in labels.shape], dtype=np.int32)
    inner = local[pad : local.shape[0] - pad]
    parts = ranges(labels.shape[0], threads)
    appeared = [np.zeros(0, np.uint64)] * len(parts)

    def number(part: int, first: int, end: int) -> None:
        appeared[part] = _number_by_appearance(known[first:end], inner[first:end], pad)

    with starmap(threads) as own:
        run = run or own
        run(number, [(i, *part) for i, part in enumerate(parts)])
        ids = np.unique(np.concatenate(appeared))
        new = [np.append(0, np.searchsorted(ids, own) + 1).astype(np.int32) for own in appeared]
        run(_renumber, [(inner[slice(*p)], by) for p, by in zip(parts, new, strict=True)])
    return local, ids


def renamed(labels: Integers, names: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Labels by other names.

    Parameters
    ----------
    labels
        ``[Z,Y,X]``, any integer type, no negative values; 0 is background and stays 0.
    names
        uint64 ``[K + 1]``: the new label of each label. Only the rows of labels that occur are
        read, so it may be a memory map.

    Examples
    --------
    >>> renamed(np.array([[[0, 2, 1]]]), np.array([0, 7, 9], np.uint64))
    array([[[0, 9, 7]]], dtype=uint64)
    """
    local, ids = compact(labels)
    new: npt.NDArray[np.uint64] = np.concatenate([np.zeros(1, np.uint64), names[ids]])
    return new[local]


def rows_of(present: npt.NDArray[np.uint64], ids: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
    """Rows of an instance table in which some ids stand; both ascending.

    Raises
    ------
    InvalidArgument
        The table lacks one of them: it was made of other labels.
    """
    rows = np.searchsorted(ids, present)
    if rows.size and (rows[-1] >= ids.size or (ids[rows] != present).any()):
        raise InvalidArgument(
            "instances",
            f"a table without ids {np.setdiff1d(present, ids)[:5].tolist()}",
            "a table of the same labels",
            "Make it with topo_dask.instance_table(labels) of the whole volume.",
        )
    return rows


@compiled
def _measure(local: Any, count: int) -> Any:
    """Voxels, sums of coordinates and bounding boxes of the instances 1..count, by runs along x."""
    voxels = np.zeros(count, np.int64)
    sums = np.zeros((count, 3), np.int64)
    low = np.full((count, 3), np.int64(2**62))
    high = np.zeros((count, 3), np.int64)
    nx = local.shape[2]
    for z in range(local.shape[0]):
        for y in range(local.shape[1]):
            x = 0
            while x < nx:
                number = local[z, y, x]
                first = x
                while x < nx and local[z, y, x] == number:
                    x += 1
                if number == 0:
                    continue
                k = number - 1
                length = x - first
                voxels[k] += length
                sums[k, 0] += length * z
                sums[k, 1] += length * y
                sums[k, 2] += length * (first + x - 1) // 2
                low[k, 0] = min(low[k, 0], z)
                low[k, 1] = min(low[k, 1], y)
                low[k, 2] = min(low[k, 2], first)
                high[k, 0] = max(high[k, 0], z + 1)
                high[k, 1] = max(high[k, 1], y + 1)
                high[k, 2] = max(high[k, 2], x)
    return voxels, sums, low, high


def instance_facts(
    labels: Integers, *, origin: tuple[int, ...] = (0, 0, 0), threads: int = 1
) -> InstanceTable:
    """Size, coordinate sums and extent of every instance of a block.

    Parameters
    ----------
    labels
        ``[Z,Y,X]``, any integer type, no negative values; 0 is background.
    origin
        Global index of the block's first voxel.
    threads
        Threads to use.

    Returns
    -------
    InstanceTable
        Ascending by id, in global coordinates. Tables of blocks merge exactly: all is integer.

    Examples
    --------
    >>> table = instance_facts(np.array([[[0, 7, 7]]]), origin=(10, 0, 0))
    >>> table.ids, table.centres
    (array([7], dtype=uint64), array([[10. ,  0. ,  1.5]]))
    """
    parts = ranges(labels.shape[0], threads)
    tables = [_facts(labels[:0], origin)] * len(parts)

    def measure(number: int, first: int, end: int) -> None:
        tables[number] = _facts(labels[first:end], (origin[0] + first, *origin[1:]))

    with starmap(threads) as run:
        run(measure, [(number, *part) for number, part in enumerate(parts)])
    return tables[0] if len(tables) == 1 else merge_instances(tables)


def _facts(labels: Integers, origin: tuple[int, ...]) -> InstanceTable:
    local, ids = compact(labels)
    voxels, sums, low, high = _measure(local, ids.size)
    shift = np.asarray(origin, dtype=np.int64)
    return InstanceTable(ids, voxels, sums + voxels[:, None] * shift, low + shift, high + shift)
