"""Diffusion flows: coordinates or heat spread inside every instance, and the direction they rise.

All instances of an array go through the same sweeps, see `sweep.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.kernels.cpu.gradient import point
from topo_dask.kernels.cpu.heat import HOT, spread
from topo_dask.kernels.cpu.labels import Integers, compact, rows_of
from topo_dask.kernels.cpu.space import NEVER
from topo_dask.kernels.cpu.sweep import Layout, Start, lay_out
from topo_dask.kernels.jit import compiled
from topo_dask.kernels.parallel import Starmap, ranges, serial, starmap

TINY = 1e-8
"""Gradients below this norm are not stretched to unit length (coordinate potential)."""

TEPID = 2.0**300
"""What gradients of the hottest heat are scaled to: its square is far within float64."""


@dataclass(frozen=True)
class Domain:
    """An array of instances, and what is known of each, by number."""

    layout: Layout
    core: tuple[tuple[int, ...], tuple[int, ...]]  # first voxel, shape
    rows: npt.NDArray[np.intp]  # of the tables, for each number but 0

    def by_number(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Rows of a table in the order of the numbers; the background's are 0."""
        nothing = np.zeros((1, *values.shape[1:]), dtype=values.dtype)
        return np.concatenate((nothing, values[self.rows]))

    def flow(
        self,
        fields: list[npt.NDArray[Any]],
        factors: npt.NDArray[np.float64],
        least: float,
        run: Starmap,
        threads: int,
    ) -> npt.NDArray[np.float32]:
        """Unit vectors of the core from the indicator and the coordinates, see `point`.

        ``least`` is the norm that divides smaller ones; 0 if the field is heat.
        Instances that never begin get 0.
        """
        first, size = self.core
        factors = np.where((self.layout.begin == NEVER)[:, None], np.nan, factors)
        flow = np.empty((3, *size), dtype=np.float32)
        missing = [np.zeros(0, dtype=np.float32)] * (4 - len(fields))
        common = ((*fields, *missing), factors, self.layout.local, self.layout.space)
        parts = [(first, part) for part in ranges(size[0], threads)]
        norms = least, 1.0 if least > 0 else TEPID / HOT
        run(point, [(*common, part, norms, flow) for part in parts])
        return flow


def domain_of(
    labels: Integers,
    spatial_mask: npt.NDArray[Any] | None,
    core: tuple[slice, ...] | None,
    ids: npt.NDArray[np.uint64],
    iterations: npt.NDArray[np.int64],
    run: Starmap = serial,
    threads: int = 1,
) -> Domain:
    """Lay out an array for the diffusion of the instances that are in its core."""
    local, present = compact(labels, threads=threads, run=run)
    rows = rows_of(present, ids)
    box = [slice(0, n).indices(n)[:2] for n in labels.shape]
    if core is not None:
        box = [s.indices(n)[:2] for s, n in zip(core, labels.shape, strict=True)]
    wanted = np.zeros(present.size + 1, dtype=np.bool_)
    _mark_present(local[tuple(slice(*s) for s in box)], wanted)
    of_number = np.concatenate((np.zeros(1, np.int64), np.asarray(iterations, np.int64)[rows]))
    annotated = None if spatial_mask is None else np.ascontiguousarray(spatial_mask > 0.5)
    layout = lay_out(local, np.where(wanted, of_number, -1), annotated, run, threads)
    return Domain(layout, (tuple(a for a, _ in box), tuple(b - a for a, b in box)), rows)


@compiled
def _mark_present(local: Any, present: Any) -> None:
    for z in range(local.shape[0]):
        for y in range(local.shape[1]):
            for x in range(local.shape[2]):
                present[local[z, y, x]] = True


def weights_of(spacing: tuple[float, ...]) -> tuple[float, float, float]:
    """What the neighbours along each axis count in a mean: (1/s^2) / (2 sum of 1/s^2).

    Examples
    --------
    >>> weights_of((2.0, 1.0, 1.0))
    (0.05555555555555555, 0.2222222222222222, 0.2222222222222222)
    """
    z, y, x = ((min(spacing) / s) ** 2 for s in spacing)
    both = 2 * (z + y + x)
    return z / both, y / both, x / both


