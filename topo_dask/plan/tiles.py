"""Plans of the jobs that blend tiles: `map_tiles`, `fuse_mosaic`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from topo_dask.graph.blend import device_memory_of_tiles, memory_of_tiles
from topo_dask.graph.mosaic import device_memory_of_mosaic, memory_of_mosaic
from topo_dask.graph.tiles import TileGrid, TilePlan, tile_blocks
from topo_dask.grid import BlockGrid
from topo_dask.plan.outline import Decision, Machine, Plan, Space, StagePlan, space_of
from topo_dask.plan.work import Work, peak


@dataclass(frozen=True)
class TilesWork(Work):
    """A job of `map_tiles`.

    Parameters
    ----------
    tiles
        The tiles.
    chunks
        Of the output.
    window
        Tasks in flight for each that runs.
    channels, itemsize
        Of the result, if it is declared.
    chosen
        Whether the blocks are the user's; else they follow from the workers.
    backend
        What is to blend.
    """

    tiles: TileGrid
    chunks: tuple[int, ...]
    window: int
    channels: int | None = None
    itemsize: int | None = None
    chosen: bool = False
    zarr_format: int = 3
    backend: str = ""

    @property
    def _leading(self) -> int:
        return self.channels or 1

    @property
    def _size(self) -> int:
        return self.itemsize or 4

    def plan(self, machine: Machine) -> Plan:
        """See `Work`."""
        if self.chosen:
            return super().plan(machine)
        sides = tile_blocks(self.tiles, self.chunks, ahead=self.window * machine.slots)
        return self.reblocked(sides).plan(machine)

    def reblocked(self, blocks: Sequence[int]) -> Work:
        """The same in other blocks."""
        made = super().reblocked(blocks)
        assert isinstance(made, TilesWork)
        return replace(made, chosen=True)

    def decisions(self) -> Iterator[Decision]:
        """See `Work`."""
        yield Decision("tiles", f"{self.tiles.computed:,}", "each is computed once")
        if self.itemsize is None:
            why = "one tile tells when the run begins; here one float32 a voxel"
            yield Decision("result", "not declared", why)
        yield Decision("model", "not counted", "what it takes itself only it knows")

    @property
    def _overlapping(self) -> float:
        """How many tiles a voxel is in, on average."""
        pairs = zip(self.tiles.starts, self.tiles.stops, self.tiles.shape, strict=True)
        return math.prod(float((b - a).sum()) / n for a, b, n in pairs)

    def _own(self) -> tuple[int, int]:
        """Tiles that a block computes at most, and voxels of the box around them."""
        plan = TilePlan(self.tiles, self.grid)
        most = math.prod(int((x.own_high - x.own_low).max()) for x in plan.axes)
        sides = zip(plan.axes, self.tiles.starts, self.tiles.stops, self.tiles.context, strict=True)
        seen = 1
        for axis, starts, stops, context in sides:
            rows = [(a, b) for a, b in zip(axis.own_low, axis.own_high, strict=True) if b > a]
            seen *= max(int(stops[b - 1] - starts[a]) + 2 * context for a, b in rows)
        return most, seen

    def stages(self, machine: Machine) -> Iterator[StagePlan]:
        """See `Work`."""
        image = self.inputs[0]
        per_voxel = image.itemsize * math.prod(image.shape[: -len(self.tiles.shape)])
        tile = math.prod(self.tiles.largest)
        around = zip(self.tiles.largest, self.tiles.context, strict=True)
        given = math.prod(n + 2 * c for n, c in around)
        values = self._leading * self._size
        if self.itemsize is None:
            once = peak(per_voxel * given + 4 * values * tile)
            yield StagePlan("probe", 1, once, per_voxel * given, values * tile, 1)
        most, seen = self._own()
        own = [most * tile, tile, round(self._overlapping * self.block), self.block]
        memory = peak(per_voxel * (seen + given) + memory_of_tiles(own, self._leading, self._size))
        share = self.tiles.computed / len(self.tiles)
        read = per_voxel * given * self.tiles.computed
        handed = round(share * (self._overlapping - 1) * self.voxels) * values
        written = values * self.voxels + handed
        files = self.output().files + 2 * len(self.grid)
        part = min(tile, self.block)
        device = device_memory_of_tiles(self.block, part, self._leading, self._size)
        sizes = read + handed, written, files
        yield StagePlan("tiles", len(self.grid), memory, *sizes, device_bytes=device)

    def output(self) -> Space:
        """See `Work`."""
        lead = () if self.channels is None else (self.channels,)
        shape, chunks = (*lead, *self.tiles.shape), (*lead, *self.chunks)
        return space_of(shape, chunks, self._size, zarr_format=self.zarr_format)

    def scratch(self, stages: Sequence[StagePlan]) -> Space:
        """See `Work`."""
        base = super().scratch(stages)
        size = stages[-1].write_bytes - self._leading * self._size * self.voxels
        files = 2 * len(self.grid)
        return Space(base.size + size, base.files + files, max(base.in_folder, len(self.grid)))


@dataclass(frozen=True)
class MosaicWork(Work):
    """A job of `fuse_mosaic`; the inputs are the tiles.

    Parameters
    ----------
    blocks
        How many blocks are written.
    channels, itemsize
        Of the output.
    chunks
        Of the output.
    order
        Of the splines.
    checked
        Files that are read once before, and how many of them a task reads.
    backend
        What is to compute.
    """

    blocks: int
    channels: int
    itemsize: int
    chunks: tuple[int, ...]
    order: int
    checked: tuple[int, int] = (0, 1)
    zarr_format: int = 3
    backend: str = ""

    @property
    def _values(self) -> int:
        return max(1, self.channels)

    def decisions(self) -> Iterator[Decision]:
        """See `Work`."""
        yield Decision("tiles", f"{len(self.inputs):,}", "")
        empty = len(self.grid) - self.blocks
        if empty:
            yield Decision("empty", f"{empty:,} blocks", "no tile reaches them, none is written")

    def stages(self, machine: Machine) -> Iterator[StagePlan]:
        """See `Work`."""
        every = sum(tile.size for tile in self.inputs)
        files, together = self.checked
        if files:
            tasks = -(-files // together)
            yield StagePlan("check", tasks, peak(2**26), every)
        largest = max(self.inputs, key=lambda tile: tile.size)
        axes = len(self.grid.shape)
        tile = math.prod(largest.shape[-axes:])
        # What a tile gives to a block may be turned in it.
        part = min(tile, round(2 * self.block))
        need = memory_of_mosaic(self.block, part, self._values, largest.itemsize, self.order)
        device = device_memory_of_mosaic(self.block, part, self._values, self.order)
        output = self.output()
        sizes = 2 * every, output.size, output.files
        yield StagePlan("fuse", self.blocks, peak(need), *sizes, device_bytes=device)

    def output(self) -> Space:
        """See `Work`."""
        lead = (self.channels,) if self.channels else ()
        shape = (*lead, *self.grid.shape)
        return space_of(shape, self.chunks, self.itemsize, zarr_format=self.zarr_format)

    def reblocked(self, blocks: Sequence[int]) -> Work:
        """The same in other blocks."""
        grid = BlockGrid(self.grid.shape, tuple(blocks))
        return replace(self, grid=grid, blocks=len(grid))
