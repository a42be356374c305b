"""Long diffusions in few sweeps: the power A^n as a short sum of Chebyshev polynomials of A.

One iteration multiplies a field by the matrix A of the sweep, which is symmetric with eigenvalues
in [-1, 1]. With S the place of a random walk on the line after N steps,

    A^N = sum over k >= 0 of c_k T_k(A),    c_k = P(|S| = k),

because x^N = (e^it + e^-it)^N / 2^N for x = cos t. Few walks go farther than sqrt(N), so the sum
may end at a degree d of a few times that. As T_k(A) makes no field longer (in the sum of squares),
what is left out of a field u is at most P(|S| > d) times the length of u.

The recurrence is that of the second kind, U_k = 2 A U_(k-1) - U_(k-2) with U_0 = 1 and U_-1 = 0,
and T_k = (U_k - U_(k-2)) / 2: it rounds less than that of the first kind.

Sums of large terms that cancel leave rounding errors that do not fade where the field does. They
are rough, and what is rough a few plain iterations smooth. So n is cut into N, even, and a rest of
plain iterations; instances that gain nothing have only a rest.

Source: Varopoulos, Long range estimates for Markov chains (1985); Carne, A transmutation formula
for Markov chains (1985).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from topo_dask.kernels.cpu.diffusion import TINY, Domain, domain_of, weights_of
from topo_dask.kernels.cpu.labels import Integers
from topo_dask.kernels.cpu.rows import (
    PLANES,
    add_planes,
    add_rows,
    add_walled_rows,
    aligned,
    recur_planes,
    recur_rows,
    recur_walled_rows,
)
from topo_dask.kernels.cpu.space import NEVER, beside, write_images
from topo_dask.kernels.cpu.sweep import (
    FAR,
    STEPS_PER_PASS,
    Layout,
    strip_of,
    wait_for_pass,
)
from topo_dask.kernels.cpu.turns import counters, reach
from topo_dask.kernels.jit import compiled
from topo_dask.kernels.parallel import Starmap, ranges, starmap

POINT = 400
"""Binary places of probabilities while they are worked out."""


@lru_cache(maxsize=4096)
def walk_ends(steps: int, tail_bits: int) -> tuple[float, ...]:
    """Where a random walk on the line ends: the coefficients c_0, c_2, ... c_d of an even power.

    Parameters
    ----------
    steps
        N, even.
    tail_bits
        b: the least d is taken with P(|S| > d) <= 2^-b; at most 300.

    Returns
    -------
    tuple of float
        d/2 + 1 probabilities, each rounded once: they are the same on every machine.

    Examples
    --------
    >>> walk_ends(4, 300)  # x^4 = 3/8 + 1/2 T_2(x) + 1/8 T_4(x)
    (0.375, 0.5, 0.125)
    """
    one = 1 << POINT
    each = one
    for i in range(1, steps // 2 + 1):
        each = each * (2 * i - 1) // (2 * i)
    found, left = [each], one - each
    for k in range(0, steps, 2):
        if left << tail_bits <= one:
            break
        each = each * (steps - k) // (steps + k + 2)
        found.append(2 * each)
        left -= 2 * each
    return tuple(value / one for value in found)


def degree_of(steps: int, tail_bits: int) -> int:
    """The degree d of `walk_ends`.

    Examples
    --------
    >>> degree_of(2000, 60)
    394
    """
    return 2 * (len(walk_ends(steps, tail_bits)) - 1)


def second_kind(ends: tuple[float, ...]) -> npt.NDArray[np.float64]:
    """The same sum by the polynomials of the second kind, U_0, U_2, ... U_d.

    Examples
    --------
    >>> second_kind((0.375, 0.5, 0.125))  # T_2 = (U_2 - U_0)/2, T_4 = (U_4 - U_2)/2
    array([0.125 , 0.1875, 0.0625])
    """
    first = np.array([2 * ends[0], *ends[1:], 0.0])
    halves: npt.NDArray[np.float64] = (first[:-1] - first[1:]) / 2
    return halves


class Sums(NamedTuple):
    """What a field of the recurrence has besides its two last terms."""

    total: Any  # float64, flat, padded
    kinds: Any  # int32 a voxel, padded: which factors are its own
    factors: Any  # float64, flat: by half the degree, then by kind
    kind_count: int
    last: Any  # int32 a row: the largest degree of its instances; -1: none is of interest


@compiled
def _recur_rows(new: Any, old: Any, space: Any, sums: Any, at: Any, weights: Any) -> None:
    """Bring some rows of a plane to a degree."""
    plane, first, end, degree = at
    grid, ny, width = space.grid, space.grid[1], space.grid[4]
    links, walls, rows = space.links, space.walls, space.rows
    total, kinds, factors, last = sums.total, sums.kinds, sums.factors, sums.last
    y = first
    while y < end:
        row = plane * ny + y
        if last[row] < degree:
            y += 1
            continue
        low, high = np.int64(rows[row, 1]), np.int64(rows[row, 2])
        walled = walls.size and rows[row, 3]
        count, most = np.int64(1), min(np.int64(rows[row, 4]), end - y)
        while count < most and last[row + count] >= degree:
            count += 1
        offsets = (*beside(grid, plane, plane, y), degree // 2 * sums.kind_count)
        alike = count, width, low, high
        if degree % 2 and walled:
            recur_walled_rows(new, old, links, walls, offsets, alike, weights)
        elif degree % 2:
            recur_rows(new, old, links, walls, offsets, alike, weights)
        elif walled:
            add_walled_rows(new, old, links, walls, total, kinds, factors, offsets, alike, weights)
        else:
            add_rows(new, old, links, walls, total, kinds, factors, offsets, alike, weights)
        write_images(new, grid, plane, plane, y, count)
        y += count


@compiled
def _recur_planes(new: Any, old: Any, space: Any, sums: Any, at: Any, weights: Any) -> None:
    """Bring some rows of `PLANES` planes to a degree, together where all of them go so far."""
    plane, first, end, degree = at
    grid, ny, width = space.grid, space.grid[1], space.grid[4]
    links, walls, rows = space.links, space.walls, space.rows
    total, kinds, factors, last = sums.total, sums.kinds, sums.factors, sums.last
    y = first
    while y < end:
        count, low, high, together = end - y, np.int64(width), np.int64(0), True
        for row in range(plane * ny + y, (plane + PLANES) * ny + y, ny):
            alike = np.int64(0)
            while alike < min(count, np.int64(rows[row, 4])) and last[row + alike] >= degree:
                alike += 1
            together &= bool(alike > 0) and not rows[row, 3]
            count = min(count, max(alike, np.int64(1)))
            low, high = min(low, np.int64(rows[row, 1])), max(high, np.int64(rows[row, 2]))
        if together:
            top = plane + PLANES - 1
            offsets = (*beside(grid, plane, top, y), degree // 2 * sums.kind_count)
            these = count, width, low, high
            if degree % 2:
                recur_planes(new, old, links, walls, offsets, these, weights)
            else:
                add_planes(new, old, links, walls, total, kinds, factors, offsets, these, weights)
            write_images(new, grid, plane, top, y, count)
        else:
            for one in range(plane, plane + PLANES):
                _recur_rows(new, old, space, sums, (one, y, y + count, degree), weights)
        y += count


@compiled
def _recur_pass(
    pair: Any, space: Any, sums: Any, weights: Any, degrees: Any, strip: int, turn: Any, counts: Any
) -> None:
    """Make one pass from a degree to another; ``turn`` is as of the passes of plain sweeps."""
    nz, ny = space.grid[0], space.grid[1]
    even, odd = pair
    thread, done, before, from_there = turn
    fronts = -(-(nz + STEPS_PER_PASS - 1) // PLANES)
    strips = -(-(ny + STEPS_PER_PASS - 1) // strip)
    for number in range(strips):
        top = number * strip
        for front in range(fronts):
            wait_for_pass(counts, before, from_there, (number, strips, front, fronts))
            for step in range(degrees[1] - degrees[0]):
                plane = front * PLANES - step
                low, high = max(0, top - step), min(ny, top + strip - step)
                degree = degrees[0] + step + 1
                if step % 2 == 0:
                    old, new = even, odd
                else:
                    old, new = odd, even
                if plane >= 0 and plane + PLANES <= nz:
                    at = (plane, low, high, degree)
                    _recur_planes(new, old, space, sums, at, weights)
                else:
                    for one in range(max(plane, 0), min(plane + PLANES, nz)):
                        _recur_rows(new, old, space, sums, (one, low, high, degree), weights)
            reach(counts, thread, done + number * fronts + front + 1)


@compiled
def _recur(
    pair: Any, space: Any, sums: Any, weights: Any, degree: int, turns: Any, counts: Any
) -> None:
    """Make every pass whose turn a thread has, as plain sweeps do; see there."""
    thread, threads = turns
    ny, width = space.grid[1], space.grid[4]
    row_bytes = 3 * (STEPS_PER_PASS + 2) * width * pair[0].itemsize
    strip = strip_of(row_bytes, ny, threads)
    for turn in range(thread, -(-degree // STEPS_PER_PASS), threads):
        here = turn * STEPS_PER_PASS
        before = (turn - 1) % threads if turn > 0 else -1
        order = (thread, turn * FAR, before, (turn - 1) * FAR)
        degrees = here, min(here + STEPS_PER_PASS, degree)
        _recur_pass(pair, space, sums, weights, degrees, strip, order, counts)


@compiled
def _begin(pair: Any, local: Any, sums: Any, space: Any, start: Any, planes: Any) -> None:
    """Write U_0 u, which is the coordinate along an axis, U_-1 u = 0, and the sum so far."""
    (even, odd), (of_number, axis, origin) = pair, start
    total, factors = sums.total, sums.factors
    _, ny, nx, stride, width = space.grid
    for z in range(planes[0], planes[1]):
        for y in range(ny):
            here = z * stride + y * width
            for x in range(width):
                at = here + x
                k = local[z, y, x] if x < nx else 0
                value = 0.0
                if k != 0 and of_number[k] >= 0:
                    value = np.float64((z, y, x)[axis] + origin)
                    total[at] = factors[of_number[k]] * value
                else:
                    total[at] = 0.0
                even[at], odd[at] = value, 0.0
            if nx < width:
                even[here + nx] = even[here + nx - 1]


@compiled
def _find_kinds(
    local: Any, of_number: Any, degrees: Any, sums: Any, grid: Any, planes: Any
) -> None:
    """Write the kind of each voxel and the largest degree of each row."""
    _, ny, nx, stride, width = grid
    kinds, last = sums.kinds, sums.last
    for z in range(planes[0], planes[1]):
        for y in range(ny):
            here, most = z * stride + y * width, np.int32(-1)
            for x in range(nx):
                kind = of_number[local[z, y, x]]
                kinds[here + x] = max(kind, np.int32(0))
                if kind >= 0:
                    most = max(most, degrees[kind])
            for x in range(nx, width):
                kinds[here + x] = 0
            last[z * ny + y] = most


def _sums_of(
    domain: Domain,
    powers: npt.NDArray[np.int64],
    bits: npt.NDArray[np.int64],
    run: Starmap,
    threads: int,
) -> tuple[Sums, npt.NDArray[np.int32], int]:
    """The factors of every kind of instance; the kind by number, -1 if of no interest; the degree.

    ``powers`` and ``bits`` are by number of instance: N, and the bits of `walk_ends`.
    """
    layout = domain.layout
    grid = layout.space.grid
    pairs, which = np.unique(np.stack((powers, bits), axis=1), axis=0, return_inverse=True)
    terms = [second_kind(walk_ends(*pair)) for pair in pairs.tolist()]
    factors = np.zeros((max(map(len, terms)), len(terms)))
    for kind, own in enumerate(terms):
        factors[: len(own), kind] = own
    degrees = np.array([2 * (len(own) - 1) for own in terms], dtype=np.int32)
    of_number = np.where(layout.begin == NEVER, -1, which.ravel()).astype(np.int32)
    size = layout.space.links.size
    sums = Sums(
        aligned(size, np.float64),
        aligned(size, np.int32),
        factors.ravel(),
        len(terms),
        np.empty(grid[0] * grid[1], dtype=np.int32),
    )
    parts = ranges(grid[0], threads)
    common = (layout.local, of_number, degrees, sums, grid)
    run(_find_kinds, [(*common, part) for part in parts])
    return sums, of_number, int(degrees[of_number[of_number >= 0]].max(initial=0))


def _raise(
    layout: Layout,
    pair: tuple[Any, Any],
    sums: Sums,
    degree: int,
    weights: tuple[float, ...],
    run: Starmap,
) -> None:
    """Bring a field, begun in ``pair[0]``, to a degree; what matters is the sum."""
    threads = layout.threads
    twice = (2 * weights[0], 2 * weights[1], 2 * weights[2])
    common = (pair, layout.space, sums, twice, degree)
    counts = counters(threads)
    run(_recur, [(*common, (thread, threads), counts) for thread in range(threads)])


def chebyshev_flow(
    labels: Integers,
    *,
    ids: npt.NDArray[np.uint64],
    iterations: npt.NDArray[np.int64],
    powers: npt.NDArray[np.int64],
    tail_bits: npt.NDArray[np.int64],
    origin: tuple[int, ...] = (0, 0, 0),
    core: tuple[slice, ...] | None = None,
    spatial_mask: npt.NDArray[Any] | None = None,
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
    threads: int = 1,
) -> npt.NDArray[np.float32]:
    """`diffusion_flow` of coordinates with most of the iterations as sums of Chebyshev polynomials.

    Parameters
    ----------
    labels, ids, iterations, origin, core, spatial_mask, spacing, threads
        See `diffusion_flow`. As much context as degree and rest together, and one voxel more,
        makes the core exact to the bit.
    powers
        N of each instance, even: so many of its iterations are made by a sum; 0: none.
    tail_bits
        b of each instance: coordinates of absolute value s in V voxels give fields that are
        within 2^-b s sqrt(V) of those of plain iteration, but for rounding.

    Returns
    -------
    float32 ``[3, *core shape]``: unit vectors ``(dz,dy,dx)`` inside instances, 0 outside.

    Examples
    --------
    >>> labels = np.array([[[0, 5, 5, 5, 0]]])
    >>> facts = {"ids": np.array([5], np.uint64), "iterations": np.array([10])}
    >>> facts |= {"powers": np.array([6]), "tail_bits": np.array([60])}
    >>> chebyshev_flow(labels, **facts)[2, 0, 0].round(3)
    array([ 0.,  1.,  1., -1.,  0.], dtype=float32)
    """
    weights = weights_of(spacing)
    rest = np.asarray(iterations, dtype=np.int64) - powers
    with starmap(threads) as run:
        domain = domain_of(labels, spatial_mask, core, ids, rest, run, threads)
        layout = domain.layout
        size, nz = layout.space.links.size, layout.space.grid[0]
        sums, of_number, degree = _sums_of(
            domain, domain.by_number(powers), domain.by_number(tail_bits), run, threads
        )
        memory = aligned(max(2 * size, layout.memory_size), np.float64)
        pair = memory[:size], memory[size : 2 * size]
        fields: list[npt.NDArray[Any]] = [np.zeros(0)]  # no indicator
        for axis in range(3):
            start = (of_number, axis, origin[axis])
            common = (pair, layout.local, sums, layout.space, start)
            run(_begin, [(*common, part) for part in ranges(nz, threads)])
            _raise(layout, pair, sums, degree, weights, run)
            field = layout.begun(sums.total, memory, run, threads)
            (field,) = layout.advance((field,), (0, layout.total), weights, run)
            sums.total[...] = field.values  # its memory is used again
            fields.append(sums.total)
            if axis < 2:
                sums = sums._replace(total=aligned(size, np.float64))
        factors = np.ones((len(domain.rows) + 1, 6))
        return domain.flow(fields, factors, TINY, run, threads)
