"""The Poisson potential of instances on disk, by overlapping Schwarz rounds.

Each block solves for its core and a halo; what lies beyond the halo is taken from its neighbours'
last round, and is no-flux where that has not reached. Rounds go on over the blocks whose
surroundings have changed. They read one round and write the next, so the result depends on no
order, and a round can be cut short anywhere and done again.

How far u may be from the whole volume's is known from the last round alone. Write u' for what the
blocks would get from the u that is there, and f for what they get where it is 0. If |u' - u| <=
d u in every voxel, then u is within d A of the solution, relative to it, with A = max u/f: the
map from u to u' is u' = B u + f with B >= 0 (maximum principle), so (1 - B)^-1 >= 0, the solution
is (1 - B)^-1 f, and d u <= d A f. A block that is not solved again because its surroundings have
changed by less than d since adds no more than that to |u' - u| (maximum principle again).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from topo_dask.graph.context import context_region
from topo_dask.graph.flows import rows_in
from topo_dask.grid import Region
from topo_dask.kernels import cpu
from topo_dask.kernels.backends import kernels_for
from topo_dask.run.files import load_array, load_instances, save_array
from topo_dask.run.flow_job import FlowJob
from topo_dask.run.job import Run
from topo_dask.run.ledger import fingerprint
from topo_dask.run.rounds import fresh_rounds

RESOLVED = 1e-4
"""Differences between neighbouring voxels that count, relative to u: the flow is right there."""

LEAST = 1e-11
"""Residual that float64 reaches in the largest objects."""


@dataclass(frozen=True)
class SchwarzTask:
    """One block of a round."""

    job: FlowJob
    number: int
    round: int
    width: int
    tolerance: float  # of the solver
    enough: float  # a change so small ends it
    factor: float = 1.0  # of Chebyshev's iteration
    before: int = 0  # the round before the one in which it was solved last

    def __str__(self) -> str:
        of = "" if self.job.row is None else f"class {self.job.row}, "
        return f"{of}block {self.job.grid.region(self.number)}"


def _potential_file(job: FlowJob, number: int, made_in: int) -> Path:
    assert job.rounds is not None
    return job.rounds / str(number) / f"{made_in}.npy"


def _made(job: FlowJob) -> Path:
    """In which round each block's potential was made; 0 where there is none."""
    assert job.rounds is not None
    return job.rounds / "made.npy"


def _bound(job: FlowJob) -> Path:
    """How far the potential may be from the whole volume's, relative to it."""
    assert job.rounds is not None
    return job.rounds / "bound.npy"


def read_potential(job: FlowJob, region: Region) -> npt.NDArray[np.float64]:
    """The potential of a region after the last round, 0 where it has not reached."""
    made_in = load_array(_made(job))
    found = np.zeros(region.shape)
    for number in job.grid.touching(region):
        if made_in[number]:
            block = job.grid.region(number)
            common = block.intersect(region)
            inside, target = (common.relative_to(r.start).slices for r in (block, region))
            path = _potential_file(job, number, int(made_in[number]))
            found[target] = load_array(path, memory_map=True)[inside]
    return found


@dataclass(frozen=True)
class _Surroundings:
    """A block with its halo, and one voxel more that is known."""

    read: Region
    labels: npt.NDArray[np.int32]  # of the core's instances, numbered; with the voxel around
    potential: npt.NDArray[np.float64]
    annotated: npt.NDArray[np.bool_] | None
    inner: tuple[slice, ...]  # what is read, without the voxel around

    def beyond(self, volume: Region, *, known: bool) -> list[npt.NDArray[np.float64] | None]:
        """What is beyond each face: ``None`` at the volume's, else u, or 0 for all not known."""
        faces: list[npt.NDArray[np.float64] | None] = []
        for axis in range(3):
            for side in (0, 1):
                edge = (self.read.start, self.read.stop)[side][axis]
                if edge == (volume.start, volume.stop)[side][axis]:
                    faces.append(None)
                    continue
                at = list(self.inner)
                within = list(self.inner)
                first, last = self.inner[axis].start, self.inner[axis].stop
                at[axis] = last if side else first - 1
                within[axis] = last - 1 if side else first
                outside, inside = self.labels[tuple(at)], self.labels[tuple(within)]
                same = (outside == inside) & (inside > 0)
                value = self.potential[tuple(at)] if known else np.zeros(same.shape)
                face = np.where(same, value, 0.0)
                if known:
                    face[same & (value == 0)] = np.nan
                if self.annotated is not None:
                    face[~same & ~self.annotated[tuple(at)]] = np.nan
                faces.append(face)
        return faces

    def is_open(self, volume: Region) -> bool:
        """Whether an instance goes on beyond."""
        faces = self.beyond(volume, known=False)
        ones = replace(self, potential=np.ones(self.labels.shape)).beyond(volume, known=True)
        return any(
            bool((np.nan_to_num(a) != np.nan_to_num(b)).any())
            for a, b in zip(faces, ones, strict=True)
            if a is not None and b is not None
        )


