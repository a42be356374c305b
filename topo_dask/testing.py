"""Volumes to try things on, hypothesis strategies, and a same-partition check.

Nothing here is needed to run topo_dask on your own data. NumPy only; ``hypothesis`` is imported
by the strategies alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from topo_dask.errors import BackendUnavailable, InvalidArgument

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = [
    "PartitionCheck",
    "TissueSpec",
    "block_shapes",
    "ellipsoids",
    "flow_fields",
    "label_volumes",
    "same_partition",
    "segment_parameters",
    "synthetic_tissue",
    "synthetic_tissue_block",
]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def _sides(shape: Sequence[int], *, least: int) -> tuple[int, int, int]:
    sides = tuple(int(side) for side in shape)
    if len(sides) != 3 or min(sides) < least:
        raise InvalidArgument(
            "shape", tuple(shape), f"three whole numbers z, y, x, each >= {least}"
        )
    return (sides[0], sides[1], sides[2])


# ---------------------------------------------------------------- the tutorials' volume


def ellipsoids(
    shape: Sequence[int] = (64, 64, 64), n: int = 4, seed: int = 42
) -> npt.NDArray[np.int32]:
    """The tutorials' volume: a few ellipsoids, each placed where the earlier ones are not.

    Parameters
    ----------
    shape
        Shape of the volume; every side at least 21 voxels.
    n
        Number of ellipsoids, labelled 1 to n.
    seed
        Seed of the (legacy, platform-independent) random numbers.

    Examples
    --------
    >>> labels = ellipsoids()
    >>> labels.shape, labels.max(), (labels == 1).sum()
    ((64, 64, 64), np.int32(4), np.int64(4929))
    """
    sides = _sides(shape, least=21)
    random = np.random.RandomState(seed)
    labels = np.zeros(sides, dtype=np.int32)
    axes = np.ogrid[tuple(slice(0, side) for side in sides)]
    for label in range(1, n + 1):
        centre = [random.randint(10, side - 10) for side in sides]
        radii = [random.randint(5, 15) for _ in range(3)]
        inside = sum(((x - c) / r) ** 2 for x, c, r in zip(axes, centre, radii, strict=True)) <= 1
        labels[inside & (labels == 0)] = label
    return labels


# ---------------------------------------------------------------- synthetic tissue
#
# Objects sit on a lattice of spacing S that is turned against the axes of the volume, so that a
# slice along any axis shows a bit of everything. A node of the lattice may hold a *cell*: a ball,
# cut by the planes of its power diagram with the neighbouring balls and by planes that touch the
# nearby neurites, hence convex. Along the edges half-way between the nodes run *bundles* of up to
# four neurites: chains of small balls on a wandering curve. All properties of an object come from
# a hash of the seed and its place in the lattice, so any block can be made alone. Decisions about
# voxels are made in integers, and only +, -, *, / and sqrt come before: the same voxels anywhere.

_TURN = ((2 / 3, -1 / 3, 2 / 3), (2 / 3, 2 / 3, -1 / 3), (-1 / 3, 2 / 3, 2 / 3))
_JITTER = 0.12  # all lengths in units of S
_CELL_RADII = (0.42, 0.67)
_WANDER = 0.26
_WAVE = 1.3
_SEGMENT = 6.0
_SLOTS = ((-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0))
_TUBE_RADII = (0.085, 0.13)
_LEAST_TUBE_RADIUS = 1.25  # voxels: thinner chains would fall apart on the voxel grid
_SUB = 8  # integer units per voxel
_MOST_SPACING = 4096.0  # voxels: squares of integer units stay below 2**31
_PLANE = 256  # integer units of a plane's unit normal


@dataclass(frozen=True)
class TissueSpec:
    """What a synthetic tissue is made of; the same spec gives the same voxels, block by block.

    Parameters
    ----------
    shape
        Shape of the whole volume.
    n_instances
        About how many objects the volume has (objects cut by its faces included), some 20 at
        least: objects larger than the volume would not show.
    seed
        Any whole number.
    density
        Share of the places for cells that hold one.
    neurites
        Share of the places for neurites that hold one; 0 gives cells only.

    Examples
    --------
    >>> spec = TissueSpec((10_000, 10_000, 10_000), n_instances=2_000_000, seed=1)
    >>> synthetic_tissue_block(spec, (5000, 5000, 5000), (5032, 5032, 5032)).shape
    (32, 32, 32)
    """

    shape: tuple[int, int, int]
    n_instances: int
    seed: int = 0
    density: float = 0.9
    neurites: float = 0.6

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _sides(self.shape, least=1))
        if self.n_instances < 1:
            raise InvalidArgument("n_instances", self.n_instances, "a whole number >= 1")
        for name in ("density", "neurites"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise InvalidArgument(name, share, "a share from 0 to 1", f"Pass e.g. {name}=0.5.")
        if _Lattice(self).last_id >= 2**32:
            raise InvalidArgument(
                "n_instances",
                self.n_instances,
                "ids below 2**32, about 300 million objects",
                "Ask for fewer objects.",
            )

    @property
    def spacing(self) -> float:
        """Distance between neighbouring places for cells, in voxels."""
        per_node = self.density + 4 * self.neurites / _SEGMENT
        wanted = self.n_instances / max(per_node, 1e-3)
        # Objects larger than the volume would mostly miss it.
        low, high = 0.5, min(max(4.0, 0.8 * max(self.shape)), _MOST_SPACING)
        for _ in range(60):  # objects cut by the faces count too, hence the 1.5: no closed form
            middle = (low + high) / 2
            nodes = math.prod(n / middle + 1.5 for n in self.shape)
            low, high = (middle, high) if nodes > wanted else (low, middle)
        return round(low * 64) / 64  # far above the rounding of any platform's arithmetic


def synthetic_tissue(
    shape: Sequence[int],
    *,
    n_instances: int,
    seed: int = 0,
    density: float = 0.9,
    neurites: float = 0.6,
) -> npt.NDArray[np.uint32]:
    """A made-up tissue: touching convex cells of many sizes with bundles of thin neurites between.

    Deterministic by seed on any platform. Ids are neither dense nor in any order. In about
    one object of a hundred a stray voxel hangs on by an edge or a corner only.

    Parameters
    ----------
    shape
        Shape of the volume.
    n_instances
        About how many objects the volume has, 20 at least. The cells' diameter is about the cube
        root of the voxels per object; below 10 voxels there are few true shapes left.
    seed
        Any whole number.
    density, neurites
        Shares of the places for cells and for neurites that hold one.

    Returns
    -------
    uint32 labels, 0 is background. With the defaults 40 to 60 % of the voxels are foreground.

    Examples
    --------
    >>> labels = synthetic_tissue((48, 48, 48), n_instances=40, seed=7)
    >>> labels.dtype, 0.3 < (labels > 0).mean() < 0.7
    (dtype('uint32'), np.True_)
    """
    sides = _sides(shape, least=1)
    spec = TissueSpec(sides, n_instances, seed, density, neurites)
    labels = np.empty(sides, dtype=np.uint32)
    # In pieces: the working memory of one piece is about 30 bytes a voxel.
    for start in itertools.product(*(range(0, side, 128) for side in sides)):
        stop = tuple(min(a + 128, side) for a, side in zip(start, sides, strict=True))
        where = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        labels[where] = synthetic_tissue_block(spec, start, stop)
    return labels


def synthetic_tissue_block(
    spec: TissueSpec, start: Sequence[int], stop: Sequence[int]
) -> npt.NDArray[np.uint32]:
    """The voxels ``start <= v < stop`` of the tissue: exactly those of the whole volume.

    Parameters
    ----------
    spec
        What the whole volume is made of.
    start, stop
        First voxel of the block, and the one after its last.

    Examples
    --------
    >>> spec = TissueSpec((40, 40, 40), n_instances=20, seed=3)
    >>> block = synthetic_tissue_block(spec, (10, 0, 5), (30, 40, 20))
    >>> whole = synthetic_tissue((40, 40, 40), n_instances=20, seed=3)
    >>> bool((block == whole[10:30, 0:40, 5:20]).all())
    True
    """
    first, last = tuple(map(int, start)), tuple(map(int, stop))
    if not all(0 <= a <= b <= n for a, b, n in zip(first, last, spec.shape, strict=True)):
        raise InvalidArgument(
            "start, stop", f"{first}, {last}", f"a box inside the volume {spec.shape}"
        )
    if math.prod(b - a for a, b in zip(first, last, strict=True)) == 0:
        return np.zeros([b - a for a, b in zip(first, last, strict=True)], dtype=np.uint32)
    lattice = _Lattice(spec)
    labels = _paint_cells(lattice, first, last)
    if spec.neurites > 0:
        neurites = _paint_neurites(lattice, first, last)
        np.copyto(labels, neurites, where=neurites > 0)
    return labels


class _Lattice:
    """The turned lattice of a spec: where things are, and their ids."""

    def __init__(self, spec: TissueSpec) -> None:
        self.spec = spec
        self.spacing = spec.spacing
        reach = 1.5 * self.spacing
        self.low, self.high = self.bounds((0, 0, 0), spec.shape, reach)
        self.sides = tuple(b - a for a, b in zip(self.low, self.high, strict=True))
        # A lane is (layer, row); runs have two directions, so rows must hold either axis.
        self.rows = (min(self.low[1:]), max(self.high[1:]))
        self.n_segments = int((self.rows[1] - self.rows[0]) / _SEGMENT) + 4
        self.first_segment = math.floor(self.rows[0] / _SEGMENT) - 1
        n_lanes = self.sides[0] * (self.rows[1] - self.rows[0])
        self.n_cells = math.prod(self.sides)
        self.last_id = self.n_cells + n_lanes * len(_SLOTS) * self.n_segments

    def bounds(
        self, start: Sequence[float], stop: Sequence[float], reach: float
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Whole lattice units that hold the box of voxels grown by ``reach`` (half open)."""
        low, high = [], []
        for axis in range(3):
            ends = [
                sorted((_TURN[d][axis] * (start[d] - reach), _TURN[d][axis] * (stop[d] + reach)))
                for d in range(3)
            ]
            low.append(math.floor(sum(e[0] for e in ends) / self.spacing))
            high.append(math.ceil(sum(e[1] for e in ends) / self.spacing) + 1)
        return tuple(low), tuple(high)

    def to_voxels(self, a: Floats, b: Floats, c: Floats) -> list[Floats]:
        """Positions in voxels, one array per axis, of positions in the lattice."""
        a, b, c = a * self.spacing, b * self.spacing, c * self.spacing
        return [_TURN[d][0] * a + _TURN[d][1] * b + _TURN[d][2] * c for d in range(3)]

    def random(self, stream: int, *numbers: Ints) -> Floats:
        """Uniform numbers in [0, 1) that depend on the seed, the stream and these numbers."""
        with np.errstate(over="ignore"):
            value = _mix(np.uint64(self.spec.seed % 2**64) + np.uint64(stream + 1))
            for number in numbers:
                value = _mix(value + number.astype(np.uint64))
        return np.asarray((value >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def noise(self, stream: int, along: Floats, *numbers: Ints) -> Floats:
        """Smooth noise in (-1, 1) along a curve: a cubic B-spline through random knots."""
        t = along / _WAVE
        knot = np.floor(t)
        f = t - knot
        k = knot.astype(np.int64)
        weights = (
            (1 - f) * (1 - f) * (1 - f),
            3 * f * f * f - 6 * f * f + 4,
            3 * f + 3 * f * f - 3 * f * f * f + 1,
            f * f * f,
        )
        total = np.zeros_like(t)
        for i, weight in enumerate(weights):
            total += weight * (2 * self.random(stream, k + i, *numbers) - 1)
        return total / 6


def _mix(value: Any) -> Any:
    """The finaliser of splitmix64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (value ^ (value >> np.uint64(31))) + np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class _Cells:
    ids: Ints
    centres: Ints  # [3, K] integer units, relative to the block
    radii: Ints


def _cells(lattice: _Lattice, start: tuple[int, ...], stop: tuple[int, ...]) -> _Cells:
    """The cells that reach into the block, in the order of their ids."""
    size = lattice.spacing
    low, high = lattice.bounds(start, stop, (_CELL_RADII[1] + 2 * _JITTER) * size)
    ranges = [np.arange(a, b, dtype=np.int64) for a, b in zip(low, high, strict=True)]
    nodes = [grid.ravel() for grid in np.meshgrid(*ranges, indexing="ij")]
    there = lattice.random(0, *nodes) < lattice.spec.density
    nodes = [node[there] for node in nodes]
    place = [
        node + 0.5 + _JITTER * (2 * lattice.random(1 + d, *nodes) - 1)
        for d, node in enumerate(nodes)
    ]
    radii = size * (_CELL_RADII[0] + (_CELL_RADII[1] - _CELL_RADII[0]) * lattice.random(4, *nodes))
    voxels = lattice.to_voxels(*place)
    ids = nodes[0] - lattice.low[0]
    for d in (1, 2):
        ids = ids * lattice.sides[d] + (nodes[d] - lattice.low[d])
    near = np.ones(len(ids), dtype=bool)
    for x, a, b in zip(voxels, start, stop, strict=True):
        near &= (x + radii >= a) & (x - radii <= b - 1)
    centres = [_units(x[near], a) for x, a in zip(voxels, start, strict=True)]
    return _Cells(1 + ids[near], np.stack(centres), _units(radii[near], 0))


def _units(positions: Floats, start: int) -> Ints:
    """Positions in voxels as whole units, relative to a voxel."""
    return np.rint(positions * _SUB).astype(np.int64) - start * _SUB


def _paint_cells(
    lattice: _Lattice, start: tuple[int, ...], stop: tuple[int, ...]
) -> npt.NDArray[np.uint32]:
    shape = tuple(b - a for a, b in zip(start, stop, strict=True))
    labels = np.zeros(shape, dtype=np.uint32)
    best = np.zeros(shape, dtype=np.int32)  # power distance of the winner; 0 is a ball's surface
    cells = _cells(lattice, start, stop)
    obstacles, thickness = _obstacles(lattice, start, stop)
    for number, label in enumerate(cells.ids):
        centre, radius = cells.centres[:, number], int(cells.radii[number])
        low = np.maximum(-((radius - centre) // _SUB), 0)
        high = np.minimum((centre + radius) // _SUB + 1, shape)
        if (low >= high).any():
            continue
        box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        z, y, x = (
            (np.arange(a, b, dtype=np.int64) * _SUB - c).astype(np.int32)
            for a, b, c in zip(low, high, centre, strict=True)
        )
        power = (z * z - radius * radius)[:, None, None] + (y * y)[:, None] + (x * x)
        mine = power < best[box]
        for normals, offsets in _planes(centre, radius, obstacles, thickness):
            height = (normals[0, :, None] * z - offsets[:, None])[:, :, None, None]
            height = height + (normals[1, :, None] * y)[:, None, :, None]
            mine &= (height + (normals[2, :, None] * x)[:, None, None, :]).max(axis=0) <= 0
        np.copyto(best[box], power, where=mine)
        np.copyto(labels[box], np.uint32(label), where=mine)
    return labels


def _planes(
    centre: Ints, radius: int, obstacles: Ints, thickness: int
) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]]:
    """Half-spaces ``normal . v <= offset`` (v from the centre) that keep a cell off neurites.

    A few at a time: few enough for the cache, enough to keep NumPy busy on small cells.
    """
    way = obstacles - centre[:, None]
    squares = way[0] * way[0] + way[1] * way[1] + way[2] * way[2]
    near = (squares < (radius + thickness) ** 2) & (squares > 0)
    far = np.sqrt(squares[near].astype(np.float64))
    normals = np.rint(way[:, near] * (_PLANE / far)).astype(np.int32)
    offsets = np.rint((far - thickness) * _PLANE).astype(np.int32)
    few = max(1, 65_536 * _SUB**3 // (2 * radius) ** 3)
    for first in range(0, len(offsets), few):
        yield normals[:, first : first + few], offsets[first : first + few]


@dataclass(frozen=True)
class _Beads:
    """Points along the bundles near a block, and which of their four neurites is there."""

    voxels: list[Floats]  # one array per axis: the bundle's axis
    sideways: tuple[list[Floats], list[Floats]]  # unit vectors across the bundle, per axis
    along: Floats
    lane: tuple[Ints, Ints]
    number: Ints


def _beads(lattice: _Lattice, start: Sequence[int], stop: Sequence[int], reach: float) -> _Beads:
    """Points of all bundles that come within ``reach`` of the block, closely spaced."""
    size = lattice.spacing
    margin = reach + (_WANDER * 1.5) * size
    low, high = lattice.bounds(start, stop, margin)
    per_unit = math.ceil(size / min(0.05 * size, max(1.2, 0.03 * size)))
    parts: list[tuple[Ints, Ints, Ints]] = []
    for odd in (0, 1):  # the layers run in two directions by turns
        across, ahead = (2, 1) if odd else (1, 2)
        layers = np.arange(low[0] + (low[0] + odd) % 2, high[0], 2, dtype=np.int64)
        rows = np.arange(low[across], high[across], dtype=np.int64)
        steps = np.arange(low[ahead] * per_unit, high[ahead] * per_unit, dtype=np.int64)
        grid = np.meshgrid(layers, rows, steps, indexing="ij")
        a, row, step = (g.ravel() for g in grid)
        near = _near(lattice, (a, row, step / per_unit), odd, (start, stop, margin))
        parts.append((a[near], row[near], step[near]))
    a, row, step = (np.concatenate(p) for p in zip(*parts, strict=True))
    along = (step + 0.5) / per_unit
    up = a + _WANDER * lattice.noise(10, along, a, row)
    side = row + _WANDER * lattice.noise(11, along, a, row)
    odd_lane = a % 2 == 1
    voxels = lattice.to_voxels(up, np.where(odd_lane, along, side), np.where(odd_lane, side, along))
    zero = np.zeros_like(along)
    upward = [zero + _TURN[d][0] for d in range(3)]
    sideward = [np.where(odd_lane, _TURN[d][2], _TURN[d][1]) for d in range(3)]
    return _Beads(voxels, (upward, sideward), along, (a, row), step)


def _near(
    lattice: _Lattice,
    place: tuple[Ints, Ints, Floats],
    odd: int,
    box: tuple[Sequence[int], Sequence[int], float],
) -> npt.NDArray[np.bool_]:
    """Which places, before they wander, lie in the box grown by a margin."""
    start, stop, margin = box
    a, row, along = (np.asarray(p, dtype=np.float64) for p in place)
    voxels = lattice.to_voxels(a, along if odd else row, row if odd else along)
    near = np.ones(len(a), dtype=bool)
    for x, low, high in zip(voxels, start, stop, strict=True):
        near &= (x >= low - margin) & (x <= high + margin)
    return near


def _tube_radius(size: float, share: Any) -> Any:
    low, high = (max(r * size, _LEAST_TUBE_RADIUS) for r in _TUBE_RADII)
    return low + (high - low) * share


def _neurite(lattice: _Lattice, beads: _Beads, slot: int) -> tuple[Ints, Floats]:
    """Id (0 where there is none) and radius of the neurite in one slot of the bundle."""
    a, row = beads.lane
    slots = np.full_like(a, slot)

    def begin(segment: Ints) -> Floats:
        return _SEGMENT * (segment + 0.8 * lattice.random(20, a, row, slots, segment))

    segment = np.floor(beads.along / _SEGMENT).astype(np.int64)
    segment = np.where(beads.along < begin(segment), segment - 1, segment)
    radius = _tube_radius(lattice.spacing, lattice.random(21, a, row, slots, segment))
    gap = (2 * radius + 1.5) / lattice.spacing
    there = beads.along < begin(segment + 1) - gap
    there &= lattice.random(22, a, row, slots, segment) < lattice.spec.neurites
    ids = (a - lattice.low[0]) * (lattice.rows[1] - lattice.rows[0]) + (row - lattice.rows[0])
    ids = (ids * len(_SLOTS) + slot) * lattice.n_segments + (segment - lattice.first_segment)
    swell = 1 + 0.2 * lattice.noise(23, 2 * beads.along, a, row, slots)
    radius = np.maximum(radius * swell, _LEAST_TUBE_RADIUS)
    return np.where(there, 1 + lattice.n_cells + ids, 0), radius


def _obstacles(
    lattice: _Lattice, start: tuple[int, ...], stop: tuple[int, ...]
) -> tuple[Ints, int]:
    """Points of bundles that cells of the block must keep off, and the bundles' thickness."""
    size = lattice.spacing
    thick = _tube_radius(size, 1.0) * 1.1
    if lattice.spec.neurites == 0:
        return np.zeros((3, 0), dtype=np.int64), 0
    beads = _beads(lattice, start, stop, 2 * _CELL_RADII[1] * size + 3 * thick)
    keep = np.zeros(len(beads.along), dtype=bool)
    for slot in range(len(_SLOTS)):
        keep |= _neurite(lattice, beads, slot)[0] > 0
    keep &= beads.number % 3 == 0
    points = [_units(x[keep], a) for x, a in zip(beads.voxels, start, strict=True)]
    middle = _tube_radius(size, 0.5)
    return np.stack(points), int((middle * 2.7) * _SUB)


def _paint_neurites(
    lattice: _Lattice, start: tuple[int, ...], stop: tuple[int, ...]
) -> npt.NDArray[np.uint32]:
    thickest = _tube_radius(lattice.spacing, 1.0) * 1.2
    beads = _beads(lattice, start, stop, 4 * thickest)
    reach = math.ceil(thickest) + 2
    pad = 2 * reach  # balls outside the block reach into it, and out of it again
    shape = tuple(b - a + 2 * pad for a, b in zip(start, stop, strict=True))
    # The winner of a voxel is the least (power distance, id): one number, so one pass decides.
    best = np.zeros(math.prod(shape), dtype=np.int64)
    apart = _tube_radius(lattice.spacing, 0.5) * 0.98
    for slot, (up, side) in enumerate(_SLOTS):
        ids, radii = _neurite(lattice, beads, slot)
        units = []
        keep = ids > 0
        for d in range(3):
            across = beads.sideways[0][d] * (up * apart) + beads.sideways[1][d] * (side * apart)
            unit = _units(beads.voxels[d] + across, start[d] - pad)
            keep &= (unit >= reach * _SUB) & (unit < (shape[d] - reach) * _SUB)
            units.append(unit)
        _scatter(best, shape, [u[keep] for u in units], (ids[keep], _units(radii[keep], 0)))
    inside = best.reshape(shape)[tuple(slice(pad, n - pad) for n in shape)]
    return np.where(inside < 0, inside & 0xFFFFFFFF, 0).astype(np.uint32)


def _scatter(
    best: Ints, shape: tuple[int, ...], units: list[Ints], objects: tuple[Ints, Ints]
) -> None:
    """Paint balls into the padded block, many at a time."""
    ids, radii = objects
    if len(ids) == 0:
        return
    reach = int(radii.max()) // _SUB + 1
    z, y, x = (g.ravel() for g in np.mgrid[(slice(-reach, reach + 2),) * 3])
    half = _SUB // 2
    close = (z * _SUB - half) ** 2 + (y * _SUB - half) ** 2 + (x * _SUB - half) ** 2
    close = close <= (int(radii.max()) + _SUB) ** 2
    offsets = [g[close] for g in (z, y, x)]
    flat = (offsets[0] * shape[1] + offsets[1]) * shape[2] + offsets[2]
    some = max(1, 400_000 // len(flat))
    for first in range(0, len(ids), some):
        part = slice(first, first + some)
        voxel = [u[part] // _SUB for u in units]
        power = -(radii[part] * radii[part])[:, None] + np.zeros(len(flat), dtype=np.int64)
        for u, v, offset in zip(units, voxel, offsets, strict=True):
            distance = offset[None, :] * _SUB - (u[part] - v * _SUB)[:, None]
            power += distance * distance
        where = ((voxel[0] * shape[1] + voxel[1]) * shape[2] + voxel[2])[:, None] + flat
        hit = power < 0
        keys = (power << 32) | ids[part][:, None]
        np.minimum.at(best, where[hit], keys[hit])


# ---------------------------------------------------------------- the same partition?


@dataclass(frozen=True)
class PartitionCheck:
    """The answer of `same_partition`: true or false, and why.

    Examples
    --------
    >>> bool(PartitionCheck(True, "the same partition")), PartitionCheck(False, "2 voxels differ")
    (True, 2 voxels differ)
    """

    same: bool
    message: str

    def __bool__(self) -> bool:
        return self.same

    def __repr__(self) -> str:
        return self.message


def same_partition(a: npt.ArrayLike, b: npt.ArrayLike) -> PartitionCheck:
    """Whether two label arrays cut the voxels into the same objects, whatever the ids.

    Use it as ``assert same_partition(a, b)``: a failing assertion shows the first difference.

    Parameters
    ----------
    a, b
        Labels of the same shape; 0 is background in both.

    Examples
    --------
    >>> same_partition([[1, 1, 0, 2]], [[7, 7, 0, 3]])
    the same partition: 2 objects, 3 voxels of foreground
    >>> same_partition([[1, 1, 0, 2]], [[7, 7, 0, 7]])
    2 objects against 1; object 7 of the second holds parts of 2 objects of the first, ids 1, 2 \
(first at voxels (0, 0) and (0, 3))
    """
    first, second = np.asarray(a), np.asarray(b)
    if first.shape != second.shape:
        return PartitionCheck(False, f"shapes differ: {first.shape} against {second.shape}")
    background = (first == 0) != (second == 0)
    counts = f"{_count(first)} objects against {_count(second)}"
    if background.any():
        where = np.unravel_index(int(np.argmax(background)), background.shape)
        voxel = tuple(int(i) for i in where)
        return PartitionCheck(
            False,
            f"{counts}; foreground differs in {int(background.sum())} voxels, first at {voxel}: "
            f"{first[voxel]} against {second[voxel]}",
        )
    for one, other, names in (
        (first, second, ("second", "first")),
        (second, first, ("first", "second")),
    ):
        message = _first_merge(one, other, names)
        if message:
            return PartitionCheck(False, f"{counts}; {message}")
    return PartitionCheck(
        True,
        f"the same partition: {_count(first)} objects, "
        f"{int(np.count_nonzero(first))} voxels of foreground",
    )


def _count(labels: npt.NDArray[Any]) -> int:
    ids = np.unique(labels)
    return len(ids) - int((ids == 0).any())


def _first_merge(
    parts: npt.NDArray[Any], wholes: npt.NDArray[Any], names: tuple[str, str]
) -> str | None:
    """The first object of ``wholes`` that holds more than one object of ``parts``, in words."""
    part_ids, part = np.unique(parts.ravel(), return_inverse=True)
    whole_ids, whole = np.unique(wholes.ravel(), return_inverse=True)
    pairs, first = np.unique(
        whole.astype(np.int64) * len(part_ids) + part.astype(np.int64), return_index=True
    )
    owners = pairs // max(len(part_ids), 1)
    again = np.flatnonzero(owners[1:] == owners[:-1])
    if len(again) == 0:
        return None
    mine = np.flatnonzero(owners == owners[again[0]])
    ids = ", ".join(str(part_ids[pairs[i] % len(part_ids)]) for i in mine[:5])
    voxels = [
        str(tuple(int(x) for x in np.unravel_index(int(first[i]), parts.shape))) for i in mine[:2]
    ]
    more = ", ..." if len(mine) > 5 else ""
    return (
        f"object {whole_ids[owners[mine[0]]]} of the {names[0]} holds parts of {len(mine)} objects "
        f"of the {names[1]}, ids {ids}{more} (first at voxels {' and '.join(voxels)})"
    )


# ---------------------------------------------------------------- hypothesis strategies


def _strategies() -> Any:
    try:
        import hypothesis.strategies as st
    except ImportError as error:
        raise BackendUnavailable(
            "hypothesis",
            "no package of that name",
            "hypothesis installed",
            "Install it with: pip install 'topo_dask[dev]'.",
        ) from error
    return st


def label_volumes(
    *, max_side: int = 12, max_instances: int = 6
) -> SearchStrategy[npt.NDArray[Any]]:
    """Small label volumes: touching and nested boxes, balls, thin lines, noise, huge ids, none.

    Of any integer type; sides from 1 voxel. Shrinks towards small, empty uint8 volumes.

    Parameters
    ----------
    max_side
        Longest side of a volume.
    max_instances
        Most objects painted (noise and parts may make more connected pieces).

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(label_volumes())
    ... def test_ids_are_not_negative(labels):
    ...     assert labels.ndim == 3 and (labels >= 0).all()
    """
    st = _strategies()

    @st.composite  # type: ignore[untyped-decorator]
    def volumes(draw: Any) -> npt.NDArray[Any]:
        shape = draw(st.tuples(*[st.integers(1, max_side)] * 3))
        dtype = np.dtype(draw(st.sampled_from(["u1", "i4", "u4", "u2", "i8", "u8"])))
        largest = int(np.iinfo(dtype).max)
        some_id = st.one_of(st.integers(1, min(largest, 9)), st.integers(1, largest))
        ids = draw(st.lists(some_id, min_size=0, max_size=max_instances, unique=True))
        labels = np.zeros(shape, dtype=dtype)
        for label in ids:
            labels[_shape_mask(draw, st, shape)] = label
        return labels

    strategy: SearchStrategy[npt.NDArray[Any]] = volumes()
    return strategy


def _shape_mask(draw: Any, st: Any, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """A random box, ball, line or sprinkle of voxels."""
    kind = draw(st.sampled_from(["box", "ball", "line", "noise"]))
    low = [draw(st.integers(0, side - 1)) for side in shape]
    if kind == "noise":
        random = np.random.RandomState(draw(st.integers(0, 2**16)))
        return np.asarray(random.uniform(size=shape) < draw(st.sampled_from([0.1, 0.5, 0.9])))
    if kind == "ball":
        radius = draw(st.integers(0, max(shape)))
        grid = np.ogrid[tuple(slice(0, side) for side in shape)]
        squares = sum((x - c) ** 2 for x, c in zip(grid, low, strict=True))
        return np.asarray(squares <= radius**2)
    mask = np.zeros(shape, dtype=bool)
    if kind == "box":
        high = [draw(st.integers(a, side - 1)) for a, side in zip(low, shape, strict=True)]
        mask[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))] = True
        return mask
    voxel = list(low)
    for axis, step in draw(
        st.lists(st.tuples(st.integers(0, 2), st.sampled_from([-1, 1])), max_size=2 * max(shape))
    ):
        mask[tuple(voxel)] = True
        voxel[axis] = min(max(voxel[axis] + step, 0), shape[axis] - 1)
    mask[tuple(voxel)] = True
    return mask


def block_shapes(shape: Sequence[int]) -> SearchStrategy[tuple[int, ...]]:
    """Block shapes for a volume: single voxels, uneven ones, blocks larger than the volume.

    Shrinks towards one block that holds the whole volume.

    Parameters
    ----------
    shape
        Shape of the volume.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(block_shapes((5, 6, 7)), lambda blocks: True)
    (5, 6, 7)
    """
    st = _strategies()

    def side(length: int) -> Any:
        return st.one_of(
            st.just(length),
            st.integers(1, length),
            st.sampled_from([1, length + 1, 2 * length + 3]),
        )

    strategy: SearchStrategy[tuple[int, ...]] = st.tuples(*[side(int(n)) for n in shape])
    return strategy


def flow_fields(shape: Sequence[int]) -> SearchStrategy[npt.NDArray[np.float32]]:
    """Flow fields ``[3, *shape]``, float32, finite: what networks give, and worse.

    Unit vectors towards a few points, random unit vectors, multiples of 1/4 (positions meet on
    borders of voxels and cells), constant fields that run out of the volume, vectors far longer
    than 1, zero. Shrinks towards zero.

    Parameters
    ----------
    shape
        Shape of the volume.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(flow_fields((2, 3, 4)), lambda flow: True).shape
    (3, 2, 3, 4)
    """
    st = _strategies()
    kinds = ["zero", "points", "random", "quarters", "constant", "long"]

    @st.composite  # type: ignore[untyped-decorator]
    def fields(draw: Any) -> npt.NDArray[np.float32]:
        kind = draw(st.sampled_from(kinds))
        full = (3, *(int(n) for n in shape))
        if kind == "zero":
            return np.zeros(full, dtype=np.float32)
        random = np.random.RandomState(draw(st.integers(0, 2**31)))
        if kind == "quarters":
            return (random.randint(-4, 5, size=full) / 4).astype(np.float32)
        if kind == "constant":
            vector = random.randint(-2, 3, size=(3, 1, 1, 1))
            return np.broadcast_to(vector, full).astype(np.float32)
        if kind == "points":
            field = _towards_points(random, full, n_points=draw(st.integers(1, 4)))
        else:
            field = random.normal(size=full)
        if kind == "long":
            return (4 * field).astype(np.float32)
        length = np.sqrt((field * field).sum(axis=0))
        return np.asarray(field / np.maximum(length, 1e-8), dtype=np.float32)

    strategy: SearchStrategy[npt.NDArray[np.float32]] = fields()
    return strategy


def _towards_points(
    random: np.random.RandomState, full: tuple[int, ...], *, n_points: int
) -> Floats:
    """For each voxel the vector to the nearest of a few random points."""
    points = random.uniform(0, 1, size=(n_points, 3)) * np.asarray(full[1:])
    grid = np.indices(full[1:]).astype(np.float64)
    ways = points[:, :, None, None, None] - grid[None]
    nearest = np.argmin((ways * ways).sum(axis=1), axis=0)
    return np.asarray(np.take_along_axis(ways, nearest[None, None], axis=0)[0])


def segment_parameters() -> SearchStrategy[dict[str, Any]]:
    """Keyword arguments of ``postprocess_single`` and ``segment``: steps, radius, least size.

    Shrinks towards 0 steps of length 1, radius 1 and no least size.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(segment_parameters(), lambda settings: True)
    {'n_steps': 0, 'step_size': 1.0, 'convergence_radius': 1.0, 'min_size': 0}
    """
    st = _strategies()
    strategy: SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
        {
            "n_steps": st.integers(0, 40),
            "step_size": st.sampled_from([1.0, 0.5, 0.1, 0.3, 2.0, 7.5]),
            "convergence_radius": st.sampled_from([1.0, 2.0, 4.0, 0.5, 1.5, 2.5, 3.7, 9.0]),
            "min_size": st.sampled_from([0, 1, 2, 5, 50]),
        }
    )
    return strategy
