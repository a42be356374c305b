"""Plans of the jobs that go from flows to labels: `segment`, `relabel`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from topo_dask.config import RefineSettings, SegmentSettings
from topo_dask.graph.cells import CELL_BYTES, keeps_positions, memory_of_cells, most_cells
from topo_dask.graph.cleanup import memory_of_errors
from topo_dask.graph.contacts import (
    CONTACT_BYTES,
    NAME_BYTES,
    VOXELS_PER_CONTACT,
    memory_of_contacts,
    memory_of_ranges,
)
from topo_dask.graph.device import (
    device_memory_of_cells,
    device_memory_of_errors,
    device_memory_of_tracking,
)
from topo_dask.graph.halo import halos_for, tried_blocks
from topo_dask.graph.holes import FACE_VOXELS_PER_OPEN, OPEN_BYTES, memory_of_holes
from topo_dask.graph.instances import INSTANCE_BYTES, VOXELS_PER_INSTANCE
from topo_dask.graph.merge import (
    COMPONENT_BYTES,
    memory_of_copy,
    memory_of_labels,
    most_components,
)
from topo_dask.graph.nearest import memory_of_nearest
from topo_dask.graph.pieces import PIECE_BYTES, VOXELS_PER_PIECE, memory_of_pieces
from topo_dask.graph.track import (
    AT_ONCE,
    leaving_share,
    memory_of_advance,
    memory_of_tracking,
)
from topo_dask.plan.outline import Decision, Machine, Space, StagePlan, space_of
from topo_dask.plan.work import FAN_IN, Work, all_read, largest_read, peak, tree
from topo_dask.storage import output_chunks

PARTICLE_BYTES = 44
"""Bytes of a particle under way, as it is written."""

NARROW = 16
"""A halo that the run chooses is narrower only where few particles leave it."""

DEFAULTS, AS_FOUND = SegmentSettings(), RefineSettings()

OUTPUT_STAGES = ("split", "absorb", "fill", "orphans", "write", "table")
"""Of `relabel`: those that write the output."""


@dataclass(frozen=True)
class StepsWork(Work):
    """What comes after the first labels: joins, splits, orphans, the last copy.

    Parameters
    ----------
    settings
        Of the segmentation.
    evidence
        Whether what `relabel` needs is kept.
    """

    settings: SegmentSettings = DEFAULTS
    evidence: bool = False
    zarr_format: int = 3

    def _array(self, itemsize: int) -> Space:
        shape = self.grid.shape
        chunks = output_chunks(self.grid.largest, shape)
        return space_of(shape, chunks, itemsize, zarr_format=self.zarr_format)

    @property
    def _joins(self) -> int:
        """Contacts that there are taken to be."""
        return len(self.grid) + self.voxels // VOXELS_PER_CONTACT

    def _together(self, stage: str, table: int) -> Iterator[StagePlan]:
        """A stage that brings tables of all blocks together, where they are many."""
        if len(self.grid) > FAN_IN:
            tasks = next(tree(len(self.grid)))
            share = peak(2 * table / tasks, voxels=False)
            yield StagePlan(stage, tasks, share, table, table, tasks)

    def _contacts(self) -> Iterator[StagePlan]:
        """Stage contacts, and its sums."""
        blocks, table = len(self.grid), CONTACT_BYTES * self._joins
        read = round(1.05 * self.voxels) * (8 + 3 * self.inputs[0].itemsize)
        memory = peak(memory_of_contacts(self.block))
        yield StagePlan("contacts", blocks, memory, read, table, blocks)
        if blocks > FAN_IN:
            for level, count in enumerate(tree(blocks)):
                if count == 1:
                    break
                share = peak(3 * table / count, voxels=False)
                yield StagePlan(f"contacts-{level + 2}", count, share, table, table, count)

    def _split(self) -> Iterator[StagePlan]:
        """Stages of `split_disconnected`."""
        blocks, memory = len(self.grid), peak(memory_of_pieces(self.block))
        pieces = blocks + self.voxels // VOXELS_PER_PIECE
        table = 24 * pieces
        face = 4 * 6 * self.block // max(1, min(self.grid.largest))
        labels, faces = self._array(8).size, face * blocks
        yield StagePlan("pieces", blocks, memory, labels, table + faces, 2 * blocks)
        united = 2 * table  # with edges
        yield StagePlan("faces", blocks, peak(6 * face, voxels=False), 4 * faces, united, blocks)
        yield from self._together("pieces-together", united)
        memory_of_plan = peak(PIECE_BYTES * pieces, voxels=False)
        yield StagePlan("plan", 1, memory_of_plan, united, table, 4)
        yield StagePlan("split", blocks, memory, labels, labels, self._array(4).files)
        near = peak(memory_of_nearest(self.block))
        yield StagePlan("absorb", blocks, near, 3 * labels, self.voxels // 10, blocks)
        yield StagePlan("fill", blocks, memory, labels, labels, 0)

    def steps(self) -> Iterator[StagePlan]:
        """The stages of the group."""
        table, ranges = CONTACT_BYTES * self._joins, memory_of_ranges(self._joins)
        parts = most_components(self.grid, self.settings.convergence_radius)
        if self.settings.group == 2 or self.evidence:
            yield from self._contacts()
        if self.evidence:
            yield from self._sums("parts")
            # The joins by ranges of parts, then what is known of all parts.
            most = peak(max(ranges, 3 * self._facts), voxels=False)
            yield StagePlan("evidence", 1, most, table, table, 2)
        if self.settings.group == 2:
            # The new names of instances, then those of their parts.
            instances = min(parts, self.voxels // max(1, self.settings.min_size))
            names = NAME_BYTES * instances + 8 * parts
            yield StagePlan("join", 1, peak(ranges + names, voxels=False), table, table, 1)
            yield from self._split()
        if self.settings.group == 3:
            yield self._orphans()

    def _orphans(self) -> StagePlan:
        blocks, array = len(self.grid), self._array(8)
        memory = peak(memory_of_nearest(self.block))
        return StagePlan("orphans", blocks, memory, 4 * array.size, array.size, array.files)

    def _copy(self) -> StagePlan:
        blocks, array = len(self.grid), self._array(8)
        memory = peak(memory_of_copy(self.block))
        return StagePlan("write", blocks, memory, array.size, array.size, array.files)

    @property
    def _facts(self) -> int:
        """Bytes of the tables of instances of all blocks."""
        rows = len(self.grid) + self.voxels // VOXELS_PER_INSTANCE
        return 2 * INSTANCE_BYTES * rows

    def _sums(self, stage: str) -> Iterator[StagePlan]:
        """The levels of a sum that come before the last task."""
        blocks, table = len(self.grid), self._facts
        if blocks > FAN_IN:
            for level, count in enumerate(tree(blocks)):
                if count == 1:
                    break
                memory = peak(3 * table / count, voxels=False)
                yield StagePlan(f"{stage}-{level + 2}", count, memory, table, table, count)

    def _whole(self, stage: str) -> StagePlan:
        table = self._facts
        return StagePlan(stage, 1, peak(3 * table, voxels=False), table, table, 18)

    def _measures(self) -> Iterator[StagePlan]:
        """Stages measure and facts."""
        blocks, memory = len(self.grid), peak(memory_of_labels(self.block))
        if self.settings.group > 1:
            read = self._array(8).size + 24 * self.voxels
            yield StagePlan("measure", blocks, memory, read, self._facts, blocks)
        yield from self._sums("measure")
        yield self._whole("facts")

    def _errors(self, flow: int = 0) -> tuple[int, int]:
        """Memory of a task that compares flows, the input ``flow``; bytes that all of them read."""
        size = self.inputs[flow].itemsize
        return peak(memory_of_errors(self.block, size)), (8 + 3 * size) * self.voxels

    def output(self) -> Space:
        """See `Work`."""
        labels = self._array(4)
        if not self.evidence:
            return Space(labels.size, labels.files + 3, labels.in_folder)
        parts, table = self._array(8), CONTACT_BYTES * self._joins
        return Space(
            labels.size + parts.size + table, labels.files + parts.files + 6, labels.in_folder
        )


@dataclass(frozen=True)
class SegmentWork(StepsWork):
    """A job of `segment`. The first input are the flows, the second the foreground."""

    halo: Any = "auto"
    refine: RefineSettings = AS_FOUND

    @property
    def backend(self) -> str:
        """See `Work`."""
        return self.settings.backend

    def decisions(self) -> Iterator[Decision]:
        """See `Work`."""
        reach = self.settings.travel
        why = f"a particle goes at most {reach:g} voxels; one that leaves is handed over"
        if self.halo == "auto":
            why = f"the run tries a few blocks to see how far particles go; {why}"
        yield Decision("halo", f"at most {self.widest} voxels", why)
        count = f"{most_components(self.grid, self.settings.convergence_radius):.2g}"
        why = "one task; as many as particles can end in apart from each other, often far fewer"
        yield Decision("union", f"of at most {count} parts of instances in blocks", why)
        if self.settings.group == 2 or self.evidence:
            each = f"one for every {VOXELS_PER_CONTACT} and {VOXELS_PER_PIECE} voxels"
            why = "labels of very many tiny contacts or pieces may take more"
            yield Decision("tables", f"of contacts and pieces, taken as {each}", why)
        how = {
            1: "convex objects: tracking and clustering",
            2: "elongated objects: what touches and agrees is joined, what is apart is split",
            3: "thin objects: what reached no instance takes the nearest label",
        }
        yield Decision("group", str(self.settings.group), how[self.settings.group])
        if len(self.inputs) == 1:
            yield Decision("foreground", "none given", "voxels whose flow is not 0")

    @property
    def leaving(self) -> float:
        """What part of a block's particles leaves it and its halo, at most."""
        if len(self.grid) == 1:
            return 0.0
        narrow = min(NARROW, self.widest) if self.halo == "auto" else self.widest
        return leaving_share(self.settings, self.grid.largest, narrow)

    @property
    def widest(self) -> int:
        """The halo, or the widest that the run may choose."""
        if self.halo != "auto":
            return int(self.halo)
        return halos_for(self.settings.travel, self.grid.largest)[-1]

    def stages(self, machine: Machine) -> Iterator[StagePlan]:
        """See `Work`."""
        yield from self._track()
        yield from self._merge()
        yield from self.steps()
        yield from self._measures()
        if self.refine.flow_error_threshold > 0:
            yield from self._check()
        if self.refine.fill_holes:
            yield from self._holes()
        yield from self._finish()

    def _track(self) -> Iterator[StagePlan]:
        blocks, size, leaving = len(self.grid), self.inputs[0].itemsize, self.leaving
        # One voxel more, for flows between voxels.
        width = self.widest + 1
        read, every = largest_read(self.grid, width), all_read(self.grid, width)
        flow = 3 * size * every
        if self.halo == "auto" and blocks > 1:
            tried = min(blocks, len(tried_blocks(self.grid)))
            memory = peak(memory_of_tracking(self.block, read, size, 0.0))
            yield StagePlan("halo", tried, memory, 3 * size * read * tried)
        mask = sum(v.size for v in self.inputs[1:])
        sent = round(leaving * self.voxels) * PARTICLE_BYTES
        positions = 24 * self.voxels * keeps_positions(self.settings)
        table = CELL_BYTES * most_cells(self.voxels, self.settings.convergence_radius)
        index = 4 * self.voxels + self.voxels // 8 + table
        memory = peak(memory_of_tracking(self.block, read, size, leaving))
        files = blocks * (3 + bool(leaving) + bool(positions))
        device = max(
            device_memory_of_tracking(self.block, read, size),
            device_memory_of_cells(min(AT_ONCE, self.block)),
        )
        track = StagePlan("track", blocks, memory, flow + mask, index + positions + sent, files)
        yield replace(track, device_bytes=device)
        if leaving:
            reach = self.settings.travel
            rounds = max(1, round(reach / (width + min(self.grid.largest))))
            memory = peak(memory_of_advance(read, size, min(AT_ONCE, self.voxels)))
            name = "track-2" if rounds == 1 else f"track-2..{rounds + 1}"
            both = rounds * (flow + sent), rounds * sent
            later = StagePlan(name, rounds * blocks, memory, *both, rounds * blocks)
            yield replace(later, device_bytes=device)

    def _merge(self) -> Iterator[StagePlan]:
        blocks, voxels = len(self.grid), self.voxels
        away, positions = round(self.leaving * self.block), keeps_positions(self.settings)
        radius = self.settings.convergence_radius
        in_block, every = most_cells(self.block, radius), most_cells(voxels, radius)
        table = CELL_BYTES * every
        sent = PARTICLE_BYTES * round(self.leaving * voxels)
        home = (12 + 24 * positions) * round(self.leaving * voxels)
        memory = peak(memory_of_cells(away, in_block, positions))
        cells = StagePlan("cells", blocks, memory, table + sent, table + home, blocks)
        device = device_memory_of_cells(min(AT_ONCE, away))
        yield replace(cells, device_bytes=device)
        memory = peak(3 * CELL_BYTES * in_block, voxels=False)
        yield StagePlan("own", blocks, memory, 2 * table, table, blocks)
        yield StagePlan("edges", blocks, memory, 2 * table, table // 4, blocks)
        yield from self._together("together", table // 4)
        components = most_components(self.grid, radius)
        memory = peak(COMPONENT_BYTES * components, voxels=False)
        yield StagePlan("number", 1, memory, table // 4, table // 8, 6)
        labels = self._array(8)
        memory = peak(memory_of_labels(self.block))
        read = 4 * voxels + voxels // 8 + 3 * table + home
        written = labels.size + self._facts
        yield StagePlan("labels", blocks, memory, read, written, labels.files + blocks)

    def _check(self) -> Iterator[StagePlan]:
        """Stages errors and check."""
        blocks, (memory, read) = len(self.grid), self._errors()
        errors = StagePlan("errors", blocks, memory, read, self._facts, blocks)
        device = device_memory_of_errors(self.block, self.inputs[0].itemsize)
        yield replace(errors, device_bytes=device)
        yield from self._sums("errors")
        yield self._whole("check")

    def _holes(self) -> Iterator[StagePlan]:
        """Stages background, hole-edges and holes."""
        blocks, memory = len(self.grid), peak(memory_of_holes(self.block))
        in_faces = 6 * self.voxels // min(self.grid.largest)
        labels, faces, found = self._array(8).size, 4 * in_faces, in_faces // FACE_VOXELS_PER_OPEN
        table = 24 * found
        yield StagePlan("background", blocks, memory, labels, faces + table, 2 * blocks)
        face = peak(6 * faces // blocks, voxels=False)
        united = 2 * table  # with edges
        yield StagePlan("hole-edges", blocks, face, 2 * faces, united, blocks)
        yield from self._together("holes-together", united)
        yield StagePlan("holes", 1, peak(OPEN_BYTES * found, voxels=False), united, 8 * found, 1)

    def _finish(self) -> Iterator[StagePlan]:
        """Stages write and table."""
        blocks, labels, table = len(self.grid), self._array(4), self._facts
        checked = self.refine.flow_error_threshold > 0
        memory, read = self._errors()
        if checked:
            memory, read = peak(memory_of_labels(self.block)), 8 * self.voxels
        if self.refine.fill_holes:
            memory = max(memory, peak(memory_of_holes(self.block)))
        written = labels.size + table
        yield StagePlan("write", blocks, memory, read, written, labels.files + blocks)
        if self.refine.fill_holes or not checked:
            yield from self._sums("write")
        yield StagePlan("table", 1, peak(5 * table, voxels=False), table, 2 * table, 2)

    def output(self) -> Space:
        """See `Work`."""
        base = super().output()
        return Space(base.size + 2 * self._facts, base.files + 4, base.in_folder)

    def scratch(self, stages: Sequence[StagePlan]) -> Space:
        """See `Work`."""
        base = super().scratch(stages)
        last = {"write", "table"} | ({"labels", "evidence"} if self.evidence else set())
        own = [s for s in stages if s.name not in last]
        size = base.size + sum(s.write_bytes for s in own)
        files = base.files + sum(s.files for s in own)
        if self.evidence:  # close pairs, and the columns of the table before they are in it
            size += 2 * CONTACT_BYTES * self._joins
        return Space(size, files, max(base.in_folder, len(self.grid)))


@dataclass(frozen=True)
class ClassesWork(Work):
    """A job of `segment_classes`: one segmentation a class. The first input are all flows.

    Parameters
    ----------
    classes
        Name and work of each.
    """

    classes: tuple[tuple[str, SegmentWork], ...]

    @property
    def backend(self) -> str:
        """See `Work`."""
        return self.classes[0][1].backend

    def decisions(self) -> Iterator[Decision]:
        """See `Work`."""
        for name, work in self.classes:
            (group,) = (d for d in work.decisions() if d.name == "group")
            yield Decision(name, f"group {group.value}", group.reason)

    def stages(self, machine: Machine) -> Iterator[StagePlan]:
        """Those of all classes, added up by name; rounds are one, however many a class has."""
        found: dict[str, StagePlan] = {}
        for _, work in self.classes:
            for stage in work.reblocked(self.grid.largest).stages(machine):
                name = stage.name.partition("..")[0]
                found[name] = _both(found.get(name), stage)
        yield from found.values()

    def output(self) -> Space:
        """See `Work`."""
        spaces = [work.output() for _, work in self.classes]
        return Space(
            sum(s.size for s in spaces),
            sum(s.files for s in spaces),
            max(s.in_folder for s in spaces),
        )

    def scratch(self, stages: Sequence[StagePlan]) -> Space:
        """See `Work`."""
        base = super().scratch(stages)
        own = [s for s in stages if s.name not in ("write", "table")]
        size, files = sum(s.write_bytes for s in own), sum(s.files for s in own)
        return Space(base.size + size, base.files + files, max(base.in_folder, len(self.grid)))


def _both(one: StagePlan | None, other: StagePlan) -> StagePlan:
    """Two stages of one name in a row."""
    if one is None:
        return other
    return StagePlan(
        max(one.name, other.name, key=lambda name: int(name.partition("..")[2] or 0)),
        one.tasks + other.tasks,
        max(one.task_bytes, other.task_bytes),
        one.read_bytes + other.read_bytes,
        one.write_bytes + other.write_bytes,
        one.files + other.files,
    )


@dataclass(frozen=True)
class RelabelWork(StepsWork):
    """A job of `relabel`. The first input are the parts, the second the flows."""

    def stages(self, machine: Machine) -> Iterator[StagePlan]:
        """See `Work`."""
        table = CONTACT_BYTES * self._joins
        memory = peak(4 * table, voxels=False)
        yield StagePlan("names", 1, memory, table, table // 4, 1)
        if self.settings.group == 2:
            yield from self._split()
        elif self.settings.group == 3:
            yield self._orphans()
        else:
            yield self._copy()
        yield from self._measures()
        if len(self.inputs) > 1:
            blocks, (memory, read) = len(self.grid), self._errors(flow=1)
            yield StagePlan("errors", blocks, memory, read, self._facts, blocks)
            yield from self._sums("errors")
        facts = self._facts
        yield StagePlan("table", 1, peak(5 * facts, voxels=False), facts, 2 * facts, 2)

    def output(self) -> Space:
        """See `Work`."""
        base = super().output()
        return Space(base.size + 2 * self._facts, base.files + 4, base.in_folder)

    def scratch(self, stages: Sequence[StagePlan]) -> Space:
        """See `Work`."""
        base = super().scratch(stages)
        own = [s for s in stages if s.name not in OUTPUT_STAGES]
        size, files = (sum(s.write_bytes for s in own), sum(s.files for s in own))
        return Space(base.size + size, base.files + files, max(base.in_folder, len(self.grid)))
