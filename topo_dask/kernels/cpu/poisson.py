"""The Poisson potential of all instances of an array: each is a system of its own, solved alone.

The voxels of an instance are gathered (small vectors stay in the cache), solved by conjugate
gradients with a multigrid cycle, in about as many iterations for any size, and written back: time
and memory do not depend on bounding boxes, and an instance's field does not depend on what is
around it, to the bit. The arrays are padded by one voxel that holds what is beyond the faces:
`BEYOND` as label, and as value of u a number, or NaN where nothing flows through the face.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.errors import TopoError
from topo_dask.kernels.cpu.labels import Integers, compact
from topo_dask.kernels.cpu.multigrid import (
    JOINED_HIGH,
    JOINED_LOW,
    NO_FLAGS,
    coarser_levels,
    solve,
)
from topo_dask.kernels.jit import compiled
from topo_dask.kernels.parallel import ranges, starmap

Float64 = npt.NDArray[np.float64]
Spacing = tuple[float, float, float]
Beyond = Sequence[npt.NDArray[np.floating[Any]] | None]

SOLVED = 1e-9
"""How far u may be from the exact solution, relative to it, in every voxel."""

BEYOND = -1
ALONE = 64
"""Code of a voxel that has nothing to do with any other; else a bit for each of its open sides."""

MOST_ITERATIONS = 2000
BATCHES = 16
"""Lists of instances that each thread gets, so that threads end together."""


@dataclass(frozen=True)
class _Domain:
    """An array for the solver, padded by one voxel."""

    local: npt.NDArray[np.int32]  # 0 background, 1.. instances, BEYOND outside
    field: Float64  # u; outside its value there, or NaN
    annotated: npt.NDArray[np.bool_]
    count: int
    weights: Spacing  # 1/s**2 along z, y, x

    @property
    def steps(self) -> tuple[int, ...]:
        """From a voxel to its neighbours z-, z+, y-, y+, x-, x+ in the flat arrays."""
        area, width = self.local[0].size, self.local.shape[2]
        return (-area, area, -width, width, -1, 1)


def _faces(field: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Views of the padding beyond the faces z-, z+, y-, y+, x-, x+, without edges."""
    views = []
    for axis in range(3):
        for end in (0, -1):
            at: list[Any] = [slice(1, -1)] * 3
            at[axis] = end
            views.append(field[tuple(at)])
    return views


def _domain(
    labels: Integers,
    spatial_mask: npt.NDArray[Any] | None,
    spacing: Spacing,
    beyond: Beyond | None,
    start: Float64 | None = None,
) -> _Domain:
    local, ids = compact(labels, pad=1)
    field = np.zeros(local.shape)
    for number, face in enumerate(_faces(local)):
        face[...] = BEYOND
        given = None if beyond is None else beyond[number]
        _faces(field)[number][...] = np.nan if given is None else given
    if start is not None:
        field[1:-1, 1:-1, 1:-1] = start
    annotated = np.ones(local.shape, dtype=np.bool_)
    if spatial_mask is not None:
        annotated[1:-1, 1:-1, 1:-1] = spatial_mask > 0.5
    z, y, x = (float(s) ** -2 for s in spacing)
    return _Domain(local, field, annotated, ids.size, (z, y, x))


@compiled
def _gather(local: Any, count: int, voxels: Any, place: Any) -> Any:
    """Sort the voxels by instance; ``place`` gets each one's number in its instance.

    Gives where each instance begins in ``voxels``, ``[count + 2]``.
    """
    start = np.zeros(count + 2, np.int64)
    for i in range(local.size):
        if local[i] > 0:
            start[local[i] + 1] += 1
    for k in range(count + 1):
        start[k + 1] += start[k]
    following = start.copy()
    for i in range(local.size):
        k = local[i]
        if k > 0:
            at = following[k]
            following[k] = at + 1
            voxels[at] = i
            place[i] = at - start[k]
    return start


