"""Cleaning up labels: renumbering, dropping small instances and those that their flow belies.

What is kept is decided by whole numbers summed over all blocks (sizes, squared differences in
fixed point), so that the decision does not depend on the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.delayed import delayed

from topo_dask.config import BACKENDS, choice, number
from topo_dask.errors import InvalidData
from topo_dask.graph.blocks import Source, assemble, grid_of
from topo_dask.graph.check import check_flow, check_labels, check_same_shape
from topo_dask.graph.instances import instance_table
from topo_dask.graph.track import flow_ready
from topo_dask.grid import BlockGrid, Region
from topo_dask.kernels import cpu
from topo_dask.kernels.backends import kernels_for
from topo_dask.kernels.cpu.direct import ERROR_UNIT
from topo_dask.kernels.tables import ErrorTable, InstanceTable, merge_errors

UInt64 = npt.NDArray[np.uint64]
Renamed = tuple[UInt64, UInt64]
"""Ids, ascending, and the new number of each (0 for none)."""


def numbers_of(ids: UInt64, kept: npt.NDArray[np.bool_]) -> Renamed:
    """Number the instances that are kept 1..K by ascending id; the others become 0."""
    return ids, np.where(kept, np.cumsum(kept), 0).astype(np.uint64)


def rename(
    labels: npt.NDArray[Any], renamed: Renamed, dtype: npt.DTypeLike = np.int32
) -> npt.NDArray[Any]:
    """The new numbers of a block's labels.

    Raises
    ------
    InvalidData
        More instances than the type can number.

    Examples
    --------
    >>> ids = np.array([4, 9], np.uint64), np.array([0, 1], np.uint64)
    >>> rename(np.array([[[9, 0, 4]]]), ids)
    array([[[1, 0, 0]]], dtype=int32)
    """
    ids, numbers = renamed
    most = np.iinfo(np.dtype(dtype)).max
    if len(numbers) and int(numbers.max()) > most:
        do = "Use topo_dask.segment, whose labels have the type that they need."
        raise InvalidData("instances", f"{int(numbers.max())} of them", f"at most {most}", do)
    local, present = cpu.compact(labels)
    new = np.zeros(len(present) + 1, dtype=dtype)
    new[1:] = numbers[cpu.rows_of(present, ids)]
    renumbered: npt.NDArray[Any] = new[local]
    return renumbered


def mean_errors(table: InstanceTable, errors: ErrorTable) -> npt.NDArray[np.float64]:
    """Mean squared difference, over voxels and components, of each instance of a table."""
    mean: npt.NDArray[np.float64] = errors.sums * ERROR_UNIT / (3.0 * table.voxels)
    return mean


def errors_of_block(
    labels: npt.NDArray[Any],
    flow: npt.NDArray[Any],
    table: InstanceTable,
    core: Region,
    argument: str = "pred_flow",
    backend: str = "auto",
) -> ErrorTable:
    """Squared differences to the direct flow in a block; raises InvalidData for NaN, infinity."""
    ready = flow_ready(flow, read=core, block=core, argument=argument, backend=backend)
    return kernels_for(backend).flow_errors(
        labels, ready, ids=table.ids, centres=table.centres, origin=core.start
    )


def memory_of_errors(core: int, itemsize: int) -> int:
    """Bytes that `errors_of_block` takes at most, and what is read for it.

    Labels and small numbers; the flow as it is stored, and interleaved.
    """
    return (8 + 8 + 4 + 3 * itemsize + 12 * (itemsize == 2) + 16) * core


def _large_enough(table: InstanceTable, min_size: float) -> Renamed:
    return numbers_of(table.ids, table.voxels >= min_size)


def _fit(table: InstanceTable, parts: Sequence[ErrorTable], threshold: float) -> Renamed:
    return numbers_of(table.ids, mean_errors(table, merge_errors(parts)) <= threshold)


def _renamed_by(instances: Any, table: Any, decide: Callable[..., Renamed], *arguments: Any) -> Any:
    """Rename labels, in memory or lazily, as a function of their table says."""
    if not isinstance(instances, da.Array):
        return rename(np.asarray(instances), decide(table, *arguments))
    renamed = delayed(decide)(table, *arguments)
    grid, source = grid_of(instances, argument="instances"), Source.of(instances)
    blocks = [delayed(rename)(source.read(core), renamed) for core in grid]
    return assemble(blocks, grid, dtype=np.int32)


def compact_relabel(instances: Any) -> Any:
    """Number instances 1..K by ascending id.

    Parameters
    ----------
    instances
        ``[Z,Y,X]`` labels, any integer type, 0 is background; NumPy or dask.

    Returns
    -------
    int32 ``[Z,Y,X]``. NumPy for NumPy, lazy for dask; the same for any chunks.

    Raises
    ------
    InvalidArgument, InvalidType, InvalidData
        The argument is named.

    Examples
    --------
    >>> compact_relabel(np.array([[[0, 40, 7, 40]]]))
    array([[[0, 2, 1, 2]]], dtype=int32)
    """
    return filter_small(instances, 0)


def filter_small(instances: Any, min_size: int) -> Any:
    """Drop instances with fewer voxels than ``min_size`` and number the others 1..K.

    Parameters
    ----------
    instances
        ``[Z,Y,X]`` labels, any integer type, 0 is background; NumPy or dask.
    min_size
        Least number of voxels that is kept.

    Returns
    -------
    int32 ``[Z,Y,X]``, by ascending id. NumPy for NumPy, lazy for dask; the same for any chunks.

    Raises
    ------
    InvalidArgument, InvalidType, InvalidData
        The argument is named.

    Examples
    --------
    >>> filter_small(np.array([[[5, 5, 0, 3, 8, 8]]]), 2)
    array([[[1, 1, 0, 0, 2, 2]]], dtype=int32)
    """
    check_labels(instances, argument="instances")
    number("min_size", min_size, lambda v: v >= 0, "a whole number >= 0", whole=True)
    return _renamed_by(instances, instance_table(instances), _large_enough, min_size)


def remove_bad_flow_masks(
    instances: Any, pred_flow: Any, threshold: float = 0.4, *, backend: str = "auto"
) -> Any:
    """Drop instances whose flow does not point to their middle, and number the others 1..K.

    The error of an instance is the mean, over its voxels and the three components, of the squared
    difference between the given flow and the direct flow (see `generate_direct_flows`). It is
    summed in fixed point of 2**-24.

    Parameters
    ----------
    instances
        ``[Z,Y,X]`` labels, any integer type, 0 is background; NumPy or dask.
    pred_flow
        ``[3,Z,Y,X]`` float, ``(dz,dy,dx)``.
    threshold
        Instances with a larger error are dropped: 0 is a perfect flow, 2/3 one that is unrelated,
        4/3 the opposite one.
    backend
        See `topo_dask.track_flows`.

    Returns
    -------
    int32 ``[Z,Y,X]``, by ascending id. NumPy for NumPy, lazy for dask; the same for any chunks.

    Raises
    ------
    InvalidArgument, InvalidType, InvalidData
        The argument is named.

    Notes
    -----
    Source: Cellpose (Stringer et al., 2021) drops masks by the like error; against the flow to the
    centre of mass in the topo package.

    Examples
    --------
    >>> flow = np.zeros((3, 1, 1, 6), np.float32)
    >>> flow[2] = [1, 0, -1, -1, 0, 1]
    >>> remove_bad_flow_masks(np.array([[[4, 4, 4, 2, 2, 2]]]), flow)
    array([[[1, 1, 1, 0, 0, 0]]], dtype=int32)
    """
    check_labels(instances, argument="instances")
    check_flow(pred_flow, argument="pred_flow")
    check_same_shape(pred_flow.shape[1:], instances.shape, argument="pred_flow", of="instances")
    number("threshold", threshold, lambda v: v >= 0, "a number >= 0", default=0.4)
    choice("backend", backend, BACKENDS)
    if not (isinstance(instances, da.Array) or isinstance(pred_flow, da.Array)):
        labels = np.asarray(instances)
        table = instance_table(labels)
        whole = Region((0, 0, 0), labels.shape)
        flow = np.asarray(pred_flow)
        errors = errors_of_block(labels, flow, table, whole, backend=backend)
        return _renamed_by(labels, table, _fit, [errors], threshold)
    labels = da.asarray(instances)
    table = instance_table(labels)
    grid: BlockGrid = grid_of(labels, argument="instances")
    source, field = Source.of(labels), Source.of(da.asarray(pred_flow))
    task = delayed(errors_of_block)
    parts = [
        task(source.read(core), field.read(core), table, core, backend=backend) for core in grid
    ]
    return _renamed_by(labels, table, _fit, parts, threshold)
