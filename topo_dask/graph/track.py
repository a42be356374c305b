"""Tracking with hand-over: a particle that leaves a block goes on in the block where it is.

A block advances its particles through its flow and a halo around it. Those that leave are handed,
with their position and the steps they still have, to the block in which they now are; rounds go on
until none is left. What a particle does in a step depends on its position alone, so the answer is
the same for any blocks and any halo.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.delayed import delayed

from topo_dask.config import SegmentSettings
from topo_dask.errors import InvalidData
from topo_dask.graph.blocks import Source, grid_of
from topo_dask.graph.check import check_finite, check_mask, check_no_nan, check_same_shape
from topo_dask.graph.scale import check_scaled_flow, scaled
from topo_dask.grid import BlockGrid, Region
from topo_dask.kernels import cpu
from topo_dask.kernels.backends import DeviceKernels, kernels_for
from topo_dask.kernels.parallel import available_cores

AT_ONCE = 1 << 18
"""Particles that a task of a run holds beside those of its own block."""

LAZY_ROUNDS = 4
"""Rounds that the lazy graph plans for with its halo; runs on stores need no such number."""


@dataclass(frozen=True, eq=False)
class Particles:
    """Particles under way.

    Parameters
    ----------
    positions
        float64 ``[N,3]``, global.
    steps
        int32 ``[N]``, steps still to make.
    home
        int64 ``[N]``, number of the block in which each began.
    row
        int64 ``[N]``, its place among that block's particles.
    """

    positions: npt.NDArray[np.float64]
    steps: npt.NDArray[np.int32]
    home: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.steps)

    def take(self, which: npt.NDArray[Any]) -> Particles:
        """Some of them, by index or mask."""
        return Particles(
            self.positions[which], self.steps[which], self.home[which], self.row[which]
        )


def no_particles() -> Particles:
    """An empty set."""
    nothing = np.zeros(0, dtype=np.int64)
    return Particles(np.zeros((0, 3)), np.zeros(0, dtype=np.int32), nothing, nothing)


def join_particles(parts: Sequence[Particles]) -> Particles:
    """All particles of several sets, in their order."""
    parts = [p for p in parts if len(p)] or [no_particles()]
    return Particles(
        np.concatenate([p.positions for p in parts]),
        np.concatenate([p.steps for p in parts]),
        np.concatenate([p.home for p in parts]),
        np.concatenate([p.row for p in parts]),
    )


def first_particles(
    flow: npt.NDArray[np.float32],
    mask: npt.NDArray[Any],
    *,
    core: Region,
    read: Region,
    task: tuple[int, tuple[int, ...], SegmentSettings],
) -> tuple[npt.NDArray[np.float64], Particles]:
    """Track one particle from every foreground voxel of a block, in C order.

    Parameters
    ----------
    flow
        Of ``read``, interleaved.
    mask
        Foreground of ``core``.
    core, read
        The block, and what is read around it.
    task
        Number of the block, shape of the volume, settings.

    Returns
    -------
    ends
        float64 ``[N,3]``: where each particle ended or left.
    under_way
        Those that left with steps still to make.
    """
    home, shape, settings = task
    ends, steps = kernels_for(settings.backend).track_voxels(
        flow,
        mask,
        start=core.start,
        n_steps=settings.n_steps,
        origin=read.start,
        shape=shape,
        step_size=settings.step_size,
        interpolation=settings.interpolation,
    )
    rows = np.flatnonzero(steps)
    homes = np.full(len(rows), home, dtype=np.int64)
    return ends, Particles(ends[rows], steps[rows], homes, rows)


def advance(
    flow: npt.NDArray[np.float32],
    particles: Particles,
    *,
    origin: tuple[int, ...],
    shape: tuple[int, ...],
    settings: SegmentSettings,
) -> Particles:
    """The same particles where they stop or leave a flow (interleaved, see `kernels`)."""
    positions, steps = particles.positions.copy(), particles.steps.copy()
    kernels_for(settings.backend).track(
        flow,
        positions,
        steps,
        origin=origin,
        shape=shape,
        step_size=settings.step_size,
        interpolation=settings.interpolation,
    )
    return Particles(positions, steps, particles.home, particles.row)


def region_read(
    core: Region, halo: int, shape: tuple[int, ...], settings: SegmentSettings
) -> Region:
    """What is read for a block: a halo around it, and the voxels between which flows lie.

    Examples
    --------
    >>> core, linear = Region((4, 4, 4), (8, 8, 8)), SegmentSettings(interpolation="linear")
    >>> region_read(core, 0, (8, 9, 99), linear)
    Region(start=(4, 4, 4), stop=(8, 9, 9))
    """
    read = core.grow(halo, within=shape)
    if settings.interpolation == "nearest":
        return read
    return Region(read.start, tuple(min(n, b + 1) for n, b in zip(shape, read.stop, strict=True)))


def region_needed(particles: Particles, read: Region, settings: SegmentSettings) -> Region:
    """The part of a region in which particles stay where flows have length 1 at most.

    Longer ones hand them over once more, as from any region.

    Examples
    --------
    >>> one = Particles(np.full((1, 3), 9.5), np.array([2], np.int32), *np.zeros((2, 1), np.int64))
    >>> region_needed(one, Region((0, 0, 8), (30, 10, 30)), SegmentSettings())
    Region(start=(6, 6, 8), stop=(13, 10, 13))
    """
    voxels = particles.positions.astype(np.int64)
    way = int(particles.steps.max()) * settings.step_size
    reach = 1 + math.ceil(min(way, max(read.shape)))
    low, high = voxels.min(axis=0) - reach, voxels.max(axis=0) + reach + 1
    return Region(
        tuple(max(a, int(b)) for a, b in zip(read.start, low, strict=True)),
        tuple(min(a, int(b)) for a, b in zip(read.stop, high, strict=True)),
    )


def flow_ready(
    flow: npt.NDArray[Any],
    *,
    read: Region,
    block: Region,
    argument: str = "flow",
    backend: str = "auto",
) -> npt.NDArray[np.float32]:
    """The flow read for a block as the kernel wants it; raises InvalidData for NaN or infinity."""
    ready = kernels_for(backend).interleave(flow)
    check_finite(ready, origin=read.start, block=block, argument=argument)
    return ready


def by_block(
    particles: Particles, grid: BlockGrid
) -> tuple[Particles, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Particles sorted by the block they are bound for: home if done, else where they are.

    Returns
    -------
    particles
        Sorted; of those bound for one block, the ones under way come first.
    blocks
        int64 ``[B]``, the destinations, ascending; twice where some are done and some under way.
    starts
        int64 ``[B + 1]``: those for ``blocks[i]`` are rows ``starts[i]`` to ``starts[i + 1]``.
    """
    done = particles.steps == 0
    keys = 2 * np.where(done, particles.home, grid.owner(particles.positions)) + done
    if len(keys) and np.ptp(keys) < 2**16:
        keys = (keys - keys.min()).astype(np.uint16)  # which NumPy sorts by radix
    order = np.argsort(keys, kind="stable")
    ordered, sorted_keys = particles.take(order), keys[order]
    new = np.ones(len(keys), dtype=bool)
    new[1:] = sorted_keys[1:] != sorted_keys[:-1]
    starts = np.flatnonzero(new)
    first = ordered.take(starts)
    blocks = np.where(first.steps == 0, first.home, grid.owner(first.positions))
    return ordered, blocks, np.append(starts, len(order)).astype(np.int64)


