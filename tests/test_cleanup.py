"""Cleaning up labels: reference cases, definitions, and one answer for any chunks."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
from cases import KINDS, case, unwrap, wrap
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

import topo_dask
from topo_dask.errors import InvalidArgument, InvalidData, InvalidType
from topo_dask.graph.cleanup import rename
from topo_dask.kernels import cpu, reference
from topo_dask.kernels.tables import LARGEST_ERROR, ErrorTable, merge_ends, merge_errors
from topo_dask.testing import block_shapes, flow_fields, label_volumes, same_partition

SOME = settings(max_examples=settings.default.max_examples // 5)


# ── results of the original package ──────────────────────────────────────────────────────────


@KINDS
def test_renumbering_of_the_cases(kind: str) -> None:
    arrays = case("cleanup")
    labels = wrap(arrays["sparse_ids"], kind)
    made = topo_dask.filter_small(labels, 200)
    assert_array_equal(unwrap(made, kind), arrays["filtered_200"], strict=True)
    made = topo_dask.compact_relabel(labels)
    assert_array_equal(unwrap(made, kind), arrays["compact"], strict=True)
    made = topo_dask.filter_small(labels, 1058)  # the sizes are 1392, 503, 380, 1058, 1230, ...
    expected = np.array([0, 1, 0, 0, 2, 3, 4, 5, 6], np.int32)[arrays["compact"]]
    assert_array_equal(unwrap(made, kind), expected, strict=True)


@KINDS
def test_flow_check_of_the_case(kind: str) -> None:
    arrays = case("tubes")
    labels, flow = wrap(arrays["group1"], kind), wrap(arrays["noisy_flow"], kind)
    made = unwrap(topo_dask.remove_bad_flow_masks(labels, flow), kind)
    expected = arrays["bad_removed_of_group1_t04"]
    assert 0 < expected.max() < arrays["group1"].max()
    assert_array_equal(made, expected, strict=True)


# ── definitions ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("flow", "error"),
    [
        ([1, 0, -1], 0.0),
        ([0, 0, 0], 2 / 9),
        ([-1, 0, 1], 8 / 9),
        ([1, 3, -1], 1.0),
        ([1, 0.5, -1], 1 / 36),
    ],
)
def test_an_instance_is_dropped_above_its_mean_squared_error(
    flow: list[float], error: float
) -> None:
    labels = np.array([[[6, 6, 6, 0, 2]]])
    field = np.zeros((3, 1, 1, 5), np.float32)
    field[2, 0, 0, :3] = flow
    for threshold, kept in ((error - 1e-6, False), (error + 1e-6, True)):
        if threshold >= 0:
            made = topo_dask.remove_bad_flow_masks(labels, field, threshold)
            assert_array_equal(made, [[[2, 2, 2, 0, 1]]] if kept else [[[0, 0, 0, 0, 1]]])


def test_sums_of_errors_end_and_keep_their_order() -> None:
    """However long a flow and whatever the blocks: no sum wraps around."""
    labels = np.ones((1, 1, 9), np.uint8)
    flow = np.zeros((1, 1, 9, 4), np.float32)
    flow[..., 2] = [0, 0, 3e38, -2e5, 1e5, 0, 0, 0, 1]
    facts = cpu.instance_facts(labels)
    given = {"ids": facts.ids, "centres": facts.centres}
    whole = cpu.flow_errors(labels, flow, **given)
    assert whole.sums == [LARGEST_ERROR]
    parts = [
        cpu.flow_errors(labels[..., a:b], flow[:, :, a:b], **given, origin=(0, 0, a))
        for a, b in ((0, 4), (4, 9))
    ]
    assert parts[0].sums == [LARGEST_ERROR]
    assert 0 < parts[1].sums < LARGEST_ERROR
    assert merge_errors(parts).sums == merge_errors(parts[::-1]).sums == whole.sums
    many = ErrorTable(np.ones(1, np.uint64), np.array([LARGEST_ERROR - 1]))
    assert merge_errors([many] * 50).sums == [LARGEST_ERROR]
    assert len(merge_errors([])) == 0


def shell(middle: int = 0) -> np.ndarray:
    """A cube of 1 with a hole of one voxel in a background of one voxel all around."""
    labels = np.zeros((5, 5, 5), np.int32)
    labels[1:4, 1:4, 1:4] = 1
    labels[2, 2, 2] = middle
    return labels


def test_what_one_instance_encloses_is_its_own() -> None:
    expected = shell(1)
    for chunks in (5, 3, 2):
        lazy = da.from_array(shell(), chunks=chunks)
        assert_array_equal(topo_dask.fill_holes(lazy).compute(scheduler="sync"), expected)
    assert_array_equal(topo_dask.fill_holes(shell()), expected, strict=True)
    inner = (slice(1, 4),) * 3
    lazy = da.from_array(shell()[inner], chunks=1)
    assert_array_equal(topo_dask.fill_holes(lazy).compute(scheduler="sync"), expected[inner])


@pytest.mark.parametrize("voxel", [(1, 2, 2), (2, 3, 2), (2, 2, 1)])
@pytest.mark.parametrize("value", [0, 8])
def test_what_is_open_or_lies_between_two_instances_is_no_hole(
    voxel: tuple[int, ...], value: int
) -> None:
    labels = shell()
    labels[voxel] = value
    for chunks in (5, 2):
        lazy = da.from_array(labels, chunks=chunks)
        assert_array_equal(topo_dask.fill_holes(lazy).compute(scheduler="sync"), labels)
    assert_array_equal(topo_dask.fill_holes(labels), labels)


def test_an_edge_is_no_way_out() -> None:
    labels = shell()
    labels[1, 1, 2] = 0  # touches the hole along an edge only
    filled = topo_dask.fill_holes(labels)
    assert filled[2, 2, 2] == 1
    assert filled[1, 1, 2] == 0


def test_a_hole_at_the_border_of_the_volume_is_none() -> None:
    labels = shell()[2:]
    assert_array_equal(topo_dask.fill_holes(labels), labels)
    flat = shell()[2:3]
    assert_array_equal(topo_dask.fill_holes(flat), flat)


def test_an_instance_in_the_hole_of_another_stays() -> None:
    labels = np.pad(shell(3)[1:4, 1:4, 1:4], 1)  # 3 touches 1: no background between
    assert_array_equal(topo_dask.fill_holes(labels), labels)
    labels = np.full((7, 7, 7), 9)
    labels[1:6, 1:6, 1:6] = 0
    labels[3, 3, 3] = 4  # background all around it, that touches both
    assert_array_equal(topo_dask.fill_holes(labels), labels)


def test_more_instances_than_the_type_can_number_are_refused() -> None:
    ids = np.array([7], np.uint64)
    with pytest.raises(InvalidData, match=r"instances: got 2147483648 of them.*segment"):
        rename(np.full((1, 1, 1), 7), (ids, np.array([2**31], np.uint64)))


# ── bad input ────────────────────────────────────────────────────────────────────────────────


def test_bad_arguments_are_named() -> None:
    labels, flow = np.zeros((2, 3, 4), np.int32), np.zeros((3, 2, 3, 4), np.float32)
    with pytest.raises(InvalidArgument, match="instances: got 2 axes"):
        topo_dask.fill_holes(labels[0])
    with pytest.raises(InvalidType, match="instances: got dtype float64"):
        topo_dask.compact_relabel(labels.astype(float))
    with pytest.raises(InvalidArgument, match="min_size: got -1"):
        topo_dask.filter_small(labels, -1)
    with pytest.raises(InvalidArgument, match=r"threshold: got -0\.1"):
        topo_dask.remove_bad_flow_masks(labels, flow, -0.1)
    with pytest.raises(InvalidArgument, match=r"pred_flow: got shape \(2, 3, 3\)"):
        topo_dask.remove_bad_flow_masks(labels, flow[..., 1:])
    with pytest.raises(InvalidData, match="instances: got the negative label -1"):
        topo_dask.fill_holes(labels - 1)
    with pytest.raises(InvalidData, match="instances: got the negative label -1"):
        topo_dask.fill_holes(da.from_array(labels - 1)).compute(scheduler="sync")
    flow[1, 0, 2, 3] = np.nan
    for kind in ("numpy", "chunks"):
        with pytest.raises(InvalidData, match=r"pred_flow: got nan at voxel \(0, 2, 3\)"):
            unwrap(topo_dask.remove_bad_flow_masks(wrap(labels, kind), wrap(flow, kind)), kind)


# ── kernels as the oracle ────────────────────────────────────────────────────────────────────


@SOME
@given(data=st.data())
def test_kernels_give_what_the_oracle_gives(data: st.DataObject) -> None:
    labels = data.draw(label_volumes(max_side=6))
    flow4 = reference.interleave(data.draw(flow_fields(labels.shape)))
    facts = reference.instance_facts(labels)
    given = {"ids": facts.ids, "centres": facts.centres, "origin": (0, 0, 0)}
    made, expected = (k.flow_errors(labels, flow4, **given) for k in (cpu, reference))
    assert_array_equal(made.ids, expected.ids)
    # A vector's last bit may differ: one unit of fixed point a voxel and component at most.
    assert (np.abs(made.sums - expected.sums) <= 8 * facts.voxels + made.sums // 2**20).all()
    ends = data.draw(flow_fields(labels.shape)).reshape(3, -1).T.astype(np.float64) + 3.7
    one, other = (merge_ends([k.end_sums(labels.ravel(), ends)]) for k in (cpu, reference))
    for name in ("ids", "counts", "whole", "rest"):
        assert_array_equal(getattr(one, name), getattr(other, name), strict=True)
    inner = tuple(slice(min(1, n - 1), max(1, n - 1)) for n in labels.shape)
    for core in (None, inner):
        for one, other in zip(
            cpu.background(labels, core=core), reference.background(labels, core=core), strict=True
        ):
            assert_array_equal(one, other, strict=True)


# ── one answer ───────────────────────────────────────────────────────────────────────────────


@st.composite
def hollow_volumes(draw: st.DrawFn) -> np.ndarray:
    """Full of instances, with holes of any form among and in them."""
    shape = draw(st.tuples(*[st.integers(1, 9)] * 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    labels = np.full(shape, draw(st.sampled_from([1, 7, 200])), np.uint8)
    for _ in range(draw(st.integers(0, 3))):
        ends = np.sort(rng.integers(0, np.asarray(shape) + 1, size=(2, 3)), axis=0)
        labels[tuple(slice(a, b) for a, b in ends.T)] = rng.integers(0, 3)
    labels[rng.random(shape) < draw(st.sampled_from([0, 0.05, 0.3, 0.6]))] = 0
    return labels


def chunked(data: st.DataObject, array: np.ndarray, most: int = 8) -> da.Array:
    """The array in chunks down to single voxels, but not too many of them."""
    sides = list(data.draw(block_shapes(array.shape[-3:])))
    spatial = array.shape[-3:]
    while np.prod(counts := [-(-n // s) for n, s in zip(spatial, sides, strict=True)]) > most:
        sides[int(np.argmax(counts))] += 1
    return da.from_array(array, chunks=(*array.shape[:-3], *sides))


@pytest.mark.nightly
@SOME
@given(labels=st.one_of(hollow_volumes(), label_volumes(max_side=8)), data=st.data())
def test_holes_are_one_answer(labels: np.ndarray, data: st.DataObject) -> None:
    expected = reference.fill_holes(labels)
    assert_array_equal(topo_dask.fill_holes(labels), expected, strict=True)
    scheduler = data.draw(st.sampled_from(["sync", "threads"]))
    lazy = topo_dask.fill_holes(chunked(data, labels))
    assert_array_equal(lazy.compute(scheduler=scheduler), expected, strict=True)


@pytest.mark.nightly
@SOME
@given(data=st.data())
def test_what_is_dropped_is_one_answer(data: st.DataObject) -> None:
    labels = data.draw(label_volumes(max_side=9))
    flow = data.draw(flow_fields(labels.shape))
    threshold = data.draw(st.sampled_from([0.4, 0, 0.2, 2 / 3, 1, 30]))
    scheduler = data.draw(st.sampled_from(["sync", "threads"]))
    whole = topo_dask.remove_bad_flow_masks(labels, flow, threshold)
    lazy = topo_dask.remove_bad_flow_masks(chunked(data, labels), chunked(data, flow), threshold)
    assert_array_equal(lazy.compute(scheduler=scheduler), whole, strict=True)
    # The mean of few voxels may lie on the threshold itself, where the last bit decides.
    if threshold in (0.4, 30):
        assert_array_equal(
            whole, reference.remove_bad_flow_masks(labels, flow, threshold=threshold)
        )
    min_size = data.draw(st.integers(0, 40))
    whole = topo_dask.filter_small(labels, min_size)
    lazy = topo_dask.filter_small(chunked(data, labels), min_size)
    assert_array_equal(lazy.compute(scheduler=scheduler), whole, strict=True)
    kept = {i: n for i, n in zip(*np.unique(labels, return_counts=True), strict=True) if i}
    kept = {i: n for i, n in kept.items() if n >= min_size}
    assert same_partition(whole, np.where(np.isin(labels, list(kept)), labels, 0))
    assert whole.max() == len(kept)
