"""The kernels on a GPU, for arrays of any size: what does not fit is computed in parts.

Every kernel tries the whole first. Parts are halves, and halves of these where they do not fit
either: of the particles, of the flow (particles are handed from one part to the other), of the
voxels. The answer is that of the whole, to the bit. What cannot be halved any more is computed by
the processor, and noted as that.

The flow of diffusion alone is not here: it reads a context, which those know who ask for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from topo_dask.kernels import cpu
from topo_dask.kernels.computed import PROCESSOR, note, whole_or
from topo_dask.kernels.cpu.labels import Integers
from topo_dask.kernels.gpu import cells, diffusion, direct, poisson, tracking
from topo_dask.kernels.gpu.arrays import in_memory
from topo_dask.kernels.tables import CellTable, ErrorTable, merge_cells, merge_errors

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

FEWEST = 2048
"""Particles or voxels that are not worth a way to the device by themselves."""


SHORTEST = 8
"""Longest side of a block of diffusing voxels that is not halved any more."""


def _or_processor(on_device: Kernel, on_processor: Kernel) -> Kernel:
    """A kernel of the device, or the processor's where that cannot be done in parts."""

    @wraps(on_device)
    def kernel(*arguments: Any, **options: Any) -> Any:
        def elsewhere() -> Any:
            note(PROCESSOR)
            return on_processor(*arguments, **options)

        return whole_or(elsewhere, lambda: on_device(*arguments, **options))

    return cast(Kernel, kernel)


# An instance is solved whole, whatever part of it is wanted.
poisson_flow = _or_processor(poisson.poisson_flow, cpu.poisson_flow)
poisson_potential = _or_processor(poisson.poisson_potential, cpu.poisson_potential)
flow_of_potential = _or_processor(poisson.flow_of_potential, cpu.flow_of_potential)


# ------------------------------------------------------------------------------------ tracking


def interleave(flow: npt.NDArray[Any], *, threads: int = 1) -> Any:
    """See `topo_dask.kernels.gpu.tracking`; what does not fit stays in memory."""
    return whole_or(
        lambda: cpu.interleave(flow, threads=threads), lambda: tracking.interleave(flow)
    )


def track(
    flow: Any,
    positions: npt.NDArray[np.float64],
    steps_left: npt.NDArray[np.int32],
    *,
    origin: tuple[int, ...],
    shape: tuple[int, ...],
    step_size: float,
    interpolation: str = "nearest",
    threads: int = 1,
) -> None:
    """See `topo_dask.kernels.gpu.tracking`."""
    how: dict[str, Any] = {"shape": shape, "step_size": step_size, "interpolation": interpolation}

    def parts() -> None:
        if len(positions) > FEWEST and 28 * len(positions) > flow.nbytes / 8:
            middle = len(positions) // 2
            for some in (slice(None, middle), slice(middle, None)):
                track(flow, positions[some], steps_left[some], origin=origin, **how)
        elif isinstance(flow, np.ndarray) and flow.size > 4 * FEWEST:
            _track_halves(flow, positions, steps_left, origin, how)
        else:
            note(PROCESSOR)
            cpu.track(in_memory(flow), positions, steps_left, origin=origin, **how)

    whole_or(parts, lambda: tracking.track(flow, positions, steps_left, origin=origin, **how))


