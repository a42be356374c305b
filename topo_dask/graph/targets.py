"""What a network is trained on: flows and foreground of every class, maps of boundaries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.delayed import delayed
from scipy import ndimage

from topo_dask.classes import ClassMethod, class_methods
from topo_dask.config import FlowSettings, iterations, number
from topo_dask.graph.annotated import is_annotated
from topo_dask.graph.blocks import Source, assemble, grid_of
from topo_dask.graph.check import (
    check_labels,
    check_mask,
    check_not_negative,
    check_same_shape,
    checked_origin,
)
from topo_dask.graph.flows import generate_diffusion_flows, generate_direct_flows
from topo_dask.grid import Region

Float32 = npt.NDArray[np.float32]


def foreground_of_block(
    labels: npt.NDArray[Any],
    core: Region,
    reach: float | None,
    spatial_mask: npt.NDArray[Any] | None = None,
) -> Float32:
    """Where a class is trained on: its voxels, or those near annotated background.

    Parameters
    ----------
    labels
        ``[Z,Y,X]``, a block with at least ``reach`` voxels around it.
    core
        The block within the array.
    reach
        Euclidean distance to the nearest annotated background voxel, in voxels, that is still
        near; ``None`` for every voxel of the class.
    spatial_mask
        ``[Z,Y,X]``, 1 where annotated.

    Returns
    -------
    float32 of the core: 1 or 0

    Examples
    --------
    >>> line = np.array([[[0, 7, 7, 7, 7]]])
    >>> foreground_of_block(line, Region((0, 0, 0), line.shape), 2.0)
    array([[[0., 1., 1., 0., 0.]]], dtype=float32)
    """
    inside = labels != 0
    found: Float32 = inside[core.slices].astype(np.float32)
    if reach is None or not found.any():
        return found
    background = ~inside
    if spatial_mask is not None:
        background &= is_annotated(spatial_mask)
    if not background.any():
        return np.zeros_like(found)
    distance = ndimage.distance_transform_edt(~background)
    found[distance[core.slices] > reach] = 0
    return found


def boundary_of_block(labels: npt.NDArray[Any], core: Region, width: int) -> Float32:
    """`compute_boundary_map` in a core, from labels with ``width`` voxels around it."""
    edge = np.zeros(labels.shape, dtype=np.uint8)
    for axis in range(labels.ndim):
        along, found = np.moveaxis(labels, axis, 0), np.moveaxis(edge, axis, 0)
        meet = (along[:-1] != along[1:]) & (along[:-1] != 0) & (along[1:] != 0)
        found[:-1] |= meet
        found[1:] |= meet
    if width > 1 and edge.any():
        edge = ndimage.maximum_filter(edge, size=2 * width - 1, mode="constant")
    return edge[core.slices].astype(np.float32)


def _block_with_halo(
    labels: npt.NDArray[Any],
    spatial_mask: npt.NDArray[Any] | None,
    core: Region,
    function: Callable[..., Float32],
    setting: Any,
) -> Float32:
    """Task of the lazy graph: a block function on a slice with its halo."""
    check_not_negative(labels, argument="labels")
    if spatial_mask is None:
        return function(labels, core, setting)
    return function(labels, core, setting, spatial_mask)


def _by_blocks(
    labels: da.Array, function: Callable[..., Float32], setting: Any, halo: int, mask: Any = None
) -> da.Array:
    grid = grid_of(labels, argument="labels")
    source = Source.of(labels)
    masks = None if mask is None else Source.of(mask)
    task = delayed(_block_with_halo)
    blocks = []
    for core in grid:
        read = core.grow(halo, within=grid.shape)
        inner = core.relative_to(read.start)
        near = None if masks is None else masks.read(read)
        blocks.append(task(source.read(read), near, inner, function, setting))
    return assemble(blocks, grid, dtype=np.float32)


def memory_of_foreground(read: int, core: int, itemsize: int, reach: float | None) -> int:
    """Bytes that `foreground_of_block` takes at most."""
    if reach is None:
        return (itemsize + 1 + 4) * core
    # Of the distance transform: nearest voxels (three int32), float64 differences, distance.
    return (itemsize + 3 + 12 + 32) * read + 4 * core


def compute_boundary_map(instance_mask: Any, dilation_width: int = 2) -> Any:
    """Where instances touch: voxels with a 6-neighbour of another instance, dilated.

    Parameters
    ----------
    instance_mask
        ``[Z,Y,X]`` labels, any integer type, 0 is background; NumPy or dask.
    dilation_width
        How far from the contact the map is 1, in voxels, along axes and diagonals alike; 2 is
        the voxels of the contact and one more, 1 and 0 are those alone.

    Returns
    -------
    float32 ``[Z,Y,X]``, 1 or 0. NumPy for NumPy, lazy for dask; the same for any chunks.

    Raises
    ------
    InvalidArgument, InvalidType, InvalidData
        The argument is named.

    Examples
    --------
    >>> compute_boundary_map(np.array([[[4, 4, 4, 9, 9, 0]]]), dilation_width=1)[0, 0]
    array([0., 0., 1., 1., 0., 0.], dtype=float32)
    """
    check_labels(instance_mask, argument="instance_mask")
    text = "a whole number >= 0"
    number("dilation_width", dilation_width, lambda v: v >= 0, text, whole=True)
    width = int(dilation_width)
    if isinstance(instance_mask, da.Array):
        return _by_blocks(instance_mask, boundary_of_block, width, max(1, width))
    labels = np.asarray(instance_mask)
    return boundary_of_block(labels, Region((0, 0, 0), labels.shape), width)


def compute_foreground(labels: Any, reach: float | None, spatial_mask: Any = None) -> Any:
    """Foreground to train a class on, of a NumPy array or lazily; see `foreground_of_block`."""
    if isinstance(labels, da.Array):
        halo = 0 if reach is None else math.floor(reach)
        mask = spatial_mask if halo else None
        return _by_blocks(labels, foreground_of_block, reach, halo, mask)
    return foreground_of_block(labels, Region((0, 0, 0), labels.shape), reach, spatial_mask)


def compute_flow_targets(
    instance_ids: Any,
    class_names: Any = None,
    class_config: Any = None,
    resolution_nm: float | None = None,
    diffusion_iters: int = 200,
    adaptive_iters: bool = True,
    adaptive_factor: float = 6,
    spatial_mask: Any = None,
    *,
    origin: tuple[int, ...] = (0, 0, 0),
    context: Any = "auto",
    tolerance: float = 1e-4,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    acceleration: str = "none",
    backend: str = "auto",
) -> tuple[Any, Any]:
    """Flows and foreground of every class, to train a network on.

    Parameters
    ----------
    instance_ids
        ``[C,Z,Y,X]`` labels of C classes, any integer type, 0 is background; NumPy or dask.
    class_names
        C names; without them the stack is of `EVALUATED_INSTANCE_CLASSES`.
    class_config
        How the targets of each class are made: a dict or the path of a YAML file, for each class
        ``flow_type`` ("direct" or "diffusion"), ``diffusion_iters``, ``potential``,
        ``boundary_only``, ``boundary_width``, ``group``; what it does not say is as in
        `topo_dask.classes.ClassFlows`.
    resolution_nm
        Edge of a voxel in nm: classes that ``class_config`` lacks take the defaults for it.
    diffusion_iters
        Most iterations of an instance, for classes that do not say.
    adaptive_iters, adaptive_factor
        See `generate_diffusion_flows`.
    spatial_mask
        ``[Z,Y,X]``, 1 where annotated, for all classes.
    origin, context, tolerance, spacing, acceleration, backend
        See `generate_diffusion_flows`.

    Returns
    -------
    flows
        float32 ``[3C,Z,Y,X]``: ``(dz,dy,dx)`` of the first class, of the second, ...
    class_fg
        float32 ``[C,Z,Y,X]``: 1 where the class is to be trained on. Of ``boundary_only`` classes
        those voxels whose distance to annotated background is at most ``boundary_width``.

        NumPy for NumPy, lazy for dask.

    Raises
    ------
    InvalidArgument, InvalidType, InvalidData, InputNotFound
        The argument is named; of a configuration the class and the key.

    Examples
    --------
    >>> stack = np.array([[[[0, 5, 5, 5]]], [[[1, 1, 0, 0]]]])
    >>> flows, class_fg = compute_flow_targets(stack, ["nuc", "ves"], resolution_nm=8)
    >>> flows[2, 0, 0], class_fg[1, 0, 0]
    (array([ 0.,  1.,  0., -1.], dtype=float32), array([1., 1., 0., 0.], dtype=float32))
    """
    check_labels(instance_ids, argument="instance_ids", axes=4)
    count, *lengths = (int(n) for n in instance_ids.shape)
    iterations("diffusion_iters", diffusion_iters, default=200)
    others = FlowSettings(
        n_iter=diffusion_iters,
        adaptive_iters=adaptive_iters,
        adaptive_factor=adaptive_factor,
        context=context,
        tolerance=tolerance,
        spacing=spacing,
        acceleration=acceleration,
        backend=backend,
    )
    start = checked_origin(origin)
    methods = class_methods(class_names, count, class_config, resolution_nm, others)
    if spatial_mask is not None:
        check_mask(spatial_mask, argument="spatial_mask")
        check_same_shape(
            spatial_mask.shape, lengths, argument="spatial_mask", of="a class of instance_ids"
        )
    lazy = isinstance(instance_ids, da.Array)
    if spatial_mask is not None:
        spatial_mask = da.asarray(spatial_mask) if lazy else np.asarray(spatial_mask)
    if lazy:
        made = [
            (
                _class_flows(instance_ids[c], method, spatial_mask, start),
                compute_foreground(instance_ids[c], method.reach, spatial_mask),
            )
            for c, method in enumerate(methods)
        ]
        return da.concatenate([f for f, _ in made]), da.stack([fg for _, fg in made])
    flows = np.zeros((3 * count, *lengths), dtype=np.float32)
    class_fg = np.zeros((count, *lengths), dtype=np.float32)
    for c, method in enumerate(methods):
        labels = np.asarray(instance_ids[c])
        flows[3 * c : 3 * c + 3] = _class_flows(labels, method, spatial_mask, start)
        class_fg[c] = compute_foreground(labels, method.reach, spatial_mask)
    return flows, class_fg


def _class_flows(labels: Any, method: ClassMethod, mask: Any, origin: tuple[int, ...]) -> Any:
    settings = method.settings
    if settings.method == "direct":
        return generate_direct_flows(
            labels, mask, spacing=settings.spacing, backend=settings.backend
        )
    return generate_diffusion_flows(
        labels,
        settings.n_iter,
        settings.adaptive_iters,
        settings.adaptive_factor,
        mask,
        potential=settings.potential,
        origin=origin,
        context=settings.context,
        tolerance=settings.tolerance,
        spacing=settings.spacing,
        acceleration=settings.acceleration,
        backend=settings.backend,
    )
