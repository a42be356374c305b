"""The kernels in numba: same names and answers as `topo_dask.kernels.reference`."""

from topo_dask.kernels.contingency import contingency
from topo_dask.kernels.cpu.blend import blend_weight
from topo_dask.kernels.cpu.cells import cell_numbers, cell_table, join_cells
from topo_dask.kernels.cpu.chebyshev import chebyshev_flow
from topo_dask.kernels.cpu.contacts import contacts
from topo_dask.kernels.cpu.diffusion import diffusion_flow
from topo_dask.kernels.cpu.direct import direct_centres, direct_flow, flow_errors
from topo_dask.kernels.cpu.ends import end_sums
from topo_dask.kernels.cpu.holes import background
from topo_dask.kernels.cpu.labels import compact, instance_facts, renamed, rows_of
from topo_dask.kernels.cpu.nearest import label_runs, nearest_labels
from topo_dask.kernels.cpu.pieces import pieces
from topo_dask.kernels.cpu.poisson import flow_of_potential, poisson_flow, poisson_potential
from topo_dask.kernels.cpu.rounds import Span, diffusion_round, field_types
from topo_dask.kernels.cpu.tracking import (
    all_finite,
    foreground_voxels,
    interleave,
    interleave_into,
    track,
    track_volume,
    track_voxels,
)

__all__ = [
    "Span",
    "all_finite",
    "background",
    "blend_weight",
    "cell_numbers",
    "cell_table",
    "chebyshev_flow",
    "compact",
    "contacts",
    "contingency",
    "diffusion_flow",
    "diffusion_round",
    "direct_centres",
    "direct_flow",
    "end_sums",
    "field_types",
    "flow_errors",
    "flow_of_potential",
    "foreground_voxels",
    "instance_facts",
    "interleave",
    "interleave_into",
    "join_cells",
    "label_runs",
    "nearest_labels",
    "pieces",
    "poisson_flow",
    "poisson_potential",
    "renamed",
    "rows_of",
    "track",
    "track_volume",
    "track_voxels",
]
