"""Unit vectors up the gradient of diffused fields, by central differences inside each instance.

Rows without walls are worked on a whole row at a time, in loops that compilers turn into vectors;
the rest voxel by voxel, with the same arithmetic.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from topo_dask.kernels.jit import compiled

NOTHING = 1e-12
"""A component below this share of it is 0: it may be of what sweeps flush to 0, now or later."""


LEAST_SQUARE, MOST_SQUARE = 1e-200, 1e200
"""Between these, the square of a gradient's norm is taken as it is."""


@compiled
def _change(field: Any, low: Any, high: Any) -> Any:
    """The change of a field from one side of a voxel to the other; a side with no index is 0."""
    before = np.float64(field[low]) if low >= 0 else 0.0
    after = np.float64(field[high]) if high >= 0 else 0.0
    return after - before


@compiled
def _sides(links: Any, walls: Any, i: Any, axis: Any, closed: Any, beside: Any) -> Any:
    """Where the neighbours of voxel i along an axis are, or -1, and what their change counts.

    ``closed`` is whether either is behind an outer face of the array, ``beside`` where they would
    be. A neighbour behind a face or a wall is the voxel itself.
    """
    low_bit, high_bit = np.uint8(1 << (2 * axis)), np.uint8(2 << (2 * axis))
    closed_low, closed_high = closed
    if walls.size:
        closed_low |= (walls[i] & low_bit) != 0
        closed_high |= (walls[i] & high_bit) != 0
    low = i if closed_low else (beside[0] if links[i] & low_bit else -1)
    high = i if closed_high else (beside[1] if links[i] & high_bit else -1)
    return low, high, 1.0 if closed_low or closed_high else 0.5


@compiled
def _floored(value: float, floor: float) -> float:
    return value if abs(value) >= floor else 0.0


@compiled
def _unit(a: float, b: float, c: float, least: float) -> Any:
    """Divide by the norm, or by ``least`` where the norm is smaller; 0 stays 0."""
    square = a * a + b * b + c * c
    if LEAST_SQUARE < square < MOST_SQUARE:
        scale = 1 / max(np.sqrt(square), least)
        return a * scale, b * scale, c * scale
    big = max(abs(a), abs(b), abs(c))
    if big == 0:
        return a, b, c
    a, b, c = a / big, b / big, c / big  # the squares themselves leave the range of float64
    scale = big / max(big * np.sqrt(a * a + b * b + c * c), least)
    return a * scale, b * scale, c * scale


@compiled
def _voxel(
    fields: Any, factors: Any, space: Any, at: Any, number: Any, least: float, flow: Any, out: Any
) -> None:
    """Write the unit vector of a voxel ``at`` (z, y, x) of the array to ``out`` of the flow."""
    indicator, along_z, along_y, along_x = fields
    links, walls = space.links, space.walls
    nz, ny, nx, stride, width = space.grid
    z, y, x = at
    i = z * stride + y * width + x
    closed = z == 0, z == nz - 1
    z0, z1, dz = _sides(links, walls, i, 0, closed, (i - stride, i + stride))
    closed = y == 0, y == ny - 1
    y0, y1, dy = _sides(links, walls, i, 1, closed, (i - width, i + width))
    closed = x == 0, x == nx - 1
    x0, x1, dx = _sides(links, walls, i, 2, closed, (i - 1, i + 1))
    by = factors[number]
    a = b = c = 0.0
    if indicator.size:
        a = by[0] * _change(indicator, z0, z1)
        b = by[1] * _change(indicator, y0, y1)
        c = by[2] * _change(indicator, x0, x1)
    if along_z.size:
        a += by[3] * _change(along_z, z0, z1)
        b += by[4] * _change(along_y, y0, y1)
        c += by[5] * _change(along_x, x0, x1)
    floor = least * NOTHING
    a, b, c = _floored(a * dz, floor), _floored(b * dy, floor), _floored(c * dx, floor)
    a, b, c = _unit(a, b, c, least)
    if number == 0 or np.isnan(by[0]):
        a = b = c = 0.0
    flow[0, out[0], out[1], out[2]] = np.float32(a)
    flow[1, out[0], out[1], out[2]] = np.float32(b)
    flow[2, out[0], out[1], out[2]] = np.float32(c)


@compiled
def _spread_factors(factors: Any, numbers: Any, out: Any) -> None:
    """What changes count at each voxel of a row; NaN where no flow is wanted."""
    for x in range(numbers.size):
        by = factors[numbers[x]]
        unwanted = np.isnan(by[0])
        for j in range(6):
            out[j, x] = np.nan if unwanted else by[j]


