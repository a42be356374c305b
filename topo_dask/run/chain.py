"""Steps from labels to labels: what a step reads, what it renames, where it writes.

A step that only gives other numbers writes a small table of names and no voxel; what reads the
labels afterwards reads them through it. A step that changes voxels writes an array: scratch, or,
if it is the last, the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from topo_dask.grid import BlockGrid, Region
from topo_dask.kernels import cpu
from topo_dask.run.damage import ScratchArray
from topo_dask.run.files import load_array, scratch_array
from topo_dask.run.job import Run
from topo_dask.run.ledger import fingerprint
from topo_dask.storage import AnyArray, output_chunks


@dataclass(frozen=True)
class View:
    """Labels on disk, and what their numbers mean by now. Small: it travels in every task.

    Parameters
    ----------
    array
        ``[Z,Y,X]``, the stored numbers.
    instances
        How many instances there are: 1..K.
    voxels
        How many voxels are labelled.
    mark
        Fingerprint of all that the labels depend on.
    names
        File with the label of each stored number, from 0 on (`load_array`, uint64); ``None``
        where the stored numbers are the labels.
    final
        Whether the array is the output's.
    stored_mark
        Fingerprint of what the stored numbers alone depend on; ``None`` where that is ``mark``.
    """

    array: AnyArray
    instances: int
    voxels: int
    mark: str
    names: Path | None = None
    final: bool = False
    stored_mark: str | None = None

    @property
    def bare(self) -> View:
        """The stored numbers as labels: what is found of them holds whatever their names."""
        return View(self.array, 0, 0, self.stored_mark or self.mark)

    def stored(self, region: Region) -> npt.NDArray[Any]:
        """The stored numbers of a region."""
        numbers: npt.NDArray[Any] = np.asarray(self.array[region.slices])
        return numbers

    def read(self, region: Region) -> npt.NDArray[Any]:
        """The labels of a region."""
        numbers = self.stored(region)
        if self.names is None:
            return numbers
        return cpu.renamed(numbers, load_array(self.names, memory_map=True))


@dataclass(frozen=True, slots=True)
class ChainTask:
    """One block of a step that takes labels from one array to another."""

    view: View
    grid: BlockGrid
    block: int
    out: AnyArray | None = None

    @property
    def core(self) -> Region:
        """The block's voxels."""
        return self.grid.region(self.block)

    def __str__(self) -> str:
        return f"block {self.core}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentTask(ChainTask):
    """One block whose components are looked at: pieces of instances, background.

    ``offsets``: the number of components before this block, and before the next ones along z, y
    and x, where the stage needs them.
    """

    folder: Path
    offsets: tuple[int, ...] = ()

    def file(self, kind: str, block: int | None = None) -> Path:
        """Where a block's data of some kind is."""
        return self.folder / kind / f"{self.block if block is None else block}.npz"


@dataclass(frozen=True)
class Chain:
    """What the steps of a run share.

    Parameters
    ----------
    run
        The run they belong to.
    grid
        Its blocks.
    base
        Where the steps begin. Its stored number is 0 exactly where there is no foreground.
    zarr_format
        Of the output.
    """

    run: Run
    grid: BlockGrid
    base: View
    zarr_format: int = 3

    @property
    def work(self) -> Path:
        """Where scratch data goes."""
        return self.run.work

    def stage(
        self, name: str, mark: str, function: Callable[[Any], Any], items: Sequence[Any]
    ) -> list[Any]:
        """Results of all items of a stage; those that the ledger knows are not done again."""
        voxels = None
        if items and hasattr(items[0], "block"):
            every, sizes = len(items) == len(self.grid), self.grid.sizes
            voxels = sizes if every else [sizes[item.block] for item in items]
        return self.run.ledger.run(self.run.engine, name, mark, function, items, voxels=voxels)

    def target(self, name: str, instances: int, *, last: bool) -> tuple[Any, str]:
        """The array that a step writes, and a text that changes when it was made anew.

        Each block has one writer: the task of this block.
        """
        dtype = np.uint32 if instances < 2**32 else np.uint64
        chunks = output_chunks(self.grid.largest, self.grid.shape)
        if last:
            made = self.run.output.create(
                self.grid.shape,
                chunks,
                dtype,
                zarr_format=self.zarr_format,  # type: ignore[arg-type]
            )
            return ScratchArray(made), self.run.output.identity
        return scratch_array(self.work / "steps" / f"{name}.zarr", self.grid.shape, chunks, dtype)


Step = Callable[[Chain, View, bool], View]
"""Takes the labels so far; the last argument says whether none comes after it."""


def write_block(task: ChainTask) -> int:
    """Stage write: the labels of a block into the output."""
    assert task.out is not None
    task.out[task.core.slices] = task.view.read(task.core).astype(task.out.dtype)
    return 0


def follow(chain: Chain, steps: Sequence[Step]) -> View:
    """Do the steps one after the other; the labels in the end are in scratch."""
    view = chain.base
    for step in steps:
        view = step(chain, view, False)
    return view


def run_steps(chain: Chain, steps: Sequence[Step]) -> View:
    """Do the steps one after the other; the labels in the end are the output's array."""
    view = chain.base
    for number, step in enumerate(steps):
        view = step(chain, view, number == len(steps) - 1)
    if view.final:
        return view
    out, identity = chain.target("output", view.instances, last=True)
    mark = fingerprint(view.mark, "write", identity)
    tasks = [ChainTask(view, chain.grid, n, out) for n in range(len(chain.grid))]
    chain.stage("write", mark, write_block, tasks)
    return View(out, view.instances, view.voxels, mark, final=True)