def memory_of_tracking(core: int, read: int, itemsize: int, leaving: float) -> int:
    """Bytes that the first round of a block takes at most, all of its voxels being foreground.

    Parameters
    ----------
    core, read
        Voxels of the block, and of the flow that is read for it.
    itemsize
        Of a component of the flow as it is stored.
    leaving
        Part of the particles that leave what is read.
    """
    stored = 3 * itemsize + (12 if itemsize < 4 else 0)  # made float32 first
    # Then the flow as it was read is gone: a mask, positions and steps, particles under way;
    # then the interleaved flow is gone too: positions, cells, and particles sorted and written.
    away = round(leaving * core)
    sorting = 56 * min(AT_ONCE, core)
    return max(
        (stored + 16) * read + core,
        16 * read + 29 * core + 44 * away,
        29 * core + 44 * away + sorting,
        29 * core + 156 * away,
    )


def memory_of_advance(read: int, itemsize: int, batch: int) -> int:
    """Bytes that a later round of a block takes at most, with so many particles at once."""
    stored = 3 * itemsize + (12 if itemsize < 4 else 0)
    return max((stored + 16) * read + 88 * batch, 16 * read + 200 * batch)


def leaving_share(settings: SegmentSettings, blocks: Sequence[int], halo: int) -> float:
    """What part of a block's particles crosses its halo, where all go the same way, straight on.

    Examples
    --------
    >>> leaving_share(SegmentSettings(n_steps=96), (128, 128, 128), halo=32)
    0.5
    """
    beyond = max(0.0, settings.travel - halo)
    return min(1.0, beyond / min(blocks))


# ---------------------------------------------------------------------------------- lazy graph


