"""Which instances enclose what, across blocks: as counted one by one, in few bytes a component."""

from __future__ import annotations

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
from topo_dask.graph.holes import OPEN_BYTES, enclosing
from topo_dask.kernels.cpu.holes import NOTHING

Arrays = tuple[np.ndarray, ...]


@given(st.integers(0, 2**32 - 1))
def test_what_encloses_is_that_of_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 25))
    some = np.array([4, 4, 9, 2**64 - 2], dtype=np.uint64)[rng.integers(0, 4, (2, count))]
    lowest, highest = np.sort(some, axis=0)
    beside = rng.random(count) < 0.8
    lowest, highest = np.where(beside, lowest, np.uint64(NOTHING)), highest * beside
    at_border = rng.random(count) < 0.2
    edges = rng.integers(0, max(1, count), (int(rng.integers(0, 20)) if count else 0, 2))
    graph = coo_array((np.ones(len(edges)), tuple(edges.T)), shape=(count, count))
    member = connected_components(graph, directed=False)[1] if count else np.zeros(0, int)
    expected = np.zeros(count, dtype=np.uint64)
    for number in set(member.tolist()):
        mine = member == number
        low, high = lowest[mine].min(), highest[mine].max()
        expected[mine] = low if low == high and not at_border[mine].any() else 0
    columns = (lowest, highest, at_border)
    cuts = np.sort(rng.integers(0, count + 1, 3))
    tables = zip(*(np.split(column, cuts) for column in columns), strict=True)
    found = enclosing(count, np.array_split(edges, 2), tables)
    assert_array_equal(found, expected, strict=True)


def test_memory_of_the_union_is_a_few_bytes_a_component() -> None:
    count, block = 1_000_000, 5_000
    rng = np.random.default_rng(0)

    def tables() -> Iterator[Arrays]:
        for _ in range(0, count, block):
            lowest = rng.integers(1, 99, block).astype(np.uint64)
            yield lowest, lowest, rng.random(block) < 0.1

    def edges() -> Iterator[np.ndarray]:
        yield from (rng.integers(0, count, (block, 2)) for _ in range(count // block // 2))

    enclosing(1, [np.zeros((0, 2), np.int64)], [])  # compiles
    tracemalloc.start()
    try:
        found = enclosing(count, edges(), tables())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0 < np.count_nonzero(found) < count
    assert peak <= OPEN_BYTES * count


@pytest.mark.parametrize("fan_in", [2, 64])
@pytest.mark.parametrize("blocks", [4, 20])
def test_holes_on_disk_are_those_in_memory(
    blocks: int, fan_in: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many tables are brought together; also where no component is open."""
    monkeypatch.setattr("topo_dask.run.together.FAN_IN", fan_in)
    rng = np.random.default_rng(3)
    mask = rng.random((9, 10, 11)) < 0.75
    flow = np.zeros((3, *mask.shape), np.float32)
    how = {"n_steps": 0, "convergence_radius": 9.0, "min_size": 1, "foreground": mask}
    options = {"blocks": blocks, "cluster": "sync"}
    bare = topo_dask.segment(flow, tmp_path / "bare.zarr", **how, **options).array[...]
    made = topo_dask.segment(flow, tmp_path / "full.zarr", fill_holes=True, **how, **options)
    full = topo_dask.fill_holes(bare)
    assert_array_equal(made.array[...], full)
    assert np.count_nonzero(full) > np.count_nonzero(bare)
