"""Keeping heat within the range of float64, however long it spreads.

A flow is a direction, so every connected piece of an instance may be multiplied by a power of two
now and then: no bit of a direction changes. Heat begins at 2**1000, hence up to some 770 iterations
nothing needs to be done.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from topo_dask.kernels.cpu.pieces import pieces
from topo_dask.kernels.cpu.sweep import Field, Layout
from topo_dask.kernels.jit import compiled
from topo_dask.kernels.parallel import Starmap

HOT_EXPONENT = 1000
HOT = 2.0**HOT_EXPONENT
"""Where heat begins, and what the hottest voxel of a piece is brought back to."""

LOWEST_EXPONENT = -1021


def untouched_iterations(weights: tuple[float, float, float]) -> int:
    """Iterations in which no heat leaves the range of float64: two voxels keep the least.

    Examples
    --------
    >>> untouched_iterations((1 / 6, 1 / 6, 1 / 6))
    781
    """
    return int((HOT_EXPONENT - LOWEST_EXPONENT) / -math.log2(min(weights)))


@compiled
def _bring_back(values: Any, number: Any, count: int, layout: Any, time: int) -> None:
    """Scale every piece that has begun so that its hottest voxel is close to ``HOT``."""
    local, begin, grid = layout
    nz, ny, nx, stride, width = grid
    hottest = np.zeros(count + 1)
    for scaling in (False, True):
        if scaling:
            for piece in range(count + 1):
                exponent = math.frexp(hottest[piece])[1] if hottest[piece] > 0 else HOT_EXPONENT
                hottest[piece] = exponent
        for row in range(nz * ny):
            z, y = row // ny, row % ny
            here = z * stride + y * width
            for x in range(nx):
                k = local[z, y, x]
                if k == 0 or begin[k] > time:
                    continue
                piece, at = number[z, y, x], here + x
                if scaling:
                    values[at] = math.ldexp(values[at], HOT_EXPONENT - int(hottest[piece]))
                else:
                    hottest[piece] = max(hottest[piece], values[at])
            if scaling and nx < width:
                values[here + nx] = values[here + nx - 1]


def spread(
    layout: Layout,
    fields: tuple[Field, ...],
    weights: tuple[float, float, float],
    run: Starmap,
) -> tuple[Field, ...]:
    """Bring heat from the beginning to the end, each piece scaled by powers of two.

    What is below 2**-2000 or so of the hottest voxel of its piece becomes 0: that takes an object
    of one or two voxels' thickness, hundreds of voxels from where it is thicker.
    """
    most = untouched_iterations(weights)
    if layout.total <= most:
        return layout.advance(fields, (0, layout.total), weights, run)
    number, ids, *_ = pieces(layout.local)
    known = (layout.local, layout.begin, layout.space.grid)
    every = max(1, most // 4)
    for time in range(0, layout.total, every):
        end = min(time + every, layout.total)
        fields = layout.advance(fields, (time, end), weights, run)
        _bring_back(fields[0].values, number, len(ids), known, end)
    return fields