def undo(weights: tuple[float, ...], iterations: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """What float32 weights have made of 1 after some iterations, inverted: 1/6 rounds up."""
    total = 2 * sum(float(np.float32(w)) for w in weights)
    return total ** -iterations.astype(np.float64)


def starts_of(shift: npt.NDArray[np.int64], potential: str) -> list[Start]:
    """Give the fields of a potential: the indicator, and the coordinate relative to the anchor.

    ``shift`` is the anchor's place in the array, by number of instance.
    """
    if potential == "heat":
        return [Start(np.float64, shift[:, 0].copy(), one=HOT, tiniest=0.0)]
    relative = [Start(np.float32, shift[:, axis].copy(), axis) for axis in range(3)]
    return [Start(np.float64, shift[:, 0].copy()), *relative]


def factors_of(
    domain: Domain,
    anchors: npt.NDArray[np.int64],
    iterations: npt.NDArray[np.int64],
    spacing: tuple[float, ...],
    potential: str,
) -> npt.NDArray[np.float64]:
    """What the fields' changes along each axis count, by number of instance; see `point`."""
    factors = np.empty((len(domain.rows) + 1, 6))
    if potential == "heat":
        factors[:] = [min(spacing) / s for s in spacing] * 2
        return factors
    factors[:, :3] = domain.by_number(np.asarray(anchors, dtype=np.float64))
    total = domain.by_number(np.asarray(iterations, dtype=np.int64))
    factors[:, 3:] = undo(weights_of(spacing), total)[:, None]
    return factors


def diffusion_flow(
    labels: Integers,
    *,
    ids: npt.NDArray[np.uint64],
    iterations: npt.NDArray[np.int64],
    anchors: npt.NDArray[np.int64],
    origin: tuple[int, ...] = (0, 0, 0),
    core: tuple[slice, ...] | None = None,
    spatial_mask: npt.NDArray[Any] | None = None,
    potential: str = "coordinate",
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
    threads: int = 1,
) -> npt.NDArray[np.float32]:
    """Flow of every instance of an array by diffusion, all instances in the same sweeps.

    With u_d the coordinate along d inside the instance, n times replaced by the mean of its six
    neighbours (0 in other instances, u itself beyond a face of the array), the flow is
    g/max(|g|, 1e-8) with g_d = du_d/dd. Since that is linear, u_d is taken as the diffused
    coordinate relative to ``anchors`` (float32) plus the anchor times the diffused indicator
    (float64): absolute coordinates in float32 would lose the gradient in large volumes.
    ``potential="heat"`` diffuses the indicator alone, and divides by |g| however small.

    Parameters
    ----------
    labels
        ``[Z,Y,X]``, any integer type; 0 is background. Each outer face is a no-flux face: a face
        of the volume, or a cut whose effect the caller throws away with the context.
    ids, iterations, anchors
        Of all instances of the array, ascending by id: uint64 ``[K]``, the number n of
        iterations ``[K]``, and a global voxel near the instance ``[K,3]``.
    origin
        Global index of ``labels[0,0,0]``.
    core
        Slices of the part to return; ``None`` for all. What lies around it is context: n + 1
        voxels of it (one for the difference) make the core exact to the bit.
    spatial_mask
        ``[Z,Y,X]``, 1 where annotated. An unannotated neighbour of another instance is a no-flux
        wall.
    potential
        "coordinate" or "heat".
    spacing
        Distance s of voxels along z, y, x, in any unit. Neighbours along an axis then count
        (1/s^2) / (2 sum of 1/s^2) in the mean instead of 1/6, and flows are unit vectors in that
        unit. Only ratios matter.
    threads
        Threads to use; the result is the same to the bit.

    Returns
    -------
    float32 ``[3, *core shape]``: unit vectors ``(dz,dy,dx)`` inside instances, 0 outside.

    Examples
    --------
    >>> labels = np.array([[[0, 5, 5, 5, 0]]])
    >>> one = np.array([5], dtype=np.uint64), np.array([10]), np.array([[0, 0, 2]])
    >>> flow = diffusion_flow(
    ...     labels, ids=one[0], iterations=one[1], anchors=one[2], potential="heat"
    ... )
    >>> flow[2, 0, 0]
    array([ 0.,  1.,  0., -1.,  0.], dtype=float32)
    """
    relative = potential == "coordinate"
    weights = weights_of(spacing)
    with starmap(threads) as run:
        domain = domain_of(labels, spatial_mask, core, ids, iterations, run, threads)
        layout = domain.layout
        shift = domain.by_number(np.asarray(anchors, dtype=np.int64)) - np.asarray(origin)
        fields = layout.fields(starts_of(shift, potential), run, threads)
        if relative:
            fields = layout.advance(fields, (0, layout.total), weights, run)
        else:
            fields = spread(layout, fields, weights, run)
        factors = factors_of(domain, anchors, iterations, spacing, potential)
        least = TINY if relative else 0.0
        return domain.flow([f.values for f in fields], factors, least, run, threads)
