"""The choice of what computes: checked, carried to where tasks run, never part of the answer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr
from click.testing import CliRunner

import topo_dask
from topo_dask.cli import main
from topo_dask.config import FlowSettings, SegmentSettings
from topo_dask.errors import BackendUnavailable, InvalidArgument, TightMemory
from topo_dask.kernels.backends import device_for
from topo_dask.kernels.computed import noting
from topo_dask.run.cluster_options import ClusterOptions
from topo_dask.run.ledger import fingerprint
from topo_dask.storage import RECORD

GPU_HERE = device_for("auto")[0] is not None
no_gpu = pytest.mark.skipif(GPU_HERE, reason="there is a GPU")

LABELS = np.zeros((4, 6, 8), np.uint16)
LABELS[1:3, 1:5, 1:4], LABELS[1:4, 2:5, 5:7] = 3, 9
FLOW = np.zeros((3, *LABELS.shape), np.float32)
COORDS = np.argwhere(LABELS)
CALLS: dict[str, Any] = {
    "generate_diffusion_flows": ((LABELS,), {}),
    "generate_direct_flows": ((LABELS,), {}),
    "compute_flow_targets": ((LABELS[None], ["nuc"]), {"resolution_nm": 8}),
    "track_flows": ((LABELS, FLOW, 3), {}),
    "cluster_convergence": ((COORDS, COORDS.astype(float), LABELS.shape, 4.0, 1), {}),
    "postprocess_single": ((LABELS, FLOW), {}),
    "run_instance_segmentation": (((LABELS[None] > 0) * 1.0, FLOW, ["nuc"]), {"resolution_nm": 8}),
    "remove_bad_flow_masks": ((LABELS, FLOW), {}),
    "stitch_volumes": (((4,), [(slice(0, 4),)], [np.ones(4)]), {}),
    "stitch_flows": (((4,), [(slice(0, 4),)], [np.ones((3, 4))]), {}),
    "stitch_labels": (((4,), [(slice(0, 4),)], [np.ones(4, int)]), {}),
    "map_tiles": ((np.negative, LABELS, (4, 4, 4), 1), {}),
}
RUNS: dict[str, Any] = {
    "flows": ((LABELS,), {}),
    "segment": ((FLOW,), {"foreground": LABELS}),
    "map_tiles": ((np.negative, LABELS, (4, 4, 4), 1), {}),
    "flow_targets": ((LABELS[None],), {"class_names": ["nuc"], "resolution_nm": 8}),
    "segment_classes": (
        ((LABELS[None] > 0) * 1.0, FLOW),
        {"class_names": ["nuc"], "resolution_nm": 8},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_functions_take_a_backend(name: str) -> None:
    arguments, options = CALLS[name]
    function = getattr(topo_dask, name)
    with pytest.raises(InvalidArgument, match="backend: got 'tpu'; allowed: one of: auto, cpu"):
        function(*arguments, **options, backend="tpu")
    with noting() as computed:
        function(*arguments, **options, backend="cpu")
    assert computed.where == {"processor"}
    if not GPU_HERE:
        with pytest.raises(BackendUnavailable, match="NVIDIA"):
            function(*arguments, **options, backend="gpu")


@no_gpu
def test_lazy_functions_say_so_where_the_task_runs() -> None:
    lazy = topo_dask.generate_direct_flows(da.from_array(LABELS, chunks=4), backend="gpu")
    with pytest.raises(BackendUnavailable, match="NVIDIA"):
        lazy.compute(scheduler="sync")


@pytest.mark.parametrize("name", RUNS)
def test_runs_take_a_backend(name: str, tmp_path: Path) -> None:
    arguments, options = RUNS[name]
    run = getattr(topo_dask, name)
    output = tmp_path / "out.zarr"
    with pytest.raises(InvalidArgument, match="backend: got 'tpu'"):
        run(*arguments, output, **options, cluster="sync", backend="tpu")
    if not GPU_HERE:
        with pytest.raises(BackendUnavailable, match="NVIDIA"):
            run(*arguments, output, **options, cluster="sync", backend="gpu")
        assert not list(tmp_path.iterdir()), "something was left behind"
    run(*arguments, output, **options, cluster="sync", backend="cpu")
    assert output.is_dir()


@no_gpu
def test_workers_without_a_gpu_are_named_before_work(tmp_path: Path) -> None:
    with (
        topo_dask.cluster.start("local", workers=1) as running,
        pytest.raises(BackendUnavailable, match=r"1 of 1 workers have none .tcp://.*NVIDIA"),
    ):
        topo_dask.segment(FLOW, tmp_path / "out.zarr", cluster=running, backend="gpu")
    assert not list(tmp_path.iterdir())


@no_gpu
def test_auto_is_no_error_and_never_the_host_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for choice in ("", "host"):
        monkeypatch.setenv("TOPO_DASK_GPU_DEVICE", choice)
        assert device_for("auto")[0] is None
    assert device_for("gpu")[0] is not None


def test_backend_is_no_part_of_what_is_computed() -> None:
    for settings in (FlowSettings(), SegmentSettings()):
        other = replace(settings, backend="cpu")
        assert other == settings
        assert fingerprint(other) == fingerprint(settings)


def test_results_of_two_backends_have_the_same_metadata(tmp_path: Path) -> None:
    for backend in ("auto", "cpu"):
        where = {"cluster": "sync", "backend": backend}
        topo_dask.flows(LABELS, tmp_path / f"flows-{backend}", method="direct", **where)
        topo_dask.flow_targets(
            LABELS[None],
            tmp_path / f"targets-{backend}",
            class_names=["nuc"],
            resolution_nm=8,
            **where,
        )
    for name in ("flows", "targets"):
        one, other = (zarr.open(tmp_path / f"{name}-{b}").attrs.asdict() for b in ("auto", "cpu"))
        assert json.dumps(one) == json.dumps(other)


def test_command_line_takes_a_backend(tmp_path: Path) -> None:
    zarr.save(tmp_path / "labels.zarr", LABELS)
    paths = [str(tmp_path / "labels.zarr"), str(tmp_path / "flows.zarr")]
    command = ["flows", *paths, "--cluster", "sync", "--no-progress", "--backend"]
    assert CliRunner().invoke(main, [*command, "tpu"]).exit_code == 2
    if not GPU_HERE:
        done = CliRunner().invoke(main, [*command, "gpu"])
        assert done.exit_code == 1
        assert "NVIDIA" in done.output
    assert CliRunner().invoke(main, [*command, "cpu"]).exit_code == 0


@no_gpu
def test_plan_says_what_would_compute_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(backend: str, cluster: Any = "sync") -> Any:
        return topo_dask.plan(
            "segment", FLOW, foreground=LABELS, cluster=cluster, backend=backend, sample=0
        )

    def decision(backend: str, cluster: Any = "sync") -> str:
        found = [d for d in planned(backend, cluster).decisions if d.name == "backend"]
        return "; ".join(map(str, found))

    assert decision("cpu") == "processor: as asked"
    assert re.fullmatch("processor: there is no .*|processor: the NVIDIA .*", decision("auto"))
    assert "every worker" in decision("auto", ClusterOptions("slurm", cores=1, memory="1GB"))
    assert any("backend='gpu', but" in problem for problem in planned("gpu").problems)
    monkeypatch.setenv("TOPO_DASK_GPU_DEVICE", "host")
    assert decision("gpu").startswith("host (CUDA sources run on the CPU): as asked")
    assert not planned("gpu").problems


def test_result_and_record_say_what_computed(tmp_path: Path) -> None:
    made = topo_dask.segment(
        FLOW, tmp_path / "out.zarr", foreground=LABELS, blocks=4, cluster="sync", backend="cpu"
    )
    assert re.fullmatch(r"processor \(\d+ tasks\)", made.details["computed on"])
    record = json.loads(next(tmp_path.rglob(RECORD)).read_text())
    stages = {s["stage"]: s["computed_on"] for s in record["attempts"][-1]["stages"]}
    assert stages["track"] == {"processor": 4}
    assert stages["number"] == {}


def test_plan_knows_the_memory_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device just as large as the plan says computes nothing in parts; a smaller one does."""
    shape = (40, 40, 40)
    labels = np.ones(shape, np.uint16)
    labels[20:] = 2  # one that fills the volume needs no sweep and no device
    flow = np.zeros((3, *shape), np.float32)
    monkeypatch.setenv("TOPO_DASK_GPU_DEVICE", "host")
    jobs: dict[str, Any] = {
        "segment": ((flow,), {"foreground": labels, "blocks": 40, "halo": 0, "min_size": 1}),
        "flows": ((labels,), {"blocks": 40, "n_iter": 4, "context": 4}),
    }
    for job, (arguments, options) in jobs.items():
        how = {**options, "cluster": "sync", "backend": "gpu"}
        monkeypatch.delenv("TOPO_DASK_GPU_MEMORY", raising=False)
        found = topo_dask.plan(job, *arguments, **how, sample=0)
        assert found.device_bytes > 0
        assert not found.problems
        assert "host" in repr(found)
        monkeypatch.setenv("TOPO_DASK_GPU_MEMORY", str(found.device_bytes))
        with tempfile.TemporaryDirectory() as folder:
            made = getattr(topo_dask, job)(*arguments, f"{folder}/whole", **how)
            assert "in parts" not in made.details["computed on"]
            monkeypatch.setenv("TOPO_DASK_GPU_MEMORY", str(found.device_bytes // 3))
            tight = topo_dask.plan(job, *arguments, **how, sample=0)
            assert re.search(r"in parts.*blocks=.*would fit", " ".join(tight.problems))
            with pytest.warns(TightMemory, match="in parts"):
                made = getattr(topo_dask, job)(*arguments, f"{folder}/parts", **how)
            assert "in parts" in made.details["computed on"]


@no_gpu
def test_the_first_task_without_a_gpu_leaves_nothing_behind() -> None:
    """Why there is none is kept in the process; what asked for it must not be kept with it."""
    code = """
import weakref
import numpy as np
from topo_dask.kernels.backends import kernels_for

def task():
    volume = np.zeros(8)
    kernels_for("auto")
    return weakref.ref(volume)

assert task()() is None
"""
    subprocess.run([sys.executable, "-c", code], check=True)
