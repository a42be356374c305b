"""What the tasks of a run that makes flows know: the labels, the blocks, where things are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.config import FlowSettings
from topo_dask.graph.fuse import Tiling
from topo_dask.grid import BlockGrid, Region
from topo_dask.storage import AnyArray


@dataclass(frozen=True)
class FlowJob:
    """What every task of a run needs to know."""

    labels: AnyArray
    settings: FlowSettings
    grid: BlockGrid
    overlap: tuple[int, ...]
    origin: tuple[int, ...]
    work: Path
    out: AnyArray | None = None
    spatial_mask: AnyArray | None = None
    row: int | None = None  # which class, where the labels are a stack
    rounds: Path | None = None  # where the fields between rounds are, if it goes by rounds

    def read(self, region: Region) -> npt.NDArray[Any]:
        """The labels of a region."""
        first = () if self.row is None else (self.row,)
        return np.asarray(self.labels[*first, *region.slices])

    def read_mask(self, region: Region) -> npt.NDArray[Any] | None:
        """The spatial mask of a region, if there is one."""
        mask = self.spatial_mask
        return None if mask is None else np.asarray(mask[region.slices])

    def write(self, region: Region, flow: npt.NDArray[Any]) -> None:
        """The flow of a region into the output."""
        assert self.out is not None
        first = 3 * (self.row or 0)
        self.out[(slice(first, first + 3), *region.slices)] = flow

    @property
    def may_be_cut(self) -> bool:
        """Whether instances that the annotated region cuts point elsewhere."""
        return self.settings.method == "direct" and self.spatial_mask is not None

    @property
    def facts(self) -> Path:
        """Where the table of whole instances is, that flows go by."""
        return self.work / ("pointed" if self.may_be_cut else "instances")

    @property
    def volume(self) -> Region:
        """The whole volume, as a region that begins at 0."""
        return Region((0, 0, 0), self.grid.shape)

    def placed(self, region: Region) -> Region:
        """A region in the coordinates in which `corner` is the first voxel of the volume."""
        return region.relative_to(tuple(-o for o in self.corner))

    @property
    def corner(self) -> tuple[int, ...]:
        """The origin where it matters: direct flows are the same wherever the volume lies."""
        return (0, 0, 0) if self.settings.method == "direct" else self.origin

    @property
    def tiling(self) -> Tiling:
        """The blocks as tiles that overlap."""
        return Tiling(self.grid, self.overlap)


@dataclass(frozen=True)
class Task:
    """One block of a stage."""

    job: FlowJob
    number: int

    def __str__(self) -> str:
        of = "" if self.job.row is None else f"class {self.job.row}, "
        return f"{of}block {self.job.grid.region(self.number)}"
