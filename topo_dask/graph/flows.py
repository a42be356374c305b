"""Flows of labels: of a block with its context, of a NumPy array, of a dask array."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.delayed import Delayed, delayed

from topo_dask.config import FlowSettings
from topo_dask.errors import InvalidArgument, InvalidType
from topo_dask.graph.acceleration import applies, most_sweeps, shares_of
from topo_dask.graph.annotated import lazily_pointed
from topo_dask.graph.blocks import Source, assemble, grid_of
from topo_dask.graph.check import check_labels, check_mask, check_same_shape, checked_origin
from topo_dask.graph.context import anchors_of, automatic_width, context_region, iterations_of
from topo_dask.graph.context_or_rounds import most_in_rounds
from topo_dask.graph.fuse import Tiling, tiling_of
from topo_dask.graph.instances import instance_table
from topo_dask.graph.parts import halves, joined
from topo_dask.grid import Region, as_lengths
from topo_dask.kernels import cpu
from topo_dask.kernels.backends import kernels_for
from topo_dask.kernels.computed import whole_or
from topo_dask.kernels.cpu.filled import filled_flow
from topo_dask.kernels.cpu.sweep import LEAST_MEMORY
from topo_dask.kernels.parallel import available_cores
from topo_dask.kernels.tables import InstanceTable


@dataclass(frozen=True)
class Piece:
    """A part of the volume to compute: its core, what is read for it, and the whole volume."""

    core: Region
    read: Region
    volume: Region


def rows_in(table: InstanceTable, ids: npt.NDArray[np.uint64]) -> InstanceTable:
    """The rows of a table with these ids (ascending)."""
    return table.take(cpu.rows_of(ids, table.ids))


def flow_of_block(
    labels: npt.NDArray[Any],
    piece: Piece,
    *,
    table: InstanceTable,
    settings: FlowSettings,
    spatial_mask: npt.NDArray[Any] | None = None,
    threads: int = 1,
) -> npt.NDArray[np.float32]:
    """Flow in the core of a piece.

    Parameters
    ----------
    labels
        Of ``piece.read``.
    piece
        Where it lies.
    table
        Facts of the whole instances, at least of all that occur in ``labels``.
    settings
        The method.
    spatial_mask
        Of ``piece.read``; 1 where annotated.
    threads
        Threads to use.

    Returns
    -------
    float32 ``[3, *core shape]``; where the memory of a GPU is too small, from halves of the core.
    """
    how: dict[str, Any] = {"spatial_mask": spatial_mask, "threads": threads}

    def parts() -> npt.NDArray[np.float32]:
        small = halves(piece.core)
        if not small or settings.potential == "poisson":  # which sees the whole in any part
            on_processor = replace(settings, backend="cpu")
            return _flow_of_piece(labels, piece, table=table, settings=on_processor, **how)
        return joined(piece.core, small, flow_of_half)

    def flow_of_half(core: Region) -> npt.NDArray[np.float32]:
        seen = labels[core.relative_to(piece.read.start).slices]
        near = choose_read(seen, core, table=table, settings=settings, volume=piece.volume)
        near = near.intersect(piece.read)
        place = near.relative_to(piece.read.start).slices
        mask = None if spatial_mask is None else spatial_mask[place]
        rows = rows_in(table, cpu.compact(labels[place])[1])
        half = Piece(core, near, piece.volume)
        return flow_of_block(
            labels[place], half, table=rows, settings=settings, spatial_mask=mask, threads=threads
        )

    return whole_or(
        parts, lambda: _flow_of_piece(labels, piece, table=table, settings=settings, **how)
    )


def _flow_of_piece(
    labels: npt.NDArray[Any],
    piece: Piece,
    *,
    table: InstanceTable,
    settings: FlowSettings,
    spatial_mask: npt.NDArray[Any] | None,
    threads: int,
) -> npt.NDArray[np.float32]:
    """Flow of a piece at once."""
    core = piece.core.relative_to(piece.read.start).slices
    if settings.method == "diffusion" and settings.potential != "poisson":
        return _diffused(labels, piece, table, settings, spatial_mask, threads)
    kernels = kernels_for(settings.backend)
    if settings.method == "direct":
        return kernels.direct_flow(
            labels[core],
            ids=table.ids,
            centres=table.centres,
            origin=piece.core.start,
            spacing=settings.spacing,
        )
    return kernels.poisson_flow(
        labels, core=core, spatial_mask=spatial_mask, spacing=settings.spacing, threads=threads
    )


def fills_volume(table: InstanceTable, settings: FlowSettings, volume: Region) -> bool:
    """Whether a coordinate diffuses in a single instance without any wall: see `filled_flow`."""
    if settings.method != "diffusion" or settings.potential != "coordinate" or len(table) != 1:
        return False
    box = tuple(table.lo[0].tolist()), tuple(table.hi[0].tolist())
    return box == (volume.start, volume.stop) and int(table.voxels[0]) == volume.size


def _all_of(labels: npt.NDArray[Any], number: np.uint64) -> bool:
    return bool((labels == number.astype(labels.dtype)).all())


def _diffused(
    labels: npt.NDArray[Any],
    piece: Piece,
    table: InstanceTable,
    settings: FlowSettings,
    spatial_mask: npt.NDArray[Any] | None,
    threads: int,
) -> npt.NDArray[np.float32]:
    """Flow by diffusion; what is not accelerated has the bits that it has without.

    Where anything may be, all is the processor's, so that bits do not depend on the block.
    """
    if fills_volume(table, settings, piece.volume) and _all_of(labels, table.ids[0]):
        return filled_flow(
            piece.volume.shape,
            int(iterations_of(table, settings, volume=piece.volume)[0]),
            spacing=settings.spacing,
            core=piece.core.relative_to(piece.volume.start).slices,
        )
    kernels = kernels_for("cpu" if applies(settings) else settings.backend)
    iterations = iterations_of(table, settings, volume=piece.volume)
    shares = shares_of(table, iterations, settings)
    fast = shares.fast
    common: dict[str, Any] = {
        "ids": table.ids,
        "origin": piece.read.start,
        "core": piece.core.relative_to(piece.read.start).slices,
        "spatial_mask": spatial_mask,
        "spacing": settings.spacing,
        "threads": threads,
    }

    def plain(iterations: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return kernels.diffusion_flow(
            labels,
            iterations=iterations,
            anchors=anchors_of(table),
            potential=settings.potential,
            **common,
        )

    if not fast.any():
        return plain(iterations)
    flow = kernels.chebyshev_flow(
        labels,
        iterations=np.where(fast, iterations, -1),
        powers=shares.powers,
        tail_bits=shares.tail_bits,
        **common,
    )
    if not fast.all():
        slow = plain(np.where(fast, -1, iterations))
        np.copyto(flow, slow, where=slow != 0)
    return flow


def choose_read(
    core_labels: npt.NDArray[Any],
    core: Region,
    *,
    table: InstanceTable,
    settings: FlowSettings,
    volume: Region,
) -> Region:
    """What has to be read for the flow of a core, from the instances that enter it."""
    if settings.method == "direct":
        return core
    if settings.potential == "poisson":
        return volume
    inside = rows_in(table, cpu.compact(core_labels)[1])
    if fills_volume(inside, settings, volume):
        return core
    iterations = iterations_of(inside, settings, volume=volume)
    return context_region(core, inside, iterations, settings, volume)


def memory_of_flow(
    core: int, read: int, itemsize: int, settings: FlowSettings, *, masked: bool = False
) -> int:
    """Bytes that `flow_of_block` and what it is given take at most.

    Parameters
    ----------
    core, read
        Voxels of the block, and of what is read for it.
    itemsize
        Of a label.
    settings
        The method.
    masked
        Whether there is a spatial mask.
    """
    if settings.method == "direct":
        return (itemsize + 28) * core  # small numbers, the flow, its chunks
    # Labels, consecutive numbers, links, runs; a mask, what of it is annotated, walls.
    layout = (itemsize + 4 + 1 + RUN_BYTES + (10 if masked else 0)) * read
    if settings.potential == "poisson":
        # The field, the voxels of one instance that fills the block, and its levels.
        return layout + 8 * read + POISSON_BYTES * read + 12 * core
    fields = max(2 * read, LEAST_MEMORY)  # a field moves through twice its length
    if settings.potential == "heat":  # pieces, to scale them
        far = settings.n_iter > most_in_rounds(settings)
        return layout + 8 * fields + (8 if far else 0) * read + 12 * core
    # The indicator in float64 and three coordinates.
    plain = FIELD_BYTES * fields + 12 * core
    if not applies(settings):
        return layout + plain
    # Five float64 fields and a number a voxel, and an eighth more for the rows between planes; then
    # what is plain, beside the flow so far.
    return layout + max(50 * read + 12 * core, plain + 12 * core)


RUN_BYTES = 2
"""Bytes a voxel of the runs that begin late, where runs are of eight voxels on average."""

FIELD_BYTES = 20
"""Bytes a voxel of the fields of the coordinate potential."""

POISSON_BYTES = 140
"""Bytes a voxel of the linear system of an instance, its coarser levels included: its links take
24, eight vectors 64, half as much what is numbered and coarser. Measured in a soma: 117."""


def check_blocks(settings: FlowSettings, count: int) -> None:
    """Raise InvalidArgument if a potential that no context makes exact is cut into chunks."""
    if settings.method == "diffusion" and settings.potential == "poisson" and count > 1:
        raise InvalidArgument(
            "potential",
            f"'poisson' for a dask array in {count} chunks",
            "one chunk: each instance is solved whole",
            "Pass it to topo_dask.flows(labels, output, potential='poisson'), which solves in "
            "blocks on disk; or rechunk it to one chunk, or choose 'heat'.",
        )


def generate_diffusion_flows(
    instance_mask: Any,
    n_iter: int = 200,
    adaptive_iters: bool = True,
    adaptive_factor: float = 6,
    spatial_mask: Any = None,
    *,
    potential: str = "coordinate",
    origin: tuple[int, ...] = (0, 0, 0),
    volume_shape: tuple[int, ...] | None = None,
    instances: InstanceTable | None = None,
    overlap: Any = 0,
    context: Any = "auto",
    tolerance: float = 1e-4,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    acceleration: str = "none",
    backend: str = "auto",
) -> Any:
    """Flows of instances of any form, by heat diffusion inside each.

    Three fields per instance start as the voxels' global coordinates; n times each value becomes
    the mean of its six neighbours, 0 outside the instance, itself beyond a face of the volume.
    The flow is the unit vector of (du_z/dz, du_y/dy, du_x/dx).

    Parameters
    ----------
    instance_mask
        ``[Z,Y,X]`` labels, any integer type, 0 is background; NumPy or dask.
    n_iter
        Most iterations of an instance.
    adaptive_iters, adaptive_factor
        Whether an instance gets no more than ``adaptive_factor`` times its longest side
        (of its bounding box grown by 2 voxels).
    spatial_mask
        ``[Z,Y,X]``, 1 where annotated: nothing flows across the border of the annotated region.
    potential
        "coordinate"; or "heat", one field that starts as 1, the same wherever the object lies; or
        "poisson", the solution of div grad u = -1, as exact after any distance, which goes by no
        number of iterations.
    origin
        Global index of the first voxel of a tile: the coordinate potential depends on it.
    volume_shape
        Shape of the whole volume that the tile is from.
    instances
        `instance_table` of that volume, without which a tile cannot know the whole extent.
    overlap
        For dask arrays: voxels that neighbouring chunks share and blend with cosine weights; at
        most the shortest chunk. A NumPy array is one tile.
    context, tolerance
        For dask arrays: voxels computed around each chunk and thrown away; "auto" keeps every
        component within ``tolerance`` of the whole volume's, ``n_iter`` is exact to the bit. For
        many iterations that is much more than a chunk: `topo_dask.flows` takes dask arrays too,
        and makes rounds on disk in its place where they cost less.
    spacing
        Distance of voxels along z, y, x, in any unit: flows are unit vectors in it. The mean of
        the neighbours then weights those along an axis of distance s by 1/s^2. Iterations and
        contexts go on counting voxels. Only ratios matter.
    acceleration
        "chebyshev" takes some sqrt(n) sweeps in the place of n iterations of the coordinate
        potential, and keeps every component within ``tolerance`` of what they give; instances that
        gain nothing by it (n below some 300; more where coordinates are beyond 10^4) go without.
        "auto" is the same, but leaves other potentials alone. It runs on the processor.
    backend
        What computes: "cpu", "gpu", or "auto", a GPU where there is one. Flows of the two agree
        to 1e-4, as those of different blocks do.

    Returns
    -------
    float32 ``[3,Z,Y,X]``, ``(dz,dy,dx)``: unit vectors inside instances, 0 outside. NumPy for
    NumPy, lazy for dask.

    Raises
    ------
    InvalidArgument, InvalidType, InvalidData
        The argument is named.
    BackendUnavailable
        There is no GPU, with ``backend="gpu"``; for dask arrays while computing.

    Notes
    -----
    Source: the iteration is that of the topo package; Cellpose (Stringer et al., 2021) uses a
    heat source in the middle instead.

    Examples
    --------
    >>> generate_diffusion_flows(np.array([[[0, 5, 5, 5, 0]]]), potential="heat")[2, 0, 0]
    array([ 0.,  1.,  0., -1.,  0.], dtype=float32)
    """
    check_labels(instance_mask, argument="instance_mask")
    settings = FlowSettings(
        "diffusion",
        potential,
        n_iter,
        adaptive_iters,
        adaptive_factor,
        context,
        tolerance,
        spacing=spacing,
        acceleration=acceleration,
        backend=backend,
    )
    start = checked_origin(origin)
    shape = tuple(int(n) for n in instance_mask.shape)
    if spatial_mask is not None:
        check_mask(spatial_mask, argument="spatial_mask")
        check_same_shape(spatial_mask.shape, shape, argument="spatial_mask", of="instance_mask")
    _check_table(instances, lazy=isinstance(instance_mask, da.Array))
    here = Region(start, tuple(a + n for a, n in zip(start, shape, strict=True)))
    volume = here if volume_shape is None else _volume_around(here, volume_shape)
    if isinstance(instance_mask, da.Array):
        tiling = tiling_of(grid_of(instance_mask, argument="instance_mask"), overlap)
        return _lazy_flows(instance_mask, settings, tiling, (here, volume), instances, spatial_mask)
    as_lengths(overlap, argument="overlap", axes=3, least=0)
    labels = np.asarray(instance_mask)
    mask = None if spatial_mask is None else np.asarray(spatial_mask)
    piece = Piece(here, here, volume)
    table = instances if instances is not None else instance_table(labels).moved(start)
    return flow_of_block(
        labels, piece, table=table, settings=settings, spatial_mask=mask, threads=available_cores()
    )


def _check_table(instances: Any, *, lazy: bool) -> None:
    """Raise InvalidType unless it is a table, or one that is still to be computed."""
    known = (InstanceTable, Delayed) if lazy else InstanceTable
    if instances is not None and not isinstance(instances, known):
        raise InvalidType(
            "instances",
            f"an object of type {type(instances).__name__}",
            "an InstanceTable",
            "Pass topo_dask.instance_table(labels) of the whole volume, or a file of it by "
            "topo_dask.read_instance_table.",
        )


def _volume_around(here: Region, volume_shape: Any) -> Region:
    shape = as_lengths(volume_shape, argument="volume_shape", axes=3, least=1)
    if any(b > n for b, n in zip(here.stop, shape, strict=True)):
        raise InvalidArgument(
            "volume_shape", shape, f"a volume that holds the tile {here}", "Check the origin."
        )
    return Region((0, 0, 0), shape)


def _flow_of_region(
    labels: npt.NDArray[Any],
    spatial_mask: npt.NDArray[Any] | None,
    table: InstanceTable,
    piece: Piece,
    settings: FlowSettings,
) -> npt.NDArray[np.float32]:
    """Task of the lazy graph: the flow of a chunk from a slice with its context."""
    return flow_of_block(labels, piece, table=table, settings=settings, spatial_mask=spatial_mask)


def _blended(
    core: Region, tiling: Tiling, flows: dict[int, npt.NDArray[np.float32]]
) -> npt.NDArray[np.float32]:
    """Task of the lazy graph: the flow of a chunk from those of the tiles that reach it."""
    return tiling.blended(core, flows.__getitem__)


def _lazy_flows(
    labels: da.Array,
    settings: FlowSettings,
    tiling: Tiling,
    place: tuple[Region, Region],
    instances: InstanceTable | None,
    spatial_mask: Any,
) -> da.Array:
    """Flows of a dask array; ``place``: where it lies, and the whole volume."""
    grid, (here, volume) = tiling.grid, place
    check_blocks(settings, len(grid))
    # A given table is in the graph once, not once a block.
    known = delayed(instances) if instances is not None else None
    table = instance_table(labels).moved(here.start) if known is None else known
    width = settings.context
    if width == "auto":
        width = automatic_width(int(settings.n_iter), settings, max(volume.stop))
        width = min(width, most_sweeps(int(settings.n_iter), max(volume.stop), settings))
    if settings.method == "direct":
        width = -1
    source = Source.of(labels)
    masks = None if spatial_mask is None else Source.of(da.asarray(spatial_mask))
    if settings.method == "direct" and masks is not None:
        table, masks = lazily_pointed(source, masks, table, grid), None
    task = delayed(_flow_of_region)
    flows = []
    for tile in map(tiling.tile, range(len(grid))):
        read = tile.grow(int(width) + 1, within=grid.shape)
        piece = Piece(_moved(tile, here), _moved(read, here), volume)
        mask = None if masks is None else masks.read(read)
        flows.append(task(source.read(read), mask, table, piece, settings))
    if tiling:
        blend = delayed(_blended)
        flows = [blend(core, tiling, {n: flows[n] for n in tiling.reaching(core)}) for core in grid]
    return assemble(flows, grid, dtype=np.float32, leading=(3,))


def _moved(region: Region, here: Region) -> Region:
    return region.relative_to(tuple(-a for a in here.start))


def generate_direct_flows(
    instance_mask: Any,
    spatial_mask: Any = None,
    *,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    backend: str = "auto",
) -> Any:
    """Flows of convex instances: unit vectors to the centre of mass of the whole instance.

    Parameters
    ----------
    instance_mask
        ``[Z,Y,X]`` labels, any integer type, 0 is background; NumPy or dask.
    spatial_mask
        ``[Z,Y,X]``, 1 where annotated. An instance that touches unannotated voxels points to
        the deepest voxel of its mask instead.
    spacing
        Distance of voxels along z, y, x, in any unit: flows are unit vectors in it.
    backend
        See `generate_diffusion_flows`.

    Returns
    -------
    float32 ``[3,Z,Y,X]``, ``(dz,dy,dx)``; the voxel nearest the centre, if inside, gets 0.

    Raises
    ------
    InvalidArgument, InvalidType, InvalidData
        The argument is named.

    Examples
    --------
    >>> generate_direct_flows(np.array([[[5, 5, 5]]]))[2, 0, 0]
    array([ 1.,  0., -1.], dtype=float32)
    """
    check_labels(instance_mask, argument="instance_mask")
    settings = FlowSettings("direct", spacing=spacing, backend=backend)
    if spatial_mask is not None:
        check_mask(spatial_mask, argument="spatial_mask")
        check_same_shape(
            spatial_mask.shape, instance_mask.shape, argument="spatial_mask", of="instance_mask"
        )
    here = Region((0, 0, 0), tuple(int(n) for n in instance_mask.shape))
    if isinstance(instance_mask, da.Array):
        tiling = tiling_of(grid_of(instance_mask, argument="instance_mask"), 0)
        return _lazy_flows(instance_mask, settings, tiling, (here, here), None, spatial_mask)
    labels = np.asarray(instance_mask)
    mask = None if spatial_mask is None else np.asarray(spatial_mask)
    ids, centres = cpu.direct_centres(labels, spatial_mask=mask)
    direct_flow = kernels_for(backend).direct_flow
    return direct_flow(labels, ids=ids, centres=centres, spacing=settings.spacing)
