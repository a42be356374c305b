"""Sweeps over all instances of an array at once, whatever their number.

One byte a voxel says which of its six neighbours belong to the same instance, so that a sweep
never compares labels. Several iterations are made per pass over memory: in a strip of rows a few
planes at a time are advanced as soon as their neighbours are, so that the rows in work stay in
cache whatever the size of the array, and what one plane reads serves the next; several threads make
the passes in turns, each following the one before through the array at a distance. Instances that
need fewer iterations than others begin later, so that all end together. None of this changes a
single addition: the result is bit for bit that of plain Jacobi iteration of each instance.

A field has no second array for what an iteration makes: a voxel's new value is written where the
value of its neighbour (z - 1, y - 1) was, which nothing needs any more. So the field moves down its
memory by a plane and a row an iteration, and half as much passes between memory and cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import literal_unroll

from topo_dask.kernels.cpu.rows import (
    PLANES,
    aligned,
    flush_planes,
    flush_rows,
    flush_walled_rows,
    relax_planes,
    relax_rows,
    relax_walled_rows,
)
from topo_dask.kernels.cpu.space import NEVER, Space, beside, space_of, write_images
from topo_dask.kernels.cpu.turns import counters, reach, wait_for
from topo_dask.kernels.jit import compiled
from topo_dask.kernels.parallel import Starmap, ranges, serial

STEPS_PER_PASS = 8
"""Iterations made in one pass over memory."""

CACHE_BYTES = 2**20
"""What the rows in work may take: half of a second-level cache, for one of 2 MiB."""

TINIEST = 2.0**-100
"""What is smaller after a pass becomes 0: in eight iterations it does not reach the denormal
numbers of float32, with which processors are slow."""

LEAST_STRIP = 2 * STEPS_PER_PASS
"""Rows of a strip at least. Strips lean by the iterations of a pass, and fields move as far: with
fewer, a pass would write where the one that follows it still reads."""

LEAST_MEMORY = 2**20
"""Values that a field's memory may have whatever its size: a small field then moves from one end to
the other without being copied back on its way."""

FAR = 2**40
"""Between what threads count in one pass and the next: more than any array has planes of strips."""


class Field(NamedTuple):
    """A field of an array, and where in its memory it is now."""

    memory: Any  # float32 or float64, flat
    first: int  # where in it the field begins, which is as long as the links
    size: int
    next_run: Any  # int64 a row: the run that begins next
    axis: int  # along which it starts as a coordinate; -1: it starts as ``one``
    one: float
    zero_at: Any  # int64 by number: where that coordinate is 0
    tiniest: float  # what is smaller after a pass becomes 0
    start: Any  # the field that instances begin with; empty: the coordinate or ``one``

    @property
    def values(self) -> npt.NDArray[Any]:
        """The field, flat, padded: a view of its memory."""
        view: npt.NDArray[Any] = self.memory[self.first : self.first + self.size]
        return view


@compiled
def _begin(field: Any, local: Any, begin: Any, planes: Any, space: Any) -> None:
    """Write the values with which instances start that begin at once."""
    values = field.memory[field.first : field.first + field.size]
    start, zero_at = field.start, field.zero_at
    rows = space.rows
    _, ny, nx, stride, width = space.grid
    for z in range(planes[0], planes[1]):
        for y in range(ny):
            row = z * ny + y
            if rows[row, 0] != 0:
                continue
            at = z * stride + y * width
            for x in range(nx):
                k = local[z, y, x]
                if k == 0 or begin[k] != 0:
                    values[at + x] = 0
                elif start.size:
                    values[at + x] = start[at + x]
                elif field.axis < 0:
                    values[at + x] = field.one
                else:
                    values[at + x] = (z, y, x)[field.axis] - zero_at[k]
            values[at + nx : at + width] = 0
            if nx < width:
                values[at + nx] = values[at + nx - 1]


@compiled
def _begin_late(
    values: Any, next_run: Any, runs: Any, start: Any, zero_at: Any, how: Any, at: Any
) -> None:
    """Write the start values of those runs of some rows of a plane that begin now."""
    axis, one = how
    plane, first, end, time, _, grid = at
    _, ny, nx, stride, width = grid
    for y in range(first, end):
        row = plane * ny + y
        run = next_run[row]
        if runs[run, 0] != time:
            continue
        here = plane * stride + y * width
        while runs[run, 0] == time:
            low, high, k = np.int64(runs[run, 1]), np.int64(runs[run, 2]), runs[run, 3]
            for x in range(low, high):
                i = here + x
                if start.size:
                    values[i] = start[i]
                elif axis < 0:
                    values[i] = one
                else:
                    values[i] = (plane, y, x)[axis] - zero_at[k]
            run += 1
        next_run[row] = run
        if nx < width:
            values[here + nx] = values[here + nx - 1]


@compiled
def _advance_rows(
    old: Any, new: Any, links: Any, walls: Any, rows: Any, at: Any, weights: Any
) -> None:
    """Advance some rows of a plane to a time."""
    plane, first, end, time, flush, grid = at
    ny, width = grid[1], grid[4]
    one = old.dtype.type
    scale = one(weights[0]), one(weights[1]), one(weights[2]), one(weights[3])
    y = first
    while y < end:
        row = plane * ny + y
        count = min(np.int64(rows[row, 4]), end - y)
        if rows[row, 0] >= time:
            y += count
            continue
        low, high = np.int64(rows[row, 1]), np.int64(rows[row, 2])
        walled = walls.size and rows[row, 3]
        offsets = beside(grid, plane, plane, y)
        alike = count, width, low, high
        if walled and flush:
            flush_walled_rows(new, old, links, walls, offsets, alike, scale)
        elif walled:
            relax_walled_rows(new, old, links, walls, offsets, alike, scale)
        elif flush:
            flush_rows(new, old, links, offsets, alike, scale)
        else:
            relax_rows(new, old, links, offsets, alike, scale)
        write_images(new, grid, plane, plane, y, count)
        y += count


@compiled
def _advance_planes(
    old: Any, new: Any, links: Any, walls: Any, rows: Any, at: Any, weights: Any
) -> None:
    """Advance some rows of `PLANES` planes to a time, together where all of them are to advance.

    Their spans may differ: what is outside a row's own is not linked with what is inside. The last
    two of ``at`` are how far from a row's values, and its links, the next front begins.
    """
    plane, first, end, time, flush, grid, soon, soon_links = at
    ny, width = grid[1], grid[4]
    one = old.dtype.type
    scale = one(weights[0]), one(weights[1]), one(weights[2]), one(weights[3])
    y = first
    while y < end:
        count, low, high, together = end - y, np.int64(width), np.int64(0), True
        for row in range(plane * ny + y, (plane + PLANES) * ny + y, ny):
            count = min(count, np.int64(rows[row, 4]))
            low, high = min(low, np.int64(rows[row, 1])), max(high, np.int64(rows[row, 2]))
            together &= rows[row, 0] < time and not rows[row, 3]
        if together:
            last = plane + PLANES - 1
            here = plane * grid[3] + y * width
            offsets = (*beside(grid, plane, last, y), here + soon, here + soon_links)
            alike = count, width, low, high
            if flush:
                flush_planes(new, old, links, offsets, alike, scale)
            else:
                relax_planes(new, old, links, offsets, alike, scale)
            write_images(new, grid, plane, last, y, count)
        else:
            for one_plane in range(plane, plane + PLANES):
                these = (one_plane, y, y + count, time, flush, grid)
                _advance_rows(old, new, links, walls, rows, these, weights)
        y += count


@compiled
def strip_of(row_bytes: int, ny: int, threads: int) -> int:
    """How many rows a strip has, where those in work at one y take so many bytes."""
    strip = max(LEAST_STRIP, CACHE_BYTES // row_bytes - STEPS_PER_PASS)
    if strip < ny:  # not less than a strip lies between two threads
        strip = max(LEAST_STRIP, min(strip, -(-ny // threads)))
    return strip


@compiled
def wait_for_pass(counts: Any, before: int, from_there: int, at: Any) -> None:
    """Wait until the pass before, of thread ``before``, has made what a front of a strip needs.

    ``at`` is the strip, how many there are, and the same of the front; -1: no pass was before.
    """
    number, strips, front, fronts = at
    if before >= 0:
        ahead = min(number + 1, strips - 1) * fronts
        ahead += min(front + -(-STEPS_PER_PASS // PLANES), fronts - 1)
        wait_for(counts, before, from_there + ahead + 1)


@compiled
def _advance_pass(
    field: Any, space: Any, weights: Any, times: Any, strip: int, turn: Any, counts: Any
) -> None:
    """Make the iterations of one pass, planes of a strip as soon as the pass before allows.

    ``times`` are when the field was at its ``first``, and before and after the pass. ``turn`` is
    which thread makes this pass, what its counter is before; the same of the pass before, -1 for
    none.
    """
    # Arrays are taken out of their tuples once: each time costs two atomic counts.
    links, walls, rows, runs = space.links, space.walls, space.rows, space.runs
    memory, next_run = field.memory, field.next_run
    grid, size = space.grid, field.size
    nz, ny, _, stride, width = grid
    start, zero_at, how = field.start, field.zero_at, (field.axis, field.one)
    by = (*weights, field.tiniest)
    begun, time, end = times
    steps = end - time
    thread, done, before, from_there = turn
    fronts = -(-(nz + STEPS_PER_PASS - 1) // PLANES)
    strips = -(-(ny + STEPS_PER_PASS - 1) // strip)
    for number in range(strips):
        top = number * strip
        for front in range(fronts):
            wait_for_pass(counts, before, from_there, (number, strips, front, fronts))
            for step in range(steps):
                plane = front * PLANES - step
                low, high = max(0, top - step), min(ny, top + strip - step)
                now = time + step + 1
                here = field.first - (now - 1 - begun) * (stride + width)
                there = here - (stride + width)
                old, new = memory[here : here + size], memory[there : there + size]
                whole = plane >= 0 and plane + PLANES <= nz
                if whole:
                    links_soon = (PLANES + step % PLANES + step) * stride + step * width
                    soon = links_soon + step * (stride + width)
                    ahead = (plane, low, high, now, step == steps - 1, grid, soon, links_soon)
                    _advance_planes(old, new, links, walls, rows, ahead, by)
                for one in range(max(plane, 0), min(plane + PLANES, nz)):
                    at = (one, low, high, now, step == steps - 1, grid)
                    if not whole:
                        _advance_rows(old, new, links, walls, rows, at, by)
                    _begin_late(new, next_run, runs, start, zero_at, how, at)
            reach(counts, thread, done + number * fronts + front + 1)


@compiled
def _advance(fields: Any, space: Any, weights: Any, span: Any, turns: Any, counts: Any) -> None:
    """Make every pass whose turn a thread has, of all fields one after the other.

    ``turns`` is which thread this is, and how many there are: pass after pass they follow each
    other through the array, so that each value is still near when the next pass needs it.
    """
    thread, threads = turns
    time, end = span
    ny, width = space.grid[1], space.grid[4]
    passes = -(-(end - time) // STEPS_PER_PASS)
    first = 0
    for field in literal_unroll(fields):
        row_bytes = (STEPS_PER_PASS + PLANES + 2) * width * field.memory.itemsize
        strip = strip_of(row_bytes, ny, threads)
        for number in range(passes):
            turn = first + number
            if turn % threads == thread:
                here = time + number * STEPS_PER_PASS
                before = (turn - 1) % threads if number > 0 else -1
                order = (thread, turn * FAR, before, (turn - 1) * FAR)
                times = time, here, min(here + STEPS_PER_PASS, end)
                _advance_pass(field, space, weights, times, strip, order, counts)
        first += passes


@dataclass(frozen=True)
class Start:
    """What a field is at the beginning.

    Parameters
    ----------
    dtype
        float32 or float64.
    zero_at
        int64 by number of instance: where along ``axis`` its coordinate is 0.
    axis
        Along which it is a coordinate; -1: it is ``one`` in all instances.
    one
        See there.
    begun
        ``[nz, ny, nx]``: the field itself instead.
    tiniest
        What is smaller becomes 0 now and then.
    """

    dtype: Any
    zero_at: npt.NDArray[np.int64]
    axis: int = -1
    one: float = 1.0
    begun: npt.NDArray[Any] | None = None
    tiniest: float = TINIEST


@dataclass(frozen=True)
class Layout:
    """The voxels of an array, laid out for sweeps."""

    local: npt.NDArray[np.int32]  # [nz, ny, nx]: numbers of instances, 0 for background
    begin: npt.NDArray[np.int64]  # by number: when the instance begins; NEVER if not at all
    total: int  # iterations from the first beginning to the common end
    space: Space
    threads: int  # as many passes are made at the same time

    @property
    def step(self) -> int:
        """How far a field moves down its memory in an iteration."""
        _, _, _, stride, width = self.space.grid
        return stride + width

    @property
    def room(self) -> int:
        """Iterations in which a field moves from the end of its memory to the beginning.

        All of it takes as much as two fields of the voxels, but where that is very little.
        """
        nz, ny, _, _, width = self.space.grid
        size = int(self.space.links.size)
        most = (max(2 * nz * ny * width, LEAST_MEMORY) - size) // self.step
        if most > STEPS_PER_PASS:
            most -= most % STEPS_PER_PASS
        return max(1, min(most, self.total))

    @property
    def memory_size(self) -> int:
        """Values in the memory of a field."""
        return int(self.space.links.size) + self.room * self.step

    def fields(self, starts: list[Start], run: Starmap, threads: int) -> tuple[Field, ...]:
        """Fields of this array at time 0."""
        made = []
        for start in starts:
            begun = np.zeros(0, start.dtype) if start.begun is None else self.padded(start.begun)
            made.append(self._field(aligned(self.memory_size, start.dtype), start, begun))
        self._write_starts(made, run, threads)
        return tuple(made)

    def begun(
        self, values: npt.NDArray[Any], memory: npt.NDArray[Any], run: Starmap, threads: int
    ) -> Field:
        """A field that begins with padded flat ``values``, in a memory of `memory_size`."""
        nowhere = Start(values.dtype, np.zeros(0, dtype=np.int64), tiniest=0.0)
        field = self._field(memory, nowhere, values)
        self._write_starts([field], run, threads)
        return field

    def _field(self, memory: Any, start: Start, begun: npt.NDArray[Any]) -> Field:
        """A field at the end of its memory, without values."""
        runs, size = self.space.first_run[:-1].copy(), self.space.links.size
        first = memory.size - size
        how = start.axis, start.one, start.zero_at, start.tiniest
        return Field(memory, first, size, runs, *how, begun)

    def _write_starts(self, fields: list[Field], run: Starmap, threads: int) -> None:
        parts = ranges(self.space.grid[0], threads)
        run(_begin, [(f, self.local, self.begin, p, self.space) for p in parts for f in fields])

    def padded(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """An array of the voxels as sweeps have it, flat."""
        nz, ny, nx, stride, width = self.space.grid
        made = np.zeros((nz, stride), dtype=values.dtype)
        made[:, : ny * width].reshape(nz, ny, width)[:, :, :nx] = values
        return made.ravel()

    def voxels(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The view ``[nz, ny, nx]`` of a padded flat array."""
        nz, ny, nx, stride, width = self.space.grid
        planes = values.reshape(nz, stride)[:, : ny * width]
        return planes.reshape(nz, ny, width)[:, :, :nx]

    def advance(
        self,
        fields: tuple[Field, ...],
        span: tuple[int, int],
        weights: tuple[float, float, float],
        run: Starmap,
    ) -> tuple[Field, ...]:
        """Bring fields from one time to another; they move down their memory."""
        time, last = span
        while time < last:
            if min(field.first for field in fields) < min(self.room, last - time) * self.step:
                fields = tuple(_to_the_end(field, run, self.threads) for field in fields)
            end = min(time + self.room, last)
            counts, common = counters(self.threads), (fields, self.space, weights, (time, end))
            turns = [(thread, self.threads) for thread in range(self.threads)]
            run(_advance, [(*common, turn, counts) for turn in turns])
            fields = tuple(f._replace(first=f.first - (end - time) * self.step) for f in fields)
            time = end
        return fields


