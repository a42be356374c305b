"""Which devices the workers of a run have: asked before work begins, where that can be known."""

from __future__ import annotations

from typing import Any

from distributed import Client

from topo_dask.errors import BackendUnavailable
from topo_dask.kernels.backends import device_for
from topo_dask.plan.outline import UNKNOWN, DeviceFacts
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


def device_here(backend: str) -> DeviceFacts:
    """The GPU of this process."""
    try:
        device, why = device_for(backend)
    except BackendUnavailable as error:
        return DeviceFacts(why=str(error.came).removeprefix('"gpu", but '))
    if device is None:
        return DeviceFacts(why=why)
    return DeviceFacts(device.name, device.memory_bytes(), why)


def device_of_workers(client: Client) -> DeviceFacts:
    """That of the worker with the least memory on it, or why some worker has none."""
    found: dict[str, DeviceFacts] = client.run(device_here, "gpu")  # of those there by now
    if not found:
        return UNKNOWN
    lacking = {worker: facts.why for worker, facts in found.items() if not facts.name}
    if lacking:
        worker, why = min(lacking.items())
        which = f"{len(lacking)} of {len(found)} workers have none"
        return DeviceFacts(why=f"{which} ({worker}: {why})")
    return min(found.values(), key=lambda facts: facts.memory or 0)


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
    facts = device_of_workers(engine.client)
    if facts.known and not facts.name:
        raise BackendUnavailable(
            "backend",
            f"'gpu', but {facts.why}",
            "workers with an NVIDIA GPU, its driver, and CuPy",
            "Install topo_dask[gpu] there, or choose backend='auto' (--backend auto).",
        )
