"""The plan of `compare`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from topo_dask.plan.outline import Decision, Machine, Space, StagePlan
from topo_dask.plan.work import Work, peak

NOTHING = Space(0, 0, 0)

PAIR_BYTES = 1.0
"""Bytes a voxel of the pairs of ids that meet in a block: one pair in some hundred voxels."""


@dataclass(frozen=True)
class CompareWork(Work):
    """A job of `compare`. The inputs are the truth and the labels; nothing is written."""

    def decisions(self) -> Iterator[Decision]:
        """See `Work`."""
        why = "the table of all pairs of ids that meet is added up where the run was started"
        yield Decision("pairs", f"taken as {PAIR_BYTES:g} byte a voxel of a block", why)

    def stages(self, machine: Machine) -> Iterator[StagePlan]:
        """See `Work`."""
        voxel = sum(v.itemsize for v in self.inputs) + PAIR_BYTES
        read = sum(v.size for v in self.inputs)
        yield StagePlan("compare", len(self.grid), peak(voxel * self.block), read)

    def output(self) -> Space:
        """See `Work`."""
        return NOTHING

    def scratch(self, stages: Sequence[StagePlan]) -> Space:
        """See `Work`."""
        return NOTHING
