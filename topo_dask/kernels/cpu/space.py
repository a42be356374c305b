"""Which neighbours of each voxel belong to the same instance, and what each row needs of sweeps.

The labels are compared here, once: a byte a voxel remembers the answers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from topo_dask.kernels.cpu.rows import LANES, aligned
from topo_dask.kernels.jit import compiled
from topo_dask.kernels.parallel import Starmap, ranges

CACHE_WAY = 2**17
"""Bytes after which the second-level cache (of 1 MiB in 8 ways, for one) uses the same places."""

NEVER = 2**31 - 1
"""The time at which instances that nobody asked for begin."""


class Space(NamedTuple):
    """What all fields of an array share; rows of its voxels are padded to whole groups."""

    grid: tuple[int, int, int, int, int]  # nz, ny, nx, from plane to plane, from row to row;
    # a plane ends with some rows that no voxel is in
    links: Any  # uint8 a voxel, padded: which neighbours are of the same instance
    walls: Any  # the same for no-flux walls; empty if there are none
    rows: Any  # int32 [rows, 5]: first begin; the groups of voxels of interest; whether walled;
    # how many rows of its plane are alike from this one on
    runs: Any  # int32 [R, 4]: when a run of voxels begins; its first and end x; its number
    first_run: Any  # int64 a row: where its runs are, by time; the last of them never begins


@compiled
def beside(grid: Any, first: int, last: int, y: int) -> Any:
    """Where a row of planes ``first`` to ``last`` begins, and the rows at its four sides.

    Beyond the array lies the row itself, its image; then comes the way from plane to plane.
    """
    nz, ny, _, stride, width = grid
    here = first * stride + y * width
    top = last * stride + y * width
    return (
        here,
        here - stride if first > 0 else here,
        top + stride if last < nz - 1 else top,
        here - width if y > 0 else here,
        here + width if y < ny - 1 else here,
        stride,
    )


@compiled
def write_images(values: Any, grid: Any, first: int, last: int, y: int, count: Any) -> None:
    """Write the images behind the last voxels of ``count`` rows of planes ``first`` to ``last``."""
    _, _, nx, stride, width = grid
    if nx == width:
        return
    for plane in range(first, last + 1):
        begin = plane * stride + y * width + nx
        for image in range(begin, begin + count * width, width):
            values[image] = values[image - 1]


@compiled
def _link(local: Any, planes: Any, space: Any) -> None:
    """Set bit 0..5 (z-, z+, y-, y+, x-, x+) where that neighbour belongs to the same instance.

    A neighbour beyond the array counts as linked: the sweep sees a mirror image there, which is
    the no-flux condition.
    """
    nz, ny, nx, stride, width = space.grid
    links = space.links
    for z in range(planes[0], planes[1]):
        for y in range(ny):
            here = local[z, y]
            below, above = local[max(z - 1, 0), y], local[min(z + 1, nz - 1), y]
            front, back = local[z, max(y - 1, 0)], local[z, min(y + 1, ny - 1)]
            at = z * stride + y * width
            out = links[at : at + width]
            for x in range(nx):
                k = here[x]
                byte = np.uint8(below[x] == k)
                byte |= np.uint8(above[x] == k) << np.uint8(1)
                byte |= np.uint8(front[x] == k) << np.uint8(2)
                byte |= np.uint8(back[x] == k) << np.uint8(3)
                out[x] = byte if k != 0 else np.uint8(0)
            for x in range(nx - 1):
                same = (here[x] == here[x + 1]) & (here[x] != 0)
                out[x] |= np.uint8(same) << np.uint8(5)
            for x in range(1, nx):
                same = (here[x] == here[x - 1]) & (here[x] != 0)
                out[x] |= np.uint8(same) << np.uint8(4)
            out[0] |= np.uint8(16 * (here[0] != 0))
            out[nx - 1] |= np.uint8(32 * (here[nx - 1] != 0))
            out[nx:] = 0


@compiled
def _wall(local: Any, annotated: Any, planes: Any, space: Any) -> None:
    """Set bit 0..5 where that neighbour, inside the array, is unannotated and of another object."""
    nz, ny, nx, stride, width = space.grid
    walls, rows = space.walls, space.rows
    for z in range(planes[0], planes[1]):
        for y in range(ny):
            row = z * ny + y
            at = z * stride + y * width
            out = walls[at : at + width]
            out[:] = 0
            found = np.uint8(0)
            for x in range(nx):
                k = local[z, y, x]
                if k == 0:
                    continue
                byte = 0
                if z > 0 and not annotated[z - 1, y, x]:
                    byte |= (local[z - 1, y, x] != k) << 0
                if z < nz - 1 and not annotated[z + 1, y, x]:
                    byte |= (local[z + 1, y, x] != k) << 1
                if y > 0 and not annotated[z, y - 1, x]:
                    byte |= (local[z, y - 1, x] != k) << 2
                if y < ny - 1 and not annotated[z, y + 1, x]:
                    byte |= (local[z, y + 1, x] != k) << 3
                if x > 0 and not annotated[z, y, x - 1]:
                    byte |= (local[z, y, x - 1] != k) << 4
                if x < nx - 1 and not annotated[z, y, x + 1]:
                    byte |= (local[z, y, x + 1] != k) << 5
                out[x] = byte
                found |= np.uint8(byte)
            rows[row, 3] = found != 0


@compiled
def _find_runs(local: Any, begin: Any, planes: Any, space: Any, count: Any) -> None:
    """Each row's span and beginning; its late runs into ``space.runs``, or only their number.

    ``count`` ``[rows]`` is written while ``space.runs`` is empty, and read afterwards.
    """
    _, ny, nx, _, _ = space.grid
    rows, runs, first_run = space.rows, space.runs, space.first_run
    for z in range(planes[0], planes[1]):
        for y in range(ny):
            row = z * ny + y
            earliest, low, high, late = NEVER, nx, 0, 0
            x = 0
            while x < nx:
                k = local[z, y, x]
                first = x
                while x < nx and local[z, y, x] == k:
                    x += 1
                if k == 0 or begin[k] == NEVER:
                    continue
                low, high, earliest = min(low, first), x, min(earliest, begin[k])
                if begin[k] > 0:
                    if runs.size:  # sorted by time, as they come
                        at = first_run[row] + late
                        while at > first_run[row] and runs[at - 1, 0] > begin[k]:
                            runs[at] = runs[at - 1]
                            at -= 1
                        runs[at, 0], runs[at, 1] = begin[k], first
                        runs[at, 2], runs[at, 3] = x, k
                    late += 1
            count[row] = late
            rows[row, 0] = earliest
            rows[row, 1] = low // LANES
            rows[row, 2] = -(-high // LANES)
            if runs.size:
                runs[first_run[row] + late, 0] = NEVER


@compiled
def _find_alike(rows: Any, ny: int) -> None:
    """How many rows of a plane follow each other that need the same; the first and last alone."""
    for row in range(rows.shape[0] - 1, -1, -1):
        y, count = row % ny, np.int32(1)
        if 0 < y < ny - 2:
            same = True
            for column in range(4):
                same &= rows[row, column] == rows[row + 1, column]
            count += rows[row + 1, 4] if same else np.int32(0)
        rows[row, 4] = count


def _stride(plane: int) -> int:
    """Values from one plane to the next: planes in work shall not share places of the cache."""
    stride = plane
    while True:
        turns = np.arange(1, 9) * (4 * stride / CACHE_WAY)
        if np.abs(turns - np.rint(turns)).min() >= min(0.05, plane / CACHE_WAY):
            return stride
        stride += LANES


def space_of(
    local: npt.NDArray[np.int32],
    begin: npt.NDArray[np.int64],
    annotated: npt.NDArray[np.bool_] | None,
    spare: int,
    run: Starmap,
    threads: int,
) -> Space:
    """Compare the labels of an array, and find its rows' spans and beginnings.

    Parameters
    ----------
    local, annotated, run, threads
        See `lay_out`.
    begin
        By number: when the instance begins.
    spare
        Rows, at least, at the end of a plane that no voxel is in.
    """
    nz, ny, nx = local.shape
    rows, width = nz * ny, -(-nx // LANES) * LANES
    stride = _stride((ny + spare) * width)
    size = nz * stride
    walls = 0 if annotated is None else size
    space = Space(
        (nz, ny, nx, stride, width),
        aligned(size, np.uint8),
        aligned(walls, np.uint8),
        np.zeros((rows, 5), dtype=np.int32),
        np.zeros((0, 4), dtype=np.int32),
        np.zeros(rows + 1, dtype=np.int64),
    )
    parts = ranges(nz, threads)
    run(_link, [(local, part, space) for part in parts])
    if annotated is not None:
        run(_wall, [(local, annotated, part, space) for part in parts])
    late = np.zeros(rows, dtype=np.int64)
    run(_find_runs, [(local, begin, part, space, late) for part in parts])
    np.cumsum(late + 1, out=space.first_run[1:])
    space = space._replace(runs=np.zeros((int(space.first_run[-1]), 4), dtype=np.int32))
    run(_find_runs, [(local, begin, part, space, late) for part in parts])
    _find_alike(space.rows, ny)
    return space