def _surroundings(task: SchwarzTask) -> _Surroundings | None:
    """What a block reads; ``None`` where there is no instance."""
    job, core = task.job, task.job.grid.region(task.number)
    present = cpu.compact(job.read(core))[1]
    if present.size == 0:
        return None
    inside = rows_in(load_instances(job.facts), present)
    how = replace(job.settings, context=task.width - 1, rounds=None)
    none = np.zeros(len(inside), dtype=np.int64)
    read = context_region(core, inside, none, how, job.volume)
    around = read.grow(1, within=job.grid.shape)
    local, ids = cpu.compact(job.read(around))
    wanted = np.concatenate(([False], np.isin(ids, present)))
    local[~wanted[local]] = 0
    mask = job.read_mask(around)
    return _Surroundings(
        read,
        local,
        read_potential(job, around) if task.round > 1 else np.zeros(around.shape),
        None if mask is None else mask > 0.5,
        read.relative_to(around.start).slices,
    )


def _solve(task: SchwarzTask, near: _Surroundings, *, known: bool) -> npt.NDArray[np.float64]:
    """The potential of the core and its halo."""
    volume = task.job.volume
    mask = None if near.annotated is None else near.annotated[near.inner]
    kernels = kernels_for(task.job.settings.backend)
    found: npt.NDArray[np.float64] = kernels.poisson_potential(
        near.labels[near.inner],
        spatial_mask=mask,
        spacing=task.job.settings.spacing,
        start=near.potential[near.inner] if known and task.round > 1 else None,
        beyond=near.beyond(volume, known=known),
        tolerance=task.tolerance,
    )
    return found


def solve_block(task: SchwarzTask) -> list[float]:
    """Stage schwarz: one round of a block.

    Gives the change that the round asks for, that which was made, by how much errors may be
    amplified, whether instances go on beyond the halo, and the region that was read.
    """
    job, core = task.job, task.job.grid.region(task.number)
    near = _surroundings(task)
    if near is None:
        return [0.0, 0.0, 0.0, 0.0]
    own = core.relative_to(near.read.start).slices
    is_open = near.is_open(job.volume)
    if not is_open:  # done at once
        task = replace(task, tolerance=RESOLVED * job.settings.tolerance / 10)
    u = _solve(task, near, known=True)[own]
    wanted = made = amplified = 0.0
    reached = u > 0
    if is_open and task.round == 1:
        save_array(_potential_file(job, task.number, 0), _solve(task, near, known=False)[own])
    if is_open and reached.any():
        last = near.potential[near.inner][own]
        wanted = float((np.abs(u - last)[reached] / u[reached]).max())
        if wanted > task.enough and task.factor > 1:
            u = _extrapolated(task, u, last)
        made = float((np.abs(u - last)[reached] / u[reached]).max())
        least = load_array(_potential_file(job, task.number, 0))
        amplified = float((u[reached] / least[reached]).max())
    save_array(_potential_file(job, task.number, task.round), u)
    return [wanted, made, amplified, float(is_open), *near.read.start, *near.read.stop]


