"""Which devices the workers of a run have: asked before work begins, where that can be known."""

from __future__ import annotations

from typing import Any

from topo_dask.errors import BackendUnavailable
from topo_dask.kernels.backends import device_for
from topo_dask.run.cluster import RunningCluster
from topo_dask.run.cluster_options import ClusterOptions
from topo_dask.run.execute import DaskEngine, Engine


def wanted_on(cluster: Any, backend: str) -> str:
    """The backend on a cluster: one of a worker for each GPU is asked for its GPUs.

    Examples
    --------
    >>> wanted_on("gpu", "auto"), wanted_on("gpu", "cpu"), wanted_on("local", "auto")
    ('gpu', 'cpu', 'auto')
    """
    if isinstance(cluster, RunningCluster):
        cluster = cluster.options
    if isinstance(cluster, ClusterOptions):
        cluster = cluster.system
    return "gpu" if backend == "auto" and cluster == "gpu" else backend


def device_here(backend: str) -> tuple[str, str]:
    """Name of the GPU of this process, or nothing; and why."""
    try:
        device, why = device_for(backend)
    except BackendUnavailable as error:
        return "", str(error.came)
    return "" if device is None else device.name, why


def check_devices(engine: Engine, backend: str) -> None:
    """See that workers have a GPU, where one is asked for.

    Raises
    ------
    BackendUnavailable
        Some have none; they are named, and what they lack.
    """
    if backend != "gpu":
        return
    if not isinstance(engine, DaskEngine):
        device_for(backend)
        return
    found = engine.client.run(device_here, backend)  # of workers that are there by now
    lacking = {worker: why for worker, (name, why) in found.items() if not name}
    if lacking:
        worker, why = min(lacking.items())
        raise BackendUnavailable(
            "backend",
            f"'gpu', but {len(lacking)} of {len(found)} workers have none, {worker} because: {why}",
            "workers with an NVIDIA GPU, its driver, and CuPy",
            "Install topo_dask[gpu] there, or choose backend='auto' (--backend auto).",
        )