@compiled
def _assemble(mine: Any, grid: Any, steps: Any, weights: Any, system: Any) -> Any:
    """Fill in the links, walls and right side of one instance.

    ``flags`` get a bit for each side that is not closed, and whether the voxels before and after
    are neighbours. Gives whether a side is closed, and how far apart the numbers of linked voxels
    are.
    """
    local, place, annotated, field = grid
    near, flags, wall, right, u = system
    nodes = mine.size
    number = local[mine[0]]
    closed, reach = False, 1
    for i in range(nodes):
        at = mine[i]
        u[i] = field[at]
        walls, source, opened, joined = 0.0, 1.0, 63, 0
        for d in range(6):
            j = at + steps[d]
            other = local[j]
            if other == number:
                if d < 4:
                    near[i, d] = place[j]
                    reach = max(reach, place[j] - i)
                else:
                    joined |= JOINED_LOW if d == 4 else JOINED_HIGH
                continue
            if d < 4:
                near[i, d] = nodes
            if other == BEYOND:
                if np.isnan(field[j]):
                    opened -= 1 << d
                else:
                    walls += weights[d >> 1]
                    source += weights[d >> 1] * field[j]
            elif not annotated[j]:
                opened -= 1 << d
            else:
                walls += weights[d >> 1]
        wall[i], right[i], flags[i] = walls, source, opened | joined
        closed |= opened != 63
    return closed, reach


@compiled
def _beside(near: Any, flags: Any, i: int, d: int) -> Any:
    """The neighbour z-, z+, y-, y+, x-, x+ of a voxel; as many as there are where it has none."""
    if d < 4:
        return np.int64(near[i, d])
    if d == 4:
        return i - 1 if flags[i] & JOINED_LOW else flags.size
    return i + 1 if flags[i] & JOINED_HIGH else flags.size


@compiled
def _reach(near: Any, flags: Any, wall: Any, reached: Any) -> int:
    """Mark the voxels that links join to a wall; give how many there are."""
    nodes = wall.size
    count = 0
    for i in range(nodes):
        before = reached[near[i, 0]] or reached[near[i, 2]] or reached[_beside(near, flags, i, 4)]
        reached[i] = wall[i] > 0 or before
    for i in range(nodes - 1, -1, -1):
        after = reached[near[i, 1]] or reached[near[i, 3]] or reached[_beside(near, flags, i, 5)]
        reached[i] = reached[i] or after
        count += reached[i]
    if count == nodes:
        return count
    stack = np.empty(nodes, np.int64)  # the two passes see no path with several bends
    height = 0
    for i in range(nodes):
        if reached[i]:
            stack[height] = i
            height += 1
    while height > 0:
        height -= 1
        i = stack[height]
        for d in range(6):
            j = _beside(near, flags, i, d)
            if j != nodes and not reached[j]:
                reached[j] = True
                count += 1
                stack[height] = j
                height += 1
    return count


@compiled
def _take_out_closed_pieces(system: Any) -> None:
    """Pieces that touch no wall have no solution: make each of their voxels u = 0 by itself."""
    near, flags, wall, right, u = system
    nodes = wall.size
    reached = np.zeros(nodes + 1, np.bool_)
    if _reach(near, flags, wall, reached) == nodes:
        return
    for i in range(nodes):
        if not reached[i]:
            near[i] = nodes
            flags[i], wall[i], right[i], u[i] = ALONE, 1.0, 0.0, 0.0


@compiled
def _rows(mine: Any, rows: int, width: int) -> Any:
    """First node, z and y of each row of an instance, and x of its nodes, from its corner on."""
    first = np.empty(mine.size + 1, np.int64)
    zs, ys = np.empty(mine.size, np.int64), np.empty(mine.size, np.int64)
    xs = np.empty(mine.size, np.int64)
    count = 0
    end = np.int64(-1)  # of the row in the flat array
    for i in range(mine.size):
        if mine[i] >= end:
            row = mine[i] // width
            end = (row + 1) * width
            first[count], zs[count], ys[count] = i, row // rows, row % rows
            count += 1
        xs[i] = mine[i] + width - end
    first[count] = mine.size
    zs, ys = zs[:count] - zs[0], ys[:count] - ys[:count].min()
    return first[: count + 1].copy(), zs, ys, xs - xs.min()


