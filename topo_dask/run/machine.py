"""What a plan needs to know of where a run would go: workers, threads, memory. Starts nothing."""

from __future__ import annotations

from dataclasses import replace

from dask.utils import parse_bytes
from distributed import Client
from distributed.system import MEMORY_LIMIT

from topo_dask.errors import BackendUnavailable
from topo_dask.kernels.parallel import available_cores
from topo_dask.plan.outline import UNKNOWN, Machine
from topo_dask.run import batch
from topo_dask.run.cluster import RunningCluster, connected, visible_gpus
from topo_dask.run.cluster_options import HERE, ClusterOptions
from topo_dask.run.devices import device_here, device_of_workers
from topo_dask.run.execute import Cluster, DaskEngine, Engine, active_client


def machine_of(cluster: Cluster = None, *, backend: str = "") -> Machine:
    """The workers, threads, memory and devices of what `open_engine` would open.

    Parameters
    ----------
    cluster
        See `open_engine`. A scheduler at an address is asked; nothing is started or submitted.
    backend
        What is to compute; empty for jobs that have no use for a GPU.

    Examples
    --------
    >>> machine_of("sync").slots
    1
    """
    machine = _workers_of(cluster)
    if not backend:
        return machine
    device = device_here(backend) if backend == "cpu" or _is_here(cluster) else UNKNOWN
    if isinstance(cluster, DaskEngine) and backend == "gpu":
        device = device_of_workers(cluster.client)
    return replace(machine, device=device)


def _is_here(cluster: Cluster) -> bool:
    """Whether the workers are processes of this machine, or this process."""
    if isinstance(cluster, DaskEngine):
        cluster = cluster.cluster
    if isinstance(cluster, RunningCluster):
        cluster = cluster.options
    if isinstance(cluster, ClusterOptions):
        cluster = cluster.system
    if cluster is None:
        return active_client() is None
    return isinstance(cluster, Engine) or cluster in HERE


def _workers_of(cluster: Cluster) -> Machine:
    if cluster is None:
        cluster = active_client() or "local"
    if isinstance(cluster, RunningCluster):
        return _planned(cluster.options) if cluster.jobs is not None else _asked(cluster.client)
    if isinstance(cluster, Client):
        return _asked(cluster)
    if isinstance(cluster, DaskEngine):
        running = cluster.cluster
        return _workers_of(cluster.client if running is None else running)
    if isinstance(cluster, Engine):
        processes = cluster.name == "processes"
        return _of_pool(cluster.name, cluster.slots, processes=processes)
    options = cluster if isinstance(cluster, ClusterOptions) else ClusterOptions(cluster)
    if options.is_address:
        with connected(options) as client:
            return _asked(client)
    return _planned(options)


def _of_pool(name: str, slots: int, *, processes: bool) -> Machine:
    """Threads share the machine's memory in one process; processes divide it."""
    if processes:
        return Machine(name, slots, 1, MEMORY_LIMIT // slots)
    return Machine(name, 1, slots, MEMORY_LIMIT)


def _asked(client: Client) -> Machine:
    """What a scheduler says: the least memory and the most threads of any worker."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    limits = [w["memory_limit"] for w in workers if w["memory_limit"]]
    threads = max((w["nthreads"] for w in workers), default=1)
    address = str(client.scheduler.address) if client.scheduler else "dask"
    return Machine(address, max(1, len(workers)), threads, min(limits, default=None))


def _planned(options: ClusterOptions) -> Machine:
    """What a cluster of these options would have."""
    cores, name = available_cores(), options.system
    memory = None if options.memory is None else int(parse_bytes(options.memory))
    if options.is_batch:
        job = batch.arguments(options)
        processes = int(job["processes"])
        each = int(parse_bytes(str(job["memory"]))) // processes
        threads = max(1, int(job["cores"]) // processes)
        return Machine(name, (options.jobs or 1) * processes, threads, each)
    if name in ("sync", "threads", "processes"):
        slots = 1 if name == "sync" else options.workers or cores
        return _of_pool(name, slots, processes=name == "processes")
    cards = _cards(options) if name == "gpu" else 0
    workers = cards or options.workers or min(cores, 8)
    threads = 1 if name == "gpu" else options.cores or max(1, -(-cores // workers))
    # As dask divides it: by threads.
    share = int(MEMORY_LIMIT * min(1.0, threads / cores))
    return Machine(name, workers, threads, memory or share)


def _cards(options: ClusterOptions) -> int:
    """GPUs that a cluster of GPUs would have; where there is none, that one is not there."""
    try:
        return len(visible_gpus()[: options.workers])
    except BackendUnavailable:
        return 1
