"""Tables of instances: as a file, as an input of runs, of many instances, of any ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

import topo_dask
from topo_dask.errors import InputNotFound, InvalidArgument, InvalidData, InvalidType, OutputExists
from topo_dask.kernels.tables import InstanceTable, merge_instances
from topo_dask.run import instances as module
from topo_dask.storage import create_array, load_table, save_table
from topo_dask.testing import block_shapes, label_volumes, synthetic_tissue

COLUMNS = ("ids", "voxels", "sums", "lo", "hi")
HUGE = np.array([1, 2**31, 2**32 + 1, 2**63, 2**63 + 1, 2**64 - 1], dtype=np.uint64)


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    return synthetic_tissue((20, 24, 28), n_instances=40, seed=8)


@pytest.fixture
def labels(tmp_path: Path, tissue: np.ndarray) -> Path:
    return store(tmp_path / "labels.zarr", tissue)


def store(path: Path, values: np.ndarray) -> Path:
    create_array(path, values.shape, (16, 16, 16), values.dtype)[...] = values
    return path


def assert_same(table: InstanceTable, expected: InstanceTable) -> None:
    for name in COLUMNS:
        column = getattr(table, name)
        assert_array_equal(column, getattr(expected, name), strict=True)


# -------------------------------------------------------------------------------- one answer


@settings(max_examples=40)
@given(data=st.data())
def test_the_table_is_that_of_the_whole_volume(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    labels = data.draw(label_volumes(max_side=8))
    blocks = data.draw(block_shapes(labels.shape))
    blocks = tuple(max(b, -(-n // 5)) for b, n in zip(blocks, labels.shape, strict=True))
    whole = topo_dask.instance_table(labels)
    folder = tmp_path_factory.mktemp("table")
    path = store(folder / "labels.zarr", labels)
    made = topo_dask.instance_table(path, folder / "t.npz", blocks=blocks, cluster="sync")
    assert_same(made, whole)
    assert_same(topo_dask.read_instance_table(folder / "t.npz"), whole)
    lazy = topo_dask.instance_table(da.from_array(labels, chunks=blocks))
    assert_same(lazy.compute(scheduler="sync"), whole)


def test_tables_are_summed_as_a_tree(
    labels: Path, tissue: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FAN_IN", 3)
    out = tmp_path / "t.npz"
    made = topo_dask.instance_table(labels, out, blocks=(8, 8, 8), cluster="sync")
    assert_same(made, topo_dask.instance_table(tissue))


def test_ids_beyond_int64_stay_apart(tmp_path: Path) -> None:
    """No id is rounded, and none wraps around: in tables, flows, and flows with a table."""
    volume = np.zeros((4, 6, 60), dtype=np.uint64)
    for number, name in enumerate(HUGE):
        volume[1:3, 1:5, 10 * number : 10 * number + 10] = name
    path = store(tmp_path / "labels.zarr", volume)
    table = topo_dask.instance_table(path, tmp_path / "t.npz", blocks=(4, 4, 7), cluster="sync")
    assert_array_equal(table.ids, HUGE)
    assert_array_equal(table.lo[:, 2], 10 * np.arange(6))
    whole = topo_dask.generate_diffusion_flows(volume, n_iter=20)
    options: dict[str, Any] = {"n_iter": 20, "blocks": (4, 4, 7), "cluster": "sync"}
    for number, how in enumerate(({"context": 20}, {"rounds": 6})):
        made = topo_dask.flows(
            path, tmp_path / f"{number}.zarr", instances=tmp_path / "t.npz", **how, **options
        )
        assert_array_equal(made.array[...], whole)


def test_ids_beyond_int64_are_foreground_and_compared(tmp_path: Path) -> None:
    """Labels of any ids as foreground of a segmentation, and as truth of its comparison."""
    volume = np.zeros((4, 6, 60), dtype=np.uint64)
    for number, name in enumerate(HUGE):
        volume[1:3, 1:5, 10 * number + 1 : 10 * number + 9] = name
    flow = topo_dask.generate_direct_flows(volume)
    options: dict[str, Any] = {"min_size": 1, "blocks": (4, 4, 7), "cluster": "sync"}
    made = topo_dask.segment(flow, tmp_path / "a.zarr", foreground=volume, **options)
    assert_array_equal(made.array[...] > 0, volume > 0)
    found = topo_dask.compare(volume, made.array, blocks=(4, 4, 7), cluster="sync")
    assert (found.vi, found.adapted_rand_error) == (0, 0)


def test_faces_are_those_that_instances_touch(tissue: np.ndarray) -> None:
    table = topo_dask.instance_table(tissue)
    touched = np.zeros((len(table), 6), dtype=bool)
    for axis in range(3):
        for side, plane in enumerate((0, -1)):
            there = np.unique(np.take(tissue, plane, axis=axis))
            touched[:, 2 * axis + side] = np.isin(table.ids, there)
    assert touched.any(axis=0).all()
    assert not touched.all(axis=0).any()
    assert_array_equal(table.faces(tissue.shape), touched)


def test_merging_holds_one_block_of_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    labels = [rng.integers(0, 50, (4, 4, 4)) for _ in range(5)]
    tables = [topo_dask.instance_table(part) for part in labels]
    whole = merge_instances(tables)
    monkeypatch.setattr("topo_dask.kernels.tables.ROWS", 7)
    assert_same(merge_instances(tables), whole)
    assert whole.voxels.sum() == sum(np.count_nonzero(part) for part in labels)


# ---------------------------------------------------------------------------------- as input


def test_flows_with_a_table_skip_the_pass(
    labels: Path, tissue: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = topo_dask.instance_table(labels, tmp_path / "t.npz", cluster="sync")
    options: dict[str, Any] = {"n_iter": 15, "blocks": 12, "cluster": "sync"}
    expected = topo_dask.flows(labels, tmp_path / "a.zarr", **options).array[...]
    for number, given_as in enumerate((tmp_path / "t.npz", str(tmp_path / "t.npz"), table)):
        out = tmp_path / f"{number}.zarr"
        made = topo_dask.flows(labels, out, instances=given_as, progress=True, **options)
        assert_array_equal(made.array[...], expected)
        assert made.details["instances"] == len(table)
        shown = capsys.readouterr().err
        assert "flows" in shown
        assert "table" not in shown


def test_direct_flows_take_a_table(labels: Path, tissue: np.ndarray, tmp_path: Path) -> None:
    topo_dask.instance_table(labels, tmp_path / "t.npz", cluster="sync")
    options: dict[str, Any] = {"method": "direct", "instances": tmp_path / "t.npz"}
    made = topo_dask.flows(labels, tmp_path / "a.zarr", blocks=9, cluster="sync", **options)
    assert_array_equal(made.array[...], topo_dask.generate_direct_flows(tissue))
    with pytest.raises(InvalidArgument, match="instances: got a table with method='direct' and"):
        topo_dask.flows(
            labels,
            tmp_path / "b.zarr",
            spatial_mask=np.ones_like(tissue),
            cluster="sync",
            **options,
        )


def test_a_table_of_other_labels_is_refused_before_work(
    labels: Path, tissue: np.ndarray, tmp_path: Path
) -> None:
    path, out = tmp_path / "t.npz", tmp_path / "out.zarr"
    topo_dask.instance_table(labels, path, cluster="sync")
    other = store(tmp_path / "other.zarr", tissue)
    smaller = store(tmp_path / "smaller.zarr", tissue[:10])
    table = topo_dask.instance_table(tissue)
    ids = table.ids.copy()
    ids[[0, 1]] = ids[[1, 0]]
    mixed = InstanceTable(ids, table.voxels, table.sums, table.lo, table.hi)
    for source, given_as, kind, message in (
        (other, path, InvalidArgument, "labels that are not these"),
        (smaller, path, InvalidArgument, r"of a volume of shape \(20, 24, 28\)"),
        (smaller, table, InvalidArgument, "a table of a larger volume"),
        (labels, mixed, InvalidArgument, "ids that do not ascend"),
        (labels, 7, InvalidType, "instances: got an object of type int"),
        (labels, tmp_path / "none.npz", InputNotFound, "instances: got"),
        (labels, labels / "zarr.json", InvalidData, "instances: got"),
    ):
        with pytest.raises(kind, match=message):
            topo_dask.flows(source, out, instances=given_as, cluster="sync")
        assert not out.with_name("out.zarr.work").exists()


def test_a_table_of_labels_that_have_changed_is_refused(labels: Path, tmp_path: Path) -> None:
    topo_dask.instance_table(labels, tmp_path / "t.npz", cluster="sync")
    zarr.open_array(str(labels), mode="r+")[0, 0, :3] = 99
    with pytest.raises(InvalidArgument, match="have been written to"):
        topo_dask.flows(labels, tmp_path / "o.zarr", instances=tmp_path / "t.npz", cluster="sync")


def test_a_table_that_lacks_an_instance_is_refused(labels: Path, tmp_path: Path) -> None:
    table = topo_dask.instance_table(labels, tmp_path / "t.npz", cluster="sync")
    fewer = table.take(np.arange(1, len(table)))
    with pytest.raises(InvalidArgument, match=rf"a table without ids \[{table.ids[0]}\]"):
        topo_dask.flows(labels, tmp_path / "o.zarr", instances=fewer, cluster="sync")


# ----------------------------------------------------------------------------------- as output


def test_nothing_is_overwritten(labels: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    topo_dask.instance_table(labels, path, cluster="sync")
    before = path.read_bytes()
    assert set(tmp_path.iterdir()) == {labels, path}
    with pytest.raises(OutputExists):
        topo_dask.instance_table(labels, path, cluster="sync")
    topo_dask.instance_table(labels, path, resume=True, cluster="sync")
    topo_dask.instance_table(labels, path, overwrite=True, cluster="sync")
    assert path.read_bytes() == before
    other = store(tmp_path / "other.zarr", np.ones((3, 3, 3), np.uint8))
    with pytest.raises(OutputExists, match="made of other labels"):
        topo_dask.instance_table(other, path, resume=True, cluster="sync")
    assert len(topo_dask.instance_table(other, path, overwrite=True, cluster="sync")) == 1
    assert load_table(path)["shape"].tolist() == [3, 3, 3]


def test_a_file_of_others_is_never_replaced(labels: Path, tmp_path: Path) -> None:
    for name, write in (
        ("mine.npz", lambda path: save_table(path, a=[1])),
        ("mine.txt", lambda path: path.write_text("mine")),
    ):
        path = tmp_path / name
        write(path)
        before = path.read_bytes()
        with pytest.raises(OutputExists, match="neither"):
            topo_dask.instance_table(labels, path, overwrite=True, cluster="sync")
        assert path.read_bytes() == before


def test_labels_on_disk_need_an_output(labels: Path) -> None:
    with pytest.raises(InvalidArgument, match="output: got None with labels on disk"):
        topo_dask.instance_table(labels)