@compiled
def _diagonals(weights: Any) -> Any:
    """The diagonal of the matrix for each code of open sides."""
    diagonal = np.ones(ALONE + 1)
    for code in range(1, ALONE):
        diagonal[code] = 0.0
        for d in range(6):
            diagonal[code] += weights[d >> 1] * ((code >> d) & 1)
    return diagonal


@compiled
def _solve_instances(
    numbers: Any, sorted_voxels: Any, grid: Any, shape: Any, steps: Any, how: Any, taken: Any
) -> None:
    """Solve the instances with these numbers one by one; ``taken`` gets their iterations."""
    starts, voxels = sorted_voxels
    weights, lengths, tolerance, most = how
    field = grid[3]
    wz, wy, wx = weights
    unit = max(wz, wy, wx)  # the cycle's weights are of a size for float32
    links = np.array([[wz, wz, wy, wy, wx, wx]]) / unit
    rough = np.float32(wz / unit), np.float32(wy / unit), np.float32(wx / unit)
    exact = _diagonals(weights), weights
    inverse = (unit / exact[0]).astype(np.float32)
    for number in numbers:
        mine = voxels[starts[number] : starts[number + 1]]
        nodes = mine.size
        near, flags = np.empty((nodes, 4), np.uint32), np.empty(nodes, np.uint16)
        wall, right, u = np.empty(nodes), np.empty(nodes), np.zeros(nodes + 1)
        system = (near, flags, wall, right, u)
        closed, reach = _assemble(mine, grid, steps, weights, system)
        if closed:
            _take_out_closed_pieces(system)
        rows = _rows(mine, shape[1], shape[2])
        diagonal = np.empty(nodes)
        for i in range(nodes):
            diagonal[i] = exact[0][flags[i] & NO_FLAGS] / unit
            wall[i] /= unit
        parent, levels = coarser_levels((near, flags), links, wall, diagonal, (*rows, lengths))
        solver = (near, flags, exact, (inverse, rough), reach, parent)
        taken[number] = solve(solver, levels, u, right, tolerance, most)
        for i in range(nodes):
            field[mine[i]] = u[i]


def _shares(sizes: npt.NDArray[np.int64], batches: int) -> list[npt.NDArray[np.int64]]:
    """Cut the instances 1.. into lists, the largest instances first and alone."""
    order = np.argsort(-sizes, kind="stable")
    ends = np.cumsum(sizes[order]) * batches // max(1, int(sizes.sum()))
    cuts = np.flatnonzero(np.diff(ends)) + 1
    return np.split(order + 1, cuts)


def _solve(domain: _Domain, spacing: Spacing, tolerance: float, threads: int) -> None:
    """Overwrite ``domain.field`` inside instances with the solution."""
    flat = domain.local.ravel()
    kind = np.int32 if flat.size < 2**31 else np.int64
    voxels = np.empty(np.count_nonzero(flat > 0), kind)
    place = np.empty(flat.size, kind)
    starts = _gather(flat, domain.count, voxels, place)
    grid = (flat, place, domain.annotated.ravel(), domain.field.ravel())
    how = (domain.weights, np.array(spacing, np.float64), tolerance, MOST_ITERATIONS)
    taken = np.zeros(domain.count + 1, dtype=np.int64)
    common = ((starts, voxels), grid, domain.local.shape, domain.steps, how, taken)
    with starmap(threads) as run:
        shares = _shares(np.diff(starts)[1:], BATCHES * threads)
        run(_solve_instances, [(share, *common) for share in shares if share.size])
    if (taken > MOST_ITERATIONS).any():
        raise TopoError(
            "tolerance",
            f"{tolerance}, not reached in {MOST_ITERATIONS} iterations",
            "a tolerance that float64 can reach",
            "Choose a larger one.",
        )


