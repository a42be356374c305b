"""Clusters by name: ``topo_dask.cluster.start("slurm", jobs=4, cores=8, memory="32GB")``."""

from topo_dask.run.cluster import RunningCluster, job_script, start
from topo_dask.run.cluster_options import ClusterOptions, read_options

__all__ = ["ClusterOptions", "RunningCluster", "job_script", "read_options", "start"]
