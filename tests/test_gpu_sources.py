"""The CUDA sources compile for every GPU they are meant for, and run on the host as written."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from shutil import which

import numpy as np
import pytest

from topo_dask.errors import DeviceMemoryError, InvalidArgument
from topo_dask.kernels.gpu import Device, find_device, sources
from topo_dask.kernels.gpu.host import MEMORY

OLDEST = [75, 80, 90]  # and the newest that the compiler knows


def nvcc_targets(nvcc: str) -> list[int]:
    done = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = [int(number) for number in re.findall(r"compute_(\d+)$", done.stdout, re.MULTILINE)]
    assert set(OLDEST) < set(known), f"{nvcc} knows {known}"
    return sorted({*OLDEST, max(known)})


def all_sources() -> str:
    """All in one file, each in a namespace of its own: reading CUDA's own headers takes longest."""
    parts = [f"namespace {name} {{\n{sources.text(name)}\n}}" for name in sources.names()]
    return "\n".join(parts)


def kernels() -> list[str]:
    return [kernel for name in sources.names() for kernel in sources.kernels(name)]


def test_sources_compile_with_nvcc(tmp_path: Path) -> None:
    nvcc = which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on the PATH")
    (tmp_path / "all.cu").write_text(all_sources(), encoding="utf-8")
    targets = nvcc_targets(nvcc)
    assert len(targets) >= 4
    command = [
        nvcc,
        "-fatbin",
        "--no-compress",
        "-std=c++17",
        "-fmad=false",
        "-Werror",
        "all-warnings",
    ]
    command += [f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets]
    command += ["--threads", "2", "-o", "all.fatbin", "all.cu"]
    help_ = subprocess.run([nvcc, "--help"], capture_output=True, text=True, check=True).stdout
    if "--Ofast-compile" in help_:  # what is checked is the same
        command += ["--Ofast-compile=max"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = (tmp_path / "all.fatbin").read_bytes()
    assert not [name for name in kernels() if made.count(name.encode()) < len(targets)]


def test_sources_compile_with_nvrtc() -> None:
    nvrtc = pytest.importorskip("cupy", reason="no CuPy").cuda.nvrtc
    try:
        known = nvrtc.getSupportedArchs()
    except Exception as error:  # the library that CuPy looks for has no error of its own
        pytest.skip(f"no NVRTC: {error}")
    for target in sorted({*OLDEST, max(known)}):
        program = nvrtc.createProgram(all_sources(), "all.cu", (), ())
        try:
            options = [f"--gpu-architecture=sm_{target}", "--std=c++17", "--fmad=false"]
            if nvrtc.getVersion() >= (12, 9):
                options.append("--Ofast-compile=max")
            nvrtc.compileProgram(program, options)
            log = nvrtc.getProgramLog(program)
            assert not log.strip("\0 \n"), log
            made = nvrtc.getCUBIN(program)
            assert not [name for name in kernels() if name.encode() not in made]
        finally:
            nvrtc.destroyProgram(program)


@pytest.mark.parametrize("name", sources.names())
def test_every_kernel_is_declared_so_that_arguments_can_be_checked(name: str) -> None:
    found = sources.kernels(name)
    assert len(found) == sources.text(name).count("\nextern") > 0
    assert all(parameters[0].name == "count" for parameters in found.values())


def test_neighbour_mask_marks_the_neighbours_of_the_same_instance(device: Device) -> None:
    local = np.array([[[1, 1, 2], [0, 1, 2]]], dtype=np.int32)
    links = device.empty(8, np.uint8)
    device.launch("diffusion", "neighbour_mask", 8, device.put(local), links, 1, 2, 3, 4)
    z, y_low, y_high, x_low, x_high = 3, 4, 8, 16, 32  # faces count as the same
    expected = [
        [z + y_low + x_low + x_high, z + y_low + y_high + x_low, z + y_low + y_high + x_high, 0],
        [0, z + y_low + y_high, z + y_low + y_high + x_high, 0],
    ]
    assert device.get(links).reshape(2, 4).tolist() == expected


def test_wrong_arguments_are_refused_before_the_launch(device: Device) -> None:
    links = device.empty(8, np.uint8)
    wrong = device.zeros((1, 2, 3), np.int64)
    with pytest.raises(TypeError, match="local is int64"):
        device.launch("diffusion", "neighbour_mask", 8, wrong, links, 1, 2, 3, 4)
    with pytest.raises(TypeError, match="got 2 arguments"):
        device.launch("diffusion", "neighbour_mask", 8, links)


def test_host_memory_runs_out_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPO_DASK_GPU_DEVICE", "host")
    device = find_device()
    monkeypatch.setenv(MEMORY, "1000")
    before = device.free_memory_bytes()
    kept = device.zeros(before, np.uint8)
    with pytest.raises(DeviceMemoryError, match="8 bytes more"):
        device.empty(1, np.float64)
    del kept
    assert device.free_memory_bytes() == before


def test_unknown_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPO_DASK_GPU_DEVICE", "abacus")
    with pytest.raises(InvalidArgument, match='"host", or unset'):
        find_device()
