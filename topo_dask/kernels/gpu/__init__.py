"""The kernels on a GPU: same names and answers as `topo_dask.kernels.cpu`.

NumPy arrays in, NumPy arrays out; in between everything stays on the device, so that data crosses
the bus once in each direction.
"""

from topo_dask.kernels.gpu.blend import blend_weight
from topo_dask.kernels.gpu.cells import cell_numbers, cell_table
from topo_dask.kernels.gpu.device import Device, find_device
from topo_dask.kernels.gpu.diffusion import Span, diffusion_flow, diffusion_round, field_types
from topo_dask.kernels.gpu.direct import direct_flow, flow_errors
from topo_dask.kernels.gpu.poisson import flow_of_potential, poisson_flow, poisson_potential
from topo_dask.kernels.gpu.tracking import foreground_voxels, interleave, track, track_voxels

__all__ = [
    "Device",
    "Span",
    "blend_weight",
    "cell_numbers",
    "cell_table",
    "diffusion_flow",
    "diffusion_round",
    "direct_flow",
    "field_types",
    "find_device",
    "flow_errors",
    "flow_of_potential",
    "foreground_voxels",
    "interleave",
    "poisson_flow",
    "poisson_potential",
    "track",
    "track_voxels",
]
