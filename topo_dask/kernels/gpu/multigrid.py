"""The preconditioner of the Poisson solver on the device: one multigrid cycle over all instances.

A node is a voxel, or on coarser levels what one instance has in a box of 2x2x2 nodes, as in
`topo_dask.kernels.cpu.multigrid`; but boxes are those of the array, and damped Jacobi steps take
the place of sweeps from node to node, so that all nodes are worked on at once. Boxes gather from
lists of their nodes: every sum has its order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from topo_dask.kernels.cpu.multigrid import FARTHER, LONE, WALL_FARTHER
from topo_dask.kernels.gpu.device import Device

DAMPING = 0.85
"""Of a Jacobi step, by trial; below 1, so that a cycle is symmetric and positive."""


@dataclass
class Level:
    """Nodes, and the boxes that they are in."""

    device: Device
    kind: str  # "voxels" or "boxes": which kernels work on it
    system: tuple[Any, ...]  # their first arguments
    size: int
    places: tuple[Any, Any, Any]  # int64 [N] each: z, y, x of the nodes
    number: Any  # int64 [N] of the instance, 0 for none
    wall: Any  # float64 [N]
    diagonal: Any  # float64 [N], 0 for nodes that are none
    parent: Any = None  # int32 [N]: its box, or -1
    starts: Any = None  # int32 [M + 1], [N']: the nodes of each box
    children: Any = None

    def coarser(self, shape: tuple[int, ...], halved: tuple[int, ...]) -> Level | None:
        """The level of its boxes, if there are any; ``shape`` is that of the nodes' lattice."""
        device, xp = self.device, self.device.xp
        lone = self.wall >= LONE * (self.diagonal - self.wall)  # also nodes that are none
        inside = xp.flatnonzero(~lone)
        self.parent = device.empty(self.size, np.int32)
        self.parent[...] = -1
        if inside.size == 0:
            return None
        z, y, x = (p[inside] >> h for p, h in zip(self.places, halved, strict=True))
        ny, nx = (-(-n // (1 + h)) for n, h in zip(shape[1:], halved[1:], strict=True))
        most = int(self.number.max()) + 1
        key = ((z * ny + y) * nx + x) * most + self.number[inside]
        boxes, first, box = xp.unique(key, return_index=True, return_inverse=True)
        count = int(boxes.size)
        self.parent[inside] = box.astype(np.int32)
        order = xp.argsort(box, kind="stable")
        self.children = inside[order].astype(np.int32)
        self.starts = device.zeros(count + 1, np.int32)
        self.starts[1:] = xp.cumsum(xp.bincount(box, minlength=count)).astype(np.int32)
        near, weights = device.empty((count, 6), np.int32), device.empty((count, 6), np.float64)
        wall = device.empty(count, np.float64)
        known = (*self.system, self.wall, self.starts, self.children, self.parent)
        bits = sum(h << axis for axis, h in enumerate(halved))
        how = (bits, FARTHER, WALL_FARTHER, near, weights, wall)
        device.launch("poisson", f"join_{self.kind}", count, *known, *how)
        diagonal = wall + weights.sum(axis=1)
        system = (near, weights, 1 / diagonal)
        places = z[first], y[first], x[first]
        number = self.number[inside][first]
        return Level(device, "boxes", system, count, places, number, wall, diagonal)


def _halved(lengths: list[float]) -> tuple[int, ...]:
    """Along which axes boxes grow: where nodes lie closest."""
    return tuple(int(length < 1.5 * min(lengths)) for length in lengths)


def levels_of(finest: Level, shape: tuple[int, ...], spacing: tuple[float, ...]) -> list[Level]:
    """All levels that have nodes, from the finest on."""
    levels, lengths = [finest], [float(s) for s in spacing]
    while True:
        halved = _halved(lengths)
        coarser = levels[-1].coarser(shape, halved)
        if coarser is None:
            return levels
        levels.append(coarser)
        shape = tuple(-(-n // (1 + h)) for n, h in zip(shape, halved, strict=True))
        lengths = [length * (1 + h) for length, h in zip(lengths, halved, strict=True)]


def cycle(levels: list[Level], right: Any, out: Any) -> Callable[[], None]:
    """Give what runs one V-cycle from 0 for a right side of the finest level into ``out``."""
    device = levels[0].device

    def vectors(first: Any) -> list[Any]:
        return [first] + [device.empty(level.size, np.float64) for level in levels[1:]]

    rights, made = vectors(right), vectors(out)
    spare = vectors(device.empty(levels[0].size, np.float64))
    down: list[Callable[[], None]] = []
    up: list[Callable[[], None]] = []
    for n, level in enumerate(levels):
        known, here = (level.kind, level.size, *level.system), (rights[n], DAMPING)
        coarse = made[n + 1] if n + 1 < len(levels) else None
        if coarse is not None:
            down.append(_prepare(device, "leave", known, *here, spare[n]))
            lists = (level.starts, level.children, spare[n], rights[n + 1])
            down.append(device.prepare("poisson", "gather", levels[n + 1].size, *lists))
        last = _prepare(device, "smooth", known, *here, spare[n], made[n])
        up.append(last)
        up.append(_prepare(device, "correct", known, *here, level.parent, coarse, spare[n]))
    steps = (*down, *reversed(up))

    def run() -> None:
        for step in steps:
            step()

    return run


def _prepare(
    device: Device, name: str, known: tuple[Any, ...], *arguments: Any
) -> Callable[[], None]:
    """A kernel for the level that is known by its kind, size and system."""
    kind, size, *system = known
    return device.prepare("poisson", f"{name}_{kind}", size, *system, *arguments)
