"""Splitting disconnected instances on disk: pieces, faces, one union, numbers, nearest pieces.

What the union reads is brought together by the workers, so that its one task opens few files; what
it finds of all pieces is one file, of which each block reads its own rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from topo_dask.graph.pieces import (
    BlockPieces,
    Holders,
    Table,
    blocks_with_small,
    edges_of_faces,
    holders,
    next_blocks,
    pieces_of_block,
    plan_split,
    small_voxels,
)
from topo_dask.kernels import cpu
from topo_dask.run.chain import Chain, ComponentTask, View
from topo_dask.run.files import load_array, load_table, save_array, save_table
from topo_dask.run.items import Each
from topo_dask.run.ledger import fingerprint
from topo_dask.run.nearest import FillTask, fill_block, find_nearest
from topo_dask.run.together import column, first_rows, in_few


@dataclass(frozen=True)
class PlanTask:
    """One union of the pieces of all blocks, which stand in some files in their order."""

    folder: Path
    tables: tuple[Path, ...]
    ratio: float

    def __str__(self) -> str:
        return "all pieces"


def find_pieces(task: ComponentTask) -> int:
    """Stage pieces: the pieces of a block; gives their number."""
    _, found = pieces_of_block(task.view.read(task.core), task.core, task.grid.shape)
    save_table(task.file("pieces"), ids=found.ids, voxels=found.voxels, first=found.first)
    save_table(task.file("faces"), **{str(n): face for n, face in enumerate(found.faces)})
    return len(found.ids)


def _load_pieces(task: ComponentTask, block: int) -> BlockPieces:
    faces = load_table(task.file("faces", block))
    table = load_table(task.file("pieces", block))
    return BlockPieces(**table, faces=tuple(faces[str(n)] for n in range(6)))


def join_faces(task: ComponentTask) -> int:
    """Stage faces: all that the union reads of a block; gives how many pairs of pieces are one."""
    following = next_blocks(task.block, task.grid)
    others = [None if n is None else _load_pieces(task, n) for n in following]
    own = _load_pieces(task, task.block)
    first = np.asarray(task.offsets, dtype=np.int64)
    edges = np.concatenate(
        [e + first[[0, axis + 1]] for axis, e in enumerate(edges_of_faces(own, others))]
    )
    counts = np.array([len(own.ids)])
    table = {"ids": own.ids, "voxels": own.voxels, "first": own.first}
    save_table(task.file("united"), counts=counts, edges=edges, **table)
    return len(edges)


def _tables_in(paths: Sequence[Path]) -> Iterator[Table]:
    """What is known of the pieces of some blocks after the other."""
    for path in paths:
        table = load_table(path, ("ids", "voxels", "first"))
        yield table["ids"], table["voxels"], table["first"]


def plan_all(task: PlanTask) -> tuple[int, list[int]]:
    """Stage plan: what becomes of every piece; gives the instances, the blocks with small ones."""
    first = first_rows(task.tables)
    edges = column(task.tables, "edges")
    plan = plan_split(int(first[-1]), edges, _tables_in(task.tables), task.ratio)
    save_array(task.folder / "labels.npy", plan.labels)
    found = holders(plan, first)
    for field in fields(found):
        save_array(task.folder / f"holders-{field.name}.npy", getattr(found, field.name))
    return plan.instances, blocks_with_small(plan, first)


def paint_large(task: ComponentTask) -> None:
    """Stage split: the new labels of a block's large pieces, 0 for small ones."""
    assert task.out is not None
    number, ids, *_ = cpu.pieces(task.view.read(task.core))
    (first,) = task.offsets
    own = load_array(task.folder / "labels.npy", memory_map=True)[first : first + len(ids)]
    task.out[task.core.slices] = np.append(np.uint64(0), own).astype(task.out.dtype)[number]


def absorb(task: ComponentTask) -> int:
    """Stage absorb: finds the nearest large piece for a block's other voxels; gives how many."""
    assert task.out is not None
    split = View(task.out, 0, 0, "")
    core = task.core
    wanted = small_voxels(task.view.read(core), split.read(core), core.start)
    assert wanted.groups is not None
    paths = (task.folder / f"holders-{field.name}.npy" for field in fields(Holders))
    found: Any = Holders(*(load_array(path, memory_map=True) for path in paths))
    return find_nearest(
        task.file("found"),
        wanted,
        split,
        task.grid,
        task.block,
        holding=found.of(np.unique(wanted.groups.view(np.uint64))),
        group_of=lambda labels: np.asarray(found.instance_of[labels - 1]).view(np.int64),
    )


def split_step(chain: Chain, view: View, last: bool, *, ratio: float = 0.1) -> View:
    """Step: pieces of at least ``ratio`` of their instance become instances of their own."""
    folder, grid = chain.work / "split", chain.grid
    blocks = range(len(grid))
    found = fingerprint(view.mark, "pieces")
    tasks = Each(blocks, lambda n: ComponentTask(view, grid, n, folder=folder))
    offsets = [0, *itertools.accumulate(chain.stage("pieces", found, find_pieces, tasks))]

    def with_next(block: int) -> ComponentTask:
        others = (0 if n is None else offsets[n] for n in next_blocks(block, grid))
        return ComponentTask(view, grid, block, folder=folder, offsets=(offsets[block], *others))

    chain.stage("faces", found, join_faces, Each(blocks, with_next))
    tables = Each(blocks, lambda n: folder / "united" / f"{n}.npz")
    few = in_few(tables, folder / "together", partial(chain.stage, "pieces-together", found))
    mark = fingerprint(found, "plan", ratio)
    ((instances, small),) = chain.stage("plan", mark, plan_all, [PlanTask(folder, few, ratio)])
    out, identity = chain.target("split", instances, last=last)
    mark = fingerprint(mark, "split", identity)
    paint = Each(
        blocks, lambda n: ComponentTask(view, grid, n, out, folder=folder, offsets=(offsets[n],))
    )
    chain.stage("split", mark, paint_large, paint)
    made = View(out, instances, view.voxels, mark, final=last)
    if small:
        chain.stage("absorb", mark, absorb, Each(small, paint.__getitem__))
        fill = Each(small, lambda n: FillTask(made, grid, n, out, paint[n].file("found")))
        chain.stage("fill", mark, fill_block, fill)
    return made
