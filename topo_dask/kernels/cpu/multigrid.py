"""Conjugate gradients with a multigrid cycle, for one system of nodes on a lattice.

A node is a voxel, or on coarser levels what one object has in a box of 2x2x2 nodes, so that a
node has at most one neighbour in each of six directions, and touching objects never mix. Nodes
are numbered in C order. Boxes lie relative to the object's own bounding box, and all sums run in
the order of the nodes: the same object gives the same bits wherever it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from topo_dask.kernels.jit import compiled

LONE = 3.0
"""A node whose walls weigh this many times its links is left to the smoother: no box helps it."""

FARTHER = 0.5
"""Weight of a link between boxes over the sum of the links it is made of: centres lie 2 apart."""

WALL_FARTHER = 0.8
"""The same for walls, nearer than other boxes; by trial: the fewest iterations on tissue."""

CHUNK = 1024
"""Nodes between which a sweep lets the next one catch up."""

NOWHERE = np.uint32(2**32 - 1)


@compiled
def _join_rows(spans: Any, xs: Any, lone: Any, halved: int, places: Any, made: Any) -> Any:
    """Number the boxes of up to four rows of nodes from ``made[0]`` on.

    ``spans [4,3]`` are the first node of each row, the end, and the row's side of its box. Writes
    each node's box and side into ``places`` and each box's x into ``made[1:]``.
    """
    parent, side = places
    count = made[0]
    while True:
        lowest = np.int64(-1)
        for s in range(4):
            at, end = spans[s, 0], spans[s, 1]
            while at < end and lone[at]:
                at += 1
            spans[s, 0] = at
            if at < end and (lowest < 0 or xs[at] >> halved < lowest):
                lowest = xs[at] >> halved
        if lowest < 0:
            return count
        for s in range(4):
            at, end = spans[s, 0], spans[s, 1]
            while at < end and xs[at] >> halved == lowest:
                if not lone[at]:
                    parent[at] = count
                    side[at] = spans[s, 2] | (xs[at] & 1) << 2
                at += 1
            spans[s, 0] = at
        count += 1
        made[count] = lowest


@compiled
def _boxes(rows: Any, xs: Any, lone: Any, halved: Any, places: Any) -> Any:
    """Put the nodes of a level into boxes; give the rows and the x of the boxes.

    ``rows`` are (first node of each row and the end, z, y), ``halved`` 1 for each axis along which
    two nodes come into a box, else 0.
    """
    first, zs, ys = rows
    made = np.empty(xs.size + 1, np.int64)
    coarse_first = np.empty(first.size, np.int64)
    coarse_z, coarse_y = np.empty(zs.size, np.int64), np.empty(zs.size, np.int64)
    spans = np.zeros((4, 3), np.int64)
    count, number, row = 0, 0, 0
    while row < zs.size:
        z = zs[row] >> halved[0]
        middle = row
        while middle < zs.size and zs[middle] == zs[row]:
            middle += 1
        end = middle
        while end < zs.size and zs[end] >> halved[0] == z:
            end += 1
        low, high = row, middle
        while low < middle or high < end:
            y = ys[low] >> halved[1] if low < middle else ys[high] >> halved[1]
            if low < middle and high < end:
                y = min(y, ys[high] >> halved[1])
            spans[:] = 0
            used = 0
            while low < middle and ys[low] >> halved[1] == y:
                spans[used] = first[low], first[low + 1], (zs[low] & 1) | (ys[low] & 1) << 1
                used, low = used + 1, low + 1
            while high < end and ys[high] >> halved[1] == y:
                spans[used] = first[high], first[high + 1], (zs[high] & 1) | (ys[high] & 1) << 1
                used, high = used + 1, high + 1
            made[0] = count
            before = count
            count = _join_rows(spans, xs, lone, halved[2], places, made)
            if count > before:
                coarse_first[number] = before
                coarse_z[number], coarse_y[number] = z, y
                number += 1
        row = end
    coarse_first[number] = count
    coarse = coarse_first[: number + 1].copy(), coarse_z[:number].copy(), coarse_y[:number].copy()
    return coarse, made[1 : count + 1].copy()


@compiled
def _coarse_system(level: Any, parent: Any, count: int, halved: Any) -> Any:
    """Sum the links and walls of the nodes of each box; links inside a box are gone.

    Replaces ``NOWHERE`` in ``parent`` by ``count``. To the boxes, nodes without one are wall.
    The weights of ``level`` have a row for each node, or one for all. Gives the system of the
    boxes, and the boxes between which to interpolate: the neighbours, but the box itself where
    nothing flows through its side, and beyond both sides of an axis that is not halved.
    """
    near, weight, wall, closed = level
    nodes = near.shape[0]
    row = 1 if weight.shape[0] == nodes else 0
    for i in range(nodes):
        parent[i] = min(parent[i], np.uint32(count))
    coarse_near = np.full((count, 6), np.uint32(count), np.uint32)
    coarse_weight = np.zeros((count, 6))
    coarse_wall = np.zeros(count)
    coarse_closed = np.zeros(count, np.uint8)
    for i in range(nodes):
        a = parent[i]
        if a == count:
            continue
        for d in range(6):
            j = near[i, d]
            if j == nodes or parent[j] == a:
                continue
            here = weight[row * i, d] * FARTHER if halved[d >> 1] else weight[row * i, d]
            if parent[j] == count:
                coarse_wall[a] += here
            else:
                coarse_near[a, d] = parent[j]
                coarse_weight[a, d] += here
        coarse_wall[a] += WALL_FARTHER * wall[i]
        coarse_closed[a] |= closed[i]
    between = coarse_near.copy()
    for a in range(count):
        for d in range(6):
            shut = coarse_near[a, d] == count and (coarse_closed[a] >> d) & 1 == 1
            if shut or not halved[d >> 1]:
                between[a, d] = a
    return (coarse_near, coarse_weight, coarse_wall, coarse_closed), between


@compiled
def _lone_nodes(wall: Any, diagonal: Any) -> Any:
    lone = np.empty(wall.size, np.bool_)
    for i in range(wall.size):
        lone[i] = wall[i] >= LONE * (diagonal[i] - wall[i])
    return lone


@compiled
def _halved(lengths: Any) -> Any:
    """Along which axes boxes grow: where nodes lie closest; and double those lengths."""
    halved = (lengths < 1.5 * lengths.min()).astype(np.int64)
    lengths *= 1 + halved
    return halved


@compiled
def coarser_levels(level: Any, diagonal: Any, nodes: Any) -> Any:
    """Make the levels below the first.

    Gives first ``(parent, side)`` of the first level: its nodes' boxes, which are the nodes of the
    next level, and where in their boxes they are (a bit for each axis); then a list of (near,
    weight, 1/diagonal, u, right, between, parent, side). There is at least one, but it may have no
    nodes. The arrays of solutions have a last node that is always 0, which is where missing
    neighbours and parents point to.

    Parameters
    ----------
    level
        near, uint32 ``[N,6]``: neighbours z-, z+, y-, y+, x-, x+, N where there is none; weight
        of those links ``[1,6]``; weight of the links to the value 0 ``[N]``; sides that are
        closed, a bit for each, uint8 ``[N]``.
    diagonal
        ``[N]``: weight of all links.
    nodes
        The first node of each row of equal (z, y), and the end; z and y of the rows; x of the
        nodes; distance of nodes along z, y, x.
    """
    rows, xs, lengths = (nodes[0], nodes[1], nodes[2]), nodes[3], nodes[4].copy()
    places = np.full(xs.size, NOWHERE, np.uint32), np.zeros(xs.size, np.uint8)
    halved = _halved(lengths)
    rows, xs = _boxes(rows, xs, _lone_nodes(level[2], diagonal), halved, places)
    coarse, between = _coarse_system(level, places[0], xs.size, halved)
    first_places = places
    none = places[0][:0], places[1][:0]
    levels = [(coarse[0], coarse[1], coarse[2], np.zeros(1), np.zeros(1), between, *none)]
    if xs.size > 0:
        levels.pop()
    while xs.size > 0:
        near, weight, wall, _ = coarse
        diagonal = wall.copy()
        for i in range(xs.size):
            diagonal[i] += weight[i].sum()
        places = np.full(xs.size, NOWHERE, np.uint32), np.zeros(xs.size, np.uint8)
        halved = _halved(lengths)
        rows, coarse_xs = _boxes(rows, xs, _lone_nodes(wall, diagonal), halved, places)
        u, right = np.zeros(xs.size + 1), np.zeros(xs.size + 1)
        levels.append((near, weight, 1.0 / diagonal, u, right, between, *places))
        coarse, between = _coarse_system(coarse, places[0], coarse_xs.size, halved)
        xs = coarse_xs
    return first_places, levels


@compiled
def _forward(near: Any, weight: Any, inverse: Any, u: Any, right: Any) -> None:
    """Gauss-Seidel from 0, in the order of the nodes: only earlier neighbours are not 0."""
    for i in range(inverse.size):
        total = right[i] + weight[i, 0] * u[near[i, 0]] + weight[i, 2] * u[near[i, 2]]
        u[i] = (total + weight[i, 4] * u[near[i, 4]]) * inverse[i]


@compiled
def _backward(near: Any, weight: Any, inverse: Any, u: Any, right: Any) -> None:
    """Gauss-Seidel against the order of the nodes."""
    for i in range(inverse.size - 1, -1, -1):
        total = right[i] + weight[i, 0] * u[near[i, 0]] + weight[i, 1] * u[near[i, 1]]
        total += weight[i, 2] * u[near[i, 2]] + weight[i, 3] * u[near[i, 3]]
        total += weight[i, 4] * u[near[i, 4]]
        u[i] = (total + weight[i, 5] * u[near[i, 5]]) * inverse[i]


@compiled
def _restrict(level: Any, coarse: Any) -> None:
    """Add what `_forward` leaves open, which is the part of the later neighbours."""
    near, weight, _, u, _, _, parent, side = level
    right, between = coarse[4], coarse[5]
    right[:] = 0.0
    for i in range(parent.size):
        left = weight[i, 1] * u[near[i, 1]] + weight[i, 3] * u[near[i, 3]]
        left = 0.25 * (left + weight[i, 5] * u[near[i, 5]])
        a, s = parent[i], side[i]
        if a != between.shape[0]:
            right[a] += left
            right[between[a, s & 1]] += left
            right[between[a, 2 + ((s >> 1) & 1)]] += left
            right[between[a, 4 + (s >> 2)]] += left


@compiled
def _prolong(level: Any, coarse: Any) -> None:
    """Add the values of the coarser level, linearly between boxes; `_restrict` is the transpose.

    A node lies a quarter of a box from its box's middle along each axis.
    """
    u, parent, side = level[3], level[6], level[7]
    values, between = coarse[3], coarse[5]
    for i in range(parent.size):
        a, s = parent[i], side[i]
        if a != between.shape[0]:
            total = values[a] + values[between[a, s & 1]]
            total += values[between[a, 2 + ((s >> 1) & 1)]] + values[between[a, 4 + (s >> 2)]]
            u[i] += 0.25 * total


@compiled
def _coarse_cycle(levels: Any) -> None:
    """One V-cycle on the levels below the first, from 0."""
    last = len(levels) - 1
    for number in range(last + 1):
        near, weight, inverse, u, right, _, _, _ = levels[number]
        _forward(near, weight, inverse, u, right)
        if number < last:
            _restrict(levels[number], levels[number + 1])
    for number in range(last, -1, -1):
        near, weight, inverse, u, right, _, _, _ = levels[number]
        if number < last:
            _prolong(levels[number], levels[number + 1])
        _backward(near, weight, inverse, u, right)


@compiled
def _down(system: Any, vectors: Any, alpha: float, levels: Any) -> float:
    """Step along p; then z from the first half of a cycle. Gives the largest residual.

    Nodes are restricted as soon as those after them are done, while they are in the cache.
    """
    near, code, _, inverse, (wz, wy, wx), reach, (parent, side) = system
    u, r, p, q, z = vectors
    right, between = levels[0][4], levels[0][5]
    right[:] = 0.0
    nodes = code.size
    largest = 0.0
    ready = 0
    for first in range(0, nodes, CHUNK):
        end = min(first + CHUNK, nodes)
        for i in range(first, end):
            u[i] += alpha * p[i]
            left = r[i] - alpha * q[i]
            r[i] = left
            largest = max(largest, abs(left))
            total = left + wz * z[near[i, 0]] + wy * z[near[i, 2]]
            z[i] = (total + wx * z[near[i, 4]]) * inverse[code[i]]
        stop = nodes if end == nodes else max(ready, end - reach)
        for i in range(ready, stop):
            a, s = parent[i], side[i]
            if a != between.shape[0]:
                left = 0.25 * (wz * z[near[i, 1]] + wy * z[near[i, 3]] + wx * z[near[i, 5]])
                right[a] += left
                right[between[a, s & 1]] += left
                right[between[a, 2 + ((s >> 1) & 1)]] += left
                right[between[a, 4 + (s >> 2)]] += left
        ready = stop
    return largest


@compiled
def _up(system: Any, vectors: Any, levels: Any) -> float:
    """Give z from the second half of a cycle, and r*z."""
    near, code, _, inverse, (wz, wy, wx), reach, (parent, side) = system
    _, r, _, _, z = vectors
    coarse, between = levels[0][3], levels[0][5]
    ready = code.size
    product = 0.0
    for end in range(code.size, 0, -CHUNK):
        first = max(0, end - CHUNK)
        stop = max(0, first - reach)
        for i in range(stop, ready):
            a, s = parent[i], side[i]
            if a != between.shape[0]:
                total = coarse[a] + coarse[between[a, s & 1]]
                total += coarse[between[a, 2 + ((s >> 1) & 1)]] + coarse[between[a, 4 + (s >> 2)]]
                z[i] += 0.25 * total
        ready = stop
        for i in range(end - 1, first - 1, -1):
            total = r[i] + wz * (z[near[i, 0]] + z[near[i, 1]])
            total += wy * (z[near[i, 2]] + z[near[i, 3]])
            z[i] = (total + wx * (z[near[i, 4]] + z[near[i, 5]])) * inverse[code[i]]
            product += r[i] * z[i]
    return product


@compiled
def _apply(system: Any, vectors: Any, beta: float) -> float:
    """Give p from z and p, and q, the matrix times p; and p*q."""
    near, code, diagonal, _, (wz, wy, wx), reach, _ = system
    _, _, p, q, z = vectors
    nodes = code.size
    product = 0.0
    ready = 0
    for first in range(0, nodes, CHUNK):
        end = min(first + CHUNK, nodes)
        for i in range(first, end):
            p[i] = z[i] + beta * p[i]
        stop = nodes if end == nodes else max(ready, end - reach)
        for i in range(ready, stop):
            total = wz * (p[near[i, 0]] + p[near[i, 1]]) + wy * (p[near[i, 2]] + p[near[i, 3]])
            q[i] = diagonal[code[i]] * p[i] - total - wx * (p[near[i, 4]] + p[near[i, 5]])
            product += p[i] * q[i]
        ready = stop
    return product


@compiled
def solve(system: Any, levels: Any, u: Any, right: Any, tolerance: float, most: int) -> int:
    """Conjugate gradients until no node's residual exceeds ``tolerance``; give the iterations.

    Source: Hestenes & Stiefel (1952), J. Res. Natl. Bur. Stand. 49, 409; multigrid cycles as a
    preconditioner: Trottenberg, Oosterlee & Schueller (2001), Multigrid, section 7.8.

    Parameters
    ----------
    system
        Of the first level: near (see `coarser_levels`); for each node a code, and by code the
        diagonal and its inverse; weights of links along z, y, x; the largest difference of the
        numbers of linked nodes; boxes and sides (see there).
    levels
        From `coarser_levels`.
    u
        ``[N+1]``, the start, becomes the solution; the last is 0.
    right
        ``[N]``, the right side; becomes the residual.
    tolerance, most
        Largest residual; most iterations.
    """
    nodes = right.size
    vectors = u, right, np.zeros(nodes + 1), np.zeros(nodes), np.zeros(nodes + 1)
    p, q, z = vectors[2:]
    z[:] = u
    _apply(system, vectors, 0.0)
    for i in range(nodes):
        right[i] -= q[i]
        p[i] = 0.0
    alpha, before = 0.0, 1.0
    for done in range(most + 1):
        if _down(system, vectors, alpha, levels) <= tolerance:
            return done
        _coarse_cycle(levels)
        product = _up(system, vectors, levels)
        alpha = product / _apply(system, vectors, product / before if done else 0.0)
        before = product
    return most + 1
