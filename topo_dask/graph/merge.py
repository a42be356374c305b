"""From where particles end to instances: cells by owner, joins, one union over all blocks.

Every block owns the cells inside it. Blocks hand the sums of their particles' endpoints to the
owners (exact integers, whatever the order); owners join their own cells; pairs of close cells of
different owners are the edges of one graph, whose components are the instances. Nothing is as
long as the largest id or as the number of voxels, except the labels themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.delayed import delayed

from topo_dask.config import SegmentSettings
from topo_dask.errors import InvalidArgument, InvalidData, InvalidType
from topo_dask.graph.blocks import Source, assemble, grid_of
from topo_dask.graph.cells import cell_owners, most_cells
from topo_dask.graph.check import check_array
from topo_dask.graph.contacts import join_touching
from topo_dask.graph.orphans import recover_orphans
from topo_dask.graph.pieces import split_disconnected
from topo_dask.graph.track import check_inputs, lazy_endpoints, track_flows
from topo_dask.graph.union import unite
from topo_dask.grid import BlockGrid, Region, as_lengths
from topo_dask.kernels import cpu
from topo_dask.kernels.backends import kernels_for
from topo_dask.kernels.cpu import cells as cell_kernels
from topo_dask.kernels.tables import CellTable, merge_cells

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Owned:
    """The cells of one owner, with the component each belongs to within the owner.

    Parameters
    ----------
    table
        The cells, summed over all blocks.
    roots
        int64 ``[M]``: the smallest cell of each cell's component.
    """

    table: CellTable
    roots: Int64


@dataclass(frozen=True, eq=False)
class Numbering:
    """The instance of every component.

    Parameters
    ----------
    roots
        int64 ``[K]``, ascending: smallest cell of each owner's component.
    labels
        uint64 ``[K]``: its instance, 0 where that is smaller than ``min_size``.
    instances
        Number of instances.
    voxels
        int64 ``[K]``: voxels of each component.
    """

    roots: Int64
    labels: UInt64
    instances: int
    voxels: Int64

    def of(self, roots: Int64) -> UInt64:
        """Instances of some roots."""
        found: UInt64 = self.labels[np.searchsorted(self.roots, roots)]
        return found

    @property
    def names(self) -> UInt64:
        """The instance of each part, with a first row for background."""
        return np.concatenate([np.zeros(1, np.uint64), self.labels])


def owned_cells(tables: Sequence[CellTable], shape: tuple[int, ...], radius: float) -> Owned:
    """Sum the parts of an owner's cells and join those that are close."""
    table = merge_cells(list(tables))
    rows, _ = cpu.join_cells(table, shape=shape, radius=radius)
    return Owned(table, table.cells[rows])


def reach_of(region: Region, grid: BlockGrid, radius: float) -> list[int]:
    """Numbers of the blocks that may own a cell close to one of a block's cells."""
    return grid.touching(region.grow(_margin(grid.shape, radius), within=grid.shape))


def _margin(shape: tuple[int, ...], radius: float) -> int:
    """How far from a block's faces the corner of a cell may lie that is close to one of its."""
    # corners are floored, and clipped to the volume's last voxel
    reach = np.ceil(cell_kernels.REACH * cell_kernels.cell_size(radius)) + 1
    return int(min(reach, max(shape)))


def near_cells(owned: Owned, region: Region, shape: tuple[int, ...], radius: float) -> Owned:
    """The cells of an owner that may be close to a cell of the owner of ``region``."""
    margin = _margin(shape, radius)
    corners = cell_kernels.cell_corners(owned.table.cells, shape=shape, radius=radius)
    near = (corners >= np.asarray(region.start) - margin).all(axis=1)
    near &= (corners < np.asarray(region.stop) + margin).all(axis=1)
    table = CellTable(owned.table.cells[near], owned.table.counts[near], owned.table.offsets[near])
    return Owned(table, owned.roots[near])


def edges_across(
    own: Owned, others: Sequence[Owned], shape: tuple[int, ...], radius: float
) -> Int64:
    """Pairs (root, root) of close cells, one of the owner's, one of another: int64 ``[E,2]``.

    Each owner lists the pairs with the owners that come after it; so ``others`` are those.
    """
    tables = [own.table, *(o.table for o in others)]
    cells = np.concatenate([t.cells for t in tables])
    order = np.argsort(cells, kind="stable")
    table = CellTable(
        cells[order],
        np.concatenate([t.counts for t in tables])[order],
        np.concatenate([t.offsets for t in tables])[order],
    )
    roots = np.concatenate([own.roots, *(o.roots for o in others)])[order]
    mine = np.repeat([True, False], [len(own.roots), len(cells) - len(own.roots)])[order]
    _, pairs = cpu.join_cells(table, shape=shape, radius=radius, groups=mine.astype(np.int64))
    return np.unique(roots[pairs], axis=0).reshape(-1, 2)


