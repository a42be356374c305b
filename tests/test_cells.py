"""Cells of a block, made of some particles at a time, and particles that come in batches."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import topo_dask
from topo_dask.config import SegmentSettings
from topo_dask.errors import DamagedFile
from topo_dask.graph.cells import cells_of_ends, ends_of_cells, with_those_home
from topo_dask.graph.track import AT_ONCE, Particles
from topo_dask.grid import BlockGrid
from topo_dask.kernels import cpu
from topo_dask.kernels.tables import merge_ends
from topo_dask.run.mail import collect, message, number_of, post

SHAPE = (9, 14, 30)


@st.composite
def final_positions(draw: st.DrawFn) -> npt.NDArray[np.float64]:
    """Positions as tracking leaves them: voxels and sums of float32 steps, within the volume."""
    count = draw(st.integers(0, 60))
    where = st.floats(0, 1, width=32)
    part = draw(hnp.arrays(np.float32, (count, 3), elements=where)).astype(np.float64)
    step = draw(hnp.arrays(np.float32, (count, 3), elements=st.floats(-2, 2, width=32)))
    last = np.asarray(SHAPE) - 1.0
    found: npt.NDArray[np.float64] = np.clip(np.floor(part * last) + step, 0, last)
    return found


def particles(rows: npt.NDArray[np.int64], ends: npt.NDArray[np.float64]) -> Particles:
    """Done ones, at home in block 0."""
    zeros = np.zeros(len(rows), np.int64)
    return Particles(ends[rows], zeros.astype(np.int32), zeros, rows)


@given(
    ends=final_positions(),
    radius=st.sampled_from([0.5, 2.0, 4.0, 7.3]),
    most=st.integers(1, 70),
    group=st.sampled_from([1, 3]),
    data=st.data(),
)
def test_cells_of_some_at_a_time_are_those_of_all(
    ends: npt.NDArray[np.float64], radius: float, most: int, group: int, data: st.DataObject
) -> None:
    settings = SegmentSettings(convergence_radius=radius, group=group)
    left = data.draw(hnp.arrays(np.bool_, len(ends)))
    away = np.flatnonzero(left)
    begun, index = cells_of_ends(ends, away, shape=SHAPE, settings=settings, most=most)
    coming = data.draw(st.permutations(away.tolist()))
    batches = [coming[i : i + most] for i in range(0, len(coming), most)]
    home = [particles(np.asarray(some, np.int64), ends) for some in batches]
    table, rows, came = with_those_home(begun, home, shape=SHAPE, settings=settings)
    index = rows[index]
    index[came.rows] = came.cells
    whole, of_all = cpu.cell_table(ends, shape=SHAPE, radius=radius)
    np.testing.assert_array_equal(index, of_all)
    for name in ("cells", "counts", "offsets"):
        np.testing.assert_array_equal(getattr(table, name), getattr(whole, name))
    kept = came.positions
    np.testing.assert_array_equal(kept, ends[came.rows] if group == 3 else np.zeros((0, 3)))


@given(ends=final_positions(), radius=st.sampled_from([0.5, 2.0, 4.0, 7.3]), data=st.data())
def test_ends_from_cells_are_those_from_positions(
    ends: npt.NDArray[np.float64], radius: float, data: st.DataObject
) -> None:
    """To the last bit: sums in the table of instances do not depend on where they were added."""
    table, index = cpu.cell_table(ends, shape=SHAPE, radius=radius)
    some = hnp.arrays(np.uint64, len(table), elements=st.integers(1, 4))
    ids = data.draw(some)
    found = ends_of_cells(table, ids, shape=SHAPE, radius=radius)
    expected = merge_ends([cpu.end_sums(ids[index], ends)])
    for name in ("ids", "counts", "whole", "rest"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@given(
    steps=hnp.arrays(np.int32, st.integers(0, 40), elements=st.integers(0, 2)),
    written=st.integers(1, 50),
    read=st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_every_particle_reaches_its_block_in_whatever_batches(
    tmp_path_factory: pytest.TempPathFactory,
    steps: npt.NDArray[np.int32],
    written: int,
    read: int,
    seed: int,
) -> None:
    work, grid = tmp_path_factory.mktemp("mail"), BlockGrid(SHAPE, (4, 5, 6))
    rng, count = np.random.default_rng(seed), len(steps)
    positions = rng.uniform(0, 1, (count, 3)) * (np.asarray(SHAPE) - 1)
    home, row = rng.integers(0, len(grid), count), rng.permutation(count)
    every = Particles(positions, steps, home, row)
    batches = (every.take(np.arange(i, min(i + written, count))) for i in range(0, count, written))
    lists = post(message(work, 3, 7), batches, count, grid)
    for moving, sent in zip((True, False), lists, strict=True):
        bound = np.where(moving, grid.owner(positions), home)
        for goal in range(len(grid)):
            mail = tuple((3, 7, first, end) for block, first, end in sent if block == goal)
            expected = np.flatnonzero((bound == goal) & ((steps > 0) == moving))
            assert number_of(mail) == len(expected)
            parts = list(collect(work, mail, read))
            assert all(len(part) == read for part in parts[:-1])
            found = np.concatenate([np.zeros(0, np.int64), *(part.row for part in parts)])
            order = np.argsort(row[expected])
            np.testing.assert_array_equal(np.sort(found), row[expected][order])
            for part in parts:
                which = np.argsort(row)[part.row]
                np.testing.assert_array_equal(part.positions, positions[which])
                np.testing.assert_array_equal(part.steps, steps[which])
                np.testing.assert_array_equal(part.home, home[which])


def test_cut_mail_is_named(tmp_path: Path) -> None:
    grid, path = BlockGrid(SHAPE, SHAPE), message(tmp_path / "a.work", 0, 0)
    rows = np.arange(5)
    post(path, [particles(rows, np.ones((5, 3)))], 5, grid)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(DamagedFile, match=r"mail-0/0\.npy"):
        list(collect(tmp_path / "a.work", [(0, 0, 0, 5)]))


def test_more_particles_come_to_a_block_than_a_task_holds(tmp_path: Path) -> None:
    """All at once: one step leads every voxel of the volume into one block, the next further."""
    shape, size = (72, 72, 72), 36
    assert np.prod(shape) > AT_ONCE + size**3
    axes = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    flow = np.stack([(20.0 - axis) / 20.0 for axis in axes]).astype(np.float32)
    options = {"n_steps": 3, "step_size": 20.0, "min_size": 1, "cluster": "threads", "halo": 0}
    mask = np.ones(shape, np.uint8)
    made = [
        topo_dask.segment(
            flow, tmp_path / f"{n}.zarr", foreground=mask, blocks=(n, n, n), **options
        )
        for n in (72, size)
    ]
    one, many = (result.array[...] for result in made)
    np.testing.assert_array_equal(one, many)
    tables = [result.path / "instances" / "table.csv" for result in made]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    assert made[1].instances.voxels.sum() == mask.size
