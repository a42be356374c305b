"""What the stages of every job are, and what each takes: from shapes, dtypes and settings alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from topo_dask.errors import InvalidArgument
from topo_dask.grid import BlockGrid
from topo_dask.plan.outline import Decision, Machine, Plan, Space, StagePlan, readable_bytes

FAN_IN = 64
"""Tables that one task of a tree adds up."""

SLACK = 1.3
"""What an allocator takes for arrays of some size, with what lies free between those it keeps."""

CODEC = 32 * 2**20
"""Bytes of the chunks that are decoded and encoded beside what a task computes with."""

SMALLEST = 16
"""Edge of the smallest block that is looked at for one that fits."""


def peak(content: float, *, voxels: bool = True) -> int:
    """Most memory of a task whose arrays take so much; ``voxels``: whether it moves chunks."""
    return math.ceil(SLACK * content) + (CODEC if voxels else CODEC // 8)


def largest_read(grid: BlockGrid, width: int) -> int:
    """Voxels of the largest block with so much around it.

    Examples
    --------
    >>> largest_read(BlockGrid((8, 8), (4, 4)), 2)
    36
    """
    return math.prod(
        max(
            min(n, b + width) - max(0, a - width)
            for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        )
        for edges, n in zip(grid.edges, grid.shape, strict=True)
    )


def all_read(grid: BlockGrid, width: int) -> int:
    """Voxels that all blocks read with so much around each.

    Examples
    --------
    >>> all_read(BlockGrid((8, 8), (4, 4)), 2)
    144
    """
    return math.prod(
        sum(
            min(n, b + width) - max(0, a - width)
            for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        )
        for edges, n in zip(grid.edges, grid.shape, strict=True)
    )


def tree(leaves: int) -> Iterator[int]:
    """Tasks of each level that adds up tables, down to one.

    Examples
    --------
    >>> list(tree(1)), list(tree(1000))
    ([1], [16, 1])
    """
    while True:
        leaves = -(-leaves // FAN_IN)
        yield leaves
        if leaves == 1:
            return


@dataclass(frozen=True)
class Volume:
    """An input of a job.

    Parameters
    ----------
    shape
        Of the array.
    itemsize
        Bytes of a value.
    stored
        Whether workers can read it where it is; else it goes to the scratch first.
    """

    shape: tuple[int, ...]
    itemsize: int
    stored: bool = True

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class Work(ABC):
    """A job that is checked and ready to run: all that its plan depends on.

    Parameters
    ----------
    what
        The job in a line.
    grid
        Its blocks.
    inputs
        What it reads.
    """

    what: str
    grid: BlockGrid
    inputs: tuple[Volume, ...]

    @property
    def backend(self) -> str:
        """What is to compute; empty where no kernel of it runs on a GPU."""
        return ""

    @property
    def voxels(self) -> int:
        """Of the volume."""
        return math.prod(self.grid.shape)

    @property
    def block(self) -> int:
        """Voxels of the largest block."""
        return math.prod(self.grid.largest)

    @abstractmethod
    def stages(self, machine: Machine) -> Iterator[StagePlan]:
        """Its stages, in their order."""

    @abstractmethod
    def output(self) -> Space:
        """Room that the result takes."""

    def decisions(self) -> Iterator[Decision]:
        """What is chosen for it."""
        yield from ()

    def scratch(self, stages: Sequence[StagePlan]) -> Space:
        """Room that it takes while it runs, beside the result; here nothing but the ledger."""
        copied = [v for v in self.inputs if not v.stored]
        chunks = sum(math.prod(-(-n // 128) for n in v.shape[-3:]) + 2 for v in copied)
        size = sum(v.size for v in copied)
        return Space(size, chunks + len(stages) + 4, max(len(stages), 4))

    def reblocked(self, blocks: Sequence[int]) -> Work:
        """The same in other blocks."""
        return replace(self, grid=BlockGrid(self.grid.shape, tuple(blocks)))

    def plan(self, machine: Machine) -> Plan:
        """What it takes on a machine."""
        stages = tuple(self.stages(machine))
        found = Plan(
            self.what,
            self.grid,
            stages,
            (*self.decisions(), *self._computes(machine)),
            machine,
            self.output(),
            self.scratch(stages),
        )
        return replace(found, problems=tuple(self.problems(found)))

    def problems(self, plan: Plan) -> Iterator[str]:
        """What stands against a plan of it."""
        if plan.tight:
            yield f"{too_much(plan)}. {advice(self, plan.machine)}"
        device = plan.machine.device
        if self.backend == "gpu" and device.known and not device.name:
            yield f"backend='gpu', but {device.why}. Choose backend='auto' (--backend auto)."
        if plan.device_tight:
            yield f"{too_much_on_device(plan)}. {advice_for_device(self, plan.machine)}"

    def _computes(self, machine: Machine) -> Iterator[Decision]:
        """What computes, and why."""
        if self.backend:
            device = machine.device
            value = device.name or ("processor" if device.known else f"{self.backend!r}")
            yield Decision("backend", value, device.why)


def too_much(plan: Plan) -> str:
    """What a plan needs and what there is, for people."""
    assert plan.machine.memory is not None
    return (
        f"stage {plan.largest.name} may need {readable_bytes(plan.worker_bytes)} a worker, "
        f"its limit is {readable_bytes(plan.machine.memory)}"
    )


def advice(work: Work, machine: Machine) -> str:
    """Which blocks would fit, or what else to do."""
    blocks = fitting_blocks(work, machine)
    if blocks is None:
        return "No block shape fits: give workers more memory, or each fewer threads."
    return f"blocks={blocks} would fit (--blocks {','.join(map(str, blocks))})."


def too_much_on_device(plan: Plan) -> str:
    """What a plan needs of a GPU and what there is, for people."""
    device = plan.machine.device
    assert device.memory is not None
    return (
        f"stage {plan.device_largest.name} may need {readable_bytes(plan.device_bytes)} on "
        f"{device.name}, which has {readable_bytes(device.memory)}: what does not fit is computed "
        "in parts, which takes longer"
    )


def advice_for_device(work: Work, machine: Machine) -> str:
    """Which blocks would fit on a GPU, or what else to do."""
    blocks = fitting_blocks(work, machine, lambda plan: not plan.device_tight)
    if blocks is None:
        return "No block shape fits: run fewer tasks at once on a GPU (cluster='gpu': one)."
    return f"blocks={blocks} would fit (--blocks {','.join(map(str, blocks))})."


def _fits(plan: Plan) -> bool:
    return not plan.tight


def fitting_blocks(
    work: Work, machine: Machine, fits: Callable[[Plan], bool] = _fits
) -> tuple[int, ...] | None:
    """The largest blocks, each axis halved as often as needed, that a worker has room for."""
    blocks = list(work.grid.largest)
    while max(blocks) > SMALLEST:
        longest = blocks.index(max(blocks))
        blocks[longest] = max(SMALLEST, blocks[longest] // 2)
        try:
            smaller = work.reblocked(blocks)
            found = Plan("", smaller.grid, tuple(smaller.stages(machine)), (), machine, *_NOTHING)
        except InvalidArgument:  # blocks that this job cannot have
            return None
        if fits(found):
            return tuple(blocks)
    return None


_NOTHING: Any = (Space(0, 0, 0), Space(0, 0, 0))