def component_sizes(owned: Owned) -> tuple[Int64, Int64]:
    """Roots of an owner's components, ascending, and their numbers of particles."""
    roots, inverse = np.unique(owned.roots, return_inverse=True)
    sizes = np.zeros(len(roots), dtype=np.int64)
    np.add.at(sizes, inverse, owned.table.counts)
    return roots, sizes


def ascending(roots: Int64, sizes: Int64) -> tuple[Int64, Int64, Int64]:
    """Components of all owners, ascending by their roots, and the row that each has then."""
    order = np.argsort(roots)
    rows = np.empty(len(order), dtype=np.int64)
    rows[order] = np.arange(len(order))
    return roots[order], sizes[order], rows


OWNER_BITS = 32
"""The number of a component: that of its owner, and in so many bits that within the owner."""


def numbers_in(edges: Int64, owners: Sequence[tuple[int, Int64]]) -> Int64:
    """Edges between roots as edges between numbers of components.

    Parameters
    ----------
    edges
        int64 ``[E,2]``, see `edges_across`.
    owners
        The owners they are between, and the roots of the components of each, ascending.

    Examples
    --------
    >>> numbers_in(np.array([[50, 7]]), [(1, np.array([7, 9])), (0, np.array([3, 50]))])
    array([[         1, 4294967296]])
    """
    roots = np.concatenate([r for _, r in owners])
    numbers = np.concatenate([(n << OWNER_BITS) + np.arange(len(r)) for n, r in owners])
    order = np.argsort(roots)
    found: Int64 = numbers[order][np.searchsorted(roots[order], edges)]
    return found


def places_of(numbers: Int64, first: Int64) -> Int64:
    """Places of components where those of all owners stand one after the other.

    ``first``: the place of the first of each owner.
    """
    owners, inside = numbers >> OWNER_BITS, numbers & ((1 << OWNER_BITS) - 1)
    return np.asarray(first[owners] + inside, dtype=np.int64)


def number_instances(
    roots: Int64, sizes: Int64, pairs: Iterable[npt.NDArray[np.integer]], *, min_size: int
) -> Numbering:
    """Unite the owners' components along their edges, drop small ones, number by smallest cell.

    Parameters
    ----------
    roots, sizes
        Of all owners, see `component_sizes`, `ascending`.
    pairs
        Rows of components that are one: integers ``[E,2]``, in pieces, of which none is kept, so
        that they may come from files.
    min_size
        Instances with fewer voxels become 0.

    Returns
    -------
    Numbering
    """
    labels, instances = unite(sizes, pairs, min_size=min_size)
    return Numbering(roots, labels, instances, sizes)


def memory_of_labels(core: int) -> int:
    """Bytes that it takes at most to paint a block, or to write and measure its labels."""
    return 72 * core


def memory_of_copy(core: int) -> int:
    """Bytes that it takes at most to give the labels of a block other numbers."""
    return 40 * core


COMPONENT_BYTES = 48
"""Bytes of a component in the one union of all owners' components; none for its edges."""


def most_components(grid: BlockGrid, radius: float) -> int:
    """Components of the cells of all owners, at most.

    The cells of two are never closer than the radius, and spheres of half of it are not packed
    denser than a lattice packs them: one for each radius**3 / sqrt(2).
    """
    room = math.prod(n + radius + cell_kernels.cell_size(radius) for n in grid.largest)
    block = min(most_cells(math.prod(grid.largest), radius), math.sqrt(2) * room / radius**3)
    return math.ceil(len(grid) * block)


# ---------------------------------------------------------------------------------- lazy graph


def _owned_by(
    tables: Sequence[tuple[CellTable, Int64]], grid: BlockGrid, radius: float
) -> list[Owned]:
    """Sum all chunks' cells and hand each owner its own."""
    table = merge_cells([t for t, _ in tables])
    owners = cell_owners(table.cells, grid, radius)
    parts = []
    for number in range(len(grid)):
        mine = owners == number
        part = CellTable(table.cells[mine], table.counts[mine], table.offsets[mine])
        parts.append(owned_cells([part], grid.shape, radius))
    return parts


