"""Diffusion in rounds: an array's fields are taken up after some iterations and left after more.

A voxel after k iterations depends on nothing farther than k voxels, so a block whose neighbours'
fields are known that far makes k iterations exactly. Rounds of k with a halo of k + 1 (one for the
difference) thus give the field of the whole volume to the bit, for any n.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.kernels.cpu.diffusion import (
    TINY,
    domain_of,
    factors_of,
    starts_of,
    weights_of,
)
from topo_dask.kernels.cpu.labels import Integers
from topo_dask.kernels.cpu.space import NEVER
from topo_dask.kernels.parallel import starmap


@dataclass(frozen=True)
class Span:
    """Which iterations a round makes: ``first`` are done before it, ``end`` after it."""

    first: int
    end: int


def field_types(potential: str) -> tuple[np.dtype[Any], ...]:
    """The fields that diffuse: the indicator, and the relative coordinate along each axis.

    Examples
    --------
    >>> len(field_types("coordinate")), len(field_types("heat"))
    (4, 1)
    """
    single = (np.dtype(np.float32),) * (3 if potential == "coordinate" else 0)
    return (np.dtype(np.float64), *single)


def diffusion_round(
    labels: Integers,
    fields: list[npt.NDArray[Any]] | None,
    *,
    span: Span,
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
    """Some iterations of `diffusion_flow`, and the flow of the instances that end among them.

    Parameters
    ----------
    labels
        ``[Z,Y,X]``: the core and ``span.end - span.first + 1`` voxels around it, or as far as the
        core's instances go.
    fields
        Of ``labels``, after ``span.first`` iterations, of the types of `field_types`; what they
        are where instances have ended does not matter. ``None`` before the first.
    span
        The iterations.
    ids, iterations, anchors, origin, core, spatial_mask, potential, spacing, threads
        See `diffusion_flow`.

    Returns
    -------
    fields
        Of the core, after ``span.end`` iterations.
    flow
        float32 ``[3, *core shape]``, of the instances that end in this span, 0 in all others.
        Both equal those of the whole volume to the bit.

    Examples
    --------
    >>> labels = np.array([[[0, 5, 5, 5, 0]]])
    >>> facts = dict(ids=np.array([5], np.uint64), iterations=np.array([10]))
    >>> facts |= dict(anchors=np.array([[0, 0, 2]]), potential="heat")
    >>> fields, flow = diffusion_round(labels, None, span=Span(0, 6), **facts)
    >>> flow.any()
    np.False_
    >>> diffusion_round(labels, fields, span=Span(6, 12), **facts)[1][2, 0, 0]
    array([ 0.,  1.,  0., -1.,  0.], dtype=float32)
    """
    total = np.asarray(iterations, dtype=np.int64)
    ends = (total > span.first) & (total <= span.end)
    if span.first == 0:
        ends |= total == 0
    left = np.where(ends, total, span.end) - span.first
    relative = potential == "coordinate"
    weights = weights_of(spacing)
    with starmap(threads) as run:
        going = np.where(ends | (total > span.end), left, -1)
        domain = domain_of(labels, spatial_mask, core, ids, going, run, threads)
        layout = domain.layout
        shift = domain.by_number(np.asarray(anchors, dtype=np.int64)) - np.asarray(origin)
        starts = starts_of(shift, potential)
        if fields is not None:
            pairs = zip(starts, fields, strict=True)
            starts = [replace(start, begun=field) for start, field in pairs]
        made = layout.fields(starts, run, threads)
        made = layout.advance(made, (0, layout.total), weights, run)
        factors = factors_of(domain, anchors, total, spacing, potential)
        factors[~domain.by_number(ends)] = np.nan
        values = [f.values for f in made]
        flow = domain.flow(values, factors, TINY if relative else 0.0, run, threads)
    (z, y, x), (nz, ny, nx) = domain.core
    inside = (slice(z, z + nz), slice(y, y + ny), slice(x, x + nx))
    known = layout.begin[layout.local[inside]] != NEVER
    return [np.where(known, layout.voxels(v)[inside], v.dtype.type(0)) for v in values], flow