@compiled
def _derive_row(out: Any, labels: Any, values: Any, annotated: Any, how: Any) -> None:
    """Twice the derivative along an axis in a row, from the row itself and those on either side.

    Without branches, so that it is vectorised. A side where nothing flows is NaN for a moment.
    """
    here, low, high = labels
    u, u_low, u_high = values
    open_low, open_high = annotated
    tolerance, scale = how
    for i in range(out.size):
        own_low = (low[i] == here[i]) | (low[i] == BEYOND)
        own_high = (high[i] == here[i]) | (high[i] == BEYOND)
        before = u_low[i] if own_low else (0.0 if open_low[i] else np.nan)
        after = u_high[i] if own_high else (0.0 if open_high[i] else np.nan)
        closed_low = np.isnan(before)
        closed_high = np.isnan(after)
        before = u[i] if closed_low else before
        after = u[i] if closed_high else after
        change = after - before
        sure = abs(change) > tolerance * (after + before)
        change *= 2 * scale if closed_low | closed_high else scale
        out[i] = change if sure else 0.0


@compiled
def _write_flow(
    planes: Any, core: Any, grid: Any, shape: Any, spacing: Any, tolerance: float, flow: Any
) -> None:
    """Write the unit vectors of some planes of the core."""
    local, annotated, field = grid
    steps = (shape[1] * shape[2], shape[2], 1)
    size = flow.shape[3]
    changes = np.empty((3, size))
    for z in range(planes[0], planes[1]):
        for y in range(flow.shape[2]):
            a = ((z + core[0] + 1) * shape[1] + y + core[1] + 1) * shape[2] + core[2] + 1
            b = a + size
            here = local[a:b]
            for axis in range(3):
                s = steps[axis]
                labels = here, local[a - s : b - s], local[a + s : b + s]
                values = field[a:b], field[a - s : b - s], field[a + s : b + s]
                near = annotated[a - s : b - s], annotated[a + s : b + s]
                _derive_row(changes[axis], labels, values, near, (tolerance, 1 / spacing[axis]))
            for x in range(size):
                norm = changes[0, x] ** 2 + changes[1, x] ** 2 + changes[2, x] ** 2
                unit = 1 / np.sqrt(norm) if norm > 0 and here[x] > 0 else 0.0
                flow[0, z, y, x] = changes[0, x] * unit
                flow[1, z, y, x] = changes[1, x] * unit
                flow[2, z, y, x] = changes[2, x] * unit


def _flow(
    domain: _Domain,
    spacing: Spacing,
    core: tuple[slice, ...] | None,
    tolerance: float,
    threads: int,
) -> npt.NDArray[np.float32]:
    shape = tuple(n - 2 for n in domain.local.shape)
    box = [s.indices(n)[:2] for s, n in zip(core or (slice(None),) * 3, shape, strict=True)]
    first, size = tuple(a for a, _ in box), tuple(max(0, b - a) for a, b in box)
    flow = np.zeros((3, *size), dtype=np.float32)
    grid = (domain.local.ravel(), domain.annotated.ravel(), domain.field.ravel())
    lengths = tuple(float(s) for s in spacing)
    common = (first, grid, domain.local.shape, lengths, tolerance, flow)
    with starmap(threads) as run:
        run(_write_flow, [(planes, *common) for planes in ranges(size[0], threads)])
    return flow


