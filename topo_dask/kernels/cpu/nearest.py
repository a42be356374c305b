"""The nearest labelled voxel, exactly: labels as runs along x, looked through row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.kernels.cpu.labels import native
from topo_dask.kernels.jit import compiled
from topo_dask.kernels.tables import FARTHEST, LabelRuns

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]


@compiled
def _runs(labels: Any, rows: Any, starts: Any, stops: Any, ids: Any) -> Any:
    """Write the runs of the labelled voxels of each row; count them where there is no room."""
    count = 0
    for z in range(labels.shape[0]):
        for y in range(labels.shape[1]):
            rows[z * labels.shape[1] + y] = count
            x = 0
            while x < labels.shape[2]:
                value = labels[z, y, x]
                first = x
                while x < labels.shape[2] and labels[z, y, x] == value:
                    x += 1
                if value != 0:
                    if starts.size:
                        starts[count], stops[count], ids[count] = first, x, value
                    count += 1
    rows[-1] = count
    return count


def label_runs(
    labels: npt.NDArray[np.integer[Any]], *, origin: Sequence[int] = (0, 0, 0)
) -> LabelRuns:
    """The labelled voxels of a box as runs along x.

    Parameters
    ----------
    labels
        ``[Z,Y,X]``, any integer type, no negative values; 0 is background.
    origin
        Global index of the first voxel.

    Examples
    --------
    >>> runs = label_runs(np.array([[[0, 7, 7, 4]]]), origin=(0, 0, 10))
    >>> runs.starts, runs.stops, runs.ids
    (array([11, 13]), array([13, 14]), array([7, 4], dtype=uint64))
    """
    labels = np.ascontiguousarray(native(labels))
    rows = np.zeros(labels.shape[0] * labels.shape[1] + 1, dtype=np.int64)
    nothing = np.zeros(0, dtype=np.int64)
    count = _runs(labels, rows, nothing, nothing, nothing.view(np.uint64))
    starts, stops = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    ids = np.zeros(count, dtype=np.uint64)
    if count:
        _runs(labels, rows, starts, stops, ids)
    z, y, x = (int(o) for o in origin)
    return LabelRuns((z, y), labels.shape[:2], rows, starts + x, stops + x, ids)


@compiled
def _away(first: int, count: int, at: int, step: int, side: int) -> Any:
    """The line ``step`` lines above or below the one nearest to ``at``, and its squared distance.

    -1 where there is no such line. Distances grow with the steps on either side.
    """
    nearest = min(max(at - first, 0), count - 1)
    line = nearest + step if side else nearest - step
    if line < 0 or line >= count or (side and step == 0):
        return -1, 0
    return line, (line + first - at) ** 2


@compiled
def _look_in_plane(point: Any, wanted: Any, plane: Any, runs: Any, known: Any) -> Any:
    """Improve (squared distance, label) of a point by the rows of one plane."""
    rows, starts, stops, ids, groups = runs
    z, dz, y0, ny = plane
    best, label = known
    for step in range(ny):
        alive = False
        for side in range(2):
            y, dy = _away(y0, ny, point[1], step, side)
            if y < 0 or dz + dy > best:
                continue
            alive = True
            row = z * ny + y
            for j in range(rows[row], rows[row + 1]):
                if groups.size and groups[j] != wanted:
                    continue
                dx = max(starts[j] - point[2], point[2] - stops[j] + 1, 0)
                total = dz + dy + dx * dx
                if total < best or (total == best and ids[j] < label):
                    best, label = total, ids[j]
        if not alive:
            break
    return best, label


@compiled
def _look(points: Any, wanted: Any, corner: Any, runs: Any, squared: Any, found: Any) -> None:
    """Improve what is known of each point; planes and rows are taken from the nearest outwards."""
    z0, y0, nz, ny = corner
    for i in range(points.shape[0]):
        group = wanted[i] if wanted.size else np.int64(0)
        for step in range(nz):
            alive = False
            for side in range(2):
                z, dz = _away(z0, nz, points[i, 0], step, side)
                if z < 0 or dz > squared[i]:
                    continue
                alive = True
                known = (squared[i], found[i])
                plane = (z, dz, y0, ny)
                squared[i], found[i] = _look_in_plane(points[i], group, plane, runs, known)
            if not alive:
                break


def nearest_labels(
    points: Int64,
    runs: LabelRuns,
    *,
    groups: Int64 | None = None,
    group_of: Int64 | None = None,
    known: tuple[Int64, UInt64] | None = None,
) -> tuple[Int64, UInt64]:
    """Squared distance and label of the labelled voxel nearest to each point.

    Of several nearest ones the smallest label counts, so what is found in one box after the
    other, each told what is known from those before, is what is found in all of them at once.

    Parameters
    ----------
    points
        int64 ``[N,3]``, global; they may lie outside the box.
    runs
        The labelled voxels of a box.
    groups, group_of
        int64 ``[N]`` and one for each run: only runs of a point's own group count.
    known
        What other boxes gave; nothing farther is looked for.

    Returns
    -------
    squared
        int64 ``[N]``, `FARTHEST` where there is nothing.
    labels
        uint64 ``[N]``, 0 where there is nothing.

    Examples
    --------
    >>> runs = label_runs(np.array([[[9, 0, 4]], [[0, 6, 0]]]))
    >>> nearest_labels(np.array([[0, 0, 1], [5, 0, 0]]), runs)
    (array([ 1, 17]), array([4, 6], dtype=uint64))
    """
    count = len(points)
    if known is None:
        squared, labels = np.full(count, FARTHEST, np.int64), np.zeros(count, np.uint64)
    else:
        squared, labels = known[0].copy(), known[1].copy()
    if count and len(runs.ids):
        nothing = np.zeros(0, dtype=np.int64)
        if groups is None or group_of is None:
            groups = group_of = nothing
        columns = (runs.rows, runs.starts, runs.stops, runs.ids, group_of)
        corner = (*runs.first, *runs.shape)
        _look(np.ascontiguousarray(points), groups, corner, columns, squared, labels)
    return squared, labels