def resolve(
    tables: Sequence[tuple[CellTable, Int64]], grid: BlockGrid, settings: SegmentSettings
) -> tuple[Int64, UInt64]:
    """All cells, ascending, and the instance of each, from the cells of every block."""
    radius = settings.convergence_radius
    owned = _owned_by(tables, grid, radius)
    edges = []
    for number, region in enumerate(grid):
        later = [n for n in reach_of(region, grid, radius) if n > number]
        near = [near_cells(owned[n], region, grid.shape, radius) for n in later]
        edges.append(edges_across(owned[number], near, grid.shape, radius))
    known = [component_sizes(o) for o in owned]
    roots, sizes, _ = ascending(*(np.concatenate([part[n] for part in known]) for n in (0, 1)))
    pairs = (np.searchsorted(roots, some) for some in edges)
    numbering = number_instances(roots, sizes, pairs, min_size=settings.min_size)
    cells = np.concatenate([o.table.cells for o in owned])
    labels = np.concatenate([numbering.of(o.roots) for o in owned])
    order = np.argsort(cells)
    return cells[order], labels[order]


def paint(
    mask: npt.NDArray[Any],
    index: npt.NDArray[np.integer],
    of_cell: npt.NDArray[Any],
    dtype: npt.DTypeLike,
) -> npt.NDArray[Any]:
    """Labels of a block: ``of_cell[index]`` at its foreground voxels, in C order."""
    out = np.zeros(mask.shape, dtype=dtype)
    if len(index):
        out[np.asarray(mask, dtype=bool)] = of_cell.astype(dtype)[index]
    return out


def _paint_chunk(
    mask: npt.NDArray[Any],
    cells: tuple[CellTable, Int64],
    resolved: tuple[Int64, UInt64],
) -> npt.NDArray[np.int32]:
    table, index = cells
    of_cell = resolved[1][np.searchsorted(resolved[0], table.cells)]
    return paint(mask, index, of_cell, np.int32)


def _cells_of(
    ends: npt.NDArray[np.float64], shape: tuple[int, ...], settings: SegmentSettings
) -> tuple[CellTable, Int64]:
    cell_table = kernels_for(settings.backend).cell_table
    return cell_table(ends, shape=shape, radius=settings.convergence_radius)


def postprocess_single(
    sem_mask: Any,
    flow: Any,
    n_steps: int = 100,
    step_size: float = 1.0,
    convergence_radius: float = 4.0,
    min_size: int = 50,
    group: int = 1,
    *,
    interpolation: str = "nearest",
    scale: float | None = None,
    backend: str = "auto",
) -> Any:
    """Instances of one class: track every foreground voxel, join those that end close together.

    Parameters
    ----------
    sem_mask
        ``[Z,Y,X]``, foreground where not 0; NumPy or dask.
    flow
        ``[3,Z,Y,X]`` float, ``(dz,dy,dx)``.
    n_steps, step_size
        See `track_flows`.
    convergence_radius, min_size
        See `cluster_convergence`.
    group
        1, convex objects: tracking and clustering. 2, elongated objects: then clusters that touch
        are joined where their flows agree (a mean dot product above 0 over the contact), and
        `split_disconnected` follows. 3, thin objects: as 1, then every foreground voxel without
        a label takes that of the nearest labelled voxel, at any distance, of several nearest ones
        the smallest.
    interpolation, scale, backend
        See `track_flows`.

    Returns
    -------
    int32 ``[Z,Y,X]``: 0 background, 1..K by smallest convergence cell (group 2: by smallest
    cell, then by first voxel). NumPy for NumPy, lazy for
    dask: the same labels, whatever the chunks.

    Raises
    ------
    InvalidArgument, InvalidType, InvalidData
        The argument is named.

    Examples
    --------
    >>> mask = np.ones((1, 1, 8), bool)
    >>> flow = np.zeros((3, 1, 1, 8), np.float32)
    >>> flow[2, 0, 0] = [1, 0, -1, -1, 1, 1, 0, -1]
    >>> postprocess_single(mask, flow, convergence_radius=2.0, min_size=1)
    array([[[1, 1, 1, 1, 2, 2, 2, 2]]], dtype=int32)
    """
    settings = SegmentSettings(
        n_steps, step_size, convergence_radius, min_size, group, interpolation, backend
    )
    flow = check_inputs(sem_mask, flow, scale)
    if not (isinstance(sem_mask, da.Array) or isinstance(flow, da.Array)):
        coords, ends = track_flows(
            sem_mask, flow, n_steps, step_size, interpolation=interpolation, backend=backend
        )
        clusters = _cluster(coords, ends, np.shape(sem_mask), settings)
        return _in_group(clusters, np.asarray(sem_mask), np.asarray(flow), settings)
    mask, field = da.asarray(sem_mask), da.asarray(flow)
    grid = grid_of(mask, argument="sem_mask")
    cells = [
        delayed(_cells_of)(ends, grid.shape, settings)
        for ends in lazy_endpoints(mask, field, settings)
    ]
    resolved = delayed(resolve)(cells, grid, settings)
    source = Source.of(mask)
    painted = [
        delayed(_paint_chunk)(source.read(region), chunk, resolved)
        for region, chunk in zip(grid, cells, strict=True)
    ]
    return _in_group(assemble(painted, grid, dtype=np.int32), mask, field, settings)


