"""What blocks see around them: a wide context once or rounds with a narrow one, by their cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from topo_dask.config import FlowSettings
from topo_dask.graph.acceleration import SWEEP_COST, applies, sweeps_of
from topo_dask.graph.context import automatic_width, iterations_of
from topo_dask.grid import BlockGrid, Region
from topo_dask.kernels.cpu.diffusion import weights_of
from topo_dask.kernels.cpu.heat import untouched_iterations
from topo_dask.kernels.tables import ROWS, InstanceTable

UPDATE_SECONDS = 2.6e-10
"""A float32 value replaced by the mean of its neighbours, on one core: 3.8 G a second. This and
what follows were measured on tissue, in blocks of 64 and 128 voxels, with files in memory."""

VOXEL_SECONDS = 5e-8
"""A voxel that a context reads: decoding and numbering labels, finding neighbours, its fields."""

ROUND_VOXEL_SECONDS = 1.5e-8
"""The same in a round, whose arrays are smaller; its fields are read, see `BYTE_SECONDS`."""

BYTE_SECONDS = 1e-9
"""A byte of a round's labels and fields read or written: 1 GB a second."""

WEIGHTS = {"coordinate": 5.0, "heat": 2.0}
"""Float32 values a voxel that diffuse; a float64 counts twice."""

STATE_BYTES = {"coordinate": 20, "heat": 8}
"""Bytes of the fields of a voxel between two rounds."""

FLOW_BYTES = 16
"""Bytes of a voxel's flow in the scratch: where, and three components."""

TASK_SECONDS = 0.02
"""What a task costs whatever it does."""

