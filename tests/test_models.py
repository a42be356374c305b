"""Models of PyTorch, ONNX and JAX over tiles: what they give for the whole image."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from numpy.testing import assert_allclose, assert_array_equal

from topo_dask import map_tiles
from topo_dask.cli import main
from topo_dask.errors import InputNotFound, InvalidArgument, InvalidType
from topo_dask.run.models import load_model, model_mark
from topo_dask.storage import create_array

IMAGE = np.random.default_rng(0).normal(size=(2, 50, 61)).astype(np.float32)
# Two convolutions of 3 see two voxels around; beyond the image they see zeros, as in all of it.
TILES: dict[str, Any] = {"tile": (16, 16), "overlap": 4, "context": 2, "beyond": "clip"}


def torch_module(seed: int = 0) -> Any:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 3, 3, padding=1)
    ).eval()


@pytest.mark.parametrize("batch", [None, 5])
def test_a_pytorch_module(batch: int | None, tmp_path: Path) -> None:
    module = torch_module()
    expected = load_model(module)(IMAGE)
    got = map_tiles(module, IMAGE, **TILES, batch=batch)
    assert_allclose(got, expected, atol=1e-5)
    out = tmp_path / "out.zarr"
    result = map_tiles(module, IMAGE, output=out, cluster="threads", **TILES, batch=batch)
    assert_array_equal(result.array[...], got)
    assert result.what.startswith("Sequential on")


def test_a_pytorch_module_is_given_its_own_kind_of_numbers_and_travels() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    whole = (IMAGE * 9).astype(np.uint8)
    double = torch_module().double()
    got = load_model(double)(whole)
    assert got.dtype == np.float64
    there = pickle.loads(cloudpickle.dumps(load_model(double)))
    assert_array_equal(there(whole), got)
    half = load_model(torch_module().to(torch.bfloat16))
    assert_allclose(half(whole), got, atol=1)


def test_pytorch_modules_of_other_weights_are_other_models() -> None:
    mark = model_mark(load_model(torch_module()))
    assert mark == model_mark(load_model(torch_module()))
    assert mark != model_mark(load_model(torch_module(seed=1)))


def test_a_pytorch_module_in_training_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"training mode.*model\.eval\(\)"):
        map_tiles(torch_module().train(), IMAGE, **TILES)


def onnx_file(path: Path, factor: float = 1.0) -> Path:
    """A convolution ``[N,2,Y,X]`` to ``[N,3,Y,X]``."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    make = onnx.helper
    weights = np.random.default_rng(1).normal(size=(3, 2, 3, 3)).astype(np.float32) * factor
    given, made = (
        make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", channels, "y", "x"])
        for name, channels in (("given", 2), ("made", 3))
    )
    node = make.make_node("Conv", ["given", "weights"], ["made"], pads=[1, 1, 1, 1])
    weights_there = onnx.numpy_helper.from_array(weights, "weights")
    graph = make.make_graph([node], "one", [given], [made], initializer=[weights_there])
    versions = [make.make_opsetid("", 13)]
    onnx.save(make.make_model(graph, opset_imports=versions, ir_version=8), str(path))
    return path


def test_an_onnx_file(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "model.onnx")
    expected = load_model(path)(IMAGE[None])[0]
    got = map_tiles(path, IMAGE, **TILES, batch=4)
    assert_allclose(got, expected, atol=1e-5)
    assert_allclose(load_model(str(path))(IMAGE[None].astype(np.float64))[0], expected)
    create_array(tmp_path / "image.zarr", IMAGE.shape, (2, 32, 32), "float32")[...] = IMAGE
    words = [str(path), str(tmp_path / "image.zarr"), str(tmp_path / "out.zarr"), "--batch", "4"]
    words += ["--tile", "16,16", "--overlap", "4", "--context", "2", "--beyond", "clip"]
    done = CliRunner().invoke(main, ["map-tiles", *words, "--cluster", "sync", "--no-progress"])
    assert done.exit_code == 0, done.output
    assert "model.onnx on" in done.output
    assert_array_equal(zarr.open_array(tmp_path / "out.zarr", mode="r")[...], got)


def test_onnx_files_are_told_apart_by_what_is_in_them(tmp_path: Path) -> None:
    mark = model_mark(load_model(onnx_file(tmp_path / "a.onnx")))
    assert mark == model_mark(load_model(onnx_file(tmp_path / "b.onnx")))
    assert mark != model_mark(load_model(onnx_file(tmp_path / "b.onnx", factor=2)))


def test_damaged_and_missing_onnx_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputNotFound, match="not there"):
        map_tiles(tmp_path / "none.onnx", IMAGE, **TILES)
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    (tmp_path / "damaged.onnx").write_bytes(b"no model")
    with pytest.raises(InvalidArgument, match="cannot be read"):
        map_tiles(tmp_path / "damaged.onnx", IMAGE, **TILES)


@pytest.mark.parametrize("batch", [None, 4])
def test_a_jax_function(batch: int | None, tmp_path: Path) -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed")

    @jax.jit
    def model(part: Any) -> Any:
        return jax.numpy.tanh(part).sum(axis=-3)

    got = map_tiles(model, IMAGE, (16, 16), 4, batch=batch)
    assert_allclose(got, np.tanh(IMAGE).sum(axis=0), atol=1e-5)
    out = tmp_path / "out.zarr"
    result = map_tiles(model, IMAGE, (16, 16), 4, out, cluster="threads", batch=batch)
    assert_array_equal(result.array[...], got)


def test_what_is_no_model_is_refused() -> None:
    for wrong in (3, ["numpy:negative"], None):
        with pytest.raises(InvalidType, match="a PyTorch module"):
            load_model(wrong)
    with pytest.raises(InvalidType, match="str"):
        load_model("os:sep")
