"""The union over all blocks: any order, any pieces, the components that scipy finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from topo_dask.graph.merge import (
    cell_owners,
    component_sizes,
    most_components,
    numbers_in,
    owned_cells,
)
from topo_dask.graph.union import Union, unite
from topo_dask.grid import BlockGrid
from topo_dask.kernels.cpu import cell_table
from topo_dask.kernels.cpu import union as kernels
from topo_dask.kernels.tables import CellTable
from topo_dask.run.files import load_array, save_array
from topo_dask.run.mail import Grouped, Pairs
from topo_dask.run.merge import NumberTask, number_all
from topo_dask.run.together import TablesTask as Together
from topo_dask.run.together import bring_together
from topo_dask.storage import save_table

seeds = st.integers(0, 2**32 - 1)


def pieces(rng: np.random.Generator, pairs: np.ndarray) -> list[np.ndarray]:
    """The same pairs in another order, some twice, some turned round, in pieces."""
    some = np.concatenate([pairs, pairs[rng.random(len(pairs)) < 0.2]])
    some = rng.permutation(some)
    some = np.where(rng.random((len(some), 1)) < 0.5, some, some[:, ::-1])
    return np.array_split(some, rng.integers(1, 5))


@given(seeds, st.integers(1, 60), st.integers(0, 90))
def test_components_are_those_of_scipy_in_any_order(seed: int, count: int, edges: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, count, (edges, 2))
    graph = coo_array((np.ones(edges), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    number, member = connected_components(graph, directed=False)
    rows = Union(count)
    for piece in pieces(rng, pairs):
        rows.add(piece.astype(rng.choice(np.array(["i4", "u8", "i8"]))))
    roots = rows.roots()
    assert all(roots[n] == np.flatnonzero(member == member[n])[0] for n in range(count))
    sizes = rng.integers(1, 9, count)
    least = int(rng.integers(0, 20))
    labels, instances = unite(sizes, pieces(rng, pairs), min_size=least)
    large = [m for m in range(number) if sizes[member == m].sum() >= max(1, least)]
    expected = np.array([1 + large.index(m) if m in large else 0 for m in member])
    assert instances == len(large)
    assert np.array_equal(labels, expected)


def test_one_long_chain_is_united_from_either_end() -> None:
    chain = np.stack([np.arange(99_999), np.arange(1, 100_000)], axis=1)
    for order in (chain, chain[::-1], np.random.default_rng(0).permutation(chain)):
        assert not Union(0).roots().size
        rows = Union(100_000)
        rows.add(order)
        assert not rows.roots().any()


def test_more_than_2_to_the_31_rows_have_room() -> None:
    """The same kernels on rows of 8 bytes, as they are from so many on."""
    parent = np.arange(9, dtype=np.int64)
    kernels.join_rows(parent, np.array([[8, 2], [5, 8]]))
    kernels.point_at_roots(parent)
    assert parent.tolist() == [0, 1, 2, 3, 4, 2, 6, 7, 2]
    numbers = numbers_in(np.array([[7, 3]]), [(2**31 - 2, np.array([3])), (5, np.array([1, 7]))])
    assert numbers.tolist() == [[(5 << 32) + 1, (2**31 - 2) << 32]]


@pytest.mark.parametrize("row", [-1, 5])
def test_rows_that_are_none_are_refused(row: int) -> None:
    with pytest.raises(IndexError, match=str(row)):
        Union(5).add(np.array([[0, row]]))


def test_what_is_brought_together_is_numbered_alike(tmp_path: Path) -> None:
    """Owners one by one, or some in one file: the same instances, parts and rows of owners."""
    rng = np.random.default_rng(0)
    owners = np.array([1, 2, 5, 6, 7])
    roots = np.array_split(rng.permutation(200)[:60], len(owners))
    paths = []
    for number, mine in enumerate(roots):
        later = [(int(n), np.sort(r)) for n, r in zip(owners, roots, strict=True)][number:]
        others = np.concatenate([r for _, r in later])
        edges = numbers_in(np.stack([rng.choice(mine, 9), rng.choice(others, 9)], axis=1), later)
        counts, sizes = np.array([len(mine)]), rng.integers(1, 99, len(mine))
        paths.append(tmp_path / f"{number}.npz")
        save_table(paths[-1], counts=counts, roots=np.sort(mine), sizes=sizes, edges=edges)
    found = []
    for name, groups in (("a", [[p] for p in paths]), ("b", [paths[:3], paths[3:]])):
        tables = [tmp_path / name / f"{n}.npz" for n in range(len(groups))]
        for group, path in zip(groups, tables, strict=True):
            bring_together(Together(tuple(group), path))
        save_array(tmp_path / name / "parts" / "owners.npy", owners)
        result = number_all(NumberTask(tmp_path / name, 9, tuple(tables), 60))
        files = sorted((tmp_path / name / "parts").iterdir())
        found.append((result, {path.name: load_array(path).tolist() for path in files}))
    assert found[0] == found[1]
    parts = found[0][1]
    assert np.diff(parts["first.npy"]).tolist() == [0, 12, 12, 0, 0, 12, 12, 12, 0]
    together = np.concatenate([np.sort(mine) for mine in roots])
    ranks = 1 + np.argsort(np.argsort(together))
    assert parts["of-owner.npy"] == ranks.tolist()


@given(seeds)
def test_rows_of_blocks_do_not_depend_on_when_they_came(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [tuple(row) for row in rng.integers(0, 5, (int(rng.integers(0, 40)), 3)).tolist()]
    if rows and rng.random() < 0.5:
        rows.append((3, 2, 2**40))
    grouped, pairs = Grouped(2), Pairs()
    for row in (rows[i] for i in rng.permutation(len(rows))):
        grouped.add(*row)
        pairs.add(*row[:2])
        if rng.random() < 0.1:
            assert grouped.blocks() == pairs.blocks()
    assert len(grouped) == len(rows)
    assert grouped.blocks() == sorted({block for block, *_ in rows})
    for block in range(6):
        assert grouped.of(block) == tuple(sorted(tuple(r) for b, *r in rows if b == block))
        assert pairs.of(block) == [first for first, _ in grouped.of(block)]
    grouped.clear()
    assert len(grouped) == 0
    assert grouped.blocks() == []


@given(st.integers(1, 12), st.floats(0.3, 9.0), seeds)
def test_components_are_no_more_than_planned(edge: int, radius: float, seed: int) -> None:
    """Particles that end anywhere, as far apart as they can be."""
    rng, shape = np.random.default_rng(seed), (12, 12, 12)
    step = 1.001 * radius
    ends = np.stack(np.meshgrid(*(np.arange(0, 11, step),) * 3), axis=-1).reshape(-1, 3)
    ends = ends if seed % 2 else rng.uniform(0, 11, (60, 3))
    grid = BlockGrid(shape, (edge,) * 3)
    table, _ = cell_table(ends, shape=shape, radius=radius)
    owners = cell_owners(table.cells, grid, radius)
    found = 0
    for owner in np.unique(owners):
        mine = owners == owner
        part = CellTable(table.cells[mine], table.counts[mine], table.offsets[mine])
        found += len(component_sizes(owned_cells([part], shape, radius))[0])
    assert found <= most_components(grid, radius)
