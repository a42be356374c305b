"""Filling holes on disk: background of every block, faces, one union, what encloses what.

What the union reads is brought together by the workers, so that its one task opens few files; what
it finds is one file, of which each block reads its own rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.graph.holes import Table, background_of_block, enclosing, fill, meeting
from topo_dask.graph.pieces import next_blocks
from topo_dask.grid import Region
from topo_dask.run.chain import Chain, ComponentTask, View
from topo_dask.run.files import load_array, load_table, save_array, save_table
from topo_dask.run.items import Each
from topo_dask.run.ledger import fingerprint
from topo_dask.run.together import column, first_rows, in_few


@dataclass(frozen=True)
class HolesTask:
    """One union of the open components of all blocks, which stand in some files in their order."""

    folder: Path
    tables: tuple[Path, ...]

    def __str__(self) -> str:
        return "all holes"


@dataclass(frozen=True, slots=True)
class Decided:
    """The instances that enclose the open components of a block.

    Parameters
    ----------
    path
        File with those of all blocks.
    first
        Where those of this one begin.
    """

    path: Path
    first: int

    def fill(
        self, labels: npt.NDArray[Any], core: Region, shape: tuple[int, ...]
    ) -> npt.NDArray[Any]:
        """The labels of the block, from those with one voxel around it, with its holes filled."""
        read = core.grow(1, within=shape)
        components, found = background_of_block(labels, core, read, shape)
        decided = load_array(self.path, memory_map=True)
        own = np.asarray(decided[self.first : self.first + len(found.open)])
        return fill(labels[core.relative_to(read.start).slices], components, found, own)


def find_background(task: ComponentTask) -> int:
    """Stage background: its components in a block; gives how many reach other blocks."""
    shape = task.grid.shape
    read = task.core.grow(1, within=shape)
    found = background_of_block(task.view.read(read), task.core, read, shape)[1]
    names = ("lowest", "highest", "at_border")
    save_table(task.file("open"), **{name: getattr(found, name)[found.open] for name in names})
    planes = {str(n): plane.astype(np.int32) for n, plane in enumerate(found.faces)}
    save_table(task.file("planes"), **planes)
    return len(found.open)


def _load_planes(task: ComponentTask, block: int) -> list[npt.NDArray[Any]]:
    """The open components in the six faces of a block, see `Background.faces`."""
    stored = load_table(task.file("planes", block))
    return [stored[str(n)] for n in range(6)]


def meet(task: ComponentTask) -> int:
    """Stage hole-edges: all that the union reads of a block; gives how many pairs meet."""
    own, table = _load_planes(task, task.block), load_table(task.file("open"))
    first = np.asarray(task.offsets, dtype=np.int64)
    pairs = [
        meeting(own, _load_planes(task, other), axis) + first[[0, axis + 1]]
        for axis, other in enumerate(next_blocks(task.block, task.grid))
        if other is not None
    ]
    edges = np.concatenate([np.zeros((0, 2), dtype=np.int64), *pairs])
    save_table(task.file("united"), counts=np.array([len(table["lowest"])]), edges=edges, **table)
    return len(edges)


def _tables_in(paths: Sequence[Path]) -> Iterator[Table]:
    """What is known of the open components of some blocks after the other."""
    for path in paths:
        table = load_table(path, ("lowest", "highest", "at_border"))
        yield table["lowest"], table["highest"], table["at_border"]


def decide_holes(task: HolesTask) -> int:
    """Stage holes: which instance encloses what, across blocks; gives how many pieces it fills."""
    count = int(first_rows(task.tables)[-1])
    decided = enclosing(count, column(task.tables, "edges"), _tables_in(task.tables))
    save_array(task.folder / "filled.npy", decided)
    return int(np.count_nonzero(decided))


def find_holes(chain: Chain, view: View) -> Sequence[Decided]:
    """Decide which background belongs to an instance; gives where that stands for each block."""
    folder, grid = chain.work / "holes", chain.grid
    blocks, mark = range(len(grid)), fingerprint(view.mark, "holes")
    tasks = Each(blocks, lambda n: ComponentTask(view, grid, n, folder=folder))
    counts = chain.stage("background", mark, find_background, tasks)
    offsets = [0, *itertools.accumulate(counts)]

    def with_next(block: int) -> ComponentTask:
        others = (0 if n is None else offsets[n] for n in next_blocks(block, grid))
        return ComponentTask(view, grid, block, folder=folder, offsets=(offsets[block], *others))

    chain.stage("hole-edges", mark, meet, Each(blocks, with_next))
    tables = Each(blocks, lambda n: folder / "united" / f"{n}.npz")
    few = in_few(tables, folder / "together", partial(chain.stage, "holes-together", mark))
    chain.stage("holes", mark, decide_holes, [HolesTask(folder, few)])
    return Each(blocks, lambda n: Decided(folder / "filled.npy", offsets[n]))