def _begin(
    mask: npt.NDArray[Any],
    flow: npt.NDArray[Any],
    core: Region,
    read: Region,
    task: tuple[int, tuple[int, ...], SegmentSettings],
) -> tuple[npt.NDArray[np.float64], Particles]:
    """First round of a chunk."""
    check_no_nan(mask, origin=core.start, block=core, argument="sem_mask")
    ready = flow_ready(flow, read=read, block=core, backend=task[2].backend)
    return first_particles(ready, mask, core=core, read=read, task=task)


def _sorted_out(
    parts: Sequence[Particles], grid: BlockGrid, under_way: bool
) -> dict[int, Particles]:
    """The particles still under way by the block they are in, or the done ones by home."""
    wanted = join_particles([p.take((p.steps > 0) == under_way) for p in parts])
    ordered, blocks, starts = by_block(wanted, grid)
    return {int(b): ordered.take(np.arange(starts[i], starts[i + 1])) for i, b in enumerate(blocks)}


def _go_on(
    travelling: dict[int, Particles],
    flow: npt.NDArray[Any],
    read: Region,
    task: tuple[int, tuple[int, ...], SegmentSettings],
) -> Particles:
    """A later round of a chunk."""
    block, shape, settings = task
    particles = travelling.get(block)
    if particles is None:
        return no_particles()
    return advance(
        kernels_for(settings.backend).interleave(flow),
        particles,
        origin=read.start,
        shape=shape,
        settings=settings,
    )


def _settle(
    home: int,
    started: tuple[npt.NDArray[np.float64], Particles],
    rounds: Sequence[Particles],
) -> npt.NDArray[np.float64]:
    """Final positions of a chunk's particles, in their order."""
    ends = started[0].copy()
    left = np.zeros(len(ends), dtype=bool)
    left[started[1].row] = True
    for later in rounds:
        mine = (later.home == home) & (later.steps == 0)
        ends[later.row[mine]] = later.positions[mine]
        left[later.row[mine]] = False
    if left.any():
        raise InvalidData(
            "flow",
            f"particles of block {home} that left the blocks planned for them",
            "flows of length at most 1",
            "Normalise the flow, or run topo_dask.segment on a store, which has no such limit.",
        )
    return ends


def lazy_endpoints(mask: da.Array, flow: da.Array, settings: SegmentSettings) -> list[Any]:
    """Delayed final positions of each chunk's particles, float64 ``[N,3]``, in chunk order.

    The halo and the number of rounds are chosen for flows of length at most 1; particles that go
    further make the last task fail, never a wrong answer.
    """
    grid = grid_of(mask, argument="sem_mask")
    reach = max(1, math.ceil(settings.travel / LAZY_ROUNDS))
    steps_a_round = max(1, math.floor(reach / settings.step_size))
    rounds = max(1, math.ceil(settings.n_steps / steps_a_round))
    begin, go_on = delayed(_begin, nout=2), delayed(_go_on)
    reads = [region_read(core, reach, grid.shape, settings) for core in grid]
    field, foreground = Source.of(flow), Source.of(mask)
    flows = [field.read(read) for read in reads]
    tasks = [(number, grid.shape, settings) for number in range(len(grid))]
    started = [
        begin(foreground.read(core), f, core, read, task)
        for core, f, read, task in zip(grid, flows, reads, tasks, strict=True)
    ]
    history: list[list[Any]] = [[] for _ in tasks]
    current = [pair[1] for pair in started]
    for _ in range(rounds - 1 if len(grid) > 1 else 0):
        travelling = delayed(_sorted_out)(current, grid, True)
        current = [
            go_on(travelling, f, read, task)
            for f, read, task in zip(flows, reads, tasks, strict=True)
        ]
        arrived = delayed(_sorted_out)(current, grid, False)
        for number, past in enumerate(history):
            past.append(delayed(_of_home)(arrived, number))
    return [
        delayed(_settle)(number, started[number], history[number]) for number in range(len(grid))
    ]


def _of_home(arrived: dict[int, Particles], home: int) -> Particles:
    return arrived.get(home, no_particles())


def _coordinates(mask: npt.NDArray[Any], core: Region) -> npt.NDArray[np.int64]:
    return cpu.foreground_voxels(mask, origin=core.start, dtype=np.int64)


def check_inputs(sem_mask: Any, flow: Any, scale: Any = None) -> Any:
    """The flow in its own numbers, if a mask ``[Z,Y,X]`` and it ``[3,Z,Y,X]`` fit each other."""
    check_mask(sem_mask, argument="sem_mask")
    known = check_scaled_flow(flow, scale)
    check_same_shape(flow.shape[1:], sem_mask.shape, argument="flow", of="sem_mask")
    return scaled(flow, known)


