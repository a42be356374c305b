"""Examples in the docstrings of the GPU kernels run on the host device, where g++ can build it."""

from __future__ import annotations

from pathlib import Path
from shutil import which

import pytest

GPU = Path(__file__).parent / "topo_dask" / "kernels" / "gpu"


@pytest.fixture(autouse=True)
def examples_on_the_host_device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Choose that device for the tests of files beside the kernels, which are their examples."""
    if GPU in request.node.path.parents:
        if which("g++") is None:
            pytest.skip("no g++ to build the CUDA sources for the CPU")
        monkeypatch.setenv("TOPO_DASK_GPU_DEVICE", "host")
