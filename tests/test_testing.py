"""The testing module: its volumes, its strategies, its partition check."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from topo_dask.errors import BackendUnavailable, InvalidArgument
from topo_dask.testing import (
    TissueSpec,
    block_shapes,
    ellipsoids,
    flow_fields,
    label_volumes,
    same_partition,
    segment_parameters,
    synthetic_tissue,
    synthetic_tissue_block,
)

TUTORIAL = Path(__file__).parent / "data" / "tutorial.npz"
MANY = settings(phases=[Phase.generate], max_examples=20_000)
SPEC = TissueSpec((96, 110, 131), n_instances=150, seed=5)


@functools.cache
def whole_tissue() -> npt.NDArray[np.uint32]:
    return synthetic_tissue(SPEC.shape, n_instances=SPEC.n_instances, seed=SPEC.seed)


@pytest.fixture
def tissue() -> npt.NDArray[np.uint32]:
    return whole_tissue()


def test_ellipsoids_are_those_of_the_tutorial() -> None:
    expected = np.load(TUTORIAL)["instances"]
    assert np.array_equal(ellipsoids(), expected)
    assert ellipsoids().dtype == expected.dtype


def test_ellipsoids_of_another_shape_stay_disjoint_and_inside() -> None:
    labels = ellipsoids((40, 50, 60), n=3, seed=1)
    assert labels.shape == (40, 50, 60)
    assert set(np.unique(labels)) <= {0, 1, 2, 3}
    with pytest.raises(InvalidArgument, match="shape"):
        ellipsoids((20, 64, 64))


def test_tissue_has_about_the_objects_and_foreground_asked_for(
    tissue: npt.NDArray[np.uint32],
) -> None:
    assert tissue.dtype == np.uint32
    assert tissue.shape == SPEC.shape
    assert 0.3 < (tissue > 0).mean() < 0.6
    ids = np.unique(tissue[tissue > 0])
    assert 0.75 * SPEC.n_instances < len(ids) < 1.25 * SPEC.n_instances


def test_tissue_holds_convex_cells_and_long_thin_neurites(
    tissue: npt.NDArray[np.uint32],
) -> None:
    ids, dense = np.unique(tissue, return_inverse=True)
    dense = dense.reshape(tissue.shape)
    whole = touching = thin = 0
    for number, box in enumerate(ndimage.find_objects(dense), start=1):
        mask = dense[box] == number
        pieces, _ = ndimage.label(mask)
        whole += np.bincount(pieces.ravel())[1:].max() >= 0.95 * mask.sum()
        thickness = 2 * ndimage.distance_transform_edt(np.pad(mask, 1)).max()
        thin += max(mask.shape) > 3 * thickness
        around = dense[tuple(slice(max(0, s.start - 1), s.stop + 1) for s in box)]
        near = ndimage.binary_dilation(around == number) & (around > 0) & (around != number)
        touching += near.any()
    count = len(ids) - 1
    assert whole > 0.95 * count
    assert touching > 0.5 * count
    assert thin > 0.1 * count


def test_tissue_cells_alone_are_convex() -> None:
    labels = synthetic_tissue((64, 64, 64), n_instances=25, seed=2, neurites=0)
    for label in np.unique(labels[labels > 0]):
        points = np.argwhere(labels == label)
        # The middle of two voxels of a convex object lies in it, where it is a voxel at all.
        ends = points[np.random.RandomState(0).randint(0, len(points), size=(200, 2))].sum(axis=1)
        middles = ends[(ends % 2 == 0).all(axis=1)] // 2
        assert (labels[tuple(middles.T)] == label).all()


def test_tissue_is_the_same_on_every_platform(tissue: npt.NDArray[np.uint32]) -> None:
    digest = hashlib.sha256(tissue.astype("<u4").tobytes()).hexdigest()
    assert digest == "2c2d3bce69c4fa226dbbcf07831e50ba888fcee04e9485378810530de4cbf83d"


def test_tissue_differs_by_seed(tissue: npt.NDArray[np.uint32]) -> None:
    other = synthetic_tissue(SPEC.shape, n_instances=SPEC.n_instances, seed=SPEC.seed + 1)
    assert ((tissue > 0) != (other > 0)).mean() > 0.2


@settings(max_examples=50)
@given(st.data())
def test_tissue_blocks_are_cut_from_the_whole(data: st.DataObject) -> None:
    start = [data.draw(st.integers(0, side)) for side in SPEC.shape]
    stop = [
        data.draw(st.integers(a, min(a + 40, side)))
        for a, side in zip(start, SPEC.shape, strict=True)
    ]
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    assert np.array_equal(synthetic_tissue_block(SPEC, start, stop), whole_tissue()[box])


def test_tissue_larger_than_memory_is_made_block_by_block() -> None:
    spec = TissueSpec((20_000, 30_000, 40_000), n_instances=100_000_000, seed=9)
    far = synthetic_tissue_block(spec, (19_960, 29_970, 39_950), spec.shape)
    assert far.shape == (40, 30, 50)
    assert 0.2 < (far > 0).mean() < 0.9
    left = synthetic_tissue_block(spec, (19_960, 29_970, 39_950), (20_000, 30_000, 39_970))
    assert np.array_equal(far[:, :, :20], left)


@pytest.mark.parametrize("neurites", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 40, 3), (16, 16, 16)])
def test_tissue_of_small_volumes(shape: tuple[int, int, int], neurites: float) -> None:
    labels = synthetic_tissue(shape, n_instances=3, seed=0, neurites=neurites)
    assert labels.shape == shape


@pytest.mark.parametrize(
    ("given_settings", "argument"),
    [
        ({"shape": (8, 8)}, "shape"),
        ({"shape": (8, 0, 8)}, "shape"),
        ({"n_instances": 0}, "n_instances"),
        ({"n_instances": 10**12}, "n_instances"),
        ({"density": 1.5}, "density"),
        ({"neurites": -0.1}, "neurites"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(
    given_settings: dict[str, Any], argument: str
) -> None:
    good: dict[str, Any] = {"shape": (3000, 3000, 3000), "n_instances": 5}
    with pytest.raises(InvalidArgument) as caught:
        TissueSpec(**{**good, **given_settings})
    assert caught.value.argument == argument


def test_a_block_outside_the_volume_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="start, stop"):
        synthetic_tissue_block(SPEC, (0, 0, 0), (97, 10, 10))


# ---------------------------------------------------------------- same_partition


@given(label_volumes(max_side=6))
def test_renumbered_labels_are_the_same_partition(labels: npt.NDArray[Any]) -> None:
    ids, dense = np.unique(labels, return_inverse=True)
    new = np.where(ids == 0, 0, 1000 - np.arange(len(ids)))
    assert same_partition(labels, new[dense].reshape(labels.shape))


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ([[1, 2]], [[1, 1]], "object 1 of the second holds parts of 2 objects of the first"),
        ([[3, 3]], [[8, 9]], "object 3 of the first holds parts of 2 objects of the second"),
        ([[1, 0]], [[1, 1]], r"foreground differs in 1 voxels, first at \(0, 1\): 0 against 1"),
        ([[1, 0]], [[1], [0]], r"shapes differ: \(1, 2\) against \(2, 1\)"),
    ],
)
def test_a_different_partition_is_explained(a: list[Any], b: list[Any], words: str) -> None:
    check = same_partition(a, b)
    assert not check
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(repr(check))


def test_empty_arrays_are_the_same_partition() -> None:
    assert same_partition(np.zeros((0, 3, 3), int), np.zeros((0, 3, 3), int))


# ---------------------------------------------------------------- strategies


@given(label_volumes())
def test_label_volumes_are_labels(labels: npt.NDArray[Any]) -> None:
    assert labels.ndim == 3
    assert labels.dtype.kind in "iu"
    assert min(labels.shape) >= 1
    assert max(labels.shape) <= 12
    assert (labels >= 0).all()


@pytest.mark.parametrize(
    "corner",
    [
        lambda x: x.dtype == np.uint64 and bool((x > 2**63).any()),
        lambda x: not x.any() and x.size > 1,
        lambda x: x.size == 1 and bool(x.all()),
        lambda x: len(np.unique(x)) >= 4,
    ],
    ids=["huge ids", "background only", "one voxel", "several objects"],
)
def test_label_volumes_reach_the_corners(corner: Callable[[npt.NDArray[Any]], bool]) -> None:
    find(label_volumes(), corner, settings=MANY)


@given(st.data(), st.tuples(*[st.integers(1, 9)] * 3))
def test_block_shapes_are_lengths(data: st.DataObject, shape: tuple[int, int, int]) -> None:
    blocks = data.draw(block_shapes(shape))
    assert len(blocks) == 3
    assert min(blocks) >= 1
    assert all(isinstance(side, int) for side in blocks)


@pytest.mark.parametrize("corner", [(1, 1, 1), (5, 6, 7), (6, 7, 8), (2, 3, 4)], ids=str)
def test_block_shapes_reach_the_corners(corner: tuple[int, ...]) -> None:
    find(block_shapes((5, 6, 7)), lambda blocks: blocks == corner, settings=MANY)


@given(st.data(), st.tuples(*[st.integers(1, 7)] * 3))
def test_flow_fields_are_flows(data: st.DataObject, shape: tuple[int, int, int]) -> None:
    flow = data.draw(flow_fields(shape))
    assert flow.shape == (3, *shape)
    assert flow.dtype == np.float32
    assert np.isfinite(flow).all()


@given(segment_parameters())
def test_segment_parameters_make_sense(parameters: dict[str, Any]) -> None:
    assert set(parameters) == {"n_steps", "step_size", "convergence_radius", "min_size"}
    assert parameters["n_steps"] >= 0
    assert parameters["step_size"] > 0
    assert parameters["convergence_radius"] > 0


def test_strategies_without_hypothesis_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis.strategies", None)
    with pytest.raises(BackendUnavailable, match=r"topo_dask\[dev\]"):
        label_volumes()
