"""How much context diffusion needs, and the iterations of each instance."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from topo_dask.config import FlowSettings
from topo_dask.graph.acceleration import Shares, shares_of
from topo_dask.grid import Region
from topo_dask.kernels.cpu.diffusion import weights_of
from topo_dask.kernels.tables import InstanceTable

FLOOR = 1e-8
"""Gradients shorter than this are not stretched (coordinate potential): noise stays small."""

MARGIN = 10.0
"""A direction errs by more than the field it is the gradient of; measured: at most 6 times."""


def iterations_of(
    table: InstanceTable, settings: FlowSettings, *, volume: Region
) -> npt.NDArray[np.int64]:
    """Number of diffusion iterations of each instance: n = min(adaptive_factor * E, n_iter).

    E is the longest side of the instance's bounding box, grown by 2 voxels a side and clipped to
    the volume.

    Parameters
    ----------
    table
        Facts of whole instances.
    settings
        ``n_iter``, ``adaptive_iters``, ``adaptive_factor``.
    volume
        The whole volume, in the table's coordinates.

    Returns
    -------
    int64 ``[K]``
    """
    most = np.full(len(table), settings.n_iter, dtype=np.int64)
    if not settings.adaptive_iters or len(table) == 0:
        return most
    low = np.maximum(table.lo - 2, np.asarray(volume.start, dtype=np.int64))
    high = np.minimum(table.hi + 2, np.asarray(volume.stop, dtype=np.int64))
    wanted = np.floor(settings.adaptive_factor * (high - low).max(axis=1))
    fewer: npt.NDArray[np.int64] = np.minimum(wanted, most).astype(np.int64)
    return fewer


def anchors_of(table: InstanceTable) -> npt.NDArray[np.int64]:
    """A voxel near the middle of each instance, the same for every block: int64 ``[K,3]``."""
    return (table.lo + table.hi) // 2


MOST_MODELLED = 4000
"""Iterations beyond which the context is n itself: nothing narrower is worth the search for it."""


@lru_cache(maxsize=1024)
def context_width(
    iterations: int,
    *,
    tolerance: float,
    farthest: int,
    floor: bool = True,
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
) -> int:
    """Voxels of context after which the flow is within ``tolerance`` of the whole volume's.

    What lies beyond the context is felt most through a straight corridor: there the instance's
    own field decays, by m + 2w an iteration with w the weight of a neighbour along it and m in
    [0, 1 - 2w] for the corridor's width, while a large part of the instance at its far end does
    not. So the width is the smallest h for which a field held at 1 at distance h brings, after n
    iterations, less than tolerance/10 of the corridor's own field, or of the floor below which
    gradients are not stretched; the largest of the three axes. For n = 200 and 1e-4 these are 45
    voxels, 5.5 sigma of the random walk; on dense tissue 5 sigma suffice. Beyond 4000 iterations
    it is n.

    Parameters
    ----------
    iterations
        n of the instance with most.
    tolerance
        Allowed difference of a component.
    farthest
        Largest absolute coordinate of the volume: the floor is relative to it.
    floor
        Whether there is a floor (coordinate potential) or not (heat).
    spacing
        Distance of voxels along z, y, x.

    Returns
    -------
    int, at most ``iterations``: that much is exact to the bit.

    Examples
    --------
    >>> [context_width(n, tolerance=1e-4, farthest=1000) for n in (5, 200)]
    [5, 45]
    """
    if iterations <= 1 or iterations > MOST_MODELLED:
        return iterations
    least = math.log(FLOOR / max(farthest, 1)) if floor else -np.inf
    allowed = math.log(tolerance / MARGIN)
    weights = {round(w, 12) for w in weights_of(spacing)}
    return max(_width_along(iterations, w, least, allowed) for w in weights)


def _width_along(iterations: int, weight: float, least: float, allowed: float) -> int:
    """Width along an axis of some weight; ``least`` and ``allowed`` are logarithms."""
    stay = (1 - 2 * weight) * np.cos(np.linspace(0, np.pi / 2, 65))[:, None]
    reach = min(iterations, 16 + int(16 * math.sqrt(2 * weight * iterations)))
    log_own = iterations * np.log(stay[:, 0] + 2 * weight)
    felt = np.zeros((len(stay), reach + 2))
    felt[:, 0] = 1.0
    for _ in range(iterations):
        felt[:, 1:-1] = stay * felt[:, 1:-1] + weight * (felt[:, :-2] + felt[:, 2:])
    with np.errstate(divide="ignore"):
        excess = np.log(felt) - np.maximum(log_own, least)[:, None]
    enough = excess.max(axis=0) <= allowed
    if enough.any():
        return min(iterations, int(np.argmax(enough)))
    return min(iterations, reach + 1) if weight > 0.1 else iterations


def context_region(
    core: Region,
    table: InstanceTable,
    iterations: npt.NDArray[np.int64],
    settings: FlowSettings,
    volume: Region,
) -> Region:
    """The part of the volume that a block needs to see for the flow in its core.

    Parameters
    ----------
    core
        The block.
    table, iterations
        The instances that enter the core, whole, and their iterations.
    settings
        ``context`` and ``tolerance``.
    volume
        The whole volume.

    Returns
    -------
    Region
        The core grown by the context, no further than the volume or the instances go.
    """
    if len(table) == 0:
        return core
    width = settings.context
    if width == "auto":
        farthest = max(map(abs, (*volume.start, *volume.stop)))
        width = _width_of(shares_of(table, iterations, settings), iterations, settings, farthest)
    width += 1  # for the differences, which are taken after the last iteration
    grown = tuple((a - width, b + width) for a, b in zip(core.start, core.stop, strict=True))
    low, high = table.lo.min(axis=0).tolist(), table.hi.max(axis=0).tolist()
    # One voxel more than the instances: a neighbour outside is background, not a face.
    start = (max(a, n - 1, v) for (a, _), n, v in zip(grown, low, volume.start, strict=True))
    stop = (min(b, n + 1, v) for (_, b), n, v in zip(grown, high, volume.stop, strict=True))
    return Region(
        tuple(min(a, c) for a, c in zip(start, core.start, strict=True)),
        tuple(max(b, c) for b, c in zip(stop, core.stop, strict=True)),
    )


def _width_of(
    shares: Shares, iterations: npt.NDArray[np.int64], settings: FlowSettings, farthest: int
) -> int:
    """The automatic context: what is within the tolerance, or less where less is exact."""

    def width_of(most: int) -> int:
        return automatic_width(most, settings, farthest)

    fast = shares.fast
    width = width_of(int(iterations[~fast].max(initial=0)))
    if fast.any():
        reach = int(shares.sweeps[fast].max())
        width = max(width, min(reach, width_of(int(iterations[fast].max()))))
    return width


def automatic_width(iterations: int, settings: FlowSettings, farthest: int) -> int:
    """`context_width` of so many plain iterations, by some settings."""
    return context_width(
        iterations,
        tolerance=settings.tolerance,
        farthest=farthest,
        floor=settings.potential == "coordinate",
        spacing=settings.spacing,
    )
