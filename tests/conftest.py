"""Settings of every test. Profiles of hypothesis: `default`, and `nightly` for `make nightly`."""

from __future__ import annotations

import gc
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import which

import pytest
from hypothesis import HealthCheck, settings
from slurm import Slurm, why_not

from topo_dask.errors import BackendUnavailable
from topo_dask.kernels.gpu import Device, find_device

# The same cases on every machine and in every run: a failure here is a failure everywhere.
settings.register_profile(
    "default",
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("nightly", settings.get_profile("default"), max_examples=5_000)
settings.load_profile("default")


def pytest_configure() -> None:
    """Mind Ctrl-C where a shell began the tests in its background, which has them ignore it.

    Drivers that the tests begin would inherit that, and are sent one.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A real Slurm, where its packages are installed."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # short: sockets have a limit
        made = Slurm(Path(folder))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(made.configuration))
            try:
                made.start()
                yield made
            finally:
                made.stop()


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    """What the kernels of a GPU run on: the host device, and a real one where there is one."""
    if request.param == "host":
        if which("g++") is None:
            pytest.skip("no g++ to build the CUDA sources for the CPU")
        monkeypatch.setenv("TOPO_DASK_GPU_DEVICE", "host")
        return find_device()
    monkeypatch.delenv("TOPO_DASK_GPU_DEVICE", raising=False)
    try:
        return find_device()
    except BackendUnavailable as error:
        pytest.skip(str(error))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say on how many devices the kernels of a GPU ran."""
    passed = [report.nodeid for report in terminalreporter.getreports("passed")]
    real = sum("[cuda" in name for name in passed)
    host = sum("[host" in name for name in passed)
    if real or host:
        devices = int(real > 0)
        text = f"GPU: {real} tests on {devices} real device{'s' * (devices != 1)}"
        terminalreporter.write_line(f"{text}, {host} on the host device")


@pytest.fixture
def sockets_collected() -> Iterator[None]:
    """For tests that kill workers: where dask dials one, it leaves the socket to the collector.

    That is to happen in this test, which lets the warning go, and not in the next.
    """
    yield
    for _ in range(3):
        gc.collect()