def _to_the_end(field: Field, run: Starmap, threads: int) -> Field:
    """Copy a field to the end of its memory; where it was and is to be may overlap."""
    memory, first = field.memory, field.memory.size - field.size
    way = first - field.first
    for end in range(field.first + field.size, field.first, -way):
        begin = max(field.first, end - way)
        cuts = [(begin + low, begin + high) for low, high in ranges(end - begin, threads)]
        run(_copy, [(memory[low:high], memory[low + way : high + way]) for low, high in cuts])
    return field._replace(first=first)


def _copy(values: npt.NDArray[Any], there: npt.NDArray[Any]) -> None:
    there[...] = values


def lay_out(
    local: npt.NDArray[np.int32],
    iterations: npt.NDArray[np.int64],
    annotated: npt.NDArray[np.bool_] | None,
    run: Starmap,
    threads: int,
) -> Layout:
    """Lay out an array for sweeps.

    Parameters
    ----------
    local
        ``[nz, ny, nx]``: numbers of instances, 0 for background.
    iterations
        By number: how many each instance is to make; negative: none of interest.
    annotated
        ``[nz, ny, nx]``, where neighbours are annotated; ``None``: everywhere.
    run, threads
        See `starmap`.
    """
    total = max(0, int(iterations.max(initial=0)))
    begin = np.where(iterations >= 0, total - iterations, NEVER)
    begin[0] = NEVER
    nz, ny, _ = local.shape
    together = max(1, min(threads, nz // (2 * STEPS_PER_PASS), ny // (2 * STEPS_PER_PASS)))
    if run is serial:  # threads that wait for each other must all be there
        together = 1
    space = space_of(local, begin, annotated, _spare_rows(ny, together), run, threads)
    return Layout(local, begin, total, space, together)


def _spare_rows(ny: int, together: int) -> int:
    """Rows at the end of a plane into which rows of the next one move, whose place is still used.

    Strips lean by a row an iteration, and the passes that are made together by one after the other.
    """
    one_strip = ny + STEPS_PER_PASS - 1 <= LEAST_STRIP
    return 1 if one_strip else together * STEPS_PER_PASS