def poisson_potential(
    labels: Integers,
    *,
    spatial_mask: npt.NDArray[Any] | None = None,
    spacing: Spacing = (1.0, 1.0, 1.0),
    start: Float64 | None = None,
    beyond: Beyond | None = None,
    tolerance: float = SOLVED,
    threads: int = 1,
) -> Float64:
    """Solve the Poisson equation inside every instance of an array.

    For each voxel v of an instance

        sum over the six neighbours w of (u(v) - u(w)) / s**2 = 1,

    s being the spacing along the axis of w, and u(w) = 0 where w is not of the same instance: the
    discrete form of div grad u = -1 inside, u = 0 on the border. A neighbour where nothing flows
    (beyond a face of the array; unannotated and not of the same instance) counts u(v). A piece of
    an instance that touches no border at all, and so has no solution, gets 0.

    No residual exceeds ``tolerance``; since the right side is at least 1 and the inverse matrix
    has no negative entry, neither does the error of u, relative to u, in any voxel.

    Parameters
    ----------
    labels
        ``[Z,Y,X]``, any integer type; 0 is background. Those not of interest may be set to 0.
    spatial_mask
        ``[Z,Y,X]``, 1 where annotated.
    spacing
        Distance of voxels along z, y, x, in any unit.
    start
        ``[Z,Y,X]``: a guess of u, which saves iterations where it is good.
    beyond
        What is beyond the faces z-, z+, y-, y+, x-, x+ of the array, where it was cut out of a
        volume: for each face ``None``, no flux, or u there, of the face's shape: 0 in voxels
        that are not of the instance that the voxel inside is of, NaN where nothing flows.
    tolerance
        See above.
    threads
        Threads to use (one for each instance); the result is the same to the bit.

    Returns
    -------
    float64 ``[Z,Y,X]``, in squares of the unit of the spacing, 0 in the background.

    Notes
    -----
    Source: Gorelick, Galun, Sharon, Basri & Brandt (2006), Shape representation and classification
    using the Poisson equation, IEEE TPAMI 28, 1991, eq. 1 and its multigrid solver.

    Examples
    --------
    >>> poisson_potential(np.array([[[0, 5, 5, 5, 0]]]))[0, 0]
    array([0. , 1.5, 2. , 1.5, 0. ])
    """
    domain = _domain(labels, spatial_mask, spacing, beyond, start)
    domain.field[1:-1, 1:-1, 1:-1][domain.local[1:-1, 1:-1, 1:-1] == 0] = 0
    _solve(domain, spacing, tolerance, threads)
    return np.ascontiguousarray(domain.field[1:-1, 1:-1, 1:-1])


def flow_of_potential(
    labels: Integers,
    potential: Float64,
    *,
    core: tuple[slice, ...] | None = None,
    spatial_mask: npt.NDArray[Any] | None = None,
    spacing: Spacing = (1.0, 1.0, 1.0),
    beyond: Beyond | None = None,
    tolerance: float = SOLVED,
    threads: int = 1,
) -> npt.NDArray[np.float32]:
    """Unit vectors up the gradient of a potential, by central differences.

    A neighbour that is not of the same instance counts 0; where nothing flows the difference is
    one-sided, and 0 where both sides are closed. A difference that the error of ``potential``
    can make of nothing counts 0; any other is stretched, however small.

    Parameters
    ----------
    labels, spatial_mask, spacing, beyond, tolerance
        As for `poisson_potential`, which made the potential.
    potential
        ``[Z,Y,X]``, not negative.
    core
        Slices of the part to return; ``None`` for all.
    threads
        Threads to use.

    Returns
    -------
    float32 ``[3, *core shape]``: ``(dz,dy,dx)`` inside instances, 0 outside.

    Examples
    --------
    >>> labels = np.array([[[0, 5, 5, 5, 0]]])
    >>> flow_of_potential(labels, poisson_potential(labels))[2, 0, 0]
    array([ 0.,  1.,  0., -1.,  0.], dtype=float32)
    """
    domain = _domain(labels, spatial_mask, spacing, beyond, potential)
    return _flow(domain, spacing, core, tolerance, threads)


def poisson_flow(
    labels: Integers,
    *,
    core: tuple[slice, ...] | None = None,
    spatial_mask: npt.NDArray[Any] | None = None,
    spacing: Spacing = (1.0, 1.0, 1.0),
    beyond: Beyond | None = None,
    tolerance: float = SOLVED,
    threads: int = 1,
) -> npt.NDArray[np.float32]:
    """`flow_of_potential` of the `poisson_potential` of an array.

    Examples
    --------
    >>> poisson_flow(np.array([[[0, 5, 5, 5, 0]]]))[2, 0, 0]
    array([ 0.,  1.,  0., -1.,  0.], dtype=float32)
    """
    domain = _domain(labels, spatial_mask, spacing, beyond)
    _solve(domain, spacing, tolerance, threads)
    return _flow(domain, spacing, core, tolerance, threads)
