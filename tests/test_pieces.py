"""What becomes of the pieces of all blocks: as counted one by one, in few bytes a piece."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

import topo_dask
from topo_dask.graph.pieces import PIECE_BYTES, blocks_with_small, holders, plan_split
from topo_dask.run.files import load_array, save_table
from topo_dask.run.pieces import PlanTask, plan_all
from topo_dask.run.together import TablesTask, bring_together

Arrays = tuple[np.ndarray, ...]
seeds = st.integers(0, 2**32 - 1)


def some_pieces(seed: int, most: int = 30) -> tuple[Arrays, np.ndarray, np.ndarray]:
    """Instances, sizes and first voxels of pieces; pairs that are one; the first of each block."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, most))
    known = np.array([2, 5, 6, 2**63 + 3, 2**64 - 1], dtype=np.uint64)
    ids = known[rng.integers(0, len(known), count)]
    sizes = rng.integers(1, 1 + int(rng.choice([1, 4, 90])), count)
    edges = rng.integers(0, count, (int(rng.integers(0, 40)) if count else 0, 2))
    edges = edges[ids[edges[:, 0]] == ids[edges[:, 1]]]
    cuts = np.sort(rng.integers(0, count + 1, int(rng.integers(0, 6))))
    return (ids, sizes, rng.permutation(3 * count)[:count]), edges, np.array([0, *cuts, count])


def counted(table: Arrays, edges: np.ndarray, ratio: float) -> tuple[list[int], list[int], list]:
    """New labels, the instance of each, and which pieces are sought, from the definition."""
    ids, sizes, first = (column.tolist() for column in table)
    graph = coo_array((np.ones(len(edges)), tuple(edges.T)), shape=(len(ids),) * 2)
    member = connected_components(graph, directed=False)[1].tolist() if ids else []
    rows: dict[int, list[int]] = {}
    for row, number in enumerate(member):
        rows.setdefault(number, []).append(row)
    labels, instance_of, sought = [0] * len(ids), [], [False] * len(ids)
    for instance in sorted(set(ids)):
        own = [some for some in rows.values() if ids[some[0]] == instance]
        own.sort(key=lambda some: min(first[row] for row in some))
        total = sum(sizes[row] for some in own for row in some)
        least = max(1, int(total * float(ratio)))
        large = [some for some in own if sum(sizes[row] for row in some) >= least]
        for some in large or [list(itertools.chain(*own))]:
            instance_of.append(instance)
            for row in some:
                labels[row] = len(instance_of)
                sought[row] = 0 < len(large) < len(own)
    return labels, instance_of, sought


def of_blocks(table: Arrays, first: np.ndarray) -> Iterator[Arrays]:
    for start, stop in itertools.pairwise(first):
        yield tuple(column[start:stop] for column in table)


@given(seeds, st.sampled_from([0.1, 0, 0.3, 0.5, 1]))
def test_the_plan_is_that_of_the_definition(seed: int, ratio: float) -> None:
    table, edges, first = some_pieces(seed)
    parts = np.array_split(edges, 3)
    plan = plan_split(len(table[0]), parts, of_blocks(table, first), ratio)
    labels, instance_of, sought = counted(table, edges, ratio)
    assert plan.labels.tolist() == labels
    assert plan.instance_of.tolist() == instance_of
    assert plan.instances == len(instance_of)
    assert plan.sought.tolist() == sought
    blocks = np.repeat(np.arange(len(first) - 1), np.diff(first))
    assert blocks_with_small(plan, first) == sorted({*blocks[plan.labels == 0].tolist()})
    found = holders(plan, first)
    for asked in (table[0][:1], np.unique(table[0])[1:], np.array([3], np.uint64)):
        expected = np.unique(blocks[np.isin(table[0], asked) & plan.sought])
        assert_array_equal(found.of(asked), expected)


def test_memory_of_the_plan_is_a_few_bytes_a_piece() -> None:
    """Also of pieces that all stay apart."""
    count, block = 1_000_000, 5_000
    rng = np.random.default_rng(0)

    def tables() -> Iterator[Arrays]:
        for start in range(0, count, block):
            rows = np.arange(start, start + block)
            ids = rng.integers(1, count // 10, block).astype(np.uint64)
            yield ids, rng.integers(1, 100, block), rows

    def edges() -> Iterator[np.ndarray]:
        yield from (rng.integers(0, count, (block, 2)) for _ in range(2 * count // block))

    plan_split(1, [np.zeros((0, 2), np.int64)], [], 0.1)  # compiles
    for pairs in ([], edges()):
        tracemalloc.start()
        try:
            made = plan_split(count, pairs, tables(), 0.1)
            holders(made, np.arange(0, count + 1, block))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert made.instances > 10
        assert peak <= PIECE_BYTES * count
    assert 0 < np.count_nonzero(made.sought) < count


def test_what_is_brought_together_is_planned_alike(tmp_path: Path) -> None:
    """Blocks one by one, or some in one file: the same answer; of no pieces at all, too."""
    table, edges, first = some_pieces(7, most=300)
    paths, groups = [], {"a": 1, "b": 3, "c": 99}
    for number, (ids, voxels, begin) in enumerate(of_blocks(table, first)):
        paths.append(tmp_path / f"{number}.npz")
        columns = {"ids": ids, "voxels": voxels, "first": begin}
        own = edges[number :: len(first) - 1]
        save_table(paths[-1], counts=np.array([len(ids)]), edges=own, **columns)
    found = []
    for name, size in groups.items():
        tables = []
        for start in range(0, len(paths), size):
            tables.append(tmp_path / name / f"{start}.npz")
            bring_together(TablesTask(tuple(paths[start : start + size]), tables[-1]))
        result = plan_all(PlanTask(tmp_path / name, tuple(tables), 0.3))
        files = sorted((tmp_path / name).glob("*.npy"))
        found.append((result, {path.name: load_array(path).tolist() for path in files}))
    assert found[0] == found[1] == found[2]
    assert found[0][1]["labels.npy"] == counted(table, edges, 0.3)[0]


@pytest.mark.parametrize("fan_in", [2, 64])
@pytest.mark.parametrize("kind", ["grains", "nothing", "one"])
def test_splitting_on_disk_is_that_in_memory(
    kind: str, fan_in: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many tables are brought together, of volumes with and without any pieces."""
    monkeypatch.setattr("topo_dask.run.together.FAN_IN", fan_in)
    shape, rng = (9, 10, 11), np.random.default_rng(2)
    mask = rng.random(shape) < {"grains": 0.08, "nothing": 0, "one": 1}[kind]
    flow = rng.normal(size=(3, *shape)).astype(np.float32) * (kind == "grains")
    how = {"n_steps": 0, "convergence_radius": 2.0, "min_size": 1}
    made = topo_dask.segment(
        flow, tmp_path / "a.zarr", foreground=mask, group=2, blocks=4, cluster="sync", **how
    )
    whole = topo_dask.postprocess_single(mask, flow, group=2, **how)
    assert_array_equal(made.array[...], whole)
    joined = topo_dask.postprocess_single(mask, flow, **how)
    assert (whole.max() > joined.max() > 10) == (kind == "grains")