def track_flows(
    sem_mask: Any,
    flow: Any,
    n_steps: int,
    step_size: float = 1.0,
    *,
    interpolation: str = "nearest",
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Any, Any]:
    """Follow the flow from every foreground voxel.

    ``n_steps`` times: voxel = truncation of the position; position += float32(step_size *
    flow[voxel]) in all axes at once; clip to [0, N-1]. Positions are float64.

    Parameters
    ----------
    sem_mask
        ``[Z,Y,X]``, foreground where not 0; NumPy or dask.
    flow
        ``[3,Z,Y,X]`` float, ``(dz,dy,dx)``, or whole numbers with a ``scale``; NumPy or dask
        like the mask.
    n_steps
        Number of steps.
    step_size
        Length of a step where the flow has length 1.
    interpolation
        "nearest": the flow of the voxel, as above. "linear": trilinear between the voxel and the
        next one along each axis.
    scale
        What the numbers of the flow are to be divided by: 5 for a network that predicts 5 times
        the flow, 127 for int8 in which 127 stands for 1. Needed for whole numbers.
    backend
        What computes: "cpu", "gpu", or "auto", a GPU where there is one. Positions are the same,
        to the bit.

    Returns
    -------
    fg_coords
        int64 ``[N,3]``, the foreground voxels in C order (dask: chunk by chunk, each in C order).
    final_positions
        float64 ``[N,3]``, where each ended.

    Raises
    ------
    InvalidArgument, InvalidType, InvalidData
        The argument is named. For dask arrays a flow longer than 1 may fail while computing.
    BackendUnavailable
        There is no GPU, with ``backend="gpu"``; for dask arrays while computing.

    Examples
    --------
    >>> flow = np.zeros((3, 1, 1, 4), np.float32)
    >>> flow[2] = 0.5
    >>> track_flows(np.array([[[1, 0, 0, 0]]]), flow, 3)
    (array([[0, 0, 0]]), array([[0. , 0. , 1.5]]))
    """
    settings = SegmentSettings(
        n_steps=n_steps, step_size=step_size, interpolation=interpolation, backend=backend
    )
    flow = check_inputs(sem_mask, flow, scale)
    if isinstance(sem_mask, da.Array) or isinstance(flow, da.Array):
        mask, field = da.asarray(sem_mask), da.asarray(flow)
        ends = lazy_endpoints(mask, field, settings)
        source, grid = Source.of(mask), grid_of(mask, argument="sem_mask")
        starts = [delayed(_coordinates)(source.read(core), core) for core in grid]
        unknown = (np.nan, 3)
        return (
            da.concatenate([da.from_delayed(s, unknown, dtype=np.int64) for s in starts]),
            da.concatenate([da.from_delayed(e, unknown, dtype=np.float64) for e in ends]),
        )
    return _track_in_memory(np.asarray(sem_mask), np.asarray(flow), settings)


def _track_in_memory(
    mask: npt.NDArray[Any], flow: npt.NDArray[Any], settings: SegmentSettings
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    whole, threads = Region((0, 0, 0), mask.shape), available_cores()
    check_no_nan(mask, origin=whole.start, block=whole, argument="sem_mask")
    kernels = kernels_for(settings.backend)
    how: dict[str, Any] = {
        "n_steps": settings.n_steps,
        "step_size": settings.step_size,
        "interpolation": settings.interpolation,
    }
    if isinstance(kernels, DeviceKernels):
        ready = flow_ready(flow, read=whole, block=whole, backend=settings.backend)
        present = mask if mask.itemsize == 1 else mask != 0  # a byte a voxel goes there
        place: dict[str, Any] = {"origin": whole.start, "shape": mask.shape}
        ends, _ = kernels.track_voxels(ready, present, start=whole.start, **place, **how)
        return cpu.foreground_voxels(mask, dtype=np.int64, threads=threads), ends
    voxels = np.empty((np.count_nonzero(mask), 3), dtype=np.int64)
    ready = _room(voxels, mask.shape)
    cpu.interleave_into(ready, flow, threads=threads)
    check_finite(ready, origin=whole.start, block=whole, argument="flow")
    ends = cpu.track_volume(ready, mask, threads=threads, **how)
    return cpu.foreground_voxels(mask, dtype=np.int64, threads=threads, out=voxels), ends


def _room(voxels: npt.NDArray[np.int64], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Room for an interleaved flow where voxels come later, if it is enough; else new one.

    What takes longest of all beside the steps is memory that is touched for the first time.
    """
    numbers = 4 * math.prod(shape)
    if 2 * voxels.size < numbers:
        return np.empty((*shape, 4), dtype=np.float32)
    return voxels.reshape(-1).view(np.float32)[:numbers].reshape(*shape, 4)
