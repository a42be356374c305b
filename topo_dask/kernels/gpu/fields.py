"""The fields that diffuse on the device, and the flow that they make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.kernels.cpu.gradient import NOTHING
from topo_dask.kernels.cpu.heat import HOT, HOT_EXPONENT, untouched_iterations
from topo_dask.kernels.gpu.arrays import placed
from topo_dask.kernels.gpu.layout import Core, Layout, Weights

COLDEST = -(2**30)
"""Below the exponent of every number."""


@dataclass(frozen=True)
class Start:
    """How the fields are when their instances begin."""

    zero_at: npt.NDArray[np.int64]  # [K+1, 3], by number: where in the array coordinates are 0
    begun: list[npt.NDArray[Any]] | None  # [nz, ny, nx]: the fields themselves instead


@dataclass(frozen=True)
class Fields:
    """The indicator (float64), and for coordinates these along z, y, x (float32), twice each.

    An iteration reads one copy and writes the other. Of each voxel, it brings 41 bytes to and from
    memory for the coordinate potential (20 read, 20 written, a byte of links), 17 for heat, and
    one more where there is a spatial mask. Of an instance's absolute coordinates float32 would do
    with 25, but not within 1e-4 beyond some hundred voxels from the origin.
    """

    layout: Layout
    relative: bool
    even: list[Any]
    odd: list[Any]

    @classmethod
    def zero(cls, layout: Layout, *, relative: bool) -> Fields:
        """Fields before anything begins."""
        kinds = [np.float64] + [np.float32] * (3 if relative else 0)
        even, odd = ([layout.field(kind) for kind in kinds] for _ in range(2))
        return cls(layout, relative, even, odd)

    def advance(self, start: Start, weights: Weights) -> list[Any]:
        """Make all iterations; give the fields after them."""
        layout = self.layout
        steps = [self._step(self.even, self.odd, weights), self._step(self.odd, self.even, weights)]
        begin = self._beginning(start)
        every = max(1, untouched_iterations(weights) // 4)
        hot = not self.relative and layout.total > untouched_iterations(weights)
        number = layout.roots() if hot else None
        late = layout.begin_times()
        for time in range(layout.total + 1):
            now = self.odd if time % 2 else self.even
            if number is not None and time and (time % every == 0 or time == layout.total):
                self._bring_back(now[0], number)
            if late and late[0] == time:
                begin(late.pop(0), now)
            if time < layout.total:
                steps[time % 2]()
        return self.odd if layout.total % 2 else self.even

    def _step(self, old: list[Any], new: list[Any], weights: Weights) -> Callable[[], None]:
        layout = self.layout
        count, *how = layout.threads()
        walled = self.relative and layout.walls is not None
        name = "relax_walled_coordinates" if walled else "relax_coordinates"
        masks = [layout.links, layout.walls] if walled or not self.relative else [layout.links]
        values = (*old, *new, *masks, *layout.grid, *how, *weights)
        name = name if self.relative else "relax_heat"
        return layout.device.prepare("diffusion", name, count, *values)

    def _beginning(self, start: Start) -> Callable[[int, list[Any]], None]:
        """What writes the values of the instances that begin at a time into the fields of then."""
        layout, device = self.layout, self.layout.device
        zero_at = device.put(start.zero_at)
        begun: list[Any] = [None] * 4
        if start.begun is not None:
            begun = [placed(device, values) for values in start.begun]
        one = 1.0 if self.relative else HOT

        def begin(time: int, now: list[Any]) -> None:
            known = (layout.voxels, layout.local, layout.begin_there, time)
            place = (now[0], begun[0], one, *layout.grid[1:])
            device.launch("diffusion", "begin_indicator", *known, *place)
            for axis in range(3 if self.relative else 0):
                field = (now[1 + axis], begun[1 + axis], zero_at, axis, *layout.grid[1:])
                device.launch("diffusion", "begin_coordinate", *known, *field)

        return begin

    def _bring_back(self, values: Any, root: Any) -> None:
        """Scale each piece by a power of two, so that its hottest voxel is as hot as at first."""
        device, size = self.layout.device, values.size
        hottest = device.empty(size, np.int32)
        hottest[...] = COLDEST
        device.launch("diffusion", "hottest_of_pieces", size, values, root, hottest)
        device.launch("diffusion", "scale_pieces", size, values, root, hottest, HOT_EXPONENT)

    def flow(
        self, fields: list[Any], core: Core, factors: npt.NDArray[np.float64], least: float
    ) -> Any:
        """Unit vectors of the core, on the device; ``factors`` as those of the CPU's kernel."""
        layout, device = self.layout, self.layout.device
        flow = device.empty((3, *core.shape), np.float32)
        along = fields[1:] if self.relative else [None] * 3
        known = (layout.local, layout.links, layout.walls, device.put(factors))
        box = (*layout.grid, *core.first, *core.shape[1:])
        values = (fields[0], *along, *known, *box, least, least * NOTHING, flow)
        device.launch("diffusion", "flow_of_fields", core.size, *values)
        return flow