@compiled
def _add_changes(sums: Any, field: Any, beside: Any, links: Any, axis: Any, by: Any) -> None:
    """Add a field's change along an axis in a row, times a factor a voxel.

    ``beside`` is where the rows on either side begin; beyond a face of the array the row itself
    does, and all its voxels are linked with it.
    """
    low_bit, high_bit = np.uint8(1 << (2 * axis)), np.uint8(2 << (2 * axis))
    low = field[beside[0] : beside[0] + sums.size]
    high = field[beside[1] : beside[1] + sums.size]
    for x in range(sums.size):
        own_low, own_high = np.float64(low[x]), np.float64(high[x])
        before = own_low if links[x] & low_bit else 0.0
        after = own_high if links[x] & high_bit else 0.0
        sums[x] += by[x] * (after - before)


@compiled
def _to_units(sums: Any, halves: Any, norms: Any, rows: Any) -> Any:
    """Write the unit vectors of a row; how many it could not: their squares leave float64."""
    least, scale = norms
    a_sums, b_sums, c_sums = sums[0], sums[1], sums[2]
    a_row, b_row, c_row = rows
    floor = least * NOTHING
    odd = 0
    for x in range(a_row.size):
        a, b, c = a_sums[x] * halves[0], b_sums[x] * halves[1], c_sums[x] * halves[2]
        a = a if abs(a) >= floor else 0.0
        b = b if abs(b) >= floor else 0.0
        c = c if abs(c) >= floor else 0.0
        a, b, c = a * scale, b * scale, c * scale
        square = a * a + b * b + c * c
        usual = (square > LEAST_SQUARE) & (square < MOST_SQUARE)
        unit = 1 / max(np.sqrt(square if usual else 1.0), least * scale)
        odd += (not usual) & ((a != 0) | (b != 0) | (c != 0))
        a_row[x] = np.float32(a * unit if usual else 0.0)
        b_row[x] = np.float32(b * unit if usual else 0.0)
        c_row[x] = np.float32(c * unit if usual else 0.0)
    return odd


@compiled
def _row(
    fields: Any, factors: Any, space: Any, at: Any, numbers: Any, norms: Any, rows: Any, work: Any
) -> Any:
    """Write the unit vectors of a row without walls or an outer face at its ends; see `_to_units`.

    ``at`` is the first voxel, ``rows`` the three components of the flow there.
    """
    indicator, along_z, along_y, along_x = fields
    nz, ny, _, stride, width = space.grid
    z, y, x = at
    by, sums = work
    i = z * stride + y * width + x
    links = space.links[i : i + numbers.size]
    _spread_factors(factors, numbers, by)
    sums[:] = 0
    beside_z = i - stride if z > 0 else i, i + stride if z < nz - 1 else i
    beside_y = i - width if y > 0 else i, i + width if y < ny - 1 else i
    beside_x = i - 1, i + 1
    if indicator.size:
        _add_changes(sums[0], indicator, beside_z, links, 0, by[0])
        _add_changes(sums[1], indicator, beside_y, links, 1, by[1])
        _add_changes(sums[2], indicator, beside_x, links, 2, by[2])
    if along_z.size:
        _add_changes(sums[0], along_z, beside_z, links, 0, by[3])
        _add_changes(sums[1], along_y, beside_y, links, 1, by[4])
        _add_changes(sums[2], along_x, beside_x, links, 2, by[5])
    one_sided_z, one_sided_y = z == 0 or z == nz - 1, y == 0 or y == ny - 1
    halves = 1.0 if one_sided_z else 0.5, 1.0 if one_sided_y else 0.5, 0.5
    return _to_units(sums, halves, norms, rows)


@compiled
def point(
    fields: Any, factors: Any, local: Any, space: Any, core: Any, norms: Any, flow: Any
) -> None:
    """Write the unit vectors of some planes of the core.

    ``fields`` are the indicator and the coordinates along z, y, x, each empty if there is none;
    ``factors`` ``[K+1, 6]`` what the change of the indicator along each axis counts, and what that
    of each coordinate; NaN where the flow of an instance is not wanted. ``norms`` are the least
    norm that is stretched to 1, and a power of two that brings most gradients to where they can be
    squared.
    """
    first, planes = core
    ny, nx = space.grid[1], space.grid[2]
    size = flow.shape[3]
    low, high = max(1 - first[2], 0), min(nx - 1 - first[2], size)  # voxels not at a face in x
    inner = max(high - low, 0)
    work = np.empty((6, inner)), np.empty((3, inner))
    for z in range(planes[0], planes[1]):
        for y in range(flow.shape[2]):
            pz, py = z + first[0], y + first[1]
            fast = inner > 0 and not (space.walls.size and space.rows[pz * ny + py, 3])
            odd = 0
            if fast:
                at = pz, py, low + first[2]
                numbers = local[pz, py, at[2] : at[2] + inner]
                rows = flow[0, z, y, low:high], flow[1, z, y, low:high], flow[2, z, y, low:high]
                odd = _row(fields, factors, space, at, numbers, norms, rows, work)
            for x in range(size):
                if fast and odd == 0 and low <= x < high:
                    continue
                voxel = pz, py, x + first[2]
                number = local[voxel]
                _voxel(fields, factors, space, voxel, number, norms[0], flow, (z, y, x))
