"""Particles along a flow that is interpolated between voxels: exact across blocks, like nearest."""

from __future__ import annotations

from typing import Any

import numpy as np

from topo_dask.kernels.jit import compiled


@compiled
def track_linear(
    flow: Any, positions: Any, left: Any, origin: Any, size: Any, top: Any, step: Any, span: Any
) -> None:
    """Advance the particles of a range; same arguments as the kernel for the nearest voxel.

    A particle goes on while the voxel below its position and the next one along each axis (or the
    last one of the volume) are in the array.
    """
    oz, oy, ox = origin[0], origin[1], origin[2]
    nz, ny, nx = size[0], size[1], size[2]
    tz, ty, tx = top[0], top[1], top[2]
    # Ends of the voxels at which a particle can go on.
    ez = nz if oz + nz > np.int64(tz) else nz - 1
    ey = ny if oy + ny > np.int64(ty) else ny - 1
    ex = nx if ox + nx > np.int64(tx) else nx - 1
    move = np.zeros(4, np.float32)
    for i in range(span[0], span[1]):
        z, y, x = positions[i, 0], positions[i, 1], positions[i, 2]
        budget = left[i]
        while budget > 0:
            gz, gy, gx = np.int64(z), np.int64(y), np.int64(x)
            iz, iy, ix = gz - oz, gy - oy, gx - ox
            if iz < 0 or iz >= ez or iy < 0 or iy >= ey or ix < 0 or ix >= ex:
                break
            fz, fy, fx = z - gz, y - gy, x - gx
            dz = ny * nx * 4 if iz + 1 < nz else np.int64(0)
            dy = nx * 4 if iy + 1 < ny else np.int64(0)
            dx = np.int64(4) if ix + 1 < nx else np.int64(0)
            at = ((iz * ny + iy) * nx + ix) * 4
            for c in range(4):
                k = at + c
                a, b = np.float64(flow[k]), np.float64(flow[k + dx])
                low = a + (b - a) * fx
                a, b = np.float64(flow[k + dy]), np.float64(flow[k + dy + dx])
                low += (a + (b - a) * fx - low) * fy
                a, b = np.float64(flow[k + dz]), np.float64(flow[k + dz + dx])
                high = a + (b - a) * fx
                a, b = np.float64(flow[k + dz + dy]), np.float64(flow[k + dz + dy + dx])
                high += (a + (b - a) * fx - high) * fy
                move[c] = np.float32(low + (high - low) * fz)
            z = min(max(z + np.float64(step * move[0]), 0.0), tz)
            y = min(max(y + np.float64(step * move[1]), 0.0), ty)
            x = min(max(x + np.float64(step * move[2]), 0.0), tx)
            budget -= 1
        positions[i, 0], positions[i, 1], positions[i, 2] = z, y, x
        left[i] = budget
