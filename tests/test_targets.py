"""Training targets: what the original package makes, the same for any chunks, checked input."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage

import topo_dask
from topo_dask import cli
from topo_dask.errors import (
    InvalidArgument,
    InvalidData,
    InvalidType,
    OutputExists,
    TaskFailed,
)
from topo_dask.run import targets as run_targets
from topo_dask.storage import create_array
from topo_dask.testing import block_shapes, label_volumes

DATA = Path(__file__).parent / "data"
FLOW_TOLERANCE = 1e-4


def case(name: str) -> dict[str, Any]:
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


def multiclass() -> tuple[np.ndarray, dict[str, Any], dict[str, Any]]:
    """Labels, arguments and results of the original package."""
    arrays = case("multiclass")
    arguments = {
        "class_names": arrays["class_names"].tolist(),
        "class_config": json.loads(str(arrays["flow_config"])),
    }
    return arrays["instance_ids"], arguments, arrays


# ── results of the original package ──────────────────────────────────────────────────────────


@pytest.mark.parametrize("chunks", [None, (2, 36, 20, 44), (1, 19, 40, 30)])
def test_targets_of_the_case(chunks: tuple[int, ...] | None) -> None:
    labels, arguments, expected = multiclass()
    given_labels = labels if chunks is None else da.from_array(labels, chunks=chunks)
    flows, class_fg = topo_dask.compute_flow_targets(given_labels, **arguments)
    if chunks is not None:
        assert isinstance(flows, da.Array)
        assert isinstance(class_fg, da.Array)
        flows, class_fg = da.compute(flows, class_fg, scheduler="sync")
    assert flows.dtype == class_fg.dtype == np.float32
    assert_allclose(flows, expected["flows"], rtol=0, atol=FLOW_TOLERANCE)
    assert_array_equal(class_fg, expected["class_fg"])


@pytest.mark.parametrize("chunks", [None, (17, 48, 31), (5, 16, 56)])
def test_boundary_map_of_the_case(chunks: tuple[int, ...] | None) -> None:
    arrays = case("tubes")
    labels = arrays["instances"] if chunks is None else da.from_array(arrays["instances"], chunks)
    made = np.asarray(topo_dask.compute_boundary_map(labels, dilation_width=2))
    assert made.dtype == np.float32
    assert_array_equal(made, arrays["boundary_map_w2"])


# ── definitions, slowly ──────────────────────────────────────────────────────────────────────


def slow_boundary_map(labels: np.ndarray, width: int) -> np.ndarray:
    """Voxel by voxel."""
    edge = np.zeros(labels.shape, dtype=bool)
    for at in np.ndindex(labels.shape):
        for axis in range(3):
            for step in (-1, 1):
                there = list(at)
                there[axis] += step
                if 0 <= there[axis] < labels.shape[axis]:
                    a, b = labels[at], labels[tuple(there)]
                    edge[at] |= a != b and a > 0 and b > 0
    if width > 1:
        edge = ndimage.binary_dilation(edge, np.ones((3, 3, 3)), iterations=width - 1)
    return edge.astype(np.float32)


def slow_foreground(labels: np.ndarray, mask: np.ndarray | None, reach: float | None) -> np.ndarray:
    """All distances to all annotated background voxels."""
    inside = labels > 0
    if reach is None:
        return inside.astype(np.float32)
    background = ~inside if mask is None else ~inside & (mask > 0.5)
    near = np.zeros(labels.shape, dtype=np.float32)
    others = np.argwhere(background)
    for at in np.argwhere(inside):
        near[tuple(at)] = bool((((others - at) ** 2).sum(axis=1) <= reach**2).any())
    return near


@st.composite
def masks(draw: st.DrawFn, shape: tuple[int, ...]) -> np.ndarray | None:
    """None; a box; anything."""
    kind = draw(st.sampled_from(["none", "box", "box", "any", "nothing"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if kind == "none":
        return None
    mask = np.zeros(shape, dtype=np.float32)
    if kind == "box":
        ends = np.sort(rng.integers(0, np.asarray(shape) + 1, size=(2, 3)), axis=0)
        mask[tuple(slice(a, b) for a, b in ends.T)] = 1
    if kind == "any":
        mask[rng.random(shape) < draw(st.sampled_from([0.1, 0.5, 0.9]))] = 1
    return mask


@given(data=st.data())
@settings(max_examples=60)
def test_boundary_map_is_the_same_for_any_chunks(data: st.DataObject) -> None:
    labels = data.draw(label_volumes(max_side=9))
    width = data.draw(st.sampled_from([0, 1, 2, 3, 5]))
    whole = topo_dask.compute_boundary_map(labels, width)
    assert_array_equal(whole, slow_boundary_map(labels, width))
    lazy = topo_dask.compute_boundary_map(
        da.from_array(labels, chunks=data.draw(block_shapes(labels.shape))), width
    )
    assert_array_equal(lazy.compute(scheduler="sync"), whole)


WAYS = st.fixed_dictionaries(
    {
        "flow_type": st.sampled_from(["direct", "diffusion"]),
        "potential": st.sampled_from(["coordinate", "heat"]),
        "diffusion_iters": st.sampled_from([0, 3, 40]),
        "boundary_only": st.booleans(),
        "boundary_width": st.sampled_from([0, 0.5, 1, 1.5, 2, 4, 30]),
    }
)


def larger_blocks(blocks: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """At most three an axis."""
    return tuple(max(b, -(-n // 3)) for b, n in zip(blocks, shape, strict=True))


@given(data=st.data())
@settings(max_examples=80)
def test_targets_are_the_same_for_any_chunks(data: st.DataObject) -> None:
    first = data.draw(label_volumes(max_side=10))
    shape = first.shape
    labels = np.stack([first, np.flip(first) * (first % 3 != 1)])
    mask = data.draw(masks(shape))
    config = {"a": data.draw(WAYS), "b": data.draw(WAYS)}
    arguments = {"class_names": ["a", "b"], "class_config": config, "origin": (3, 0, 40)}
    flows, class_fg = topo_dask.compute_flow_targets(labels, **arguments, spatial_mask=mask)
    for c, name in enumerate("ab"):
        how = config[name]
        if how["flow_type"] == "direct":
            expected = topo_dask.generate_direct_flows(labels[c], mask)
        else:
            expected = topo_dask.generate_diffusion_flows(
                labels[c],
                how["diffusion_iters"],
                spatial_mask=mask,
                potential=how["potential"],
                origin=(3, 0, 40),
            )
        assert_array_equal(flows[3 * c : 3 * c + 3], expected)
        reach = how["boundary_width"] if how["boundary_only"] else None
        assert_array_equal(class_fg[c], slow_foreground(labels[c], mask, reach))

    blocks = larger_blocks(data.draw(block_shapes(shape)), shape)
    lazy = da.from_array(labels, chunks=(data.draw(st.sampled_from([1, 2])), *blocks))
    lazy_mask = mask
    if mask is not None and data.draw(st.booleans()):
        lazy_mask = da.from_array(mask, chunks=data.draw(block_shapes(shape)))
    made = topo_dask.compute_flow_targets(lazy, **arguments, spatial_mask=lazy_mask)
    lazy_flows, lazy_fg = da.compute(*made, scheduler="sync")
    assert_allclose(lazy_flows, flows, rtol=0, atol=FLOW_TOLERANCE)
    assert_array_equal(lazy_fg, class_fg)
    for c, name in enumerate("ab"):
        if config[name]["flow_type"] == "direct":
            assert_array_equal(lazy_flows[3 * c : 3 * c + 3], flows[3 * c : 3 * c + 3])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("side", [1, -1])
def test_instances_that_the_annotation_cuts_at_the_border_of_a_chunk(axis: int, side: int) -> None:
    """All that is known of the cut lies in the next chunk; one instance reaches the outer face."""
    labels = np.zeros((8, 8, 12), dtype=np.int64)
    labels[0:4, 1:4, 2:9] = -(-(2**40) // 3)
    labels[4:7, 5:8, 0:8] = 2
    mask = np.zeros((8, 8, 12), dtype=bool)
    mask[tuple(slice(0, 4) if a == axis else slice(None) for a in range(3))] = True
    labels, mask = (np.flip(a, axis) if side < 0 else a for a in (labels, mask))
    whole = topo_dask.generate_direct_flows(labels, mask)
    assert (whole != topo_dask.generate_direct_flows(labels)).any()
    for chunks in ((4, 4, 4), (2, 4, 1), (8, 3, 12)):
        lazy = topo_dask.generate_direct_flows(da.from_array(labels, chunks), mask)
        assert_array_equal(lazy.compute(scheduler="sync"), whole)


def test_a_class_without_foreground_is_all_zero() -> None:
    labels = np.zeros((2, 4, 5, 6), dtype=np.uint32)
    labels[1, 1:3, 1:4, 2:5] = 7
    for stack in (labels, da.from_array(labels, chunks=(1, 2, 5, 3))):
        flows, class_fg = topo_dask.compute_flow_targets(stack, ["mito", "cell"], None, 16)
        flows, class_fg = np.asarray(flows), np.asarray(class_fg)
        assert not flows[:3].any()
        assert not class_fg[0].any()
        assert flows[3:].any()
        assert class_fg[1].sum() == 18


def test_without_annotated_background_nothing_is_near_it() -> None:
    labels = np.ones((1, 4, 4, 4), dtype=np.int8)
    config = {"cell": {"flow_type": "direct", "boundary_only": True, "boundary_width": 99}}
    for mask in (None, np.ones((4, 4, 4))):
        _, class_fg = topo_dask.compute_flow_targets(labels, ["cell"], config, spatial_mask=mask)
        assert not class_fg.any()
    labels[0, 0] = 0
    unannotated = np.ones((4, 4, 4))
    unannotated[0] = 0
    _, class_fg = topo_dask.compute_flow_targets(labels, ["cell"], config, spatial_mask=unannotated)
    assert not class_fg.any()
    _, class_fg = topo_dask.compute_flow_targets(labels, ["cell"], config)
    assert class_fg.sum() == 48


def test_a_stack_without_names_is_of_the_nine_classes() -> None:
    labels = np.zeros((9, 3, 4, 5), dtype=np.uint16)
    labels[:, 1, 1:3, 1:4] = 1
    flows, class_fg = topo_dask.compute_flow_targets(labels, resolution_nm=8)
    assert flows.shape == (27, 3, 4, 5)
    assert class_fg.sum() == 9 * 6


def test_ids_above_32_bits() -> None:
    labels, arguments, expected = multiclass()
    labels, arguments["class_names"] = labels[[0, 1], ::2], arguments["class_names"][:2]
    big = np.where(labels > 0, labels.astype(np.uint64) + np.uint64(2**63), np.uint64(0))
    big[big == 2**63 + 1] = 2**32 + 1
    mask = np.zeros(labels.shape[1:])
    mask[3:-3, 4:-4, 5:-5] = 1
    for spatial_mask in (None, mask):
        expected = topo_dask.compute_flow_targets(labels, **arguments, spatial_mask=spatial_mask)
        made = topo_dask.compute_flow_targets(big, **arguments, spatial_mask=spatial_mask)
        lazy = topo_dask.compute_flow_targets(
            da.from_array(big, chunks=(1, 9, 40, 22)), **arguments, spatial_mask=spatial_mask
        )
        for one, two, three in zip(
            expected, made, da.compute(*lazy, scheduler="sync"), strict=True
        ):
            assert_array_equal(two, one)
            assert_allclose(three, one, rtol=0, atol=FLOW_TOLERANCE)
    near = np.array([[[2**32 + 1, 1, 0, 2**32 + 1]]], dtype=np.uint64)
    assert topo_dask.compute_boundary_map(near, 1).tolist() == [[[1, 1, 0, 0]]]


# ── on disk ──────────────────────────────────────────────────────────────────────────────────

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_targets_on_disk_of_the_case(tmp_path: Path, dtype: str, zarr_format: int) -> None:
    labels, arguments, expected = multiclass()
    source = create_array(tmp_path / "labels.zarr", labels.shape, (3, 20, 20, 20), "int32")
    source[...] = labels
    made = topo_dask.flow_targets(
        tmp_path / "labels.zarr",
        tmp_path / "targets.zarr",
        **arguments,
        blocks=(20, 19, 30),
        cluster="threads",
        dtype=dtype,
        zarr_format=zarr_format,
    )
    assert made.array.dtype == made.class_fg.dtype == dtype
    tolerance = FLOW_TOLERANCE + (5e-4 if dtype == "float16" else 0)
    assert_allclose(made.array[...], expected["flows"], rtol=0, atol=tolerance)
    assert_array_equal(made.class_fg[...], expected["class_fg"])
    group = zarr.open_group(tmp_path / "targets.zarr", mode="r")
    assert set(group.array_keys()) == {"flows", "class_fg"}
    assert group.metadata.zarr_format == zarr_format
    classes = group.attrs["topo_dask"]["classes"]
    assert [c["name"] for c in classes] == arguments["class_names"]
    assert classes[3]["reach"] == 5
    assert repr(made).startswith("Targets of 4 classes of 36x40x44 voxels\n  output")
    for part in ("nuc", "direct", "mito", "at most 150 iterations", "within 5 voxels"):
        assert part in repr(made)
    assert not (tmp_path / "targets.zarr.work").exists()


@given(data=st.data())
@settings(max_examples=60)
def test_targets_on_disk_are_the_same_for_any_blocks(data: st.DataObject) -> None:
    first = data.draw(label_volumes(max_side=10))
    shape = first.shape
    labels = np.stack([first, np.flip(first) * (first % 3 != 1)])
    mask = data.draw(masks(shape))
    arguments = {
        "class_names": ["a", "b"],
        "class_config": {"a": data.draw(WAYS), "b": data.draw(WAYS)},
        "origin": data.draw(st.sampled_from([(0, 0, 0), (3, 0, 40)])),
        "spatial_mask": mask,
    }
    flows, class_fg = topo_dask.compute_flow_targets(labels, **arguments)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        made = topo_dask.flow_targets(
            labels,
            f"{folder}/targets.zarr",
            **arguments,
            blocks=larger_blocks(data.draw(block_shapes(shape)), shape),
            cluster="sync",
        )
        assert_array_equal(made.class_fg[...], class_fg)
        assert_allclose(made.array[...], flows, rtol=0, atol=FLOW_TOLERANCE)


@pytest.mark.parametrize("method", ["direct", "diffusion"])
def test_flows_on_disk_with_a_mask(tmp_path: Path, method: str) -> None:
    labels, _, _ = multiclass()
    volume = labels[0].astype(np.uint64) + np.uint64(2**33) * (labels[0] > 0)
    mask = np.zeros(volume.shape, dtype=bool)
    mask[4:-4, 5:30, 6:-6] = True
    make = {
        "direct": topo_dask.generate_direct_flows,
        "diffusion": topo_dask.generate_diffusion_flows,
    }[method]
    whole = make(volume, spatial_mask=mask)
    assert (whole != make(volume)).any()
    for number, blocks in enumerate([(9, 40, 15), (36, 7, 44)]):
        made = topo_dask.flows(
            volume,
            tmp_path / f"{number}.zarr",
            method=method,
            spatial_mask=da.from_array(mask, chunks=(10, 40, 44)),
            blocks=blocks,
            cluster="sync",
        )
        assert_allclose(made.array[...], whole, rtol=0, atol=FLOW_TOLERANCE)
        if method == "direct":
            assert_array_equal(made.array[...], whole)
    with pytest.raises(InvalidArgument, match="spatial_mask: got shape"):
        topo_dask.flows(volume, tmp_path / "other.zarr", spatial_mask=mask[1:], cluster="sync")


def test_a_run_that_broke_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, arguments, expected = multiclass()
    path = tmp_path / "targets.zarr"
    options = {**arguments, "blocks": (18, 40, 44), "cluster": "sync"}
    done: list[str] = []
    original = run_targets.mark_block

    def breaks(task: Any) -> int:
        if len(done) == 3:
            raise OSError("the disk is full")
        done.append(str(task))
        return original(task)

    monkeypatch.setattr(run_targets, "mark_block", breaks)
    with pytest.raises(TaskFailed, match=r"stage foreground, class 1, block \[18:36.*disk is full"):
        topo_dask.flow_targets(labels, path, **options)
    assert not path.exists()
    with pytest.raises(OutputExists, match="resume"):
        topo_dask.flow_targets(labels, path, **options)
    monkeypatch.undo()
    again: list[str] = []
    monkeypatch.setattr(
        run_targets, "mark_block", lambda task: again.append(str(task)) or original(task)
    )
    made = topo_dask.flow_targets(labels, path, **options, resume=True)
    assert len(again) == 5
    assert not set(again) & set(done)
    assert_allclose(made.array[...], expected["flows"], rtol=0, atol=FLOW_TOLERANCE)
    assert_array_equal(made.class_fg[...], expected["class_fg"])

    there = topo_dask.flow_targets(labels, path, **options, resume=True)
    assert "was there already" in repr(there)
    assert_array_equal(there.class_fg[...], expected["class_fg"])
    with pytest.raises(OutputExists):
        topo_dask.flow_targets(labels, path, **options)
    options["class_config"] = {**options["class_config"], "cell": {}}
    with pytest.raises(OutputExists, match="other settings"):
        topo_dask.flow_targets(labels, path, **options, resume=True)
    other = topo_dask.flow_targets(labels, path, **options, overwrite=True)
    assert_array_equal(other.class_fg[...], labels > 0)


def test_the_command(tmp_path: Path) -> None:
    labels, arguments, expected = multiclass()
    source = create_array(tmp_path / "labels.zarr", labels.shape, (1, 36, 40, 44), "int32")
    source[...] = labels
    (tmp_path / "classes.yaml").write_text(json.dumps(arguments["class_config"]))
    command = [
        *("targets", str(tmp_path / "labels.zarr"), str(tmp_path / "targets.zarr")),
        *("--class-config", str(tmp_path / "classes.yaml"), "--cluster", "sync"),
        "--no-progress",
    ]
    done = CliRunner().invoke(cli.main, [*command, "--class-names", "nuc,mito,ves,cell"])
    assert done.exit_code == 0, done.output
    assert "Targets of 4 classes of 36x40x44 voxels" in done.output
    made = zarr.open_array(tmp_path / "targets.zarr" / "class_fg", mode="r")
    assert_array_equal(made[...], expected["class_fg"])
    done = CliRunner().invoke(cli.main, [*command, "--class-names", "nuc,mito", "--overwrite"])
    assert done.exit_code == 1
    assert "Error: class_names: got 2 names (nuc, mito) for 4 classes" in done.output


# ── bad input ────────────────────────────────────────────────────────────────────────────────

STACK = np.zeros((2, 3, 4, 5), dtype=np.int32)
NAMES = ["nuc", "mito"]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "part"),
    [
        ({"instance_ids": STACK[0]}, InvalidArgument, "instance_ids: got 3 axes"),
        ({"instance_ids": STACK[None]}, InvalidArgument, "4 axes: class, z, y, x"),
        ({"instance_ids": STACK[:, :, :0]}, InvalidArgument, "instance_ids"),
        ({"instance_ids": STACK.astype("f4")}, InvalidType, "instance_ids: got dtype float32"),
        ({"class_names": ["nuc"]}, InvalidArgument, "class_names: got 1 names (nuc) for 2"),
        ({"class_names": ["nuc", "a", "b"]}, InvalidArgument, "3 names (nuc, a, b) for 2 classes"),
        ({"class_names": None}, InvalidArgument, "class_names: got the default names"),
        ({"class_names": ["nuc", "mitto"]}, InvalidArgument, "known classes: nuc, ves"),
        ({"class_config": {"nuc": {}}, "resolution_nm": None}, InvalidArgument, "'mito'"),
        ({"class_config": {"mito": {"flow_type": "x"}}}, InvalidArgument, "diffusion, direct"),
        ({"class_config": {"mito": {"itters": 4}}}, InvalidArgument, "'itters' of class 'mito'"),
        ({"class_config": {"mito": {"potential": "x"}}}, InvalidArgument, "of class 'mito'"),
        ({"resolution_nm": None}, InvalidArgument, "resolution_nm"),
        ({"resolution_nm": -8}, InvalidArgument, "resolution_nm"),
        ({"diffusion_iters": -1}, InvalidArgument, "diffusion_iters: got -1"),
        ({"adaptive_factor": 0}, InvalidArgument, "adaptive_factor"),
        ({"tolerance": 1}, InvalidArgument, "tolerance"),
        ({"spatial_mask": np.ones((3, 4, 6))}, InvalidArgument, "spatial_mask: got shape (3, 4, 6"),
        ({"spatial_mask": np.ones((2, 3, 4, 5))}, InvalidArgument, "spatial_mask: got 4 axes"),
    ],
)  # fmt: skip
def test_bad_input(lazy: bool, change: dict[str, Any], error: type[Exception], part: str) -> None:
    arguments = {"instance_ids": STACK, "class_names": NAMES, "resolution_nm": 8, **change}
    if lazy:
        arguments["instance_ids"] = da.from_array(arguments["instance_ids"])
    with pytest.raises(error, match=re.escape(part)):
        topo_dask.compute_flow_targets(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "part"),
    [
        ({"labels": STACK[0]}, InvalidArgument, "labels: got 3 axes"),
        ({"labels": STACK.astype("f4")}, InvalidType, "labels: got dtype float32"),
        ({"class_names": ["nuc"]}, InvalidArgument, "1 names (nuc) for 2 classes"),
        ({"class_names": ["nuc", "mitto"]}, InvalidArgument, "known classes: nuc, ves"),
        ({"class_config": {"mito": {"itters": 4}}}, InvalidArgument, "'itters' of class 'mito'"),
        ({"spatial_mask": np.ones((3, 4, 6))}, InvalidArgument, "spatial_mask: got shape (3, 4, 6"),
        ({"diffusion_iters": 2.5}, InvalidArgument, "diffusion_iters"),
        ({"dtype": "float64"}, InvalidArgument, "dtype: got 'float64'"),
        ({"origin": (-1, 0, 0)}, InvalidArgument, "origin"),
        ({"labels": STACK - 1}, InvalidData, "negative label -1"),
    ],
)
def test_bad_input_of_runs(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], part: str
) -> None:
    arguments = {"labels": STACK, "class_names": NAMES, "resolution_nm": 8, **change}
    with pytest.raises(error, match=re.escape(part)):
        topo_dask.flow_targets(output=tmp_path / "targets.zarr", cluster="sync", **arguments)
    assert not (tmp_path / "targets.zarr").exists()
    if error is not InvalidData:  # which is found only on the way
        assert not any(tmp_path.iterdir())


def test_negative_labels() -> None:
    for labels in (STACK - 1, da.from_array(STACK - 1)):
        with pytest.raises(InvalidData, match="negative label -1"):
            np.asarray(topo_dask.compute_flow_targets(labels, NAMES, None, 8)[0])
        with pytest.raises(InvalidData, match="negative label -1"):
            np.asarray(topo_dask.compute_boundary_map(labels[0]))


@pytest.mark.parametrize(
    ("labels", "width", "error", "part"),
    [
        (STACK, 2, InvalidArgument, "instance_mask: got 4 axes"),
        (STACK[0], -1, InvalidArgument, "dilation_width: got -1"),
        (STACK[0], 1.5, InvalidArgument, "dilation_width: got 1.5"),
        (STACK[0], "2", InvalidType, "dilation_width: got '2'"),
        (STACK[0].astype(float), 2, InvalidType, "instance_mask: got dtype float64"),
    ],
)
def test_bad_input_of_boundary_maps(
    labels: np.ndarray, width: Any, error: type[Exception], part: str
) -> None:
    with pytest.raises(error, match=re.escape(part)):
        topo_dask.compute_boundary_map(labels, width)


def test_direct_flows_on_disk_do_not_depend_on_the_origin(tmp_path: Path) -> None:
    """Where a centre is half-way between two voxels, too: the first of an even index is nearest."""
    labels = np.ones((2, 1, 1), np.uint8)
    flow = topo_dask.generate_direct_flows(labels)
    for odd in (0, 3):
        path = tmp_path / f"{odd}.zarr"
        made = topo_dask.flows(labels, path, method="direct", origin=(odd, 0, 0), cluster="sync")
        assert_array_equal(made.array[...], flow)