def _track_halves(
    flow: npt.NDArray[np.float32],
    positions: npt.NDArray[np.float64],
    steps_left: npt.NDArray[np.int32],
    origin: tuple[int, ...],
    how: dict[str, Any],
) -> None:
    """Track through one half of the flow and the other, until no particle goes on in either."""
    axis = int(np.argmax(flow.shape[:3]))
    length = flow.shape[axis]
    both = how["interpolation"] == "linear"  # a step needs the next voxel too
    halves = (0, length // 2 + both), (length // 2, length)
    going_on = True
    while going_on:
        going_on = False
        for first, end in halves:
            at = positions[:, axis] - origin[axis]
            rows = np.flatnonzero((steps_left > 0) & (at >= first) & (at < end))
            if not rows.size:
                continue
            there, left = positions[rows], steps_left[rows]
            part = np.ascontiguousarray(flow.take(np.arange(first, end), axis=axis))
            start = tuple(o + first * (a == axis) for a, o in enumerate(origin))
            track(part, there, left, origin=start, **how)
            going_on |= bool((left < steps_left[rows]).any())
            positions[rows], steps_left[rows] = there, left


def track_voxels(
    flow: Any,
    mask: npt.NDArray[Any],
    *,
    start: tuple[int, ...],
    n_steps: int,
    origin: tuple[int, ...],
    shape: tuple[int, ...],
    step_size: float,
    interpolation: str = "nearest",
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    """See `topo_dask.kernels.gpu.tracking`."""
    how: dict[str, Any] = {
        "origin": origin,
        "shape": shape,
        "step_size": step_size,
        "interpolation": interpolation,
    }

    def parts() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]:
        ends = cpu.foreground_voxels(mask, origin=start)
        steps_left = np.full(len(ends), n_steps, dtype=np.int32)
        track(flow, ends, steps_left, **how)
        return ends, steps_left

    return whole_or(
        parts, lambda: tracking.track_voxels(flow, mask, start=start, n_steps=n_steps, **how)
    )


# --------------------------------------------------------------------------------------- cells


def cell_table(
    positions: npt.NDArray[np.float64], *, shape: tuple[int, ...], radius: float
) -> tuple[CellTable, npt.NDArray[np.int64]]:
    """See `topo_dask.kernels.gpu.cells`."""

    def parts() -> tuple[CellTable, npt.NDArray[np.int64]]:
        if len(positions) <= FEWEST:
            note(PROCESSOR)
            return cpu.cell_table(positions, shape=shape, radius=radius)
        middle = len(positions) // 2
        halves = [cell_table(p, shape=shape, radius=radius) for p in np.split(positions, [middle])]
        table = merge_cells([part for part, _ in halves])
        places = [np.searchsorted(table.cells, part.cells)[index] for part, index in halves]
        return table, np.concatenate(places).astype(np.int64, copy=False)

    return whole_or(parts, lambda: cells.cell_table(positions, shape=shape, radius=radius))


# ---------------------------------------------------------------------------------------- direct


def _halves(labels: Integers, origin: tuple[int, ...]) -> list[tuple[tuple[slice, ...], Any]]:
    """Two halves of an array, and where each begins."""
    axis = int(np.argmax(labels.shape))
    middle = labels.shape[axis] // 2
    parts = []
    for first, end in ((0, middle), (middle, labels.shape[axis])):
        here = [slice(None)] * 3
        here[axis] = slice(first, end)
        start = tuple(o + first * (a == axis) for a, o in enumerate(origin))
        parts.append((tuple(here), start))
    return parts


def direct_flow(
    labels: Integers,
    *,
    ids: npt.NDArray[np.uint64],
    centres: npt.NDArray[np.float64],
    origin: tuple[int, ...] = (0, 0, 0),
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
) -> npt.NDArray[np.float32]:
    """See `topo_dask.kernels.gpu.direct`."""
    how: dict[str, Any] = {"ids": ids, "centres": centres, "spacing": spacing}

    def parts() -> npt.NDArray[np.float32]:
        if labels.size <= FEWEST:
            note(PROCESSOR)
            return cpu.direct_flow(labels, origin=origin, **how)
        flow = np.empty((3, *labels.shape), dtype=np.float32)
        for here, start in _halves(labels, origin):
            flow[(slice(None), *here)] = direct_flow(labels[here], origin=start, **how)
        return flow

    return whole_or(parts, lambda: direct.direct_flow(labels, origin=origin, **how))


def flow_errors(
    labels: Integers,
    flow4: Any,
    *,
    ids: npt.NDArray[np.uint64],
    centres: npt.NDArray[np.float64],
    origin: tuple[int, ...] = (0, 0, 0),
) -> ErrorTable:
    """See `topo_dask.kernels.gpu.direct`."""
    how: dict[str, Any] = {"ids": ids, "centres": centres}

    def parts() -> ErrorTable:
        if labels.size <= FEWEST:
            note(PROCESSOR)
            return cpu.flow_errors(labels, in_memory(flow4), origin=origin, **how)
        return merge_errors(
            [
                flow_errors(labels[here], flow4[here], origin=start, **how)
                for here, start in _halves(labels, origin)
            ]
        )

    return whole_or(parts, lambda: direct.flow_errors(labels, flow4, origin=origin, **how))


# ------------------------------------------------------------------------------------- diffusion


def diffusion_round(
    labels: Integers,
    fields: list[npt.NDArray[Any]] | None,
    *,
    span: cpu.Span,
    ids: npt.NDArray[np.uint64],
    iterations: npt.NDArray[np.int64],
    anchors: npt.NDArray[np.int64],
    origin: tuple[int, ...] = (0, 0, 0),
    core: tuple[slice, ...] | None = None,
    spatial_mask: npt.NDArray[Any] | None = None,
    potential: str = "coordinate",
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
    threads: int = 1,
) -> tuple[list[npt.NDArray[Any]], npt.NDArray[np.float32]]:
    """See `topo_dask.kernels.gpu.diffusion`; halves of the core see as far as the round goes."""
    how: dict[str, Any] = {"span": span, "potential": potential, "spacing": spacing}
    inner = core or tuple(slice(0, n) for n in labels.shape)
    lengths = [part.stop - part.start for part in inner]
    axis = int(np.argmax(lengths))

    def whole() -> tuple[list[npt.NDArray[Any]], npt.NDArray[np.float32]]:
        facts = {"ids": ids, "iterations": iterations, "anchors": anchors}
        place = {"origin": origin, "core": core, "spatial_mask": spatial_mask}
        return diffusion.diffusion_round(labels, fields, **facts, **place, **how)  # type: ignore[arg-type]

    def half(first: int, end: int) -> tuple[list[npt.NDArray[Any]], npt.NDArray[np.float32]]:
        width = span.end - span.first + 1  # one for the differences
        seen = [slice(None)] * 3
        seen[axis] = slice(max(0, first - width), min(labels.shape[axis], end + width))
        there, begin = tuple(seen), seen[axis].start
        rows = cpu.rows_of(cpu.compact(labels[there])[1], ids)
        inside = list(inner)
        inside[axis] = slice(first - begin, end - begin)
        return diffusion_round(
            labels[there],
            None if fields is None else [np.ascontiguousarray(f[there]) for f in fields],
            ids=ids[rows],
            iterations=iterations[rows],
            anchors=anchors[rows],
            origin=tuple(o + begin * (a == axis) for a, o in enumerate(origin)),
            core=tuple(inside),
            spatial_mask=None if spatial_mask is None else spatial_mask[there],
            **how,
        )

    def parts() -> tuple[list[npt.NDArray[Any]], npt.NDArray[np.float32]]:
        first, end = inner[axis].start, inner[axis].stop
        if end - first < SHORTEST:
            note(PROCESSOR)
            facts = {"ids": ids, "iterations": iterations, "anchors": anchors}
            place = {"origin": origin, "core": core, "spatial_mask": spatial_mask}
            return cpu.diffusion_round(labels, fields, **facts, **place, **how)  # type: ignore[arg-type]
        middle = (first + end) // 2
        low, high = half(first, middle), half(middle, end)
        made = [np.concatenate(two, axis=axis) for two in zip(low[0], high[0], strict=True)]
        return made, np.concatenate((low[1], high[1]), axis=axis + 1)

    return whole_or(parts, whole)
