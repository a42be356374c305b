"""Conjugate gradients with a multigrid cycle, for one system of nodes on a lattice.

A node is a voxel, or on coarser levels what one object has in a box of 2x2x2 nodes, so that a
node has at most one neighbour in each of six directions, and touching objects never mix. Nodes
are numbered in C order, so that neighbours along x have numbers that follow each other and only
those along z and y are listed. Boxes lie relative to the object's own bounding box, and all sums
run in the order of the nodes: the same object gives the same bits wherever it is.

What large objects cost is reading their vectors from memory, so whatever need not be exact is
float32: the cycle, which only has to point well, and the directions of the search, which are taken
as they were rounded. The solution, the residual and all that changes them are float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from topo_dask.kernels.jit import compiled

LONE = 0.8
"""A node whose walls weigh this much of its links is left to the smoother: no box helps it.

This and the next two by trial: the fewest iterations on tissue and on balls."""

FARTHER = 0.5
"""Weight of a link between boxes over the sum of the links it is made of: centres lie 2 apart."""

WALL_FARTHER = 0.6
"""The same for walls: the middle of a box is one and a half nodes from the wall (then 2.5 of 4)."""

CHUNK = 1024
"""Nodes between which a sweep lets the next one catch up."""

NOWHERE = np.uint32(2**32 - 1)

JOINED_LOW, JOINED_HIGH = 128, 256
"""Flags of nodes: linked to the node before, and to the one after."""

NO_FLAGS = 127


@compiled
def _join_rows(spans: Any, xs: Any, lone: Any, halved: int, parent: Any, made: Any) -> Any:
    """Number the boxes of up to four rows of nodes, ``spans [4,2]``, from ``made[0]`` on.

    Writes each node's box into ``parent`` and each box's x into ``made[1:]``.
    """
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
                at += 1
            spans[s, 0] = at
        count += 1
        made[count] = lowest


@compiled
def _boxes(rows: Any, xs: Any, lone: Any, halved: Any, parent: Any) -> Any:
    """Put the nodes of a level into boxes; give the rows and the x of the boxes.

    ``rows`` are (first node of each row and the end, z, y), ``halved`` 1 for each axis along which
    two nodes come into a box, else 0.
    """
    first, zs, ys = rows
    made = np.empty(xs.size + 1, np.int64)
    coarse_first = np.empty(first.size, np.int64)
    coarse_z, coarse_y = np.empty(zs.size, np.int64), np.empty(zs.size, np.int64)
    spans = np.zeros((4, 2), np.int64)
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
                spans[used, 0], spans[used, 1] = first[low], first[low + 1]
                used, low = used + 1, low + 1
            while high < end and ys[high] >> halved[1] == y:
                spans[used, 0], spans[used, 1] = first[high], first[high + 1]
                used, high = used + 1, high + 1
            made[0] = count
            before = count
            count = _join_rows(spans, xs, lone, halved[2], parent, made)
            if count > before:
                coarse_first[number] = before
                coarse_z[number], coarse_y[number] = z, y
                number += 1
        row = end
    coarse_first[number] = count
    coarse = coarse_first[: number + 1].copy(), coarse_z[:number].copy(), coarse_y[:number].copy()
    return coarse, made[1 : count + 1].copy()


@compiled
def _coarse_system(
    links: Any, weight: Any, wall: Any, parent: Any, count: int, halved: Any
) -> tuple[Any, Any, Any]:
    """Sum the links and walls of the nodes of each box; links inside a box are gone.

    Replaces ``NOWHERE`` in ``parent`` by ``count``. To the boxes, nodes without one are wall.
    ``weight`` has a row for each node, or one for all. Gives ``(near, flags)`` of the boxes, as
    ``links`` is of the nodes, their weights and walls.
    """
    near, flags = links
    nodes = near.shape[0]
    row = 1 if weight.shape[0] == nodes else 0
    for i in range(nodes):
        parent[i] = min(parent[i], np.uint32(count))
    coarse_near = np.full((count, 4), np.uint32(count), np.uint32)
    coarse_flags = np.zeros(count, np.uint16)
    coarse_weight = np.zeros((count, 6))
    coarse_wall = np.zeros(count)
    for i in range(nodes):
        a = parent[i]
        if a == count:
            continue
        for d in range(6):
            if d < 4:
                j: Any = np.int64(near[i, d])
            elif flags[i] & (JOINED_LOW if d == 4 else JOINED_HIGH):
                j = i + 2 * d - 9
            else:
                continue
            if j == nodes or parent[j] == a:
                continue
            here = weight[row * i, d] * FARTHER if halved[d >> 1] else weight[row * i, d]
            if parent[j] == count:
                coarse_wall[a] += here
            else:
                if d < 4:
                    coarse_near[a, d] = parent[j]
                else:
                    coarse_flags[a] |= JOINED_LOW if d == 4 else JOINED_HIGH
                coarse_weight[a, d] += here
        coarse_wall[a] += WALL_FARTHER * wall[i]
    return (coarse_near, coarse_flags), coarse_weight, coarse_wall


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
def _level(near: Any, weight: Any, inverse: Any, parent: Any) -> Any:
    """What a cycle needs of a level, with its u, right side, and u of the first of two visits."""
    real, nodes = np.float32, inverse.size
    right, earlier = np.zeros(nodes + 1, real), np.zeros(nodes + 1, real)
    u = np.zeros(nodes + 1, real)
    return near, weight.astype(real), inverse.astype(real), parent, u, right, earlier


@compiled
def coarser_levels(links: Any, weight: Any, wall: Any, diagonal: Any, nodes: Any) -> Any:
    """Make the levels below the first: (near, weight, 1/diagonal, parent, u, right, earlier u).

    There is at least one, but it may have no nodes. Gives first the ``parent`` of the first level:
    a level's ``parent`` tells its nodes' boxes, the nodes of the next level. The arrays of
    solutions have a last node that is always 0, which is where missing neighbours and parents
    point to. Neighbours along x are the nodes before and after, with weight 0 where not linked.

    Parameters
    ----------
    links
        near, uint32 ``[N,4]``: neighbours z-, z+, y-, y+, N where there is none; and flags,
        uint16 ``[N]``: which have `JOINED_LOW`, `JOINED_HIGH`.
    weight
        ``[1,6]``: of the links z-, z+, y-, y+, x-, x+.
    wall, diagonal
        ``[N]``: weight of the links to the value 0; of these and all links.
    nodes
        The first node of each row of equal (z, y), and the end; z and y of the rows; x of the
        nodes; distance of nodes along z, y, x.
    """
    rows, xs, lengths = (nodes[0], nodes[1], nodes[2]), nodes[3], nodes[4].copy()
    parent = np.full(wall.size, NOWHERE, np.uint32)
    halved = _halved(lengths)
    rows, xs = _boxes(rows, xs, _lone_nodes(wall, diagonal), halved, parent)
    links, sums, wall = _coarse_system(links, weight, wall, parent, xs.size, halved)
    first_parent = parent
    levels = [_level(links[0], sums, wall, parent[:0])]
    if xs.size > 0:
        levels.pop()
    while xs.size > 0:
        diagonal = wall.copy()
        for i in range(xs.size):
            diagonal[i] += sums[i].sum()
        parent = np.full(xs.size, NOWHERE, np.uint32)
        halved = _halved(lengths)
        rows, coarse_xs = _boxes(rows, xs, _lone_nodes(wall, diagonal), halved, parent)
        levels.append(_level(links[0], sums, 1.0 / diagonal, parent))
        links, sums, wall = _coarse_system(links, sums, wall, parent, coarse_xs.size, halved)
        xs = coarse_xs
    return first_parent, levels


@compiled
def _forward(near: Any, weight: Any, inverse: Any, u: Any, right: Any) -> None:
    """Gauss-Seidel from 0, in the order of the nodes: only earlier neighbours are not 0."""
    before = np.float32(0)
    for i in range(inverse.size):
        total = right[i] + weight[i, 0] * u[near[i, 0]] + weight[i, 2] * u[near[i, 2]]
        before = total * inverse[i] + weight[i, 4] * inverse[i] * before
        u[i] = before


@compiled
def _backward(near: Any, weight: Any, inverse: Any, u: Any, right: Any) -> None:
    """Gauss-Seidel against the order of the nodes."""
    after = np.float32(0)
    for i in range(inverse.size - 1, -1, -1):
        total = right[i] + weight[i, 0] * u[near[i, 0]] + weight[i, 1] * u[near[i, 1]]
        total += weight[i, 2] * u[near[i, 2]] + weight[i, 3] * u[near[i, 3]]
        total += weight[i, 4] * u[i - 1]
        after = total * inverse[i] + weight[i, 5] * inverse[i] * after
        u[i] = after


@compiled
def _restrict(near: Any, weight: Any, parent: Any, u: Any, right: Any) -> None:
    """Sum what `_forward` leaves open, which is the part of the later neighbours."""
    right[:] = 0
    for i in range(parent.size):
        left = weight[i, 1] * u[near[i, 1]] + weight[i, 3] * u[near[i, 3]]
        right[parent[i]] += left + weight[i, 5] * u[i + 1]


@compiled
def _prolong(parent: Any, coarse: Any, u: Any) -> None:
    for i in range(parent.size):
        u[i] += coarse[parent[i]]


@compiled
def _set_aside(near: Any, weight: Any, inverse: Any, u: Any, right: Any, earlier: Any) -> None:
    """Keep u, and replace the right side by what u leaves open of it."""
    earlier[:] = u
    for i in range(inverse.size):
        left = right[i] - u[i] / inverse[i]
        left += weight[i, 0] * u[near[i, 0]] + weight[i, 1] * u[near[i, 1]]
        left += weight[i, 2] * u[near[i, 2]] + weight[i, 3] * u[near[i, 3]]
        right[i] = left + weight[i, 4] * u[i - 1] + weight[i, 5] * u[i + 1]


@compiled
def _coarse_cycle(levels: Any) -> None:
    """One W-cycle on the levels below the first, from 0: each visits the next one twice.

    With one visit large objects would take more iterations than small ones, since the values of
    boxes reach their nodes without interpolation.
    """
    last = len(levels) - 1
    visits = np.zeros(last + 1, np.int64)
    number, down = 0, True
    while number >= 0:
        near, weight, inverse, parent, u, right, earlier = levels[number]
        if down:
            _forward(near, weight, inverse, u, right)
            if number < last:
                number += 1
                visits[number] = 0
                _restrict(near, weight, parent, u, levels[number][5])
                continue
        else:
            _prolong(parent, levels[number + 1][4], u)
        _backward(near, weight, inverse, u, right)
        visits[number] += 1
        down = number < last and visits[number] == 1
        if down:
            _set_aside(near, weight, inverse, u, right, earlier)
        else:
            u += earlier  # 0 on the last level
            number -= 1


@compiled
def _down(system: Any, vectors: Any, alpha: float, levels: Any) -> float:
    """Step along p; then z from the first half of a cycle. Gives the largest residual.

    Nodes are restricted as soon as those after them are done, while they are in the cache.
    """
    near, flags, _, (inverse, (wz, wy, wx)), reach, parent = system
    u, r, p, q, z = vectors
    right = levels[0][5]
    right[:] = 0
    nodes = flags.size
    largest = 0.0
    ready = 0
    none = before = np.float32(0)
    for first in range(0, nodes, CHUNK):
        end = min(first + CHUNK, nodes)
        for i in range(first, end):
            u[i] += alpha * p[i]
            left = r[i] - alpha * q[i]
            r[i] = left
            largest = max(largest, abs(left))
            scale = inverse[flags[i] & NO_FLAGS]
            total = np.float32(left) + wz * z[near[i, 0]] + wy * z[near[i, 2]]
            before = total * scale + (wx * scale if flags[i] & JOINED_LOW else none) * before
            z[i] = before
        stop = nodes if end == nodes else max(ready, end - reach)
        for i in range(ready, stop):
            left_x = z[i + 1] if flags[i] & JOINED_HIGH else none
            right[parent[i]] += wz * z[near[i, 1]] + wy * z[near[i, 3]] + wx * left_x
        ready = stop
    return largest


@compiled
def _up(system: Any, vectors: Any, levels: Any) -> float:
    """Give z from the second half of a cycle, and r*z."""
    near, flags, _, (inverse, (wz, wy, wx)), reach, parent = system
    _, r, _, _, z = vectors
    coarse = levels[0][4]
    ready = flags.size
    product = 0.0
    none = after = np.float32(0)
    for end in range(flags.size, 0, -CHUNK):
        first = max(0, end - CHUNK)
        stop = max(0, first - reach)
        for i in range(stop, ready):
            z[i] += coarse[parent[i]]
        ready = stop
        for i in range(end - 1, first - 1, -1):
            scale = inverse[flags[i] & NO_FLAGS]
            total = np.float32(r[i]) + wz * (z[near[i, 0]] + z[near[i, 1]])
            total += wy * (z[near[i, 2]] + z[near[i, 3]])
            total += wx * (z[i - 1] if flags[i] & JOINED_LOW else none)
            after = total * scale + (wx * scale if flags[i] & JOINED_HIGH else none) * after
            z[i] = after
            product += r[i] * after
    return product


@compiled
def _apply(system: Any, vectors: Any, beta: float) -> float:
    """Give p from z and p, and q, the matrix times p; and p*q."""
    near, flags, (diagonal, (wz, wy, wx)), _, reach, _ = system
    _, _, p, q, z = vectors
    nodes = flags.size
    none = np.float32(0)
    product = 0.0
    ready = 0
    for first in range(0, nodes, CHUNK):
        end = min(first + CHUNK, nodes)
        for i in range(first, end):
            p[i] = z[i] + beta * p[i]
        stop = nodes if end == nodes else max(ready, end - reach)
        for i in range(ready, stop):
            here = np.float64(p[i])
            low = p[i - 1] if flags[i] & JOINED_LOW else none
            high = p[i + 1] if flags[i] & JOINED_HIGH else none
            total = wz * (np.float64(p[near[i, 0]]) + np.float64(p[near[i, 1]]))
            total += wy * (np.float64(p[near[i, 2]]) + np.float64(p[near[i, 3]]))
            total += wx * (np.float64(low) + np.float64(high))
            applied = diagonal[flags[i] & NO_FLAGS] * here - total
            q[i] = applied
            product += here * applied
        ready = stop
    return product


@compiled
def _take_residual(system: Any, u: Any, right: Any) -> None:
    """Subtract the matrix times u from the right side."""
    near, flags, (diagonal, (wz, wy, wx)), _, _, _ = system
    for i in range(flags.size):
        total = wz * (u[near[i, 0]] + u[near[i, 1]]) + wy * (u[near[i, 2]] + u[near[i, 3]])
        total += wx * (u[i - 1] if flags[i] & JOINED_LOW else 0.0)
        total += wx * (u[i + 1] if flags[i] & JOINED_HIGH else 0.0)
        right[i] -= diagonal[flags[i] & NO_FLAGS] * u[i] - total


@compiled
def solve(system: Any, levels: Any, u: Any, right: Any, tolerance: float, most: int) -> int:
    """Conjugate gradients until no node's residual exceeds ``tolerance``; give the iterations.

    Source: Hestenes & Stiefel (1952), J. Res. Natl. Bur. Stand. 49, 409; multigrid cycles as a
    preconditioner: Trottenberg, Oosterlee & Schueller (2001), Multigrid, section 7.8.

    Parameters
    ----------
    system
        Of the first level: near and flags (see `coarser_levels`), whose lower bits are a code; by
        code the diagonal, and weights of links along z, y, x; the inverse of a diagonal and
        weights in float32, which may be of another scale; the largest difference of the numbers of
        linked nodes, at least 1; parent.
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
    p, z = np.zeros(nodes + 1, np.float32), np.zeros(nodes + 1, np.float32)
    q = np.zeros(nodes)
    vectors = u, right, p, q, z
    _take_residual(system, u, right)
    alpha, before = 0.0, 1.0
    for done in range(most + 1):
        if _down(system, vectors, alpha, levels) <= tolerance:
            return done
        _coarse_cycle(levels)
        product = _up(system, vectors, levels)
        alpha = product / _apply(system, vectors, product / before if done else 0.0)
        before = product
    return most + 1
