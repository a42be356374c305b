"""Plans of the jobs that go from labels to flows: `flows`, `flow_targets`, `instance_table`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from topo_dask.config import FlowSettings
from topo_dask.graph.acceleration import explained
from topo_dask.graph.context_or_rounds import FLOW_BYTES, STATE_BYTES, ContextChoice, choose_context
from topo_dask.graph.device import device_memory_of_flow
from topo_dask.graph.flows import memory_of_flow
from topo_dask.graph.instances import INSTANCE_BYTES, VOXELS_PER_INSTANCE, memory_of_facts
from topo_dask.graph.targets import memory_of_foreground
from topo_dask.plan.outline import Decision, Machine, Space, StagePlan, space_of
from topo_dask.plan.work import Work, all_read, largest_read, peak, tree
from topo_dask.storage import output_chunks

SCHWARZ_ROUNDS = 8
"""Rounds that blocks are taken to need until they agree; it shows only in the run."""


@dataclass(frozen=True)
class InstancesWork(Work):
    """A job of `instance_table`."""

    classes: int = 1

    @property
    def rows(self) -> int:
        """Instances that the tables of all blocks are taken to hold."""
        return len(self.grid) + self.voxels // VOXELS_PER_INSTANCE

    def facts(self) -> Iterator[StagePlan]:
        """Stages table and facts."""
        blocks, itemsize = len(self.grid), self.inputs[0].itemsize
        table, size = INSTANCE_BYTES * self.rows, self.voxels * itemsize
        memory = peak(memory_of_facts(self.block, itemsize))
        tasks = self.classes * blocks
        yield StagePlan(
            "table", tasks, memory, self.classes * size, self.classes * table, files=tasks
        )
        for level, count in enumerate(tree(blocks)):
            name = "facts" if level == 0 else f"facts-{level + 1}"
            share = table if count == 1 else -(-table // count)
            memory = peak(3 * share, voxels=False)
            both = self.classes * table
            yield StagePlan(name, self.classes * count, memory, both, both, self.classes * count)

    def stages(self, machine: Machine) -> Iterator[StagePlan]:
        """See `Work`."""
        yield from self.facts()

    def output(self) -> Space:
        """See `Work`."""
        return Space(INSTANCE_BYTES * self.rows, 1, 1)

    def scratch(self, stages: Sequence[StagePlan]) -> Space:
        """See `Work`."""
        base = super().scratch(stages)
        size = sum(stage.write_bytes for stage in stages)
        files = sum(stage.files for stage in stages)
        return Space(base.size + size, base.files + files, max(base.in_folder, len(self.grid)))


@dataclass(frozen=True)
class FlowsWork(InstancesWork):
    """A job of `flows`, or of `flow_targets` with one setting for each class.

    Parameters
    ----------
    settings
        Of each class.
    overlap
        Voxels that tiles share.
    origin
        Of the first voxel.
    itemsize
        Of the output.
    table
        `InstanceTable`, where it is known before.
    reach
        Of each class that is trained on near its boundary; empty for `flows`.
    """

    settings: tuple[FlowSettings, ...] = (FlowSettings(),)
    overlap: tuple[int, ...] = (0, 0, 0)
    origin: tuple[int, ...] = (0, 0, 0)
    itemsize: int = 4
    table: Any = None
    reach: tuple[float | None, ...] = ()
    zarr_format: int = 3

    @property
    def backend(self) -> str:
        """See `Work`."""
        return self.settings[0].backend

    @property
    def masked(self) -> bool:
        """Whether there is a spatial mask."""
        return len(self.inputs) > 1

    @cached_property
    def choices(self) -> tuple[ContextChoice | None, ...]:
        """Context or rounds of each class; ``None`` where neither is needed."""
        found: list[ContextChoice | None] = []
        for settings in self.settings:
            if settings.method == "direct" or settings.potential == "poisson":
                found.append(None)
                continue
            found.append(
                choose_context(
                    settings,
                    self.grid,
                    table=self.table,
                    origin=self.origin,
                    itemsize=self.inputs[0].itemsize,
                    blended=any(self.overlap),
                )
            )
        return tuple(found)

    def decisions(self) -> Iterator[Decision]:
        """See `Work`."""
        for number, (settings, choice) in enumerate(zip(self.settings, self.choices, strict=True)):
            name = "context" if not self.reach else f"class {number}"
            if self._by_schwarz(settings):
                why = "blocks solve in turns until they agree; with the table it may be less"
                yield Decision(name, f"a halo of at most {self._halo(settings)} voxels", why)
                continue
            if choice is None:
                how = settings.method if settings.method == "direct" else settings.potential
                yield Decision(name, "none", f"{how} needs none around a block")
                continue
            given, _, reason = str(choice).partition(": ")
            if self.table is None:
                reason += "; as if every block held large instances: with the table of instances "
                reason += "it may be less"
            yield Decision(name, given, reason)
            if settings.acceleration != "none":
                what, why = explained(settings, choice.sweeps, choice.rounds)
                yield Decision(f"{name}: acceleration" if self.reach else "acceleration", what, why)

    def stages(self, machine: Machine) -> Iterator[StagePlan]:
        """See `Work`."""
        if self.table is None:
            yield from self.facts()
        if any(s.method == "direct" and self.masked for s in self.settings):
            yield from self._centres()
        for number, choice in enumerate(self.choices):
            if choice is not None and choice.rounds:
                yield from self._rounds(number, choice)
            elif self._by_schwarz(self.settings[number]):
                yield self._schwarz(number)
        yield self._flows()
        if any(self.overlap):
            yield self._fuse()
        if self.reach:
            yield self._foreground()

    def _by_schwarz(self, settings: FlowSettings) -> bool:
        """Whether blocks solve for the Poisson potential in turns."""
        poisson = settings.method == "diffusion" and settings.potential == "poisson"
        return poisson and len(self.grid) > 1

    def _halo(self, settings: FlowSettings) -> int:
        """What blocks see around them then, at most."""
        if settings.context != "auto":
            return max(1, settings.context)
        return max(1, min(32, min(self.grid.largest) // 4))

    def _schwarz(self, number: int) -> StagePlan:
        """Those rounds, all in one row."""
        largest, every = self._read(number)
        settings, blocks = self.settings[number], len(self.grid)
        size = self.inputs[0].itemsize
        need = memory_of_flow(self.block, largest, size, settings, masked=self.masked)
        read = SCHWARZ_ROUNDS * every * (sum(v.itemsize for v in self.inputs) + 16)
        written = SCHWARZ_ROUNDS * 8 * self.voxels
        name = "schwarz-1.." if not self.reach else f"class-{number}-schwarz-1.."
        tasks = SCHWARZ_ROUNDS * blocks
        return StagePlan(name, tasks, peak(need + 24 * largest), read, written, 2 * tasks)

    def _read(self, number: int) -> tuple[int, int]:
        """Voxels that the largest block of a class, and all of them, read for the flow."""
        settings, choice = self.settings[number], self.choices[number]
        width = max(self.overlap) // 2 + max(self.overlap) % 2
        if self._by_schwarz(settings):
            width = self._halo(settings) + 1
        elif settings.method == "diffusion" and settings.potential == "poisson":
            width = max(self.grid.shape)
        elif choice is not None:
            width += choice.width + (0 if choice.rounds else 1)
        return largest_read(self.grid, width), all_read(self.grid, width)

    def _flows(self) -> StagePlan:
        memory, read, device, count = 0, 0, 0, len(self.settings)
        grown = max(self.overlap)
        core = math.prod(n + grown for n in self.grid.largest) if grown else self.block
        per_voxel = sum(v.itemsize for v in self.inputs)
        for number, settings in enumerate(self.settings):
            choice = self.choices[number]
            largest, every = self._read(number)
            if choice is not None and choice.rounds:
                memory = max(memory, peak(40 * self.block))
                read += FLOW_BYTES * self.voxels
                continue
            if self._by_schwarz(settings):  # what is left is the gradient of the potential
                width = 1 + -(-grown // 2)
                largest, every = largest_read(self.grid, width), all_read(self.grid, width)
                memory = max(memory, peak((per_voxel + 24) * largest + 24 * core))
                read += (per_voxel + 8) * every
                continue
            size = self.inputs[0].itemsize
            need = memory_of_flow(core, largest, size, settings, masked=self.masked)
            memory, read = max(memory, peak(need)), read + per_voxel * every
            device = max(device, device_memory_of_flow(largest, settings))
        tiles = all_read(self.grid, -(-grown // 2)) if grown else self.voxels
        written = 3 * count * (4 if grown else self.itemsize) * tiles
        files = count * len(self.grid) if grown else self.output().files
        flows = StagePlan("flows", count * len(self.grid), memory, read, written, files)
        return replace(flows, device_bytes=device)

    def _centres(self) -> Iterator[StagePlan]:
        """Stages centres and pointed."""
        blocks = len(self.grid) * sum(s.method == "direct" for s in self.settings)
        around = largest_read(self.grid, max(self.grid.largest))
        per_voxel = sum(v.itemsize for v in self.inputs)
        memory = peak((per_voxel + 24) * around)
        table = INSTANCE_BYTES * self.rows
        yield StagePlan("centres", blocks, memory, 27 * per_voxel * self.voxels, table, blocks)
        yield StagePlan("pointed", 1, peak(3 * table, voxels=False), table, table, 5)

    def _rounds(self, number: int, choice: ContextChoice) -> Iterator[StagePlan]:
        """The rounds of a class, all in one row."""
        settings = self.settings[number]
        largest, every = self._read(number)
        state = STATE_BYTES[settings.potential]
        rounds = max(1, -(-settings.n_iter // choice.rounds))
        read = rounds * every * (sum(v.itemsize for v in self.inputs) + state)
        size = self.inputs[0].itemsize
        flow = memory_of_flow(self.block, largest, size, settings, masked=self.masked)
        # The fields, as read and padded; given back, and as they are written.
        memory = peak(flow + 2 * state * largest + 2 * state * self.block)
        blocks = len(self.grid)
        written = (rounds - 1) * state * self.voxels + FLOW_BYTES * self.voxels
        name = f"round-1..{rounds}" if not self.reach else f"class-{number}-round-1..{rounds}"
        files = blocks * (2 * rounds - 1)  # fields after each but the last, flows after any
        made = StagePlan(name, rounds * blocks, memory, read, written, files)
        yield replace(made, device_bytes=device_memory_of_flow(largest, settings))

    def _fuse(self) -> StagePlan:
        blocks = len(self.grid)
        tile = math.prod(n + max(self.overlap) for n in self.grid.largest)
        tiles = 3 * 4 * all_read(self.grid, -(-max(self.overlap) // 2))
        # The sum and its weights in float64; a tile, its lengths, both together, weighted.
        memory = peak(40 * self.block + 84 * tile)
        written = 3 * self.itemsize * self.voxels
        return StagePlan("fuse", blocks, memory, 27 * tiles // 8, written, self.output().files)

    def _foreground(self) -> StagePlan:
        memory, read = 0, 0
        per_voxel = sum(v.itemsize for v in self.inputs)
        for reach in self.reach:
            halo = 0 if reach is None else math.floor(reach)
            around = largest_read(self.grid, halo)
            size = self.inputs[0].itemsize
            memory = max(memory, peak(memory_of_foreground(around, self.block, size, reach)))
            read += per_voxel * all_read(self.grid, halo)
        count = len(self.settings)
        written = count * self.itemsize * self.voxels
        return StagePlan("foreground", count * len(self.grid), memory, read, written, 0)

    def output(self) -> Space:
        """See `Work`."""
        chunks = output_chunks(self.grid.largest, self.grid.shape)
        count, form = len(self.settings), self.zarr_format
        flows = space_of(
            (3 * count, *self.grid.shape), (3, *chunks), self.itemsize, zarr_format=form
        )
        if not self.reach:
            return flows
        more = space_of((count, *self.grid.shape), (1, *chunks), self.itemsize, zarr_format=form)
        return Space(flows.size + more.size, flows.files + more.files + 1, flows.in_folder)

    def scratch(self, stages: Sequence[StagePlan]) -> Space:
        """See `Work`."""
        last = {"fuse", "foreground"} | (set() if any(self.overlap) else {"flows"})
        found = super().scratch([s for s in stages if s.name not in last])
        # Of the fields between rounds, those that are read and those that are written are there.
        for settings, choice in zip(self.settings, self.choices, strict=True):
            if choice is not None and choice.rounds:
                gone = max(0, -(-settings.n_iter // choice.rounds) - 3)
                size = gone * STATE_BYTES[settings.potential] * self.voxels
                found = replace(
                    found, size=found.size - size, files=found.files - gone * len(self.grid)
                )
        return found