def _extrapolated(
    task: SchwarzTask, u: npt.NDArray[np.float64], last: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Chebyshev's step from the last two rounds; never far below what the round gives."""
    before = last
    if task.before:
        before = load_array(_potential_file(task.job, task.number, task.before))
    further = task.factor * (u - before) + before
    stepped: npt.NDArray[np.float64] = np.where(u > 0, np.maximum(further, u / 4), 0.0)
    return stepped


def flow_of_potential(job: FlowJob, core: Region) -> npt.NDArray[np.float32]:
    """The flow of a region after the last round: float32 ``[3, *region shape]``."""
    read = core.grow(1, within=job.grid.shape)
    mask = job.read_mask(read)
    kernels = kernels_for(job.settings.backend)
    flow: npt.NDArray[np.float32] = kernels.flow_of_potential(
        job.read(read),
        read_potential(job, read),
        core=core.relative_to(read.start).slices,
        spatial_mask=mask,
        spacing=job.settings.spacing,
        tolerance=float(load_array(_bound(job))),
    )
    return flow


@dataclass
class _Chebyshev:
    """Factors of Chebyshev's iteration, from how fast the plain rounds converge.

    With the eigenvalues of the rounds' map in [-r, r], plain rounds leave r^k of the error after k
    of them, these steps some s^k with s = r / (1 + sqrt(1 - r^2)). Where a stretch of steps has not
    been faster than the plain rounds were (too few were looked at, or eigenvalues are complex),
    twice as many are plain before the next try: plain rounds converge always.
    """

    rate: float = 0.0  # of the plain rounds; 0 where it is not known
    factor: float = 1.0
    steps: int = 0
    stretch: int = 6
    changes: list[float] = field(default_factory=list)

    def next(self, change: float) -> float:
        """The factor of the next round, after one that asked for this change."""
        self.changes.append(change)
        if len(self.changes) > self.stretch:
            first = self.changes[0]
            rate = (change / first) ** (1 / self.stretch) if first > 0 else 0.0
            self.changes = [change]
            if self.rate == 0:
                self.rate, self.steps = rate if rate < 0.999 else 0.0, 0
            elif rate >= self.rate:
                self.rate, self.stretch = 0.0, 2 * self.stretch
        if self.rate == 0:
            return 1.0
        self.steps += 1
        if self.steps == 1:
            self.factor = 1.0
        else:
            of = 1 / 2 if self.steps == 2 else self.factor / 4
            self.factor = 1 / (1 - self.rate**2 * of)
        return self.factor


@dataclass
class _State:
    """What is known of the blocks between two rounds."""

    made: npt.NDArray[np.int32]  # in which round each was solved last
    solved: npt.NDArray[np.float64]  # to what tolerance
    pending: npt.NDArray[np.float64]  # by how much its surroundings have changed since
    amplified: npt.NDArray[np.float64]
    around: dict[int, list[int]]  # blocks that an open block's surroundings lie in

    @property
    def amplification(self) -> float:
        """Of the bound: the error of u is this times what a round would change."""
        return max(1.0, float(self.amplified.max(initial=1.0)))

    def record(
        self, job: FlowJob, results: dict[int, list[float]], tasks: Sequence[SchwarzTask]
    ) -> float:
        """Take in a round; give the largest change that it asks for."""
        change = np.zeros(len(self.made))
        most = 0.0
        for task in tasks:
            wanted, changed, amplified, is_open, *box = results[task.number]
            if not box:
                continue
            self.made[task.number], self.amplified[task.number] = task.round, amplified
            change[task.number], most = changed, max(most, wanted)
            if is_open:
                stepped = wanted > task.enough and task.factor > 1
                self.solved[task.number] = np.inf if stepped else task.tolerance
                self.pending[task.number] = 0.0 if task.round > 1 else 1.0
                if task.number not in self.around:
                    ends = [int(n) for n in box]
                    read = Region(tuple(ends[:3]), tuple(ends[3:]))
                    near = job.grid.touching(read.grow(1, within=job.grid.shape))
                    self.around[task.number] = [n for n in near if n != task.number]
        for block, near in self.around.items():
            self.pending[block] += max(change[near], default=0.0)
        return most


@dataclass(frozen=True)
class Solved:
    """How the rounds went."""

    width: int
    rounds: int
    solves: int
    bound: float

    def __str__(self) -> str:
        return (
            f"a halo of {self.width} voxels, {self.rounds} rounds, {self.solves} blocks solved: "
            f"potential within {self.bound:.1g} of itself"
        )


def run_schwarz(run: Run, job: FlowJob, width: int, mark: str) -> tuple[FlowJob, Solved]:
    """Make all rounds of a volume; give the job that knows where its potential is.

    Parameters
    ----------
    run, job
        Where, and of what.
    width
        Voxels of halo, at least 1.
    mark
        Fingerprint of all that the flows depend on.
    """
    mark = fingerprint(mark, "schwarz", width)
    job = replace(job, rounds=fresh_rounds(job, mark))
    prefix = "schwarz" if job.row is None else f"class-{job.row}-schwarz"
    zeros = np.zeros(len(job.grid))
    state = _State(zeros.astype(np.int32), zeros.copy(), zeros.copy(), zeros.copy(), {})
    earlier = state.made.copy()  # the round before, for blocks solved in both of the last two
    resolved = RESOLVED * job.settings.tolerance
    blocks, number, solves, pace = np.arange(len(job.grid)), 1, 0, _Chebyshev()
    tolerance, factor, least = 1e-2, 1.0, resolved
    while True:
        save_array(_made(job), state.made)
        tasks = [
            SchwarzTask(job, n, number, width, tolerance, least, factor, int(earlier[n]))
            for n in blocks.tolist()
        ]
        voxels = [job.grid.sizes[n] for n in blocks.tolist()]
        stage = f"{prefix}-{number}"
        results = run.ledger.run(run.engine, stage, mark, solve_block, tasks, voxels=voxels)
        last = state.made.copy()
        change = state.record(job, dict(zip(blocks.tolist(), results, strict=True)), tasks)
        for block in np.flatnonzero(earlier).tolist():  # read no more
            _potential_file(job, block, int(earlier[block])).unlink(missing_ok=True)
        earlier = np.where(state.made > last, last, 0)
        solves += blocks.size
        least = max(resolved / state.amplification, 4 * LEAST)
        off = state.solved + state.pending
        blocks = np.flatnonzero(off > least)
        if blocks.size == 0:
            save_array(_made(job), state.made)
            bound = max(float(off.max(initial=0.0)) * state.amplification, resolved / 10)
            save_array(_bound(job), np.asarray(bound))
            return job, Solved(width, number, solves, bound)
        tolerance = max(least / 4, min(0.01 * change, tolerance))
        factor, number = pace.next(change), number + 1
