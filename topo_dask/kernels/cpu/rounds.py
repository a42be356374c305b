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

from topo_dask.kernels.cpu.diffusion import TINY, _domain, _fill_relative, _unit
from topo_dask.kernels.cpu.labels import Integers
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
    ids, iterations, anchors, origin, core, spatial_mask, potential, threads
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
    domain, rows = _domain(labels, spatial_mask, core, ids, iterations)
    total = domain.iterations
    ends = (total > span.first) & (total <= span.end)
    if span.first == 0:
        ends |= total == 0
    ends[0] = False
    left = np.where(ends, total - span.first, np.where(total > span.end, span.end - span.first, 0))
    left[0] = 0
    domain = replace(domain, iterations=left)
    gradient = np.zeros((3, *domain.core[1]), dtype=np.float64)
    nowhere = np.zeros((1, 3), dtype=np.int64)
    anchor = np.concatenate((nowhere, np.asarray(anchors, dtype=np.int64)[rows]))
    relative = potential == "coordinate"
    factors = anchor.astype(np.float64) if relative else np.ones(anchor.shape)
    factors[~ends] = np.nan
    # A sixth in float32 is too large by 2**-27 or so, every iteration; undo that.
    undo = (6.0 * np.float64(np.float32(1 / 6))) ** -total.astype(np.float64)
    undo[~ends] = np.nan
    found = []
    with starmap(threads) as run:
        for number, dtype in enumerate(field_types(potential)):
            start = np.zeros(domain.local.shape, dtype=dtype)
            if fields is not None:
                start[1:-1, 1:-1, 1:-1] = fields[number]
            elif number == 0:
                start[...] = domain.local > 0
            else:
                axis = number - 1
                _fill_relative(domain.local, anchor[:, axis], origin[axis], axis, start)
            into = [(axis, gradient[axis], factors[:, axis]) for axis in range(3)]
            if number > 0:
                into = [(number - 1, gradient[number - 1], undo)]
            end = domain.derive(start.ravel(), into, run, threads)
            (z, y, x), (nz, ny, nx) = domain.core
            inside = end.reshape(start.shape)[1:-1, 1:-1, 1:-1]
            found.append(inside[z : z + nz, y : y + ny, x : x + nx].copy())
    flow = np.zeros(gradient.shape, dtype=np.float32)
    _unit(gradient, TINY if relative else 0.0, flow)
    return found, flow