ROUND_LENGTHS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Iterations a round that are compared."""

WAITING = 1.2
"""What rounds take for what their blocks compute: in every round workers wait for the slowest."""

HINT = 0.8
"""Acceleration that is not asked for is mentioned where it takes less than this part."""

MOST_COMPARISONS = 5e7
"""Blocks looked at times instances: a second or two."""


@dataclass(frozen=True, repr=False)
class ContextChoice:
    """How blocks get what lies around them: once a wide context, or rounds with a narrow one.

    Parameters
    ----------
    width
        Voxels read around a block, at most.
    rounds
        Iterations a round; 0 for one context.
    updates
        Values replaced by the mean of their neighbours, in the whole run.
    bytes_read
        Bytes of labels and fields that tasks read, in the whole run.
    seconds
        Estimate for one core.
    reason
        Why, for people.
    sweeps
        Of acceleration, for the most iterations; 0 where there is none.

    Examples
    --------
    >>> ContextChoice(46, 0, 5e9, 2e8, 3.2, "within 0.0001 after 200 iterations")
    ContextChoice(a context of at most 46 voxels: within 0.0001 after 200 iterations)
    >>> print(ContextChoice(33, 32, 5e9, 2e8, 3.2, "as asked"))
    rounds of 32 iterations, a context of 33 voxels each: as asked
    """

    width: int
    rounds: int
    updates: float
    bytes_read: float
    seconds: float
    reason: str
    sweeps: int = 0

    @property
    def cost(self) -> str:
        """What it takes, for people."""
        seconds, updates = (
            f"{n:,.0f}" if n >= 100 else f"{n:.2g}" for n in (self.seconds, self.updates / 1e9)
        )
        return f"about {seconds} core seconds, {updates} G values updated"

    def __str__(self) -> str:
        what = f"a context of at most {self.width} voxels"
        if self.rounds:
            what = f"rounds of {self.rounds} iterations, a context of {self.width} voxels each"
        return f"{what}: {self.reason}"

    def __repr__(self) -> str:
        return f"ContextChoice({self})"


@dataclass(frozen=True)
class _Sample:
    """Some blocks of a grid and what enters them."""

    cores: list[Region]
    most: npt.NDArray[np.int64]  # iterations of the instance with most; 0 where there is none
    low: npt.NDArray[np.int64]  # box around all instances that enter
    high: npt.NDArray[np.int64]
    share: float  # blocks of the grid for each of these

    def read(self, number: int, width: int) -> int:
        """Voxels that a block of the sample reads with some context."""
        core = self.cores[number]
        lengths = [
            max(b, min(b + width, h + 1)) - min(a, max(a - width, g - 1))
            for a, b, g, h in zip(
                core.start,
                core.stop,
                self.low[number].tolist(),
                self.high[number].tolist(),
                strict=True,
            )
        ]
        return math.prod(lengths)


def _sample(
    grid: BlockGrid, table: InstanceTable | None, settings: FlowSettings, origin: tuple[int, ...]
) -> _Sample:
    """Blocks at even distances, and from the table the instances whose boxes reach into them."""
    volume = Region((0, 0, 0), grid.shape)
    rows = 1 if table is None else max(1, len(table))
    count = int(min(len(grid), 256, max(8, MOST_COMPARISONS // rows)))
    cores = [grid.region((2 * i + 1) * len(grid) // (2 * count)) for i in range(count)]
    most = np.full(count, settings.n_iter, dtype=np.int64)
    low = np.zeros((count, 3), dtype=np.int64)
    high = np.tile(np.asarray(grid.shape, dtype=np.int64), (count, 1))
    if table is not None:
        most[:] = 0
        low[:], high[:] = high.copy(), 0
        for first in range(0, len(table), ROWS):
            part = table.take(slice(first, first + ROWS))
            wanted = iterations_of(part, settings, volume=volume)
            for number, core in enumerate(cores):
                near = ((part.lo < core.stop) & (part.hi > core.start)).all(axis=1)
                if near.any():
                    most[number] = max(most[number], int(wanted[near].max()))
                    low[number] = np.minimum(low[number], part.lo[near].min(axis=0))
                    high[number] = np.maximum(high[number], part.hi[near].max(axis=0))
    return _Sample(cores, most, low, high, len(grid) / count)


@dataclass(frozen=True)
class _Cost:
    updates: float
    bytes_read: float
    other_seconds: float
    waiting: float = 1.0

    @property
    def seconds(self) -> float:
        return self.waiting * (self.updates * UPDATE_SECONDS + self.other_seconds)


def _cost_of_context(
    sample: _Sample,
    widths: Sequence[int],
    sweeps: Sequence[int],
    settings: FlowSettings,
    itemsize: int,
) -> _Cost:
    """Of reading so much around each block of the sample, once."""
    updates, voxels = 0.0, 0.0
    for number, (width, made) in enumerate(zip(widths, sweeps, strict=True)):
        most, core = int(sample.most[number]), sample.cores[number].size
        read = sample.read(number, width + 1) if most else 0
        updates += (made if made == most else SWEEP_COST * made) * read
        voxels += core + read
    other = voxels * VOXEL_SECONDS + len(widths) * TASK_SECONDS
    updates *= WEIGHTS[settings.potential]
    share = sample.share
    return _Cost(share * updates, share * voxels * itemsize, share * other)


def _cost_of_rounds(sample: _Sample, length: int, settings: FlowSettings, itemsize: int) -> _Cost:
    """Of rounds of so many iterations: labels and fields are read and written every time."""
    updates, labels, fields, written, tasks = 0.0, 0.0, 0.0, 0.0, 0.0
    for number, core in enumerate(sample.cores):
        most = int(sample.most[number])
        read = sample.read(number, min(length, most) + 1) if most else 0
        rounds = max(1, -(-most // length))
        updates += most * read
        labels += rounds * (core.size + read)
        fields += (rounds - 1) * read
        written += (rounds - 1) * core.size
        tasks += rounds + 1
    state = STATE_BYTES[settings.potential]
    bytes_read = labels * itemsize + fields * state
    flows = 2 * sum(core.size for core in sample.cores) * FLOW_BYTES
    moved = bytes_read + written * state + flows
    other = labels * ROUND_VOXEL_SECONDS + moved * BYTE_SECONDS + tasks * TASK_SECONDS
    updates *= WEIGHTS[settings.potential]
    share = sample.share
    return _Cost(share * updates, share * bytes_read, share * other, WAITING)


def most_in_rounds(settings: FlowSettings) -> float:
    """Iterations that rounds can make: after more, heat leaves the range of float64."""
    if settings.potential != "heat":
        return math.inf
    return untouched_iterations(weights_of(settings.spacing))


def choose_context(
    settings: FlowSettings,
    grid: BlockGrid,
    *,
    table: InstanceTable | None = None,
    origin: tuple[int, ...] = (0, 0, 0),
    itemsize: int = 4,
    blended: bool = False,
) -> ContextChoice:
    """Choose between one context and rounds of iterations, by voxel updates and bytes.

    The automatic context h follows from n and the tolerance; a block of side B then costs
    n (B + 2h)^3 updates. Rounds of k cost n (B + 2k + 2)^3, and n/k times the reading and writing
    of labels and fields; their result is exact to the bit. Neither reads beyond the instances'
    boxes. Blocks at even distances are looked at. Acceleration is of a context only: what it saves
    counts where it is asked for, and is mentioned where it is not.

    Parameters
    ----------
    settings
        Diffusion: ``n_iter``, ``tolerance``; a ``context`` or ``rounds`` that is given is taken.
    grid
        The blocks.
    table
        Facts of whole instances, in coordinates of the grid; without it every block is taken to
        hold large ones.
    origin
        Global index of the volume's first voxel.
    itemsize
        Bytes of a label.
    blended
        Whether tiles overlap, which needs a context.

    Returns
    -------
    ContextChoice

    Examples
    --------
    >>> from topo_dask.config import FlowSettings
    >>> grid = BlockGrid((1024, 1024, 1024), (128, 128, 128))
    >>> choose_context(FlowSettings(n_iter=20), grid).rounds
    0
    >>> choose_context(FlowSettings(n_iter=2000), grid).rounds
    24
    """
    sample = _sample(grid, table, settings, origin)
    largest = int(sample.most.max(initial=0))
    farthest = max(o + n for o, n in zip(origin, grid.shape, strict=True))

    def once(fast: bool, reason: str, settings: FlowSettings = settings) -> ContextChoice:
        """One context, with or without acceleration."""
        how = settings if fast else replace(settings, acceleration="none")
        sweeps = [sweeps_of(n, farthest, how) for n in sample.most.tolist()]
        widths = [
            min(automatic_width(n, how, farthest), s) if how.context == "auto" else how.context
            for n, s in zip(sample.most.tolist(), sweeps, strict=True)
        ]
        cost = _cost_of_context(sample, widths, sweeps, how, itemsize)
        made = max(sweeps) if max(sweeps) < largest else 0
        return ContextChoice(
            max(widths), 0, cost.updates, cost.bytes_read, cost.seconds, reason, made
        )

    accelerated = applies(settings) and sweeps_of(largest, farthest, settings) < largest
    context = once(accelerated, "as asked")
    if settings.context != "auto":
        return context
    length, rounds = _rounds_of(sample, settings, itemsize, largest)
    if settings.rounds is not None:
        return rounds
    if largest > most_in_rounds(settings):
        return replace(context, reason=f"heat of {largest} iterations needs one")
    within = f"within {settings.tolerance:g} after {largest} iterations; {context.cost}"
    if blended:
        return replace(context, reason=f"{within}; tiles that are blended need one")
    if accelerated and settings.acceleration == "chebyshev":
        return replace(context, reason=f"{within}; acceleration needs one")
    faster = context.seconds / rounds.seconds
    if faster > 1:
        other = f"a context of {context.width} voxels ({context.cost})"
        why = f"exact to the bit; {rounds.cost}, {faster:.1f} times as fast as {other}"
        chosen = replace(rounds, reason=why)
    else:
        other = f"rounds of {length} iterations would take {1 / faster:.1f} times as long"
        chosen = replace(context, reason=f"{within}; {other} ({rounds.cost})")
    return _with_hint(chosen, settings, lambda how: once(True, "", how))


def _with_hint(
    chosen: ContextChoice, settings: FlowSettings, once: Callable[[FlowSettings], ContextChoice]
) -> ContextChoice:
    """The same; its reason says so where acceleration, which was not asked for, is cheaper."""
    faster = replace(settings, acceleration="auto")
    if settings.acceleration != "none" or not applies(faster):
        return chosen
    other = once(faster)
    if other.sweeps == 0 or other.seconds > HINT * chosen.seconds:
        return chosen
    hint = f"acceleration='auto' would take {other.seconds / chosen.seconds:.0%} of that"
    return replace(chosen, reason=f"{chosen.reason}; {hint.replace('%', ' %')}")


def _rounds_of(
    sample: _Sample, settings: FlowSettings, itemsize: int, largest: int
) -> tuple[int, ContextChoice]:
    """The length of the cheapest rounds, or that which is asked for; and what they take."""
    lengths = [k for k in ROUND_LENGTHS if k < largest] or [max(1, largest)]
    if isinstance(settings.rounds, int):
        lengths = [settings.rounds]
    costs = [(_cost_of_rounds(sample, k, settings, itemsize), k) for k in lengths]
    best, length = min(costs, key=lambda pair: (pair[0].seconds, pair[1]))
    made = ContextChoice(
        length + 1, length, best.updates, best.bytes_read, best.seconds, "as asked"
    )
    return length, made


def choose_halo(settings: FlowSettings, grid: BlockGrid, table: InstanceTable) -> int:
    """Voxels of halo for the rounds of the Poisson potential, at least 1.

    What is wrong beyond the halo fades over about a third of the instance's thickness, so a halo
    as thick as most of the tissue leaves little to the next round; more than a quarter of a block
    costs more than it saves. The thickness is taken from the voxels and the longest side, as of a
    rod, weighted by voxels.
    """
    if settings.context != "auto":
        return max(1, settings.context)
    most = max(1, min(32, min(grid.largest) // 4))
    thick, voxels = 0.0, 0
    for first in range(0, len(table), ROWS):
        part = table.take(slice(first, first + ROWS))
        longest = (part.hi - part.lo).max(axis=1)
        thick += float((np.sqrt(part.voxels / longest) * part.voxels).sum())
        voxels += int(part.voxels.sum())
    return int(np.clip(math.ceil(thick / max(voxels, 1)), 1, most))
