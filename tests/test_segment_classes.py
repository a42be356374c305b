"""Instances of several classes: the reference case, bad input, one answer."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr
from cases import KINDS, case, fewer, unwrap, wrap
from hypothesis import given, settings
from hypothesis import strategies as st
from killing import killed_at, lines_of, tree
from numpy.testing import assert_array_equal

import topo_dask
from topo_dask.errors import InvalidArgument, InvalidData, InvalidType
from topo_dask.storage import create_array
from topo_dask.testing import block_shapes, flow_fields, label_volumes, segment_parameters

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


@KINDS
def test_several_classes_of_the_case(kind: str) -> None:
    arrays = case("multiclass")
    names = arrays["class_names"].tolist()
    how = json.loads(str(arrays["postprocess_config"]))
    inputs = (
        wrap((arrays["instance_ids"] > 0).astype(np.float32), kind),
        wrap(arrays["flows"], kind),
        names,
        how,
    )
    found = topo_dask.run_instance_segmentation(*inputs)
    checked = topo_dask.run_instance_segmentation(*inputs, flow_error_threshold=0.2)
    assert list(found) == list(checked) == names
    for name in names if kind != "chunks" else ["nuc"]:
        labels = unwrap(found[name], kind)
        assert_array_equal(labels, arrays[f"instances_{name}"], strict=True)
        labels = unwrap(checked[name], kind)
        assert_array_equal(labels, arrays[f"instances_qc02_{name}"], strict=True)


def probabilities() -> tuple[np.ndarray, np.ndarray]:
    return np.full((2, 3, 4, 5), 0.25, np.float32), np.zeros((6, 3, 4, 5), np.float32)


@pytest.mark.parametrize("value", [1.5, -0.25, np.nan, 255])
@pytest.mark.parametrize("kind", ["numpy", "chunks"])
def test_what_is_no_probability_is_named(value: float, kind: str) -> None:
    semantic, flow = probabilities()
    semantic[1, 2, 3, 4] = value
    message = rf"semantic_pred: got {value}.* at voxel \(2, 3, 4\), class 'ves', in block"
    names, stacks = ["nuc", "ves"], (wrap(semantic, kind), wrap(flow, kind))
    run = topo_dask.run_instance_segmentation
    with pytest.raises(InvalidData, match=message):
        unwrap(run(*stacks, names, resolution_nm=8)["ves"], kind)


@pytest.mark.parametrize("kind", ["numpy", "chunks"])
def test_stacks_that_do_not_fit_are_refused_before_any_work(kind: str) -> None:
    semantic, flow = (wrap(a, kind) for a in probabilities())
    run, names = topo_dask.run_instance_segmentation, ["nuc", "ves"]
    with pytest.raises(InvalidArgument, match=r"flow_pred: got 5 channels; allowed: 3 .* 6"):
        run(semantic, flow[:5], names, resolution_nm=8)
    with pytest.raises(InvalidArgument, match="class_names: got 1 names"):
        run(semantic, flow, ["nuc"], resolution_nm=8)
    with pytest.raises(InvalidArgument, match="class_names: got 'nuc' twice"):
        run(semantic, flow, ["nuc", "nuc"], resolution_nm=8)
    with pytest.raises(InvalidArgument, match="class_names: got 'glia', a class without"):
        run(semantic, flow, ["nuc", "glia"], resolution_nm=8)
    with pytest.raises(InvalidArgument, match="class_config: got the key 'radius'"):
        run(semantic, flow, names, {"nuc": {"radius": 3}, "ves": {}})
    with pytest.raises(InvalidArgument, match="resolution_nm"):
        run(semantic, flow, names)
    with pytest.raises(InvalidArgument, match="flow_pred: got shape"):
        run(semantic, flow[:, 1:], names, resolution_nm=8)
    with pytest.raises(InvalidType, match="flow_pred: got dtype int64"):
        run(semantic, flow.astype(int), names, resolution_nm=8)
    with pytest.raises(InvalidArgument, match="flow_error_threshold: got -1"):
        run(semantic, flow, names, flow_error_threshold=-1, resolution_nm=8)
    with pytest.raises(InvalidArgument, match="interpolation: got 'cubic'"):
        run(semantic, flow, names, resolution_nm=8, interpolation="cubic")
    with pytest.raises(InvalidArgument, match="scale: got 0"):
        run(semantic, flow, names, resolution_nm=8, scale=0)
    with pytest.raises(InvalidArgument, match="semantic_pred: got 3 axes"):
        run(semantic[0], flow, names, resolution_nm=8)


# ── on disk ──────────────────────────────────────────────────────────────────────────────────


def stacks() -> tuple[np.ndarray, np.ndarray, dict[str, Any], dict[str, Any]]:
    """The case: probabilities, flows, settings, and everything."""
    arrays = case("multiclass")
    names = arrays["class_names"].tolist()
    how = json.loads(str(arrays["postprocess_config"]))
    semantic = (arrays["instance_ids"] > 0).astype(np.float16) * np.float16(0.9)
    return semantic, arrays["flows"], {"class_names": names, "class_config": how}, arrays


@pytest.mark.parametrize(("threshold", "expected"), [(0.0, "instances"), (0.2, "instances_qc02")])
def test_classes_of_the_case_on_disk(threshold: float, expected: str, tmp_path: Path) -> None:
    semantic, flows, how, arrays = stacks()
    made = topo_dask.segment_classes(
        semantic,
        flows,
        tmp_path / "labels.zarr",
        blocks=(20, 40, 30),
        cluster="threads",
        flow_error_threshold=threshold,
        **how,
    )
    assert made.array.shape == semantic.shape
    assert made.array.chunks[0] == 1
    assert list(made.instances) == how["class_names"]
    for c, name in enumerate(how["class_names"]):
        labels = arrays[f"{expected}_{name}"]
        assert_array_equal(made.array[c], labels)
        assert_array_equal(made.instances[name].voxels, np.bincount(labels.ravel())[1:])
        assert made.details[name].startswith(f"{labels.max()} instances, group ")
        assert (made.path / "instances" / f"{name}.csv").read_text().count("\n") == labels.max() + 1
    group = zarr.open_group(made.path, mode="r")
    assert sorted(group.keys()) == ["instances", "labels"]
    again = topo_dask.segment_classes(
        semantic,
        flows,
        tmp_path / "labels.zarr",
        blocks=(20, 40, 30),
        cluster="sync",
        resume=True,
        flow_error_threshold=threshold,
        **how,
    )
    assert again.seconds == 0
    assert len(again.instances["nuc"]) == len(made.instances["nuc"])


def call(inputs: Path, out: Path, **options: Any) -> None:
    """The run of the next test, also in a process of its own."""
    how = {"one": {"min_size": 2}, "two": {"group": 3, "min_size": 9}, "three": {"group": 2}}
    topo_dask.segment_classes(
        inputs / "semantic.zarr",
        inputs / "flows.zarr",
        out,
        class_names=list(how),
        class_config=how,
        blocks=6,
        **{"cluster": "sync", **options},
    )


def test_a_killed_run_of_classes_goes_on(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for name, channels in (("semantic", 3), ("flows", 9)):
        array = create_array(tmp_path / f"{name}.zarr", (channels, 18, 12, 12), (1, 6, 6, 6), "f4")
        array[...] = rng.random(array.shape) - (0.5 if name == "flows" else 0)
    call(tmp_path, tmp_path / "whole.zarr")
    out = tmp_path / "out.zarr"
    killed_at("../class-1/ledger/track", 3, out, call, tmp_path, out)
    assert lines_of(out, "../class-0/ledger/facts") == 1
    call(tmp_path, out, resume=True)
    assert tree(out) == tree(tmp_path / "whole.zarr")


def test_what_is_no_probability_stops_a_run_and_nothing_is_published(tmp_path: Path) -> None:
    semantic, flow = probabilities()
    semantic[1, 2, 3, 4] = 1.5
    out, names = tmp_path / "out.zarr", ["nuc", "ves"]
    message = (
        r"probabilities: got 1\.5 at voxel \(2, 3, 4\), class 'ves', in block \[2:3, 2:4, 4:5\]"
    )
    options: dict[str, Any] = {"blocks": 2, "cluster": "sync", "resolution_nm": 8}
    with pytest.raises(InvalidData, match=message):
        topo_dask.segment_classes(semantic, flow, out, class_names=names, **options)
    assert not out.exists()


def test_the_class_of_a_flow_that_is_not_finite_is_named(tmp_path: Path) -> None:
    semantic, flow = probabilities()
    flow[4, 2, 3, 4] = np.nan
    out, how = tmp_path / "out.zarr", {"class_names": ["nuc", "ves"], "resolution_nm": 8}
    with pytest.raises(InvalidData, match=r"^flows of class 'ves': got nan at voxel \(2, 3, 4\)"):
        topo_dask.segment_classes(semantic, flow, out, blocks=2, cluster="sync", **how)
    assert not out.exists()
    with pytest.raises(InvalidData, match=r"^flow_pred of class 'ves': got nan at voxel"):
        topo_dask.run_instance_segmentation(semantic, flow, **how)


def test_stacks_that_do_not_fit_are_refused_before_a_run(tmp_path: Path) -> None:
    semantic, flow = probabilities()
    out, run = tmp_path / "out.zarr", topo_dask.segment_classes
    with pytest.raises(InvalidArgument, match="flows: got 5 channels"):
        run(semantic, flow[:5], out, class_names=["nuc", "ves"], resolution_nm=8)
    with pytest.raises(InvalidArgument, match="class_names: got 'glia', a class without"):
        run(semantic, flow, out, class_names=["nuc", "glia"], resolution_nm=8)
    with pytest.raises(InvalidArgument, match="class_names: got the default names"):
        run(semantic, flow, out, resolution_nm=8)
    with pytest.raises(InvalidArgument, match="class_names: got 'a/b'"):
        run(semantic, flow, out, class_names=["nuc", "a/b"], class_config={"a/b": {}, "nuc": {}})
    with pytest.raises(InvalidType, match=r"flows: got dtype int8.* with a scale"):
        run(semantic, flow.astype("i1"), out, class_names=["nuc", "ves"], resolution_nm=8)
    how: Any = {"resolution_nm": 8, "interpolation": "cubic"}
    with pytest.raises(InvalidArgument, match="interpolation: got 'cubic'"):
        run(semantic, flow, out, class_names=["nuc", "ves"], **how)
    with pytest.raises(InvalidType, match="probabilities: got dtype complex64"):
        run(semantic.astype("c8"), flow, out, class_names=["nuc", "ves"], resolution_nm=8)
    assert not list(tmp_path.iterdir())


# ── one answer ───────────────────────────────────────────────────────────────────────────────


@st.composite
def stored_in_other_numbers(
    draw: st.DrawFn, flows: np.ndarray
) -> tuple[np.ndarray, dict[str, Any]]:
    """Flows as a network or a small file has them, and the options that read them."""
    dtype, scale = draw(st.sampled_from([("f4", None), ("f4", 5.0), ("f2", None), ("i1", 127.0)]))
    values = flows * (scale or 1.0)
    if dtype == "i1":
        values = np.clip(np.rint(values), -127, 127)
    elif dtype == "f2":
        values = values * 0.99  # rounding makes none longer than 1
    how = {"scale": scale, "interpolation": draw(st.sampled_from(["nearest", "linear"]))}
    return values.astype(dtype), how


@pytest.mark.nightly
@settings(max_examples=settings.default.max_examples // 16)
@given(data=st.data())
def test_classes_together_are_each_alone(data: st.DataObject) -> None:
    """The labels and the table of a class are those that `segment` makes of it, in any blocks."""
    labels = data.draw(label_volumes(max_side=8))
    shape = labels.shape
    flows = np.concatenate([data.draw(flow_fields(shape)) for _ in range(2)])
    semantic = np.stack([labels > 0, labels % 2 > 0]).astype(np.float32)
    how = {
        name: data.draw(segment_parameters()) | {"group": data.draw(st.sampled_from([1, 2, 3]))}
        for name in ("one", "other")
    }
    refine = {
        "flow_error_threshold": data.draw(st.sampled_from([0.0, 0.35])),
        "fill_holes": data.draw(st.booleans()),
    }
    flows, read = data.draw(stored_in_other_numbers(flows))
    with tempfile.TemporaryDirectory(dir=MEMORY) as path:
        made = topo_dask.segment_classes(
            semantic,
            flows,
            Path(path, "all.zarr"),
            class_names=list(how),
            class_config=how,
            blocks=fewer(data.draw(block_shapes(shape)), shape, 4),
            cluster=data.draw(st.sampled_from(["sync", "threads"])),
            **refine,
            **read,
        )
        for c, (name, options) in enumerate(how.items()):
            alone = topo_dask.segment(
                flows[3 * c : 3 * c + 3],
                Path(path, f"{name}.zarr"),
                foreground=semantic[c],
                threshold=0.5,
                cluster="sync",
                **refine,
                **read,
                **options,
            )
            assert_array_equal(made.array[c], alone.array[...])
            for column, values in made.instances[name].columns().items():
                assert_array_equal(values, alone.instances.columns()[column])


@pytest.mark.nightly
@settings(max_examples=settings.default.max_examples // 16)
@given(data=st.data())
def test_lazy_chains_are_one_answer(data: st.DataObject) -> None:
    """Several classes, lazily, in any chunks: what NumPy gives."""
    labels = data.draw(label_volumes(max_side=8))
    shape = labels.shape
    flows = np.concatenate([data.draw(flow_fields(shape)) for _ in range(2)])
    length = np.sqrt((flows.reshape(2, 3, *shape).astype(np.float64) ** 2).sum(axis=1))
    flows = (flows.reshape(2, 3, *shape) / np.maximum(length, 1)[:, None]).reshape(6, *shape)
    flows = flows.astype(np.float32)
    semantic = np.stack([labels > 0, labels % 2 > 0]).astype(np.float32)
    how = {
        name: data.draw(segment_parameters()) | {"group": data.draw(st.sampled_from([1, 2, 3]))}
        for name in ("one", "other")
    }
    threshold = data.draw(st.sampled_from([0.0, 0.35]))
    flows, read = data.draw(stored_in_other_numbers(flows))
    run = topo_dask.run_instance_segmentation
    whole = run(semantic, flows, list(how), how, threshold, **read)
    for c, (name, options) in enumerate(how.items()):
        alone = topo_dask.postprocess_single(
            semantic[c] > 0.5, flows[3 * c : 3 * c + 3], **options, **read
        )
        if threshold == 0:
            assert_array_equal(whole[name], alone)
    chunks = fewer(data.draw(block_shapes(shape)), shape, 4)
    other = fewer(data.draw(block_shapes(shape)), shape, 4)
    lazy = run(
        da.from_array(semantic, chunks=(1, *chunks)),
        da.from_array(flows, chunks=(4, *other)),
        list(how),
        how,
        threshold,
        **read,
    )
    for name in how:
        assert_array_equal(lazy[name].compute(scheduler="sync"), whole[name], strict=True)
