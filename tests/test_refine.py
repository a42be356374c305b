"""Segmentation on disk beyond clusters: groups, checks, holes, the table; one answer for all."""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy import ndimage

import topo_dask
from topo_dask.errors import InvalidArgument
from topo_dask.kernels import reference
from topo_dask.run.measured import CSV_COLUMNS, MeasuredInstances
from topo_dask.testing import block_shapes, flow_fields, label_volumes, segment_parameters

DATA = Path(__file__).parent / "data"
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


def case(name: str) -> dict[str, Any]:
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


def tubes(**more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The case of tubes and the settings that its results were made with."""
    arrays = case("tubes")
    names = ("n_steps", "step_size", "convergence_radius", "min_size")
    return arrays, {name: arrays[name].item() for name in names} | more


@pytest.mark.parametrize("group", [1, 2])
def test_groups_and_flow_check_of_the_case_on_disk(group: int, tmp_path: Path) -> None:
    arrays, how = tubes(group=group)
    options = {"foreground": arrays["instances"] > 0, "blocks": (30, 20, 56), "cluster": "sync"}
    made = topo_dask.segment(arrays["noisy_flow"], tmp_path / "a.zarr", **options, **how)
    assert_array_equal(made.array[...], arrays[f"group{group}"])
    checked = topo_dask.segment(
        arrays["noisy_flow"], tmp_path / "b.zarr", flow_error_threshold=0.4, **options, **how
    )
    expected = reference.remove_bad_flow_masks(
        arrays[f"group{group}"], arrays["noisy_flow"], threshold=0.4
    )
    if group == 1:
        assert_array_equal(expected, arrays["bad_removed_of_group1_t04"])
    assert_array_equal(checked.array[...], expected)
    assert 0 < len(checked.instances) < len(made.instances)


# ── the table of instances ───────────────────────────────────────────────────────────────────


def columns_of(table: MeasuredInstances) -> dict[str, np.ndarray]:
    return table.columns()


def assert_table_of(
    table: MeasuredInstances, labels: np.ndarray, flow: np.ndarray, ends: dict[int, np.ndarray]
) -> None:
    """The table says what the labels say, counted one by one."""
    ids = np.unique(labels[labels > 0])
    assert_array_equal(table.ids, ids)
    for row, label in enumerate(ids.tolist()):
        voxels = np.argwhere(labels == label)
        assert table.voxels[row] == len(voxels)
        assert_array_equal(table.lo[row], voxels.min(axis=0))
        assert_array_equal(table.hi[row], voxels.max(axis=0) + 1)
        np.testing.assert_allclose(table.centroid[row], voxels.mean(axis=0), rtol=1e-12)
        faces = [f(labels == label) for f in FACES]
        assert_array_equal(table.border[row], faces)
        np.testing.assert_allclose(table.convergence[row], ends[label], atol=1e-6)
    direct = topo_dask.generate_direct_flows(labels).astype(np.float64)
    squares = ((direct - flow) ** 2).mean(axis=0)
    means = ndimage.mean(squares, labels, ids) if len(ids) else np.zeros(0)
    np.testing.assert_allclose(table.flow_error, means, atol=1e-5)


FACES = [
    lambda mask, axis=axis, side=side: bool(mask.take(side, axis=axis).any())
    for axis in range(3)
    for side in (0, -1)
]


def mean_ends(
    labels: np.ndarray, mask: np.ndarray, flow: np.ndarray, n_steps: int, step_size: float
) -> dict[int, np.ndarray]:
    coords, ends = topo_dask.track_flows(mask, flow, n_steps, step_size)
    began = labels[tuple(coords.T)]
    return {n: ends[began == n].mean(axis=0) for n in np.unique(began[began > 0]).tolist()}


def test_the_table_tells_what_the_labels_are(tmp_path: Path) -> None:
    arrays, how = tubes(group=2)
    mask, flow = arrays["instances"] > 0, arrays["noisy_flow"]
    made = topo_dask.segment(
        flow, tmp_path / "labels.zarr", foreground=mask, blocks=(25, 48, 31), cluster="sync", **how
    )
    labels = made.array[...]
    table = made.instances
    ends = mean_ends(labels, mask, flow, how["n_steps"], how["step_size"])
    assert_table_of(table, labels, flow, ends)
    assert repr(table).startswith(f"{labels.max()} instances: id, voxels, z_start")
    with (made.path / "instances" / "table.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert tuple(head) == CSV_COLUMNS
    for name, column in zip(head, zip(*rows, strict=True), strict=True):
        values = np.asarray(column).astype(table.columns()[name].dtype)
        assert_array_equal(values, table.columns()[name])
    group = zarr.open_group(made.path, mode="r")
    assert sorted(group.keys()) == ["instances", "s0"]  # and no warning of strange files


def test_a_finished_run_still_has_its_table(tmp_path: Path) -> None:
    arrays, how = tubes(group=1)
    options = {"foreground": arrays["instances"] > 0, "cluster": "sync", **how}
    made = topo_dask.segment(arrays["noisy_flow"], tmp_path / "a.zarr", **options)
    again = topo_dask.segment(arrays["noisy_flow"], tmp_path / "a.zarr", resume=True, **options)
    assert again.seconds == 0
    assert_array_equal(again.instances.voxels, made.instances.voxels)


# ── holes and bad input ──────────────────────────────────────────────────────────────────────


def test_holes_are_filled_and_counted_across_blocks(tmp_path: Path) -> None:
    shape = (7, 7, 9)
    mask = np.zeros(shape, bool)
    mask[1:6, 1:6, 1:8] = True
    mask[2:5, 3, 2:7] = False
    flow = topo_dask.generate_direct_flows(mask.astype(np.uint8))
    options = {"foreground": mask, "min_size": 1, "cluster": "sync", "blocks": (4, 3, 5)}
    open_ = topo_dask.segment(flow, tmp_path / "open.zarr", **options)
    full = topo_dask.segment(flow, tmp_path / "full.zarr", fill_holes=True, **options)
    assert_array_equal(full.array[...], topo_dask.fill_holes(open_.array[...]))
    assert open_.instances.voxels.tolist() == [5 * 5 * 7 - 15]
    assert full.instances.voxels.tolist() == [5 * 5 * 7]
    assert_array_equal(full.instances.centroid, [[3, 3, 4]])
    assert_array_equal(full.instances.flow_error, open_.instances.flow_error)
    assert full.details["holes"] == "15 voxels filled"


def test_dropped_instances_leave_no_walls(tmp_path: Path) -> None:
    """A hole of what the check drops is no hole; what it divided may become one."""
    mask = np.zeros((5, 5, 12), bool)
    mask[:, :, 1:6] = True
    mask[2, 2, 3] = False
    mask[1:4, 1:4, 8:11] = True
    mask[2, 2, 9] = False
    labels = ndimage.label(mask)[0]
    flow = topo_dask.generate_direct_flows(labels)
    flow[:, labels == 1] *= -1
    made = topo_dask.segment(
        flow,
        tmp_path / "labels.zarr",
        foreground=mask,
        n_steps=0,
        convergence_radius=1.5,
        min_size=1,
        blocks=2,
        cluster="sync",
        flow_error_threshold=0.6,
        fill_holes=True,
    )
    assert_array_equal(made.array[...] > 0, topo_dask.fill_holes((labels == 2).astype(int)) > 0)
    assert made.array[2, 2, 9] == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"flow_error_threshold": -1}, "flow_error_threshold: got -1"),
        ({"flow_error_threshold": np.nan}, "flow_error_threshold: got nan"),
        ({"group": 4}, "group: got 4; allowed: one of: 1, 2, 3"),
    ],
)
def test_bad_settings_are_refused(bad: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=message):
        topo_dask.segment(np.zeros((3, 2, 2, 2), "f4"), tmp_path / "a.zarr", **bad)
    assert not list(tmp_path.iterdir())


# ── one answer ───────────────────────────────────────────────────────────────────────────────


def oracle(mask: np.ndarray, flow: np.ndarray, how: dict[str, Any]) -> np.ndarray:
    """The whole chain, word for word as defined, on the whole volume."""
    clusters = {
        name: how[name] for name in ("n_steps", "step_size", "convergence_radius", "min_size")
    }
    make = reference.segment_group2 if how["group"] == 2 else reference.segment_group1
    labels = make(mask, flow, **clusters)
    if how["group"] == 3 and labels.any():
        labels = reference.recover_orphans(mask, labels)
    if how["flow_error_threshold"] > 0:
        labels = reference.remove_bad_flow_masks(
            labels, flow, threshold=how["flow_error_threshold"]
        )
    return reference.fill_holes(labels) if how["fill_holes"] else labels


def fewer(blocks: tuple[int, ...], shape: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The same block shape, with longer sides where it would cut the volume too small."""
    sides = list(blocks)
    while np.prod(counts := [-(-n // b) for n, b in zip(shape, sides, strict=True)]) > most:
        sides[int(np.argmax(counts))] += 1
    return tuple(sides)


def same_tables(one: MeasuredInstances, other: MeasuredInstances) -> None:
    for name, column in one.columns().items():
        assert_array_equal(column, other.columns()[name], err_msg=name)


@pytest.mark.nightly
@settings(max_examples=settings.default.max_examples // 6)
@given(data=st.data())
def test_whole_chains_are_one_answer(data: st.DataObject) -> None:
    """Labels and tables in blocks are those of one block, and those of the oracle."""
    labels = data.draw(label_volumes(max_side=9))
    mask, shape = labels > 0, labels.shape
    flow = data.draw(flow_fields(shape))
    how = data.draw(segment_parameters()) | {
        "group": data.draw(st.sampled_from([1, 2, 3])),
        "flow_error_threshold": data.draw(st.sampled_from([0.0, 0.0, 0.35, 0.9])),
        "fill_holes": data.draw(st.booleans()),
    }
    if data.draw(st.booleans()):
        how["min_size"] = data.draw(st.integers(0, 6))
    blocks = fewer(data.draw(block_shapes(shape)), shape, 8)
    cluster = data.draw(st.sampled_from(["sync", "sync", "threads"]))
    options = {"foreground": mask, "halo": data.draw(st.sampled_from([0, 3, 16]))}
    with tempfile.TemporaryDirectory(dir=MEMORY) as path:
        many = topo_dask.segment(
            flow, Path(path, "many.zarr"), blocks=blocks, cluster=cluster, **options, **how
        )
        once = topo_dask.segment(
            flow, Path(path, "once.zarr"), blocks=shape, cluster="sync", **options, **how
        )
        found, table = many.array[...], many.instances
        assert_array_equal(found, once.array[...])
        same_tables(table, once.instances)
    assert_array_equal(found, oracle(mask, flow, how))
    if not how["fill_holes"]:
        ends = mean_ends(found, mask, flow, how["n_steps"], how["step_size"])
        assert_table_of(table, found, flow, ends)
    else:
        assert_array_equal(np.bincount(found.ravel(), minlength=1)[1:], table.voxels)


@pytest.mark.nightly
@settings(max_examples=settings.default.max_examples // 12)
@given(data=st.data())
def test_chains_in_blocks_of_one_voxel_are_one_answer(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(1, 1, 8), (1, 2, 4), (4, 1, 2), (2, 2, 2), (1, 7, 1)]))
    mask = np.ones(shape, bool)
    flow = data.draw(flow_fields(shape))
    how = data.draw(segment_parameters()) | {
        "min_size": data.draw(st.integers(0, 4)),
        "group": data.draw(st.sampled_from([1, 2, 3])),
        "flow_error_threshold": data.draw(st.sampled_from([0.0, 0.35])),
        "fill_holes": data.draw(st.booleans()),
    }
    with tempfile.TemporaryDirectory(dir=MEMORY) as path:
        made = topo_dask.segment(
            flow, Path(path, "a.zarr"), foreground=mask, blocks=1, cluster="sync", **how
        )
        assert_array_equal(made.array[...], oracle(mask, flow, how))
