"""Flow fields and instance labels for 3-D volumes larger than memory: one answer on any machine."""

from topo_dask.graph.flows import generate_diffusion_flows, generate_direct_flows
from topo_dask.graph.instances import instance_table

__all__ = ["generate_diffusion_flows", "generate_direct_flows", "instance_table"]
