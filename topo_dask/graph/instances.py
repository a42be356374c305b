"""Facts of whole instances, from one pass over the labels: a table per block, summed as a tree."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.delayed import delayed

from topo_dask.graph.blocks import Source, grid_of
from topo_dask.graph.check import check_labels, check_not_negative
from topo_dask.kernels import cpu
from topo_dask.kernels.parallel import available_cores
from topo_dask.kernels.tables import InstanceTable, merge_instances

FAN_IN = 16
"""Tables summed in one task."""


def facts_of_block(
    labels: npt.NDArray[Any], origin: tuple[int, ...], argument: str = "labels"
) -> InstanceTable:
    """The table of one block; raises InvalidData for negative labels."""
    check_not_negative(labels, argument=argument, where=f" in the block at {origin}")
    return cpu.instance_facts(labels, origin=origin)


def instance_table(labels: Any) -> Any:
    """Size, centre and extent of every instance.

    Parameters
    ----------
    labels
        ``[Z,Y,X]``, any integer type; NumPy or dask.

    Returns
    -------
    InstanceTable, or a dask ``Delayed`` of one for a dask array. Ascending by id, exact.

    Examples
    --------
    >>> instance_table(np.array([[[0, 7, 7]]])).hi
    array([[1, 1, 3]])
    """
    check_labels(labels)
    if not isinstance(labels, da.Array):
        return cpu.instance_facts(np.asarray(labels), threads=available_cores())
    facts, merge = delayed(facts_of_block), delayed(merge_instances)
    source = Source.of(labels)
    tables = [facts(source.read(r), r.start) for r in grid_of(labels, argument="labels")]
    while len(tables) > 1:
        tables = [merge(tables[i : i + FAN_IN]) for i in range(0, len(tables), FAN_IN)]
    return tables[0]


INSTANCE_BYTES = 88
"""Bytes of an instance in a table: id, voxels, sums, extent."""

VOXELS_PER_INSTANCE = 500
"""No denser are instances taken to be where nothing is known of them."""


def memory_of_facts(voxels: int, itemsize: int) -> int:
    """Bytes that `facts_of_block` and the labels of a block take at most."""
    return (itemsize + 10) * voxels
