"""Instances of several classes: the reference case, bad input, one answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

import topo_dask
from topo_dask.errors import InvalidArgument, InvalidData, InvalidType
from topo_dask.testing import block_shapes, flow_fields, label_volumes, segment_parameters

DATA = Path(__file__).parent / "data"
KINDS = pytest.mark.parametrize("kind", ["numpy", "one chunk", "chunks"])


def case(name: str) -> dict[str, Any]:
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


def wrap(array: np.ndarray, kind: str) -> Any:
    """The array itself, or dask with one chunk, or with chunks that divide nothing evenly."""
    if kind == "numpy":
        return array
    chunks = [n if kind == "one chunk" else -(-n // 2) + 1 for n in array.shape]
    return da.from_array(array, chunks=tuple(chunks))


def unwrap(array: Any, kind: str) -> np.ndarray:
    assert isinstance(array, np.ndarray if kind == "numpy" else da.Array)
    values: np.ndarray = array if kind == "numpy" else array.compute(scheduler="sync")
    assert values.dtype == array.dtype
    return values


@KINDS
def test_several_classes_of_the_case(kind: str) -> None:
    arrays = case("multiclass")
    names = arrays["class_names"].tolist()
    how = json.loads(str(arrays["postprocess_config"]))
    found = topo_dask.run_instance_segmentation(
        wrap((arrays["instance_ids"] > 0).astype(np.float32), kind),
        wrap(arrays["flows"], kind),
        names,
        how,
    )
    checked = topo_dask.run_instance_segmentation(
        wrap((arrays["instance_ids"] > 0).astype(np.float32), kind),
        wrap(arrays["flows"], kind),
        names,
        how,
        flow_error_threshold=0.2,
    )
    assert list(found) == list(checked) == names
    for name in names:
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
    with pytest.raises(InvalidArgument, match="semantic_pred: got 3 axes"):
        run(semantic[0], flow, names, resolution_nm=8)


# ── one answer ───────────────────────────────────────────────────────────────────────────────


def fewer(blocks: tuple[int, ...], shape: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The same block shape, with longer sides where it would cut the volume too small."""
    sides = list(blocks)
    while np.prod(counts := [-(-n // b) for n, b in zip(shape, sides, strict=True)]) > most:
        sides[int(np.argmax(counts))] += 1
    return tuple(sides)


@pytest.mark.nightly
@settings(max_examples=settings.default.max_examples // 8)
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
    run = topo_dask.run_instance_segmentation
    whole = run(semantic, flows, list(how), how, threshold)
    chunks = fewer(data.draw(block_shapes(shape)), shape, 4)
    other = fewer(data.draw(block_shapes(shape)), shape, 4)
    lazy = run(
        da.from_array(semantic, chunks=(1, *chunks)),
        da.from_array(flows, chunks=(4, *other)),
        list(how),
        how,
        threshold,
    )
    for name in how:
        assert_array_equal(lazy[name].compute(scheduler="sync"), whole[name], strict=True)
