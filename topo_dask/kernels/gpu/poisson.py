"""The Poisson potential on the device: all instances of an array are one system.

Conjugate gradients with a multigrid cycle, see `multigrid.py`; numbers that steer them stay on the
device, and only the largest residual is looked at. The meaning of every option and of ``tolerance``
is that of `topo_dask.kernels.cpu.poisson`; since all instances go on until the last is solved, none
is less exact than there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.errors import TopoError
from topo_dask.kernels.cpu.labels import Integers
from topo_dask.kernels.cpu.poisson import ALONE, MOST_ITERATIONS, SOLVED, Beyond, Spacing
from topo_dask.kernels.gpu.arrays import fetched, placed
from topo_dask.kernels.gpu.device import Device, find_device
from topo_dask.kernels.gpu.layout import Core
from topo_dask.kernels.gpu.multigrid import Level, cycle, levels_of
from topo_dask.kernels.gpu.pieces import roots

Float64 = npt.NDArray[np.float64]

PARTS = (2**14, 2**7)
"""Numbers that a sum over all voxels goes through."""


@dataclass(frozen=True)
class _Block:
    """An array on the device, and what is beyond its faces."""

    device: Device
    labels: Any  # uint64 [Z*Y*X]
    annotated: Any  # uint8, or None
    faces: list[Any]  # float64 or None: z-, z+, y-, y+, x-, x+
    shape: tuple[int, ...]
    spacing: Spacing

    @classmethod
    def of(
        cls,
        labels: Integers,
        spatial_mask: npt.NDArray[Any] | None,
        spacing: Spacing,
        beyond: Beyond | None,
    ) -> _Block:
        """Put them there."""
        device = find_device()
        there = placed(device, labels).ravel().astype(np.uint64, copy=False)
        annotated = None if spatial_mask is None else placed(device, spatial_mask > 0.5)
        faces = [
            None if face is None else device.put(np.asarray(face, dtype=np.float64))
            for face in (beyond or [None] * 6)
        ]
        lengths = tuple(float(s) for s in spacing)
        return cls(device, there, annotated, faces, labels.shape, lengths)  # type: ignore[arg-type]

    @property
    def size(self) -> int:
        """Voxels."""
        return int(self.labels.size)

    @property
    def weights(self) -> tuple[float, ...]:
        """Of links along z, y, x."""
        return tuple(s**-2 for s in self.spacing)

    def solve(self, u: Any, tolerance: float) -> None:
        """Overwrite u ``[Z*Y*X]`` by the solution; 0 in the background."""
        device, size = self.device, self.size
        links, opened = device.empty(size, np.uint8), device.empty(size, np.uint8)
        right = device.empty(size, np.float64)
        known = (self.labels, self.annotated, *self.faces, *self.shape, *self.weights)
        device.launch("poisson", "assemble", size, *known, links, opened, right)
        inside = self.labels != 0
        u[~inside] = 0
        if bool((opened[inside] != 63).any()):
            self._take_out_closed(links, opened, right, u)
        solver = _Solver(device, self._finest(links, opened), u, right)
        if solver.run(self.shape, self.spacing, tolerance) > MOST_ITERATIONS:
            raise TopoError(
                "tolerance",
                f"{tolerance}, not reached in {MOST_ITERATIONS} iterations",
                "a tolerance that float64 can reach",
                "Choose a larger one.",
            )

    def _take_out_closed(self, links: Any, opened: Any, right: Any, u: Any) -> None:
        device, size = self.device, self.size
        root = roots(device, links, (*self.shape, self.shape[2]))  # type: ignore[arg-type]
        walled = device.zeros(size, np.uint8)
        device.launch("poisson", "mark_walled", size, links, opened, root, walled)
        known = (self.labels, root, walled)
        device.launch("poisson", "take_out_closed", size, *known, links, opened, right, u)

    def _finest(self, links: Any, opened: Any) -> Level:
        """The level of the voxels."""
        device, xp = self.device, self.device.xp
        table = np.zeros(ALONE + 1)
        for code in range(ALONE):
            table[code] = sum(self.weights[d >> 1] for d in range(6) if code >> d & 1)
        table[ALONE] = 1
        weight = device.put(table)
        _, number = xp.unique(self.labels, return_inverse=True)
        system = (links, opened, *self.shape[1:], *self.weights)
        at = xp.arange(self.size, dtype=np.int64)
        row = at // self.shape[2]
        places = (row // self.shape[1], row % self.shape[1], at % self.shape[2])
        wall, diagonal = weight[opened & ~links], weight[opened]
        number = number.reshape(-1).astype(np.int64, copy=False)
        return Level(device, "voxels", system, self.size, places, number, wall, diagonal)

    def flow(self, u: Any, core: Core, tolerance: float) -> Any:
        """Unit vectors of a core."""
        flow = self.device.empty((3, *core.shape), np.float32)
        known = (self.labels, u, self.annotated, *self.faces, *self.shape)
        box = (*core.first, *core.shape[1:], *self.spacing)
        values = (*known, *box, tolerance, flow)
        self.device.launch("poisson", "flow_of_potential", core.size, *values)
        return flow


class _Solver:
    """Preconditioned conjugate gradients over all voxels.

    Of each voxel, an iteration brings about 210 bytes to and from memory: 78 for the vectors and
    the matrix, 40 for the two products and the largest residual, 90 for the finest level of the
    cycle; and coarser levels some 40 for tissue.
    """

    def __init__(self, device: Device, finest: Level, u: Any, right: Any) -> None:
        self.device, self.finest, self.u, self.right = device, finest, u, right
        self.scalars = device.zeros(4, np.float64)
        self.parts = [device.empty(n, np.float64) for n in PARTS]

    def run(self, shape: tuple[int, ...], spacing: Spacing, tolerance: float) -> int:
        """Iterate until no residual exceeds the tolerance; give the number of iterations."""
        device, size, system = self.device, self.finest.size, self.finest.system
        z, p, q = (device.zeros(size, np.float64) for _ in range(3))
        r = device.empty(size, np.float64)
        device.launch("poisson", "apply_voxels", size, *system, self.u, self.right, r)
        residual = self._reduce("largest", 3, r)
        residual()
        if self._worst() <= tolerance:
            return 0
        steps = [
            cycle(levels_of(self.finest, shape, spacing), r, z),
            self._reduce("products", 0, r, z),
            device.prepare("poisson", "new_direction", size, self.scalars, 0, z, p),
            device.prepare("poisson", "apply_voxels", size, *system, p, None, q),
            self._reduce("products", 2, p, q),
            device.prepare("poisson", "step_along", size, self.scalars, p, q, self.u, r),
            residual,
        ]
        first = device.prepare("poisson", "new_direction", size, self.scalars, 1, z, p)
        for done in range(1, MOST_ITERATIONS + 1):
            for number, step in enumerate(steps):
                (first if number == 2 and done == 1 else step)()
            if self._worst() <= tolerance:
                return done
        return MOST_ITERATIONS + 1

    def _worst(self) -> float:
        return float(self.device.get(self.scalars)[3])

    def _reduce(self, kernel: str, into: int, *vectors: Any) -> Callable[[], None]:
        """What sums the products of two vectors, or finds the largest of one, into a scalar."""
        device = self.device
        sums = int(kernel == "products")
        many, few = self.parts
        ones = device.zeros(many.size, np.float64) + 1.0
        again = (many, ones) if sums else (many,)
        stages = [
            device.prepare("poisson", kernel, many.size, vectors[0].size, *vectors, many),
            device.prepare("poisson", kernel, few.size, many.size, *again, few),
            device.prepare("poisson", "finish", 1, few.size, few, sums, into, self.scalars),
        ]

        def run() -> None:
            for stage in stages:
                stage()

        return run


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
    """Solve the Poisson equation inside every instance, as `topo_dask.kernels.cpu` does.

    Parameters and the meaning of the answer are those of
    `topo_dask.kernels.cpu.poisson_potential`; ``threads`` is ignored.

    Examples
    --------
    >>> poisson_potential(np.array([[[0, 5, 5, 5, 0]]]))[0, 0].round(6)
    array([0. , 1.5, 2. , 1.5, 0. ])
    """
    device = find_device()
    with device.working():
        block = _Block.of(labels, spatial_mask, spacing, beyond)
        u = device.zeros(block.size, np.float64)
        if start is not None:
            u[...] = placed(device, start).ravel()
        block.solve(u, tolerance)
        made: Float64 = fetched(device, u.reshape(labels.shape), like=labels)
        return made


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
    """Unit vectors up the gradient of a potential, as `topo_dask.kernels.cpu.flow_of_potential`.

    Examples
    --------
    >>> labels = np.array([[[0, 5, 5, 5, 0]]])
    >>> flow_of_potential(labels, poisson_potential(labels))[2, 0, 0]
    array([ 0.,  1.,  0., -1.,  0.], dtype=float32)
    """
    device = find_device()
    with device.working():
        block = _Block.of(labels, spatial_mask, spacing, beyond)
        u = placed(device, potential)
        flow = block.flow(u, Core.of(core, labels.shape), tolerance)
        made: npt.NDArray[np.float32] = fetched(device, flow, like=labels)
        return made


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
    """`flow_of_potential` of the `poisson_potential` of an array; the potential stays there.

    Examples
    --------
    >>> poisson_flow(np.array([[[0, 5, 5, 5, 0]]]))[2, 0, 0]
    array([ 0.,  1.,  0., -1.,  0.], dtype=float32)
    """
    device = find_device()
    with device.working():
        block = _Block.of(labels, spatial_mask, spacing, beyond)
        u = device.zeros(block.size, np.float64)
        block.solve(u, tolerance)
        flow = block.flow(u, Core.of(core, labels.shape), tolerance)
        made: npt.NDArray[np.float32] = fetched(device, flow, like=labels)
        return made
