"""The reference cases through the public functions on a GPU: the processor's answers.

Each runs on the host device, which executes the CUDA sources, and marked `gpu` on a real one where
there is one. Labels and positions are the same to the bit, flows agree to 1e-4.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import case, unwrap, wrap

import topo_dask
from topo_dask.kernels.computed import noting
from topo_dask.kernels.gpu import Device

KINDS = pytest.mark.parametrize("kind", ["numpy", "chunks"])
TOLERANCE = 1e-4


def near(flow: Any, expected: np.ndarray) -> None:
    assert flow.dtype == np.float32
    np.testing.assert_allclose(flow, expected, rtol=0, atol=TOLERANCE)


def same(labels: np.ndarray, expected: np.ndarray) -> None:
    assert labels.dtype == expected.dtype
    assert labels.tobytes() == expected.tobytes()


# --------------------------------------------------------------------------------------- arrays


@KINDS
@pytest.mark.parametrize(
    ("name", "expected", "options"),
    [
        ("ellipsoids", "diffusion_n200", {}),
        ("ellipsoids", "diffusion_n60_fixed", {"n_iter": 60, "adaptive_iters": False}),
        ("tubes", "diffusion_n400", {"n_iter": 400}),
        ("tutorial", "diffusion_n200", {"n_iter": 200}),
    ],
)
def test_diffusion_flows(
    device: Device, name: str, expected: str, options: dict[str, Any], kind: str
) -> None:
    if kind == "chunks" and expected != "diffusion_n60_fixed":
        pytest.skip("one case in chunks is enough")
    arrays = case(name)
    with noting() as computed:
        flow = topo_dask.generate_diffusion_flows(
            wrap(arrays["instances"], kind), **options, backend="gpu"
        )
        made = unwrap(flow, kind)
    near(made, arrays[expected])
    assert computed.where == {device.name}


@pytest.mark.parametrize("potential", ["heat", "poisson"])
def test_other_potentials_agree_with_the_processor(device: Device, potential: str) -> None:
    labels = case("ellipsoids")["instances"]
    options: dict[str, Any] = {"potential": potential, "spacing": (2.0, 1.0, 1.0)}
    made, plain = (
        topo_dask.generate_diffusion_flows(labels, **options, backend=backend)
        for backend in ("gpu", "cpu")
    )
    near(made, plain)


@KINDS
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_direct_flows(device: Device, masked: bool, kind: str) -> None:
    arrays = case("ellipsoids")
    labels = arrays["instances"]
    mask = wrap(topo_dask.build_spatial_mask(labels.shape), kind) if masked else None
    flow = topo_dask.generate_direct_flows(wrap(labels, kind), mask, backend="gpu")
    near(unwrap(flow, kind), arrays["direct_spatial_mask" if masked else "direct"])


@KINDS
@pytest.mark.parametrize("interpolation", ["nearest", "linear"])
def test_final_positions(device: Device, interpolation: str, kind: str) -> None:
    arrays = case("ellipsoids")
    mask, flow = (wrap(a, kind) for a in (arrays["instances"] > 0, arrays["noisy_flow"]))
    how = int(arrays["track_steps"]), float(arrays["track_step_size"])
    coords, ends = (
        unwrap(a, kind)
        for a in topo_dask.track_flows(mask, flow, *how, interpolation=interpolation, backend="gpu")
    )
    plain = topo_dask.track_flows(mask, flow, *how, interpolation=interpolation, backend="cpu")
    same(coords, unwrap(plain[0], kind))
    same(ends, unwrap(plain[1], kind))
    if kind == "numpy":  # labels are a mask too
        options: Any = {"interpolation": interpolation, "backend": "gpu"}
        same(topo_dask.track_flows(arrays["instances"], flow, *how, **options)[1], ends)
    if interpolation == "nearest" and kind == "numpy":
        np.testing.assert_allclose(ends, arrays["final_positions"], rtol=0, atol=1e-9)


@KINDS
@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("name", ["ellipsoids", "tubes"])
def test_labels(device: Device, name: str, group: int, kind: str) -> None:
    arrays = case(name)
    mask, flow = (wrap(a, kind) for a in (arrays["instances"] > 0, arrays["noisy_flow"]))
    how = {
        "n_steps": int(arrays.get("n_steps", arrays.get("track_steps"))),
        "step_size": float(arrays.get("step_size", arrays.get("track_step_size"))),
        "convergence_radius": float(arrays["convergence_radius"]),
        "min_size": int(arrays["min_size"]),
        "group": group,
    }
    with noting() as computed:
        made = unwrap(topo_dask.postprocess_single(mask, flow, **how, backend="gpu"), kind)
    assert computed.where == {device.name}
    same(made, unwrap(topo_dask.postprocess_single(mask, flow, **how, backend="cpu"), kind))
    if group == 1:
        same(made, arrays["group1"])


def test_classes(device: Device) -> None:
    arrays = case("multiclass")
    names = arrays["class_names"].tolist()
    config = json.loads(str(arrays["flow_config"]))
    flows, _ = topo_dask.compute_flow_targets(
        arrays["instance_ids"], names, config, 8, backend="gpu"
    )
    near(flows, arrays["flows"])
    probabilities = (arrays["instance_ids"] > 0).astype(np.float32)
    config = json.loads(str(arrays["postprocess_config"]))
    for threshold, title in ((0.0, "instances"), (0.2, "instances_qc02")):
        found = topo_dask.run_instance_segmentation(
            probabilities, arrays["flows"], names, config, threshold, resolution_nm=8, backend="gpu"
        )
        plain = topo_dask.run_instance_segmentation(
            probabilities, arrays["flows"], names, config, threshold, resolution_nm=8, backend="cpu"
        )
        for name in names:
            same(found[name], plain[name])
            assert found[name].max() == arrays[f"{title}_{name}"].max()


def test_flow_check(device: Device) -> None:
    arrays = case("tubes")
    made = topo_dask.remove_bad_flow_masks(
        arrays["group1"], arrays["noisy_flow"], 0.4, backend="gpu"
    )
    same(made, arrays["bad_removed_of_group1_t04"])


# ---------------------------------------------------------------------------------------- on disk


def files_of(folder: Path) -> dict[str, bytes]:
    """Chunks and metadata by their paths; the record of a run says when and where it was made."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "run.json"
    }


