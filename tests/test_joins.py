"""Group 2: contacts, joins, pieces, nearest pieces. Kernels, cases, and chunked = whole."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy import ndimage

import topo_dask
from topo_dask.errors import InvalidArgument, InvalidData, InvalidType
from topo_dask.graph.contacts import contact_region, contacts_under, join_touching
from topo_dask.graph.nearest import Wanted, nearest_over_blocks
from topo_dask.grid import BlockGrid
from topo_dask.kernels import cpu, reference
from topo_dask.kernels.tables import ContactTable, merge_contacts
from topo_dask.run.contacts import contacts_in, under_names
from topo_dask.testing import block_shapes, flow_fields

DATA = Path(__file__).parent / "data"
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
seeds = st.integers(0, 2**32 - 1)


def case(name: str) -> dict[str, Any]:
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


def assert_same(one: Any, two: Any) -> None:
    for name in type(one).__dataclass_fields__:
        a, b = getattr(one, name), getattr(two, name)
        assert a.dtype == b.dtype, name
        assert_array_equal(a, b, err_msg=name)


# ── kernels ──────────────────────────────────────────────────────────────────────────────────


@st.composite
def grains(draw: st.DrawFn, longest: int = 7, kinds: int = 4) -> np.ndarray:
    """Noise of a few labels, coarse or fine, some of it background: many pieces and contacts."""
    shape = [draw(st.integers(1, longest)) for _ in range(3)]
    rng = np.random.default_rng(draw(seeds))
    coarse = draw(st.integers(1, 3))
    cells = [-(-n // coarse) for n in shape]
    which = rng.integers(0, draw(st.integers(1, kinds)) + 1, size=cells)
    for axis in range(3):
        which = which.repeat(coarse, axis=axis)
    which = which[tuple(slice(n) for n in shape)]
    return which * (rng.random(shape) < draw(st.sampled_from([1.0, 0.8, 0.3])))


@settings(max_examples=60)
@given(labels=grains(), data=st.data())
def test_contacts_of_blocks_add_up_to_those_of_the_oracle(labels: np.ndarray, data: Any) -> None:
    shape = labels.shape
    flow = reference.interleave(data.draw(flow_fields(shape)))
    step = data.draw(st.sampled_from([1.0, 0.5, 0.3]))
    ids = np.array([0, 2, 2**63 + 3, 2**63 + 4, 5], dtype=np.uint64)[labels]
    parts = []
    for core in BlockGrid(shape, data.draw(block_shapes(shape))):
        at = contact_region(core, shape).slices
        parts.append(cpu.contacts(ids[at], flow[at], core=core.shape, step_size=step))
    expected = reference.contacts(ids, flow, core=shape, step_size=step)
    assert_same(merge_contacts(parts[::-1]), expected)


@settings(max_examples=40)
@given(count=st.integers(1, 9), rows=st.integers(1, 60), renamed=st.booleans(), seed=seeds)
def test_contacts_are_added_up_by_ranges_of_labels(
    count: int, rows: int, renamed: bool, seed: int
) -> None:
    """Whatever is looked at together: each contact once, ascending, as of all at once."""
    rng = np.random.default_rng(seed)
    tables = []
    for size in rng.integers(0, 30, int(rng.integers(1, 5))):
        a, b = np.sort(rng.integers(1, count + 2, (2, size)).astype(np.uint64), axis=0)
        some = ContactTable(a, b, *rng.integers(-9, 9, (4, size)))
        tables.append(merge_contacts([some.take(a < b)]))
    names = rng.integers(0, count + 2, count + 2).astype(np.uint64)
    whole = merge_contacts(tables)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        if renamed:
            whole = contacts_under(whole, names)
            tables = under_names(tables, names, Path(folder), rows)
        found = list(contacts_in(tables, rows))
    assert_same(merge_contacts(found), whole)
    assert sum(map(len, found)) == len(merge_contacts(found))


@settings(max_examples=60)
@given(labels=grains())
def test_pieces(labels: np.ndarray) -> None:
    for mine, theirs in zip(cpu.pieces(labels), reference.pieces(labels), strict=True):
        assert mine.dtype == theirs.dtype
        assert_array_equal(mine, theirs)


@settings(max_examples=60)
@given(labels=grains(), data=st.data())
def test_the_nearest_label_over_any_blocks_is_that_of_the_oracle(
    labels: np.ndarray, data: Any
) -> None:
    shape = labels.shape
    rng = np.random.default_rng(data.draw(seeds))
    points = rng.integers(0, shape, size=(data.draw(st.integers(0, 12)), 3))
    groups = rng.integers(0, 2, size=len(points)) if data.draw(st.booleans()) else None
    new = np.where(labels > 0, 3 * labels - rng.integers(0, 2, labels.shape), 0).astype(np.uint64)
    _, expected = reference.nearest_labels(points, new, groups=groups, group_of=labels % 2)
    blocks = data.draw(block_shapes(shape))
    grid = BlockGrid(shape, blocks)
    full = [n for n, core in enumerate(grid) if new[core.slices].any()]
    found = nearest_over_blocks(
        Wanted(points, groups),
        grid,
        lambda region: new[region.slices],
        holding=np.asarray(full, dtype=np.int64) if data.draw(st.booleans()) else None,
        group_of=lambda ids: ((ids.astype(np.int64) + 2) // 3) % 2,
    )
    assert_array_equal(found, expected)


def test_a_search_reads_no_more_than_it_must() -> None:
    """A neighbour is read only as far as the best known distance; far blocks not at all."""
    labels = np.zeros((1, 1, 100), dtype=np.int64)
    labels[0, 0, [12, 30, 90]] = [1, 2, 3]
    read: list[tuple[int, int]] = []

    def reading(region: Any) -> np.ndarray:
        read.append((region.start[2], region.stop[2]))
        return labels[region.slices]

    wanted = Wanted(np.array([[0, 0, 5], [0, 0, 9]]))
    found = nearest_over_blocks(wanted, BlockGrid(labels.shape, (1, 1, 10)), reading)
    assert found.tolist() == [1, 1]
    assert read == [(0, 10), (10, 20)]


# ── results of the original package ──────────────────────────────────────────────────────────


def assert_equal_up_to_ties(
    ours: np.ndarray, theirs: np.ndarray, old: np.ndarray, ratio: float
) -> None:
    """Equal, ids included, but for voxels with several nearest large pieces."""
    assert_array_equal(ours > 0, theirs > 0)
    number, ids, voxels, _ = reference.pieces(old)
    size = np.bincount(old.ravel().astype(np.int64))
    small = np.append(0, voxels) < np.maximum(1, (size[np.append(0, ids.astype(int))] * ratio))
    absorbed = small[number] & (old > 0)
    for voxel in np.argwhere(ours != theirs):
        assert absorbed[tuple(voxel)]
        distances = [
            ((np.argwhere((made == made[tuple(voxel)]) & ~absorbed) - voxel) ** 2).sum(axis=1).min()
            for made in (ours, theirs)
        ]
        assert distances[0] == distances[1]


@pytest.mark.parametrize("chunks", [None, 22, (44, 5, 48)])
@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_splitting_gives_the_cases(ratio: float, chunks: Any) -> None:
    arrays = case("cleanup")
    given = arrays["instances"]
    expected = arrays[f"split_{round(ratio * 100):03}"]
    labels = given if chunks is None else da.from_array(given, chunks=chunks)
    ours = np.asarray(topo_dask.split_disconnected(labels, ratio))
    assert_equal_up_to_ties(ours, expected, given, ratio)
    assert_array_equal(ours, topo_dask.split_disconnected(given, ratio))


def test_joining_gives_the_case() -> None:
    arrays = case("tubes")
    given, flow = arrays["group1"], arrays["noisy_flow"]
    assert_array_equal(join_touching(given, flow), arrays["merged_adjacent_of_group1"])
    lazy = join_touching(da.from_array(given, chunks=17), da.from_array(flow, chunks=(3, 9, 48, 9)))
    assert_array_equal(lazy, arrays["merged_adjacent_of_group1"])
    split = topo_dask.split_disconnected(given)
    assert_equal_up_to_ties(split, arrays["split_disconnected_of_group1"], given, 0.1)


@pytest.mark.parametrize(
    ("name", "steps", "step_size"),
    [("ellipsoids", "track_steps", "track_step_size"), ("tubes", "n_steps", "step_size")],
)
def test_group_2_gives_the_cases(name: str, steps: str, step_size: str, tmp_path: Path) -> None:
    arrays = case(name)
    mask, flow = arrays["instances"] > 0, arrays["noisy_flow"]
    how = {
        "n_steps": int(arrays[steps]),
        "step_size": float(arrays[step_size]),
        "convergence_radius": float(arrays["convergence_radius"]),
        "min_size": int(arrays["min_size"]),
        "group": 2,
    }
    whole = topo_dask.postprocess_single(mask, flow, **how)
    before = join_touching(arrays["group1"], flow)
    assert_equal_up_to_ties(whole, arrays["group2"], before, 0.1)
    on_disk = {"foreground": mask, "cluster": "threads", "blocks": (24, 24, 24)}
    made = topo_dask.segment(flow, tmp_path / "labels.zarr", **on_disk, **how)
    assert_array_equal(made.array[...], whole)


def test_group_2_gives_the_classes() -> None:
    arrays = case("multiclass")
    configs = json.loads(str(arrays["postprocess_config"]))
    seen = 0
    for row, name in enumerate(arrays["class_names"].tolist()):
        how = configs[name]
        if how["group"] == 2:
            mask, flow = arrays["instance_ids"][row] > 0, arrays["flows"][3 * row : 3 * row + 3]
            ours = topo_dask.postprocess_single(mask, flow, **how)
            one = topo_dask.postprocess_single(mask, flow, **{**how, "group": 1})
            expected = arrays[f"instances_{name}"]
            assert_equal_up_to_ties(ours, expected, join_touching(one, flow), 0.1)
            seen += 1
    assert seen


@settings(max_examples=40)
@given(labels=grains(), data=st.data())
def test_splitting_is_that_of_the_oracle(labels: np.ndarray, data: Any) -> None:
    """Of any ids, for any part that makes a piece large, in memory and in chunks."""
    ratio = data.draw(st.sampled_from([0.1, 0, 0.3, 0.5, 1]))
    ids = np.array([0, 2, 2**63 + 3, 2**64 - 1, 5], dtype=np.uint64)[labels]
    expected = reference.split_disconnected(ids, min_fragment_ratio=ratio)
    assert_array_equal(topo_dask.split_disconnected(ids, ratio), expected)
    drawn = data.draw(block_shapes(ids.shape))
    chunks = tuple(max(b, n // 2) for b, n in zip(drawn, ids.shape, strict=True))
    lazy = topo_dask.split_disconnected(da.from_array(ids, chunks=chunks), ratio)
    assert_array_equal(lazy.compute(scheduler="sync"), expected)


def test_components_of_a_mask_from_store_to_store(tmp_path: Path) -> None:
    """As the README has it."""
    mask = np.random.default_rng(3).random((9, 10, 11)) < 0.4
    source, target = str(tmp_path / "mask.zarr"), str(tmp_path / "components.zarr")
    stored = zarr.create_array(source, shape=mask.shape, chunks=(4, 5, 6), dtype=bool)
    stored[...] = mask
    da.to_zarr(topo_dask.split_disconnected(da.from_zarr(source), 0), target)
    expected, count = ndimage.label(mask)
    assert count > 20
    assert_array_equal(zarr.open_array(target, mode="r")[...], expected)


NEGATIVE = np.array([[[0, 3, -2]]])


@pytest.mark.parametrize(
    ("instances", "ratio", "error", "text"),
    [
        (NEGATIVE, 0.1, InvalidData, "instances: got the negative label -2"),
        (np.ones((1, 1, 2)), 0.1, InvalidType, "instances: got dtype float64"),
        (np.ones((2, 2), int), 0.1, InvalidArgument, "instances: got 2 axes"),
        (np.ones((1, 1, 2), int), -0.1, InvalidArgument, "min_fragment_ratio: got -0.1"),
        (np.ones((1, 1, 2), int), 1.5, InvalidArgument, "from 0 to 1"),
        (np.ones((1, 1, 2), int), float("nan"), InvalidArgument, "min_fragment_ratio"),
        (np.ones((1, 1, 2), int), "much", InvalidType, "min_fragment_ratio: got 'much'"),
    ],
)
def test_bad_input(instances: Any, ratio: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        topo_dask.split_disconnected(instances, ratio)


def test_a_negative_label_of_a_chunk_is_named() -> None:
    lazy = topo_dask.split_disconnected(da.from_array(NEGATIVE, chunks=(1, 1, 2)))
    with pytest.raises(InvalidData, match=r"-2 in the block at \(0, 0, 2\)"):
        lazy.compute(scheduler="sync")