def _in_group(clusters: Any, mask: Any, flow: Any, settings: SegmentSettings) -> Any:
    """What the group of the settings makes of the clusters; NumPy or dask."""
    if settings.group == 2:
        return split_disconnected(join_touching(clusters, flow))
    if settings.group == 3:
        return recover_orphans(mask, clusters)
    return clusters


def _cluster(
    coords: npt.NDArray[Any],
    ends: npt.NDArray[Any],
    shape: tuple[int, ...],
    settings: SegmentSettings,
) -> npt.NDArray[np.int32]:
    if coords.shape != ends.shape:
        allowed = f"that of fg_coords, {coords.shape}"
        do = "Pass the two arrays that track_flows gave."
        raise InvalidArgument("final_positions", f"shape {ends.shape}", allowed, do)
    if len(coords) and (coords.min() < 0 or (coords.max(axis=0) >= np.asarray(shape)).any()):
        came = f"voxels from {coords.min(axis=0).tolist()} to {coords.max(axis=0).tolist()}"
        do = "Pass the shape of the volume that the voxels are from."
        raise InvalidData("fg_coords", came, f"voxels of the volume {shape}", do)
    if not np.isfinite(ends).all():
        came = f"{(~np.isfinite(ends)).any(axis=1).sum()} positions that are NaN or infinite"
        do = "Track them again along a flow of finite numbers."
        raise InvalidData("final_positions", came, "finite numbers", do)
    table, index = kernels_for(settings.backend).cell_table(
        np.ascontiguousarray(ends, dtype=np.float64),
        shape=shape,
        radius=settings.convergence_radius,
    )
    _, of_cell = resolve([(table, index)], BlockGrid(shape, shape), settings)
    out = np.zeros(shape, dtype=np.int32)
    out[tuple(coords.T)] = of_cell.astype(np.int32)[index]
    return out


def cluster_convergence(
    fg_coords: Any,
    final_positions: Any,
    volume_shape: tuple[int, ...],
    convergence_radius: float,
    min_size: int,
    *,
    backend: str = "auto",
) -> Any:
    """Label voxels by where their particles ended.

    Cells have edge g = max(1, r/2); a position belongs to cell round(position/g) (half to even).
    Cells whose mean positions are closer than r are joined; the components are the instances,
    numbered by their smallest cell in C order.

    Parameters
    ----------
    fg_coords
        int ``[N,3]``, voxels; NumPy or dask, as `track_flows` gives them.
    final_positions
        float ``[N,3]``, where their particles ended.
    volume_shape
        Shape of the volume.
    convergence_radius
        r, in voxels.
    min_size
        Instances with fewer voxels become 0.
    backend
        See `track_flows`.

    Returns
    -------
    int32 ``[Z,Y,X]``; for dask input a lazy array of one chunk (`postprocess_single` keeps the
    chunks).

    Raises
    ------
    InvalidArgument, InvalidType
        The argument is named.

    Examples
    --------
    >>> coords = np.array([[0, 0, 0], [0, 0, 3]])
    >>> cluster_convergence(coords, coords.astype(float), (1, 1, 4), 4.0, 1)
    array([[[1, 0, 0, 1]]], dtype=int32)
    """
    settings = SegmentSettings(
        convergence_radius=convergence_radius, min_size=min_size, backend=backend
    )
    shape = as_lengths(volume_shape, argument="volume_shape", axes=3, least=1)
    for argument, table, kinds, names in (
        ("fg_coords", fg_coords, "iu", "integers"),
        ("final_positions", final_positions, "iuf", "real numbers"),
    ):
        check_array(table, argument=argument)
        do = "Pass the two arrays that track_flows gave."
        if len(table.shape) != 2 or table.shape[1] != 3:
            raise InvalidArgument(argument, f"shape {table.shape}", "a table [N, 3]", do)
        if table.dtype.kind not in kinds:
            raise InvalidType(argument, f"dtype {table.dtype}", names, do)
    if isinstance(fg_coords, da.Array) or isinstance(final_positions, da.Array):
        task = delayed(_cluster)(fg_coords, final_positions, shape, settings)
        labels: da.Array = da.from_delayed(task, shape, dtype=np.int32)
        return labels
    return _cluster(np.asarray(fg_coords), np.asarray(final_positions), shape, settings)