@pytest.mark.parametrize("group", [1, 2, 3])
def test_segment_on_disk_gives_the_same_files(device: Device, group: int, tmp_path: Path) -> None:
    arrays = case("ellipsoids")
    how: dict[str, Any] = {
        "foreground": arrays["instances"],
        "n_steps": 60,
        "min_size": 20,
        "group": group,
        "flow_error_threshold": 0.9 if group == 1 else 0.0,
        "blocks": (24, 30, 25),
        "cluster": "sync",
    }
    made = topo_dask.segment(arrays["noisy_flow"], tmp_path / "gpu" / "out", backend="gpu", **how)
    plain = topo_dask.segment(arrays["noisy_flow"], tmp_path / "cpu" / "out", backend="cpu", **how)
    assert plain.array[:].any()
    same(made.array[:], plain.array[:])
    assert files_of(tmp_path / "gpu") == files_of(tmp_path / "cpu")
    assert made.details["computed on"].startswith(device.name)


@pytest.mark.parametrize(
    "options",
    [{}, {"rounds": 16}, {"method": "direct"}, {"overlap": 6}, {"potential": "poisson"}],
    ids=["context", "rounds", "direct", "tiles", "poisson"],
)
def test_flows_on_disk(device: Device, options: dict[str, Any], tmp_path: Path) -> None:
    labels = case("ellipsoids")["instances"]
    how: dict[str, Any] = {"n_iter": 60, "blocks": (24, 30, 25), "cluster": "sync", **options}
    made = topo_dask.flows(labels, tmp_path / "gpu", backend="gpu", **how)
    plain = topo_dask.flows(labels, tmp_path / "cpu", backend="cpu", **how)
    near(made.array[:], plain.array[:])


@pytest.mark.slow
def test_workers_find_the_device_for_themselves(device: Device, tmp_path: Path) -> None:
    arrays = case("ellipsoids")
    how: dict[str, Any] = {"foreground": arrays["instances"], "n_steps": 20, "blocks": 28}
    plain = topo_dask.segment(
        arrays["noisy_flow"], tmp_path / "cpu", backend="cpu", cluster="sync", **how
    )
    with topo_dask.cluster.start("local", workers=1) as running:
        made = topo_dask.segment(
            arrays["noisy_flow"], tmp_path / "gpu", backend="gpu", cluster=running, **how
        )
    same(made.array[:], plain.array[:])
    assert made.details["computed on"].startswith(device.name)
