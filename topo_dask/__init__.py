"""Flow fields and instance labels for 3-D volumes larger than memory: one answer on any machine."""

from topo_dask import cluster
from topo_dask.classes import (
    EVALUATED_INSTANCE_CLASSES,
    get_instance_class_config,
    get_postprocess_config,
)
from topo_dask.graph.cleanup import compact_relabel, filter_small, remove_bad_flow_masks
from topo_dask.graph.flows import generate_diffusion_flows, generate_direct_flows
from topo_dask.graph.fuse import (
    boundary_flags,
    build_spatial_mask,
    compute_subcrop_slices,
    cosine_blend_weight,
)
from topo_dask.graph.holes import fill_holes
from topo_dask.graph.merge import cluster_convergence, postprocess_single
from topo_dask.graph.pieces import split_disconnected
from topo_dask.graph.segmentation import run_instance_segmentation
from topo_dask.graph.stitch import stitch_flows, stitch_labels, stitch_volumes
from topo_dask.graph.targets import compute_boundary_map, compute_flow_targets
from topo_dask.graph.track import track_flows
from topo_dask.run.compare import compare
from topo_dask.run.flows import flows
from topo_dask.run.instances import instance_table, read_instance_table
from topo_dask.run.map_tiles import map_tiles
from topo_dask.run.mosaic import fuse_mosaic
from topo_dask.run.planning import plan
from topo_dask.run.relabel import relabel
from topo_dask.run.segment import segment
from topo_dask.run.segment_classes import segment_classes
from topo_dask.run.targets import flow_targets
from topo_dask.run.tile_table import read_tile_table

__all__ = [
    "EVALUATED_INSTANCE_CLASSES",
    "boundary_flags",
    "build_spatial_mask",
    "cluster",
    "cluster_convergence",
    "compact_relabel",
    "compare",
    "compute_boundary_map",
    "compute_flow_targets",
    "compute_subcrop_slices",
    "cosine_blend_weight",
    "fill_holes",
    "filter_small",
    "flow_targets",
    "flows",
    "fuse_mosaic",
    "generate_diffusion_flows",
    "generate_direct_flows",
    "get_instance_class_config",
    "get_postprocess_config",
    "instance_table",
    "map_tiles",
    "plan",
    "postprocess_single",
    "read_instance_table",
    "read_tile_table",
    "relabel",
    "remove_bad_flow_masks",
    "run_instance_segmentation",
    "segment",
    "segment_classes",
    "split_disconnected",
    "stitch_flows",
    "stitch_labels",
    "stitch_volumes",
    "track_flows",
]
