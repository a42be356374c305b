"""How many voxels each pair of a truth id and a label id has in common.

The ids go into a hash table, so neither their size nor their number needs to be known before, and
one look-up serves a whole run of equal pairs: in dense tissue ids repeat for many voxels along x.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from topo_dask.errors import InvalidArgument, InvalidData, InvalidType

Pairs = tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.int64]]

# Typed constants: numba turns uint64 with int64 into float64, which would lose large ids.
_ONE = np.uint64(1)
_HALF = np.uint64(32)
_MIX_TRUTH = np.uint64(0x9E3779B97F4A7C15)
_MIX_LABEL = np.uint64(0xC2B2AE3D27D4EB4F)
_FIRST_SLOTS = 1024


def contingency(truth: npt.NDArray[Any], labels: npt.NDArray[Any]) -> Pairs:
    """Count the voxels of every pair of ids that occurs.

    Parameters
    ----------
    truth, labels
        Arrays of one shape and any integer types, 0 (background) included as an id.

    Returns
    -------
    truth_ids, label_ids : uint64 arrays
        The pairs, sorted by truth id, then by label id.
    counts : int64 array
        Voxels of each pair.

    Raises
    ------
    InvalidArgument
        The shapes differ.
    InvalidType
        Not an integer type.
    InvalidData
        A negative id.

    Examples
    --------
    >>> truth, labels, counts = contingency(np.array([[[0, 1, 1]]]), np.array([[[0, 0, 5]]]))
    >>> truth, labels, counts
    (array([0, 1, 1], dtype=uint64), array([0, 0, 5], dtype=uint64), array([1, 1, 1]))
    """
    if truth.shape != labels.shape:
        raise InvalidArgument(
            "labels",
            f"shape {labels.shape}",
            f"the shape of truth, {truth.shape}",
            "Cut or pad one of them so that both cover the same voxels.",
        )
    table = _count(_bits(truth, "truth"), _bits(labels, "labels"))
    table = table[table[:, 2] > 0]
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    truth_ids, label_ids, counts = (np.ascontiguousarray(column) for column in table.T)
    _check_sign(truth_ids, truth.dtype, "truth")
    _check_sign(label_ids, labels.dtype, "labels")
    return truth_ids, label_ids, counts.view(np.int64)


def _bits(array: npt.NDArray[Any], argument: str) -> npt.NDArray[Any]:
    """The voxels in C order as unsigned numbers: half as many types to compile."""
    if array.dtype.kind not in "iu":
        allowed, do = (
            "an integer dtype up to uint64",
            "Convert whole numbers with .astype('uint64').",
        )
        raise InvalidType(argument, f"dtype {array.dtype}", allowed, do)
    native = array.dtype.newbyteorder("=")
    flat = np.ascontiguousarray(array, dtype=native).reshape(-1)
    return flat.view(f"u{native.itemsize}")


def _check_sign(ids: npt.NDArray[np.uint64], dtype: np.dtype[Any], argument: str) -> None:
    """Refuse negative ids, which look like the upper half of the unsigned type of their width."""
    if dtype.kind != "i" or ids.size == 0:
        return
    largest = int(ids.max())
    bits = 8 * dtype.itemsize
    if largest >= 1 << (bits - 1):
        raise InvalidData(
            argument,
            f"the id {largest - (1 << bits)}",
            "ids >= 0, where 0 is background",
            "Replace negative ids, e.g. by 0.",
        )


@numba.njit(nogil=True, cache=True)
def _count(truth, labels):  # type: ignore[no-untyped-def]
    """Hash table of rows (truth id, label id, voxels); rows with 0 voxels are free."""
    table = np.zeros((_FIRST_SLOTS, 3), np.uint64)
    used = 0
    start = 0
    for i in range(1, truth.size + 1):
        if i < truth.size and truth[i] == truth[start] and labels[i] == labels[start]:
            continue
        if start < truth.size:
            a, b = np.uint64(truth[start]), np.uint64(labels[start])
            used += _add(table, a, b, np.uint64(i - start))
            if 2 * used > table.shape[0]:
                larger = np.zeros((4 * table.shape[0], 3), np.uint64)
                for row in range(table.shape[0]):
                    if table[row, 2] > 0:
                        _add(larger, table[row, 0], table[row, 1], table[row, 2])
                table = larger
        start = i
    return table


@numba.njit(nogil=True, cache=True)
def _add(table, a, b, voxels):  # type: ignore[no-untyped-def]
    """Add voxels to the pair (a, b); return 1 if the pair is new."""
    last = np.uint64(table.shape[0]) - _ONE
    mixed = a * _MIX_TRUTH + b * _MIX_LABEL
    mixed = (mixed ^ (mixed >> _HALF)) * _MIX_TRUTH
    slot = (mixed ^ (mixed >> _HALF)) & last
    while table[slot, 2] != 0:
        if table[slot, 0] == a and table[slot, 1] == b:
            table[slot, 2] += voxels
            return 0
        slot = (slot + _ONE) & last
    table[slot, 0] = a
    table[slot, 1] = b
    table[slot, 2] = voxels
    return 1
