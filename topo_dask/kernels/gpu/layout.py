"""The voxels of an array on the device, laid out for iterations over all its instances at once.

Numbers of instances are rows of their table, counted from 1; a byte a voxel says which of its six
neighbours are of the same instance, so that no iteration compares labels. Rows are padded to whole
groups of four voxels. Instances that need fewer iterations than others begin later, so that all
end together: until then their voxels are 0 and so change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.errors import InvalidArgument
from topo_dask.kernels.cpu.labels import Integers
from topo_dask.kernels.cpu.space import NEVER
from topo_dask.kernels.gpu.arrays import placed
from topo_dask.kernels.gpu.device import Device
from topo_dask.kernels.gpu.pieces import roots

GROUP = 4
"""Voxels along x that a thread works on."""

PLANES = 16
"""Planes that a thread goes through; their values then come about once from memory."""

Weights = tuple[float, float, float]


def numbered(device: Device, labels: Integers, ids: npt.NDArray[np.uint64]) -> Any:
    """Numbers of the instances of an array on the device: 0, or its row in ``ids`` plus 1.

    Raises
    ------
    InvalidArgument
        The table lacks an id: it was made of other labels.
    """
    count = int(labels.size)
    on_device = placed(device, labels).ravel().astype(np.uint64, copy=False)
    local, missing = device.empty(count, np.int32), device.zeros(1, np.uint64)
    table = device.put(np.asarray(ids, dtype=np.uint64))
    args = (on_device, table, len(ids), local, missing)
    device.launch("diffusion", "number_instances", count, *args)
    unknown = int(device.get(missing)[0])
    if unknown:
        raise InvalidArgument(
            "instances",
            f"a table without id {unknown}",
            "a table of the same labels",
            "Make it with topo_dask.instance_table(labels) of the whole volume.",
        )
    return local


@dataclass(frozen=True)
class Core:
    """The part of an array that is asked for."""

    first: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, core: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Core:
        """From slices, or all."""
        slices = core or (slice(None),) * 3
        box = [s.indices(n)[:2] for s, n in zip(slices, shape, strict=True)]
        return cls(tuple(a for a, _ in box), tuple(max(0, b - a) for a, b in box))

    @property
    def size(self) -> int:
        """Voxels."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def slices(self) -> tuple[slice, ...]:
        """As slices of the array."""
        return tuple(slice(a, a + n) for a, n in zip(self.first, self.shape, strict=True))


@dataclass(frozen=True)
class Layout:
    """See the module."""

    device: Device
    grid: tuple[int, int, int, int]  # nz, ny, nx, from row to row
    local: Any  # int32 [nz * ny * nx]: numbers
    links: Any  # uint8 [nz * ny * width]
    walls: Any  # the same for no-flux walls, or None
    begin: npt.NDArray[np.int32]  # by number: when the instance begins; NEVER if not at all
    begin_there: Any  # the same on the device
    total: int  # iterations from the first beginning to the common end

    @property
    def voxels(self) -> int:
        """Without padding."""
        return int(self.local.size)

    def field(self, dtype: Any) -> Any:
        """A field of zeros."""
        return self.device.zeros(self.links.size, dtype)

    def roots(self) -> Any:
        """See `pieces.roots`."""
        return roots(self.device, self.links, self.grid)

    def begin_times(self) -> list[int]:
        """When instances begin, ascending."""
        return [int(t) for t in np.unique(self.begin) if t < NEVER]

    def threads(self) -> tuple[int, int, int]:
        """How ``relax`` in diffusion.cu divides the grid: items, log2 of lanes, planes."""
        nz, ny, _, width = self.grid
        groups = width // GROUP
        log_lanes = min(5, max(0, (groups - 1).bit_length()))
        lanes, rows = 1 << log_lanes, 256 >> log_lanes
        tiles = -(-groups // lanes) * -(-ny // rows) * -(-nz // PLANES)
        return tiles * 256, log_lanes, PLANES

    def core_of(self, field: Any, core: Core) -> Any:
        """The core of a field as an array of three axes; 0 where no instance was asked for."""
        nz, ny, nx, width = self.grid
        values = field.reshape(nz, ny, width)[core.slices]
        asked = self.begin_there[self.local.reshape(nz, ny, nx)[core.slices]] != NEVER
        return self.device.xp.where(asked, values, field.dtype.type(0))


def lay_out(
    device: Device,
    labels: Integers,
    ids: npt.NDArray[np.uint64],
    iterations: npt.NDArray[np.int64],
    core: Core,
    spatial_mask: npt.NDArray[Any] | None,
) -> Layout:
    """Lay out an array for the instances that are in its core.

    Parameters
    ----------
    iterations
        How many each instance of the table is to make; negative: none of interest.
    """
    nz, ny, nx = labels.shape
    local = numbered(device, labels, ids)
    present = device.zeros(len(ids) + 1, np.uint8)
    box = (ny, nx, *core.first, *core.shape[1:])
    device.launch("diffusion", "mark_present", core.size, local, present, *box)
    wanted = device.get(present).astype(np.bool_)
    wanted[0] = False
    left = np.where(wanted, np.concatenate(([-1], iterations)), -1)
    total = max(0, int(left.max(initial=0)))
    begin = np.where(left >= 0, total - left, NEVER).astype(np.int32)

    width = -(-nx // GROUP) * GROUP
    grid, size = (nz, ny, nx, width), nz * ny * width
    links = device.empty(size, np.uint8)
    device.launch("diffusion", "neighbour_mask", size, local, links, *grid)
    walls = None
    if spatial_mask is not None:
        walls = device.empty(size, np.uint8)
        annotated = placed(device, spatial_mask > 0.5)
        device.launch("diffusion", "wall_mask", size, local, annotated, walls, *grid)
    return Layout(device, grid, local, links, walls, begin, device.put(begin), total)
