"""Thin objects: orphans take the nearest label, in memory, lazily and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from cases import fewer
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy import ndimage

import topo_dask
from topo_dask.graph.nearest import Wanted
from topo_dask.graph.orphans import (
    _any,
    _look_around,
    _reaches,
    _runs_within,
    orphans_of,
    recover_orphans,
)
from topo_dask.grid import BlockGrid, Region
from topo_dask.kernels import cpu, reference
from topo_dask.testing import block_shapes, label_volumes

DATA = Path(__file__).parent / "data"
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


def tubes() -> tuple[dict[str, Any], dict[str, Any]]:
    """The case of tubes and the settings that its results were made with."""
    with np.load(DATA / "tubes.npz") as stored:
        arrays = dict(stored)
    names = ("n_steps", "step_size", "convergence_radius", "min_size")
    return arrays, {name: arrays[name].item() for name in names} | {"group": 3}


def assert_nearest(labels: np.ndarray, before: np.ndarray, mask: np.ndarray) -> None:
    """Labels are those before, and each orphan has a label that no other is nearer than."""
    assert_array_equal(labels[before > 0], before[before > 0])
    assert not labels[~mask].any()
    squared = ndimage.distance_transform_edt(before == 0) ** 2
    for label in np.unique(before[before > 0]).tolist():
        mine = mask & (before == 0) & (labels == label)
        own = ndimage.distance_transform_edt(before != label) ** 2
        assert_array_equal(np.rint(own[mine]), np.rint(squared[mine]))
    assert (labels[mask] > 0).all()


def test_group_3_of_the_cases_up_to_ties(tmp_path: Path) -> None:
    arrays, how = tubes()
    mask = arrays["instances"] > 0
    whole = topo_dask.postprocess_single(mask, arrays["noisy_flow"], **how)
    assert (arrays["group1"] != arrays["group3"]).any()
    assert_nearest(whole, arrays["group1"], mask)
    assert_nearest(arrays["group3"], arrays["group1"], mask)
    assert np.mean(whole[mask] != arrays["group3"][mask]) < 1e-3  # ties
    made = topo_dask.segment(
        arrays["noisy_flow"],
        tmp_path / "labels.zarr",
        foreground=mask,
        blocks=(20, 48, 30),
        cluster="sync",
        **how,
    )
    assert_array_equal(made.array[...], whole)


@pytest.mark.nightly
@settings(max_examples=settings.default.max_examples // 5)
@given(data=st.data())
def test_orphans_are_one_answer(data: st.DataObject) -> None:
    labels = data.draw(label_volumes(max_side=9))
    shape = labels.shape
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    mask = (labels > 0) | (rng.random(shape) < 0.3)
    expected = reference.recover_orphans(mask, labels)
    assert_array_equal(recover_orphans(mask, labels), expected, strict=True)
    chunks = fewer(data.draw(block_shapes(shape)), shape, 8)
    other = fewer(data.draw(block_shapes(shape)), shape, 8)
    lazy = recover_orphans(da.from_array(mask, chunks=other), da.from_array(labels, chunks=chunks))
    assert_array_equal(lazy.compute(scheduler="sync"), expected, strict=True)


@settings(max_examples=40)
@given(data=st.data())
def test_orphans_far_from_labels_are_one_answer_lazily(data: st.DataObject) -> None:
    """Chunks of a voxel or two, most of them without a label: the search goes beyond the next."""
    shape = data.draw(
        st.permutations([1, data.draw(st.integers(1, 4)), data.draw(st.integers(9, 14))])
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    share = data.draw(st.sampled_from([0.0, 0.02, 0.1]))
    labels = rng.integers(1, 5, shape) * (rng.random(shape) < share)
    mask = (labels > 0) | (rng.random(shape) < 0.4)
    lazy = recover_orphans(
        da.from_array(mask, chunks=5), da.from_array(labels, chunks=data.draw(st.integers(1, 2)))
    )
    expected = reference.recover_orphans(mask, labels)
    assert_array_equal(lazy.compute(scheduler="sync"), expected, strict=True)


def test_chunks_are_brought_together_only_where_labels_are_far() -> None:
    """Each orphan next to a label: nothing of other chunks is gathered for all at once."""
    grid = BlockGrid((1, 1, 60), (1, 1, 10))
    labels = np.zeros(grid.shape, np.int32)
    labels[0, 0, 5::10] = 7
    mask, looked, runs = np.ones(grid.shape, bool), [], []
    for core in grid:
        runs.append(cpu.label_runs(labels[core.slices], origin=core.start))
        looked.append(
            _look_around(
                orphans_of(mask[core.slices], labels[core.slices], core.start),
                [runs[-1]],
                core.grow(5, within=grid.shape),
                grid.shape,
            )
        )
    filled = [True] * len(grid)
    assert _reaches(looked, filled, grid) == []
    alone = _look_around(Wanted(np.array([[0, 0, 25]])), [], grid.region(2), grid.shape)
    filled = [True, False, False, False, False, False]
    (reach,) = _reaches([alone], filled, grid)
    assert reach == (Region((0, 0, 25), (1, 1, 26)), 25**2)
    near = [_any(_runs_within(some, core, [reach])) for some, core in zip(runs, grid, strict=True)]
    assert near == [True] * 6
    (reach,) = _reaches([alone], [False, True, *filled[2:]], grid)
    assert reach[1] == 15**2
    near = [_any(_runs_within(some, core, [reach])) for some, core in zip(runs, grid, strict=True)]
    assert near == [False, True, True, True, True, False]


def test_an_orphan_far_from_every_label_finds_it(tmp_path: Path) -> None:
    """The search goes on over empty blocks; no label is nearer than the one it finds."""
    flow = np.zeros((3, 2, 2, 90), np.float32)
    mask = np.zeros(flow.shape[1:], bool)
    mask[:, :, :4] = mask[0, 0, [40, 89]] = True
    how = {"n_steps": 0, "convergence_radius": 4.0, "min_size": 5, "group": 3}
    options = {"foreground": mask, "blocks": 3, "cluster": "sync"}
    made = topo_dask.segment(flow, tmp_path / "a.zarr", **options, **how).array[...]
    assert_array_equal(made, mask)
    none = topo_dask.segment(flow, tmp_path / "b.zarr", **options, **{**how, "min_size": 99})
    assert not none.array[...].any()
