"""Splitting disconnected instances on disk: pieces, faces, one union, numbers, nearest pieces."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from topo_dask.graph.pieces import (
    BlockPieces,
    edges_of_faces,
    holders,
    holding_any,
    next_blocks,
    pieces_of_block,
    plan_split,
    small_voxels,
)
from topo_dask.grid import BlockGrid, Region
from topo_dask.kernels import cpu
from topo_dask.run.chain import Chain, View
from topo_dask.run.files import load_array, load_table, save_array, save_table
from topo_dask.run.ledger import fingerprint
from topo_dask.run.nearest import FillTask, fill_block, find_nearest
from topo_dask.storage import AnyArray


@dataclass(frozen=True, slots=True)
class PieceTask:
    """One block whose pieces are looked at.

    ``offsets``: the number of pieces before each block, of this one and of the next along z, y
    and x, where the stage needs them.
    """

    view: View
    grid: BlockGrid
    block: int
    folder: Path
    offsets: tuple[int, ...] = ()
    out: AnyArray | None = None

    @property
    def core(self) -> Region:
        """The block's voxels."""
        return self.grid.region(self.block)

    def file(self, kind: str, block: int | None = None, suffix: str = "npz") -> Path:
        """Where a block's data of some kind is."""
        return self.folder / kind / f"{self.block if block is None else block}.{suffix}"

    def __str__(self) -> str:
        return f"block {self.core}"


@dataclass(frozen=True)
class PlanTask:
    """One union of the pieces of all blocks."""

    folder: Path
    blocks: int
    ratio: float

    def __str__(self) -> str:
        return "all pieces"


def find_pieces(task: PieceTask) -> int:
    """Stage pieces: the pieces of a block; gives their number."""
    _, found = pieces_of_block(task.view.read(task.core), task.core, task.grid.shape)
    save_table(task.file("pieces"), ids=found.ids, voxels=found.voxels, first=found.first)
    save_table(task.file("faces"), **{str(n): face for n, face in enumerate(found.faces)})
    return len(found.ids)


def _load_pieces(task: PieceTask, block: int) -> BlockPieces:
    faces = load_table(task.file("faces", block))
    table = load_table(task.file("pieces", block))
    return BlockPieces(**table, faces=tuple(faces[str(n)] for n in range(6)))


def join_faces(task: PieceTask) -> int:
    """Stage faces: pieces that go on in the next blocks; gives the number of such pairs."""
    following = next_blocks(task.block, task.grid)
    others = [None if n is None else _load_pieces(task, n) for n in following]
    edges = edges_of_faces(_load_pieces(task, task.block), others)
    first = np.asarray(task.offsets, dtype=np.int64)
    whole = np.concatenate([e + first[[0, axis + 1]] for axis, e in enumerate(edges)])
    save_array(task.file("edges", suffix="npy"), whole)
    return len(whole)


def plan_all(task: PlanTask) -> tuple[int, list[int]]:
    """Stage plan: what becomes of every piece; gives the instances, the blocks with small ones."""
    numbers = range(task.blocks)
    tables = [load_table(task.folder / "pieces" / f"{n}.npz") for n in numbers]
    ids, voxels, first = (
        np.concatenate([t[k] for t in tables]) for k in ("ids", "voxels", "first")
    )
    edges = np.concatenate([load_array(task.folder / "edges" / f"{n}.npy") for n in numbers])
    plan = plan_split(ids, voxels, first, edges, task.ratio)
    counts = [len(t["ids"]) for t in tables]
    blocks = np.repeat(np.arange(task.blocks), counts)
    for number, labels in enumerate(np.split(plan.labels, np.cumsum(counts)[:-1])):
        save_array(task.folder / "names" / f"{number}.npy", np.append(np.uint64(0), labels))
    save_array(task.folder / "instance_of.npy", plan.instance_of)
    instances, places = holders(ids, blocks, plan)
    save_array(task.folder / "holders-instances.npy", instances)
    save_array(task.folder / "holders-blocks.npy", places)
    return plan.instances, np.unique(blocks[plan.small]).tolist()


def paint_large(task: PieceTask) -> None:
    """Stage split: the new labels of a block's large pieces, 0 for small ones."""
    assert task.out is not None
    number, *_ = cpu.pieces(task.view.read(task.core))
    names = load_array(task.file("names", suffix="npy"))
    task.out[task.core.slices] = names[number].astype(task.out.dtype)


def absorb(task: PieceTask) -> int:
    """Stage absorb: finds the nearest large piece for a block's other voxels; gives how many."""
    assert task.out is not None
    split = View(task.out, 0, 0, "")
    core = task.core
    wanted = small_voxels(task.view.read(core), split.read(core), core.start)
    assert wanted.groups is not None
    table = tuple(
        load_array(task.folder / f"holders-{name}.npy", memory_map=True)
        for name in ("instances", "blocks")
    )
    holding = holding_any(np.unique(wanted.groups.view(np.uint64)), table)  # type: ignore[arg-type]
    instance_of = load_array(task.folder / "instance_of.npy", memory_map=True)
    return find_nearest(
        task.file("found"),
        wanted,
        split,
        task.grid,
        task.block,
        holding=holding,
        group_of=lambda labels: np.asarray(instance_of[labels]).view(np.int64),
    )


def split_step(chain: Chain, view: View, last: bool, *, ratio: float = 0.1) -> View:
    """Step: pieces of at least ``ratio`` of their instance become instances of their own."""
    folder, grid = chain.work / "split", chain.grid
    found = fingerprint(view.mark, "pieces")
    tasks = [PieceTask(view, grid, n, folder) for n in range(len(grid))]
    counts = chain.stage("pieces", found, find_pieces, tasks)
    offsets = [0, *itertools.accumulate(counts)]
    pairs = []
    for task in tasks:
        others = [0 if n is None else offsets[n] for n in next_blocks(task.block, grid)]
        pairs.append(PieceTask(view, grid, task.block, folder, (offsets[task.block], *others)))
    chain.stage("faces", found, join_faces, pairs)
    mark = fingerprint(found, "plan", ratio)
    ((instances, small),) = chain.stage(
        "plan", mark, plan_all, [PlanTask(folder, len(grid), ratio)]
    )
    out, identity = chain.target("split", instances, last=last)
    mark = fingerprint(mark, "split", identity)
    paint = [PieceTask(view, grid, n, folder, out=out) for n in range(len(grid))]
    chain.stage("split", mark, paint_large, paint)
    made = View(out, instances, view.voxels, mark, final=last)
    if small:
        chain.stage("absorb", mark, absorb, [paint[n] for n in small])
        fill = [FillTask(made, grid, n, out, paint[n].file("found")) for n in small]
        chain.stage("fill", mark, fill_block, fill)
    return made
